//! Runs the accidents of one registry, and looks at sessions and backends during each.
//!
//! The tests of `accidents` call [`run`]. It knows no registry.

use super::{Accident, Announcing, MemberRegistry};
use crate::common::backend::{self, ScriptedBackend};
use crate::common::ports::free_port;
use crate::common::proxy::TestProxy;
use crate::common::{eventually, measured, ms, patience, secs};
use crate::discovery::load::{Load, LoadReport};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Members before the first accident. Each accident adds one.
pub(super) const STEADY: usize = 3;

/// Time until an answer that removes most members can be confirmed, the default of
/// `confirm_after`.
const CONFIRM_AFTER: Duration = secs(10);

/// Time between two looks at the backends.
const LOOK: Duration = ms(100);

/// Backends at one port of 127.0.0.11, 127.0.0.12 and so on. Each answers with its address.
pub(super) struct Members {
    addresses: Vec<SocketAddr>,
    _backends: Vec<ScriptedBackend>,
}

/// What one accident did.
#[derive(Debug)]
pub(super) struct Outcome {
    source: &'static str,
    accident: Accident,
    /// Sessions that were answered.
    pub(super) sessions: u64,
    /// Sessions that failed.
    pub(super) failed: u64,
    failures: Vec<String>,
    /// Backends that did not serve although no rule let them go.
    pub(super) lost: BTreeSet<String>,
    /// Whether `status` showed the accident, in every process.
    shown: bool,
    /// Time from the return of the registry until a new member served in every process.
    pub(super) recovery: Duration,
}

/// Measures how late threads wake up.
pub(super) struct Lateness {
    stop: Arc<AtomicBool>,
    worst: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

/// Runs every accident for `hold`. All processes have a pool with the name of the registry.
pub(super) fn run(all: &mut Announcing, proxies: &[TestProxy], hold: Duration) -> Vec<Outcome> {
    let Announcing { registry, members } = all;
    let registry = &mut **registry;
    let pids: Vec<u32> = proxies.iter().map(TestProxy::service).collect();
    let name = registry.name();
    eventually(secs(30), &format!("the members of {name} serve"), || {
        proxies.iter().all(|proxy| eligible(proxy, name).len() == STEADY)
    });
    let loads: Vec<Load> = proxies.iter().map(|proxy| Load::start(proxy.addr(name))).collect();
    let mut scene = Scene { registry, members, proxies, loads, steady: STEADY };
    let accidents = scene.registry.accidents();
    let suffer = |accident: &Accident| {
        let outcome = scene.suffer(*accident, hold);
        measured(&outcome.to_string());
        outcome
    };
    let outcomes = accidents.iter().map(suffer).collect();
    scene.follow_a_removal();
    assert_eq!(proxies.iter().map(TestProxy::service).collect::<Vec<_>>(), pids, "a restart");
    outcomes
}

/// A registry under load.
struct Scene<'a> {
    registry: &'a mut dyn MemberRegistry,
    members: &'a Members,
    proxies: &'a [TestProxy],
    loads: Vec<Load>,
    /// How many members are announced.
    steady: usize,
}

// === impl Scene ===

impl Scene<'_> {
    fn suffer(&mut self, accident: Accident, hold: Duration) -> Outcome {
        let before = self.report();
        let (mut lost, mut shown) = (BTreeSet::new(), vec![false; self.proxies.len()]);
        self.registry.begin(accident);
        let began = Instant::now();
        let is_shown = |shown: &[bool]| shown.iter().all(|shown| *shown) || !accident.is_failure();
        while began.elapsed() < hold || (!is_shown(&shown) && began.elapsed() < patience(secs(15)))
        {
            let must = accident.must_serve(began.elapsed(), self.steady);
            self.look(must, &mut lost, &mut shown);
            std::thread::sleep(LOOK);
        }
        self.registry.end(accident);
        let back = Instant::now();
        self.steady += 1;
        self.registry.announce(self.members.first(self.steady));
        let newcomer = self.members.addresses[self.steady - 1].to_string();
        eventually(secs(30), &format!("{newcomer} serves after {accident:?}"), || {
            let must = accident.must_serve(began.elapsed(), self.steady - 1);
            self.look(must, &mut lost, &mut shown.clone());
            self.loads.iter().all(|load| load.report().of(&newcomer) > 0)
        });
        let recovery = back.elapsed();
        let all = format!("all members serve after {accident:?}");
        eventually(secs(30), &all, || self.proxies.iter().all(|proxy| self.serve_all(proxy)));
        let after = self.report();
        Outcome {
            source: self.registry.name(),
            accident,
            sessions: after.sessions() - before.sessions(),
            failed: after.failed - before.failed,
            failures: after.failures,
            lost,
            shown: is_shown(&shown),
            recovery,
        }
    }

    /// Notes which of the first members do not serve, and whether the source has a problem.
    fn look(&self, must: Kept, lost: &mut BTreeSet<String>, shown: &mut [bool]) {
        for (proxy, shown) in self.proxies.iter().zip(shown) {
            let pool = pool(proxy, self.registry.name());
            let eligible = eligible_of(&pool);
            match must {
                Kept::First(count) => {
                    let must = self.members.first(count).iter().map(SocketAddr::to_string);
                    lost.extend(must.filter(|address| !eligible.contains(address)));
                }
                Kept::One => lost.extend(eligible.is_empty().then(|| "all".to_owned())),
            }
            let source = &pool["sources"][0];
            *shown |= !source["last_word"]["failure"].is_null()
                || !source["held_answer"].is_null()
                || source["trusted"] == false;
        }
    }

    fn serve_all(&self, proxy: &TestProxy) -> bool {
        eligible(proxy, self.registry.name()).len() == self.steady
    }

    /// Sum of all processes.
    fn report(&self) -> LoadReport {
        let mut sum = LoadReport::default();
        for report in self.loads.iter().map(Load::report) {
            sum.failed += report.failed;
            sum.failures.extend(report.failures);
            for (name, count) in report.answers {
                *sum.answers.entry(name).or_default() += count;
            }
        }
        sum
    }

    /// Checks that a member leaves which is no longer announced, and ends the load.
    fn follow_a_removal(self) {
        let name = self.registry.name();
        self.registry.announce(&self.members.addresses[1..self.steady]);
        let gone = self.members.addresses[0].to_string();
        eventually(secs(30), &format!("a removed member of {name} leaves"), || {
            self.proxies.iter().all(|proxy| !eligible(proxy, name).contains(&gone))
        });
        for load in self.loads {
            load.end();
        }
    }
}

/// Members that the rules keep.
#[derive(Debug, Clone, Copy)]
enum Kept {
    First(usize),
    One,
}

// === impl Accident ===

impl Accident {
    /// Whether `status` must show the accident: the source fails, its answer is held or not
    /// trusted. Stopped servers and silent streams show only after timeouts. A lost leader,
    /// a lost history and a cut event of a stream may not be seen at all.
    fn is_failure(self) -> bool {
        !matches!(
            self,
            Accident::Hung
                | Accident::HalfAnswer
                | Accident::SilentWatch
                | Accident::Compacted
                | Accident::LeaderKilled
                | Accident::RemovedOneByOne
                | Accident::Renamed
        )
    }

    /// What the rules keep of the first `steady` members after this time. A restored backup has
    /// the first member, and is believed once it is confirmed.
    fn must_serve(self, since: Duration, steady: usize) -> Kept {
        match self {
            Accident::Restored if since >= CONFIRM_AFTER => Kept::First(1),
            // `max_removed` judges each removal alone; the last eligible backend stays.
            Accident::RemovedOneByOne => Kept::One,
            _ => Kept::First(steady),
        }
    }
}

fn pool(proxy: &TestProxy, name: &str) -> Value {
    let status = proxy.status();
    let pools = status["pools"].as_array().expect("pools");
    pools.iter().find(|pool| pool["name"] == name).expect("the pool").clone()
}

fn eligible_of(pool: &Value) -> BTreeSet<String> {
    let backends = pool["backends"].as_array().map_or(&[][..], Vec::as_slice);
    let backends = backends.iter().filter(|backend| backend["eligible"] == true);
    backends.filter_map(|backend| Some(backend["address"].as_str()?.to_owned())).collect()
}

fn eligible(proxy: &TestProxy, name: &str) -> BTreeSet<String> {
    eligible_of(&pool(proxy, name))
}

// === impl Members ===

impl Members {
    pub(super) fn start(count: usize) -> Members {
        let port = free_port();
        let addresses: Vec<SocketAddr> = (0..count)
            .map(|number| SocketAddr::from(([127, 0, 0, 11 + number as u8], port)))
            .collect();
        let start = |address: &SocketAddr| {
            ScriptedBackend::start_on(*address, backend::name(&address.to_string()))
        };
        let backends = addresses.iter().map(start).collect();
        Members { addresses, _backends: backends }
    }

    pub(super) fn first(&self, count: usize) -> &[SocketAddr] {
        &self.addresses[..count]
    }

    pub(super) fn port(&self) -> u16 {
        self.addresses[0].port()
    }
}

// === impl Outcome ===

impl Outcome {
    /// Checks that nothing was lost and that the recovery was fast.
    #[track_caller]
    pub(super) fn assert_kept(&self, limit: Duration) {
        assert_eq!(self.failed, 0, "{self}: {:?}", self.failures);
        assert!(self.sessions > 0, "{self}: the load has run");
        assert!(self.lost.is_empty(), "{self}: lost {:?}", self.lost);
        assert!(self.shown, "{self}: status does not show it");
        assert!(self.recovery <= limit, "{self}: the limit is {limit:?}");
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {:?}: {} of {} sessions failed, {} backends lost, recovery {:.1?}",
            self.source,
            self.accident,
            self.failed,
            self.sessions + self.failed,
            self.lost.len(),
            self.recovery
        )
    }
}

// === impl Lateness ===

impl Lateness {
    pub(super) fn start() -> Lateness {
        let (stop, worst) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (stopped, latest) = (Arc::clone(&stop), Arc::clone(&worst));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let began = Instant::now();
                std::thread::sleep(ms(20));
                let late = began.elapsed().saturating_sub(ms(20));
                latest.fetch_max(late.as_millis() as u64, Ordering::Relaxed);
            }
        });
        Lateness { stop, worst, thread }
    }

    /// Returns ten times the longest delay: a recovery takes some ten steps of threads.
    pub(super) fn end(self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the thread does not panic");
        ms(10 * self.worst.load(Ordering::Relaxed))
    }
}
