// The heat map of a pool: one cell per backend, coloured by state, p99, share or load. One tab stop
// for keys and screen readers. Used by the view of a pool. Draws only cells that have changed.

import { h, setAttribute, setText } from './dom.js';
import { STATES, STATE_NAMES, linkOf, shareError } from './model.js';
import { signOf } from './parts.js';
import { clean, counted, latency, percent } from './text.js';

/** Pools below this size have no heat map: the table shows every backend. */
const BACKENDS_MIN = 13;

const MODES = { state: 'State', p99: 'First byte p99', share: 'Share', load: 'Load' };

const HINT = 'Point at a cell, or use the arrow keys. n finds the next backend that is not up.';

/** Colour of each state. */
const STATE_INKS = {
  up: 'up-t',
  down: 'down',
  ejected: 'down',
  suspect: 'suspect',
  joining: 'joining',
  draining: 'draining',
  standby: 'edge',
  unknown: 'edge',
};

const SHARE_INKS = ['low2', 'low1', 'heat0', 'high1', 'high2'];
const HEAT_INKS = ['heat0', 'heat1', 'heat2', 'heat3', 'heat4'];

/** Strokes of states in cells that are too small for a sign: lines from and to, as parts of a cell. */
const STROKES = {
  down: [
    [0.15, 0.15, 0.85, 0.85],
    [0.85, 0.15, 0.15, 0.85],
  ],
  ejected: [
    [0.15, 0.15, 0.85, 0.85],
    [0.85, 0.15, 0.15, 0.85],
  ],
  suspect: [[0, 0.5, 1, 0.5]],
  joining: [[0.15, 0.85, 0.85, 0.15]],
  draining: [[0.5, 0, 0.5, 1]],
  standby: [[0.3, 0.5, 0.7, 0.5]],
};

/** Cells below this size, in pixels, have strokes instead of signs. */
const SIGN_MIN = 14;

// === colours ===

let inks = new Map();
const sample = h('i', { hidden: true });
document.body.append(sample);

function ink(name) {
  if (!inks.has(name)) {
    sample.style.color = `var(--${name})`;
    inks.set(name, getComputedStyle(sample).color);
  }
  return inks.get(name);
}

let inkGeneration = 0;

/** Reads the colours again: the theme has changed, or the page has become stale or live. */
export function forgetColours() {
  inks = new Map();
  inkGeneration += 1;
}

// === what a cell shows ===

/** Position of a value in steps of ¾, 1½, 3 and 6 times the middle. */
function heatStep(ratio) {
  return [0.75, 1.5, 3, 6].filter((edge) => ratio >= edge).length;
}

function shareStep(error) {
  if (error == null) return 2;
  return [-0.5, -0.2, 0.2, 0.5].filter((edge) => error > edge).length;
}

/** Load of a backend, as a multiple of the mean; with a cap, a third of the cap counts as the mean. */
function loadRatio(backend) {
  const { pool } = backend;
  if (backend.connections_max) return (backend.sessions_active / backend.connections_max) * 3;
  if (!backend.weight || !pool.active) return 0;
  return backend.sessions_active / backend.weight / (pool.active / pool.configuredSum);
}

/** `{ink, sign, state}` of a cell. */
function appearance(backend, mode) {
  const { state } = backend;
  const byState =
    mode === 'state' || state === 'down' || state === 'ejected' || state === 'draining';
  if (byState)
    return { ink: STATE_INKS[state], sign: state === 'up' ? '' : STATES[state].sign, state };
  if (mode === 'share') {
    const step = shareStep(shareError(backend));
    return { ink: SHARE_INKS[step], sign: ['−', '', '', '', '+'][step], state: '' };
  }
  const p99 = backend.first_byte_seconds.p99 ?? 0;
  const ratio = mode === 'p99' ? p99 / (backend.pool.medianP99 || 1) : loadRatio(backend);
  const step = heatStep(ratio);
  return { ink: HEAT_INKS[step], sign: step === 4 ? '!' : '', state: '' };
}

function legendOf(pool, mode) {
  if (mode === 'state') return [];
  if (mode === 'share') {
    const words = ['less than half −', 'less', 'its share ±20 %', 'more', 'more than 1.5 × +'];
    return SHARE_INKS.map((name, at) => [name, words[at]]);
  }
  const middle = mode === 'p99' ? `near the median (${latency(pool.medianP99)})` : 'near the mean';
  const words = ['less than ¾ ×', middle, '1.5 ×', '3 ×', '6 × and more !'];
  return HEAT_INKS.map((name, at) => [name, words[at]]);
}

function describe(backend) {
  const { state, first_byte_seconds: times, gets, should } = backend;
  const share = `share ${percent(gets)}, expected ${percent(should)}`;
  const sessions = counted(backend.sessions_active, 'session');
  return `${clean(backend.name)} ${clean(backend.address)}: ${STATES[state].word}, first byte p99 ${latency(times.p99)}, ${share}, ${sessions}`;
}

// === drawing ===

/** Size of the cells for a canvas of this width: `{size, gap, columns}`. */
function geometryOf(width, cells) {
  const zoom = parseFloat(getComputedStyle(document.documentElement).fontSize) / 16;
  const height = (cells <= 1500 ? 230 : 460) * zoom;
  const largest = Math.round((cells <= 120 ? 30 : 24) * zoom);
  const size = Math.max(7, Math.min(largest, Math.floor(Math.sqrt((width * height) / cells))));
  const gap = size > 11 ? 2 : 1;
  return { size, gap, columns: Math.max(1, Math.floor((width + gap) / size)) };
}

function drawSign(context, { sign, state }, x, y, width) {
  const onState = state || ['!', '−', '+'].includes(sign);
  const colour = ink(onState ? 'card' : 'ink');
  if (width >= SIGN_MIN) {
    context.fillStyle = colour;
    context.font = `700 ${Math.round(width * 0.62)}px system-ui, sans-serif`;
    context.textAlign = 'center';
    context.textBaseline = 'middle';
    context.fillText(sign, x + width / 2, y + width / 2 + 0.5);
    return;
  }
  context.strokeStyle = colour;
  context.lineWidth = 1.25;
  context.beginPath();
  for (const [fromX, fromY, toX, toY] of STROKES[state] ?? []) {
    context.moveTo(x + width * fromX, y + width * fromY);
    context.lineTo(x + width * toX, y + width * toY);
  }
  context.stroke();
}

function drawCell(context, { size, gap, columns }, at, look) {
  const x = (at % columns) * size;
  const y = Math.floor(at / columns) * size;
  const width = size - gap;
  context.clearRect(x, y, size, size);
  context.globalAlpha = look.dim ? 0.22 : 1;
  context.fillStyle = ink(look.ink);
  context.fillRect(x, y, width, width);
  if (look.sign) drawSign(context, look, x, y, width);
  context.globalAlpha = 1;
}

export class HeatMap {
  /** `poolOf()` is the pool, and `isShown(backend)` whether the filter and the states show it. */
  constructor(name, poolOf, isShown) {
    Object.assign(this, {
      poolOf,
      isShown,
      mode: 'state',
      at: 0,
      ringed: -1,
      drawn: null,
      geometry: null,
    });
    const label = `Heat map of ${clean(name)}: arrow keys move, n finds the next backend that is not up, Enter opens it`;
    this.canvas = h('canvas', {
      tabindex: 0,
      role: 'slider',
      'aria-label': label,
      'aria-valuemin': 1,
    });
    this.text = h('span.raw.mut', HINT);
    this.legend = h('span.legend');
    this.modes = h(
      'div.segments',
      { role: 'group', 'aria-label': 'Colour by' },
      this.modeButtons(),
    );
    const top = h('div.top', h('h2', 'All backends'), this.modes);
    const below = h('div.readout', this.text, this.legend);
    const attributes = { 'aria-label': 'Heat map' };
    this.element = h('section.panel', attributes, top, h('div.heat', this.canvas, below));
    this.listen();
  }

  modeButtons() {
    return Object.entries(MODES).map(([mode, label]) => {
      const pressed = String(mode === this.mode);
      const click = () => this.setMode(mode);
      const attributes = { type: 'button', 'data-mode': mode, 'aria-pressed': pressed };
      return h('button', { ...attributes, on: { click } }, label);
    });
  }

  setMode(mode) {
    this.mode = mode;
    this.drawn = null;
    for (const element of this.modes.children) {
      element.setAttribute('aria-pressed', String(element.dataset.mode === mode));
    }
    this.update();
  }

  listen() {
    const { canvas } = this;
    canvas.addEventListener('pointermove', (event) => this.moveTo(this.cellAt(event)));
    canvas.addEventListener('click', (event) => this.open(this.cellAt(event)));
    canvas.addEventListener('keydown', (event) => this.key(event));
    canvas.addEventListener('focus', () => this.moveTo(this.at));
    canvas.addEventListener('blur', () => {
      this.drawn = null;
      this.update();
    });
  }

  cellAt(event) {
    const area = this.canvas.getBoundingClientRect();
    const { size, columns } = this.geometry;
    const column = Math.floor((event.clientX - area.left) / size);
    const at = Math.floor((event.clientY - area.top) / size) * columns + column;
    return column >= 0 && column < columns ? at : -1;
  }

  open(at) {
    const backend = this.poolOf().backends[at];
    if (backend) location.hash = linkOf(backend);
  }

  /** Shows and tells the cell. */
  moveTo(at) {
    const backend = this.poolOf().backends[at];
    if (!backend) return;
    this.at = at;
    const words = describe(backend);
    this.text.className = 'raw';
    setText(this.text, words);
    setAttribute(this.canvas, 'aria-valuenow', String(at + 1));
    setAttribute(this.canvas, 'aria-valuetext', words);
    this.drawRing();
  }

  nextNotUp() {
    const { backends } = this.poolOf();
    for (let step = 1; step <= backends.length; step += 1) {
      const at = (this.at + step) % backends.length;
      if (backends[at].state !== 'up') return at;
    }
    return this.at;
  }

  key(event) {
    const { columns } = this.geometry;
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
    let at = this.at + (steps[event.key] ?? 0);
    if (event.key === 'Enter') return this.open(this.at);
    if (event.key === 'Home') at = 0;
    else if (event.key === 'End') at = this.poolOf().backends.length - 1;
    else if (event.key === 'n') at = this.nextNotUp();
    else if (!(event.key in steps)) return;
    event.preventDefault();
    event.stopPropagation();
    this.moveTo(at);
  }

  drawRing() {
    const context = this.canvas.getContext('2d');
    const { size, gap, columns } = this.geometry;
    const look = this.drawn?.[this.ringed];
    if (look) drawCell(context, this.geometry, this.ringed, look);
    this.ringed = this.at;
    const x = (this.at % columns) * size + 1;
    const y = Math.floor(this.at / columns) * size + 1;
    context.strokeStyle = ink('ink');
    context.lineWidth = 2;
    context.strokeRect(x, y, size - gap - 2, size - gap - 2);
  }

  /** Takes the width of the canvas. Everything is drawn again if it has changed. */
  fit(cells) {
    const width = this.canvas.clientWidth;
    const density = devicePixelRatio || 1;
    const geometry = geometryOf(width, cells);
    const key = [width, density, cells, geometry.size, inkGeneration].join();
    if (this.geometry?.key === key) return;
    this.geometry = { ...geometry, key };
    this.drawn = null;
    const height = Math.ceil(cells / geometry.columns) * geometry.size;
    this.canvas.width = width * density;
    this.canvas.height = height * density;
    this.canvas.style.height = height + 'px';
    this.canvas.getContext('2d').setTransform(density, 0, 0, density, 0, 0);
  }

  updateLegend(pool) {
    const entries = legendOf(pool, this.mode);
    const byState = (state) =>
      this.mode === 'state' || ['down', 'ejected', 'draining'].includes(state);
    const states = STATE_NAMES.filter((state) => pool.states[state] && byState(state));
    const key = [...entries.flat(), ...states].join();
    if (this.legend.dataset.key === key) return;
    this.legend.dataset.key = key;
    const steps = entries.map(([name, words]) => h('span', h('i.key-' + name), words));
    const signs = states.map((state) => h('span', signOf(state), STATES[state].word));
    this.legend.replaceChildren(...steps, ...signs);
  }

  update() {
    const pool = this.poolOf();
    const { backends } = pool;
    this.element.hidden = backends.length < BACKENDS_MIN;
    if (this.element.hidden || !this.canvas.clientWidth) return;
    this.fit(backends.length);
    const context = this.canvas.getContext('2d');
    const looks = backends.map((backend, at) => {
      const look = appearance(backend, this.mode);
      look.dim = !this.isShown(backend);
      const before = this.drawn?.[at];
      const same =
        before && before.ink === look.ink && before.sign === look.sign && before.dim === look.dim;
      if (!same) drawCell(context, this.geometry, at, look);
      return same ? before : look;
    });
    this.drawn = looks;
    setAttribute(this.canvas, 'aria-valuemax', String(backends.length));
    if (!this.canvas.hasAttribute('aria-valuenow')) {
      setAttribute(this.canvas, 'aria-valuenow', '1');
      setAttribute(this.canvas, 'aria-valuetext', clean(backends[0].name));
    }
    this.updateLegend(pool);
  }
}
