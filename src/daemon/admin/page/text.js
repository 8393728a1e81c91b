// Formats numbers, times and text of the server for people. Used by every module of the page.
// Never touches the document.

/** No-break space: a number stays on one line with its unit. */
export const NBSP = '\u00a0';
export const NONE = '–';

/** Longest text of the server that is shown, in UTF-16 units. */
const TEXT_MAX = 400;

/** Control, direction and invisible characters. */
// eslint-disable-next-line no-control-regex
const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g;

/** Text of the server: shortened, and with control characters written out as \uXXXX. */
export function clean(text) {
  const escape = (c) => '\\u' + c.charCodeAt(0).toString(16).padStart(4, '0');
  return String(text ?? '')
    .slice(0, TEXT_MAX)
    .replace(HIDDEN, escape);
}

export const capitalized = (text) => (text ? text[0].toUpperCase() + text.slice(1) : '');

/** Ends a text with a full stop. */
export const sentence = (text) => (text ? capitalized(text).replace(/[.!?]?$/, '.') : '');

/** An integer with separators: 12,345. */
export const integer = (n) => String(Math.round(n)).replace(/\B(?=(\d{3})+$)/g, ',');

/** A count in at most six characters: 12.3 k. */
export function count(n) {
  if (n == null) return NONE;
  if (n >= 1e9) return (n / 1e9).toFixed(1) + NBSP + 'G';
  if (n >= 1e6) return (n / 1e6).toFixed(1) + NBSP + 'M';
  if (n >= 1e4) return (n / 1e3).toFixed(n < 99950 ? 1 : 0) + NBSP + 'k';
  return integer(n);
}

/** A count with its noun: 1 backend, 2 backends. */
export function counted(n, noun, plural = noun + 's') {
  return integer(n) + NBSP + (Math.round(n) === 1 ? noun : plural);
}

export function perSecond(n) {
  if (n == null) return NONE;
  return (n > 0 && n < 9.95 && n % 1 ? n.toFixed(1) : count(n)) + '/s';
}

export function bytes(n) {
  if (n == null) return NONE;
  const units = ['B', 'kB', 'MB', 'GB', 'TB'];
  let unit = 0;
  while (n >= 999.5 && unit < units.length - 1) {
    n /= 1000;
    unit += 1;
  }
  const digits = unit && n < 9.95 ? 1 : 0;
  return n.toFixed(digits) + NBSP + units[unit];
}

export const bytesPerSecond = (n) => (n == null ? NONE : bytes(n) + '/s');

/** A latency in seconds: 0.40 ms, 12 ms, 1.2 s. */
export function latency(seconds) {
  if (seconds == null) return NONE;
  if (seconds < 0.00995) return (seconds * 1e3).toFixed(2) + NBSP + 'ms';
  if (seconds < 0.9995) return Math.round(seconds * 1e3) + NBSP + 'ms';
  return seconds.toFixed(1) + NBSP + 's';
}

/** A time span in seconds: 41 s, 5 min, 3 h, 2 d. */
export function duration(seconds) {
  if (seconds == null) return NONE;
  if (seconds < 99.5) return Math.round(seconds) + NBSP + 's';
  if (seconds < 5940) return Math.round(seconds / 60) + NBSP + 'min';
  if (seconds < 172800) return (seconds / 3600).toFixed(seconds < 36000 ? 1 : 0) + NBSP + 'h';
  return Math.round(seconds / 86400) + NBSP + 'd';
}

/** A fraction as per cent: 0.22 %, 4.7 %, 33 %. */
export function percent(fraction) {
  if (fraction == null) return NONE;
  if (!fraction) return '0' + NBSP + '%';
  const digits = fraction < 0.00995 ? 2 : fraction < 0.0995 ? 1 : 0;
  return (fraction * 100).toFixed(digits) + NBSP + '%';
}

/** A difference as per cent, with its sign. */
export function signedPercent(fraction) {
  if (fraction == null) return NONE;
  const sign = fraction > 0 ? '+' : fraction < 0 ? '−' : '±';
  return sign + Math.abs(Math.round(fraction * 100)) + NBSP + '%';
}

/** A Unix time as hours, minutes and seconds of this host. */
export const clock = (unix) => new Date(unix * 1e3).toTimeString().slice(0, 8);
