// Makes and changes elements. Text of the server reaches the document through textContent alone.
// Used by every view. Never builds markup from text.

import { clean } from './text.js';

const SVG = 'http://www.w3.org/2000/svg';

export const find = (selector, root = document) => root.querySelector(selector);
export const findAll = (selector, root = document) => [...root.querySelectorAll(selector)];

function filled(element, classes, attributes, children) {
  if (classes.length) element.setAttribute('class', classes.join(' '));
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value == null || value === false) continue;
    if (name === 'on') {
      for (const [event, handler] of Object.entries(value))
        element.addEventListener(event, handler);
    } else {
      element.setAttribute(name, value === true ? '' : value);
    }
  }
  element.append(...children.flat(9).filter((child) => child != null && child !== false));
  return element;
}

/** Whether the second argument of [`h`] is a child instead of attributes. */
const isChild = (value) =>
  value == null || typeof value !== 'object' || Array.isArray(value) || value instanceof Node;

/** `h('tag.class', {attribute: value, on: {event: handler}}, ...children)`: an HTML element. */
export function h(tag, attributes, ...children) {
  const [name, ...classes] = tag.split('.');
  const element = document.createElement(name);
  if (isChild(attributes)) return filled(element, classes, null, [attributes, ...children]);
  return filled(element, classes, attributes, children);
}

/** The same for an SVG element. Attributes are required. */
export function svg(tag, attributes, ...children) {
  const [name, ...classes] = tag.split('.');
  return filled(document.createElementNS(SVG, name), classes, attributes, children);
}

export function button(label, click, classes = '', attributes = {}) {
  return h('button.btn' + classes, { type: 'button', ...attributes, on: { click } }, label);
}

/** Text of the server, isolated from the direction of the text around it. */
export const raw = (text) => h('bdi.raw', clean(text));

const texts = new WeakMap();
const attributes = new WeakMap();

/** Sets the text of an element, if it has changed. */
export function setText(element, text) {
  if (texts.get(element) === text) return;
  texts.set(element, text);
  element.textContent = text;
}

/** Sets an attribute, if it has changed. `null` removes it. */
export function setAttribute(element, name, value) {
  if (!attributes.has(element)) attributes.set(element, {});
  const known = attributes.get(element);
  if (known[name] === value) return;
  known[name] = value;
  if (value == null) element.removeAttribute(name);
  else element.setAttribute(name, value);
}

/** Tells screen readers about a result. Never used for values that change each second. */
export function announce(text) {
  find('#announcements').textContent = text;
}

let toastTimer;

/** Shows the result of an action for 5 s. */
export function toast(text) {
  const element = find('#toast');
  element.textContent = text;
  element.hidden = false;
  announce(text);
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => {
    element.hidden = true;
  }, 5000);
}
