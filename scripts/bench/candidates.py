"""The compared balancers: equal configurations, start and stop.

Used by `measure`. Each balancer listens on one loopback port per kind of backend and
distributes connections round robin among the addresses of that kind. All have the same
number of threads, TCP_NODELAY, half-close, no logging and an idle timeout of 10 minutes.
This module never measures.
"""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import kernel

# Kinds of backends, in the order of their ports.
KINDS = ["echo", "source", "trickle", "sink"]

HARD_LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

# Most sessions of a balancer: two descriptors each, and 500 for other purposes.
SESSIONS_MAX = (min(HARD_LIMIT, 200_000) - 500) // 2


def find(program):
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


class Candidate:
    """A balancer in a set-up."""

    name = ""
    # The workload families that it runs. None: all.
    only = None

    def __init__(self, root, directory, backends, base_port, threads, cpu):
        self.root, self.threads, self.cpu = root, threads, cpu
        self.backends = backends
        # A new directory each time, because two of one kind can run at the same time.
        self.directory = tempfile.mkdtemp(prefix=f"{self.name}-", dir=directory)
        self.ports = {kind: base_port + at for at, kind in enumerate(KINDS)}
        self.process = None

    def command(self):
        raise NotImplementedError

    def version(self):
        raise NotImplementedError

    def write(self, name, text):
        path = os.path.join(self.directory, name)
        with open(path, "w") as file:
            file.write(text)
        return path

    def address(self, kind):
        return ("127.0.0.1", self.ports[kind])

    def start(self):
        command = self.command()
        if self.cpu is not None:
            command = ["taskset", "-c", str(self.cpu)] + command
        with open(os.path.join(self.directory, "log"), "ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.directory
            )
        deadline = time.monotonic() + 20
        for kind in KINDS:
            while not connects(self.address(kind)):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{self.name} did not start:\n{self.log()}")
                time.sleep(0.02)

    def log(self):
        """Returns the end of its output, or "" if it was not started."""
        try:
            with open(os.path.join(self.directory, "log"), errors="replace") as file:
                return file.read()[-2000:]
        except OSError:
            return ""

    def pids(self):
        return kernel.children(self.process.pid) if self.process else []

    def stop(self):
        if self.process is None:
            return
        below = self.pids()
        end(self.process)
        # If the parent was killed, its workers may still run.
        for pid in below[1:]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process = None


def end(process):
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def connects(address):
    try:
        socket.create_connection(address, 1).close()
        return True
    except OSError:
        return False


class HAProxy(Candidate):
    name = "haproxy"
    limits = f"  maxconn {SESSIONS_MAX}\n"
    options = ""

    def command(self):
        text = (
            f"global\n  nbthread {self.threads}\n{self.limits}"
            "defaults\n  mode tcp\n  balance roundrobin\n  timeout connect 5s\n"
            f"  timeout client 10m\n  timeout server 10m\n  backlog 4096\n{self.options}"
        )
        for kind in KINDS:
            text += f"listen {kind}\n  bind 127.0.0.1:{self.ports[kind]}\n"
            for number, (host, port) in enumerate(self.backends[kind]):
                text += f"  server s{number} {host}:{port}\n"
        return [find("haproxy"), "-db", "-f", self.write("haproxy.cfg", text)]

    def version(self):
        out = subprocess.run([find("haproxy"), "-v"], capture_output=True, text=True).stdout
        return out.split()[2] if out else "unknown"


class HAProxySplice(HAProxy):
    name = "haproxy-splice"
    # HAProxy reserves descriptors for pipes. The workloads have few streams.
    limits = "  maxconn 1000\n  maxpipes 500\n"
    options = "  option splice-auto\n"
    only = ("download", "upload")


class Nginx(Candidate):
    name = "nginx"

    def command(self):
        module = "/usr/lib/nginx/modules/ngx_stream_module.so"
        text = f"load_module {module};\n" if os.path.exists(module) else ""
        if os.getuid() == 0:
            text += "user root;\n"
        text += (
            f"daemon off;\nworker_processes {self.threads};\npid {self.directory}/pid;\n"
            f"worker_rlimit_nofile {HARD_LIMIT};\nerror_log stderr crit;\n"
            f"events {{ worker_connections {2 * SESSIONS_MAX}; }}\n"
            "stream {\n  access_log off;\n  tcp_nodelay on;\n  proxy_half_close on;\n"
            "  proxy_timeout 10m;\n  proxy_connect_timeout 5s;\n"
        )
        for kind in KINDS:
            servers = " ".join(f"server {host}:{port};" for host, port in self.backends[kind])
            port = self.ports[kind]
            text += (
                f"  upstream {kind} {{ {servers} }}\n"
                f"  server {{ listen 127.0.0.1:{port} reuseport backlog=4096; proxy_pass {kind}; }}\n"
            )
        path = self.write("nginx.conf", text + "}\n")
        return [find("nginx"), "-e", "stderr", "-p", self.directory, "-c", path]

    def version(self):
        out = subprocess.run([find("nginx"), "-v"], capture_output=True, text=True).stderr
        return out.strip().rsplit("/", 1)[-1]


class Envoy(Candidate):
    name = "envoy"

    def binary(self):
        return os.path.join(self.root, "target/peers/envoy")

    def command(self):
        listeners, clusters = [], []
        for kind in KINDS:
            endpoints = [
                {"endpoint": {"address": socket_address(host, port)}}
                for host, port in self.backends[kind]
            ]
            proxy = {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                "stat_prefix": kind,
                "cluster": kind,
                "idle_timeout": "600s",
            }
            listeners.append({
                "name": kind,
                "address": socket_address("127.0.0.1", self.ports[kind]),
                "tcp_backlog_size": 4096,
                "filter_chains": [
                    {"filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": proxy}]}
                ],
            })
            # By default, Envoy rejects connections above 1024.
            many = {"thresholds": [{"max_connections": 1_000_000, "max_pending_requests": 1_000_000}]}
            clusters.append({
                "name": kind,
                "type": "STATIC",
                "lb_policy": "ROUND_ROBIN",
                "connect_timeout": "5s",
                "circuit_breakers": many,
                "load_assignment": {"cluster_name": kind, "endpoints": [{"lb_endpoints": endpoints}]},
            })
        text = json.dumps({"static_resources": {"listeners": listeners, "clusters": clusters}}, indent=1)
        return [
            self.binary(), "-c", self.write("envoy.json", text), "--concurrency", str(self.threads),
            "--disable-hot-restart", "--log-level", "error",
        ]

    def version(self):
        out = subprocess.run([self.binary(), "--version"], capture_output=True, text=True).stdout
        # PATH  version: COMMIT/1.40.0/Clean/RELEASE/BoringSSL
        parts = out.strip().rpartition("version: ")[2].split("/")
        return parts[1] if len(parts) > 1 else "unknown"


def socket_address(host, port):
    return {"socket_address": {"address": host, "port_value": port}}


class Tidegate(Candidate):
    engine = ""
    # Further keys of [process].
    keys = ""

    def binary(self):
        return os.path.join(self.root, "target/release/tidegate")

    def command(self):
        text = (
            f'[process]\nworkers = {self.threads}\nengine = "{self.engine}"\npin = false\n{self.keys}'
            f'[admin]\nlisten = "unix:{self.directory}/admin.sock"\n[log]\nlevel = "error"\n'
        )
        for kind in KINDS:
            text += f'[frontend.{kind}]\nbind = ["127.0.0.1:{self.ports[kind]}"]\npool = "{kind}"\n'
            for host, port in self.backends[kind]:
                text += f'[[pool.{kind}.backend]]\naddress = "{host}:{port}"\n'
        return [self.binary(), "run", "--config", self.write("tidegate.toml", text)]

    def start(self):
        super().start()
        admin = f"unix:{self.directory}/admin.sock"
        out = subprocess.run(
            [self.binary(), "status", "--json", "--admin", admin], capture_output=True, text=True
        ).stdout
        status = json.loads(out or "{}")
        # After a fallback, the other engine would be measured under this name.
        if status.get("engine") != self.engine:
            raise RuntimeError(f"not on {self.engine}: {status.get('engine_reason')}")

    def version(self):
        out = subprocess.run([self.binary(), "--version"], capture_output=True, text=True).stdout
        return out.split()[-1] if out else "unknown"


class TidegateRing(Tidegate):
    name = "tidegate-io_uring"
    engine = "io_uring"


class TidegateEpoll(Tidegate):
    name = "tidegate-epoll"
    engine = "epoll"


class TidegateSpin(TidegateEpoll):
    """The epoll engine with `spin`: it polls before it sleeps, which uses more CPU."""

    name = "tidegate-spin"
    keys = 'spin = "50us"\n'
    only = ("ping-pong",)


class Bare(Candidate):
    """The minimal relay of bare.c: a lower bound of the costs."""

    name = "bare"
    only = ("ping-pong", "short", "download", "upload", "open-loop")

    def binary(self):
        return os.path.join(self.root, "target/bench-peers/bare")

    def command(self):
        source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bare.c")
        os.makedirs(os.path.dirname(self.binary()), exist_ok=True)
        subprocess.run(["cc", "-O2", "-o", self.binary(), source], check=True)
        # Only the first backend of each kind.
        ports = [[str(self.ports[kind]), str(self.backends[kind][0][1])] for kind in KINDS]
        return [self.binary(), str(self.threads)] + sum(ports, [])

    def version(self):
        return "-"


class Direct(Candidate):
    """No balancer: the costs of load generator and backends alone."""

    name = "direct"

    def address(self, kind):
        return self.backends[kind][0]

    def start(self):
        pass

    def version(self):
        return "-"


# In the order of the rounds. The reference is first.
ALL = [HAProxy, TidegateRing, TidegateEpoll, Nginx, Envoy, HAProxySplice, TidegateSpin, Bare, Direct]


def available(root):
    """Returns the candidates whose programs are installed."""
    there = {
        HAProxy: find("haproxy"),
        HAProxySplice: find("haproxy"),
        Nginx: find("nginx"),
        Bare: find("cc"),
        Envoy: os.access(os.path.join(root, "target/peers/envoy"), os.X_OK),
    }
    return [one for one in ALL if there.get(one, True)]
