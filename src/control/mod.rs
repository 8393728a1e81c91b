//! The controller: the single writer of everything sessions are routed by.
//!
//! `app` feeds it events with the time and performs the effects it returns.
//! Pure: it does no I/O and reads no clock, so a test drives a year in a
//! millisecond.
//!
//! The files: `configure` (what a reload keeps), `probing` (when probes run),
//! `verdicts` (what their results mean), `ejections` (the pool's guard),
//! `leaving` (removed backends), `operator` (drains), `publish` (tables),
//! `handover` (what the next process goes on with) and `status`. All of them work on one [`Controller`] and leave effects behind;
//! only [`Controller::apply`] and its siblings hand them out.

mod configure;
mod ejections;
pub mod handover;
mod leaving;
mod operator;
mod probing;
mod publish;
mod schedule;
mod status;
#[cfg(test)]
pub(crate) mod tests;
mod verdicts;

use crate::config::{self, BackendAddress, Config, ProbeSpec};
use crate::health::{BackendHealth, ConnectFailure, Intent, Observation, ProbeOutcome, Transition};
use crate::table::Table;
use crate::table::state::{BackendId, BackendState, FrontendState};
use schedule::{Job, Schedule};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Something that happened.
#[derive(Debug)]
pub enum Event {
    /// A validated configuration whose listeners are bound.
    Configure(Arc<Config>),
    /// A probe asked for by [`Effect::Probe`] ended.
    Probed {
        /// Whom it probed.
        backend: BackendId,
        /// From the effect that asked for it.
        token: ProbeToken,
        /// How it ended.
        outcome: ProbeOutcome,
    },
    /// A session could not connect, and the backend or its path is to blame.
    ConnectFailed {
        /// To whom.
        backend: BackendId,
        /// How.
        failure: ConnectFailure,
        /// Failures since the last success, this one included.
        in_a_row: u32,
    },
    /// The time named by [`Controller::next_due`] has come.
    Tick,
}

/// Something for the shell to do.
#[derive(Debug)]
pub enum Effect {
    /// New sessions go by this table.
    Publish(Arc<Table>),
    /// Run one probe and report it as [`Event::Probed`].
    Probe {
        /// Whom.
        backend: BackendId,
        /// To be given back with the result.
        token: ProbeToken,
        /// Where.
        address: BackendAddress,
        /// How.
        spec: Arc<ProbeSpec>,
    },
    /// Write this to the log.
    Log(Transition),
    /// Write this to the log as a warning: nothing changed its standing, but
    /// somebody should know.
    Notice(Notice),
    /// Reset every session of that backend: its removal grace is over. Asked
    /// again every second while it still holds sessions.
    CutSessions(BackendId),
}

/// Names one probe for the life of the process, so that a late result is not
/// taken for a newer probe's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProbeToken(pub u64);

/// A warning that is no change of standing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// Pool name.
    pub pool: Arc<str>,
    /// Backend name, where it is about one.
    pub backend: Option<Arc<str>>,
    /// In words.
    pub message: String,
}

/// Why an operator's request was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OperatorError {
    /// No pool of that name.
    UnknownPool,
    /// No backend of that name in the pool.
    UnknownBackend,
}

/// A frontend as status shows it.
#[derive(Debug, Clone)]
pub struct FrontendStatus {
    /// Counters and identity.
    pub state: Arc<FrontendState>,
    /// Bind addresses.
    pub binds: Vec<std::net::SocketAddr>,
    /// Pool name.
    pub pool: Arc<str>,
    /// Cap; 0 means none.
    pub connections_max: u32,
}

/// A pool as status shows it.
#[derive(Debug, Clone)]
pub struct PoolStatus {
    /// Pool name.
    pub name: Arc<str>,
    /// Policy name.
    pub balance: &'static str,
    /// In file order.
    pub backends: Vec<BackendStatus>,
}

/// A backend as status shows it.
#[derive(Debug, Clone)]
pub struct BackendStatus {
    /// Counters and identity.
    pub state: Arc<BackendState>,
    /// From the file.
    pub weight: u32,
    /// As balanced by; 0 while it is not eligible.
    pub effective_weight: u32,
    /// From the file.
    pub backup: bool,
    /// Cap; 0 means none.
    pub connections_max: u32,
    /// Operator's wish.
    pub intent: Intent,
    /// Probes' verdict.
    pub observation: Observation,
    /// Passively ejected now.
    pub ejected: bool,
    /// Ejections so far.
    pub ejections_total: u64,
    /// Ejections the pool's guard held back so far.
    pub ejections_held_total: u64,
    /// Derived.
    pub eligible: bool,
    /// The newest change, if any.
    pub last_transition: Option<Transition>,
}

/// The whole picture at one moment.
#[derive(Debug, Clone)]
pub struct ControlStatus {
    /// Accepted configurations.
    pub generation: u64,
    /// In file order.
    pub frontends: Vec<FrontendStatus>,
    /// In file order.
    pub pools: Vec<PoolStatus>,
    /// Backends no longer configured that still hold sessions.
    pub leaving: Vec<Arc<BackendState>>,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Controller {
    workers: usize,
    rng: fastrand::Rng,
    generation: u64,
    serial: u64,
    connections_max: u32,
    /// In file order.
    frontends: Vec<FrontendEntry>,
    /// In file order.
    pools: Vec<PoolEntry>,
    /// Every configured backend, whichever pool it is in.
    backends: BTreeMap<BackendId, BackendEntry>,
    /// Removed backends that may still hold sessions.
    leaving: BTreeMap<BackendId, Leaving>,
    schedule: Schedule,
    ids: Ids,
    table: Arc<Table>,
    local_trouble_noticed: Option<Instant>,
    /// What the event at hand has touched; empty between events.
    work: Work,
}

/// A configured frontend.
#[derive(Debug)]
struct FrontendEntry {
    state: Arc<FrontendState>,
    spec: config::Frontend,
}

/// Names a pool for as long as its name stays configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct PoolId(u32);

/// A configured pool.
#[derive(Debug)]
struct PoolEntry {
    id: PoolId,
    spec: Arc<config::Pool>,
    /// In file order; all of them are in `Controller::backends`.
    members: Vec<BackendId>,
    startup: Startup,
}

/// How far a pool with probes is in getting to know its backends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Startup {
    /// No result yet; unknown backends wait.
    Waiting { since: Instant },
    /// No result came within `startup_grace`: unknown backends serve.
    Open,
    /// There was a result (or there is no probe).
    Decided,
}

/// A configured backend.
#[derive(Debug)]
struct BackendEntry {
    state: Arc<BackendState>,
    pool: PoolId,
    spec: config::Backend,
    health: BackendHealth,
    in_flight: Option<ProbeInFlight>,
    /// What the newest table says of it, to tell whether a new one is due.
    published: publish::Standing,
    last_transition: Option<Transition>,
}

/// A probe the shell was asked for.
#[derive(Debug, Clone, Copy)]
struct ProbeInFlight {
    token: ProbeToken,
    started: Instant,
    /// No result is expected any more from then on.
    lost_at: Instant,
    /// Its result means nothing any more; it only keeps the next one waiting.
    stale: bool,
}

/// A backend that is no longer configured.
#[derive(Debug)]
struct Leaving {
    entry: BackendEntry,
    /// Its sessions are to be cut from then on.
    cut_at: Option<Instant>,
}

/// Next free numbers; none is ever used twice.
#[derive(Debug, Default)]
struct Ids {
    backend: u32,
    frontend: u32,
    pool: u32,
    probe: u64,
}

/// What handling an event leaves to be finished once, however many events came
/// together.
#[derive(Debug, Default)]
struct Work {
    effects: Vec<Effect>,
    /// A new table is due whatever the backends' standings.
    rebuild: bool,
    /// Their standing may have changed.
    touched: BTreeSet<BackendId>,
    /// Their guard is to be looked at.
    unsettled: BTreeSet<PoolId>,
}

// === impl Controller ===

impl Controller {
    /// Nothing configured yet. `workers` sizes the counters' shards; `seed`
    /// drives probe jitter.
    pub fn new(workers: usize, seed: u64) -> Controller {
        Controller {
            workers,
            rng: fastrand::Rng::with_seed(seed),
            generation: 0,
            serial: 0,
            connections_max: 0,
            frontends: Vec::new(),
            pools: Vec::new(),
            backends: BTreeMap::new(),
            leaving: BTreeMap::new(),
            schedule: Schedule::default(),
            ids: Ids::default(),
            table: Arc::new(publish::empty_table()),
            local_trouble_noticed: None,
            work: Work::default(),
        }
    }

    /// Takes one event and gives what follows from it: at most one
    /// [`Effect::Publish`], which comes first, and none when sessions would be
    /// routed as before.
    ///
    /// Whatever is due by `now` is done before and after the event, so a late
    /// tick changes no verdict's order.
    pub fn apply(&mut self, event: Event, now: Instant) -> Vec<Effect> {
        self.apply_all([event], now)
    }

    /// As [`Controller::apply`], for all events that are at hand: ten thousand
    /// first results make one table.
    pub fn apply_all(
        &mut self,
        events: impl IntoIterator<Item = Event>,
        now: Instant,
    ) -> Vec<Effect> {
        self.run_due(now);
        for event in events {
            match event {
                Event::Configure(config) => self.configure(&config, now),
                Event::Probed { backend, token, outcome } => {
                    self.probed(backend, token, outcome, now);
                }
                Event::ConnectFailed { backend, failure, in_a_row } => {
                    self.connect_failed(backend, failure, in_a_row, now);
                }
                Event::Tick => {}
            }
        }
        self.finish(now)
    }

    /// Sets an operator's intent for one backend. Setting what is set already
    /// changes and logs nothing; an error changes nothing either.
    pub fn set_intent(
        &mut self,
        pool: &str,
        backend: &str,
        intent: Intent,
        now: Instant,
    ) -> Result<Vec<Effect>, OperatorError> {
        let id = self.find_backend(pool, backend)?;
        self.run_due(now);
        self.change_intent(id, intent, now);
        Ok(self.finish(now))
    }

    /// When [`Event::Tick`] is wanted next. Never before the last `now`.
    pub fn next_due(&self) -> Option<Instant> {
        self.schedule.next()
    }

    /// Accepted configurations so far.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The newest table; an empty one before the first configuration.
    pub fn current_table(&self) -> Arc<Table> {
        Arc::clone(&self.table)
    }

    fn run_due(&mut self, now: Instant) {
        while let Some(job) = self.schedule.pop_due(now) {
            match job {
                Job::Probe(id) => self.start_probe(id, now),
                Job::ProbeLost(id) => self.probe_lost(id, now),
                Job::EjectionEnds(id) => self.end_ejection(id, "its time is over", now),
                Job::GraceEnds(pool) => self.grace_over(pool),
                Job::CutSessions(id) => self.cut_sessions(id),
                Job::LeavingCheck => self.check_leaving(now),
            }
        }
    }

    /// Does what the events left to be done once, and hands out the effects.
    fn finish(&mut self, now: Instant) -> Vec<Effect> {
        self.run_due(now);
        while let Some(pool) = self.work.unsettled.pop_first() {
            self.settle_guard(pool, now);
        }
        let touched = std::mem::take(&mut self.work.touched);
        if std::mem::take(&mut self.work.rebuild) || touched.iter().any(|id| self.moved(*id)) {
            let table = self.rebuild();
            self.work.effects.insert(0, Effect::Publish(table));
        }
        std::mem::take(&mut self.work.effects)
    }

    /// The pool of that id. Pools are few, backends many: a scan will do.
    fn pool(&self, id: PoolId) -> Option<&PoolEntry> {
        self.pools.iter().find(|pool| pool.id == id)
    }

    fn pool_mut(&mut self, id: PoolId) -> Option<&mut PoolEntry> {
        self.pools.iter_mut().find(|pool| pool.id == id)
    }

    /// Records a change of a configured backend's standing.
    fn record(
        &mut self,
        id: BackendId,
        (from, to): (&'static str, &'static str),
        reason: String,
        lasted: Duration,
        now: Instant,
    ) {
        let Some(entry) = self.backends.get_mut(&id) else { return };
        let transition = Transition {
            pool: Arc::clone(&entry.state.pool),
            backend: Arc::clone(&entry.state.name),
            from,
            to,
            reason,
            at: now,
            lasted,
        };
        entry.last_transition = Some(transition.clone());
        self.work.effects.push(Effect::Log(transition));
        self.work.touched.insert(id);
        self.work.unsettled.insert(entry.pool);
    }
}
