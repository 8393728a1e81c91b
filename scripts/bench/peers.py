"""Compares Tidegate with other balancers.

Called by scripts/bench-peers, which documents the arguments and installs missing programs.
"""

import argparse
import os
import shutil
import sys
import tempfile

# No bytecode files in the source tree.
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import candidates  # noqa: E402
import kernel  # noqa: E402
import measure  # noqa: E402
import report  # noqa: E402
import series  # noqa: E402
import syscalls  # noqa: E402
import tables  # noqa: E402
import workloads  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

TITLES = {
    "pinned": "pinned: balancer 1 thread on one CPU, load and backends on another",
    "free": "free: balancer 2 threads, nothing pinned",
}


def arguments():
    parser = argparse.ArgumentParser(prog="scripts/bench-peers", add_help=False)
    parser.add_argument("--rounds", type=positive(int))
    parser.add_argument("--seconds", type=positive(float))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", type=words, default=[])
    parser.add_argument("--candidates", type=words, default=[])
    parser.add_argument("--setup", choices=["pinned", "free", "both"], default="both")
    parser.add_argument("--syscalls", action="store_true")
    parser.add_argument("--series", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.seconds = options.seconds or (0.6 if options.quick else 1.5)
    options.repeats = 1 if options.quick else 4
    options.workloads = [
        one for one in workloads.ALL
        if not options.only or any(word in one.name for word in options.only)
    ]
    if not options.workloads:
        parser.error(f"no workload matches; there are {', '.join(w.name for w in workloads.ALL)}")
    unknown = set(options.candidates) - {one.name for one in candidates.ALL}
    if unknown:
        parser.error(f"no candidate {', '.join(unknown)}; "
                     f"there are {', '.join(one.name for one in candidates.ALL)}")
    return options


def positive(kind):
    def read(text):
        value = kind(text)
        if value <= 0:
            raise ValueError
        return value

    read.__name__ = f"positive {kind.__name__}"
    return read


def words(text):
    return [word for word in text.split(",") if word]


def chosen(options):
    there = candidates.available(ROOT)
    for one in candidates.ALL:
        if one not in there:
            print(f"{one.name}: not installed, skipped", file=sys.stderr)
    if candidates.HAProxy not in there:
        sys.exit("scripts/bench-peers: haproxy is the reference of all ratios and is not installed")
    wanted = options.candidates
    return [o for o in there if not wanted or o.name in wanted or o is candidates.HAProxy]


def run_setup(name, options, makes, directory, cpus):
    setup = measure.Setup(name, options, ROOT, directory, cpus)
    found = {"name": name, "title": TITLES[name], "workloads": [], "idle": {}, "rounds": {}}
    try:
        setup.start(makes)
        for workload in options.workloads:
            if name not in workload.setups or workload.family == "idle":
                continue
            rounds = setup.run(workload)
            found["rounds"][workload.name] = rounds
            found["workloads"].append(report.analyse(workload, rounds))
        idle = any(one.family == "idle" and name in one.setups for one in options.workloads)
        if idle:
            for make in makes:
                if make is candidates.Direct or make.only or make.name in setup.broken:
                    continue
                memory = setup.idle(make)
                if memory is not None:
                    found["idle"][make.name] = memory
        found["left_out"] = setup.broken
        return found
    finally:
        setup.stop()


def count_syscalls(options, makes, directory, cpus):
    """Prints the system calls of a short connection for each balancer."""
    setup = measure.Setup("pinned", options, ROOT, directory, cpus)
    workload = next(one for one in workloads.ALL if one.family == "short")
    try:
        setup.start(makes)
        found = syscalls.measure(setup, workload)
    finally:
        setup.stop()
    print(f"{syscalls.heading()}; counted with {found['counted_with']}; {workload.title}\n")
    print(syscalls.table(found))
    return 0


def run_series(options, directory, cpus):
    """Measures how costs grow. Prints a table and writes a chart."""
    found = series.measured(options, ROOT, directory, cpus)
    print(series.table(found))
    place = os.path.join(ROOT, "target/bench-peers")
    os.makedirs(place, exist_ok=True)
    report.write_json(os.path.join(place, "series.json"), {"machine": kernel.about(), "series": found})
    with open(os.path.join(place, "series.svg"), "w") as file:
        file.write(series.chart(found, syscalls.heading()))
    print("written: target/bench-peers/series.json, target/bench-peers/series.svg")
    return 0


def main():
    options = arguments()
    if options.check:
        return 0
    measure.stop_on_signals()
    cpus = sorted(os.sched_getaffinity(0))
    if options.syscalls or options.series:
        if len(cpus) < 2:
            sys.exit("scripts/bench-peers: --syscalls and --series need two CPUs")
        directory = tempfile.mkdtemp(prefix="bench-peers-")
        try:
            if options.series:
                return run_series(options, directory, cpus)
            return count_syscalls(options, chosen(options), directory, cpus)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    makes = chosen(options)
    names = ["pinned", "free"] if options.setup == "both" else [options.setup]
    if len(cpus) < 2 and "pinned" in names:
        print("only one CPU: skipping the pinned set-up", file=sys.stderr)
        names = ["free"]
    # Paths of Unix sockets are short (unix(7)), so it is not under the source tree.
    directory = tempfile.mkdtemp(prefix="bench-peers-")
    try:
        versions = {o.name: o(ROOT, directory, {}, 0, 1, None).version() for o in makes}
        results = {
            "machine": kernel.about(), "versions": versions,
            "rounds": options.rounds, "seconds": options.seconds, "setups": [],
        }
        # A set-up without a chosen workload is not started.
        names = [n for n in names if any(n in one.setups for one in options.workloads)]
        for name in names:
            results["setups"].append(run_setup(name, options, makes, directory, cpus))
    except KeyboardInterrupt:
        return 130
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(report.table(results))
    place = os.path.join(ROOT, "target/bench-peers")
    os.makedirs(place, exist_ok=True)
    report.write_json(os.path.join(place, "results.json"), results)
    with open(os.path.join(place, "chart.svg"), "w") as file:
        file.write(report.chart(results))
    with open(os.path.join(place, "tables.md"), "w") as file:
        file.write(tables.of(results))
    print("\nwritten: results.json, chart.svg and tables.md in target/bench-peers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
