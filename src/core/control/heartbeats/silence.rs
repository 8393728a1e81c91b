//! What silence means: the detectors' steps carried out, and the guards asked
//! before anything is taken out.
//!
//! Called by the controller with heartbeats, with the answers of confirming
//! probes and at the times the detectors ask for. What a silence is worth is
//! the detector's to say ([`crate::suspicion`]); whether it may have
//! consequences is the guards'. Nothing here looks at what a heartbeat asks for.

use super::HeartbeatWatch;
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

/// Most of a pool that silence may take out where the pool has no ejection of
/// its own to say it.
const MAX_DOWN_PERCENT: u8 = 50;

/// The guards' own tick is no finer, however short the intervals: it is there
/// to notice that we are late.
const TICK_MIN: Duration = Duration::from_millis(50);

/// How often an expiry that is held back is looked at.
const HELD_EXPIRY_INTERVAL: Duration = Duration::from_secs(1);

/// Own lateness is mentioned this often.
const STALL_NOTICE_INTERVAL: Duration = Duration::from_secs(60);

/// The guards over all pools, and what they have counted.
#[derive(Debug, Default)]
pub(in crate::control) struct HeartbeatGuards {
    pub(in crate::control) channel: ChannelGuard,
    /// Over the backends of all pools together.
    pub(in crate::control) all: PathGuard,
    /// Backends expected to be heard, as of the last tick.
    live: usize,
    /// The longest interval among them.
    slowest: Duration,
    /// Times everybody was excused for what we missed.
    pub(in crate::control) excuses_total: u64,
    stall_noticed: Option<Instant>,
    /// Confirmed to be gone; each waits for the guards' word. `true`: proven.
    confirmed: VecDeque<(BackendId, bool)>,
}

/// Share of the pool that may be out at once.
pub(in crate::control) fn max_down_percent(pool: &PoolEntry) -> u8 {
    pool.spec.ejection.map_or(MAX_DOWN_PERCENT, |spec| spec.max_ejected_percent)
}

// === impl HeartbeatWatch ===

impl HeartbeatWatch {
    /// A heartbeat of that backend arrived `at`.
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

    /// What its detector asked to be woken for.
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

    /// A session's connect was refused.
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

    /// So many heartbeats were lost on this machine. Any sender's next one may have
    /// been among them, so each is given the time of one more, but all in all no
    /// more than `ttl`: losses without end must not keep a dead backend.
    pub(in crate::control) fn heartbeats_lost(
        &mut self,
        state: &mut ControlState,
        count: u64,
        now: Instant,
    ) {
        let why = format!("heartbeats dropped by the kernel on this host: {count}");
        self.notice_excuse(state, &why, now);
        self.guards.channel.ignore_silence(self.guards.slowest, now);
        for id in self.senders() {
            let Some(entry) = state.backends.get(id) else { continue };
            let spec = state.pool(entry.pool).and_then(|pool| pool.spec.heartbeat.as_ref());
            let expiry = spec.and_then(|spec| entry.expiry(spec));
            let most = expiry.map_or(Duration::ZERO, |(ttl, _)| ttl);
            let Some(heartbeats) = state.backends.heard(id) else { continue };
            let lost = heartbeats.interval.min(most.saturating_sub(heartbeats.deaf));
            heartbeats.deaf += lost;
            if !lost.is_zero() {
                self.excuse(state, id, lost, now);
            }
        }
    }

    /// We were late by so much: that part of everybody's silence does not count.
    pub(in crate::control) fn ignore_silence(
        &mut self,
        state: &mut ControlState,
        lost: Duration,
        why: &str,
        now: Instant,
    ) {
        self.notice_excuse(state, why, now);
        self.guards.channel.ignore_silence(lost, now);
        self.senders().into_iter().for_each(|id| self.excuse(state, id, lost, now));
    }

    fn excuse(&mut self, state: &mut ControlState, id: BackendId, lost: Duration, now: Instant) {
        let Some(heartbeats) = state.backends.heard(id) else { return };
        let silence = now.saturating_duration_since(heartbeats.last_at);
        heartbeats.excused = (heartbeats.excused + lost).min(silence);
        let step = heartbeats.detector.ignore_silence_until(lost, now);
        self.apply_step(state, id, step, now);
        state.rearm(id);
    }

    fn notice_excuse(&mut self, state: &mut ControlState, why: &str, now: Instant) {
        self.guards.excuses_total += 1;
        let quiet = |at: Instant| now.saturating_duration_since(at) < STALL_NOTICE_INTERVAL;
        if !self.guards.stall_noticed.is_some_and(quiet) {
            self.guards.stall_noticed = Some(now);
            state.warn("".into(), format!("heartbeat silence ignored: {why}"));
        }
    }

    /// The next gap in its sequence is of our making.
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

    /// Notices that the guards' own tick is late.
    pub(in crate::control) fn notice_stall(&mut self, state: &mut ControlState, now: Instant) {
        let Some(due) = state.schedule.due(TimerKind::GuardTick) else { return };
        if is_late(due, now, state.tick_interval()) {
            let late = now.saturating_duration_since(due);
            let why = format!("the control thread was {} ms late", late.as_millis());
            self.ignore_silence(state, late, &why, now);
            state.schedule.set(TimerKind::GuardTick, now + state.tick_interval());
        }
    }

    /// The guards' own tick: counts who is expected to be heard.
    pub(in crate::control) fn guard_tick(&mut self, state: &mut ControlState, now: Instant) {
        (self.guards.live, self.guards.slowest) = self.counts.all.expected();
        if !self.counts.all.senders.is_empty() {
            state.schedule.set(TimerKind::GuardTick, now + state.tick_interval());
        }
    }

    /// A path guard asked to be woken; `None`: the one over all pools.
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
        // Who is heard matters to a guard that may thaw, and to no other.
        let thaws = guard.is_some_and(|guard| guard.due().is_some_and(|at| at <= now));
        let view = if thaws {
            self.path_view(state, pool, now)
        } else {
            self.path_counts(state, pool, now)
        };
        let guard = match pool {
            None => Some(&mut self.guards.all),
            Some(id) => state.pools.observe(id).map(|pool| &mut pool.guard),
        };
        let Some(guard) = guard else { return };
        let frost = guard.look(view, now);
        match guard.due() {
            Some(at) => state.schedule.set(TimerKind::CheckGuard(pool), at.max(now)),
            None => state.schedule.cancel(TimerKind::CheckGuard(pool)),
        }
        let Some(frost) = frost else { return };
        let name = pool.and_then(|id| state.pool(id)).map(|pool| Arc::clone(&pool.spec.name));
        let (message, thawed) = match frost {
            FreezeChange::Started(why) => {
                (format!("{why}; silent backends stay in rotation for now"), false)
            }
            FreezeChange::Ended(why) => {
                (format!("{why}; silent backends are removed from rotation again"), true)
            }
        };
        state.warn(name.unwrap_or_else(|| "".into()), message);
        if thawed {
            self.reconsider(state, pool, now);
        }
    }

    /// The guards may have changed their mind about whom they held back.
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

    /// Asks the guards about everybody who is confirmed to be gone.
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
                    if heartbeats.detector.hold_in_rotation(objection.clone()) {
                        let backend = Arc::clone(&entry.state);
                        let message = format!("silent backend stays in rotation: {objection}");
                        state.warn_of(&backend, message);
                    }
                }
            }
        }
    }

    /// Whether its `ttl` has to wait: it answers probes, and the silence may
    /// not be its own.
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

    /// What the heartbeats' channel as a whole is like.
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

    /// Carries one step of a detector out.
    pub(super) fn apply_step(
        &mut self,
        state: &mut ControlState,
        id: BackendId,
        step: DetectorStep,
        now: Instant,
    ) {
        self.count(state, id);
        if let Some(change) = step.change {
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

    /// A pool's guard, and the one over all where there are several pools.
    fn check_both_guards(&mut self, state: &mut ControlState, pool: PoolId, now: Instant) {
        self.check_guard(state, Some(pool), now);
        if state.pools.listening() > 1 {
            self.check_guard(state, None, now);
        }
    }

    /// Everybody whose heartbeats are (or were) heard.
    fn senders(&self) -> Vec<BackendId> {
        self.counts.all.senders.iter().copied().collect()
    }
}

// === impl ControlState ===

impl ControlState {
    /// Brings what its heartbeats amount to up to date; records what that makes
    /// of the backend, if it is anything new.
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
            // Unknown may serve or not.
            self.pending.unsettled.insert(entry.pool);
            return;
        }
        let lasted = lasted.unwrap_or_else(|| now.saturating_duration_since(entry.observed_since));
        entry.observed_since = now;
        self.record(id, (before.name(), after.name()), reason.to_owned(), lasted, now);
    }

    /// Wakes the detector when it wants to be; a little too early does no harm,
    /// and spares the schedule a change with every heartbeat.
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
