// What the page knows: the newest status, changed by the stream. Views read it. It computes what
// depends on all backends of a pool, once per change. Never touches the document.

import { NBSP, clean, counted, duration } from './text.js';

/** Values of a sparkline: one per second. */
const MINUTE = 60;

/** Most events that the page keeps. The balancer keeps as many. */
const EVENTS_MAX = 10000;

/** States of a backend, the worst first. A sign goes with each colour. */
export const STATES = {
  down: { sign: '✕', word: 'down' },
  ejected: { sign: '⊘', word: 'ejected' },
  suspect: { sign: '?', word: 'suspect' },
  joining: { sign: '↗', word: 'joining' },
  draining: { sign: '↓', word: 'draining' },
  standby: { sign: '◦', word: 'standby' },
  unknown: { sign: '·', word: 'not probed yet' },
  up: { sign: '✓', word: 'up' },
};
export const STATE_NAMES = Object.keys(STATES);
const RANKS = new Map(STATE_NAMES.map((name, rank) => [name, rank]));
export const rankOf = (state) => RANKS.get(state);

export const model = {
  /** The document of `/v1/status` with the fields of the stream; `null` before the first one. */
  status: null,
  pools: new Map(),
  events: [],
  /** Why there are no events, or ''. */
  eventsError: '',
  /** When the last message arrived, by `performance.now()`. */
  heard: 0,
  paused: false,
  stale: false,
};

function stateOf(backend) {
  if (backend.observation === 'down') return 'down';
  if (backend.ejected) return 'ejected';
  if (backend.intent !== 'ready') return 'draining';
  if (backend.observation === 'suspect') return 'suspect';
  if (backend.observation === 'unknown' && !backend.eligible) return 'unknown';
  if (backend.ramp_percent < 100) return 'joining';
  if (backend.backup && !backend.should) return 'standby';
  return 'up';
}

const secondsSince = (mark) => (performance.now() - mark) / 1e3;

/** Seconds since the backend has its state, or `null`. */
export function secondsInState(backend) {
  const intent = backend.intent !== 'ready' ? backend.intent_seconds : null;
  const seconds = intent ?? backend.last_transition?.seconds_ago;
  return seconds == null ? null : seconds + secondsSince(backend.at);
}

export const fullName = (backend) => `${backend.pool.name}/${backend.name}`;
export const poolLink = (pool) => `#/pool/${encodeURIComponent(pool)}`;
export const backendLink = (pool, backend) => `${poolLink(pool)}/${encodeURIComponent(backend)}`;
export const linkOf = (backend) => backendLink(backend.pool.name, backend.name);

/** Why the backend is in its state; '' if it is up. */
export function reasonOf(backend) {
  if (backend.state === 'up') return '';
  if (backend.state === 'draining') {
    const sessions = backend.sessions_active;
    return sessions ? `${counted(sessions, 'session')} open` : 'no open sessions';
  }
  if (backend.state === 'joining')
    return `${Math.round(backend.ramp_percent)}${NBSP}% of its weight`;
  return clean(backend.last_transition?.reason);
}

/** How far the share of new sessions is from the expected one, as a fraction; `null` if unknown. */
export function shareError(backend) {
  return backend.should > 0 && backend.new_rate > 0.3 ? backend.gets / backend.should - 1 : null;
}

export const allBackends = () => [...model.pools.values()].flatMap((pool) => pool.backends);

export function findBackend(pool, name) {
  return model.pools.get(pool)?.byName.get(name) ?? null;
}

function push(list, value, max = MINUTE) {
  list.push(value);
  if (list.length > max) list.shift();
}

/** Computes the states, sums and medians of a pool. */
function tally(pool) {
  pool.states = Object.fromEntries(STATE_NAMES.map((state) => [state, 0]));
  Object.assign(pool, { eligible: 0, active: 0, rate: 0, weightSum: 0, configuredSum: 0 });
  const slow = new Float32Array(pool.backends.length);
  let measured = 0;
  for (const backend of pool.backends) {
    backend.state = stateOf(backend);
    pool.states[backend.state] += 1;
    pool.active += backend.sessions_active;
    pool.rate += backend.new_rate;
    pool.eligible += backend.eligible ? 1 : 0;
    pool.weightSum += backend.effective_weight;
    pool.configuredSum += backend.weight;
    const p99 = backend.first_byte_seconds.p99;
    if (p99 != null) slow[measured++] = p99;
  }
  const sorted = slow.subarray(0, measured).sort();
  pool.medianP99 = measured ? sorted[measured >> 1] : null;
  pool.worstP99 = measured ? sorted[measured - 1] : null;
}

/** Index of the fields of a row after the position of its backend. */
const ROW = [
  'sessions_active',
  'new_rate',
  'in_rate',
  'out_rate',
  'gets',
  'should',
  'effective_weight',
  'ramp_percent',
];

function takeRow(backend, row, now) {
  ROW.forEach((field, at) => {
    backend[field] = row[at + 1];
  });
  backend.connect_seconds = { p50: row[9], p99: row[10] };
  backend.first_byte_seconds = { p50: row[11], p99: row[12] };
  backend.eligible = Boolean(row[13]);
  backend.changed = now;
}

function takeSnapshot(status, now) {
  const former = model.pools;
  model.status = status;
  model.pools = new Map();
  for (const pool of status.pools) {
    const known = former.get(pool.name)?.byName;
    pool.byName = new Map();
    pool.backends.forEach((backend, position) => {
      Object.assign(backend, { position, pool, at: now, minute: known?.get(backend.name)?.minute });
      pool.byName.set(backend.name, backend);
    });
    model.pools.set(pool.name, pool);
    tally(pool);
  }
}

/** Applies the changes of one second. Positions are those of the last snapshot. */
function takeDelta(delta, now) {
  const { status } = model;
  const { frontends, pools, ...head } = delta;
  Object.assign(status, head);
  frontends.forEach((changes, position) => {
    const frontend = status.frontends[position];
    Object.assign(frontend, changes);
    push(frontend.new_minute, frontend.new_rate);
  });
  pools.forEach((changes, position) => {
    const pool = status.pools[position];
    const { rows, ...fields } = changes;
    Object.assign(pool, fields);
    for (const row of rows) takeRow(pool.backends[row[0]], row, now);
    for (const backend of pool.backends) if (backend.minute) push(backend.minute, backend.new_rate);
    tally(pool);
    push(pool.new_minute, pool.rate);
  });
}

/** Replaces the document of one backend. Returns the words for screen readers. */
function takeTransition({ pool, backend: name, row }, now) {
  const backend = findBackend(pool, name);
  if (!backend) return '';
  Object.assign(backend, row, { at: now });
  tally(backend.pool);
  return `${clean(fullName(backend))} is ${STATES[backend.state].word}`;
}

/** Applies a message of the stream. Returns words to announce, or ''. */
export function take(kind, document) {
  const now = performance.now();
  model.heard = now;
  if (kind === 'event') push(model.events, document, EVENTS_MAX);
  else if (kind === 'snapshot') takeSnapshot(document, now);
  else if (kind === 'delta' && !model.paused && model.status) takeDelta(document, now);
  else if (kind === 'transition' && model.status) return takeTransition(document, now);
  return '';
}

/** Merges the events that `/v1/events` has returned with those of the stream. */
export function takeEvents(list) {
  const newest = list.length ? list[list.length - 1].seq : 0;
  model.events = [...list, ...model.events.filter((event) => event.seq > newest)];
}

/** The newest change of a backend's state in words, or ''. */
export function lastChange() {
  const event = model.events.findLast((candidate) => candidate.kind === 'state');
  if (!event) return '';
  const ago = duration(Math.max(0, Date.now() / 1e3 - event.at));
  return `Last change ${ago} ago: ${clean(event.subject)} ${clean(event.text)}.`;
}
