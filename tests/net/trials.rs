//! Trials of failure detection: make a fault under load, see how soon the
//! balancer knows, heal it, and again.
//!
//! Generic over how backends are watched, so that ways can be compared by their
//! histograms. Detection is read from `/v1/status`, polled every few
//! milliseconds: from just before the fault to the answer that first shows it.

use crate::common::conf::Conf;
use crate::common::proxy::TestProxy;
use crate::common::servers::Running;
use crate::common::{Engine, eventually, long, measured, ms, patience, proc, secs};
use crate::hosts::{Hosts, Service};
use crate::link::Link;
use crate::link::channel::{Impairment, Loss};
use crate::netns::networks_run;
use crate::starve::Starved;
use crate::traffic::{Pace, Session, Traffic, errors};
use crate::watch::Watch;
use hdrhistogram::Histogram;
use rustix::process::Signal;
use std::time::{Duration, Instant};

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

/// A trial is given up after this long: not seen.
const BLIND: Duration = Duration::from_secs(5);

/// Between two looks at the status.
const LOOK: Duration = Duration::from_millis(3);

/// Enough that every backend always has sessions, little enough that the
/// machine is not what is measured.
const PACE: Pace = Pace { at_once: 8, pause: ms(20), patience: secs(8) };

/// For a fault that hurts by what there is to do: several times what 1 % of a
/// CPU can.
const HEAVY_PACE: Pace = Pace { at_once: 16, pause: ms(5), patience: secs(8) };

/// How long a session's connect may take: long enough that the watcher is the
/// first to know, and that a SYN lost in a fault is sent again (after 1 s, RFC
/// 6298) before the connect fails.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// A session that took longer has felt the fault.
const LATE: Duration = Duration::from_millis(150);

/// The backend that suffers, of three.
const VICTIM: usize = 1;

/// One trial's outcome, in time since the fault.
#[derive(Debug, Clone, Copy)]
struct Seen {
    fault: Instant,
    /// Less weight, or none.
    lowered: Option<Duration>,
    /// Out of service.
    out: Option<Duration>,
    /// When the fault was over.
    healed: Instant,
}

struct Site<'a> {
    watch: &'a dyn Watch,
    /// What the victim is called now.
    victim: String,
    hosts: Hosts,
    proxy: TestProxy,
    services: Vec<Service>,
    beside: Vec<Option<Running>>,
    starved: Option<Starved>,
}

/// How often each fault is made. What is seen late, or not at all, takes longest.
fn trials(watch: &dyn Watch, fault: Fault) -> usize {
    match fault {
        _ if long() => 100,
        Fault::Starved | Fault::CutOneWay => 2,
        _ => watch.trials(),
    }
}

/// How long a healed backend keeps its full weight before the next trial.
fn settled(watch: &dyn Watch, fault: Fault) -> Duration {
    match fault {
        // Connects whose SYN was lost hang until it is sent again.
        Fault::Cut | Fault::CutOneWay => ms(1100).max(watch.warms_up()),
        _ => watch.warms_up(),
    }
}

/// Runs the trials of one fault and says what came of them. All the while every
/// link loses that share of packets, each way.
pub fn run(watch: &dyn Watch, fault: Fault, loss: f64) {
    if !networks_run() {
        return;
    }
    let mut site = Site::start(watch);
    for host in &site.hosts.backends {
        host.link.set(Impairment { loss: Loss::Independent(loss), ..Impairment::default() });
    }
    let pace = if fault == Fault::Starved { HEAVY_PACE } else { PACE };
    let traffic = Traffic::start(&site.hosts.client, site.proxy.addr("web"), pace);
    eventually(secs(10), "traffic flows", || traffic.done() > 100);
    let mut phase = fastrand::Rng::with_seed(80);
    let mut seen = Vec::new();
    for _ in 0..trials(watch, fault) {
        seen.push(site.trial(fault));
        // The next fault falls anywhere between two looks of the watcher.
        std::thread::sleep(ms(phase.u64(..200)));
    }
    let sessions = traffic.stop();
    let what = format!("{fault:?} by {} at {}% loss", watch.name(), loss * 100.0);
    report(&what, &seen, &sessions, &site.proxy);
    judge(watch, fault, &seen, &sessions, &site.proxy);
}

fn report(what: &str, seen: &[Seen], sessions: &[Session], proxy: &TestProxy) {
    let late = sessions.iter().filter(|one| one.result.is_ok() && one.took > LATE).count();
    let failed = sessions.iter().filter(|one| one.result.is_err()).count();
    // Down again after it was healed: by what was still under way.
    let downs = proxy.log().lines().filter(|line| is_out(line, "b")).count();
    let relapses = downs.saturating_sub(seen.iter().filter(|one| one.out.is_some()).count());
    measured(&format!(
        "{what}: lowered {}; out {}; {relapses} relapses; \
         of {} sessions {failed} failed, {late} took over {LATE:?}",
        quantiles(seen.iter().map(|one| one.lowered)),
        quantiles(seen.iter().map(|one| one.out)),
        sessions.len(),
    ));
}

/// A line of the log that says so of a backend whose name starts like that.
fn is_out(line: &str, name: &str) -> bool {
    line.contains(&format!("backend={name}")) && line.contains("to=\"down\"")
}

/// `p50 210 ms, p99 305 ms, max 305 ms (10 of 10)`
fn quantiles(times: impl Iterator<Item = Option<Duration>>) -> String {
    let mut histogram = Histogram::<u64>::new(3).expect("3 digits are allowed");
    let mut trials = 0;
    for time in times {
        trials += 1;
        if let Some(time) = time {
            histogram.record(time.as_micros() as u64).expect("it resizes itself");
        }
    }
    let ms = |micros: u64| micros as f64 / 1e3;
    format!(
        "p50 {:.0} ms, p99 {:.0} ms, max {:.0} ms ({} of {trials})",
        ms(histogram.value_at_quantile(0.5)),
        ms(histogram.value_at_quantile(0.99)),
        ms(histogram.max()),
        histogram.len(),
    )
}

#[track_caller]
fn judge(watch: &dyn Watch, fault: Fault, seen: &[Seen], sessions: &[Session], proxy: &TestProxy) {
    let others = |line: &&str| is_out(line, "a") || is_out(line, "c");
    let log = proxy.log();
    let blamed: Vec<&str> = log.lines().filter(others).collect();
    assert!(blamed.is_empty(), "healthy backends were blamed: {blamed:#?}");
    if let Some(bound) = watch.promises(fault) {
        let in_time = |one: &Seen| one.lowered.is_some_and(|time| time <= patience(bound));
        assert!(seen.iter().all(in_time), "not all within {bound:?}: {seen:#?}");
    }
    // From the moment it is out to the moment it is back, nobody meets it.
    for one in seen {
        let Some(out) = one.out else { continue };
        let (from, to) = (one.fault + out, one.healed);
        let during = |session: &&Session| session.began > from && session.began + session.took < to;
        let failed = sessions.iter().filter(during).find(|session| session.result.is_err());
        assert!(failed.is_none(), "failed while it was out of service: {failed:?}");
    }
    if fault != Fault::Killed {
        // Nothing dies of these: clients wait, and are served in the end.
        let failed = errors(sessions, seen[0].fault);
        assert!(failed.is_empty(), "{failed:#?}");
    }
}

// === impl Site ===

impl Site<'_> {
    #[track_caller]
    fn start(watch: &dyn Watch) -> Site<'_> {
        let hosts = Hosts::new(3, 80);
        let services: Vec<Service> = hosts.backends.iter().map(|host| host.start_echo()).collect();
        let limit = format!("connect_timeout = \"{}ms\"", CONNECT_TIMEOUT.as_millis());
        let pool = hosts.pool().key(&limit);
        let conf: Conf = watch.conf(hosts.conf(Engine::Epoll, watch.pool(pool)));
        let proxy = hosts.start(conf);
        let beside =
            hosts.backends.iter().map(|host| watch.start_beside(host, host.name)).collect();
        for host in &hosts.backends {
            proxy.wait_backend("web", host.name, "observation", "up");
        }
        let victim = hosts.backends[VICTIM].name.to_string();
        Site { watch, victim, hosts, proxy, services, beside, starved: None }
    }

    fn trial(&mut self, fault: Fault) -> Seen {
        self.wait_until_whole(settled(self.watch, fault));
        let start = Instant::now();
        self.hurt(fault);
        let (mut lowered, mut out) = (None, None);
        while out.is_none() && start.elapsed() < BLIND {
            let (eligible, whole) = self.victim();
            let now = start.elapsed();
            if !whole {
                lowered.get_or_insert(now);
            }
            if !eligible {
                out.get_or_insert(now);
            }
            std::thread::sleep(LOOK);
        }
        self.heal(fault);
        if self.watch.bears_grudges() {
            self.rename();
        }
        Seen { fault: start, lowered, out, healed: Instant::now() }
    }

    /// Whether the victim takes sessions, and whether it does at full weight.
    fn victim(&self) -> (bool, bool) {
        let state = self.proxy.backend("web", &self.victim);
        let eligible = state["eligible"] == true;
        (eligible, eligible && state["effective_weight"] == state["weight"])
    }

    #[track_caller]
    fn wait_until_whole(&self, settled: Duration) {
        let mut since = None;
        eventually(secs(30), "the victim has its full weight and keeps it", || {
            let now = Instant::now();
            let whole = self.victim().1;
            since = since.filter(|_| whole).or(whole.then_some(now));
            since.is_some_and(|since| now - since >= settled)
        });
    }

    fn hurt(&mut self, fault: Fault) {
        match fault {
            Fault::Killed => self.services[VICTIM].kill(),
            Fault::Frozen => self.services[VICTIM].freeze(),
            Fault::AllFrozen => self.signal_all(Signal::STOP),
            Fault::Cut => self.link().partition(true),
            Fault::CutOneWay => self.link().a_to_b().partition(true),
            Fault::Starved => self.starved = Some(Starved::new(&self.pids())),
        }
    }

    fn heal(&mut self, fault: Fault) {
        match fault {
            Fault::Killed => self.services[VICTIM] = self.hosts.backends[VICTIM].start_echo(),
            Fault::Frozen => self.services[VICTIM].thaw(),
            Fault::AllFrozen => self.signal_all(Signal::CONT),
            Fault::Cut | Fault::CutOneWay => self.link().partition(false),
            Fault::Starved => self.starved = None,
        }
    }

    /// Has the victim come back under another name: to the balancer it is
    /// another backend, without a past.
    fn rename(&mut self) {
        let host = &self.hosts.backends[VICTIM];
        self.victim = format!("{}-{}", host.name, fastrand::u32(..));
        let mut conf = self.proxy.conf();
        conf.pool_mut("web").backends[VICTIM].name = self.victim.clone();
        self.proxy.reload(conf);
        self.beside[VICTIM] = None;
        self.beside[VICTIM] = self.watch.start_beside(host, &self.victim);
    }

    /// The victim's; *a* is the balancer's end.
    fn link(&self) -> &Link {
        &self.hosts.backends[VICTIM].link
    }

    /// The victim's service and what runs beside it.
    fn pids(&self) -> Vec<u32> {
        let beside = self.beside[VICTIM].iter().map(Running::pid);
        beside.chain([self.services[VICTIM].pid()]).collect()
    }

    fn signal_all(&self, signal: Signal) {
        self.pids().into_iter().for_each(|pid| proc::signal(pid, signal));
    }
}
