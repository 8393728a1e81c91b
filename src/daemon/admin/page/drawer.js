// The drawer: one backend, why it gets sessions or not, and its last hour. It stays open while the
// list is used, and follows the stream. Opened by the router in main.js.

import { closeSessionsOf, drain, undrain } from './actions.js';
import { backendPath, get } from './api.js';
import { latencyChart, stateChart } from './chart.js';
import { button, find, h, raw, setAttribute, setText, svg, toast } from './dom.js';
import { findBackend, fullName, model, shareError } from './model.js';
import { stateLabel, updateStateLabel } from './parts.js';
import {
  NBSP,
  bytes,
  bytesPerSecond,
  clean,
  count,
  counted,
  duration,
  integer,
  latency,
  percent,
  perSecond,
  sentence,
  signedPercent,
} from './text.js';

/** Widest and narrowest chart, in units of its own. */
const CHART = { most: 568, least: 300 };

/** Sessions that the drawer lists. */
const SESSIONS = 5;

const open = { backend: null, parts: null, from: null };

export const isOpen = (backend) => open.backend === backend;
export const openBackend = () => open.backend;

// === words ===

const VERDICTS = {
  up: () => 'it is up, at full weight.',
  down: (reason) => `it is down. ${reason}`,
  ejected: (reason) => `it is ejected. ${reason}`,
  suspect: (reason) => `it is suspect, with a part of its weight. ${reason}`,
  draining: () => 'it is draining.',
  unknown: () => 'it has no probe result yet, or no connect to it has succeeded.',
  joining: () => 'its slow start is running.',
  standby: () => 'it is a backup, and serves if the lower tiers need it.',
};

function verdict(backend) {
  const words = backend.eligible ? 'Gets new sessions: ' : 'Gets no new sessions: ';
  return [h('b', words), raw(VERDICTS[backend.state](sentence(backend.last_transition?.reason)))];
}

function notes(backend) {
  const { pool, state, last_transition: last } = backend;
  const list = [];
  if (state === 'down' && last) {
    list.push(`Before that it was ${last.from} for ${duration(last.lasted_seconds)}.`);
    if (pool.probe)
      list.push(`It returns after ${counted(pool.probe.rise, 'successful probe')} in a row.`);
  }
  if (state === 'suspect' && backend.first_byte_seconds.p99 != null) {
    const [own, middle] = [latency(backend.first_byte_seconds.p99), latency(pool.medianP99)];
    list.push(
      `Its p99 of the time to the first byte is ${own}. The median of the pool is ${middle}.`,
    );
  }
  const sessions = backend.sessions_active;
  if (sessions && (state === 'down' || state === 'draining')) {
    const verb = sessions === 1 ? 'is' : 'are';
    list.push(`${counted(sessions, 'session')} ${verb} still open.`);
  }
  return list;
}

function shareText(backend) {
  if (!backend.eligible) return 'It gets none of the new sessions of its pool.';
  const error = shareError(backend);
  const difference = error == null ? '' : ` (${signedPercent(error)})`;
  return `It gets ${percent(backend.gets)} of the new sessions of its pool. Its expected share is ${percent(backend.should)}${difference}.`;
}

// === weight ===

/** Steps from the configured weight to the effective one: label, text, and weight after it. */
function weightSteps(backend) {
  const { weight, ramp_percent: ramp } = backend;
  const health = backend.health_percent;
  const load = backend.load_percent;
  const times = (value) => `×${NBSP}${Math.round(value)}${NBSP}%`;
  const afterHealth = (weight * health) / 100;
  const afterRamp = (afterHealth * ramp) / 100;
  return [
    ['Configured', String(weight), weight],
    ['Health', times(health), afterHealth],
    ['Slow start', times(ramp), afterRamp],
    ['Load', times(load), (afterRamp * load) / 100],
    ['Effective', String(Number(backend.effective_weight.toFixed(2))), backend.effective_weight],
  ];
}

function weightRow(last) {
  const box = { viewBox: '0 0 100 12', preserveAspectRatio: 'none', 'aria-hidden': 'true' };
  const bars = svg('svg', box, svg('rect.lost', { height: 12 }), svg('rect.left', { height: 12 }));
  const sum = last ? '.sum' : '';
  return [h('span' + sum), h('span.value' + sum), bars];
}

function updateWeight(element, backend) {
  const steps = weightSteps(backend);
  if (!element.firstChild) {
    element.append(...steps.flatMap((_, at) => weightRow(at === steps.length - 1)));
  }
  const width = (weight) => Math.min(100, (weight / (backend.weight || 1)) * 100).toFixed(1);
  steps.forEach(([label, text, weight], at) => {
    const [name, value, bars] = [0, 1, 2].map((cell) => element.children[at * 3 + cell]);
    setText(name, label);
    setText(value, text);
    setAttribute(bars.firstChild, 'width', width(at ? steps[at - 1][2] : weight));
    setAttribute(bars.lastChild, 'width', width(weight));
  });
}

// === numbers ===

const FIGURES = [
  [
    'Sessions',
    ({ sessions_active: active, connections_max: cap }) =>
      cap ? `${count(active)} of ${count(cap)}` : count(active),
  ],
  ['New', (backend) => perSecond(backend.new_rate)],
  ['In', (backend) => bytesPerSecond(backend.in_rate)],
  ['Out', (backend) => bytesPerSecond(backend.out_rate)],
  [
    'First byte p50, p99',
    ({ first_byte_seconds: times }) => `${latency(times.p50)}, ${latency(times.p99)}`,
  ],
  ['Failed connects', (backend) => integer(backend.connect_failures_total)],
];

// === the last hour ===

function probesSection(probes, kind) {
  const succeeded = probes.filter((probe) => probe.ok).length;
  const label = `${succeeded} of the last ${counted(probes.length, 'probe')} succeeded`;
  const marks = probes.map((probe) => {
    const result = probe.ok ? latency(probe.ms / 1e3) : clean(probe.text);
    const title = `${duration(probe.seconds_ago)} ago: ${result}`;
    return h(probe.ok ? 'span' : 'span.failed', { title }, probe.ok ? '✓' : '✕');
  });
  const heading = h('h3', 'Last probes', h('span.mut', `${kind ?? ''}, the newest on the right`));
  return h('section', heading, h('div.probes', { role: 'img', 'aria-label': label }, marks));
}

function sessionsSection(backend, { sessions }) {
  const all = `#/sessions?filter=${encodeURIComponent(fullName(backend))}`;
  const rows = sessions.map((session) => {
    const words = `, idle ${duration(session.idle_seconds)}, ${bytes(session.bytes_out)} out`;
    const text = h('span', h('span.mono', raw(session.client)), words);
    return h('li', h('span.mut', duration(session.age_seconds)), text);
  });
  const heading = h('h3', 'Oldest sessions', h('a', { href: all }, 'Show all'));
  return h(
    'section',
    heading,
    rows.length ? h('ul.changes', rows) : h('p.mut', 'No open session.'),
  );
}

function shellSection(backend) {
  const command = `tidegate explain ${clean(fullName(backend))}`;
  const code = h('code.command', { tabindex: 0, 'aria-label': 'Command' }, command);
  return h('section', h('h3', 'The same in a shell'), code);
}

/** Asks for the last hour and the sessions of the backend, and shows them below. */
async function load(backend, element) {
  const query = new URLSearchParams({
    pool: backend.pool.name,
    backend: backend.name,
    limit: SESSIONS,
  });
  let hour;
  let sessions;
  try {
    [hour, sessions] = await Promise.all([
      get(backendPath(backend.pool.name, backend.name, 'history')),
      get('/v1/sessions?' + query),
    ]);
  } catch (error) {
    if (isOpen(backend)) element.replaceChildren(h('p.mut', raw(`No history: ${error.message}`)));
    return;
  }
  if (open.parts?.hour !== element) return;
  const width = Math.max(CHART.least, Math.min(CHART.most, element.clientWidth));
  const { minutes } = hour;
  element.replaceChildren(
    stateChart(hour.states, width),
    latencyChart('First byte', minutes.first_p50, minutes.first_p99, hour.pool_first_p99, width),
    latencyChart('Connect', minutes.connect_p50, minutes.connect_p99, null, width),
    hour.probes.length ? probesSection(hour.probes, backend.pool.probe?.kind) : '',
    sessionsSection(backend, sessions),
    shellSection(backend),
  );
}

// === opening, following and closing ===

function build(backend) {
  const parts = {
    state: stateLabel(),
    actions: h('div.row'),
    verdict: h('p.verdict'),
    notes: h('ul.notes'),
    weight: h('div.weight'),
    share: h('p.mut'),
    figures: FIGURES.map(([label]) => [h('dt', label), h('dd')]),
    hour: h('div'),
    title: h('h2.raw', { tabindex: -1 }, clean(fullName(backend))),
    key: '',
  };
  const leave = h(
    'button.icon',
    { type: 'button', 'aria-label': 'Close (Esc)', on: { click: close } },
    '✕',
  );
  const name = h('div', parts.title, h('p.mono.mut.raw', clean(backend.address)));
  const weight = h('h3', 'Weight', h('span.mut', 'configured × health × slow start × load'));
  const figures = h(
    'dl.figures',
    parts.figures.map((pair) => h('div', pair)),
  );
  find('#drawer').replaceChildren(
    h('header', h('div.title', name, leave), h('div.title', parts.state, parts.actions)),
    h('section', parts.verdict, parts.notes),
    h('section', weight, parts.weight, parts.share),
    h('section', h('h3', 'Now'), figures),
    parts.hour,
  );
  return parts;
}

/** Opens the drawer for a backend. If there is no such backend, the drawer closes, with a note. */
export function openDrawer(pool, name) {
  const backend = findBackend(pool, name);
  const element = find('#drawer');
  if (!backend) {
    hide();
    toast(
      `There is no backend ${clean(pool)}/${clean(name)} in generation ${model.status.generation}.`,
    );
    return;
  }
  if (!open.backend) open.from = document.activeElement;
  open.backend = backend;
  element.hidden = false;
  element.setAttribute('aria-label', 'Backend ' + clean(fullName(backend)));
  open.parts = build(backend);
  element.scrollTop = 0;
  load(backend, open.parts.hour);
  updateDrawer();
  open.parts.title.focus({ preventScroll: true });
}

function updateActions({ actions }, backend) {
  const ready = backend.intent === 'ready';
  actions.replaceChildren(
    ready
      ? button('Drain', () => drain(open.backend))
      : button('Undrain', () => undrain(open.backend)),
    button('Close sessions', () => closeSessionsOf(open.backend)),
  );
}

/** Called after each message of the stream. */
export function updateDrawer() {
  if (!open.backend) return;
  const backend = findBackend(open.backend.pool.name, open.backend.name);
  if (!backend) return close();
  open.backend = backend;
  const { parts } = open;
  updateStateLabel(parts.state, backend);
  const key = [
    backend.state,
    backend.intent,
    backend.eligible,
    backend.last_transition?.reason,
  ].join();
  if (parts.key !== key) {
    parts.key = key;
    updateActions(parts, backend);
    parts.verdict.replaceChildren(...verdict(backend));
  }
  const lines = notes(backend);
  while (parts.notes.children.length < lines.length) parts.notes.append(h('li'));
  while (parts.notes.children.length > lines.length) parts.notes.lastChild.remove();
  lines.forEach((text, at) => setText(parts.notes.children[at], text));
  updateWeight(parts.weight, backend);
  setText(parts.share, shareText(backend));
  FIGURES.forEach(([, text], at) => setText(parts.figures[at][1], text(backend)));
}

/** Hides the drawer and returns the focus. The address stays. */
export function hide() {
  if (!open.backend) return;
  const { from } = open;
  Object.assign(open, { backend: null, parts: null, from: null });
  find('#drawer').hidden = true;
  if (from?.isConnected) from.focus({ preventScroll: true });
}

/** Hides the drawer, and changes the address to that of the view below. */
export function close() {
  hide();
  document.dispatchEvent(new CustomEvent('drawer-closed'));
}
