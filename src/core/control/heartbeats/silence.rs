//! Silence of senders: performs the requests of the detectors and calls the guards before a
//! removal.
//!
//! Called by the controller for heartbeats, for results of confirmation probes, and at the
//! due times of the detectors. [`crate::suspicion`] decides when silence is suspicious, and
//! its guards allow or prevent a removal. This module ignores the content of heartbeats.

use super::HeartbeatWatch;
use crate::control::NoticeFields;
use crate::control::pools::{PoolEntry, PoolId};
use crate::control::schedule::TimerKind;
use crate::control::state::ControlState;
use crate::suspicion::guards::{FreezeChange, is_late, may_remove};
use crate::suspicion::{
    ArrivalOrder, BeatInfo, ChannelGuard, ChannelState, DetectorRequest, DetectorState,
    DetectorStep, PathGuard,
};
use crate::table::state::BackendId;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_heartbeat::SenderState;

/// Share of a pool that may be down at a time, if the pool has no ejection settings.
const MAX_DOWN_PERCENT: u8 = 50;

/// Shortest interval of the guard tick, which measures the lateness of the control loop.
const TICK_MIN: Duration = Duration::from_millis(50);

/// How often a delayed expiry is checked.
const HELD_EXPIRY_INTERVAL: Duration = Duration::from_secs(1);

/// Shortest time between two notices about ignored silence.
const STALL_NOTICE_INTERVAL: Duration = Duration::from_secs(60);

/// What the operator can do about silent backends that stay in rotation.
const HELP_PATH: &str = "check the backends, and the network between them and this host";

/// The guards over all pools and their counts.
#[derive(Debug, Default)]
pub(in crate::control) struct HeartbeatGuards {
    pub(in crate::control) channel: ChannelGuard,
    /// Guard over the backends of all pools together.
    pub(in crate::control) all: PathGuard,
    /// Backends that should send heartbeats, as of the last tick.
    live: usize,
    /// Longest interval of these backends.
    slowest: Duration,
    /// Times that silence was excluded for all backends.
    pub(in crate::control) excuses_total: u64,
    stall_noticed: Option<Instant>,
    /// Backends confirmed as down that the guards have not checked yet. `true`: proven.
    confirmed: VecDeque<(BackendId, bool)>,
}

/// Returns the share of the pool that may be down at a time, in percent.
pub(in crate::control) fn max_down_percent(pool: &PoolEntry) -> u8 {
    pool.spec.ejection.map_or(MAX_DOWN_PERCENT, |spec| spec.max_ejected_percent)
}

// === impl HeartbeatWatch ===

impl HeartbeatWatch {
    /// Passes a heartbeat that arrived `at` to the detector of its backend.
    pub(in crate::control) fn beat(
        &mut self,
        state: &mut ControlState,
        id: BackendId,
        beat: &BeatInfo,
        sender: SenderState,
        at: Instant,
        now: Instant,
    ) {
        let Some(heartbeats) = state.backends.heard(id) else { return };
        let (arrival, step) = if sender == SenderState::Stopping {
            (None, heartbeats.detector.stopping(at))
        } else {
            let (arrival, step) = heartbeats.detector.beat(beat, at);
            (Some(arrival), step)
        };
        let slowest = self.guards.slowest.max(beat.interval);
        if arrival != Some(ArrivalOrder::Old) && self.guards.channel.beat(slowest, at) {
            self.reconsider(state, None, now);
        }
        if !state.schedule.is_set(TimerKind::GuardTick) {
            self.guard_tick(state, now);
        }
        self.apply_step(state, id, step, now);
        state.rearm(id);
    }

    /// Checks the detector of a backend at its due time.
    pub(in crate::control) fn check_heartbeat(
        &mut self,
        state: &mut ControlState,
        id: BackendId,
        now: Instant,
    ) {
        let channel = self.channel(now);
        let Some(heartbeats) = state.backends.heard(id) else { return };
        let step = heartbeats.detector.check(channel, now);
        self.apply_step(state, id, step, now);
        state.rearm(id);
    }

    /// Passes a refused connect of a session to the detector.
    pub(in crate::control) fn refused(
        &mut self,
        state: &mut ControlState,
        id: BackendId,
        now: Instant,
    ) {
        let Some(heartbeats) = state.backends.heard(id) else { return };
        let step = heartbeats.detector.note_connect_refused(now);
        self.apply_step(state, id, step, now);
        state.rearm(id);
    }

    /// Handles heartbeats lost on this host. Each sender may be affected, so one interval of
    /// each silence is excluded. The total per silence is at most `ttl`, so that continuous
    /// losses do not keep a failed backend in rotation.
    pub(in crate::control) fn heartbeats_lost(
        &mut self,
        state: &mut ControlState,
        count: u64,
        now: Instant,
    ) {
        let fields = NoticeFields {
            reason: Some("the kernel of this host dropped heartbeats".to_owned()),
            dropped: Some(count),
            help: "reduce the load of this host; the sockets of the heartbeats overflowed",
            ..NoticeFields::default()
        };
        self.notice_ignored_silence(state, fields, now);
        self.guards.channel.ignore_silence(self.guards.slowest, now);
        for id in self.senders() {
            let Some(entry) = state.backends.get(id) else { continue };
            let spec = state.pool(entry.pool).and_then(|pool| pool.spec.heartbeat.as_ref());
            let expiry = spec.and_then(|spec| entry.expiry(spec));
            let most = expiry.map_or(Duration::ZERO, |(ttl, _)| ttl);
            let Some(heartbeats) = state.backends.heard(id) else { continue };
            let excused = heartbeats.excused_for_losses;
            let lost = heartbeats.interval.min(most.saturating_sub(excused));
            heartbeats.excused_for_losses += lost;
            if !lost.is_zero() {
                self.exclude_silence(state, id, lost, now);
            }
        }
    }

    /// Excludes the time `lost` from the silence of all backends, because the control loop
    /// was late.
    pub(in crate::control) fn ignore_silence(
        &mut self,
        state: &mut ControlState,
        lost: Duration,
        now: Instant,
    ) {
        let fields = NoticeFields {
            reason: Some("the control thread was late".to_owned()),
            late: Some(format!("{}ms", lost.as_millis())),
            help: "reduce the load of this host, or give Tidegate more CPU",
            ..NoticeFields::default()
        };
        self.notice_ignored_silence(state, fields, now);
        self.guards.channel.ignore_silence(lost, now);
        self.senders().into_iter().for_each(|id| self.exclude_silence(state, id, lost, now));
    }

    fn exclude_silence(
        &mut self,
        state: &mut ControlState,
        id: BackendId,
        lost: Duration,
        now: Instant,
    ) {
        let Some(heartbeats) = state.backends.heard(id) else { return };
        let silence = now.saturating_duration_since(heartbeats.last_at);
        heartbeats.excused = (heartbeats.excused + lost).min(silence);
        let step = heartbeats.detector.ignore_silence_until(lost, now);
        self.apply_step(state, id, step, now);
        state.rearm(id);
    }

    fn notice_ignored_silence(
        &mut self,
        state: &mut ControlState,
        fields: NoticeFields,
        now: Instant,
    ) {
        self.guards.excuses_total += 1;
        let quiet = |at: Instant| now.saturating_duration_since(at) < STALL_NOTICE_INTERVAL;
        if !self.guards.stall_noticed.is_some_and(quiet) {
            self.guards.stall_noticed = Some(now);
            state.warn(
                "".into(),
                "heartbeat silence ignored; the lost time does not count",
                fields,
            );
        }
    }

    /// Excludes the next gap in the sequence from the loss statistics, because heartbeats
    /// were merged on this host.
    pub(in crate::control) fn ignore_gap(
        &mut self,
        state: &mut ControlState,
        id: BackendId,
        at: Instant,
        now: Instant,
    ) {
        let Some(heartbeats) = state.backends.heard(id) else { return };
        let step = heartbeats.detector.ignore_silence_until(Duration::ZERO, at);
        self.apply_step(state, id, step, now);
    }

    /// Excludes silence if the guard tick is late.
    pub(in crate::control) fn notice_stall(&mut self, state: &mut ControlState, now: Instant) {
        let Some(due) = state.schedule.due(TimerKind::GuardTick) else { return };
        if is_late(due, now, state.tick_interval()) {
            let late = now.saturating_duration_since(due);
            self.ignore_silence(state, late, now);
            state.schedule.set(TimerKind::GuardTick, now + state.tick_interval());
        }
    }

    /// Performs the guard tick: counts the backends that should send heartbeats.
    pub(in crate::control) fn guard_tick(&mut self, state: &mut ControlState, now: Instant) {
        (self.guards.live, self.guards.slowest) = self.counts.all.expected();
        if !self.counts.all.senders.is_empty() {
            state.schedule.set(TimerKind::GuardTick, now + state.tick_interval());
        }
    }

    /// Checks a path guard; `None`: the guard over all pools.
    pub(in crate::control) fn check_guard(
        &mut self,
        state: &mut ControlState,
        pool: Option<PoolId>,
        now: Instant,
    ) {
        let guard = match pool {
            None => Some(&self.guards.all),
            Some(id) => state.pool(id).map(|pool| &pool.guard),
        };
        // Only a guard that can end its freeze needs the backends that are heard.
        let can_end = guard.is_some_and(|guard| guard.due().is_some_and(|at| at <= now));
        let view = if can_end {
            self.path_view(state, pool, now)
        } else {
            self.path_counts(state, pool, now)
        };
        let guard = match pool {
            None => Some(&mut self.guards.all),
            Some(id) => state.pools.observe(id).map(|pool| &mut pool.guard),
        };
        let Some(guard) = guard else { return };
        let change = guard.look(view, now);
        match guard.due() {
            Some(at) => state.schedule.set(TimerKind::CheckGuard(pool), at.max(now)),
            None => state.schedule.cancel(TimerKind::CheckGuard(pool)),
        }
        let Some(change) = change else { return };
        let name = pool.and_then(|id| state.pool(id)).map(|pool| Arc::clone(&pool.spec.name));
        let (message, reason, ended) = match change {
            FreezeChange::Started(why) => {
                ("removals frozen; silent backends stay in rotation", why, false)
            }
            FreezeChange::Ended(why) => {
                ("removals no longer frozen; silent backends leave rotation again", why, true)
            }
        };
        let fields = NoticeFields {
            reason: Some(reason),
            help: if ended { "" } else { HELP_PATH },
            ..NoticeFields::default()
        };
        state.warn(name.unwrap_or_else(|| "".into()), message, fields);
        if ended {
            self.reconsider(state, pool, now);
        }
    }

    /// Requests prevented removals again, because the guards may allow them now.
    fn reconsider(&mut self, state: &mut ControlState, pool: Option<PoolId>, now: Instant) {
        let counts = self.counts.of(pool);
        let suspects: Vec<BackendId> =
            counts.into_iter().flat_map(|counts| counts.suspects.iter().copied()).collect();
        for id in suspects {
            let Some(heartbeats) = state.backends.heard(id) else { continue };
            let step = heartbeats.detector.reconsider(now);
            self.apply_step(state, id, step, now);
            state.rearm(id);
        }
    }

    /// Removes the backends confirmed as down, if the guards allow it.
    pub(in crate::control) fn eject_confirmed(&mut self, state: &mut ControlState, now: Instant) {
        while let Some((id, proven)) = self.guards.confirmed.pop_front() {
            let Some(pool) = state.backends.get(id).map(|entry| entry.pool) else { continue };
            self.check_both_guards(state, pool, now);
            let allowed = self.permitted(state, pool, proven, now);
            let Some(entry) = state.backends.observe(id) else { continue };
            let Some(heartbeats) = &mut entry.heartbeats else { continue };
            match allowed {
                Ok(()) => {
                    let step = heartbeats.detector.eject(now);
                    self.apply_step(state, id, step, now);
                    state.rearm(id);
                }
                Err(objection) => {
                    let is_new = heartbeats.detector.hold_in_rotation(objection.clone());
                    let backend = Arc::clone(&entry.state);
                    state.verdict(id, "guard", "removal prevented", &objection);
                    if is_new {
                        let fields = NoticeFields {
                            reason: Some(objection),
                            help: HELP_PATH,
                            ..NoticeFields::default()
                        };
                        state.warn_of(&backend, "silent backend stays in rotation", fields);
                    }
                }
            }
        }
    }

    /// Returns the time of the next check if the expiry is delayed: the backend answers
    /// probes, and the cause of the silence can be on this host.
    pub(in crate::control) fn expiry_held(
        &self,
        state: &ControlState,
        id: BackendId,
        now: Instant,
    ) -> Option<Instant> {
        let entry = state.backends.get(id)?;
        let heartbeats = entry.heartbeats.as_deref()?;
        if !heartbeats.detector.answers(now) {
            return None;
        }
        let frozen = self.guards.all.freeze().is_some()
            || state.pool(entry.pool).is_some_and(|pool| pool.guard.freeze().is_some());
        let held = frozen || self.channel(now) == ChannelState::Silent;
        held.then(|| now + HELD_EXPIRY_INTERVAL)
    }

    /// Returns the state of the heartbeat channel.
    pub(in crate::control) fn channel(&self, now: Instant) -> ChannelState {
        self.guards.channel.state(self.guards.live, self.guards.slowest, now)
    }

    fn permitted(
        &self,
        state: &ControlState,
        pool: PoolId,
        proven: bool,
        now: Instant,
    ) -> Result<(), String> {
        let Some(entry) = state.pool(pool) else { return Ok(()) };
        let percent = max_down_percent(entry);
        let channel = self.channel(now);
        let view = match channel {
            ChannelState::Silent => self.path_view(state, Some(pool), now),
            ChannelState::Alive => self.path_counts(state, Some(pool), now),
        };
        let freezes = [entry.guard.freeze(), self.guards.all.freeze()];
        may_remove(proven, view, percent, channel, freezes)
    }

    /// Performs one step of a detector.
    pub(super) fn apply_step(
        &mut self,
        state: &mut ControlState,
        id: BackendId,
        step: DetectorStep,
        now: Instant,
    ) {
        self.count(state, id);
        if let Some(change) = step.change {
            state.verdict(id, "heartbeat", change.to.name(), &change.reason);
            state.heartbeat_health_changed(id, &change.reason, Some(change.lasted), now);
            if change.to == DetectorState::Suspect
                && let Some(pool) = state.backends.get(id).map(|entry| entry.pool)
            {
                self.check_both_guards(state, pool, now);
            }
        }
        match step.request {
            Some(DetectorRequest::Probe(next)) => state.start_try(id, next, now),
            Some(DetectorRequest::Eject { proven }) => {
                self.guards.confirmed.push_back((id, proven))
            }
            None => {}
        }
    }

    /// Checks the guard of a pool, and the guard over all pools if several have heartbeats.
    fn check_both_guards(&mut self, state: &mut ControlState, pool: PoolId, now: Instant) {
        self.check_guard(state, Some(pool), now);
        if state.pools.listening() > 1 {
            self.check_guard(state, None, now);
        }
    }

    /// Returns all backends with heartbeats.
    fn senders(&self) -> Vec<BackendId> {
        self.counts.all.senders.iter().copied().collect()
    }
}

// === impl ControlState ===

impl ControlState {
    /// Updates the heartbeat health of a backend. Records a transition if the observation
    /// has changed.
    pub(in crate::control) fn heartbeat_health_changed(
        &mut self,
        id: BackendId,
        reason: &str,
        lasted: Option<Duration>,
        now: Instant,
    ) {
        let Some(entry) = self.backends.touch(id) else { return };
        let Some(pool) = self.pools.get(entry.pool) else { return };
        let Some(spec) = &pool.spec.heartbeat else { return };
        let before = entry.health.observation();
        entry.health.heartbeat_health = entry.heartbeat_health(spec, now);
        let after = entry.health.observation();
        if before == after {
            // The eligibility of an unknown backend can still have changed.
            self.pending.unsettled.insert(entry.pool);
            return;
        }
        let lasted = lasted.unwrap_or_else(|| now.saturating_duration_since(entry.observed_since));
        entry.observed_since = now;
        self.record(id, (before.name(), after.name()), reason.to_owned(), lasted, now);
    }

    /// Sets the timer of the detector. Keeps an earlier timer: a check that is too early is
    /// harmless, and this avoids a schedule change per heartbeat.
    pub(in crate::control) fn rearm(&mut self, id: BackendId) {
        let heartbeats = self.backends.get(id).and_then(|entry| entry.heartbeats.as_deref());
        let Some(at) = heartbeats.and_then(|heartbeats| heartbeats.detector.due()) else { return };
        let job = TimerKind::Heartbeat(id);
        if self.schedule.is_set(job) {
            self.schedule.bring_forward(job, at);
        } else {
            self.schedule.set(job, at);
        }
    }

    fn tick_interval(&self) -> Duration {
        self.pools.fastest().unwrap_or(TICK_MIN).max(TICK_MIN)
    }
}
