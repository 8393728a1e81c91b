"""The soak: changes the configuration, takes samples, and checks them after each sample.

Called by scripts/soak, whose --help documents the options. The main thread starts all
processes and takes all samples. Another thread makes the changes.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time

import kernel
import report
import series
import soak_verdict
import soak_world

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def span(text):
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text)
    seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or seconds <= 0:
        raise argparse.ArgumentTypeError("expected a time above zero, for example 10s, 5m or 2h")
    return seconds


def arguments():
    parser = argparse.ArgumentParser(prog="scripts/soak", add_help=False)
    parser.add_argument("--duration", type=span, default=7200.0)
    parser.add_argument("--reload", type=span, default=5.0)
    parser.add_argument("--upgrades", type=span)
    parser.add_argument("--every", type=span, default=10.0)
    parser.add_argument("--warm-up", type=span)
    parser.add_argument("--load", type=float, default=1.0)
    parser.add_argument("--engine", choices=["auto", "io_uring", "epoll"], default="auto")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--foreign", type=float, default=0.10)
    parser.add_argument("--program", default=os.path.join(ROOT, "target/release/tidegate"))
    parser.add_argument("--out", default=os.path.join(ROOT, "target/soak"))
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not 0 < options.load <= 100:
        parser.error("--load must be above 0 and at most 100")
    if options.warm_up is None:
        options.warm_up = min(600.0, options.duration / 12)
    if options.seed is None:
        options.seed = int.from_bytes(os.urandom(3), "big")
    options.program, options.out = map(os.path.abspath, (options.program, options.out))
    return options


class Soak:
    def __init__(self, options, world):
        self.options, self.world = options, world
        self.stop = threading.Event()
        self.samples, self.began = [], time.monotonic()
        self.about = kernel.about()

    # --- changes ---

    def change(self):
        """Reloads and upgrades at fixed intervals until `stop` is set."""
        options = self.options
        next_reload = self.began + options.reload
        next_upgrade = self.began + options.upgrades if options.upgrades else float("inf")
        while not self.stop.wait(max(0.0, min(next_reload, next_upgrade) - time.monotonic())):
            try:
                if time.monotonic() >= next_upgrade:
                    self.world.upgrade()
                    next_upgrade += options.upgrades
                else:
                    self.world.reload()
                    next_reload += options.reload
            except (OSError, ValueError, KeyError) as error:
                self.world.broken.append(f"the admin API failed: {error!r}")
                next_reload = max(next_reload, time.monotonic()) + options.reload

    # --- samples ---

    def readings(self):
        busy, stolen = kernel.machine_seconds()
        times = os.times()
        return {
            "wall": time.monotonic(), "busy": busy, "stolen": stolen,
            "each": kernel.cpu_seconds_whole(self.world.processes()),
            "self": sum(times[:4]),
        }

    def sample(self, before, after):
        world, pid = self.world, self.world.pids[-1]
        memory, status = kernel.memory_bytes(pid), world.status()
        wall = after["wall"] - before["wall"]
        # For a process that has ended, the last part of its CPU time counts as foreign.
        spent = {one: seconds - before["each"].get(one, 0.0) for one, seconds in after["each"].items()}
        own = sum(spent.values()) + after["self"] - before["self"]
        busy = after["busy"] - before["busy"] + after["stolen"] - before["stolen"]
        window = {name: load.windows[-1] if load.windows else {} for name, load in world.loads.items()}
        latency = {name: one.get("latency_seconds", {}) for name, one in window.items()}
        return {
            "at": round(after["wall"] - self.began, 2), "pid": pid,
            "rss_mb": memory["VmRSS"] / 1e6, "rss_anon_mb": memory["RssAnon"] / 1e6,
            "fds": kernel.descriptors([pid]), "sessions": status["connections_active"],
            "generation": status["generation"], "table_serial": status["table_serial"],
            "p50": latency["steady"].get("p50"), "p99": latency["steady"].get("p99"),
            "max": latency["steady"].get("max"), "direct_p99": latency["direct"].get("p99"),
            "short_per_second": window["short"].get("opened_per_second"),
            "bulk_bytes_per_second": window["bulk"].get("bytes_in_per_second"),
            "streams": window["ledger"].get("streams"), "wrong": window["ledger"].get("wrong"),
            "errors": sum(sum(load.failures().values()) for load in world.loads.values()),
            "balancer_cores": sum(spent.get(one, 0.0) for one in world.pids) / wall,
            "our_cores": own / wall,
            "foreign": max(0.0, busy - own) / (wall * os.cpu_count()),
        }

    def run(self):
        options, world = self.options, self.world
        changes = threading.Thread(target=self.change, daemon=True)
        changes.start()
        seen, before, end = 0, self.readings(), self.began + options.duration
        while not self.stop.is_set() and time.monotonic() < end:
            # Samples follow the windows of latency, so that both cover the same time.
            patience = min(2 * options.every, end + 0.5 - time.monotonic())
            seen = world.loads["steady"].window_after(seen, max(0.1, patience))
            after = self.readings()
            if after["wall"] - before["wall"] < options.every / 2:
                continue
            if not soak_world.alive(world.pids[-1]):
                world.broken.append("the balancer exited")
                break
            self.samples.append(self.sample(before, after))
            before = after
            self.write(self.result(complete=False))
            world.revive_loads()
        self.stop.set()
        changes.join(60)
        return self.wind_up()

    def wind_up(self):
        """Ends the load and checks that all sessions end."""
        world = self.world
        world.stop_loads()
        ends = {}
        if soak_world.alive(world.pids[-1]):
            deadline = time.monotonic() + 10
            while (left := world.status()["connections_active"]) and time.monotonic() < deadline:
                time.sleep(0.1)
            if left:
                world.broken.append(f"{left} sessions are open although all clients have closed")
            found = re.findall(r"^(tidegate_(?:session_end|refused)_total\{.*\}) (\d+)$",
                               world.metrics(), re.MULTILINE)
            ends = {name: int(count) for name, count in found if int(count)}
        world.stop()
        result = self.result(complete=True)
        result["session_ends"] = ends
        self.write(result)
        return result

    # --- results ---

    def result(self, complete):
        world = self.world
        result = {
            "machine": self.about, "options": vars(self.options), "complete": complete,
            "seconds": time.monotonic() - self.began,
            "reloads": world.reloads, "upgrades": world.upgrades, "broken": world.broken,
            "errors": {name: load.failures() for name, load in world.loads.items()},
            "done": {name: load.done() for name, load in world.loads.items()},
            "samples": self.samples,
        }
        result["verdict"] = soak_verdict.judge(result) if self.samples else []
        return result

    def write(self, result):
        os.makedirs(self.options.out, exist_ok=True)
        report.write_json(os.path.join(self.options.out, "soak.json"), result)
        if not self.samples:
            return
        path = os.path.join(self.options.out, "soak.svg")
        with open(path + ".new", "w") as file:
            file.write(chart(result))
        os.rename(path + ".new", path)


def chart(result):
    def line(key, scale=1.0):
        return [[one["at"] / 60, one[key] * scale] for one in result["samples"] if one[key] is not None]

    def panel(title, unit, lines):
        lines = {name: points for name, points in lines.items() if points}
        return {"title": title, "x": "minutes", "y": unit, "lines": lines}

    panels = [
        panel("memory of the balancer", "MB", {"RSS": line("rss_mb"), "anonymous": line("rss_anon_mb")}),
        panel("open", "", {"descriptors": line("fds"), "sessions": line("sessions")}),
        panel("latency through the balancer", "us", {
            "p50": line("p50", 1e6), "p99": line("p99", 1e6), "p99 direct": line("direct_p99", 1e6)}),
        panel("CPU", "cores", {
            "balancer": line("balancer_cores"), "with the load": line("our_cores"),
            "others": line("foreign", os.cpu_count())}),
        panel("changes and losses", "", {"generation": line("generation"), "errors": line("errors")}),
    ]
    about = result["machine"]
    heading = (
        f"{about['cpu']}, {about['cores']} CPUs; Linux {about['kernel']}; commit {about['commit']}; "
        f"{result['seconds'] / 60:.0f} minutes, {result['reloads']} reloads, {result['upgrades']} upgrades"
    )
    return series.chart([one for one in panels if one["lines"]], heading, "Tidegate over time")


def main():
    options = arguments()
    if options.check:
        return 0
    soak_world.adopt_orphans()
    # Paths of Unix sockets are short (unix(7)), so it is not under the source tree.
    directory = tempfile.mkdtemp(prefix="soak-")
    world = soak_world.World(options, directory)
    print(f"seed {options.seed}; samples go to {options.out}", flush=True)
    try:
        world.start()
        soak = Soak(options, world)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: soak.stop.set())
        result = soak.run()
    except BaseException:
        world.stop()
        raise
    finally:
        os.makedirs(options.out, exist_ok=True)
        shutil.copy(world.log.name, os.path.join(options.out, "soak.log"))
        shutil.rmtree(directory, ignore_errors=True)
    print(f"{result['seconds']:.0f} s, {len(result['samples'])} samples")
    print("\n".join(soak_verdict.lines(result["verdict"])))
    print(f"written: {options.out}/soak.json, {options.out}/soak.svg", flush=True)
    held = [one["held"] for one in result["verdict"]]
    return 0 if held and False not in held else 1


if __name__ == "__main__":
    sys.exit(main())
