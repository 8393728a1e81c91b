// A running balancer with backends of its own, for the tests of the page. Each site has its own
// directory and free ports on loopback. `stop` ends everything that it has started.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';

export const PROGRAM = process.env.TIDEGATE;
export const TOKEN = 'a-token-of-fair-length';
export const READ_TOKEN = 'a-token-that-only-reads';

export const pause = (milliseconds) => new Promise((resume) => setTimeout(resume, milliseconds));

/** Waits until `check()` returns something, at most 20 s. */
export async function eventually(what, check) {
  const end = Date.now() + 20_000;
  for (;;) {
    const found = await check();
    if (found) return found;
    if (Date.now() > end) throw new Error(`not in time: ${what}`);
    await pause(50);
  }
}

/** The process and all that it has started. */
function family(pid) {
  const file = `/proc/${pid}/task/${pid}/children`;
  const children = fs.existsSync(file) ? fs.readFileSync(file, 'utf8').split(' ') : [];
  return [pid, ...children.filter(Boolean).flatMap((child) => family(Number(child)))];
}

async function freePort() {
  const server = net.createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address();
  server.close();
  await once(server, 'close');
  return port;
}

/** Echoes what clients send, after `delay` milliseconds. `greeting` is sent first. */
export class Backend {
  static async start({ host = '127.0.0.1', port = 0, greeting = '', delay = 0 } = {}) {
    const backend = new Backend();
    backend.open = new Set();
    const server = { allowHalfOpen: true };
    backend.server = net.createServer(server, (client) => {
      backend.open.add(client);
      client.on('error', () => {});
      client.on('close', () => backend.open.delete(client));
      if (greeting) client.write(greeting);
      client.on('data', (data) => setTimeout(() => client.write(data), delay));
      client.on('end', () => setTimeout(() => client.end(), delay));
    });
    backend.server.listen(port, host);
    await once(backend.server, 'listening');
    backend.host = host;
    backend.port = backend.server.address().port;
    return backend;
  }

  /** Closes the port and all sessions. */
  async stop() {
    for (const client of this.open) client.destroy();
    if (this.server.listening) {
      this.server.close();
      await once(this.server, 'close');
    }
  }

  /** Listens on the port again. */
  async restart() {
    this.server.listen(this.port, this.host);
    await once(this.server, 'listening');
  }
}

export class Site {
  /**
   * `pools` is `{name: {keys, probe, backends: [[name, address], ...]}}`. Each pool has a frontend
   * of the same name. `admin` are further keys of `[admin]`, in which TOKEN and READ stand for the
   * token files. `unix` listens on a Unix socket, and `everywhere` on every address.
   */
  static async start(pools, options = {}) {
    const { unix = false, everywhere = false } = options;
    const { admin = unix ? '' : 'token_file = "TOKEN"' } = options;
    const site = new Site();
    site.dir = fs.mkdtempSync(path.join(os.tmpdir(), 'tidegate-page-'));
    site.file = path.join(site.dir, 'tidegate.toml');
    site.clients = [];
    site.token = TOKEN;
    site.port = await freePort();
    const pathOf = (name) => JSON.stringify(path.join(site.dir, name));
    site.keys = admin.replace('"TOKEN"', pathOf('token')).replace('"READ"', pathOf('read-token'));
    site.admin = unix ? `unix:${site.dir}/admin.sock` : `127.0.0.1:${site.port}`;
    site.listen = everywhere ? `0.0.0.0:${site.port}` : site.admin;
    for (const [name, text] of [
      ['token', TOKEN],
      ['read-token', READ_TOKEN],
    ]) {
      fs.writeFileSync(path.join(site.dir, name), text, { mode: 0o600 });
    }
    site.ports = {};
    for (const name of Object.keys(pools)) site.ports[name] = await freePort();
    site.write(pools);
    await site.run();
    return site;
  }

  write(pools) {
    const lines = ['[process]', 'workers = 2', '[admin]', `listen = "${this.listen}"`, this.keys];
    for (const [name, { keys = '', probe, backends }] of Object.entries(pools)) {
      lines.push(
        `[frontend.${name}]`,
        `bind = "127.0.0.1:${this.ports[name]}"`,
        `pool = "${name}"`,
      );
      lines.push(`[pool.${name}]`, keys);
      if (probe) lines.push(`[pool.${name}.probe]`, probe);
      for (const [backend, address] of backends) {
        lines.push(`[[pool.${name}.backend]]`, `name = "${backend}"`, `address = "${address}"`);
      }
    }
    fs.writeFileSync(this.file, lines.join('\n') + '\n');
  }

  async run() {
    const log = fs.openSync(path.join(this.dir, 'log'), 'a');
    this.process = spawn(PROGRAM, ['run', '--config', this.file], { stdio: ['ignore', log, log] });
    fs.closeSync(log);
    await eventually('the balancer is ready', () => this.isReady());
  }

  async isReady() {
    if (this.process.exitCode != null) throw new Error(fs.readFileSync(`${this.dir}/log`, 'utf8'));
    return (await this.cli(['ready'])).code === 0;
  }

  /** Runs a command of the program against this balancer. */
  async cli(words) {
    const reach = ['--admin', this.admin, '--token-file', `${this.dir}/token`];
    const command = words[0] === 'check' ? words : [...words, ...reach];
    const child = spawn(PROGRAM, command, { stdio: ['ignore', 'pipe', 'pipe'] });
    let output = '';
    child.stdout.on('data', (data) => (output += data));
    child.stderr.on('data', (data) => (output += data));
    const [code] = await once(child, 'close');
    return { code, output };
  }

  async status() {
    return JSON.parse((await this.cli(['status', '--json'])).output);
  }

  async backend(pool, name) {
    const { pools } = await this.status();
    return pools.find((one) => one.name === pool).backends.find((one) => one.name === name);
  }

  /** Starts `tidegate ui` and returns the address that it prints. */
  async ui() {
    const child = spawn(PROGRAM, ['ui', '--admin', this.admin], {
      stdio: ['ignore', 'pipe', 'ignore'],
    });
    const [line] = await once(child.stdout, 'data');
    const stop = async () => {
      child.kill();
      await once(child, 'exit');
    };
    return { url: String(line).trim(), stop };
  }

  get url() {
    return `http://127.0.0.1:${this.port}/`;
  }

  /** Opens a session and waits until its backend has answered. */
  async client(frontend) {
    const socket = net.connect(this.ports[frontend], '127.0.0.1');
    socket.on('error', () => {});
    this.clients.push(socket);
    await once(socket, 'connect');
    socket.write('hello');
    await once(socket, 'data');
    return socket;
  }

  /** Opens short sessions until `stop`. */
  load(frontend, perSecond) {
    const one = () => {
      const socket = net.connect(this.ports[frontend], '127.0.0.1');
      socket.on('error', () => {});
      socket.on('connect', () => socket.write('hello'));
      socket.on('data', () => socket.end());
    };
    this.timer = setInterval(one, 1000 / perSecond);
  }

  /** Sends a signal to the process and to its children: the supervisor starts the balancer. */
  signal(name) {
    for (const pid of family(this.process.pid)) {
      try {
        process.kill(pid, name);
      } catch {
        // It has ended.
      }
    }
  }

  /** Kills the balancer, as a crash of the host would. */
  async kill() {
    if (this.process.exitCode != null || this.process.signalCode != null) return;
    const ended = once(this.process, 'exit');
    this.signal('SIGKILL');
    await ended;
  }

  async stop() {
    clearInterval(this.timer);
    for (const socket of this.clients) socket.destroy();
    await this.kill();
    fs.rmSync(this.dir, { recursive: true, force: true });
  }
}
