//! The controller: the only writer of the routing tables.
//!
//! `daemon` passes in events with the time and performs the effects that the controller
//! returns. It does no I/O and reads no clock, so a test simulates a year within
//! milliseconds.
//!
//! # Parts
//!
//! The [`Controller`] passes each event to the parts it concerns, and returns the effects.
//!
//! - **State.** All parts use one `ControlState` (`state`) with the sets `frontends`,
//!   `pools`, `backends`, `removal` (removed backends) and `schedule` (timers).
//! - **Rules**, as methods of `ControlState`: `probing` (when probes run),
//!   `probe_results`, `ejections`, `trials`, `ramps` (slow start), `settling` (pools
//!   without results after a start or reload), `on_down` (sessions of backends that are down),
//!   `on_recover` (sessions of backups that no longer serve),   `roles` (pools that follow others), `members` (the backends of a pool), `views` (what
//!   member sources list), `operator`, `intents` and `groups` (drains).
//! - **Parts with their own state**, which borrow the `ControlState` for a call:
//!   `heartbeats` (registration, silence), `slow_backends` (missing first bytes) and
//!   `publish` (building the tables).
//! - **Input.** `configure` applies a configuration. `handover`, `sessions_elsewhere` and
//!   `intents` apply the state of other processes.
//! - **Output.** `status`, `explain`, `names` and `what_if`.

mod agents;
mod backends;
mod configure;
mod ejections;
mod events;
pub mod explain;
mod frontends;
mod groups;
pub mod handover;
mod heartbeats;
mod history;
mod intents;
mod members;
pub mod names;
mod on_down;
mod on_recover;
mod operator;
mod pools;
mod probe_results;
mod probing;
mod publish;
mod ramps;
mod removal;
mod renamed;
mod roles;
mod schedule;
pub mod sessions_elsewhere;
mod settling;
pub mod shown;
mod slow_backends;
pub mod source_ports;
mod state;
mod status;
#[cfg(test)]
pub(crate) mod tests;
mod trials;
mod views;
pub mod what_if;

pub use agents::SavedAgent;
pub use events::{
    ControlEffect, ControlEvent, DetectorVerdict, Notice, NoticeFields, NoticeLevel, OperatorError,
    ProbeLane, ProbeToken,
};
pub use heartbeats::SavedHeartbeats;
pub use heartbeats::ignored::HeartbeatIgnored;
pub use history::{SavedTransition, TRANSITIONS_MAX};
pub use intents::{REMOVED_INTENTS_FOR, REMOVED_INTENTS_MAX, SavedIntent};
pub use members::{MemberSource, MembersIgnored, Origins};
pub use publish::detached_build::BuildToken;
pub use publish::pacer::PublishReason;
pub use publish::{WEIGHT_PARTS, Weight};
pub use roles::SavedRole;
pub use status::{
    BackendHeartbeatStatus, BackendStatus, ControlStatus, FreezeStatus, FrontendStatus, Gathering,
    HeartbeatChannelStatus, PoolStatus,
};
pub use views::saved::SavedViews;
pub use views::{AnnouncedBy, SourceStatus};

pub use crate::discovery::MEMBERS_MAX;

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
use std::time::{Duration, Instant};

/// See the module documentation.
#[derive(Debug)]
pub struct Controller {
    state: ControlState,
    heartbeats: HeartbeatWatch,
    slow: SlowBackends,
    publisher: Publisher,
}

// === impl Controller ===

impl Controller {
    /// Returns a controller without a configuration. `workers` is the number of shards of
    /// each counter; `seed` is the seed of the probe jitter.
    pub fn new(workers: usize, seed: u64) -> Controller {
        Controller {
            state: ControlState::new(workers, seed),
            heartbeats: HeartbeatWatch::default(),
            slow: SlowBackends::default(),
            publisher: Publisher::new(),
        }
    }

    /// Sets the source of the counters of all future backends and frontends.
    pub fn counting(mut self, counts: Arc<dyn Counts>) -> Controller {
        self.state.allocator.counts = counts;
        self
    }

    /// Builds table parts on another thread for pools with more than `members` backends,
    /// and for no other pools. For simulations with small pools.
    pub fn detach_builds_above(&mut self, members: usize) {
        self.publisher.detach_builds_above(members);
    }

    /// Applies one event and returns its effects. A [`ControlEffect::Publish`] is the first
    /// effect. There is at most one, and none if routing has not changed.
    ///
    /// Timers that are due by `now` run before and after the event, so a late tick does not
    /// change the order of results.
    pub fn apply(&mut self, event: ControlEvent, now: Instant) -> Vec<ControlEffect> {
        self.apply_all([event], now)
    }

    /// As [`Controller::apply`], for all events that have arrived. They cause at most one
    /// table together.
    pub fn apply_all(
        &mut self,
        events: impl IntoIterator<Item = ControlEvent>,
        now: Instant,
    ) -> Vec<ControlEffect> {
        // Heartbeats first: a heartbeat in this batch can end a silence whose timer is due.
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
                ControlEvent::Told { key, told, at } => {
                    self.state.told(&mut self.heartbeats, &key, told, at, now);
                }
                ControlEvent::Heartbeat { .. }
                | ControlEvent::HeartbeatsLost(_)
                | ControlEvent::Tick => {}
            }
        }
        self.finish(now)
    }

    /// Tells how long the last events took, with their effects, until `now`. Tables and
    /// answers of member sources that can wait are delayed accordingly.
    pub fn took(&mut self, took: Duration, now: Instant) {
        self.publisher.took(&mut self.state, took, now);
    }

    fn probed(&mut self, id: BackendId, token: ProbeToken, outcome: ProbeOutcome, now: Instant) {
        let state = &mut self.state;
        if !self.heartbeats.confirmation_result(state, id, token, &outcome, now)
            && !state.verification_result(id, token, &outcome, now)
        {
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

    /// Sets the operator's intent for one backend, or for all members of a backend whose
    /// address is a name, also for those that join later. An intent that is already set changes
    /// and logs nothing, and neither does an error.
    pub fn set_intent(
        &mut self,
        pool: &str,
        backend: &str,
        intent: Intent,
        now: Instant,
    ) -> Result<Vec<ControlEffect>, OperatorError> {
        let ids = self.state.find_backends(pool, backend)?;
        self.run_due(now);
        self.state.change_group(pool, backend, intent, now);
        ids.into_iter().for_each(|id| self.state.change_intent(id, intent, now));
        self.state.pending.cause = Some(PublishReason::Operator);
        Ok(self.finish(now))
    }

    /// Returns when the next [`ControlEvent::Tick`] is due; never before the last `now`.
    pub fn next_due(&self) -> Option<Instant> {
        self.state.schedule.next()
    }

    /// Returns pool and name of a configured backend.
    pub fn name_of(&self, id: BackendId) -> Option<(Arc<str>, Arc<str>)> {
        let state = &self.state.backends.get(id)?.state;
        Some((Arc::clone(&state.pool), Arc::clone(&state.name)))
    }

    /// Returns the number of accepted configurations.
    pub fn generation(&self) -> u64 {
        self.publisher.generation()
    }

    /// Returns all configured or registered backends, oldest first.
    pub fn backends(&self) -> impl Iterator<Item = &Arc<BackendState>> {
        self.backends_after(None)
    }

    /// Returns the backends added after `last`, oldest first.
    pub fn backends_after(
        &self,
        last: Option<BackendId>,
    ) -> impl Iterator<Item = &Arc<BackendState>> {
        self.state.backends.after(last).map(|entry| &entry.state)
    }

    /// Whether the backend is configured, or was removed and still has sessions.
    pub fn is_known(&self, id: BackendId) -> bool {
        self.known(id).is_some()
    }

    /// Returns all backends for which [`Controller::is_known`] holds.
    pub fn all_known(&self) -> impl Iterator<Item = BackendId> {
        self.every_known().map(|state| state.id)
    }

    /// Returns the number of backends created so far; wraps at 2^32.
    pub fn backends_seen(&self) -> u32 {
        self.state.allocator.backends_seen()
    }

    /// Returns how often members or tellings of their sources were ignored, by reason.
    pub fn ignored_members(&self) -> [(MembersIgnored, u64); MembersIgnored::ALL.len()] {
        MembersIgnored::ALL.map(|why| (why, self.state.ignored_members[why as usize]))
    }

    /// Returns the number of pools without an eligible backend that wait for a first
    /// result.
    pub fn undecided_pools(&self) -> usize {
        self.publisher.table().pools.iter().filter(|pool| pool.undecided).count()
    }

    /// Returns the newest table; an empty table before the first configuration.
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
                TimerKind::GraceEnds(pool) => {
                    state.end_startup_grace(pool);
                    state.open_unverified(Some(pool), now);
                }
                TimerKind::SettlingEnds(pool) => state.settled(pool),
                TimerKind::ResetSessions(id) => state.reset_sessions(id),
                TimerKind::CutSessions(id) => state.cut_sessions(id, now),
                TimerKind::CloseReleased(id) => state.close_released(id, now),
                TimerKind::CheckRemoved => state.check_removed(now),
                TimerKind::Heartbeat(id) => heartbeats.check_heartbeat(state, id, now),
                TimerKind::HeartbeatTtl(id) => heartbeats.heartbeat_ttl(state, id, now),
                TimerKind::Forget(id) => heartbeats.forget(state, id, now),
                TimerKind::GuardTick => heartbeats.guard_tick(state, now),
                TimerKind::CheckGuard(pool) => heartbeats.check_guard(state, pool, now),
                TimerKind::Verify(id) => state.verify(id, now),
                TimerKind::View(id) => state.step_view(heartbeats, id, now),
                TimerKind::Ramp(id) => state.ramp_step(id, now),
                // `finish` checks after every event whether a table or a build is due.
                TimerKind::Publish | TimerKind::Build => {}
            }
        }
    }

    /// Completes the events: performs pending work once and returns the effects.
    fn finish(&mut self, now: Instant) -> Vec<ControlEffect> {
        self.run_due(now);
        let state = &mut self.state;
        self.heartbeats.eject_confirmed(state, now);
        state.follow_members(&mut self.heartbeats, now);
        state.follow_health(now);
        state.settle_roles(now);
        while let Some(pool) = state.pending.unsettled.pop_first() {
            state.recheck_ejections(pool, now);
        }
        state.settle_sessions(now);
        state.settle_released(now);
        state.settle_ramps(now);
        state.check_settling(now);
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
