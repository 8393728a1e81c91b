// The incident of docs/operations.md: a slow backend, a dead backend and a rejected reload, solved by
// the page alone, and by commands alone. tests/page.rs starts this file.

import assert from 'node:assert/strict';
import fs from 'node:fs';
import { backend, scene, site, tab } from './scenes.mjs';
import { eventually } from './site.mjs';

const PROBE = 'kind = "tcp"\ninterval = "200ms"\ntimeout = "200ms"\nfall = 2\nrise = 1';

/** Four backends under load: `b` answers late, and `d` is killed. A broken file is loaded. */
async function incident() {
  const [a, c, d] = [await backend(), await backend(), await backend()];
  const b = await backend({ delay: 400 });
  const address = ({ port }) => `127.0.0.1:${port}`;
  const backends = Object.entries({ a, b, c, d }).map(([name, one]) => [name, address(one)]);
  const made = await site({ web: { probe: PROBE, backends } });
  made.load('web', 40);
  await eventually(
    'b is suspect',
    async () => (await made.backend('web', 'b')).observation === 'suspect',
  );
  await d.stop();
  await eventually(
    'd is down',
    async () => (await made.backend('web', 'd')).observation === 'down',
  );
  fs.appendFileSync(made.file, 'ballance = "random"\n');
  assert.equal((await made.cli(['reload'])).code, 1);
  return { made, d };
}

/** What must hold in the end: `b` is drained, `d` is back, and the file is in effect. */
async function isSolved(made) {
  await eventually('the incident is over', async () => {
    const status = await made.status();
    const [{ backends }] = status.pools;
    const [a, b, c, d] = backends;
    const serving = [a, c, d].every((one) => one.eligible) && b.intent === 'draining';
    return serving && status.generation === 2 && status.trouble.length === 0;
  });
}

/** The operator corrects the file, and starts the service of `d` again. */
async function repair(made, d) {
  const text = fs.readFileSync(made.file, 'utf8').replace('ballance = "random"\n', '');
  fs.writeFileSync(made.file, text.replace('workers = 2', 'workers = 2\nconnections_max = 5000'));
  await d.restart();
}

scene('the incident is solved with the page alone', async () => {
  const { made, d } = await incident();
  const page = await tab(made.url, { expected: ['401'] });
  for (const words of ['web/d is down', 'connection refused', 'web/b is suspect']) {
    await page.shows('#findings', words);
  }
  await page.shows('#findings', 'The last reload was rejected');
  await page.shows('#findings', 'ballance');
  // The slow backend: its figures, and then a drain.
  await page.page.getByRole('link', { name: 'Explain: web/b is suspect' }).click();
  await page.shows('#drawer', 'The median of the pool is');
  await page.button('Drain', '#drawer').click();
  await page.button('Drain', '#dialog').click();
  await page.page.getByLabel('Token').fill(made.token);
  await page.button('Drain', '#dialog').click();
  await page.shows('#toast', 'web/b is draining');
  // The dead one: its probes say what to repair.
  await page.press('Escape');
  await page.page.getByRole('link', { name: 'Explain: web/d is down' }).click();
  await page.shows('#drawer', 'Gets no new sessions: it is down.');
  await page.shows('#drawer', 'Last probes');
  await repair(made, d);
  // Tidegate watches the file, so the corrected one is loaded without a command.
  await page.press('Escape', '1');
  await page.shows('#findings', 'Nothing is wrong.', 30_000);
  await page.shows('#facts', 'generation 2');
  await isSolved(made);
});

scene('the incident is solved with commands alone', async () => {
  const { made, d } = await incident();
  const says = async (words, ...parts) => {
    const { output } = await made.cli(words);
    for (const part of parts) assert.ok(output.includes(part), `${words}: ${part}: ${output}`);
  };
  await says(
    ['status'],
    'PROBLEM: web/d is down',
    'web/b is suspect',
    'The last reload was rejected',
  );
  await says(['explain', 'web/b'], 'suspect', 'pool median');
  await says(['drain', 'web/b'], 'draining');
  await says(['explain', 'web/d'], 'connection refused');
  await says(['events', '--kind', 'config'], 'unknown key', 'ballance');
  await says(['check', '--config', made.file], 'unknown key');
  await repair(made, d);
  await made.cli(['reload']);
  await isSolved(made);
  await says(['status'], '3 of 4 eligible');
});
