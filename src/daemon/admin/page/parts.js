// Small parts of the page: state labels, sparklines, the strip of a pool's states, and share bars.
// Used by tables and views. Each part is made once and updated in place.

import { STATES, STATE_NAMES, secondsInState, shareError } from './model.js';
import { h, setAttribute, setText, svg } from './dom.js';
import { NBSP, duration, integer, percent, perSecond } from './text.js';

const SPARK = { width: 96, height: 20, values: 60 };

/** Width of the strip, its height, and the least width of a rare state. */
const STRIP = { width: 160, height: 14, least: 3.5 };

/** Up to this many backends, the strip has one cell per backend. */
const STRIP_CELLS_MAX = 60;

export const signOf = (state) =>
  h('span.sign.' + state, { 'aria-hidden': 'true' }, STATES[state]?.sign ?? '·');

export const stateLabel = () => h('span.st', h('span.sign'), h('b'), h('span.mut'));

export function updateStateLabel(element, backend) {
  const { state } = backend;
  const [sign, word, since] = element.children;
  setAttribute(element, 'class', 'st ' + state);
  setAttribute(sign, 'class', 'sign ' + state);
  setText(sign, STATES[state].sign);
  setText(word, STATES[state].word);
  setText(since, duration(secondsInState(backend)));
}

export function sparkline(what) {
  const box = `0 0 ${SPARK.width} ${SPARK.height}`;
  const attributes = { viewBox: box, preserveAspectRatio: 'none', role: 'img', 'aria-label': what };
  return svg('svg.spark', attributes, svg('path.area', {}), svg('path.line', {}));
}

/** Draws up to 60 values, from zero. The newest is on the right. */
export function updateSparkline(element, values, what) {
  if (!values || values.length < 2) return;
  const top = Math.max(1e-9, ...values) * 1.05;
  const x = (at) =>
    (((SPARK.values - values.length + at) * SPARK.width) / (SPARK.values - 1)).toFixed(1);
  const y = (value) => (SPARK.height - 1 - (value / top) * (SPARK.height - 3)).toFixed(1);
  const line = values.map((value, at) => `${at ? 'L' : 'M'}${x(at)} ${y(value)}`).join('');
  const [area, stroke] = element.children;
  area.setAttribute('d', `${line}L${SPARK.width} ${SPARK.height}L${x(0)} ${SPARK.height}Z`);
  stroke.setAttribute('d', line);
  const now = perSecond(values[values.length - 1]);
  const most = perSecond(Math.max(...values));
  element.setAttribute('aria-label', `${what} in the last minute: now ${now}, most ${most}`);
}

export function stateStrip() {
  const box = `0 0 ${STRIP.width} ${STRIP.height}`;
  const strip = svg('svg', { viewBox: box, preserveAspectRatio: 'none', role: 'img' });
  return h('div.health', strip, h('span'));
}

/** One cell per backend. */
function cells(pool) {
  const gap = pool.backends.length > 1 ? 1 : 0;
  const width = (STRIP.width + gap) / pool.backends.length;
  return pool.backends.map((backend, at) =>
    svg('rect.fill-' + backend.state, {
      x: at * width,
      width: width - gap,
      height: STRIP.height,
      rx: 1,
    }),
  );
}

/** One part per state, with a least width, so that one of 10,000 backends can be seen. */
function parts(pool) {
  const total = pool.backends.length;
  const shown = STATE_NAMES.filter((state) => pool.states[state]).reverse();
  const rare = (state) => pool.states[state] / total < 0.02;
  const left = STRIP.width - shown.filter(rare).length * STRIP.least;
  let x = 0;
  return shown.map((state) => {
    const width = rare(state) ? STRIP.least : (pool.states[state] / total) * left;
    const part = svg('rect.fill-' + state, { x, width, height: STRIP.height });
    x += width;
    return part;
  });
}

const drawn = new WeakMap();

export function updateStateStrip(element, pool) {
  const [strip, words] = element.children;
  const total = pool.backends.length;
  setText(words, `${integer(pool.eligible)} of ${integer(total)}`);
  const single = total <= STRIP_CELLS_MAX;
  const picture = single
    ? pool.backends.map((backend) => backend.state).join()
    : STATE_NAMES.map((state) => pool.states[state]).join();
  if (drawn.get(strip) === picture) return;
  drawn.set(strip, picture);
  const counts = STATE_NAMES.filter((state) => pool.states[state]);
  const label = counts.map((state) => `${pool.states[state]} ${STATES[state].word}`).join(', ');
  strip.setAttribute('aria-label', label || 'no backends');
  strip.replaceChildren(...(single ? cells(pool) : parts(pool)));
}

export function shareBar() {
  const box = { viewBox: '0 0 100 12', preserveAspectRatio: 'none', 'aria-hidden': 'true' };
  const track = svg('rect.track', { width: 100, height: 12, rx: 2 });
  const actual = svg('rect.actual', { y: 2, height: 8 });
  const expected = svg('rect.expected', { width: 1, height: 12 });
  return h('div.share', svg('svg', box, track, actual, expected), h('span.num'), h('span.num.mut'));
}

/** A bar for the actual share, and a mark for the expected one. `scale` is the share of a full bar. */
export function updateShareBar(element, backend, scale) {
  const [bar, actual, expected] = element.children;
  const far = Math.abs(shareError(backend) ?? 0) > 0.25;
  setAttribute(bar.children[1], 'width', Math.min(100, (backend.gets / scale) * 100).toFixed(1));
  setAttribute(bar.children[1], 'class', far ? 'actual far' : 'actual');
  setAttribute(bar.children[2], 'width', backend.eligible ? '1' : '0');
  setAttribute(bar.children[2], 'x', Math.min(99, (backend.should / scale) * 100).toFixed(1));
  setText(actual, backend.eligible ? percent(backend.gets) : '–');
  setText(expected, backend.eligible ? percent(backend.should) : '');
}

/** `configured` and effective weight of a backend. */
export const weightText = (backend) =>
  `${Number(backend.effective_weight.toFixed(1))}${NBSP}of${NBSP}${backend.weight}`;
