// Chromium, and what every page must keep: no error, no request to another host, and no violation of
// the content security policy.

import assert from 'node:assert/strict';
import fs from 'node:fs';
import { createRequire } from 'node:module';

const require = createRequire(process.env.TIDEGATE_NODE_MODULES + '/');
const { chromium } = require('playwright-core');
const AXE = fs.readFileSync(require.resolve('axe-core/axe.min.js'), 'utf8');

const RULES = ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice'];

export const WAIT = 15_000;

const plain = (text) => text.replaceAll('\u00a0', ' ');

let browser;

export async function startBrowser() {
  browser = await chromium.launch({
    executablePath: process.env.CHROMIUM,
    args: [
      '--no-sandbox',
      '--disable-gpu',
      '--disable-background-networking',
      '--disable-component-update',
      '--disable-sync',
      '--no-first-run',
    ],
  });
}

export const stopBrowser = () => browser.close();

/** A tab. `faults` collects what must not happen. */
export class Tab {
  /** `expected` are parts of console messages that a test causes on purpose. */
  static async open(url, options = {}) {
    const tab = new Tab();
    const { width = 1440, height = 900, dark = false, still = false, axe = false } = options;
    tab.expected = options.expected ?? [];
    tab.context = await browser.newContext({
      viewport: { width, height },
      colorScheme: dark ? 'dark' : 'light',
      reducedMotion: still ? 'reduce' : 'no-preference',
      bypassCSP: axe,
    });
    tab.page = await tab.context.newPage();
    tab.faults = [];
    tab.watch(new URL(url).origin);
    await tab.page.goto(url);
    if (!options.locked) await tab.updated();
    return tab;
  }

  watch(origin) {
    const { page, faults } = this;
    page.on('pageerror', (error) => faults.push(`error: ${error.stack}`));
    page.on('console', (message) => {
      const bad = ['error', 'warning'].includes(message.type());
      const known = this.expected.some((part) => message.text().includes(part));
      if (bad && !known) faults.push(`console: ${message.text()}`);
    });
    page.on('request', (request) => {
      const own = request.url().startsWith(origin) || request.url().startsWith('data:');
      if (!own) faults.push(`request to another host: ${request.url()}`);
    });
  }

  /** Waits until the page has drawn a message of the stream. */
  async updated(more = 1) {
    const before = await this.page.evaluate(() => window.tidegate?.updates.count ?? 0);
    const check = (count) => (window.tidegate?.updates.count ?? 0) >= count;
    await this.page.waitForFunction(check, before + more, { timeout: WAIT });
  }

  async close() {
    await this.context.close();
    assert.deepEqual(this.faults, [], 'faults of the page');
  }

  async text(selector) {
    return plain(await this.page.locator(selector).innerText());
  }

  /** Waits until the element contains the words. */
  async shows(selector, words, timeout = WAIT) {
    const contains = ([target, wanted]) => {
      const element = document.querySelector(target);
      return element && element.innerText.replaceAll('\u00a0', ' ').includes(wanted);
    };
    try {
      await this.page.waitForFunction(contains, [selector, words], { timeout });
    } catch {
      const found = await this.page.locator(selector).allInnerTexts();
      assert.fail(`${selector} does not show ${JSON.stringify(words)}: ${found.map(plain)}`);
    }
  }

  press(...keys) {
    return keys.reduce(
      (before, key) => before.then(() => this.page.keyboard.press(key)),
      Promise.resolve(),
    );
  }

  button(name, root = 'body') {
    return this.page.locator(root).getByRole('button', { name, exact: true });
  }

  /** No finding of axe-core, which checks the rules of WCAG 2.2 AA. */
  async isAccessible() {
    await this.page.evaluate(AXE);
    const violations = await this.page.evaluate(async (rules) => {
      const { violations: found } = await window.axe.run(document, { runOnly: rules });
      return found.map(
        ({ id, nodes }) =>
          `${id}: ${nodes
            .slice(0, 3)
            .map((node) => node.html.slice(0, 120))
            .join(' | ')}`,
      );
    }, RULES);
    assert.deepEqual(violations, []);
  }

  /** Waits until nothing sticks out of the page, or out of a part that must fit. */
  async fits(what) {
    const check = () => {
      const parts = [...document.querySelectorAll('.figures, .panel > .top')];
      const wide = parts.map((part) => part.scrollWidth - part.clientWidth);
      return Math.max(document.documentElement.scrollWidth - innerWidth, ...wide) <= 1;
    };
    await this.page.waitForFunction(check, null, { timeout: 5000 }).catch(() => {
      assert.fail(`${what} is too wide`);
    });
  }
}
