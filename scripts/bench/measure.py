"""One set-up's run: backends and balancers up, every workload in rounds.

Owns its children and ends each by its process id. Gives samples; what they mean
is `report`'s.
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

# Above this share of the machine used by others a measurement is not counted.
FOREIGN_MAX = 0.10

# Backend addresses of each kind: enough that short connections never wait for
# one of the balancer's own ports.
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
        # Again with other ports: somebody may have taken one meanwhile.
        for attempt in range(3):
            one = self.make(make)
            # First, so that whatever happens next finds it to stop.
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
        print(f"{make.name}: left out", file=sys.stderr)

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
        """Rounds of samples: [{candidate: sample}]."""
        takes_part = [
            one for one in self.balancers if one.only is None or workload.family in one.only
        ]
        rounds = []
        for number in range(self.options.rounds):
            samples = {}
            for one in takes_part:
                # None where nothing could be measured: a finding, not a gap.
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
        ours = [pid for other in self.balancers for pid in other.pids()]
        ours += [process.pid for process in self.backends.values()]
        times = os.times()
        busy, stolen = kernel.machine_seconds()
        return {
            "balancer": kernel.cpu_seconds(one.pids()),
            # The load generators that have ended.
            "load": times.children_user + times.children_system,
            # Ourselves and them.
            "ours": kernel.cpu_seconds(ours) + sum(times[:4]),
            "busy": busy,
            "stolen": stolen,
            "wall": time.monotonic(),
        }

    def idle(self, make, wanted=workloads.IDLE):
        """Resident memory for each of many idle sessions of a fresh balancer."""
        wanted = min(wanted, candidates.SESSIONS_MAX - 200)
        one = self.make(make)
        load = None
        try:
            one.start()
            # What only the first sessions cost is not a session's.
            self.hold(one, 50, "0.2s").wait()
            before = settled_memory(one)
            load = self.hold(one, wanted, "60s")
            deadline = time.monotonic() + 30
            while kernel.descriptors(one.pids()) < 2 * wanted:
                if load.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{wanted} sessions did not come to stand:\n{one.log()}")
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
    """Resident memory once it has not moved for a second."""
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
        "foreign": max(0.0, spent["busy"] + spent["stolen"] - spent["ours"]) / capacity,
        "p50": latency.get("p50"),
        "p99": latency.get("p99"),
        "p99.9": latency.get("p99.9"),
        "errors": report["errors"],
    }


# --- is it a balancer at all ---

def relays(one):
    """Bytes pass unchanged both ways, and a half-closed connection goes on."""
    if isinstance(one, candidates.Direct):
        return
    sent = random.Random(7).randbytes(300_000)
    with socket.create_connection(one.address("echo"), 5) as stream:
        stream.settimeout(10)
        # Small enough for the buffers on the way: nobody reads meanwhile.
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
    """The first of `count` ports in a row that nobody uses."""
    for _ in range(1000):
        # Below the kernel's own choices (ip_local_port_range).
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
    """SIGTERM ends the run as an interrupt does: through every `finally`."""

    def leave(number, _frame):
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGHUP, leave)
