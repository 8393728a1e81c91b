"""The processes of the figures of member discovery: the balancer, registries, name server.

Each is a context manager that ends its process by its process ID. All use loopback, free
ports and a temporary directory. Nothing here measures.
"""

import base64
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import candidates
import kernel
import measure
import series

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CLASSES = "/usr/share/java"

# Longest wait for a server or for a state of the balancer, in seconds.
PATIENCE = 60


def eventually(what, done, patience=PATIENCE, pause=0.01):
    """Calls `done` until it returns a value other than None and False."""
    deadline = time.monotonic() + patience
    while True:
        value = done()
        if value is not None and value is not False:
            return value
        if time.monotonic() > deadline:
            raise RuntimeError(f"not after {patience} s: {what}")
        time.sleep(pause)


class Server(contextlib.AbstractContextManager):
    """A child process."""

    process = None

    def launch(self, command, directory, **more):
        log = os.path.join(directory, f"{os.path.basename(command[0])}-{id(self)}.log")
        self.log_path = log
        with open(log, "ab") as out:
            given = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out, **more}
            self.process = subprocess.Popen(command, **given)

    def log(self):
        with open(self.log_path, errors="replace") as file:
            return file.read()[-2000:]

    def check(self):
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.process.args[0]} ended:\n{self.log()}")

    def __exit__(self, *_):
        if self.process:
            candidates.end(self.process)


class Backends(Server):
    """The backends: every address of 127.0.0.0/8 at `port`."""

    def __init__(self, directory):
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "discovery_load.py")
        self.launch([sys.executable, script], directory, stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())


class Balancer(Server):
    """A tidegate with one worker process. `text` is its configuration without [process],
    [admin] and [log]."""

    def __init__(self, program, directory, name, text):
        self.admin = os.path.join(directory, f"{name}.sock")
        config = os.path.join(directory, f"{name}.toml")
        with open(config, "w") as file:
            file.write(f'[process]\npin = false\n[admin]\nlisten = "unix:{self.admin}"\n'
                       f'backend_metrics_max = 0\n[log]\nlevel = "warn"\n{text}')
        self.launch([program, "run", "--single", "--config", config], directory)
        self.pids = [self.process.pid]

        def answers():
            self.check()
            return os.path.exists(self.admin) and series.ask(self.admin, "GET", "/live").status
        eventually("the admin API answers", answers)

    def metrics(self):
        """Returns {name: sum over its series}, and {name{labels}: value}."""
        found = {}
        for line in series.ask(self.admin, "GET", "/metrics").body.decode().splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                bare = name.partition("{")[0]
                found[name] = float(value)
                if bare != name:
                    found[bare] = found.get(bare, 0) + float(value)
        return found

    def eligible(self):
        return self.metrics()["tidegate_pool_backends_eligible"]

    def await_eligible(self, count):
        eventually(f"{count} backends serve", lambda: self.eligible() == count, pause=0.05)

    def cpu(self):
        """CPU time of all threads so far, in seconds, to one clock tick."""
        return sum(kernel.cpu_seconds_whole(self.pids).values())

    def cpu_fine(self):
        """The same to 1 ns, without threads that have ended."""
        return kernel.cpu_seconds(self.pids)

    def __exit__(self, kind, *rest):
        if kind:
            print(f"log of the balancer:\n{self.log()}", file=sys.stderr)
        super().__exit__(kind, *rest)

    def resident(self):
        return kernel.memory_bytes(self.process.pid)["VmRSS"]


class Etcd(Server):
    """One node of etcd, over its JSON gateway."""

    def __init__(self, directory):
        client, peer = free_address(), free_address()
        # In memory, because the figures are not about the disk.
        place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else directory
        self.data = os.path.join(place, f"tidegate-etcd-{os.getpid()}-{id(self)}")
        self.address = client
        self.launch(["etcd", "--name", "n0", "--log-level", "error", "--data-dir", self.data,
                     "--listen-client-urls", f"http://{client}",
                     "--advertise-client-urls", f"http://{client}",
                     "--listen-peer-urls", f"http://{peer}",
                     "--initial-advertise-peer-urls", f"http://{peer}",
                     "--initial-cluster", f"n0=http://{peer}"], directory)
        self.connection = None
        eventually("etcd answers", self.answers)

    def answers(self):
        self.check()
        try:
            return "header" in self.ask("/v3/kv/range", {"key": b64("x")})
        except (OSError, RuntimeError, http.client.HTTPException):
            return False

    def ask(self, path, body):
        if self.connection is None:
            self.connection = http.client.HTTPConnection(self.address, timeout=10)
        try:
            self.connection.request("POST", path, json.dumps(body))
            answer = self.connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException):
            self.connection = None
            raise
        if answer.status != 200:
            raise RuntimeError(f"etcd refused {path}: {text[:300]}")
        return json.loads(text)

    def put(self, key, value):
        self.ask("/v3/kv/put", put_body(key, value))

    def delete(self, key):
        self.ask("/v3/kv/deleterange", {"key": b64(key)})

    def put_all(self, entries):
        entries = list(entries)
        for at in range(0, len(entries), 100):
            puts = [{"request_put": put_body(*entry)} for entry in entries[at:at + 100]]
            self.ask("/v3/kv/txn", {"success": puts})

    def __exit__(self, *_):
        super().__exit__()
        shutil.rmtree(self.data, ignore_errors=True)

    def table(self, address=None):
        return f'[registry.main]\nkind = "etcd"\nservers = ["{address or self.address}"]\n'


class Zookeeper(Server):
    """A ZooKeeper server and one session with it."""

    def __init__(self, directory):
        self.address = free_address()
        config = os.path.join(directory, "zoo.cfg")
        with open(config, "w") as file:
            file.write(f"tickTime=500\ndataDir={directory}/zookeeper\nmaxClientCnxns=0\n"
                       f"clientPort={self.address.partition(':')[2]}\n"
                       "clientPortAddress=127.0.0.1\nadmin.enableServer=false\n"
                       "4lw.commands.whitelist=*\n")
        self.launch(["java", "-Xmx256m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC",
                     "-XX:-UsePerfData", "-cp", f"{CLASSES}/*",
                     "org.apache.zookeeper.server.quorum.QuorumPeerMain", config], directory)
        eventually("ZooKeeper answers", self.serves, pause=0.05)
        self.socket = socket.create_connection(split(self.address), 10)
        self.number, self.lock = 0, threading.Lock()
        self.send(struct.pack(">iqiqi16s?", 0, 0, 10_000, 0, 16, b"", False))
        self.receive()
        self.stopping = threading.Event()
        threading.Thread(target=self.ping, daemon=True).start()

    def serves(self):
        self.check()
        try:
            with socket.create_connection(split(self.address), 2) as stream:
                stream.sendall(b"srvr")
                return b"Mode: " in stream.recv(4096)
        except OSError:
            return False

    def ping(self):
        while not self.stopping.wait(2):
            with self.lock:
                self.send(struct.pack(">ii", -2, 11))
                self.receive()

    def create(self, path, data=b""):
        access = struct.pack(">ii", 1, 31) + text(b"world") + text(b"anyone")
        self.call(1, text(path.encode()) + text(data) + access + struct.pack(">i", 0))

    def delete(self, path):
        self.call(2, text(path.encode()) + struct.pack(">i", -1))

    def call(self, code, body):
        with self.lock:
            self.number += 1
            self.send(struct.pack(">ii", self.number, code) + body)
            error = struct.unpack(">iqi", self.receive()[:16])[2]
        if error:
            raise RuntimeError(f"ZooKeeper refused request {code}: {error}")

    def send(self, body):
        self.socket.sendall(struct.pack(">i", len(body)) + body)

    def receive(self):
        size = struct.unpack(">i", measure.received(self.socket, 4))[0]
        return measure.received(self.socket, size)

    def __exit__(self, *_):
        self.stopping.set()
        super().__exit__()


class ConsulDouble(Server):
    """The Consul double of src/discovery."""

    def __init__(self, examples, directory):
        self.launch([os.path.join(examples, "consul_double"), "127.0.0.1:0"], directory,
                    stdout=subprocess.PIPE, text=True)
        self.address = self.process.stdout.readline().split()[-1]
        self.connection = http.client.HTTPConnection(self.address, timeout=10)

    def put(self, path, body=None):
        self.connection.request("PUT", path, json.dumps(body) if body else "")
        answer = self.connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"the Consul double refused {path}: {text[:300]}")


class KubernetesDouble(Server):
    """The Kubernetes double of src/discovery."""

    def __init__(self, examples, directory, port):
        self.launch([os.path.join(examples, "kubernetes_double"), str(port)], directory,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.address = self.process.stdout.readline().split()[-1]

    def put(self, hosts):
        self.process.stdin.write(" ".join(sorted(hosts)) + "\n")
        self.process.stdin.flush()
        self.process.stdout.readline()


class Dnsmasq(Server):
    """A dnsmasq with the names of a hosts file, below `example`."""

    def __init__(self, directory, name, lines, ttl):
        self.hosts = os.path.join(directory, f"{name}.hosts")
        self.write(lines)
        self.address = f"127.0.0.1:{measure.free_ports(1)}"
        self.launch([candidates.find("dnsmasq"), "--keep-in-foreground", "--conf-file=/dev/null",
                     "--pid-file=", "--user=root", "--no-resolv", "--no-hosts",
                     "--bind-interfaces", "--local=/example/", f"--local-ttl={ttl}",
                     f"--addn-hosts={self.hosts}", "--listen-address=127.0.0.1",
                     f"--port={self.address.partition(':')[2]}"], directory)

        def answers():
            self.check()
            return candidates.connects(split(self.address))
        eventually("dnsmasq answers", answers)

    def write(self, lines):
        with open(self.hosts, "w") as file:
            file.write("".join(f"{line}\n" for line in lines))

    def change(self, lines):
        self.write(lines)
        self.process.send_signal(signal.SIGHUP)

    def table(self):
        return f'[dns]\nservers = ["{self.address}"]\n'


class Relay:
    """A relay in front of a server. It relays nothing before `opened`, and notes when the
    last large part of an answer arrived."""

    def __init__(self, server):
        self.server, self.large_at = split(server), None
        self.opened = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(self.server)
            threading.Thread(target=self.copy, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self.copy, args=(server, client, True), daemon=True).start()

    def copy(self, source, target, answers):
        self.opened.wait()
        try:
            while data := source.recv(1 << 20):
                if answers and len(data) >= 4096:
                    self.large_at = time.monotonic()
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def stop(self):
        self.listener.close()


def heartbeats(program, directory, to, pool, address, key):
    """Starts a sender of heartbeats, one per 100 ms."""
    server = Server()
    server.launch([program, "heartbeat", "--to", to, "--pool", pool, "--name", "beating",
                   "--address", address, "--key-id", "1", "--key-file", key, "--check", "none",
                   "--drain", "0s"], directory)
    return server


def text(data):
    return struct.pack(">i", len(data)) + data


def put_body(key, value):
    return {"key": b64(key), "value": b64(value)}


def b64(value):
    return base64.b64encode(value.encode()).decode()


def split(address):
    host, _, port = address.rpartition(":")
    return host, int(port)


def free_address():
    return f"127.0.0.1:{measure.free_ports(1)}"

