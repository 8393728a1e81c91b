"""The figures of member discovery: measures them, prints them, compares them with goals.

Called by scripts/discovery-figures, whose --help documents the options.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback

import discovery_latency
import discovery_scale
import discovery_world as world
import measure
from report import columns

FIGURES = {
    **{name: (lambda bench, name=name: discovery_latency.measure(bench, name))
       for name in discovery_latency.SITES},
    **discovery_scale.FIGURES,
}


class Bench:
    """What the figures need: options, a directory, and the rows of the result."""

    def __init__(self, options, directory):
        self.options, self.directory = options, directory
        self.program, self.examples = options.program, options.examples
        self.trials, self.scale = options.trials, options.scale
        self.rows, self.began = [], time.monotonic()

    def balancer(self, name, text):
        return world.Balancer(self.program, self.directory, name, text)

    def progress(self, text):
        measure.progress(text)

    def say(self, text):
        took = time.monotonic() - self.began
        measure.progress("")
        print(f"{took:6.1f} s  {text}", file=sys.stderr, flush=True)

    # --- rows ---

    def times(self, title, millis, goal):
        """Adds times in milliseconds. The goal is about their 99th percentile."""
        at = sorted(millis)
        p50, p99 = at[len(at) // 2], at[max(0, math.ceil(len(at) * 0.99) - 1)]
        self.row(title, p50, p99, at[-1], "ms", goal, p99 <= goal)

    def most(self, title, value, unit, goal, note=""):
        """Adds a value that is at most the goal; None is no goal."""
        self.row(title, None, None, value, unit, goal, goal is None or value <= goal, note)

    def count(self, title, value, goal, note=""):
        self.most(title, value, "", goal, note)

    def row(self, title, p50, p99, top, unit, goal, met, note=""):
        self.rows.append({"title": title, "p50": p50, "p99": p99, "max": top, "unit": unit,
                          "goal": goal, "met": met, "note": note})
        said = [f"{label} {shown(value)}" for label, value in
                (("p50", p50), ("p99", p99), ("max" if p50 is not None else "", top))
                if value is not None]
        goal = "" if goal is None else f"; goal {shown(goal)}{'' if met else ', MISSED'}"
        self.say(f"{title}: {' '.join(said).strip()} {unit}{goal} {note}".rstrip())

    def table(self):
        lines = [["figure", "p50", "p99", "max or value", "unit", "goal", "met"]]
        for row in self.rows:
            goal = [] if row["goal"] is None else [shown(row["goal"]), "yes" if row["met"] else "NO"]
            lines.append([row["title"], shown(row["p50"]), shown(row["p99"]), shown(row["max"]),
                          row["unit"], *(goal or ["", ""])])
        return "\n".join(columns(lines))


def shown(value):
    if value is None:
        return ""
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def arguments():
    release = os.path.join(world.ROOT, "target/release")
    parser = argparse.ArgumentParser(prog="scripts/discovery-figures", add_help=False)
    parser.add_argument("--only", default="")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--json")
    parser.add_argument("--no-goals", action="store_true")
    parser.add_argument("--program", default=os.path.join(release, "tidegate"))
    parser.add_argument("--examples", default=os.path.join(release, "examples"))
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.names = [name for name in options.only.split(",") if name] or list(FIGURES)
    unknown = [name for name in options.names if name not in FIGURES]
    if unknown:
        parser.error(f"unknown figure {unknown[0]}; there are {', '.join(FIGURES)}")
    if options.trials < 1 or not 0 < options.scale <= 1:
        parser.error("--trials must be at least 1, and --scale above 0 and at most 1")
    return options


def missing_programs(names):
    needed = {"etcd": {"etcd", "entries", "storm", "storm-large", "idle"}, "java": {"zookeeper"},
              "dnsmasq": {"dns", "idle"}}
    found = [program for program, figures in needed.items()
             if figures & set(names) and not world.candidates.find(program)]
    if "zookeeper" in names and not os.path.exists(f"{world.CLASSES}/zookeeper.jar"):
        found.append("zookeeper")
    return found


def main():
    options = arguments()
    if options.check:
        return 0
    missing = missing_programs(options.names)
    if missing:
        print(f"scripts/discovery-figures: missing: {', '.join(missing)}", file=sys.stderr)
        return 2
    measure.stop_on_signals()
    broken = []
    with tempfile.TemporaryDirectory(prefix="tidegate-figures-") as directory:
        bench = Bench(options, directory)
        for name in options.names:
            try:
                FIGURES[name](bench)
            except (RuntimeError, OSError, KeyError, ValueError) as error:
                broken.append(name)
                bench.say(f"{name} FAILED: {error}")
                traceback.print_exc()
    print(bench.table())
    if options.json:
        version = subprocess.run([options.program, "--version"], capture_output=True, text=True)
        with open(options.json, "w") as file:
            json.dump({"version": version.stdout.strip(), "broken": broken, "rows": bench.rows},
                      file, indent=1)
    missed = [row["title"] for row in bench.rows if not row["met"]]
    if broken:
        print(f"not measured: {', '.join(broken)}")
    if missed:
        print(f"goals missed: {len(missed)}")
    return 1 if broken or (missed and not options.no_goals) else 0


if __name__ == "__main__":
    sys.exit(main())
