//! The testbed of detection trials: four backends under one balancer, of which one
//! after the other is hurt and healed.
//!
//! Who was hurt recovers while others are, so a trial waits for nobody.
//! When a fault was seen is taken from the balancer's log, to the time of the
//! machine's clock, so that a test on a busy machine is not what is measured;
//! `/v1/status`, polled every few milliseconds, says that it was. Nothing here
//! judges.

use crate::common::conf::Conf;
use crate::common::proxy::TestProxy;
use crate::common::servers::Running;
use crate::common::{Engine, eventually, proc, secs};
use crate::hosts::{Hosts, Service};
use crate::link::Link;
use crate::link::channel::{Impairment, Loss};
use crate::starve::Starved;
use crate::watch::Watch;
use rustix::process::Signal;
use std::time::{Duration, Instant, SystemTime};

/// What happens to one backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// kill -9 of the service.
    Killed,
    /// SIGSTOP of the service; what runs beside it goes on.
    Frozen,
    /// SIGSTOP of the service and of what runs beside it.
    AllFrozen,
    /// Nothing gets through its link, either way.
    Cut,
    /// Nothing gets through to it; what it sends arrives.
    CutOneWay,
    /// Service and what runs beside it share 1 % of a CPU.
    Starved,
}

/// Enough that each has recovered when its turn comes again.
const BACKENDS: usize = 4;

/// A trial is given up after this long: not seen.
const BLIND: Duration = Duration::from_secs(5);

/// Between two looks at the status.
const LOOK: Duration = Duration::from_millis(3);

/// How long a session's connect may take: long enough that the watcher is the
/// first to know, and that a SYN lost in a fault is sent again (after 1 s, RFC
/// 6298) before the connect fails.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// The same where packets are lost besides: with a SYN sent again after 1, 2 and 4 s, all
/// attempts of a session fail once in a million million.
const LOSSY_CONNECT_TIMEOUT: Duration = Duration::from_secs(8);

/// One trial's outcome, in time since the fault.
#[derive(Debug, Clone)]
pub struct Seen {
    pub fault: Instant,
    /// Less weight, or none.
    pub lowered: Option<Duration>,
    /// Out of service.
    pub out: Option<Duration>,
    /// When the fault was over.
    pub healed: Instant,
    /// Backends that were out of service meanwhile without having been hurt.
    pub blamed: Vec<String>,
}

pub struct Testbed<'a> {
    watch: &'a dyn Watch,
    // Ends first, while there still is a network around it.
    pub proxy: TestProxy,
    beside: Vec<Option<Running>>,
    services: Vec<Service>,
    pub hosts: Hosts,
    starved: Option<Starved>,
    /// Links lose packets besides.
    lossy: bool,
    /// What each backend is called now.
    names: Vec<String>,
    /// Since when each has had its full weight, as far as was looked.
    whole_since: Vec<Option<Instant>>,
    /// Whose turn it is.
    next: usize,
}

// === impl Testbed ===

impl Testbed<'_> {
    /// Every link loses that share of packets, each way.
    #[track_caller]
    pub fn start(watch: &dyn Watch, loss: f64) -> Testbed<'_> {
        let hosts = Hosts::new(BACKENDS, 80);
        let services: Vec<Service> = hosts.backends.iter().map(|host| host.start_echo()).collect();
        let limit = if loss > 0.0 { LOSSY_CONNECT_TIMEOUT } else { CONNECT_TIMEOUT };
        let pool = hosts.pool().key(&format!("connect_timeout = \"{}ms\"", limit.as_millis()));
        let conf: Conf = watch.conf(hosts.conf(Engine::Epoll, watch.pool(pool, loss)));
        let proxy = hosts.start(conf);
        let beside =
            hosts.backends.iter().map(|host| watch.start_beside(host, host.name)).collect();
        for host in &hosts.backends {
            proxy.wait_backend("web", host.name, "observation", "up");
            let loss = Loss::Independent(loss);
            host.link.set(Impairment { loss, ..Impairment::default() });
        }
        let names = hosts.backends.iter().map(|host| host.name.to_string()).collect();
        let whole_since = vec![None; BACKENDS];
        let (starved, lossy, next) = (None, loss > 0.0, 0);
        Testbed { watch, hosts, proxy, services, beside, starved, lossy, names, whole_since, next }
    }

    /// Hurts whose turn it is, once it has had its full weight for so long and
    /// everybody serves; heals it when it is out of service. Where packets are lost, the
    /// others have had theirs for as long: a newcomer that misses four heartbeats in a row
    /// while its rhythm is not known yet is out at once, and rightly so.
    #[track_caller]
    pub fn trial(&mut self, fault: Fault, settled: Duration) -> Seen {
        let victim = self.next;
        self.next = (victim + 1) % BACKENDS;
        eventually(secs(30), "everybody serves, and the victim is settled", || {
            let eligible = self.look();
            let whole = |since: &Option<Instant>| since.is_some_and(|at| at.elapsed() >= settled);
            let all_whole = !self.lossy || self.whole_since.iter().all(whole);
            eligible.iter().all(|one| *one) && whole(&self.whole_since[victim]) && all_whole
        });
        let (start, start_wall) = (Instant::now(), SystemTime::now());
        self.hurt(victim, fault);
        let (mut lowered, mut out, mut blamed) = (None, None, Vec::new());
        while out.is_none() && start.elapsed() < BLIND {
            let eligible = self.look();
            let now = start.elapsed();
            if self.whole_since[victim].is_none() {
                lowered.get_or_insert(now);
            }
            if !eligible[victim] {
                out.get_or_insert(now);
            }
            let others = (0..BACKENDS).filter(|one| *one != victim && !eligible[*one]);
            blamed.extend(others.map(|one| self.names[one].clone()));
            std::thread::sleep(LOOK);
        }
        let (lowered_logged, out_logged) = self.logged(victim, start_wall);
        let earlier = |seen: Option<Duration>, logged: Option<Duration>| {
            seen.map(|seen| logged.map_or(seen, |logged| logged.min(seen)))
        };
        let (lowered, out) = (earlier(lowered, lowered_logged), earlier(out, out_logged));
        self.heal(victim, fault);
        if self.watch.bears_grudges() {
            self.rename(victim);
        }
        blamed.dedup();
        Seen { fault: start, lowered, out, healed: Instant::now(), blamed }
    }

    /// When the log says that the victim got less or nothing, after the fault.
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

    /// Whether each takes sessions; notes whether each does at full weight.
    fn look(&mut self) -> Vec<bool> {
        let status = self.proxy.status();
        let now = Instant::now();
        let backends = status["pools"][0]["backends"].as_array().expect("backends");
        let mut eligible = Vec::new();
        for (place, name) in self.names.iter().enumerate() {
            let state = backends.iter().find(|one| one["name"] == **name).expect("is configured");
            let serves = state["eligible"] == true;
            let whole = serves && state["effective_weight"] == state["weight"];
            let since = &mut self.whole_since[place];
            *since = since.filter(|_| whole).or(whole.then_some(now));
            eligible.push(serves);
        }
        eligible
    }

    fn hurt(&mut self, victim: usize, fault: Fault) {
        match fault {
            Fault::Killed => self.services[victim].kill(),
            Fault::Frozen => self.services[victim].freeze(),
            Fault::AllFrozen => self.signal_all(victim, Signal::STOP),
            Fault::Cut => self.link(victim).partition(true),
            Fault::CutOneWay => self.link(victim).a_to_b().partition(true),
            Fault::Starved => self.starved = Some(Starved::new(&self.pids(victim))),
        }
    }

    fn heal(&mut self, victim: usize, fault: Fault) {
        match fault {
            Fault::Killed => self.services[victim] = self.hosts.backends[victim].start_echo(),
            Fault::Frozen => self.services[victim].thaw(),
            Fault::AllFrozen => self.signal_all(victim, Signal::CONT),
            Fault::Cut | Fault::CutOneWay => self.link(victim).partition(false),
            Fault::Starved => self.starved = None,
        }
    }

    /// Has the victim come back under another name: to the balancer it is
    /// another backend, without a past.
    fn rename(&mut self, victim: usize) {
        let host = &self.hosts.backends[victim];
        let name = format!("{}-{}", host.name, fastrand::u32(..));
        let mut conf = self.proxy.conf();
        conf.pool_mut("web").backends[victim].name = name.clone();
        self.proxy.reload(conf);
        self.beside[victim] = None;
        self.beside[victim] = self.watch.start_beside(host, &name);
        if self.beside[victim].is_some() {
            // It says `starting` first, and does not serve for as long.
            eventually(secs(10), "its heartbeats say that it is ready", || {
                self.proxy.backend("web", &name)["heartbeat"]["sender_state"] == "ready"
            });
        }
        self.names[victim] = name;
        self.whole_since[victim] = None;
    }

    /// The victim's; *a* is the balancer's end.
    fn link(&self, victim: usize) -> &Link {
        &self.hosts.backends[victim].link
    }

    /// The victim's service and what runs beside it.
    fn pids(&self, victim: usize) -> Vec<u32> {
        let beside = self.beside[victim].iter().map(Running::pid);
        beside.chain([self.services[victim].pid()]).collect()
    }

    fn signal_all(&self, victim: usize, signal: Signal) {
        self.pids(victim).into_iter().for_each(|pid| proc::signal(pid, signal));
    }
}
