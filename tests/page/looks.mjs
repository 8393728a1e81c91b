// Accessibility and sizes. tests/page.rs starts this file.

import assert from 'node:assert/strict';
import { Tab, WAIT } from './browser.mjs';
import { largeSite, LONG, scene, smallSite, tab } from './scenes.mjs';

// === accessibility and sizes ===

const VIEWS = ['#/', '#/pool/web', '#/pool/web/b', '#/events', '#/sessions', '#/pool/none'];

scene('every view passes the rules of WCAG 2.2 AA in both themes', async () => {
  const { site: made, b } = await smallSite();
  await made.client('web');
  await b.stop();
  for (const dark of [false, true]) {
    // The colours are the same in every view.
    for (const view of dark && !LONG ? VIEWS.slice(0, 3) : VIEWS) {
      const page = await Tab.open(made.url + view, { dark, axe: true });
      await page.shows('#findings', 'web/b is down');
      await page.updated();
      await page.isAccessible();
      await page.close();
    }
    const page = await Tab.open(`${made.url}#/pool/web/b`, { dark, axe: true, width: 360 });
    await page.shows('#drawer', 'Last probes');
    await page.isAccessible();
    for (const key of ['d', '?']) {
      await page.press(key);
      await page.page.locator('#dialog[open]').waitFor();
      await page.isAccessible();
      await page.press('Escape');
    }
    await page.close();
  }
});

scene('the heat map, the form for the token and old numbers pass them, too', async () => {
  const made = await largeSite(100);
  for (const dark of [false, true]) {
    const page = await tab(`${made.url}#/pool/web`, { dark, axe: true });
    for (const mode of ['p99', 'share', 'load']) {
      await page.page.click(`[data-mode=${mode}]`);
      await page.isAccessible();
    }
    made.signal('SIGSTOP');
    await page.page.waitForSelector('html.stale', { timeout: WAIT });
    await page.isAccessible();
    made.signal('SIGCONT');
    await page.page.waitForSelector('html:not(.stale)', { timeout: WAIT });
  }
});

scene('the check of these rules finds a violation', async () => {
  const { site: made } = await smallSite();
  const page = await tab(made.url, { axe: true });
  await page.page.evaluate(() => {
    const pale = document.createElement('p');
    pale.textContent = 'pale';
    pale.style.color = '#ccc';
    document.querySelector('#view').append(pale);
  });
  await assert.rejects(page.isAccessible(), /color-contrast/);
});

scene('nothing sticks out from 360 to 3,840 pixels', async () => {
  const { site: made, b } = await smallSite();
  await made.client('web');
  await b.stop();
  const large = await largeSite(1000);
  for (const width of LONG ? [360, 768, 1024, 1440, 1920, 3840] : [360, 3840]) {
    const height = width > 2000 ? 2160 : 900;
    for (const url of [...VIEWS.map((view) => made.url + view), `${large.url}#/pool/web`]) {
      const page = await Tab.open(url, { width, height });
      await page.fits(`${url} at ${width} pixels`);
      await page.close();
    }
  }
});

scene('nothing moves while values change', async () => {
  const { site: made } = await smallSite();
  made.load('web', 20);
  const page = await tab(`${made.url}#/pool/web/b`, { still: true });
  await page.shows('#drawer', 'Last probes');
  await page.updated(2);
  const places = () =>
    page.page.evaluate(() =>
      [...document.querySelectorAll('h1, h2, h3, th, .btn, .chip, .figures div')].map((element) => {
        const { x, y, width } = element.getBoundingClientRect();
        return [x, y, width].map(Math.round).join();
      }),
    );
  const before = await places();
  await page.updated(4);
  assert.deepEqual(await places(), before);
  assert.equal(await page.page.evaluate(() => document.getAnimations().length), 0);
});
