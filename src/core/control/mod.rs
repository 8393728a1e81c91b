//! The controller: the single writer of everything sessions are routed by.
//!
//! `daemon` feeds it events with the time and performs the effects it returns.
//! Pure: it does no I/O and reads no clock, so a test drives a year in a
//! millisecond.
//!
//! # The parts
//!
//! All parts work on one `ControlState` (`state`), whose sets keep their own fields:
//! `frontends`, `pools`, `backends`, `removal` (backends that have left), `schedule`. What
//! a change means is in the files beside, as methods of it: `probing` (when probes run),
//! `probe_results` (what they mean), `ejections` and `trials`, `ramps` (slow start),
//! `settling` (pools of which no backend has been judged yet), `members` (which backends a
//! pool has), `operator` and `intents` (drains).
//!
//! Three parts have state of their own and get the common one for a call: `heartbeats`
//! (who joins, what silence means), `slow_backends` (who does not answer) and `publish`
//! (which table is due, and building it). The [`Controller`] gives each event to the
//! parts it concerns and hands out the effects. `configure` takes a configuration,
//! `handover`, `sessions_elsewhere` and `intents` what other processes know; `status` and
//! `explain` show what there is.

mod backends;
mod configure;
mod ejections;
mod events;
pub mod explain;
mod frontends;
pub mod handover;
mod heartbeats;
mod history;
mod intents;
mod members;
mod operator;
mod pools;
mod probe_results;
mod probing;
mod publish;
mod ramps;
mod removal;
mod schedule;
pub mod sessions_elsewhere;
mod settling;
mod slow_backends;
pub mod source_ports;
mod state;
mod status;
#[cfg(test)]
pub(crate) mod tests;
mod trials;

pub use events::{ControlEffect, ControlEvent, Notice, OperatorError, ProbeLane, ProbeToken};
pub use heartbeats::SavedHeartbeats;
pub use heartbeats::ignored::HeartbeatIgnored;
pub use history::{SavedTransition, TRANSITIONS_MAX};
pub use intents::{REMOVED_INTENTS_FOR, REMOVED_INTENTS_MAX, SavedIntent};
pub use members::{MEMBERS_MAX, MemberSource, MembersIgnored, Origins};
pub use publish::Weight;
pub use publish::detached_build::BuildToken;
pub use publish::pacer::PublishReason;
pub use status::{
    BackendHeartbeatStatus, BackendStatus, ControlStatus, FreezeStatus, FrontendStatus, Gathering,
    HeartbeatChannelStatus, PoolStatus,
};

use crate::balance::in_flight::Counts;
use crate::health::{ConnectFailure, Intent, ProbeOutcome};
use crate::table::Table;
use crate::table::state::{BackendId, BackendState};
use heartbeats::HeartbeatWatch;
use publish::Publisher;
use schedule::TimerKind;
use slow_backends::SlowBackends;
use state::ControlState;
use std::sync::Arc;
use std::time::Instant;

/// See the module's documentation.
#[derive(Debug)]
pub struct Controller {
    state: ControlState,
    heartbeats: HeartbeatWatch,
    slow: SlowBackends,
    publisher: Publisher,
}

// === impl Controller ===

impl Controller {
    /// Nothing configured yet. `workers` sizes the counters' shards; `seed`
    /// drives probe jitter.
    pub fn new(workers: usize, seed: u64) -> Controller {
        Controller {
            state: ControlState::new(workers, seed),
            heartbeats: HeartbeatWatch::default(),
            slow: SlowBackends::default(),
            publisher: Publisher::new(),
        }
    }

    /// The same, with counts from there for every backend and frontend to come.
    pub fn counting(mut self, counts: Arc<dyn Counts>) -> Controller {
        self.state.allocator.counts = counts;
        self
    }

    /// Makes the parts of tables for pools of more than so many backends on another
    /// thread, and no others; for simulations with small pools.
    pub fn detach_builds_above(&mut self, members: usize) {
        self.publisher.detach_builds_above(members);
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
                    let at = (at.min(now), stands_for);
                    self.heartbeats.heartbeat(&mut self.state, &heartbeat, at, now);
                }
                ControlEvent::HeartbeatsLost(count) => {
                    self.heartbeats.heartbeats_lost(&mut self.state, count, now);
                }
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
                ControlEvent::Built { token, built, took } => {
                    self.publisher.built(&mut self.state, token, *built, took, now);
                }
                ControlEvent::Members { source, pool, revision, set } => {
                    let (state, heartbeats) = (&mut self.state, &mut self.heartbeats);
                    state.take_members(heartbeats, source, (&pool, revision), set, now);
                }
                ControlEvent::Heartbeat { .. }
                | ControlEvent::HeartbeatsLost(_)
                | ControlEvent::Tick => {}
            }
        }
        self.finish(now)
    }

    fn probed(&mut self, id: BackendId, token: ProbeToken, outcome: ProbeOutcome, now: Instant) {
        let state = &mut self.state;
        if !self.heartbeats.confirmation_result(state, id, token, &outcome, now) {
            state.probed(id, token, outcome, now);
        }
    }

    fn connect_failed(
        &mut self,
        id: BackendId,
        failure: ConnectFailure,
        (in_a_row, begun): (u32, Instant),
        now: Instant,
    ) {
        if !self.state.connect_failed(id, failure, (in_a_row, begun), now) {
            return;
        }
        if failure == ConnectFailure::Refused {
            self.heartbeats.refused(&mut self.state, id, now);
        }
        self.state.consider_ejection(id, failure, in_a_row, now);
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
        let id = self.state.find_backend(pool, backend)?;
        self.run_due(now);
        self.state.change_intent(id, intent, now);
        self.state.pending.cause = Some(PublishReason::Operator);
        Ok(self.finish(now))
    }

    /// When [`ControlEvent::Tick`] is wanted next. Never before the last `now`.
    pub fn next_due(&self) -> Option<Instant> {
        self.state.schedule.next()
    }

    /// Pool and name of a configured backend.
    pub fn name_of(&self, id: BackendId) -> Option<(Arc<str>, Arc<str>)> {
        let state = &self.state.backends.get(id)?.state;
        Some((Arc::clone(&state.pool), Arc::clone(&state.name)))
    }

    /// Accepted configurations so far.
    pub fn generation(&self) -> u64 {
        self.publisher.generation()
    }

    /// Every backend configured or registered, oldest first.
    pub fn backends(&self) -> impl Iterator<Item = &Arc<BackendState>> {
        self.backends_after(None)
    }

    /// Those that came after `last`, oldest first.
    pub fn backends_after(
        &self,
        last: Option<BackendId>,
    ) -> impl Iterator<Item = &Arc<BackendState>> {
        self.state.backends.after(last).map(|entry| &entry.state)
    }

    /// Whether it is configured, or has left and sessions are on it yet.
    pub fn is_known(&self, id: BackendId) -> bool {
        self.known(id).is_some()
    }

    /// Every backend that is known in that way.
    pub fn all_known(&self) -> impl Iterator<Item = BackendId> {
        self.every_known().map(|state| state.id)
    }

    /// How many backends there have been so far; goes around at 2^32.
    pub fn backends_seen(&self) -> u32 {
        self.state.allocator.backends_seen()
    }

    /// Sets of members and single members that changed nothing, by reason.
    pub fn ignored_members(&self) -> [(MembersIgnored, u64); MembersIgnored::ALL.len()] {
        MembersIgnored::ALL.map(|why| (why, self.state.ignored_members[why as usize]))
    }

    /// Pools in which no backend serves yet, and a first verdict is due.
    pub fn undecided_pools(&self) -> usize {
        self.publisher.table().pools.iter().filter(|pool| pool.undecided).count()
    }

    /// The newest table; an empty one before the first configuration.
    pub fn current_table(&self) -> Arc<Table> {
        Arc::clone(self.publisher.table())
    }

    fn run_due(&mut self, now: Instant) {
        let (state, heartbeats) = (&mut self.state, &mut self.heartbeats);
        heartbeats.notice_stall(state, now);
        while let Some(job) = state.schedule.pop_due(now) {
            match job {
                TimerKind::Probe(id) => state.start_probe(id, now),
                TimerKind::ProbeLost(id) => state.probe_lost(id, now),
                TimerKind::EjectionEnds(id) => state.begin_trial(id, now),
                TimerKind::CheckTrial(id) => state.check_trial(id, now),
                TimerKind::CheckSlow => self.slow.check(state, now),
                TimerKind::GraceEnds(pool) => state.grace_over(pool),
                TimerKind::SettlingEnds(pool) => state.settled(pool),
                TimerKind::ResetSessions(id) => state.reset_sessions(id),
                TimerKind::CheckRemoved => state.check_removed(now),
                TimerKind::Heartbeat(id) => heartbeats.check_heartbeat(state, id, now),
                TimerKind::HeartbeatTtl(id) => heartbeats.heartbeat_ttl(state, id, now),
                TimerKind::Forget(id) => heartbeats.forget(state, id, now),
                TimerKind::GuardTick => heartbeats.guard_tick(state, now),
                TimerKind::CheckGuard(pool) => heartbeats.check_guard(state, pool, now),
                TimerKind::Ramp(id) => state.ramp_step(id, now),
                // Whether a table or a part of one is due is asked at the end of every event.
                TimerKind::Publish | TimerKind::Build => {}
            }
        }
    }

    /// Does what the events left to be done once, and hands out the effects.
    fn finish(&mut self, now: Instant) -> Vec<ControlEffect> {
        self.run_due(now);
        let state = &mut self.state;
        self.heartbeats.eject_confirmed(state, now);
        while let Some(pool) = state.pending.unsettled.pop_first() {
            state.recheck_ejections(pool, now);
        }
        state.settle_ramps(now);
        state.look_at_settling();
        if let Some(table) = self.publisher.publish(state, now) {
            state.pending.effects.insert(0, ControlEffect::Publish(table));
        }
        self.publisher.begin_builds(state, now);
        (state.pending.cause, state.pending.at_once) = (None, false);
        #[cfg(debug_assertions)]
        {
            self.heartbeats.check_counts(state);
            self.publisher.check_noted(state);
        }
        std::mem::take(&mut state.pending.effects)
    }
}
