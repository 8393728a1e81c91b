//! The controller: the single writer of everything sessions are routed by.
//!
//! `daemon` feeds it events with the time and performs the effects it returns.
//! Pure: it does no I/O and reads no clock, so a test drives a year in a
//! millisecond.
//!
//! The files: `configure` (what a reload keeps), `probing` (when probes run),
//! `verdicts` (what their results mean), `ejections` (the pool's guard),
//! `pools` (finding them), `trials` (how ejected backends come back), `gray` (who does not answer),
//! `heartbeats` (who joins and what share it gets), `suspicion` (what silence
//! means), `tally` (how many are silent), `ramps` (slow start), `leaving` (removed backends), `intents` (what was
//! wanted of them), `settling` (pools of which no backend has been judged yet),
//! `elsewhere` (sessions of the processes before), `operator` (drains), `publish`,
//! `pace` and `apart` (tables), `history`, `handover` (what the
//! next process goes on with), `status` and `explain`.
//! All of them work on one [`Controller`] and leave effects behind;
//! only [`Controller::apply`] and its siblings hand them out.

mod apart;
mod backends;
mod configure;
mod ejections;
pub mod elsewhere;
mod events;
pub mod explain;
pub mod handover;
mod heartbeats;
mod history;
mod intents;
mod misfits;
mod operator;
mod pools;
mod probe_results;
mod probing;
mod publish;
mod publish_pacer;
mod ramps;
mod removal;
mod schedule;
mod settling;
mod slow_backends;
pub mod source_ports;
mod status;
mod suspicion;
mod tally;
#[cfg(test)]
pub(crate) mod tests;
mod trials;

pub use crate::control::publish_pacer::PublishReason;
pub use apart::BuildToken;
pub use events::{ControlEffect, ControlEvent, Notice, OperatorError, ProbeLane, ProbeToken};
pub use heartbeats::SavedHeart;
pub use history::{SavedTransition, TRANSITIONS_MAX};
pub use intents::{KEPT_FOR, KEPT_MAX, SavedIntent};
pub use misfits::HeartbeatIgnored;
pub use publish::Weight;
pub use status::{
    BackendHeartbeatStatus, BackendStatus, ControlStatus, FreezeStatus, FrontendStatus, Gathering,
    HeartbeatChannelStatus, PoolStatus,
};

use crate::balance::in_flight::{Counts, Unshared};
use crate::health::{Intent, Transition};
use crate::model;
use crate::suspicion::rejections::Rejections;
use crate::table::Table;
use crate::table::state::{BackendId, BackendState, FrontendState};
use backends::{BackendEntry, BackendSet, ProbeInFlight};
use pools::{PoolEntry, PoolId, PoolSet, StartupGrace};
use schedule::{Schedule, TimerKind};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// See the module's documentation.
#[derive(Debug)]
pub struct Controller {
    workers: usize,
    counts: Arc<dyn Counts>,
    rng: fastrand::Rng,
    generation: u64,
    serial: u64,
    connections_max: u32,
    /// In file order.
    frontends: Vec<FrontendEntry>,
    /// Positions in `frontends`.
    frontend_names: HashMap<Arc<str>, usize>,
    pools: PoolSet,
    /// Every configured backend, whichever pool it is in.
    backends: BackendSet,
    /// Removed backends that may still hold sessions.
    leaving: BTreeMap<BackendId, RemovedBackend>,
    /// Those of `leaving` by what makes them the same backend.
    left: HashMap<configure::BackendKey, BackendId>,
    /// Every backend that is ejected or on trial; some may not be any more.
    out: BTreeSet<(PoolId, BackendId)>,
    /// The same of those that are suspect.
    suspects: BTreeSet<(PoolId, BackendId)>,
    /// The look at first bytes that is under way.
    round: crate::control::slow_backends::Round,
    /// What operators wanted of backends that have left.
    kept: intents::KeptIntent,
    /// Where our own listeners are bound.
    own: std::collections::HashSet<SocketAddr>,
    schedule: Schedule,
    ids: IdAllocator,
    table: Arc<Table>,
    local_trouble_noticed: Option<Instant>,
    pace: crate::control::publish_pacer::PublishPacer,
    builds: apart::Builds,
    guards: suspicion::HeartbeatGuards,
    tallies: tally::Tallies,
    /// Authentic heartbeats that changed nothing, by [`HeartbeatIgnored`].
    misfits: [u64; HeartbeatIgnored::ALL.len()],
    /// Their senders.
    rejections: Rejections,
    /// Counted by the processes before.
    before: handover::CarriedCounts,
    /// Heartbeats taken.
    heartbeats_total: u64,
    /// What the event at hand has touched; empty between events.
    work: PendingEffects,
}

/// A configured frontend.
#[derive(Debug)]
struct FrontendEntry {
    state: Arc<FrontendState>,
    spec: model::FrontendConfig,
}

/// How a backend got into its pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemberSourceKind {
    /// It stands in the file.
    File,
    /// Its heartbeats brought it.
    Registered,
}

/// A backend that is no longer configured.
#[derive(Debug)]
struct RemovedBackend {
    entry: BackendEntry,
    /// Its sessions are to be cut from then on.
    cut_at: Option<Instant>,
}

/// Next free numbers; none is ever used twice.
#[derive(Debug, Default)]
struct IdAllocator {
    backend: u32,
    frontend: u32,
    pool: u32,
    probe: u64,
}

/// What handling an event leaves to be finished once, however many events came
/// together.
#[derive(Debug, Default)]
struct PendingEffects {
    effects: Vec<ControlEffect>,
    /// A new table is due whatever the backends' standings.
    rebuild: Option<PublishReason>,
    /// Who caused it, where it was not health.
    cause: Option<PublishReason>,
    /// Their guard is to be looked at.
    unsettled: BTreeSet<PoolId>,
    /// Shut, and not in the table that is about to be published.
    reopen: Vec<Arc<BackendState>>,
    /// Large pools' parts of the table are made at once, too.
    at_once: bool,
}

// === impl Controller ===

impl Controller {
    /// Nothing configured yet. `workers` sizes the counters' shards; `seed`
    /// drives probe jitter.
    pub fn new(workers: usize, seed: u64) -> Controller {
        Controller {
            workers,
            counts: Arc::new(Unshared),
            rng: fastrand::Rng::with_seed(seed),
            generation: 0,
            serial: 0,
            connections_max: 0,
            frontends: Vec::new(),
            frontend_names: HashMap::new(),
            pools: PoolSet::default(),
            backends: BackendSet::default(),
            leaving: BTreeMap::new(),
            left: HashMap::new(),
            out: BTreeSet::new(),
            suspects: BTreeSet::new(),
            round: crate::control::slow_backends::Round::default(),
            kept: intents::KeptIntent::default(),
            own: Default::default(),
            schedule: Schedule::default(),
            ids: IdAllocator::default(),
            table: Arc::new(publish::empty_table()),
            local_trouble_noticed: None,
            pace: crate::control::publish_pacer::PublishPacer::default(),
            builds: apart::Builds::default(),
            guards: suspicion::HeartbeatGuards::default(),
            tallies: tally::Tallies::default(),
            misfits: [0; HeartbeatIgnored::ALL.len()],
            rejections: Rejections::default(),
            before: handover::CarriedCounts::default(),
            heartbeats_total: 0,
            work: PendingEffects::default(),
        }
    }

    /// The same, with counts from there for every backend and frontend to come.
    pub fn counting(self, counts: Arc<dyn Counts>) -> Controller {
        Controller { counts, ..self }
    }

    /// Takes one event and gives what follows from it: at most one
    /// [`ControlEffect::Publish`], which comes first, and none when sessions would be
    /// routed as before.
    ///
    /// Whatever is due by `now` is done before and after the event, so a late
    /// tick changes no verdict's order.
    pub fn apply(&mut self, event: ControlEvent, now: Instant) -> Vec<ControlEffect> {
        self.apply_all([event], now)
    }

    /// As [`Controller::apply`], for all events that are at hand: ten thousand
    /// first results make one table.
    pub fn apply_all(
        &mut self,
        events: impl IntoIterator<Item = ControlEvent>,
        now: Instant,
    ) -> Vec<ControlEffect> {
        // Heartbeats that have arrived come first: what is due may be a silence
        // that they have ended.
        let mut later = Vec::new();
        for event in events {
            match event {
                ControlEvent::Heartbeat { heartbeat, at, stands_for } => {
                    self.heartbeat(&heartbeat, (at.min(now), stands_for), now);
                }
                ControlEvent::HeartbeatsLost(count) => self.heartbeats_lost(count, now),
                other => later.push(other),
            }
        }
        self.run_due(now);
        for event in later {
            match event {
                ControlEvent::Configure(config) => self.configure(&config, now),
                ControlEvent::Probed { backend, token, outcome } => {
                    self.probed(backend, token, outcome, now);
                }
                ControlEvent::ConnectFailed { backend, failure, in_a_row, begun } => {
                    self.connect_failed(backend, failure, (in_a_row, begun), now);
                }
                ControlEvent::Built { token, built, took } => self.built(token, *built, took, now),
                ControlEvent::Heartbeat { .. }
                | ControlEvent::HeartbeatsLost(_)
                | ControlEvent::Tick => {}
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
    ) -> Result<Vec<ControlEffect>, OperatorError> {
        let id = self.find_backend(pool, backend)?;
        self.run_due(now);
        self.change_intent(id, intent, now);
        self.work.cause = Some(PublishReason::Operator);
        Ok(self.finish(now))
    }

    /// When [`ControlEvent::Tick`] is wanted next. Never before the last `now`.
    pub fn next_due(&self) -> Option<Instant> {
        self.schedule.next()
    }

    /// Pool and name of a configured backend.
    pub fn name_of(&self, id: BackendId) -> Option<(Arc<str>, Arc<str>)> {
        let state = &self.backends.get(id)?.state;
        Some((Arc::clone(&state.pool), Arc::clone(&state.name)))
    }

    /// Accepted configurations so far.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Every backend configured or registered, in no order.
    pub fn backends(&self) -> impl Iterator<Item = &Arc<BackendState>> {
        self.backends.iter().map(|entry| &entry.state)
    }

    /// Those that came after `last`, oldest first.
    pub fn backends_after(
        &self,
        last: Option<BackendId>,
    ) -> impl Iterator<Item = &Arc<BackendState>> {
        self.backends.after(last).map(|entry| &entry.state)
    }

    /// The newest table; an empty one before the first configuration.
    pub fn current_table(&self) -> Arc<Table> {
        Arc::clone(&self.table)
    }

    fn run_due(&mut self, now: Instant) {
        self.notice_stall(now);
        while let Some(job) = self.schedule.pop_due(now) {
            match job {
                TimerKind::Probe(id) => self.start_probe(id, now),
                TimerKind::ProbeLost(id) => self.probe_lost(id, now),
                TimerKind::EjectionEnds(id) => self.begin_trial(id, now),
                TimerKind::CheckTrial(id) => self.check_trial(id, now),
                TimerKind::CheckSlow => self.check_slow_backends(now),
                TimerKind::GraceEnds(pool) => self.grace_over(pool),
                TimerKind::SettlingEnds(pool) => self.settled(pool),
                TimerKind::CutSessions(id) => self.reset_sessions(id),
                TimerKind::LeavingCheck => self.check_leaving(now),
                TimerKind::Heartbeat(id) => self.check_heartbeat(id, now),
                TimerKind::HeartbeatTtl(id) => self.heartbeat_ttl(id, now),
                TimerKind::Forget(id) => self.forget(id, now),
                TimerKind::GuardTick => self.guard_tick(now),
                TimerKind::CheckGuard(pool) => self.check_guard(pool, now),
                TimerKind::Ramp(id) => self.ramp_step(id, now),
                // Whether a table or a part of one is due is asked at the end of every event.
                TimerKind::Publish | TimerKind::Build => {}
            }
        }
    }

    /// Does what the events left to be done once, and hands out the effects.
    fn finish(&mut self, now: Instant) -> Vec<ControlEffect> {
        self.run_due(now);
        self.eject_confirmed(now);
        while let Some(pool) = self.work.unsettled.pop_first() {
            self.recheck_ejections(pool, now);
        }
        self.settle_ramps(now);
        self.look_at_settling();
        if let Some(reason) = self.table_due(now) {
            let table = self.rebuild(reason);
            self.table_made(reason, table.is_some(), now);
            if let Some(table) = table {
                self.work.effects.insert(0, ControlEffect::Publish(table));
            }
        }
        self.begin_builds(now);
        (self.work.cause, self.work.at_once) = (None, false);
        #[cfg(debug_assertions)]
        self.check_tallies();
        #[cfg(debug_assertions)]
        self.check_noted();
        std::mem::take(&mut self.work.effects)
    }

    /// The pool of that number.
    fn pool(&self, id: PoolId) -> Option<&PoolEntry> {
        self.pools.get(id)
    }

    /// Records a change of a configured backend's standing.
    fn record(
        &mut self,
        id: BackendId,
        names: (&'static str, &'static str),
        reason: String,
        lasted: Duration,
        now: Instant,
    ) {
        self.backends.touch(id);
        self.record_lazily(id, names, reason, lasted, now);
    }

    /// As [`Controller::record`], where the table may wait.
    fn record_lazily(
        &mut self,
        id: BackendId,
        (from, to): (&'static str, &'static str),
        reason: String,
        lasted: Duration,
        now: Instant,
    ) {
        let Some(entry) = self.backends.touch_later(id) else { return };
        let transition = Transition {
            pool: Arc::clone(&entry.state.pool),
            backend: Arc::clone(&entry.state.name),
            from,
            to,
            reason,
            at: now,
            lasted,
        };
        entry.history.add(transition.clone());
        self.work.effects.push(ControlEffect::Log(transition));
        self.work.unsettled.insert(entry.pool);
    }
}
