"""Figures of the kernel about processes and the host.

Used by the measurements. Reads /proc. It never starts or ends a measured process.
"""

import glob
import os
import subprocess

TICK = 1.0 / os.sysconf("SC_CLK_TCK")


def children(pid):
    """Returns the process and all its descendants."""
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
    """Returns the CPU time of all living threads of these processes, in seconds."""
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
    """Returns the CPU time of each process by pid, in seconds, including threads that have
    ended. The resolution is one clock tick."""
    found = {}
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat") as file:
                # The first word after the name is field 3 (proc(5)). The name can hold any
                # character.
                words = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        found[pid] = (int(words[11]) + int(words[12])) * TICK
    return found


def memory_bytes(pid):
    """Returns {"VmRSS": ..., "RssAnon": ...} of a process, in bytes."""
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
    """Returns the CPU seconds of this host: (busy, stolen by the hypervisor)."""
    with open("/proc/stat") as file:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(
            int, file.readline().split()[1:9]
        )
    return (user + nice + system + irq + softirq) * TICK, steal * TICK


def about():
    """Returns facts about the host for the head of the table."""

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
