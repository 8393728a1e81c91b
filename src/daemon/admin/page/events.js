// The view of events: a bar per minute of the last hour, and the list, newest first.

import { filterText } from './backends.js';
import { find, findAll, h, raw, setAttribute, setText, svg } from './dom.js';
import { backendLink, findBackend, model } from './model.js';
import { signOf } from './parts.js';
import { clock, counted, duration, integer } from './text.js';

const KINDS = {
  '': 'All',
  state: 'State',
  operator: 'Operator',
  config: 'Configuration',
  process: 'Process',
  limit: 'Limit',
};

/** Sign of each level. `info` has a sign of its own. */
const SIGNS = { bad: 'down', warn: 'suspect', good: 'up', info: 'info' };

const ROWS_MAX = 200;
const MINUTES = 60;
const BARS = { width: 600, height: 72, column: 10, bar: 8 };

const isWarning = (event) => event.level === 'bad' || event.level === 'warn';

function matchesText(event, text) {
  return `${event.subject} ${event.text} ${event.who} ${event.kind}`.toLowerCase().includes(text);
}

/** Events per minute of the last hour: `[warnings, others]`. */
function perMinute(events, now) {
  const minutes = Array.from({ length: MINUTES }, () => [0, 0]);
  for (const event of events) {
    const at = MINUTES - 1 - Math.floor((now - event.at) / 60);
    if (at >= 0 && at < MINUTES) minutes[at][isWarning(event) ? 0 : 1] += 1;
  }
  return minutes;
}

function updateBars(bars, events, now) {
  const minutes = perMinute(events, now);
  const most = Math.max(3, ...minutes.map(([warnings, others]) => warnings + others));
  const scale = (n) => (n / most) * (BARS.height - 4);
  const rects = minutes.flatMap(([warnings, others], at) => {
    const x = at * BARS.column;
    const low = scale(others);
    const high = scale(warnings);
    const rect = (kind, y, height) => svg('rect.' + kind, { x, y, width: BARS.bar, height });
    const lower = others && rect('bar-other', BARS.height - low, low);
    const upper = warnings && rect('bar-warning', BARS.height - low - high, high);
    return [lower, upper].filter(Boolean);
  });
  bars.setAttribute('aria-label', `Events in the last hour; the most in a minute: ${most}`);
  bars.replaceChildren(
    ...rects,
    svg('rect.bar-base', { y: BARS.height - 1, width: BARS.width, height: 1 }),
  );
}

function subjectOf(event) {
  const [pool, ...rest] = event.subject.split('/');
  const backend = rest.length ? findBackend(pool, rest.join('/')) : null;
  if (!backend) return h('b', raw(event.subject));
  return h('a.handle', { href: backendLink(pool, backend.name) }, raw(event.subject));
}

function row(event, now) {
  const attributes = {
    datetime: new Date(event.at * 1e3).toISOString(),
    title: duration(now - event.at) + ' ago',
  };
  const changes = (event.changes ?? []).map((change) => h('li', raw(change)));
  return h(
    'div.event',
    h('time.mut', attributes, clock(event.at)),
    signOf(SIGNS[event.level] ?? 'info'),
    h('div.words', subjectOf(event), ' ', raw(event.text), changes.length > 0 && h('ul', changes)),
    h('div.originator', raw(event.who || 'tidegate')),
  );
}

class EventsView {
  constructor() {
    Object.assign(this, { name: 'events', kind: '', shown: '' });
    const box = {
      viewBox: `0 0 ${BARS.width} ${BARS.height}`,
      preserveAspectRatio: 'none',
      role: 'img',
    };
    this.bars = svg('svg.bars', box);
    this.list = h('div');
    this.note = h('div.more');
    const chips = Object.entries(KINDS).map(([kind, label]) => this.chip(kind, label));
    this.chips = h('div.chips', { role: 'group', 'aria-label': 'Kind' }, chips);
    const key = h(
      'span.legend',
      h('span', h('i.key-high2'), 'warnings and errors'),
      h('span', h('i.key-heat2'), 'others, one bar per minute'),
    );
    const caption = h('figcaption.axis.mut', h('span', '−60 min'), key, h('span', 'now'));
    const top = h('div.top', h('h1', 'Events'), this.chips);
    const figure = h('figure.heat', this.bars, caption);
    const panel = h('section.panel', { 'aria-label': 'Events' }, top, figure, this.list, this.note);
    find('#view').replaceChildren(panel);
  }

  chip(kind, label) {
    const click = () => {
      this.kind = kind;
      this.update();
    };
    return h('button.chip', { type: 'button', 'data-kind': kind, on: { click } }, label, h('b'));
  }

  update() {
    const text = filterText();
    const now = Date.now() / 1e3;
    const newest = model.events[model.events.length - 1]?.seq;
    const key = [newest, text, this.kind, model.eventsError, Math.floor(now / 20)].join();
    if (key === this.shown) return;
    this.shown = key;
    const matching = model.events.filter((event) => matchesText(event, text));
    for (const chip of findAll('.chip', this.chips)) {
      const { kind } = chip.dataset;
      const events = kind ? matching.filter((event) => event.kind === kind) : matching;
      setAttribute(chip, 'aria-pressed', String(kind === this.kind));
      setText(chip.lastChild, integer(events.length));
    }
    const list = matching.filter((event) => !this.kind || event.kind === this.kind).reverse();
    updateBars(this.bars, list, now);
    this.list.replaceChildren(...list.slice(0, ROWS_MAX).map((event) => row(event, now)));
    setText(this.note, this.noteOf(list.length));
  }

  noteOf(found) {
    if (model.eventsError) return `The list of events is not available: ${model.eventsError}`;
    if (!found) return 'No event matches. Esc clears the filter.';
    const shown = Math.min(ROWS_MAX, found);
    return `${integer(shown)} of ${counted(found, 'event')}. The balancer keeps the last 10,000, also over upgrades.`;
  }
}

export const eventsView = () => new EventsView();
