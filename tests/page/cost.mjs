// The cost of updates, and several tabs. tests/page.rs starts this file.

import assert from 'node:assert/strict';
import { Tab } from './browser.mjs';
import { largeSite, LONG, scene, smallSite, tab } from './scenes.mjs';

// === cost ===

/** Applies changed numbers of every backend `times` times, without waiting for the balancer. */
async function tick(page, times) {
  await page.page.evaluate(async (rounds) => {
    const { model, take } = await import('/page/model.js');
    for (let round = 0; round < rounds; round += 1) {
      const pools = model.status.pools.map((pool) => ({
        queued: 0,
        frozen: null,
        rows: pool.backends.map((one, at) => [
          at,
          round % 7,
          Math.random() * 9,
          1e4,
          1e5,
          1 / pool.backends.length,
          1 / pool.backends.length,
          one.weight,
          100,
          0.001,
          0.002,
          0.003,
          Math.random() / 50,
          1,
        ]),
      }));
      const frontends = model.status.frontends.map(({ name }) => ({ name, new_rate: round % 11 }));
      take('delta', { frontends, pools });
      window.tidegate.update();
      await new Promise((resume) => requestAnimationFrame(() => setTimeout(resume, 0)));
    }
  }, times);
}

// One, ten and more backends are in the other suites.
for (const size of LONG ? [10, 1000, 10000] : [10000]) {
  scene(`a page of ${size} backends is drawn in time`, async () => {
    const made = await largeSite(size);
    const page = await tab(`${made.url}#/pool/web`);
    await page.shows('.figures', `of ${size.toLocaleString('en')}`);
    await page.page.evaluate(() => window.tidegate.updates.took.splice(0));
    await tick(page, 30);
    const took = await page.page.evaluate(() =>
      [...window.tidegate.updates.took].sort((a, b) => a - b),
    );
    const elements = await page.page.evaluate(() => document.querySelectorAll('*').length);
    const median = took[Math.floor(took.length / 2)];
    console.log(
      `MEASURED ${size} backends: an update takes ${median.toFixed(1)} ms, the slowest ${took.at(-1).toFixed(1)} ms; ${elements} elements`,
    );
    assert.ok(elements < 2000, `${elements} elements`);
    assert.ok(median < 200, `${median} ms`);
  });
}

scene('memory does not grow over many updates', async () => {
  const made = await largeSite(1000);
  const page = await tab(`${made.url}#/pool/web`);
  const session = await page.context.newCDPSession(page.page);
  const heap = async () => {
    await session.send('HeapProfiler.collectGarbage');
    return (await session.send('Runtime.getHeapUsage')).usedSize;
  };
  const updates = LONG ? 600 : 200;
  await tick(page, 60);
  const first = await heap();
  await tick(page, updates);
  const last = await heap();
  console.log(
    `MEASURED heap: ${(first / 1e6).toFixed(2)} MB, after ${updates} updates ${(last / 1e6).toFixed(2)} MB`,
  );
  assert.ok(last < first * 1.1, `${first} -> ${last}`);
});

scene('the ninth tab reads why it gets no stream, and gets one when another closes', async () => {
  const { site: made } = await smallSite();
  const tabs = await Promise.all(Array.from({ length: 8 }, () => Tab.open(made.url)));
  const ninth = await tab(made.url, { locked: true, expected: ['503'] });
  await ninth.shows('#view', 'No connection:');
  await tabs.pop().close();
  await ninth.shows('#findings', 'Nothing is wrong.');
  for (const open of tabs) await open.close();
});

scene('a second tab shows the same', async () => {
  const { site: made, c } = await smallSite();
  const [first, second] = [await tab(made.url), await tab(`${made.url}#/pool/web`)];
  await c.stop();
  await first.shows('#findings', 'web/c is down');
  await second.shows('#findings', 'web/c is down');
});
