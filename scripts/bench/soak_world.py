"""The processes of a soak: the balancer with its changing configuration, and the load.

Called by `soak`. Owns its children and ends each by its process ID. It never measures or
judges.
"""

import ctypes
import json
import os
import random
import signal
import subprocess
import threading
import time

import candidates
import kernel
import measure
import series

FRONTENDS = ["steady", "short", "bulk", "idle", "ledger"]

# Numbers of permanent echo backends, of addresses for temporary backends, and of ledger
# backends.
ECHOES, GUESTS, LEDGERS = 4, 3, 3

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LIBC = ctypes.CDLL(None)


def adopt_orphans():
    """Makes this process the parent of orphaned descendants, so that it can reap them."""
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def started(command, **more):
    """Starts a child that gets no signals of the terminal and ends with this process."""
    def apart():
        os.setsid()
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    return subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=apart, **more)


class Load:
    """A load generator that prints a line of JSON per window and one at its end. It is
    restarted if it exits."""

    def __init__(self, name, command, log):
        self.name, self.command, self.log = name, command, log
        self.windows, self.errors, self.before = [], {}, 0
        self.runs, self.broken = 0, None
        self.changed = threading.Condition()
        self.stopping = False
        self.start()

    def start(self):
        self.runs += 1
        self.counted, self.units = {}, 0
        self.process = started(self.command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        # This thread only reads. PR_SET_PDEATHSIG requires that the main thread starts
        # processes.
        self.reader = threading.Thread(target=self.read, args=(self.process,), daemon=True)
        self.reader.start()

    def read(self, process):
        for line in process.stdout:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            with self.changed:
                self.take(found)
                self.changed.notify_all()
        process.wait()
        with self.changed:
            self.changed.notify_all()

    def take(self, found):
        # The lines of a ledger have totals. The lines of a bench have the counts of a
        # window, except for the last, which has totals.
        ledger = "streams" in found
        errors = found.get("errors") or {
            kind: found[kind] for kind in ("refused", "reset", "wrong", "silent") if found.get(kind)
        }
        whole = ledger or "window" not in found
        if whole:
            self.counted = errors
        else:
            for kind, count in errors.items():
                self.counted[kind] = self.counted.get(kind, 0) + count
        units = found.get("streams") or found.get("requests") or found.get("opened") or 0
        self.units = units if whole else self.units + units
        self.windows.append(found)

    def done(self):
        """Returns the streams, answers or connections of all runs."""
        with self.changed:
            return self.before + self.units

    def failures(self):
        """Returns the errors of all runs by kind."""
        with self.changed:
            sums = dict(self.errors)
            for kind, count in self.counted.items():
                sums[kind] = sums.get(kind, 0) + count
            return sums

    def revive(self):
        """Restarts the generator if it has exited."""
        if self.process.poll() is None or self.stopping:
            return
        self.close_books()
        self.start()

    def close_books(self):
        self.reader.join(5)
        self.errors, self.counted = self.failures(), {}
        self.before, self.units = self.done(), 0
        # Exit code 3 also means that a ledger found errors, which the counts show. A
        # generator that was stopped before its first result (SIGTERM, or 3: it measured
        # nothing) is no error. The verdict checks the work of all runs separately.
        early = self.stopping and self.process.returncode in (-signal.SIGTERM, 3)
        if self.process.returncode != 0 and not self.errors and not early:
            self.broken = f"{self.name} ended with {self.process.returncode}"

    def window_after(self, seen, patience):
        """Waits for more than `seen` windows. Returns their number."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.windows) > seen or self.stopping, patience)
            return len(self.windows)

    def stop(self):
        self.stopping = True
        if self.process.poll() is None:
            self.process.terminate()
        try:
            # A ledger waits for its open streams.
            self.process.wait(45)
        except subprocess.TimeoutExpired:
            self.broken = f"{self.name} did not end"
            self.process.kill()
            self.process.wait()
        self.close_books()


class World:
    def __init__(self, options, directory):
        self.options, self.directory = options, directory
        self.random = random.Random(options.seed)
        self.admin = os.path.join(directory, "admin.sock")
        self.config = os.path.join(directory, "tidegate.toml")
        self.log = open(os.path.join(directory, "log"), "ab")
        self.loads, self.pids, self.echo, self.balancer = {}, [], None, None
        self.reloads = self.upgrades = 0
        self.generation, self.broken = 1, []

    # --- start and end ---

    def start(self):
        hosts = [f"127.0.0.{1 + number}:0" for number in range(ECHOES + GUESTS)]
        listen = [word for host in hosts for word in ("--listen", host)]
        self.echo = started(
            [self.options.program, "backend", "--json", *listen, "echo"],
            stdout=subprocess.PIPE, stderr=self.log, text=True,
        )
        self.echoes = json.loads(self.echo.stdout.readline())["listening"]
        base = measure.free_ports(len(FRONTENDS) + LEDGERS)
        self.ports = {name: base + at for at, name in enumerate(FRONTENDS)}
        self.ledgers = [f"127.0.0.1:{base + len(FRONTENDS) + at}" for at in range(LEDGERS)]
        self.write(self.shape(0))
        self.balancer = started(
            [self.options.program, "run", "--config", self.config],
            stdout=self.log, stderr=self.log,
        )
        self.await_ready()
        # Without the supervisor, which has no sessions and is not measured.
        self.pids = kernel.children(self.balancer.pid)[1:]
        self.generation = self.status()["generation"]
        self.start_loads()

    def await_ready(self):
        deadline = time.monotonic() + 20
        while not (os.path.exists(self.admin) and series.measure_ready(self.admin)):
            if self.balancer.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the balancer did not start:\n{self.last_lines()}")
            time.sleep(0.05)

    def start_loads(self):
        """Starts the load generators. Those with a rate are open loop. With upgrades, each
        run is shorter than the drain of an old process."""
        options, scale = self.options, self.options.load
        span = f"{int(options.upgrades or options.duration + 3600)}s"
        every = ["--every", f"{options.every * 1000:.0f}ms", "--for", span, "--json"]

        def bench(name, to, *words):
            command = [options.program, "bench", "--to", to, *words, *every]
            self.loads[name] = Load(name, command, self.log)

        def at(name):
            return f"127.0.0.1:{self.ports[name]}"

        bench("steady", at("steady"), "open-loop", "--connections", "32", "--size", "256",
              "--rate", f"{800 * scale}")
        # The same messages without a balancer, as a reference.
        bench("direct", self.echoes[0], "open-loop", "--connections", "8", "--size", "256",
              "--rate", f"{300 * scale}")
        bench("short", at("short"), "churn", "--size", "128", "--lifetime", "500ms",
              "--connections", f"{max(1, round(40 * scale))}")
        bench("bulk", at("bulk"), "open-loop", "--connections", "4", "--size", "128KiB",
              "--rate", f"{24 * scale}")
        bench("idle", at("idle"), "idle", "--size", "64", "--connections",
              f"{max(1, round(200 * scale))}")
        listen = [word for address in self.ledgers for word in ("--listen", address)]
        command = [options.program, "streams", "--to", at("ledger"), *listen,
                   "--rate", f"{10 * scale}", "--seed", str(self.random.randrange(1 << 40)), *every]
        self.loads["ledger"] = Load("ledger", command, self.log)

    def revive_loads(self):
        for load in self.loads.values():
            load.revive()

    def stop_loads(self):
        for load in self.loads.values():
            load.stop()
            if load.broken:
                self.broken.append(load.broken)

    def stop(self):
        """Shuts the balancer down and ends all other processes."""
        for load in self.loads.values():
            candidates.end(load.process)
        if self.balancer:
            self.end_balancer(time.monotonic() + 15)
        if self.echo:
            candidates.end(self.echo)
        self.log.close()

    def end_balancer(self, deadline):
        if self.balancer.poll() is None:
            self.balancer.send_signal(signal.SIGTERM)
        try:
            code = self.balancer.wait(max(0.1, deadline - time.monotonic()))
            if code != 0:
                self.broken.append(f"the balancer ended with {code}")
        except subprocess.TimeoutExpired:
            self.broken.append("the balancer did not end")
            below = kernel.children(self.balancer.pid)[1:]
            self.balancer.kill()
            self.balancer.wait()
            for pid in filter(alive, below):
                os.kill(pid, signal.SIGKILL)

    def last_lines(self):
        with open(self.log.name, errors="replace") as file:
            return file.read()[-2000:]

    # --- requests to the balancer ---

    def status(self):
        return json.loads(series.ask(self.admin, "GET", "/v1/status").body)

    def metrics(self):
        return series.ask(self.admin, "GET", "/metrics").body.decode()

    def processes(self):
        loads = [load.process.pid for load in self.loads.values()]
        return loads + self.pids + [self.echo.pid]

    def reload(self):
        self.write(self.shape(self.reloads + 1))
        answer = series.ask(self.admin, "POST", "/v1/reload")
        self.reloads += 1
        if answer.status != 200:
            self.broken.append(f"reload {self.reloads} was rejected: {answer.body.decode()[:500]}")
            return
        # If the file watcher reloaded first, the answer has the generation in force.
        generation = json.loads(answer.body)["generation"]
        if generation <= self.generation:
            self.broken.append(f"reload {self.reloads} changed nothing: generation {generation}")
        self.generation = generation

    def upgrade(self):
        answer = series.ask(self.admin, "POST", "/v1/upgrade")
        self.upgrades += 1
        if answer.status != 200:
            self.broken.append(f"upgrade {self.upgrades} failed: {answer.body.decode()[:500]}")
            return
        found = json.loads(answer.body)
        self.pids.append(found["pid"])
        self.pids = [pid for pid in self.pids if alive(pid) or pid == found["pid"]]
        self.generation = found["generation"]

    # --- the configuration ---

    def shape(self, number):
        """Returns a new configuration: weights, backends, and the cap of a frontend."""
        draw = self.random
        weights = [draw.randrange(1, 11) for _ in range(ECHOES + LEDGERS)]
        out = draw.randrange(2 * ECHOES) if number else ECHOES
        # A temporary backend has a new name each time.
        guest = draw.randrange(GUESTS) if number % 2 else None
        return {
            "number": number, "weights": weights, "out": out, "guest": guest,
            "ledger_out": draw.randrange(2 * LEDGERS) if number else LEDGERS,
        }

    def write(self, shape):
        text = self.render(shape)
        # Replaced by rename, because the file watcher must not read a partial file.
        with open(self.config + ".new", "w") as file:
            file.write(text)
        os.rename(self.config + ".new", self.config)

    def render(self, shape):
        options = self.options
        drain = int(2 * options.upgrades + 60) if options.upgrades else 30
        words = [
            f'[process]\npin = false\nengine = "{options.engine}"\ndrain_timeout = "{drain}s"\n'
            f'[admin]\nlisten = "unix:{self.admin}"\n[log]\nlevel = "warn"\n'
        ]
        for name in FRONTENDS:
            pool = "ledger" if name == "ledger" else "web"
            # The cap changes with each reload and is never reached.
            cap = 10_000 + shape["number"] if name == "short" else 0
            words.append(
                f'[frontend.{name}]\nbind = ["127.0.0.1:{self.ports[name]}"]\npool = "{pool}"\n'
                f'idle_timeout = "off"\nconnections_max = {cap}\n'
            )
        words.append('[pool.web.probe]\nkind = "tcp"\n')
        for number in range(ECHOES):
            if number != shape["out"]:
                words.append(backend("web", f"e{number}", self.echoes[number], shape["weights"][number]))
        if shape["guest"] is not None:
            address = self.echoes[ECHOES + shape["guest"]]
            words.append(backend("web", f"guest{shape['number']}", address, 1))
        # Ledger backends reset some streams on purpose.
        words.append('[pool.ledger]\nejection = "off"\n')
        for number, address in enumerate(self.ledgers):
            if number != shape["ledger_out"]:
                words.append(backend("ledger", f"l{number}", address, shape["weights"][ECHOES + number]))
        return "".join(words)


def backend(pool, name, address, weight):
    return (
        f'[[pool.{pool}.backend]]\nname = "{name}"\naddress = "{address}"\nweight = {weight}\n'
    )


def alive(pid):
    """Returns whether the process runs. A zombie does not run."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
