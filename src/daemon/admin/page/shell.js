// The frame around the views: facts of the process, the sign of life, the theme, title and icon,
// and the form for the token. Called by main.js after each message and four times per second.

import { hasToken, setToken } from './api.js';
import { announce, find, h, setAttribute, setText } from './dom.js';
import { forgetColours } from './heatmap.js';
import { model } from './model.js';
import { NBSP, clean, clock, count, duration, integer } from './text.js';

/** Seconds without an answer after which the numbers are shown as old. */
const STALE_AFTER = 3;

const THEMES = { auto: '◐', light: '☀', dark: '☾' };
const THEME = 'theme';

/** By the severity of the worst finding. */
const ICON_COLOURS = ['%23276b4f', '%23b37400', '%23b3202b', '%23b3202b'];

// === facts, title and icon ===

function facts({ status }) {
  const sessions = `${count(status.connections_active)} of ${count(status.connections_max)} sessions`;
  const engine = `${status.engine}, ${status.workers} ${status.workers === 1 ? 'worker' : 'workers'}`;
  const generation = `generation ${status.generation}`;
  return [status.node, `Tidegate ${status.version}`, status.state, generation, engine, sessions];
}

function updateIcon(severity) {
  const colour = ICON_COLOURS[severity];
  const icon = find('#icon');
  if (icon.dataset.colour === colour) return;
  icon.dataset.colour = colour;
  const path = `<path d='M4 3v6M8 3v6M12 3v6M3 12h10' stroke='white' stroke-width='1.8'/>`;
  const square = `<rect width='16' height='16' rx='4' fill='${colour}'/>`;
  icon.href = `data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'>${square}${path}</svg>`;
}

export function updateShell() {
  const list = find('#facts');
  const texts = facts(model).filter(Boolean).map(clean);
  while (list.children.length < texts.length) list.append(h('span'));
  while (list.children.length > texts.length) list.lastChild.remove();
  texts.forEach((text, at) => setText(list.children[at], text));
  const pools = [...model.pools.values()];
  const down = pools.reduce((sum, pool) => sum + pool.states.down + pool.states.ejected, 0);
  const name = clean(model.status.node || 'Tidegate');
  document.title = (down ? `(${integer(down)} down) ` : '') + name;
  updateIcon(model.status.trouble[0]?.severity ?? 0);
}

// === sign of life ===

function lifeText(state, age) {
  if (state === 'stale') return `no answer ${duration(age)}`;
  if (state === 'paused') return 'paused';
  return 'live' + NBSP + clock(Date.now() / 1e3);
}

/** Shows whether answers arrive. `changed()` is called when that changes. */
export function updateLife(changed) {
  if (!model.status) return;
  const age = (performance.now() - model.heard) / 1e3;
  const state = age > STALE_AFTER ? 'stale' : model.paused ? 'paused' : 'live';
  const element = find('#live');
  const before = element.dataset.state;
  setText(element.lastElementChild, lifeText(state, age));
  if (before === state) return;
  element.dataset.state = state;
  setAttribute(element, 'aria-pressed', String(model.paused));
  model.stale = state === 'stale';
  document.documentElement.classList.toggle('stale', model.stale);
  if (state === 'stale') announce('No answer. The numbers are old.');
  else if (before === 'stale') announce('Live again.');
  forgetColours();
  changed();
}

// === theme ===

function showTheme(name) {
  const root = document.documentElement;
  if (name === 'auto') delete root.dataset.theme;
  else root.dataset.theme = name;
  const element = find('#theme');
  element.textContent = THEMES[name];
  element.title = `Colours: ${name}`;
  element.setAttribute('aria-label', element.title);
}

/** Follows the system, or the choice that this browser remembers. */
export function startTheme(changed) {
  const names = Object.keys(THEMES);
  const stored = localStorage.getItem(THEME);
  let name = names.includes(stored) ? stored : 'auto';
  showTheme(name);
  const refresh = () => {
    forgetColours();
    changed();
  };
  find('#theme').addEventListener('click', () => {
    name = names[(names.indexOf(name) + 1) % names.length];
    localStorage.setItem(THEME, name);
    showTheme(name);
    refresh();
  });
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', refresh);
}

// === token ===

/** Takes the token out of the address `#token=...`, and removes it from there. */
export function takeTokenFromAddress() {
  const match = /^#token=([\w-]+)$/.exec(location.hash);
  if (!match) return;
  setToken(match[1]);
  history.replaceState(null, '', location.pathname + location.search);
}

/** Asks for the token. The page loads again with it. */
export function askForToken() {
  const input = h('input', { type: 'password', id: 'token', autocomplete: 'off', required: true });
  const submit = (event) => {
    event.preventDefault();
    setToken(input.value);
    location.reload();
  };
  const why = hasToken()
    ? 'The admin API rejects this token.'
    : 'This admin API needs a token of its token_file or read_token_file.';
  const keeps = ' The token stays in this tab.';
  const row = h('div.row', input, h('button.btn.go', { type: 'submit' }, 'Continue'));
  const label = h('p', h('label', { for: 'token' }, 'Token'));
  const form = h(
    'form',
    { on: { submit } },
    h('h1', 'Token required'),
    h('p.mut', why + keeps),
    label,
    row,
  );
  find('#findings').hidden = true;
  find('.facts').hidden = true;
  find('#view').replaceChildren(h('div.login', form));
  setText(find('#live').lastElementChild, 'locked');
  input.focus();
}
