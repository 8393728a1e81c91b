// The view of one pool: its numbers, the heat map, and the table of its backends.

import { attention, backendColumns, filterText, first, matches, shareScale } from './backends.js';
import { button, find, h, raw, setAttribute, setText } from './dom.js';
import { isOpen } from './drawer.js';
import { HeatMap } from './heatmap.js';
import { STATES, STATE_NAMES, model } from './model.js';
import { signOf } from './parts.js';
import { Table } from './table.js';
import { clean, count, integer, latency, perSecond } from './text.js';

/** Rows of a small pool, and of a large one until more are asked for. */
const ROWS = { smallPool: 50, small: 200, large: 20, more: 200 };

const FIGURES = [
  ['Eligible backends', (pool) => `${integer(pool.eligible)} of ${integer(pool.backends.length)}`],
  ['Sessions', (pool) => count(pool.active)],
  ['New', (pool) => perSecond(pool.rate)],
  ['First byte p99, median', (pool) => latency(pool.medianP99)],
  ['First byte p99, worst', (pool) => latency(pool.worstP99)],
  ['Queued clients', (pool) => integer(pool.queued)],
];

function missingPool(name) {
  const where = `in generation ${model.status.generation}. `;
  const text = h(
    'p.empty',
    'There is no pool ',
    raw(name),
    ' ',
    where,
    h('a', { href: '#/' }, 'Overview'),
  );
  find('#view').replaceChildren(h('div.panel', text));
  return { name: 'pool', pool: name, update: () => {}, isGone: () => model.pools.has(name) };
}

function settingsOf(pool) {
  const probe = pool.probe;
  const settings = [pool.balance];
  settings.push(probe ? `${probe.kind} probes every ${probe.interval_seconds} s` : 'no probes');
  if (pool.slow_start_seconds) settings.push(`slow start ${pool.slow_start_seconds} s`);
  if (pool.frozen) settings.push(`frozen: ${clean(pool.frozen.reason ?? pool.frozen)}`);
  return settings.join(' · ');
}

/** Buttons that show one state. */
class StateChips {
  constructor(state, changed) {
    this.state = state;
    this.changed = changed;
    this.chips = new Map(['', ...STATE_NAMES].map((name) => [name, this.chip(name)]));
    const attributes = { role: 'group', 'aria-label': 'Show by state' };
    this.element = h('div.chips', attributes, ...this.chips.values());
  }

  chip(name) {
    const click = () => this.choose(this.state === name ? '' : name);
    const label = name ? STATES[name].word : 'All';
    return h(
      'button.chip',
      { type: 'button', on: { click } },
      name && signOf(name),
      h('span', label),
      h('b'),
    );
  }

  choose(state) {
    this.state = state;
    this.changed();
  }

  update(pool) {
    for (const [name, chip] of this.chips) {
      const backends = name ? pool.states[name] : pool.backends.length;
      setText(chip.lastChild, integer(backends));
      chip.hidden = Boolean(name) && !backends && this.state !== name;
      setAttribute(chip, 'aria-pressed', String(this.state === name));
    }
  }
}

class PoolView {
  constructor(name, state) {
    Object.assign(this, {
      name: 'pool',
      pool: name,
      key: '',
      ascending: false,
      extra: 0,
      scale: 1,
    });
    this.chips = new StateChips(state, () => this.reset());
    this.shown = (backend) => {
      const { state: only } = this.chips;
      return (!only || backend.state === only) && matches(backend, filterText());
    };
    this.columns = backendColumns(false, () => this.scale);
    const options = { hold: true, selected: isOpen, sort: (column) => this.sort(column) };
    const title = 'Backends of ' + clean(name);
    this.table = new Table(title, this.columns, (backend) => backend.name, options);
    this.map = new HeatMap(name, () => this.document(), this.shown);
    this.build();
  }

  document() {
    return model.pools.get(this.pool);
  }

  build() {
    this.settings = h('p.mut');
    this.figures = FIGURES.map(([label]) => [h('dt', label), h('dd')]);
    this.title = h('h2');
    this.rest = h('span');
    this.showMore = button(`Show ${ROWS.more} more`, () => this.moreRows());
    this.worstFirst = button('Worst first', () => this.sort(null));
    this.more = h('div.more', this.rest, this.showMore, this.worstFirst);
    const crumb = h('p.crumb', h('a', { href: '#/' }, 'Overview'), ' / pool');
    const head = h('div', crumb, h('div.title', h('h1.raw', clean(this.pool)), this.settings));
    const top = h('div.top', this.title, this.chips.element);
    const attributes = { 'aria-label': 'Backends' };
    const list = h(
      'section.panel',
      attributes,
      top,
      h('div.scroll', this.table.element),
      this.more,
    );
    const figures = h(
      'dl.figures',
      this.figures.map((pair) => h('div', pair)),
    );
    find('#view').replaceChildren(head, figures, this.map.element, list);
  }

  reset() {
    this.extra = 0;
    this.table.showOrder(this.key, this.ascending);
    this.update();
  }

  moreRows() {
    this.extra += ROWS.more;
    this.update();
  }

  sort(column) {
    if (column && column.key === this.key) this.ascending = !this.ascending;
    else this.ascending = column?.key === 'name';
    this.key = column?.key ?? '';
    this.reset();
  }

  /** Shows one state; used by links to this view. */
  choose(state) {
    this.chips.choose(state);
  }

  /** Whether a reload has removed the pool, so that the view must be made again. */
  isGone() {
    return !this.document();
  }

  update() {
    const pool = this.document();
    if (!pool) return;
    const total = pool.backends.length;
    this.scale = shareScale(pool.backends);
    setText(this.settings, settingsOf(pool));
    FIGURES.forEach(([, text], at) => setText(this.figures[at][1], text(pool)));
    this.chips.update(pool);
    const found = pool.backends.filter(this.shown);
    const most = (total > ROWS.smallPool ? ROWS.large : ROWS.small) + this.extra;
    const column = this.columns.find((candidate) => candidate.key === this.key);
    this.table.update(first(found, column?.order ?? attention, this.ascending, most));
    this.updateNotes(found.length, total, most);
    this.map.update();
  }

  updateNotes(found, total, most) {
    const cut = found > most;
    const title = cut
      ? `${this.key ? 'First' : 'Worst'} ${most}`
      : `${integer(found)} of ${integer(total)}`;
    setText(this.title, !cut && found === total ? `All ${integer(total)}` : title);
    this.more.hidden = !cut && !this.key && found > 0;
    this.showMore.hidden = !cut;
    this.worstFirst.hidden = !this.key;
    const shown = `${integer(Math.min(most, found))} of ${integer(found)} shown`;
    setText(this.rest, found ? shown : 'No backend matches. Clear the filter, or choose All.');
  }
}

/** The view of a pool, or a note that there is none. `state` is '' or the state to show. */
export function poolView(name, state) {
  return model.pools.has(name) ? new PoolView(name, state) : missingPool(name);
}
