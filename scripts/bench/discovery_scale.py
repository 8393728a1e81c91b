"""Figures of member discovery at scale: 10,000 entries, 1,000 changes per second, 100 idle
sources, 1,000 names, and answers of 10 MB.

Called by `discovery`. `bench.scale` makes everything smaller, to check that it works.
"""

import http.server
import json
import socket
import threading
import time

import discovery_load
import discovery_world as world

KEY = "/tidegate/services/web/"
TABLES = "tidegate_tables_published_total"
DISCOVERED = TABLES + '{reason="discovery"}'
EXCUSES = "tidegate_heartbeat_excuses_total"

# Changes in a transaction of etcd.
BATCH = 4

# Shares of one core, in percent.
STORM_CPU, IDLE_CPU, RESOLVER_CPU = 50, 0.1, 1


def host(number):
    return f"127.{3 + number // 60_000}.{number // 250 % 240}.{number % 250 + 1}"


def entry(number, port, weight=1):
    return f"{KEY}b{number:05}", json.dumps({"address": f"{host(number)}:{port}", "weight": weight})


def frontend():
    port = world.measure.free_ports(1)
    return port, f'[frontend.web]\nbind = "127.0.0.1:{port}"\npool = "web"\n'


def discover(keys):
    return f'[pool.web.discover]\naddresses = ["127.0.0.0/8"]\nbackends_max = 10000\n{keys}'


# --- 10,000 entries ---

def entries(bench):
    """The list of all entries, one change, and the memory of an entry."""
    count = max(100, int(10_000 * bench.scale))
    with world.Backends(bench.directory) as backends, world.Etcd(bench.directory) as etcd:
        etcd.put_all(entry(number, backends.port) for number in range(count - 1))
        relay = world.Relay(etcd.address)
        text = frontend()[1] + discover('from = "main"\n') + etcd.table(relay.address)
        with bench.balancer("entries", text) as balancer:
            listed(bench, balancer, relay, count - 1)
            one_change(bench, balancer, etcd, backends.port, count - 1)
            time.sleep(3)
            found = balancer.resident()
        relay.stop()
        written = resident_of_file(bench, backends.port, count)
    note = f"(RSS {found / 2**20:.1f} MiB discovered, {written / 2**20:.1f} MiB in the file)"
    bench.most(f"memory per entry beyond the backend, {count} entries", (found - written) / count,
               "B", 1024, note)


def listed(bench, balancer, relay, count):
    began = time.monotonic()
    relay.opened.set()

    def published():
        found = balancer.metrics()
        return found[DISCOVERED] >= 1 and found["tidegate_pool_backends"] == count
    world.eventually("the table is published", published, pause=0.002)
    now = time.monotonic()
    bench.most(f"list of {count}: question to table", (now - began) * 1000, "ms", None)
    bench.most(f"list of {count}: answer to table", (now - relay.large_at) * 1000, "ms", 500)
    balancer.await_eligible(count)
    took = (time.monotonic() - began) * 1000
    bench.most(f"list of {count}: until all are verified", took, "ms", None)


def one_change(bench, balancer, etcd, port, free, changes=10, wait=1.0):
    time.sleep(2)
    idle = cpu_of(balancer, lambda: None, changes, wait)
    before = balancer.metrics()
    weights = iter(range(2, 2 + changes))
    busy = cpu_of(balancer, lambda: etcd.put(*entry(0, port, next(weights))), changes, wait)
    after = balancer.metrics()
    bench.most("one change: tables", (after[TABLES] - before[TABLES]) / changes, "", 1)
    bench.most("one change: discovery tables missing",
               max(0, changes - (after[DISCOVERED] - before[DISCOVERED])), "", 0)
    bench.most("one change: CPU time", max(0, busy - idle) / changes * 1000, "ms", 200)
    before = balancer.metrics()
    etcd.put(*entry(free, port))
    time.sleep(wait)
    after = balancer.metrics()
    bench.most("one newcomer: tables", after[TABLES] - before[TABLES], "", None)


def cpu_of(balancer, act, times, wait):
    before = balancer.cpu()
    for _ in range(times):
        act()
        time.sleep(wait)
    return balancer.cpu() - before


def resident_of_file(bench, port, count):
    """Memory of a process with the same backends in the file."""
    text = frontend()[1] + "".join(
        f'[[pool.web.backend]]\nname = "b{number:05}"\naddress = "{host(number)}:{port}"\n'
        for number in range(count))
    with bench.balancer("entries-file", text) as balancer:
        balancer.await_eligible(count)
        time.sleep(3)
        return balancer.resident()


# --- 1,000 changes per second ---

def storm(bench, members):
    """Changes of weights, and each tenth a member that joins or leaves."""
    seconds, rate, members = max(2, 10 * bench.scale), 1000, max(100, int(members * bench.scale))
    key = secret(bench)
    with world.Backends(bench.directory) as backends, world.Etcd(bench.directory) as etcd:
        etcd.put_all(entry(number, backends.port) for number in range(members))
        port, text = frontend()
        beats = world.free_address()
        text += discover('from = "main"\n') + etcd.table() + beating_pool(beats, key)
        with bench.balancer(f"storm-{members}", text) as balancer, \
                world.heartbeats(bench.program, bench.directory, beats, "beating",
                                 f"127.9.0.1:{backends.port}", key):
            balancer.await_eligible(members + 1)
            clients = discovery_load.Clients(port)
            try:
                time.sleep(3)
                alone = share(balancer.cpu, 3)
                before, began, spent = balancer.metrics(), time.monotonic(), balancer.cpu()
                done = changes(etcd, backends.port, members, rate, seconds)
                took = time.monotonic() - began
                spent, after = balancer.cpu() - spent, balancer.metrics()
            finally:
                clients.stop()
    if done < 0.9 * rate * seconds or took > 1.2 * seconds:
        raise RuntimeError(f"etcd took only {done} changes in {took:.1f} s")
    tables = after[TABLES] - before[TABLES]
    kinds = ", ".join(f"{kind} {after[name] - before[name]:.0f}" for kind in
                      ("discovery", "health", "heartbeat")
                      for name in [f'{TABLES}{{reason="{kind}"}}'])
    # The rate is that of the intervals between tables.
    title = f"{done / took:.0f} changes/s, {members} members"
    bench.most(f"{title}: tables per second", max(0, tables - 1) / took, "", 10, f"({kinds})")
    bench.most(f"{title}: CPU", 100 * spent / took, "%", STORM_CPU,
               f"(the clients alone: {alone:.1f} %)")
    bench.count(f"{title}: failed sessions, of {clients.sessions()}", clients.failed, 0,
                ", ".join(clients.failures))
    bench.count(f"{title}: heartbeats excused", after[EXCUSES] - before[EXCUSES], 0)


def changes(etcd, port, members, rate, seconds, streams=8):
    """Sends the changes on several connections without waiting for the answers, four in a
    transaction. Returns how many were answered within 2 s after the last."""
    sockets = [socket.create_connection(world.split(etcd.address), 10) for _ in range(streams)]
    counts = [0] * streams
    readers = [threading.Thread(target=count_answers, args=(stream, counts, at), daemon=True)
               for at, stream in enumerate(sockets)]
    for reader in readers:
        reader.start()
    total, began = int(rate * seconds) // BATCH, time.monotonic()
    for number in range(total):
        batch = [change(at, port, members) for at in range(number * BATCH, (number + 1) * BATCH)]
        sockets[number % streams].sendall(request(batch))
        ahead = began + (number + 1) * BATCH / rate - time.monotonic()
        if ahead > 0:
            time.sleep(ahead)
    deadline = time.monotonic() + 2
    while sum(counts) < total and time.monotonic() < deadline:
        time.sleep(0.01)
    for stream in sockets:
        stream.close()
    return sum(counts) * BATCH


def count_answers(stream, counts, at):
    status, rest = b"HTTP/1.1 200", b""
    while True:
        try:
            data = stream.recv(1 << 16)
        except OSError:
            return
        if not data:
            return
        counts[at] += (rest + data).count(status)
        # The last bytes can be the start of the next status line.
        rest = (rest + data)[-len(status) + 1:]


def change(number, port, members):
    """A change: each tenth joins or leaves, the others are weights."""
    if number % 10:
        place = number * 7 % members
        return {"request_put": world.put_body(*entry(place, port, number % 100 + 1))}
    turn = number // 10
    key, value = entry(members + turn % 50, port)
    if turn // 50 % 2:
        return {"request_delete_range": {"key": world.b64(key)}}
    return {"request_put": world.put_body(key, value)}


def request(batch):
    body = json.dumps({"success": batch}).encode()
    head = f"POST /v3/kv/txn HTTP/1.1\r\nHost: etcd\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def secret(bench):
    path = f"{bench.directory}/heartbeat.key"
    with open(path, "w", opener=lambda name, flags: world.os.open(name, flags, 0o600)) as file:
        file.write("k" * 32)
    return path


def beating_pool(listen, key):
    return (f'[heartbeat]\nlisten = "{listen}"\n[[heartbeat.key]]\nid = 1\nfile = "{key}"\n'
            'pools = ["beating"]\naddresses = ["127.0.0.0/8"]\n'
            "[pool.beating.heartbeat]\nregister = true\n")


def share(spent, seconds):
    """Share of one core that a process uses, in percent."""
    before, began = spent(), time.monotonic()
    time.sleep(seconds)
    return 100 * (spent() - before) / (time.monotonic() - began)


# --- idle sources and names ---

def idle(bench):
    """CPU time of 100 idle sources, and of the resolver for 1,000 names. All four processes
    run at the same time, because each needs almost no CPU time."""
    seconds, pools = max(5, 60 * bench.scale), 100
    names = max(20, int(1000 * bench.scale))
    with world.Backends(bench.directory) as backends, world.Etcd(bench.directory) as etcd:
        address = [f"{host(number)}:{backends.port}" for number in range(max(pools, names))]
        etcd.put_all((f"/tidegate/services/p{number}/b", json.dumps({"address": address[number]}))
                     for number in range(pools))
        sources = "".join(f'[pool.p{number}.discover]\nfrom = "main"\n'
                          'addresses = ["127.0.0.0/8"]\n' for number in range(pools))
        written = "".join(f'[[pool.p{number}.backend]]\naddress = "{address[number]}"\n'
                          for number in range(pools))
        lines = [f"{host(number)} n{number}.example" for number in range(names)]
        named = "".join(f'[[pool.web.backend]]\nname = "n{number}"\n'
                        f'address = "n{number}.example:{backends.port}"\n'
                        for number in range(names))
        with world.Dnsmasq(bench.directory, "ttl5", lines, 5) as short, \
                world.Dnsmasq(bench.directory, "ttl30", lines, 30) as long, \
                bench.balancer("idle-etcd", fronts(pools) + sources + etcd.table()) as asking, \
                bench.balancer("idle-file", fronts(pools) + written) as quiet, \
                bench.balancer("ttl5", frontend()[1] + named + short.table()) as often, \
                bench.balancer("ttl30", frontend()[1] + named + long.table()) as seldom:
            for balancer, count in (asking, pools), (quiet, pools), (often, names), (seldom, names):
                balancer.await_eligible(count)
            time.sleep(5 if bench.scale == 1 else 1)
            all_four = [asking, quiet, often, seldom]
            before, began = [one.cpu_fine() for one in all_four], time.monotonic()
            while (left := began + seconds - time.monotonic()) > 0:
                bench.progress(f"idle: {left:.0f} s left")
                time.sleep(min(left, 1))
            took = time.monotonic() - began
            cpu = [100 * (one.cpu_fine() - was) / took for one, was in zip(all_four, before)]
    note = f"(with sources {cpu[0]:.3f} %, with the file {cpu[1]:.3f} %)"
    bench.most(f"{pools} idle etcd sources: CPU", cpu[0] - cpu[1], "%", IDLE_CPU, note)
    for ttl, found in (5, cpu[2]), (30, cpu[3]):
        bench.most(f"resolver, {names} names, TTL {ttl} s: CPU", found - cpu[1], "%", RESOLVER_CPU)


def fronts(pools):
    base = world.measure.free_ports(pools)
    return "".join(f'[frontend.f{number}]\nbind = "127.0.0.1:{base + number}"\n'
                   f'pool = "p{number}"\n' for number in range(pools))


# --- large answers ---

class Members(http.server.BaseHTTPRequestHandler):
    """Answers with the next document, and notes that it was sent."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        body = server.documents[server.answers % len(server.documents)]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        server.answers += 1
        server.sent.set()

    def log_message(self, *_):
        pass


def large(bench):
    """Verdicts of a probe that end while an answer of 10 MB is read, and without answers."""
    count, rounds = max(100, int(10_000 * bench.scale)), max(3, int(25 * bench.scale))
    key, beats = secret(bench), world.free_address()
    with world.Backends(bench.directory) as backends:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Members)
        server.documents = [document(count, backends.port, weight) for weight in (1, 2, 3)]
        server.answers, server.sent = 0, threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        probed = world.free_address()
        rest = (f'[pool.probed.probe]\ninterval = "50ms"\nfast_interval = "50ms"\nrise = 1\n'
                f'fall = 1\n[[pool.probed.backend]]\naddress = "{probed}"\n'
                + beating_pool(beats, key))
        source = discover(f'kind = "http"\nurl = "http://127.0.0.1:{server.server_port}/"\n'
                          'interval = "1s"\n')
        quiet = frontend()[1] + '[[pool.web.backend]]\naddress = "127.0.0.1:9"\n'
        beat = (bench.program, bench.directory, beats, "beating", f"127.9.0.1:{backends.port}", key)
        with bench.balancer("large-quiet", quiet + rest) as balancer:
            bench.times("verdict of a probe without answers",
                        verdicts(balancer, probed, rounds, lambda: time.sleep(0.1)), 150)
        with bench.balancer("large", frontend()[1] + source + rest) as balancer, \
                world.heartbeats(*beat):
            # The probed backend is down.
            balancer.await_eligible(count + 1)
            before = balancer.metrics()
            found = verdicts(balancer, probed, rounds, lambda: next_answer(server))
            after = balancer.metrics()
        server.shutdown()
    size = len(server.documents[0]) / 1e6
    bench.times(f"verdict of a probe during answers of {size:.1f} MB", found, 150)
    bench.count("heartbeats excused during them", after[EXCUSES] - before[EXCUSES], 0)


def document(count, port, weight):
    """A list whose labels, which the balancer ignores, make it 1 kB per entry. The weight of
    the first entry differs between documents."""
    labels = {f"note{number}": "x" * 220 for number in range(4)}
    return json.dumps([
        {"address": f"{host(number)}:{port}", "name": f"b{number:05}", "labels": labels,
         "weight": weight if number == 0 else 1} for number in range(count)
    ]).encode()


def next_answer(server):
    server.sent.clear()
    if not server.sent.wait(20):
        raise RuntimeError("the source asked nothing for 20 s")


def verdicts(balancer, address, rounds, wait):
    """Returns the times in milliseconds from the end of a backend to its verdict."""
    def eligible():
        return balancer.metrics()['tidegate_pool_backends_eligible{pool="probed"}']

    found = []
    for _ in range(rounds):
        with socket.create_server(world.split(address)) as listener:
            world.eventually("the backend is up", lambda: eligible() == 1)
            wait()
        ended = time.monotonic()
        world.eventually("the backend is down", lambda: eligible() == 0, pause=0.003)
        found.append((time.monotonic() - ended) * 1000)
    return found


FIGURES = {
    "entries": entries,
    "storm": lambda bench: storm(bench, 200),
    # The members that join need room below the bound of 10,000.
    "storm-large": lambda bench: storm(bench, 9_900),
    "idle": idle,
    "large": large,
}
