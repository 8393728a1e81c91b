"""One balancer under short connections, for scripts that compare two variants of it.

Used by scripts/proxy-header-cost and scripts/viewer-cost. The balancer has one thread on one CPU; load
and backends have another. It measures rates, and compares nothing.
"""

import json
import os
import statistics
import subprocess
import time

import candidates
import kernel

# Connections of the load at once.
CONNECTIONS = 32


class ShortSite:
    """Backends and a balancer. Owns its children."""

    def __init__(self, program, cpus):
        self.program, self.cpus, self.children = program, cpus, []
        # Nothing else listens below the range of local ports there.
        self.next_port = 21_000 + os.getpid() % 2_000 * 4

    def port(self):
        self.next_port += 1
        return self.next_port - 1

    def backend(self, *options, addresses=4):
        """Starts an echo server and returns its addresses. With four addresses, the balancer does
        not run out of local ports."""
        hosts = [f"127.0.{number // 250}.{number % 250 + 1}" for number in range(addresses)]
        listen = [part for host in hosts for part in ("--listen", f"{host}:0")]
        process = subprocess.Popen(
            [self.program, "backend", "--json", *listen, "echo", *options, "--cpu", str(self.cpus[1])],
            stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
        )
        self.children.append(process)
        return json.loads(process.stdout.readline())["listening"]

    def start(self, path, text, port):
        """Starts the balancer with this configuration, and waits until it accepts on the port."""
        with open(path, "w") as file:
            file.write(text)
        command = ["taskset", "-c", str(self.cpus[0]), self.program, "run", "--config", path]
        self.balancer = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self.children.append(self.balancer)
        deadline = time.monotonic() + 20
        while not candidates.connects(("127.0.0.1", port)):
            if self.balancer.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the balancer did not start")
            time.sleep(0.02)

    def stop(self):
        for child in reversed(self.children):
            candidates.end(child)

    def sample(self, port, seconds, *options):
        """Returns connections per second, and CPU seconds of the balancer per connection."""
        command = [
            self.program, "bench", "--json", "--to", f"127.0.0.1:{port}", "short",
            "--connections", str(CONNECTIONS), "--sources", "4", "--for", f"{seconds}s",
            "--cpu", str(self.cpus[1]), *options,
        ]
        pids = kernel.children(self.balancer.pid)
        before = kernel.cpu_seconds(pids)
        answer = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        spent = kernel.cpu_seconds(pids) - before
        report = json.loads(answer.stdout or "{}")
        if answer.returncode != 0 or report["errors_total"]:
            raise RuntimeError(f"port {port}: {answer.stderr} {report.get('errors')}")
        return report["requests_per_second"], spent / (report["requests"] + report["late"])


def compare(before, after):
    """Returns loss of rate and growth of CPU of a sample, in percent."""
    (rate, cpu), (other_rate, other_cpu) = before, after
    return (1 - other_rate / rate) * 100, (other_cpu / cpu - 1) * 100


def spread(values):
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})"


def two_cpus():
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        raise SystemExit("it needs two CPUs")
    return cpus


def program(given, root):
    """Returns the given binary, or builds one."""
    if not given:
        subprocess.run(["cargo", "build", "--release", "--quiet"], cwd=root, check=True)
    return given or os.path.join(root, "target/release/tidegate")
