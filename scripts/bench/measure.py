"""Runs a set-up: starts backends and balancers, and runs every workload in rounds.

Owns its children and ends each by its process ID. Returns samples; `report` analyses
them.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import candidates
import kernel
import workloads

# A measurement is repeated if other processes used more than this share of the host.
FOREIGN_MAX = 0.10

# Backend addresses of each kind. With this many, short connections never run out of
# local ports of the balancer.
BACKEND_HOSTS = ["127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"]

BACKENDS = {
    "echo": ["echo"],
    "source": ["source", "--size", "128KiB"],
    "trickle": ["source", "--size", "512"],
    "sink": ["sink"],
}


class Setup:
    def __init__(self, name, options, root, directory, cpus):
        self.name, self.options, self.root = name, options, root
        self.directory = os.path.join(directory, name)
        os.makedirs(self.directory)
        pinned = name == "pinned"
        self.threads = 1 if pinned else 2
        self.balancer_cpu = cpus[0] if pinned else None
        self.load_cpu = ["--cpu", str(cpus[1])] if pinned else []
        self.program = os.path.join(root, "target/release/tidegate")
        self.backends, self.addresses, self.balancers = {}, {}, []
        self.broken = {}

    # --- children ---

    def start(self, kinds_of_candidates):
        for kind in candidates.KINDS:
            listen = []
            for host in BACKEND_HOSTS:
                listen += ["--listen", f"{host}:0"]
            process = subprocess.Popen(
                [self.program, "backend", "--json", *listen, *BACKENDS[kind], *self.load_cpu],
                stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
            )
            self.backends[kind] = process
            line = json.loads(process.stdout.readline())
            self.addresses[kind] = [
                (at.rsplit(":", 1)[0], int(at.rsplit(":", 1)[1])) for at in line["listening"]
            ]
        for make in kinds_of_candidates:
            self.add(make)

    def add(self, make):
        # Retries use other ports, because another process can bind a free port first.
        for attempt in range(3):
            one = self.make(make)
            # Added first, so that `stop` ends it after any error.
            self.balancers.append(one)
            try:
                one.start()
                relays(one)
                self.broken.pop(make.name, None)
                return
            except (RuntimeError, OSError, ValueError) as error:
                print(f"{make.name}: {error}", file=sys.stderr)
                self.broken[make.name] = str(error)
                self.balancers.remove(one)
                one.stop()
        print(f"{make.name}: skipped", file=sys.stderr)

    def make(self, make):
        base = free_ports(len(candidates.KINDS))
        return make(
            self.root, self.directory, self.addresses, base, self.threads, self.balancer_cpu
        )

    def stop(self):
        for one in self.balancers:
            one.stop()
        for process in self.backends.values():
            candidates.end(process)

    # --- measuring ---

    def run(self, workload):
        """Returns the samples of all rounds: [{candidate: sample}]."""
        takes_part = [
            one for one in self.balancers if one.only is None or workload.family in one.only
        ]
        rounds = []
        for number in range(self.options.rounds):
            samples = {}
            for one in takes_part:
                # None: the measurement failed. `report` counts it.
                samples[one.name] = self.clean_sample(workload, one)
            rounds.append(samples)
            progress(f"{self.name} {workload.name}: round {number + 1} of {self.options.rounds}")
        progress("")
        return rounds

    def clean_sample(self, workload, one):
        best = None
        for _ in range(1 + self.options.repeats):
            sample = self.sample(workload, one)
            if sample is None:
                return best
            if best is None or sample["foreign"] < best["foreign"]:
                best = sample
            if sample["foreign"] <= FOREIGN_MAX:
                break
        return best

    def sample(self, workload, one):
        time.sleep(0.1)
        host, port = one.address(workload.kind)
        command = [
            self.program, "bench", "--json", "--to", f"{host}:{port}",
            "--for", f"{self.options.seconds}s", *workload.arguments, *self.load_cpu,
        ]
        before = self.readings(one)
        answer = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        after = self.readings(one)
        report = json.loads(answer.stdout or "{}")
        if answer.returncode != 0:
            why = f"exit {answer.returncode} {answer.stderr.strip()} {report.get('errors', '')}"
            print(f"{one.name} {workload.name}: {why}\n{one.log()}", file=sys.stderr)
            return None
        return summed_up(workload, report, before, after)

    def readings(self, one):
        pids = [pid for other in self.balancers for pid in other.pids()]
        pids += [process.pid for process in self.backends.values()]
        times = os.times()
        busy, stolen = kernel.machine_seconds()
        return {
            "balancer": kernel.cpu_seconds(one.pids()),
            # Load generators that have ended.
            "load": times.children_user + times.children_system,
            # All processes of this measurement, including this one.
            "own": kernel.cpu_seconds(pids) + sum(times[:4]),
            "busy": busy,
            "stolen": stolen,
            "wall": time.monotonic(),
        }

    def idle(self, make, wanted=workloads.IDLE):
        """Returns the resident memory per idle session of a new balancer."""
        wanted = min(wanted, candidates.SESSIONS_MAX - 200)
        one = self.make(make)
        load = None
        try:
            one.start()
            # The first sessions cause one-time allocations, which are excluded.
            self.hold(one, 50, "0.2s").wait()
            before = settled_memory(one)
            load = self.hold(one, wanted, "60s")
            deadline = time.monotonic() + 30
            while kernel.descriptors(one.pids()) < 2 * wanted:
                if load.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{wanted} sessions were not established:\n{one.log()}")
                time.sleep(0.1)
            after = settled_memory(one)
            return {"sessions": wanted, "bytes_per_session": (after - before) / wanted}
        except (RuntimeError, OSError) as error:
            print(f"{one.name} idle: {error}", file=sys.stderr)
            return None
        finally:
            if load is not None:
                candidates.end(load)
            one.stop()

    def hold(self, one, count, span):
        host, port = one.address("echo")
        return subprocess.Popen(
            [self.program, "bench", "--to", f"{host}:{port}", "idle", "--size", "64",
             "--connections", str(count), "--for", span, *self.load_cpu],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )


def settled_memory(one):
    """Waits until the resident memory has not changed for 1 s, at most 10 s. Returns it."""
    last = kernel.resident_bytes(one.pids())
    still = 0
    for _ in range(50):
        time.sleep(0.2)
        now = kernel.resident_bytes(one.pids())
        still = still + 1 if now == last else 0
        last = now
        if still == 5:
            break
    return last


def summed_up(workload, report, before, after):
    spent = {key: after[key] - before[key] for key in before}
    timed, all_units = workload.done(report)
    capacity = spent["wall"] * os.cpu_count()
    latency = report["latency_seconds"]

    def each(whose):
        return spent[whose] / all_units if all_units else None

    return {
        "rate": timed / report["seconds"],
        "cpu": each("balancer"),
        "load": each("load"),
        "busy": each("busy"),
        "foreign": max(0.0, spent["busy"] + spent["stolen"] - spent["own"]) / capacity,
        "p50": latency.get("p50"),
        "p99": latency.get("p99"),
        "p99.9": latency.get("p99.9"),
        "errors": report["errors"],
    }


# --- check of a balancer ---

def relays(one):
    """Checks that bytes pass unchanged in both directions, also after a half-close."""
    if isinstance(one, candidates.Direct):
        return
    sent = random.Random(7).randbytes(300_000)
    with socket.create_connection(one.address("echo"), 5) as stream:
        stream.settimeout(10)
        # Each part fits into the socket buffers, because this code reads only after
        # sending.
        for at in range(0, len(sent), 20_000):
            stream.sendall(sent[at:at + 20_000])
            if received(stream, 20_000) != sent[at:at + 20_000]:
                raise RuntimeError("the echo differs")
        stream.sendall(sent[:1000])
        stream.shutdown(socket.SHUT_WR)
        if received(stream, 1000) != sent[:1000] or stream.recv(1) != b"":
            raise RuntimeError("no answer after a half-close")
    for kind in ("source", "trickle"):
        with socket.create_connection(one.address(kind), 5) as stream:
            stream.settimeout(10)
            if received(stream, 500_000) != b"y" * 500_000:
                raise RuntimeError("the stream differs")
    with socket.create_connection(one.address("sink"), 5) as stream:
        stream.settimeout(10)
        stream.sendall(sent)
        stream.shutdown(socket.SHUT_WR)
        if stream.recv(1) != b"":
            raise RuntimeError("the sink answered")


def received(stream, count):
    data = bytearray()
    while len(data) < count:
        more = stream.recv(count - len(data))
        if not more:
            raise RuntimeError(f"the connection ended after {len(data)} of {count} bytes")
        data += more
    return bytes(data)


def free_ports(count):
    """Returns the first of `count` consecutive unused ports."""
    for _ in range(1000):
        # Below the ports that the kernel assigns (ip_local_port_range).
        base = random.randrange(12_000, 31_000)
        held = []
        try:
            for port in range(base, base + count):
                listener = socket.socket()
                held.append(listener)
                listener.bind(("127.0.0.1", port))
            return base
        except OSError:
            continue
        finally:
            for listener in held:
                listener.close()
    raise RuntimeError("no free ports")


def progress(text):
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def stop_on_signals():
    """Makes SIGTERM and SIGHUP end the run through every `finally`, as SIGINT does."""

    def leave(number, _frame):
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGHUP, leave)
