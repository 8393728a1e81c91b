// Keys of the page. Single keys can be switched off (WCAG 2.1.4), and never act while a dialog is
// open or a field has the focus. Started by main.js.

import { drain, openDialog, undrain } from './actions.js';
import { backendOfHandle } from './backends.js';
import { find, h } from './dom.js';
import { close, openBackend } from './drawer.js';
import { linkOf } from './model.js';
import { rowHandles } from './table.js';

const STORED = 'single-keys';
const areOn = () => localStorage.getItem(STORED) !== 'off';

const KEYS = [
  ['/', 'set the filter'],
  ['j k', 'next and previous row'],
  ['Enter', 'explain the backend of the row'],
  ['d', 'drain the backend of the row, or of the drawer'],
  ['u', 'undrain it'],
  ['n', 'in the heat map: next backend that is not up'],
  ['1 2 3', 'overview, events, sessions'],
  ['p', 'pause and continue'],
  ['Esc', 'close the drawer, clear the filter, go to the overview'],
  ['?', 'this list'],
];

const VIEWS = { 1: '#/', 2: '#/events', 3: '#/sessions' };

export function showKeys() {
  const change = (event) => localStorage.setItem(STORED, event.target.checked ? 'on' : 'off');
  const box = h('input', { type: 'checkbox', id: 'single-keys', on: { change } });
  box.checked = areOn();
  const rows = KEYS.map(([keys, does]) => [
    h(
      'span',
      keys.split(' ').flatMap((key) => [h('kbd', key), ' ']),
    ),
    h('span', does),
  ]);
  const label = h('label', { for: 'single-keys' }, 'Single keys are on');
  openDialog({ title: 'Keys', content: [h('div.keylist', rows, box, label)] });
}

function clearFilter() {
  const filter = find('#filter');
  if (!filter.value) return false;
  filter.value = '';
  filter.dispatchEvent(new Event('input'));
  return true;
}

function escape(target) {
  if (target.id === 'filter' && !clearFilter()) target.blur();
  else if (target.id === 'filter') return;
  else if (openBackend()) close();
  else if (!clearFilter()) location.hash = '#/';
}

/** Moves to another row. If the drawer is open, it follows. */
function moveBy(step) {
  const rows = rowHandles();
  const shown = openBackend();
  let at = rows.indexOf(document.activeElement);
  if (at < 0 && shown) at = rows.findIndex((row) => backendOfHandle.get(row) === shown);
  const row = rows[at < 0 ? 0 : Math.max(0, Math.min(rows.length - 1, at + step))];
  if (!row) return;
  const backend = backendOfHandle.get(row);
  if (shown && backend) location.hash = linkOf(backend);
  else row.focus();
  row.scrollIntoView({ block: 'nearest' });
}

/** Returns whether the key does something. */
function act(key) {
  const backend = backendOfHandle.get(document.activeElement) ?? openBackend();
  if (key === '/') {
    find('#filter').focus();
    find('#filter').select();
  } else if (key in VIEWS) location.hash = VIEWS[key];
  else if (key === '?') showKeys();
  else if (key === 'p') find('#live').click();
  else if (key === 'd' && backend) drain(backend);
  else if (key === 'u' && backend) undrain(backend);
  else if (key === 'j') moveBy(1);
  else if (key === 'k') moveBy(-1);
  else return false;
  return true;
}

export function startKeys() {
  addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || find('#dialog').open) return;
    const inField = event.target.matches('input, select, textarea');
    if (event.key === 'Escape') return escape(event.target);
    if (inField || (!areOn() && event.key !== '?')) return;
    if (act(event.key)) event.preventDefault();
  });
}
