"""What a soak runs: the balancer, its changing configuration, and the load.

Owns its children and ends each by its process id. Measures and judges nothing.
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

# Backends that stay, and addresses of those that come and go under new names.
ECHOES, GUESTS, LEDGERS = 4, 3, 3

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LIBC = ctypes.CDLL(None)


def adopt_orphans():
    """What an old balancer leaves behind becomes this process's to wait for."""
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def started(command, **more):
    """A child out of reach of the terminal's signals; it does not outlive us."""
    def apart():
        os.setsid()
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    return subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=apart, **more)


class Load:
    """A generator that prints a line of JSON for each window and one at its end.
    Where it ends by itself, it is started again."""

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
        # Reads alone: whoever starts processes must be the main thread.
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
        # A ledger's lines count from its beginning, a bench's each for itself,
        # the last one of either the whole.
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
        """Streams, answers or connections, of all runs so far."""
        with self.changed:
            return self.before + self.units

    def failures(self):
        """Errors by kind, of all runs so far."""
        with self.changed:
            sums = dict(self.errors)
            for kind, count in self.counted.items():
                sums[kind] = sums.get(kind, 0) + count
            return sums

    def revive(self):
        """Starts it again if it has ended."""
        if self.process.poll() is None or self.stopping:
            return
        self.close_books()
        self.start()

    def close_books(self):
        self.reader.join(5)
        self.errors, self.counted = self.failures(), {}
        self.before, self.units = self.done(), 0
        # 3 also where a ledger found faults, which the counts tell. One that was
        # ended before it could begin, or had hardly begun (3: it measured nothing,
        # whatever it had opened), has nothing to say; what all runs did together is
        # judged beside this.
        early = self.stopping and self.process.returncode in (-signal.SIGTERM, 3)
        if self.process.returncode != 0 and not self.errors and not early:
            self.broken = f"{self.name} ended with {self.process.returncode}"

    def window_after(self, seen, patience):
        """Waits for more than `seen` windows; gives how many there are."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.windows) > seen or self.stopping, patience)
            return len(self.windows)

    def stop(self):
        self.stopping = True
        if self.process.poll() is None:
            self.process.terminate()
        try:
            # A ledger waits for what is under way.
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
        # The supervisor's, which holds no sessions and is not measured.
        self.pids = kernel.children(self.balancer.pid)[1:]
        self.generation = self.status()["generation"]
        self.start_loads()

    def await_ready(self):
        deadline = time.monotonic() + 20
        while not (os.path.exists(self.admin) and series.measure_ready(self.admin)):
            if self.balancer.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the balancer did not come up:\n{self.last_lines()}")
            time.sleep(0.05)

    def start_loads(self):
        """Open loop wherever there is a rate. With upgrades, sessions end before
        the process they are in must."""
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
        # What the machine alone does to the same messages.
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
        """Ends the balancer in order, and whatever else is left."""
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

    # --- what is asked of the balancer ---

    def status(self):
        return json.loads(series.ask(self.admin, "GET", "/v1/status").body)

    def metrics(self):
        return series.ask(self.admin, "GET", "/metrics").body.decode()

    def processes(self):
        ours = [load.process.pid for load in self.loads.values()]
        return ours + self.pids + [self.echo.pid]

    def reload(self):
        self.write(self.shape(self.reloads + 1))
        answer = series.ask(self.admin, "POST", "/v1/reload")
        self.reloads += 1
        if answer.status != 200:
            self.broken.append(f"reload {self.reloads} was refused: {answer.body.decode()[:500]}")
            return
        # The file watcher may have been first; then nothing is new, but in force.
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
        """Another one each time: weights, who is there, a frontend's cap."""
        draw = self.random
        weights = [draw.randrange(1, 11) for _ in range(ECHOES + LEDGERS)]
        out = draw.randrange(2 * ECHOES) if number else ECHOES
        # A guest has a name nobody had before.
        guest = draw.randrange(GUESTS) if number % 2 else None
        return {
            "number": number, "weights": weights, "out": out, "guest": guest,
            "ledger_out": draw.randrange(2 * LEDGERS) if number else LEDGERS,
        }

    def write(self, shape):
        text = self.render(shape)
        # Whole at once: the file is watched as well.
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
            # Caps that change and that nobody reaches.
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
        # Some ledger streams end in a reset by their backend, on purpose.
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
    """Whether it runs; one that has ended is reaped where it is ours."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
