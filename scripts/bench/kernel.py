"""What the kernel says about processes and the machine.

Used by the measurements. Reads /proc alone; starts and ends nothing.
"""

import glob
import os
import subprocess

TICK = 1.0 / os.sysconf("SC_CLK_TCK")


def children(pid):
    """The process and everything below it."""
    found = [pid]
    for path in glob.glob(f"/proc/{pid}/task/*/children"):
        try:
            with open(path) as file:
                below = [int(word) for word in file.read().split()]
        except OSError:
            continue
        for child in below:
            found += children(child)
    return found


def cpu_seconds(pids):
    """CPU time of all threads of these processes so far."""
    total = 0
    for pid in pids:
        for path in glob.glob(f"/proc/{pid}/task/*/schedstat"):
            try:
                with open(path) as file:
                    total += int(file.read().split()[0])
            except OSError:
                continue
    return total / 1e9


def resident_bytes(pids):
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/statm") as file:
                total += int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue
    return total


def cpu_seconds_whole(pids):
    """CPU time of each of these processes so far, by pid, with their threads that
    have ended; exact to a tick."""
    found = {}
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat") as file:
                # After the name, which may hold anything, field 3 (proc(5)).
                words = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        found[pid] = (int(words[11]) + int(words[12])) * TICK
    return found


def memory_bytes(pid):
    """What /proc says of its memory: {"VmRSS": ..., "RssAnon": ...}, in bytes."""
    with open(f"/proc/{pid}/status") as file:
        words = [line.split() for line in file if line.startswith(("VmRSS:", "RssAnon:"))]
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, _ in words}


def descriptors(pids):
    total = 0
    for pid in pids:
        try:
            total += len(os.listdir(f"/proc/{pid}/fd"))
        except OSError:
            continue
    return total


def machine_seconds():
    """CPU seconds of the whole machine so far: (busy, stolen by the host)."""
    with open("/proc/stat") as file:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(
            int, file.readline().split()[1:9]
        )
    return (user + nice + system + irq + softirq) * TICK, steal * TICK


def about():
    """The machine, for the head of the table."""

    def first(path, prefix=""):
        try:
            with open(path) as file:
                for line in file:
                    if line.startswith(prefix):
                        return line.split(":", 1)[-1].strip() if prefix else line.strip()
        except OSError:
            pass
        return "unknown"

    def run(*command):
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return "unknown"
        return answer.stdout.strip() or answer.stderr.strip()

    commit = run("git", "rev-parse", "--short=12", "HEAD")
    if run("git", "status", "--porcelain", "--untracked-files=no") not in ("", "unknown"):
        commit += " with changes"
    return {
        "cpu": first("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": os.uname().release,
        "congestion_control": first("/proc/sys/net/ipv4/tcp_congestion_control"),
        "commit": commit,
    }
