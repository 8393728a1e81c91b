//! The testbed of detection trials: four backends, of which one after the other fails and
//! recovers.
//!
//! A failed backend recovers while others fail, so trials do not wait for it. The detection
//! time is taken from timestamps in Tidegate's log, so that a busy machine does not distort it.
//! `/v1/status`, polled every 3 ms, confirms the detection. This module checks no results.

use crate::common::conf::Conf;
use crate::common::proxy::TestProxy;
use crate::common::servers::Running;
use crate::common::{Engine, eventually, proc, secs};
use crate::cpu_limit::CpuLimited;
use crate::hosts::{Hosts, Service};
use crate::link::Link;
use crate::link::channel::{Impairment, Loss};
use crate::watch::Watch;
use rustix::process::Signal;
use std::time::{Duration, Instant, SystemTime};

/// The fault of one backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// kill -9 of the service.
    Killed,
    /// SIGSTOP of the service. Its sidecar continues.
    Stopped,
    /// SIGSTOP of the service and its sidecar.
    HostStopped,
    /// The link drops all packets in both directions.
    Partitioned,
    /// The link drops all packets to the backend. Packets from the backend arrive.
    PartitionedOneWay,
    /// The service and its sidecar share 1 % of a CPU.
    CpuLimited,
}

/// Enough backends that each has recovered before its next trial.
const BACKENDS: usize = 4;

/// A trial ends after this time as not detected.
const BLIND: Duration = Duration::from_secs(5);

/// The polling interval of the status.
const LOOK: Duration = Duration::from_millis(3);

/// The connect timeout of sessions. It is long enough that the detector reacts first, and that a
/// lost SYN is resent (after 1 s, RFC 6298) before the connect fails.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// The connect timeout with packet loss. A SYN is resent after 1, 2 and 4 s, so all attempts of a
/// session fail once in 10^12 sessions.
const LOSSY_CONNECT_TIMEOUT: Duration = Duration::from_secs(8);

/// The result of one trial, in time since the fault.
#[derive(Debug, Clone)]
pub struct Seen {
    pub fault: Instant,
    /// When the backend got less weight or none.
    pub lowered: Option<Duration>,
    /// When the backend was removed from rotation.
    pub out: Option<Duration>,
    /// When the fault ended.
    pub ended: Instant,
    /// Backends without a fault that were out of rotation during the trial.
    pub wrongly_removed: Vec<String>,
}

pub struct Testbed<'a> {
    watch: &'a dyn Watch,
    // Dropped first, while the network still exists.
    pub proxy: TestProxy,
    sidecars: Vec<Option<Running>>,
    services: Vec<Service>,
    pub hosts: Hosts,
    cpu_limited: Option<CpuLimited>,
    /// The links also lose packets.
    lossy: bool,
    /// The current name of each backend.
    names: Vec<String>,
    /// Since when each backend has had its full weight, as far as polled.
    full_since: Vec<Option<Instant>>,
    /// The backend of the next trial.
    next: usize,
}

// === impl Testbed ===

impl Testbed<'_> {
    /// Starts the testbed. Every link loses the share `loss` of packets in each direction.
    #[track_caller]
    pub fn start(watch: &dyn Watch, loss: f64) -> Testbed<'_> {
        let hosts = Hosts::new(BACKENDS, 80);
        let services: Vec<Service> = hosts.backends.iter().map(|host| host.start_echo()).collect();
        let limit = if loss > 0.0 { LOSSY_CONNECT_TIMEOUT } else { CONNECT_TIMEOUT };
        let pool = hosts.pool().key(&format!("connect_timeout = \"{}ms\"", limit.as_millis()));
        let conf: Conf = watch.conf(hosts.conf(Engine::Epoll, watch.pool(pool, loss)));
        let proxy = hosts.start(conf);
        let sidecars =
            hosts.backends.iter().map(|host| watch.start_sidecar(host, host.name)).collect();
        for host in &hosts.backends {
            proxy.wait_backend("web", host.name, "observation", "up");
            let loss = Loss::Independent(loss);
            host.link.set(Impairment { loss, ..Impairment::default() });
        }
        let names = hosts.backends.iter().map(|host| host.name.to_string()).collect();
        let full_since = vec![None; BACKENDS];
        let (cpu_limited, lossy, next) = (None, loss > 0.0, 0);
        Testbed {
            watch,
            hosts,
            proxy,
            services,
            sidecars,
            cpu_limited,
            lossy,
            names,
            full_since,
            next,
        }
    }

    /// Runs a trial with the next backend, after that backend has had its full weight for
    /// `settled`
    /// and all backends are eligible. The fault ends when the backend is out of rotation. With
    /// packet
    /// loss all backends must have had their full weight that long: a new backend that misses
    /// four
    /// heartbeats before its interval is known is correctly removed at once.
    #[track_caller]
    pub fn trial(&mut self, fault: Fault, settled: Duration) -> Seen {
        let victim = self.next;
        self.next = (victim + 1) % BACKENDS;
        eventually(secs(30), "all backends are eligible, and the victim is settled", || {
            let eligible = self.look();
            let whole = |since: &Option<Instant>| since.is_some_and(|at| at.elapsed() >= settled);
            let all_whole = !self.lossy || self.full_since.iter().all(whole);
            eligible.iter().all(|eligible| *eligible)
                && whole(&self.full_since[victim])
                && all_whole
        });
        let (start, start_wall) = (Instant::now(), SystemTime::now());
        self.start_fault(victim, fault);
        let (mut lowered, mut out, mut wrongly_removed) = (None, None, Vec::new());
        while out.is_none() && start.elapsed() < BLIND {
            let eligible = self.look();
            let now = start.elapsed();
            if self.full_since[victim].is_none() {
                lowered.get_or_insert(now);
            }
            if !eligible[victim] {
                out.get_or_insert(now);
            }
            let others = (0..BACKENDS).filter(|one| *one != victim && !eligible[*one]);
            wrongly_removed.extend(others.map(|one| self.names[one].clone()));
            std::thread::sleep(LOOK);
        }
        let (lowered_logged, out_logged) = self.logged(victim, start_wall);
        let earlier = |seen: Option<Duration>, logged: Option<Duration>| {
            seen.map(|seen| logged.map_or(seen, |logged| logged.min(seen)))
        };
        let (lowered, out) = (earlier(lowered, lowered_logged), earlier(out, out_logged));
        self.end_fault(victim, fault);
        if self.watch.lengthens_ejections() {
            self.rename(victim);
        }
        wrongly_removed.dedup();
        Seen { fault: start, lowered, out, ended: Instant::now(), wrongly_removed }
    }

    /// Returns when, after the fault, the log reports less weight and removal of the victim.
    fn logged(&self, victim: usize, fault: SystemTime) -> (Option<Duration>, Option<Duration>) {
        let mark = format!("backend={} ", self.names[victim]);
        let (mut lowered, mut out) = (None, None);
        for line in self.proxy.log().lines().filter(|line| line.contains(&mark)) {
            let time = line.split(' ').next().and_then(|word| humantime::parse_rfc3339(word).ok());
            let Some(Ok(after)) = time.map(|time| time.duration_since(fault)) else { continue };
            let to = |states: &[&str]| {
                states.iter().any(|state| line.contains(&format!(" to=\"{state}\"")))
            };
            if to(&["suspect", "starting", "down", "ejected"]) {
                lowered.get_or_insert(after);
            }
            if to(&["starting", "down", "ejected"]) {
                out.get_or_insert(after);
            }
        }
        (lowered, out)
    }

    /// Returns whether each backend is eligible, and records whether each has its full weight.
    fn look(&mut self) -> Vec<bool> {
        let status = self.proxy.status();
        let now = Instant::now();
        let backends = status["pools"][0]["backends"].as_array().expect("backends");
        let mut eligible = Vec::new();
        for (place, name) in self.names.iter().enumerate() {
            let state =
                backends.iter().find(|backend| backend["name"] == **name).expect("is configured");
            let serves = state["eligible"] == true;
            let whole = serves && state["effective_weight"] == state["weight"];
            let since = &mut self.full_since[place];
            *since = since.filter(|_| whole).or(whole.then_some(now));
            eligible.push(serves);
        }
        eligible
    }

    fn start_fault(&mut self, victim: usize, fault: Fault) {
        match fault {
            Fault::Killed => self.services[victim].kill(),
            Fault::Stopped => self.services[victim].pause(),
            Fault::HostStopped => self.signal_all(victim, Signal::STOP),
            Fault::Partitioned => self.link(victim).partition(true),
            Fault::PartitionedOneWay => self.link(victim).a_to_b().partition(true),
            Fault::CpuLimited => self.cpu_limited = Some(CpuLimited::new(&self.pids(victim))),
        }
    }

    fn end_fault(&mut self, victim: usize, fault: Fault) {
        match fault {
            Fault::Killed => self.services[victim] = self.hosts.backends[victim].start_echo(),
            Fault::Stopped => self.services[victim].resume(),
            Fault::HostStopped => self.signal_all(victim, Signal::CONT),
            Fault::Partitioned | Fault::PartitionedOneWay => self.link(victim).partition(false),
            Fault::CpuLimited => self.cpu_limited = None,
        }
    }

    /// Renames the victim, so that it is a new backend without a history.
    fn rename(&mut self, victim: usize) {
        let host = &self.hosts.backends[victim];
        let name = format!("{}-{}", host.name, fastrand::u32(..));
        let mut conf = self.proxy.conf();
        conf.pool_mut("web").backends[victim].name = name.clone();
        self.proxy.reload(conf);
        self.sidecars[victim] = None;
        self.sidecars[victim] = self.watch.start_sidecar(host, &name);
        if self.sidecars[victim].is_some() {
            // The sender first sends `starting` and is not eligible during that time.
            eventually(secs(10), "the sender reports ready", || {
                self.proxy.backend("web", &name)["heartbeat"]["sender_state"] == "ready"
            });
        }
        self.names[victim] = name;
        self.full_since[victim] = None;
    }

    /// The victim's link. End *a* is Tidegate's.
    fn link(&self, victim: usize) -> &Link {
        &self.hosts.backends[victim].link
    }

    /// The pids of the victim's service and sidecar.
    fn pids(&self, victim: usize) -> Vec<u32> {
        let sidecars = self.sidecars[victim].iter().map(Running::pid);
        sidecars.chain([self.services[victim].pid()]).collect()
    }

    fn signal_all(&self, victim: usize, signal: Signal) {
        self.pids(victim).into_iter().for_each(|pid| proc::signal(pid, signal));
    }
}
