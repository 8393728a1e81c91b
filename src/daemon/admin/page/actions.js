// Actions of an operator. Each dialog says with numbers what the action will do before it does it.
// Used by the drawer, by findings, and by keys. Never acts without a confirmation.

import { backendPath, post, setToken } from './api.js';
import { button, find, h, toast } from './dom.js';
import { fullName } from './model.js';
import { clean, counted, integer, percent } from './text.js';

/** Sessions that are closed per second. */
const CLOSE_RATE = 20;

/**
 * Shows a dialog. `says` lists what happens, `content` are further elements, and `run(report)` acts
 * and returns the words of the result. Without `go` the dialog has only a button that closes it.
 */
export function openDialog({ title, says = [], content = [], go, danger, run }) {
  const dialog = find('#dialog');
  const error = h('p', { role: 'alert' });
  const token = h('p');
  const confirm = go && h('button.btn.' + (danger ? 'bad' : 'go'), { type: 'submit' }, go);
  const leave = button(go ? 'Cancel' : 'Close', () => dialog.close());
  const submit = async (event) => {
    event.preventDefault();
    if (!run) return;
    confirm.disabled = true;
    if (token.lastChild?.value) setToken(token.lastChild.value);
    try {
      const report = (text) => (error.textContent = text);
      const words = await run(report, () => dialog.open);
      dialog.close();
      toast(words);
    } catch (failure) {
      confirm.disabled = false;
      error.textContent = `Not done: ${clean(failure.message)}`;
      if (failure.status === 401) askForToken(token);
    }
  };
  const list = says.filter(Boolean).map((text) => h('li', text));
  const heading = h('h2', { id: 'dialog-title' }, title);
  const buttons = h('div.row.end', leave, confirm);
  const form = h('form', { method: 'dialog', on: { submit } }, heading);
  form.append(
    ...[list.length && h('ul.says', list), ...content, error, token, buttons].filter(Boolean),
  );
  dialog.replaceChildren(form);
  dialog.showModal();
  (danger || !go ? leave : confirm).focus();
}

/** A field for the token: over TCP, changes need it. */
function askForToken(place) {
  if (place.firstChild) return;
  const input = h('input', { type: 'password', id: 'dialog-token', autocomplete: 'off' });
  place.append(h('label', { for: 'dialog-token' }, 'Token '), input);
  input.focus();
}

/** What a drain does to the shares of the other backends. */
function effectOfDrain(backend) {
  const others = backend.pool.eligible - (backend.eligible ? 1 : 0);
  if (!backend.eligible) return 'It gets no new sessions now, so no share changes.';
  if (!others) return 'It is the last eligible backend: after this, new clients get no backend.';
  const more = percent(backend.should / others);
  const share = percent(backend.should);
  if (others === 1) return `Its share of ${share} goes to the other backend.`;
  return `Its share of ${share} goes to the other ${integer(others)}: about ${more} more each.`;
}

export function drain(backend) {
  const name = clean(fullName(backend));
  const others = backend.pool.eligible - (backend.eligible ? 1 : 0);
  openDialog({
    title: `Drain ${name}?`,
    says: [
      'It gets no new sessions.',
      `Its ${counted(backend.sessions_active, 'open session')} can end by themselves.`,
      effectOfDrain(backend),
    ],
    go: 'Drain',
    danger: !others,
    run: async () => {
      await post(backendPath(backend.pool.name, backend.name, 'drain'));
      return `${name} is draining`;
    },
  });
}

export function undrain(backend) {
  const name = clean(fullName(backend));
  const seconds = backend.pool.slow_start_seconds;
  openDialog({
    title: `Undrain ${name}?`,
    says: [
      seconds
        ? `It gets new sessions, with a slow start of ${seconds} s.`
        : 'It gets new sessions.',
      backend.observation === 'down' && 'It is down, so it gets none until its probes succeed.',
    ],
    go: 'Undrain',
    run: async () => {
      await post(backendPath(backend.pool.name, backend.name, 'undrain'));
      return `${name} is ready`;
    },
  });
}

const pause = (milliseconds) => new Promise((resume) => setTimeout(resume, milliseconds));

/**
 * Closes the sessions that match the query, at most [`CLOSE_RATE`] per second, until as many are
 * closed as were open at the start. Stops when the dialog is closed.
 */
async function closeAtRate(query, goal, report, isOpen) {
  let ended = 0;
  while (ended < goal && isOpen()) {
    const limit = Math.min(CLOSE_RATE, goal - ended);
    const answer = await post(`/v1/sessions/close?${query}&limit=${limit}`);
    ended += answer.ended;
    if (!answer.ended) return [ended, answer.busy];
    report(`${integer(ended)} of ${integer(goal)} closed`);
    if (ended < goal) await pause(1000);
  }
  return [ended, 0];
}

function closeResult([ended, busy]) {
  const left = busy ? `; ${integer(busy)} with bytes on their way stay open` : '';
  return `${counted(ended, 'session')} closed${left}`;
}

export function closeSessionsOf(backend) {
  const name = clean(fullName(backend));
  const open = backend.sessions_active;
  const query = new URLSearchParams({
    pool: backend.pool.name,
    backend: backend.name,
    sort: 'idle',
  });
  const ready = backend.intent === 'ready' && backend.eligible;
  openDialog({
    title: `Close ${counted(open, 'session')} of ${name}?`,
    says: [
      `Both sides get FIN, ${CLOSE_RATE} sessions per second. Sessions with bytes on their way stay open.`,
      ready
        ? 'It still gets new sessions. Drain it first if clients shall connect to other backends.'
        : 'Clients that connect again get other backends.',
    ],
    go: 'Close sessions',
    danger: true,
    run: async (report, isOpen) => closeResult(await closeAtRate(query, open, report, isOpen)),
  });
}

/** `sessions` are entries of `/v1/sessions`. `done()` is called after they are closed. */
export function closeSessions(sessions, done) {
  const clients = sessions.slice(0, 3).map((session) => clean(session.client));
  const others = sessions.length - clients.length;
  const query = new URLSearchParams(sessions.map((session) => ['session', session.session]));
  openDialog({
    title: `Close ${counted(sessions.length, 'session')}?`,
    says: [
      'Both sides get FIN. A session with bytes on their way stays open.',
      `Clients: ${clients.join(', ')}${others ? ` and ${others} more` : ''}.`,
    ],
    go: `Close ${counted(sessions.length, 'session')}`,
    danger: true,
    run: async () => {
      const answer = await post(`/v1/sessions/close?${query}&limit=${sessions.length}`);
      done();
      return closeResult([answer.ended, answer.busy]);
    },
  });
}
