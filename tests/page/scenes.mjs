// What the suites share: sites, tabs, and tests that end what they have started.

import { after, before, test } from 'node:test';
import { startBrowser, stopBrowser, Tab } from './browser.mjs';
import { Backend, eventually, Site } from './site.mjs';

/** The long versions of the tests are requested. */
export const LONG = process.env.TIDEGATE_LONG === '1';

export const PROBE = 'kind = "tcp"\ninterval = "200ms"\ntimeout = "200ms"\nfall = 2\nrise = 1';

const cleanups = [];
export const later = (cleanup) => cleanups.push(cleanup);

export async function backend(options) {
  const made = await Backend.start(options);
  later(() => made.stop());
  return made;
}

export async function site(pools, options) {
  const made = await Site.start(pools, options);
  later(() => made.stop());
  return made;
}

export async function tab(url, options) {
  const made = await Tab.open(url, options);
  later(() => made.close());
  return made;
}

/** A test with its own site. Everything that it started ends with it. */
export function scene(name, run) {
  test(name, { timeout: 240_000 }, async () => {
    try {
      await run();
    } finally {
      for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
    }
  });
}

/** A pool `web` of three backends, and a pool `db` of one. */
export async function smallSite(options = {}) {
  const backends = [];
  for (let at = 0; at < 4; at += 1) backends.push(await backend());
  const address = ({ port }) => `127.0.0.1:${port}`;
  const [a, b, c, pg] = backends;
  const made = await site(
    {
      web: {
        probe: PROBE,
        backends: [
          ['a', address(a)],
          ['b', address(b)],
          ['c', address(c)],
        ],
      },
      db: { probe: PROBE, backends: [['pg', address(pg)]] },
    },
    options,
  );
  await eventually('all backends are up', async () => {
    const { pools } = await made.status();
    return pools.every((pool) => pool.backends.every((one) => one.observation === 'up'));
  });
  return { site: made, a, b, c, pg };
}

/**
 * A pool of `size` backends at one port. Of 1,000 and more, eighteen neighbours in a row refuse
 * connections.
 */
export async function largeSite(size) {
  const shared = await backend({ host: '0.0.0.0' });
  const closed = await backend();
  await closed.stop();
  const backends = Array.from({ length: size }, (_, at) => {
    const host = `127.${1 + Math.floor(at / 62500)}.${Math.floor(at / 250) % 250}.${1 + (at % 250)}`;
    const dead = size >= 1000 && at >= 700 && at < 718;
    return [`b${String(at + 1).padStart(5, '0')}`, `${host}:${dead ? closed.port : shared.port}`];
  });
  const probe = `${PROBE}\nfast_interval = "1s"`.replace('"200ms"', `"${size > 1000 ? 10 : 2}s"`);
  return site({ web: { probe, backends } });
}

before(startBrowser);
after(stopBrowser);
