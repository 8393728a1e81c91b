// The view of open sessions: a list with a filter, the reason of each pick, and closing.

import { get } from './api.js';
import { closeSessions, openDialog } from './actions.js';
import { button, find, findAll, h, raw, setText } from './dom.js';
import { backendLink, model } from './model.js';
import { Table, textColumn } from './table.js';
import { bytes, clean, count, counted, duration, integer } from './text.js';

const ORDERS = { age: 'Oldest', idle: 'Longest idle', bytes: 'Most bytes' };

const LIMIT = 100;

/** Time between two lists, in milliseconds. */
const INTERVAL = 2000;

/** What decided a pick, in words. */
const REASONS = {
  turn: 'its turn in weighted round robin',
  least: 'the fewest sessions for its weight',
  draw: 'drawn at random',
  hash: 'the hash of the client belongs to it',
  only: 'no other backend could be picked',
  retry: 'an earlier attempt failed',
  trial: 'a trial session after an ejection',
  queue: 'the client waited in the queue for it',
  'fail-open': 'no backend was eligible, and the pool fails open',
  backup: 'no backend of a lower tier was eligible, or sessions spill',
  sticky: 'the client was there before',
  none: 'no backend could be picked',
};

/**
 * Turns the text of the filter into the query of `/v1/sessions`: POOL/BACKEND, a pool, a frontend,
 * or an address or range of clients. Returns `null` if the text is none of them.
 */
export function queryOf(text) {
  if (!text) return {};
  const slash = text.indexOf('/');
  const pool = model.pools.get(slash < 0 ? text : text.slice(0, slash));
  if (pool && slash < 0) return { pool: pool.name };
  if (pool) return { pool: pool.name, backend: text.slice(slash + 1) };
  if (model.status.frontends.some((frontend) => frontend.name === text)) return { frontend: text };
  if (/^unix:|^[\d.]+(\/\d+)?$|^[\da-f:.]+(\/\d+)?$/i.test(text)) return { client: text };
  return null;
}

function decisionText(decision) {
  const { backend, why, skipped_total: skipped, waited_seconds: waited } = decision;
  const where = backend ? `${backend.pool}/${backend.backend} (${backend.address})` : 'no backend';
  const words = [`Attempt ${decision.attempt}: ${where}: ${REASONS[why] ?? why}.`];
  words.push(
    `${counted(decision.candidates, 'backend')} could be picked in pool ${decision.pool} (${decision.policy}).`,
  );
  if (skipped) {
    const named = decision.skipped.map((entry) => `${entry.backend} (${entry.reason})`);
    words.push(`Passed over: ${named.join(', ')}${skipped > named.length ? ', ...' : ''}.`);
  }
  if (waited) words.push(`The client waited ${duration(waited)} in the queue.`);
  if (decision.failure) words.push(`The connect failed: ${decision.failure}.`);
  return words.join(' ');
}

/** Shows why a session has its backend. */
async function explainSession(session) {
  let content;
  try {
    const answer = await get('/v1/explain?session=' + session.session);
    content = answer.decisions.map((decision) => h('li', raw(decisionText(decision))));
  } catch (error) {
    content = [
      h('li', error.status === 404 ? 'Its decision is no longer kept.' : raw(error.message)),
    ];
  }
  const title = `Session ${session.session} of ${clean(session.client)}`;
  openDialog({ title, content: [h('ul.says', content)] });
}

class SessionsView {
  constructor() {
    Object.assign(this, { name: 'sessions', order: 'age', loaded: 0, chosen: new Map() });
    const orders = Object.entries(ORDERS).map(([order, label]) => this.orderButton(order, label));
    this.orders = h('div.segments', { role: 'group', 'aria-label': 'Order' }, orders);
    this.close = button('', () => this.closeThese([...this.chosen.values()]));
    this.note = h('div.more');
    this.table = new Table('Sessions', this.columns(), (session) => session.session, {
      heading: 1,
    });
    const top = h('div.top', h('h1', 'Sessions'), h('div.row', this.orders, this.close));
    const scroll = h('div.scroll', this.table.element);
    const panel = h('section.panel', { 'aria-label': 'Sessions' }, top, scroll, this.note);
    find('#view').replaceChildren(panel);
    this.load();
  }

  orderButton(order, label) {
    const click = () => {
      this.order = order;
      this.load();
    };
    return h('button', { type: 'button', 'data-order': order, on: { click } }, label);
  }

  columns() {
    return [
      { label: 'Choose', classes: 'choose', width: '3rem', ...this.chooser() },
      {
        title: 'Client',
        classes: 'mono',
        width: '13rem',
        ...textColumn((session) => clean(session.client)),
      },
      { title: 'Backend', width: '12rem', ...this.backendColumn() },
      { title: 'Frontend', classes: 'wide2', ...textColumn((session) => clean(session.frontend)) },
      {
        title: 'Phase',
        classes: 'wide2',
        width: '7rem',
        ...textColumn((session) => session.phase),
      },
      {
        title: 'Age',
        classes: 'num',
        width: '5rem',
        ...textColumn((session) => duration(session.age_seconds)),
      },
      {
        title: 'Idle',
        classes: 'num',
        width: '5rem',
        ...textColumn((session) => duration(session.idle_seconds)),
      },
      {
        title: 'In',
        classes: 'num wide3',
        width: '5.5rem',
        ...textColumn((session) => bytes(session.bytes_in)),
      },
      {
        title: 'Out',
        classes: 'num wide3',
        width: '5.5rem',
        ...textColumn((session) => bytes(session.bytes_out)),
      },
      { label: 'Actions', classes: 'num wide1', width: '9rem', ...this.actions() },
    ];
  }

  chooser() {
    const make = (cell, session) => {
      const change = (event) => {
        if (event.target.checked) this.chosen.set(session.session, session);
        else this.chosen.delete(session.session);
        this.updateButtons();
      };
      const label = 'Choose the session of ' + clean(session.client);
      cell.append(h('input', { type: 'checkbox', 'aria-label': label, on: { change } }));
    };
    const update = (cell, session) => {
      cell.firstChild.checked = this.chosen.has(session.session);
    };
    return { make, update };
  }

  backendColumn() {
    const make = (cell, { pool, backend }) => {
      if (!backend) return cell.append(h('span.mut', 'none yet'));
      const name = clean(`${pool}/${backend}`);
      cell.append(h('a.handle.raw', { href: backendLink(pool, backend) }, name));
    };
    return { make };
  }

  actions() {
    const make = (cell, session) => {
      const of = ` of ${clean(session.client)}`;
      const why = () => explainSession(session);
      cell.append(
        button('Why', why, '.quiet', { 'aria-label': 'Why the session' + of + ' has its backend' }),
        button('Close', () => this.closeThese([session]), '.quiet', {
          'aria-label': 'Close the session' + of,
        }),
      );
    };
    return { make };
  }

  closeThese(sessions) {
    closeSessions(sessions, () => {
      for (const { session } of sessions) this.chosen.delete(session);
      this.load();
    });
  }

  updateButtons() {
    this.close.textContent = this.chosen.size ? `Close ${this.chosen.size} chosen` : 'Close chosen';
    this.close.disabled = !this.chosen.size;
    for (const element of findAll('button', this.orders)) {
      element.setAttribute('aria-pressed', String(element.dataset.order === this.order));
    }
  }

  async load() {
    this.updateButtons();
    this.loaded = performance.now();
    const query = queryOf(find('#filter').value.trim());
    if (!query) {
      this.table.update([]);
      setText(
        this.note,
        'Type POOL/BACKEND, a pool, a frontend, or an address or range of clients.',
      );
      return;
    }
    const parameters = new URLSearchParams({ ...query, sort: this.order, limit: LIMIT });
    try {
      const answer = await get('/v1/sessions?' + parameters);
      this.show(answer);
    } catch (error) {
      setText(this.note, `The list is not available: ${clean(error.message)}`);
    }
  }

  show({ sessions, matched, open, elsewhere }) {
    this.table.update(sessions);
    const shown = `${integer(sessions.length)} of ${count(matched)} that match; ${count(open)} open`;
    const others = elsewhere
      ? `, and ${count(elsewhere)} in processes that an upgrade has replaced`
      : '';
    setText(
      this.note,
      matched ? `${shown}${others}.` : 'No session matches. Esc clears the filter.',
    );
  }

  /** Called each second. A list under a person's hand does not change. */
  update() {
    const due = performance.now() - this.loaded > INTERVAL;
    if (due && !model.paused && !this.table.isBusy()) this.load();
  }

  filter() {
    this.load();
  }
}

export const sessionsView = () => new SessionsView();
