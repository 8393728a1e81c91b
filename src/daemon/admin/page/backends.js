// The table of backends: its columns, the order by need of attention, and the filter. Used by the
// overview and by the view of a pool.

import { backendPath, get } from './api.js';
import { find, h } from './dom.js';
import { STATES, fullName, linkOf, rankOf, reasonOf, shareError } from './model.js';
import {
  shareBar,
  sparkline,
  stateLabel,
  updateShareBar,
  updateSparkline,
  updateStateLabel,
  weightText,
} from './parts.js';
import { textColumn } from './table.js';
import { clean, count, latency, perSecond } from './text.js';

/** A p99 above this multiple of the pool's median is highlighted. */
const SLOW = 5;

/** The last 60 seconds of a backend, asked for when it is first shown. */
function minuteOf(backend) {
  if (!backend.minute) {
    backend.minute = [];
    get(backendPath(backend.pool.name, backend.name, 'minute')).then(
      (list) => backend.minute.unshift(...list),
      () => {},
    );
  }
  return backend.minute;
}

export function sparkColumn(values, what, rate) {
  return {
    make: (cell) => cell.append(h('div.pair', h('span.num'), sparkline(what))),
    update: (cell, item) => {
      const [number, spark] = cell.firstChild.children;
      number.textContent = perSecond(rate(item));
      updateSparkline(spark, values(item), what);
    },
  };
}

/** Backends by the element that names their row, for keys. */
export const backendOfHandle = new WeakMap();

function nameColumn(withPool) {
  const click = (event) => {
    location.hash = linkOf(backendOfHandle.get(event.currentTarget));
  };
  return {
    key: 'name',
    title: 'Backend',
    width: withPool ? '10rem' : '8rem',
    order: (backend) => backend.name,
    make: (cell, backend) => {
      const name = clean(withPool ? fullName(backend) : backend.name);
      cell.append(h('button.handle.raw', { type: 'button', on: { click } }, name));
    },
    update: (cell, backend) => backendOfHandle.set(cell.firstChild, backend),
  };
}

const p99Of = (backend) => backend.first_byte_seconds.p99;

/** `scaleOf(backend)` is the share of a full bar. `withPool` names the pool of each backend. */
export const backendColumns = (withPool, scaleOf) => [
  nameColumn(withPool),
  {
    key: 'state',
    title: 'State',
    width: '10rem',
    order: (backend) => -rankOf(backend.state),
    make: (cell) => cell.append(stateLabel()),
    update: (cell, backend) => updateStateLabel(cell.firstChild, backend),
  },
  { key: 'reason', title: 'Reason', classes: 'wide2 raw reason', ...textColumn(reasonOf) },
  {
    key: 'share',
    title: 'Share, expected share',
    hint: 'Share of the new sessions of the pool. Sorts by the difference.',
    classes: 'wide1',
    width: '14rem',
    order: (backend) => Math.abs(shareError(backend) ?? 0),
    make: (cell) => cell.append(shareBar()),
    update: (cell, backend) => updateShareBar(cell.firstChild, backend, scaleOf(backend)),
  },
  {
    key: 'weight',
    title: 'Weight',
    hint: 'Effective weight of configured weight',
    classes: 'num wide3',
    width: '5.5rem',
    order: (backend) => backend.effective_weight,
    ...textColumn(weightText),
  },
  {
    key: 'sessions',
    title: 'Sessions',
    classes: 'num',
    width: '5.5rem',
    order: (backend) => backend.sessions_active,
    ...textColumn((backend) => count(backend.sessions_active)),
  },
  {
    key: 'new',
    title: 'New',
    classes: 'num wide2',
    width: '12rem',
    order: (backend) => backend.new_rate,
    ...sparkColumn(minuteOf, 'New sessions', (backend) => backend.new_rate),
  },
  {
    key: 'p50',
    title: 'First byte p50',
    classes: 'num wide3',
    width: '7rem',
    order: (backend) => backend.first_byte_seconds.p50 ?? 0,
    ...textColumn((backend) => latency(backend.first_byte_seconds.p50)),
  },
  {
    key: 'p99',
    title: 'p99',
    hint: 'p99 of the time to the first byte',
    classes: 'num wide0',
    width: '5.5rem',
    order: (backend) => p99Of(backend) ?? 0,
    ...textColumn((backend) => latency(p99Of(backend)), {
      hot: (backend) => p99Of(backend) > backend.pool.medianP99 * SLOW,
    }),
  },
];

/**
 * How much a backend needs attention. Coarse steps, so that healthy backends keep the order of the
 * file and their rows do not move.
 */
export function attention(backend) {
  const median = backend.pool.medianP99;
  const slow = median ? (p99Of(backend) ?? 0) / median : 0;
  const error = Math.abs(shareError(backend) ?? 0);
  const worst = Object.keys(STATES).length - 1 - rankOf(backend.state);
  const latencyStep = slow > 3 ? Math.min(400, Math.round(slow) * 10) : 0;
  const shareStep = error > 0.25 ? Math.min(90, Math.round(error * 4) * 10) : 0;
  return worst * 1000 + latencyStep + shareStep;
}

/** The first `most` backends in this order, found in one pass: 10,000 are not sorted each second. */
export function first(backends, order, ascending, most) {
  const sign = ascending ? 1 : -1;
  const compare = (a, b) =>
    a.value === b.value
      ? a.backend.position - b.backend.position
      : a.value < b.value
        ? -sign
        : sign;
  const list = [];
  for (const backend of backends) {
    const entry = { value: order(backend), backend };
    if (list.length === most && compare(entry, list[most - 1]) >= 0) continue;
    let low = 0;
    let high = list.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (compare(list[middle], entry) <= 0) low = middle + 1;
      else high = middle;
    }
    list.splice(low, 0, entry);
    if (list.length > most) list.pop();
  }
  return list.map((entry) => entry.backend);
}

export const filterText = () => find('#filter').value.trim().toLowerCase();

/** Whether name, address, state or reason contain the text. */
export function matches(backend, text) {
  if (!text) return true;
  const words = [fullName(backend), backend.address, STATES[backend.state].word, reasonOf(backend)];
  return words.join(' ').toLowerCase().includes(text);
}

/** Share of a full bar: the largest expected share, and a bit more. */
export function shareScale(backends) {
  let most = 0;
  for (const { should, gets } of backends)
    most = Math.max(most, should, Math.min(gets, should * 3));
  return most * 1.05 || 1;
}
