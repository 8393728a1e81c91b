// A table whose rows stay where they are while a person points at them. Used by every view with a
// list. Makes and removes rows, and updates cells in place.

import { findAll, h, setAttribute, setText } from './dom.js';

/** Rows keep their order for this time, in milliseconds. */
const HOLD = 3000;

/**
 * A column: `title` or `label` (for screen readers only), `key`, `classes`, `width`, `order` (the
 * value to sort by), `make(cell, item)` once, and `update(cell, item)` on each change.
 */
export const textColumn = (text, options) => ({
  update: (cell, item) => {
    setText(cell, text(item));
    if (options?.hot) cell.classList.toggle('hot', Boolean(options.hot(item)));
  },
  ...options,
});

function header(column, sort) {
  const title = column.title ?? h('span.sr', column.label);
  const sortable = column.order && sort;
  const click = () => sort(column);
  const inside = sortable
    ? h('button.sort', { type: 'button', title: column.hint, on: { click } }, title)
    : title;
  const cell = h('th', { scope: 'col', class: column.classes }, inside);
  if (column.width) cell.style.width = column.width;
  return cell;
}

export class Table {
  /**
   * `keyOf(item)` names a row. Options: `hold` keeps the order of rows, `sort(column)` handles a
   * click on a header, `heading` is the position of the column that names a row, and `selected(item)`
   * tells whether a row is highlighted.
   */
  constructor(caption, columns, keyOf, options = {}) {
    this.columns = columns;
    this.keyOf = keyOf;
    this.options = { heading: 0, ...options };
    this.rows = new Map();
    this.order = [];
    this.ordered = 0;
    this.headers = columns.map((column) => header(column, options.sort));
    this.body = h('tbody');
    this.element = h(
      'table',
      h('caption.sr', caption),
      h('thead', h('tr', this.headers)),
      this.body,
    );
  }

  /** Shows by which column the rows are sorted. The next update uses the new order at once. */
  showOrder(key, ascending) {
    this.columns.forEach((column, at) => {
      const direction = ascending ? 'ascending' : 'descending';
      setAttribute(this.headers[at], 'aria-sort', key && column.key === key ? direction : null);
    });
    this.ordered = 0;
  }

  /** Whether a person points at a row or has the focus in one. */
  isBusy() {
    return this.body.matches(':hover') || this.body.contains(document.activeElement);
  }

  held(items) {
    const now = performance.now();
    const keep = this.options.hold && this.ordered && (this.isBusy() || now - this.ordered < HOLD);
    if (!keep) {
      this.ordered = now;
      return items;
    }
    const places = new Map(this.order.map((key, at) => [key, at]));
    const place = (item) => places.get(this.keyOf(item)) ?? Infinity;
    return items.slice().sort((a, b) => (place(a) === place(b) ? 0 : place(a) - place(b)));
  }

  row(item, key) {
    const known = this.rows.get(key);
    if (known) return known;
    const cells = this.columns.map((column, at) => {
      const heading = at === this.options.heading;
      const attributes = { class: column.classes, scope: heading ? 'row' : null };
      const cell = h(heading ? 'th' : 'td', attributes);
      column.make?.(cell, item);
      return cell;
    });
    const row = h('tr', cells);
    this.rows.set(key, row);
    return row;
  }

  update(items) {
    const list = this.held(items);
    this.order = list.map(this.keyOf);
    const kept = new Set(this.order);
    list.forEach((item, at) => {
      const row = this.row(item, this.order[at]);
      this.columns.forEach((column, cell) => column.update?.(row.children[cell], item));
      row.classList.toggle('selected', Boolean(this.options.selected?.(item)));
      if (this.body.children[at] !== row)
        this.body.insertBefore(row, this.body.children[at] ?? null);
    });
    for (const [key, row] of this.rows) {
      if (kept.has(key)) continue;
      row.remove();
      this.rows.delete(key);
    }
  }
}

/** Links and buttons that name the rows in view, in order. */
export const rowHandles = () =>
  findAll('#view tbody .handle').filter((element) => element.offsetParent);
