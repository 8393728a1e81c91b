"""Time from a registration to the first session, and from a deregistration to the last one.

Called by `discovery`. Clients open sessions all the time. A trial registers one more
backend, waits for its first session, and deregisters it. Changes follow each other after 50
to 250 ms, so that the pace of tables counts. The first session of each newcomer stays open
until the end, to show that no running session is cut.
"""

import json
import os
import random
import time

import discovery_load
import discovery_world as world

# Backends that stay registered; the newcomer gets a third of the sessions.
PERMANENT = 2

# The same with Kubernetes. With few, pods that terminate in consecutive trials would be more
# than half of the pool within 2 s, and Tidegate does not believe such a source.
PERMANENT_PODS = 10

# Least and most time between two changes, in seconds.
PAUSES = (0.05, 0.25)

GUARDS = 'addresses = ["127.0.0.0/8"]\n'

# TTL of the records, in seconds; an address leaves after this many answers without it.
DNS_TTL, DNS_MISSING = 1, 2


class EtcdSite(world.Etcd):
    def __init__(self, bench, port):
        super().__init__(bench.directory)
        self.port = port
        self.pool = f'from = "main"\n{GUARDS}'
        self.extra = self.table()

    def register(self, host):
        self.put(f"/tidegate/services/web/{host}", json.dumps({"address": f"{host}:{self.port}"}))

    def deregister(self, host):
        self.delete(f"/tidegate/services/web/{host}")


class ZookeeperSite(world.Zookeeper):
    def __init__(self, bench, port):
        super().__init__(bench.directory)
        self.port = port
        self.create("/web")
        self.pool = f'from = "main"\npath = "/web"\n{GUARDS}'
        self.extra = f'[registry.main]\nkind = "zookeeper"\nservers = ["{self.address}"]\n'

    def register(self, host):
        self.create(f"/web/{host}", json.dumps({"address": f"{host}:{self.port}"}).encode())

    def deregister(self, host):
        self.delete(f"/web/{host}")


class ConsulSite(world.ConsulDouble):
    def __init__(self, bench, port):
        super().__init__(bench.examples, bench.directory)
        self.port = port
        self.pool = f'from = "main"\nservice = "web"\n{GUARDS}'
        self.extra = f'[registry.main]\nkind = "consul"\nservers = ["{self.address}"]\n'

    def register(self, host):
        self.put("/v1/agent/service/register",
                 {"ID": host, "Name": "web", "Address": host, "Port": self.port})

    def deregister(self, host):
        self.put(f"/v1/agent/service/deregister/{host}")


class SetSite:
    """A source that gets the whole set with each change."""

    members = frozenset()

    def register(self, host):
        self.members = self.members | {host}
        self.tell()

    def deregister(self, host):
        self.members = self.members - {host}
        self.tell()


class KubernetesSite(SetSite, world.KubernetesDouble):
    def __init__(self, bench, port):
        super().__init__(bench.examples, bench.directory, port)
        self.pool = f'from = "main"\nservice = "web"\nnamespace = "shop"\n{GUARDS}'
        self.extra = f'[registry.main]\nkind = "kubernetes"\nservers = ["{self.address}"]\n'

    def deregister(self, host):
        """A pod ends: it terminates, and is removed with the next change."""
        self.members = self.members - {host}
        self.put(self.members | {f"-{host}"})

    def tell(self):
        self.put(self.members)


class RemovedSite(KubernetesSite):
    """An endpoint vanishes without terminating first, as when its node is deleted."""

    def deregister(self, host):
        SetSite.deregister(self, host)


class FileSite(SetSite, world.Server):
    def __init__(self, bench, port):
        self.path, self.port = os.path.join(bench.directory, "members.json"), port
        self.pool = f'kind = "file"\npath = "{self.path}"\n{GUARDS}'
        self.extra = ""

    def tell(self):
        with open(self.path + ".new", "w") as file:
            json.dump([f"{host}:{self.port}" for host in sorted(self.members)], file)
        os.rename(self.path + ".new", self.path)


class DnsSite(SetSite, world.Dnsmasq):
    def __init__(self, bench, port):
        super().__init__(bench.directory, "latency", [], DNS_TTL)
        self.pool = (f'kind = "dns"\nname = "web.example."\nport = {port}\nfamily = "ipv4"\n'
                     f'missing = {DNS_MISSING}\n{GUARDS}')
        self.extra = super().table()

    def tell(self):
        self.change([f"{host} web.example" for host in sorted(self.members)])


# By name: the class, the goals in milliseconds, and the most trials.
SITES = {
    "etcd": (EtcdSite, 400, 300, None),
    "zookeeper": (ZookeeperSite, 400, 300, None),
    "consul": (ConsulSite, 400, 300, None),
    "kubernetes": (KubernetesSite, 400, 300, None),
    # A missing endpoint stays for 1 s, because endpoints move between slices.
    "removed": (RemovedSite, 400, 1300, 15),
    "file": (FileSite, 400, 300, None),
    "dns": (DnsSite, 1000 * DNS_TTL + 1000, 1000 * DNS_TTL * DNS_MISSING + 1000, 15),
}


def measure(bench, name):
    make, join_goal, leave_goal, most = SITES[name]
    trials = bench.trials if most is None else min(bench.trials, most)
    with world.Backends(bench.directory) as backends, make(bench, backends.port) as site:
        pods = isinstance(site, KubernetesSite)
        permanent = PERMANENT_PODS if pods else PERMANENT
        for number in range(permanent):
            site.register(f"127.1.0.{number + 1}")
        port = world.measure.free_ports(1)
        text = (f'[frontend.web]\nbind = "127.0.0.1:{port}"\npool = "web"\n'
                f'[pool.web.discover]\n{site.pool}{site.extra}')
        with bench.balancer(f"latency-{name}", text) as balancer:
            balancer.await_eligible(permanent)
            clients = discovery_load.Clients(port)
            try:
                joined, left = run(bench, name, site, clients, trials, leave_goal / 1000)
                cut = clients.cut()
            finally:
                clients.stop()
    bench.times(f"{name}: registration to first session", joined, join_goal)
    bench.times(f"{name}: deregistration to last new session", left, leave_goal)
    bench.count(f"{name}: running sessions cut, of {trials}", cut, 0)
    bench.count(f"{name}: failed sessions, of {clients.sessions()}", clients.failed, 0,
                ", ".join(clients.failures))


def run(bench, name, site, clients, trials, leave_goal):
    """Returns the times of all trials in milliseconds."""
    joined, began = [], {}
    for trial in range(trials):
        bench.progress(f"{name}: trial {trial + 1} of {trials}")
        host = f"127.2.{trial // 200}.{trial % 200 + 1}"
        with clients.changed:
            clients.keep.add(host)
        pause()
        start = time.monotonic()
        site.register(host)
        first = clients.wait_for(host, 30)
        if first is None:
            raise RuntimeError(f"{name}: {host} got no session within 30 s")
        joined.append((first - start) * 1000)
        pause()
        began[host] = time.monotonic()
        site.deregister(host)
        if name == "dns":
            # One change at a time, so that each leaver is missing in the same answers.
            time.sleep(leave_goal)
    time.sleep(leave_goal + 0.5)
    left = [max(0, clients.last(host) - at) * 1000 for host, at in began.items()]
    return joined, left


def pause():
    time.sleep(random.uniform(*PAUSES))
