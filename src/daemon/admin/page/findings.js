// What is wrong, in words, the worst first. The balancer finds it (`trouble` of the status); this
// module shows it. Used by the shell on every view.

import { find, h, setAttribute, setText, button } from './dom.js';
import { allBackends, backendLink, findBackend, lastChange, model, poolLink } from './model.js';
import { signOf } from './parts.js';
import { drain } from './actions.js';
import { NBSP, clean, counted, duration, integer } from './text.js';

/** Findings that the overview lists. */
const SHOWN_MAX = 6;

/** Findings that the headline names. */
const NAMED_MAX = 3;

const rows = new Map();

/** Joins words: a, b and c. */
function joined(words) {
  if (words.length < 2) return words.join('');
  return `${words.slice(0, -1).join(', ')} and ${words[words.length - 1]}`;
}

function headline(findings) {
  const named = findings.slice(0, NAMED_MAX).map((finding) => clean(finding.short));
  const others = findings.length - named.length;
  if (others) named.push(`${others} more`);
  const text = joined(named);
  if (!model.stale) return text ? `${text}.` : 'Nothing is wrong.';
  return `No answer. Last known: ${text || 'nothing was wrong'}.`;
}

function summary(findings) {
  const backends = allBackends();
  const eligible = [...model.pools.values()].reduce((sum, pool) => sum + pool.eligible, 0);
  if (backends.length === 1 && eligible) {
    const [{ pool, name }] = backends;
    return `${pool.name} has one backend, ${clean(name)}, and it is up. If it fails, clients get no backend.`;
  }
  const verb = eligible === 1 ? 'is' : 'are';
  const words = `${integer(eligible)} of ${counted(backends.length, 'backend')} ${verb} eligible.`;
  return findings.length ? words : `${words} ${lastChange()}`.trim();
}

/** Links and buttons of a finding: labels, and an address or a function. */
function actionsOf({ pool, backend, backends, state }) {
  const known = pool && backend && backends === 1 ? findBackend(pool, backend) : null;
  if (known) {
    const explain = ['Explain', backendLink(pool, backend)];
    return known.intent === 'ready' ? [explain, ['Drain', () => drain(known)]] : [explain];
  }
  if (pool && backends > 1) {
    return [[`Show ${integer(backends)}`, `${poolLink(pool)}?state=${encodeURIComponent(state)}`]];
  }
  return pool ? [['Show pool', poolLink(pool)]] : [];
}

function actionElement([label, action], title) {
  const attributes = { 'aria-label': `${label}: ${title}` };
  if (typeof action === 'string') return h('a.btn', { href: action, ...attributes }, label);
  return button(label, action, '', attributes);
}

function row(finding) {
  const parts = [h('b'), h('span.mut'), h('span.raw'), h('span.mut.raw')];
  const [title, since, reason, effect] = parts;
  const words = h('div', h('p', title, since), h('p.reason', reason, ' ', effect));
  const actions = h('div.row');
  return {
    element: h('li', signOf(finding.state), words, actions),
    parts,
    actions,
    backends: null,
  };
}

function updateRow(known, finding) {
  const [title, since, reason, effect] = known.parts;
  setText(title, clean(finding.title));
  const seconds = finding.since_seconds;
  setText(since, seconds == null ? '' : `${NBSP}·${NBSP}${duration(seconds)}`);
  setText(reason, clean(finding.why));
  setText(effect, clean(finding.effect));
  // A group that grows keeps its row, but its link names the number of backends.
  if (known.backends === finding.backends) return;
  known.backends = finding.backends;
  const actions = actionsOf(finding);
  known.actions.replaceChildren(
    ...actions.map((action) => actionElement(action, clean(finding.title))),
  );
}

function updateList(list, findings) {
  const kept = new Set();
  findings.forEach((finding, at) => {
    // Rates and times change each second; the finding stays the same.
    const key = [
      finding.state,
      finding.pool,
      finding.backend,
      finding.title.replace(/[\d.,]+/g, '#'),
    ].join();
    kept.add(key);
    if (!rows.has(key)) rows.set(key, row(finding));
    const known = rows.get(key);
    updateRow(known, finding);
    if (list.children[at] !== known.element) {
      list.insertBefore(known.element, list.children[at] ?? null);
    }
  });
  for (const [key, { element }] of rows) {
    if (kept.has(key)) continue;
    element.remove();
    rows.delete(key);
  }
}

/** `full` shows every finding; otherwise the headline alone. */
export function updateFindings(full) {
  const box = find('#findings');
  if (!box.firstChild) box.append(h('h1.head'), h('p.sub'), h('ul'));
  const [head, sub, list] = box.children;
  const findings = model.status.trouble;
  box.className = full ? 'findings' : 'findings small';
  setAttribute(box, 'data-severity', String(findings[0]?.severity ?? 0));
  setText(head, headline(findings));
  setText(sub, summary(findings));
  list.hidden = !full || !findings.length;
  sub.hidden = !full;
  updateList(list, full ? findings.slice(0, SHOWN_MAX) : []);
}
