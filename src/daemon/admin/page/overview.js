// The first view: frontends, pools, and the backends if there are few or if a filter is set.

import {
  attention,
  backendColumns,
  filterText,
  first,
  matches,
  shareScale,
  sparkColumn,
} from './backends.js';
import { find, h, setText } from './dom.js';
import { isOpen } from './drawer.js';
import { allBackends, fullName, model, poolLink } from './model.js';
import { stateStrip, updateStateStrip } from './parts.js';
import { Table, textColumn } from './table.js';
import { bytesPerSecond, clean, count, counted, integer, latency, perSecond } from './text.js';

/** Up to this many backends, the overview lists all of them in the order of the file. */
const ALL_MAX = 12;

/** Backends that a filter lists. */
const FOUND_MAX = 20;

/** Rejected clients per second that are highlighted. */
const REFUSED = 0.5;

const link = (text, address) => h('a.handle.raw', { href: address }, clean(text));

function refusedText({ refused }) {
  const now = refused.filter((entry) => entry.rate > 0);
  return now.map((entry) => `${perSecond(entry.rate)} ${clean(entry.reason)}`).join(', ') || '0/s';
}

const FRONTEND_COLUMNS = [
  {
    title: 'Frontend',
    width: '13rem',
    make: (cell, frontend) => cell.append(h('b.raw', clean(frontend.name))),
  },
  {
    title: 'Listens on',
    classes: 'mono wide2',
    ...textColumn((frontend) => frontend.binds.join(' ')),
  },
  {
    title: 'Pool',
    classes: 'wide2',
    width: '8rem',
    make: (cell, { pool }) => cell.append(pool == null ? 'by route' : link(pool, poolLink(pool))),
  },
  {
    title: 'Sessions',
    classes: 'num',
    width: '6.5rem',
    ...textColumn((frontend) => count(frontend.sessions_active)),
  },
  {
    title: 'New',
    classes: 'num',
    width: '13rem',
    ...sparkColumn(
      (frontend) => frontend.new_minute,
      'New sessions',
      (frontend) => frontend.new_rate,
    ),
  },
  {
    title: 'In',
    classes: 'num wide2',
    width: '6.5rem',
    ...textColumn((frontend) => bytesPerSecond(frontend.in_rate)),
  },
  {
    title: 'Out',
    classes: 'num wide2',
    width: '6.5rem',
    ...textColumn((frontend) => bytesPerSecond(frontend.out_rate)),
  },
  {
    title: 'First byte p99',
    classes: 'num wide3',
    width: '8rem',
    ...textColumn((frontend) => latency(frontend.first_byte_p99)),
  },
  {
    title: 'Rejected',
    classes: 'num wide1',
    width: '10.5rem',
    ...textColumn(refusedText, {
      hot: (frontend) => frontend.refused.some((entry) => entry.rate >= REFUSED),
    }),
  },
];

const POOL_COLUMNS = [
  {
    title: 'Pool',
    width: '13rem',
    make: (cell, { name }) => cell.append(link(name, poolLink(name))),
  },
  { title: 'Policy', classes: 'wide2', ...textColumn((pool) => pool.balance) },
  {
    title: 'Eligible backends',
    width: '16rem',
    make: (cell) => cell.append(stateStrip()),
    update: (cell, pool) => updateStateStrip(cell.firstChild, pool),
  },
  {
    title: 'Sessions',
    classes: 'num wide2',
    width: '6.5rem',
    ...textColumn((pool) => count(pool.active)),
  },
  {
    title: 'New',
    classes: 'num wide1',
    width: '13rem',
    ...sparkColumn(
      (pool) => pool.new_minute,
      'New sessions',
      (pool) => pool.rate,
    ),
  },
  {
    title: 'p99 median',
    classes: 'num wide3',
    width: '6.5rem',
    ...textColumn((pool) => latency(pool.medianP99)),
  },
  {
    title: 'p99 worst',
    classes: 'num wide2',
    width: '6.5rem',
    ...textColumn((pool) => latency(pool.worstP99), {
      hot: (pool) => pool.worstP99 > pool.medianP99 * 5,
    }),
  },
  {
    title: 'Queued',
    classes: 'num wide3',
    width: '6rem',
    ...textColumn((pool) => integer(pool.queued), { hot: (pool) => pool.queued > 0 }),
  },
];

function panel(title, table, ...rest) {
  const top = h('div.top', h('h2', title));
  return h('section.panel', { 'aria-label': title }, top, h('div.scroll', table.element), ...rest);
}

function noteOf(found) {
  if (!found.length) return 'No backend matches. Esc clears the filter.';
  if (found.length <= FOUND_MAX) return `${counted(found.length, 'match', 'matches')}.`;
  return `${FOUND_MAX} of ${integer(found.length)} matches. Type more, or open a pool.`;
}

export function overview() {
  const scales = new Map();
  const frontends = new Table('Frontends', FRONTEND_COLUMNS, (frontend) => frontend.name);
  const pools = new Table('Pools', POOL_COLUMNS, (pool) => pool.name);
  const columns = backendColumns(true, (backend) => scales.get(backend.pool));
  const options = { hold: true, selected: isOpen };
  const backends = new Table('Backends', columns, fullName, options);
  const note = h('p.more');
  const list = panel('Backends', backends, note);
  const few = allBackends().length <= ALL_MAX;
  const order = [panel('Frontends', frontends), panel('Pools', pools)];
  order.splice(few ? 1 : 0, 0, list);
  find('#view').replaceChildren(...order);

  function updateBackends() {
    const text = filterText();
    list.hidden = !text && !few;
    note.hidden = !text;
    if (list.hidden) return;
    for (const pool of model.pools.values()) scales.set(pool, shareScale(pool.backends));
    const found = allBackends().filter((backend) => matches(backend, text));
    backends.update(text ? first(found, attention, false, FOUND_MAX) : found);
    setText(note, noteOf(found));
  }

  function update() {
    frontends.update(model.status.frontends);
    pools.update(model.status.pools);
    updateBackends();
  }
  return { name: 'overview', update };
}
