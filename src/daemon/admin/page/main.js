// Starts the page: reads the stream, keeps the view of the address, and updates what is shown.
// Addresses: #/, #/pool/POOL, #/pool/POOL/BACKEND, #/events, #/sessions?filter=TEXT.

import { get, stream } from './api.js';
import { announce, find, findAll, h, setAttribute } from './dom.js';
import { hide, openDrawer, updateDrawer } from './drawer.js';
import { eventsView } from './events.js';
import { showKeys, startKeys } from './keys.js';
import { model, poolLink, take, takeEvents } from './model.js';
import { overview } from './overview.js';
import { poolView } from './pool.js';
import { sessionsView } from './sessions.js';
import { askForToken, startTheme, takeTokenFromAddress, updateLife, updateShell } from './shell.js';
import { clean } from './text.js';
import { updateFindings } from './findings.js';

/** Time between two looks at the sign of life, in milliseconds. */
const BEAT = 250;

let view = null;

/** Figures of the last updates, for tests: how many, and how long each took in milliseconds. */
const updates = { count: 0, took: [] };
window.tidegate = { updates, update };

function update() {
  if (!model.status || !view) return;
  const began = performance.now();
  updateFindings(view.name === 'overview');
  updateShell();
  view.update();
  updateDrawer();
  updates.count += 1;
  updates.took.push(performance.now() - began);
  if (updates.took.length > 600) updates.took.shift();
}

// === addresses ===

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

function address() {
  const [path, query] = location.hash.replace(/^#\/?/, '').split('?');
  return { parts: path.split('/').map(decoded), query: new URLSearchParams(query) };
}

/** Whether the view in force can stay below the drawer of this backend. */
function staysBelow(pool, backend) {
  if (view?.name === 'overview') return backend != null;
  return view?.name === 'pool' && view.pool === pool;
}

function viewOf({ parts: [name, pool, backend], query }) {
  const state = query.get('state') ?? '';
  if (name === 'pool' && staysBelow(pool, backend)) {
    if (state) view.choose?.(state);
    return view;
  }
  if (name === 'pool') return poolView(pool, state);
  const makers = { events: eventsView, sessions: sessionsView };
  const wanted = name in makers ? name : 'overview';
  if (name === 'sessions' && query.has('filter')) find('#filter').value = query.get('filter');
  if (view?.name === wanted) return view;
  return (makers[wanted] ?? overview)();
}

function route() {
  if (!model.status) return;
  const where = address();
  const before = view;
  view = viewOf(where);
  const [name, pool, backend] = where.parts;
  for (const link of findAll('[data-view]')) {
    const here = link.dataset.view === (view.name === 'pool' ? 'overview' : view.name);
    setAttribute(link, 'aria-current', here ? 'page' : null);
  }
  if (name === 'pool' && backend) openDrawer(pool, backend);
  else hide();
  if (view !== before) scrollTo(0, 0);
  update();
}

/** The address of the view below the drawer. */
function leaveDrawer() {
  const below =
    view.name === 'pool' ? poolLink(view.pool) : view.name === 'overview' ? '#/' : `#/${view.name}`;
  history.replaceState(null, '', below);
  update();
}

// === messages ===

/** The balancer serves at most eight streams. The page asks again each second. */
function showRefusal({ error, detail }) {
  const text = clean(detail ?? error ?? 'The balancer has no stream.');
  if (!model.status) find('#view').replaceChildren(h('p.empty', `No connection: ${text}`));
}

function receive(kind, document) {
  if (kind === 'denied') return askForToken();
  if (kind === 'refused') return showRefusal(document);
  const first = !model.status;
  const words = take(kind, document);
  if (words) announce(words);
  if (model.paused || !model.status) return;
  if (first) route();
  else if (kind === 'snapshot' && view.isGone?.()) {
    view = null;
    route();
  } else if (kind !== 'event') update();
}

async function loadEvents() {
  try {
    const { events } = await get('/v1/events');
    takeEvents(events);
  } catch (error) {
    model.eventsError = clean(error.message);
  }
  update();
}

function start() {
  takeTokenFromAddress();
  startTheme(update);
  startKeys();
  find('#help').addEventListener('click', showKeys);
  find('#live').addEventListener('click', () => {
    model.paused = !model.paused;
    updateLife(update);
    update();
  });
  find('#filter').addEventListener('input', () => (view?.filter ? view.filter() : update()));
  addEventListener('hashchange', route);
  addEventListener('resize', update);
  document.addEventListener('drawer-closed', leaveDrawer);
  setInterval(() => updateLife(update), BEAT);
  loadEvents();
  stream(receive);
}

start();
