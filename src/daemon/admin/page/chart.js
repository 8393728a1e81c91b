// Charts of the last hour for the drawer: latencies on a logarithmic scale, and the states.

import { STATES } from './model.js';
import { h, raw, svg } from './dom.js';
import { duration, latency } from './text.js';

const MINUTES = 60;
const HEIGHT = 132;
const STRIP_HEIGHT = 42;
const LEFT = 44;
const RIGHT = 8;

const TICKS = [
  [0, '−60 min', 'start'],
  [15, '−45', 'middle'],
  [30, '−30', 'middle'],
  [44, '−15', 'middle'],
  [59, 'now', 'end'],
];

const xOf = (minute, width) => LEFT + (minute * (width - LEFT - RIGHT)) / (MINUTES - 1);

function axis(width, height) {
  return TICKS.map(([minute, text, anchor]) =>
    svg('text', { x: xOf(minute, width), y: height - 6, 'text-anchor': anchor }, text),
  );
}

const newest = (values) => values.findLast((value) => value != null);

/** Powers of ten around the values. */
function scaleOf(values) {
  const low = Math.floor(Math.log10(Math.min(1, ...values)));
  const high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(1e-4, ...values))));
  const y = (value) => HEIGHT - 22 - ((Math.log10(value) - low) / (high - low)) * (HEIGHT - 32);
  return { low, high, y };
}

/** A line with gaps where there is no value. */
function line(values, classes, width, y) {
  let open = false;
  const parts = values.map((value, minute) => {
    if (!(value > 0)) {
      open = false;
      return '';
    }
    const point = `${open ? 'L' : 'M'}${xOf(minute, width).toFixed(1)} ${y(value).toFixed(1)}`;
    open = true;
    return point;
  });
  return svg('path.' + classes, { d: parts.join('') });
}

function gridOf({ low, high, y }, width) {
  const lines = [];
  for (let power = low; power <= high; power += 1) {
    const value = 10 ** power;
    lines.push(svg('path.grid', { d: `M${LEFT} ${y(value)}H${width - RIGHT}` }));
    const label = latency(value).replace('.00', '');
    lines.push(svg('text', { x: LEFT - 6, y: y(value) + 4, 'text-anchor': 'end' }, label));
  }
  return lines;
}

/** Minutes without a value, as tinted spans. */
function gapsOf(values, width) {
  const step = xOf(1, width) - xOf(0, width);
  return values.flatMap((value, minute) => {
    if (value != null) return [];
    const x = xOf(minute, width) - step / 2;
    return [svg('rect.gap', { x, y: 10, width: step, height: HEIGHT - 32 })];
  });
}

function keyOf(classes, text) {
  const sample = svg('path.' + classes, { d: 'M0 4H20' });
  return h('span', svg('svg.chart', { viewBox: '0 0 20 8', 'aria-hidden': 'true' }, sample), text);
}

/** p50 and p99 of each of the last 60 minutes, in seconds or `null`, and the p99 of the pool. */
export function latencyChart(title, p50, p99, poolP99, width) {
  const values = [...p50, ...p99, poolP99].filter((value) => value > 0);
  const keys = [
    keyOf('p99', 'p99'),
    keyOf('p50', 'p50'),
    poolP99 > 0 && keyOf('pool', 'p99 of the pool'),
  ];
  const heading = h('h3', title, h('span.keys', keys));
  if (!values.length)
    return h('section', heading, h('p.mut', 'Nothing measured in the last hour.'));
  const scale = scaleOf(values);
  const highest = Math.max(0, ...p99.filter((value) => value != null));
  const label = `${title} over the last hour: p99 now ${latency(newest(p99))}, highest ${latency(highest)}, p50 now ${latency(newest(p50))}`;
  const poolLine =
    poolP99 > 0 && svg('path.pool', { d: `M${LEFT} ${scale.y(poolP99)}H${width - RIGHT}` });
  const chart = svg(
    'svg.chart',
    { viewBox: `0 0 ${width} ${HEIGHT}`, role: 'img', 'aria-label': label },
    gapsOf(p99, width),
    gridOf(scale, width),
    poolLine,
    line(p50, 'p50', width, scale.y),
    line(p99, 'p99', width, scale.y),
    axis(width, HEIGHT),
  );
  return h('section', heading, chart);
}

const wordOf = (state) => STATES[state]?.word ?? state;

/** States of the last hour: `{state, from, to, reason}`, with both ends in seconds before now. */
export function stateChart(spans, width) {
  const x = (seconds) => width - RIGHT - (Math.min(3600, seconds) / 3600) * (width - LEFT - RIGHT);
  const rects = spans.map(({ state, from, to }) => {
    const attributes = { x: x(from), width: Math.max(2, x(to) - x(from)), height: 16 };
    return svg('rect.fill-' + state, attributes);
  });
  const words = spans.map(({ state, from, to }) => `${wordOf(state)} for ${duration(from - to)}`);
  const label = 'State over the last hour: ' + words.join(', then ');
  const box = { viewBox: `0 0 ${width} ${STRIP_HEIGHT}`, role: 'img', 'aria-label': label };
  const changes = spans.filter((span) => span.from < 3599).reverse();
  const list = changes.map(({ state, from, reason }) => {
    const text = h('span', h('b', wordOf(state)), reason ? [': ', raw(reason)] : '');
    return h('li', h('span.mut', duration(from) + ' ago'), text);
  });
  const chart = svg('svg.chart', box, rects, axis(width, STRIP_HEIGHT));
  return h('section', h('h3', 'State, last hour'), chart, h('ul.changes', list));
}
