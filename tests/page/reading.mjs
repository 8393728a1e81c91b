// Keys, focus, the order of rows, and text of others. tests/page.rs starts this file.

import assert from 'node:assert/strict';
import { WAIT } from './browser.mjs';
import { backend, largeSite, scene, site, smallSite, tab } from './scenes.mjs';
import { eventually } from './site.mjs';

/** A text that a browser would obey, if the page let it. */
const HOSTILE = '<img src=x onerror="window.broken=1">\u202e\u001b[31m';

// === keys, focus and order ===

scene('every key does what the list of keys says', async () => {
  const { site: made } = await smallSite();
  const page = await tab(`${made.url}#/pool/web`);
  await page.press('/');
  assert.equal(await page.page.evaluate(() => document.activeElement.id), 'filter');
  await page.page.keyboard.type('web/b');
  const onlyB = () =>
    [...document.querySelectorAll('#view tbody .handle')].every((one) => one.textContent === 'b');
  await page.page.waitForFunction(onlyB, null, { timeout: WAIT });
  await page.press('Escape');
  assert.equal(await page.page.inputValue('#filter'), '');
  await page.press('Escape', 'j', 'j', 'k', 'Enter');
  const first = await page.text('#drawer h2');
  await page.press('j');
  await page.page.waitForFunction(
    (name) => document.querySelector('#drawer h2').innerText !== name,
    first,
  );
  await page.press('Escape', '2');
  await page.shows('#view', 'Events');
  await page.press('3');
  await page.shows('#view', 'Sessions');
  await page.press('1');
  await page.shows('#view', 'Frontends');
  await page.press('p');
  await page.shows('#live', 'paused');
  await page.press('p');
  await page.shows('#live', 'live');
  await page.press('?');
  await page.page.getByLabel('Single keys are on').uncheck();
  await page.press('Escape', '2');
  assert.match(page.page.url(), /#\/$/);
});

scene('rows stay under the hand, and the focus returns from the drawer', async () => {
  const made = await largeSite(60);
  const page = await tab(`${made.url}#/pool/web`);
  await page.press('j', 'j', 'j');
  const order = () =>
    page.page.evaluate(() =>
      [...document.querySelectorAll('#view tbody .handle')].map((one) => one.textContent),
    );
  const before = await order();
  assert.equal((await made.cli(['drain', 'web/b00040'])).code, 0);
  await page.shows('#view .chips', 'draining');
  await page.updated(2);
  assert.deepEqual((await order()).slice(0, 10), before.slice(0, 10));
  const name = await page.page.evaluate(() => document.activeElement.textContent);
  await page.press('Enter');
  await page.shows('#drawer h2', name);
  await page.press('Escape');
  assert.equal(await page.page.evaluate(() => document.activeElement.textContent), name);
});

scene('the heat map is used by keys and tells each cell in words', async () => {
  const page = await tab(`${(await largeSite(1000)).url}#/pool/web`);
  await page.shows('#view .chips', 'down');
  await page.page.focus('canvas');
  await page.press('n');
  const words = () => page.page.getAttribute('canvas', 'aria-valuetext');
  assert.match(await words(), /^b00701 .*: down/);
  await page.press('ArrowLeft');
  assert.match(await words(), /^b00700 .*: up/);
  await page.press('Enter');
  await page.shows('#drawer h2', 'web/b00700');
});

scene('rows are sorted by a header, chosen by a state, and shown in steps', async () => {
  const page = await tab(`${(await largeSite(1000)).url}#/pool/web`);
  const rows = (count) =>
    page.page.waitForFunction(
      (wanted) => document.querySelectorAll('#view tbody tr').length === wanted,
      count,
      { timeout: WAIT },
    );
  await page.shows('#view .chips', 'down');
  await rows(20);
  await page.button('Sessions').click();
  assert.equal(await page.page.locator('[aria-sort=descending]').count(), 1);
  await page.page.locator('.chip', { hasText: 'down' }).click();
  await rows(18);
  await page.page.locator('.chip', { hasText: 'All' }).click();
  await page.button('Show 200 more').click();
  await rows(220);
});

// === text of others ===

scene('text of a hostile backend stays text', async () => {
  const hostile = await backend({ greeting: `${HOSTILE}\n` });
  const probe =
    'kind = "send-expect"\nexpect = "hello"\ninterval = "200ms"\ntimeout = "200ms"\nfall = 1';
  const made = await site({ web: { probe, backends: [['a', `127.0.0.1:${hostile.port}`]] } });
  await eventually(
    'a is down',
    async () => (await made.backend('web', 'a')).observation === 'down',
  );
  for (const view of ['#/', '#/pool/web', '#/pool/web/a', '#/events']) {
    const page = await tab(made.url + view);
    await page.shows('body', '<img src=x');
    const text = await page.page.evaluate(() => document.body.innerText + document.title);
    // eslint-disable-next-line no-control-regex
    assert.ok(!/[\u202a-\u202e\u001b]/.test(text), `${view}: control characters`);
    assert.equal(await page.page.evaluate(() => window.broken), undefined);
    assert.equal(await page.page.locator('img').count(), 0);
    await page.fits(view);
  }
});
