"""The compared workloads, one per row of the table.

Used by `measure` and `peers`. A workload has the kind of its backend, the arguments of the
load generator, and the unit of its results. Plain data: it never starts a process.
"""


class Workload:
    def __init__(self, name, family, kind, arguments, unit, title, setups=("pinned", "free")):
        self.name, self.family, self.kind = name, family, kind
        self.arguments, self.unit, self.title = arguments, unit, title
        self.setups = setups

    def done(self, report):
        """Returns (units within the measured time, all units that the balancer handled)."""
        if self.unit == "GiB":
            key = "bytes_out" if self.family == "upload" else "bytes_in"
            return report[key] / 2**30, report[key] / 2**30
        return report["requests"], report["requests"] + report["late"]


# Sessions of the memory row, or as many as the descriptor limit allows.
IDLE = 9_000


def ping_pong(connections):
    return Workload(
        f"ping-pong-{connections}", "ping-pong", "echo",
        ["ping-pong", "--size", "64", "--connections", str(connections)],
        "request", f"ping-pong 64 B, {connections} connection{'s' * (connections > 1)}",
    )


ALL = [
    ping_pong(1),
    ping_pong(32),
    ping_pong(512),
    Workload(
        "short-32", "short", "echo",
        ["short", "--size", "64", "--connections", "32", "--sources", "4"],
        "connection", "short connections, 32 at once",
    ),
    Workload(
        "download", "download", "source", ["download", "--connections", "8"],
        "GiB", "download, 8 streams, 128 KiB writes",
    ),
    Workload(
        "download-512B", "download", "trickle", ["download", "--connections", "8"],
        "GiB", "download, 8 streams, 512 B writes",
    ),
    Workload(
        "upload", "upload", "sink", ["upload", "--connections", "1", "--size", "128KiB"],
        "GiB", "upload, 1 stream, 128 KiB writes",
    ),
    Workload(
        "open-loop", "open-loop", "echo",
        ["open-loop", "--rate", "20000", "--size", "64", "--connections", "64"],
        "request", "open loop, 20,000 messages/s, 64 connections",
    ),
    Workload(
        "idle", "idle", "echo", ["idle", "--size", "64"],
        "session", f"idle sessions, {IDLE:,}", setups=("pinned",),
    ),
]
