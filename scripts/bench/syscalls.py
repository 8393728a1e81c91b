"""Counts the system calls of each balancer per short connection.

Called by `peers` for --syscalls. It counts with perf if perf may use the tracepoints of
the kernel, else with strace. strace stops the balancer at every call, so that the balancer
handles more work per wake-up. This module never measures time.
"""

import json
import os
import re
import signal
import subprocess
import tempfile
import time

import candidates
import kernel

# Calls that are counted by name. The rest is counted as "others".
NAMES = [
    "accept4", "socket", "connect", "bind", "setsockopt", "getsockopt", "getsockname",
    "getpeername", "epoll_ctl", "epoll_wait", "epoll_pwait", "epoll_pwait2", "io_uring_enter",
    "recvfrom", "recvmsg", "read", "readv", "sendto", "sendmsg", "write", "writev", "splice",
    "ioctl", "fcntl", "shutdown", "close", "timerfd_settime", "clock_gettime", "futex",
]

# Operations of an io_uring. They are not system calls, but they cost work.
OPERATIONS = "io_uring:io_uring_submit_req"

SECONDS = 2.0


def by_perf():
    """Returns whether perf may count system calls."""
    try:
        return subprocess.run(
            ["perf", "stat", "-x,", "-e", "raw_syscalls:sys_enter", "true"], capture_output=True
        ).returncode == 0
    except OSError:
        return False


def threads(one):
    found = []
    for pid in one.pids():
        found += os.listdir(f"/proc/{pid}/task")
    return ",".join(found)


def counted(setup, one, workload, perf):
    """Runs the workload. Returns {name: calls per connection}."""
    output = tempfile.NamedTemporaryFile(prefix="syscalls-", dir=setup.directory, delete=False).name
    if perf:
        events = ["raw_syscalls:sys_enter"] + [f"syscalls:sys_enter_{name}" for name in NAMES]
        events += [OPERATIONS]
        watch = ["perf", "stat", "-x,", "-o", output, "-t", threads(one), "-e", ",".join(events)]
    else:
        targets = [word for pid in one.pids() for word in ("-p", str(pid))]
        watch = ["strace", "-f", "-c", "-o", output, *targets]
    watcher = subprocess.Popen(watch, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    # Before and after the load, the balancer makes only a few calls.
    time.sleep(0.5)
    try:
        host, port = one.address(workload.kind)
        answer = subprocess.run(
            [setup.program, "bench", "--json", "--to", f"{host}:{port}", "--for", f"{SECONDS}s",
             *workload.arguments, *setup.load_cpu],
            capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )
    finally:
        watcher.send_signal(signal.SIGINT)
        watcher.wait()
    if answer.returncode != 0:
        raise RuntimeError(f"{one.name}: {answer.stderr.strip()}")
    _, connections = workload.done(json.loads(answer.stdout))
    with open(output) as file:
        calls = (of_perf if perf else of_strace)(file.read())
    return {name: count / connections for name, count in calls.items() if count}


def of_perf(text):
    found, total = {}, 0
    for line in text.splitlines():
        fields = line.split(",")
        if len(fields) < 3 or not fields[0].isdigit():
            continue
        if fields[2] == "raw_syscalls:sys_enter":
            total = int(fields[0])
        elif fields[2] == OPERATIONS:
            found["(ring operations)"] = int(fields[0])
        else:
            found[fields[2].removeprefix("syscalls:sys_enter_")] = int(fields[0])
    listed = sum(count for name, count in found.items() if not name.startswith("("))
    return {**found, "others": total - listed, "total": total}


def of_strace(text):
    found = {}
    for line in text.splitlines():
        # % time, seconds, usecs/call, calls, [errors,] name
        match = re.match(r"\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", line)
        if match:
            found[match.group(2)] = int(match.group(1))
    found.setdefault("total", sum(found.values()))
    return found


def measure(setup, workload):
    """Returns {candidate: {name: calls per connection}} and the counting program."""
    perf = by_perf()
    found = {}
    for one in setup.balancers:
        if not isinstance(one, candidates.Direct) and one.only is None:
            found[one.name] = counted(setup, one, workload, perf)
    return {"counted_with": "perf" if perf else "strace", "calls": found}


def table(found):
    """Formats the counts as Markdown, the most frequent calls first."""
    calls = found["calls"]
    names = sorted(
        {name for one in calls.values() for name, count in one.items() if count >= 0.005},
        key=lambda name: (name in ("others", "total"), name == "total", name.startswith("("),
                          -max(one.get(name, 0) for one in calls.values())),
    )
    lines = ["| per connection | " + " | ".join(calls) + " |", "|---|" + "---:|" * len(calls)]
    for name in names:
        cells = [f"{one[name]:.2f}" if one.get(name) else "" for one in calls.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def heading():
    about = kernel.about()
    return f"Linux {about['kernel']}, {about['cores']} CPUs, commit {about['commit']}"
