// Registers, changes and deregisters a service with the npm package `consul`, and expects
// its `watch()` to see each step. Run by consul_referee.rs: node consul_referee.js FOLDER PORT
// FOLDER has node_modules/consul.

const [folder, port] = process.argv.slice(2);
const Consul = require(`${folder}/node_modules/consul`);
const consul = new Consul({ host: "127.0.0.1", port: Number(port) });

// Name, what the watch shows afterwards, and the request.
const steps = [
  ["registered", ["web-1 critical"], () => consul.agent.service.register({
    name: "web", id: "web-1", address: "127.0.0.1", port: 9001, tags: ["blue"],
    check: { ttl: "60s" },
  })],
  ["passing", ["web-1 passing"], () => consul.agent.check.pass("service:web-1")],
  ["second", ["web-1 passing", "web-2 none"], () => consul.agent.service.register({
    name: "web", id: "web-2", address: "127.0.0.1", port: 9002,
  })],
  ["maintenance", ["web-1 passing", "web-2 critical"], () => consul.agent.service.maintenance({
    id: "web-2", enable: true,
  })],
  ["gone", ["web-2 critical"], () => consul.agent.service.deregister("web-1")],
  ["empty", [], () => consul.agent.service.deregister("web-2")],
];

function summary(entries) {
  return entries.map((entry) => {
    const own = entry.Checks.filter((check) => check.ServiceID === entry.Service.ID);
    return `${entry.Service.ID} ${own.length ? own[0].Status : "none"}`;
  });
}

let at = -1;
let started = 0;
const watch = consul.watch({
  method: consul.health.service, options: { service: "web", wait: "10s" },
});

async function next() {
  at += 1;
  if (at === steps.length) {
    const services = await consul.agent.service.list();
    const leader = await consul.status.leader();
    if (Object.keys(services).length || !leader) throw new Error("the lists are wrong");
    process.exit(0);
  }
  started = Date.now();
  await steps[at][2]();
}

function fail(error) {
  const step = at < 0 ? "the first answer" : steps[at][0];
  console.error(`${step}: ${error.message ?? error}`);
  process.exit(1);
}

watch.on("error", fail);
watch.on("change", (entries) => {
  const seen = summary(entries);
  const expected = at < 0 ? [] : steps[at][1];
  // A change can be seen in two steps, such as a service before its check.
  if (JSON.stringify(seen) !== JSON.stringify(expected)) return;
  if (at >= 0) console.log(`${steps[at][0]} seen after ${Date.now() - started} ms`);
  next().catch(fail);
});
setTimeout(() => fail("no such answer after 20 s"), 20000);
