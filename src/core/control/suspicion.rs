//! What silence means: the detectors' steps carried out, and the guards asked
//! before anything is taken out.
//!
//! Called by the controller with heartbeats, with the answers of confirming
//! probes and at the times the detectors ask for. What a silence is worth is
//! the detector's to say ([`crate::suspicion`]); whether it may have
//! consequences is the guards'. Nothing here looks at what a heartbeat asks for.

use super::heartbeats::ttl;
use super::schedule::TimerKind;
use super::{ControlEffect, Controller, MemberSourceKind, Notice, PoolId, ProbeLane, ProbeToken};
use crate::health::{HeartbeatHealth, ProbeOutcome, REFUSED};
use crate::model;
use crate::model::{HeartbeatSpec, ProbeKind, ProbeSpec};
use crate::suspicion::guards::{FreezeChange, is_late, may_remove};
use crate::suspicion::{
    ArrivalOrder, BeatInfo, ChannelGuard, ChannelState, ConfirmationTry, DetectorRequest,
    DetectorState, DetectorStep, PathGuard, TRY_TIMEOUT_MAX, TRY_TIMEOUT_MIN, TryId, TryResult,
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

/// A try that is being made for the detector.
#[derive(Debug, Clone, Copy)]
pub(super) struct ConfirmationInFlight {
    pub(super) token: ProbeToken,
    id: TryId,
    /// No result is expected any more from then on.
    pub(super) lost_at: Instant,
}

/// The guards over all pools, and what they have counted.
#[derive(Debug, Default)]
pub(super) struct HeartbeatGuards {
    pub(super) channel: ChannelGuard,
    /// Over the backends of all pools together.
    pub(super) all: PathGuard,
    /// Backends expected to be heard, as of the last tick.
    live: usize,
    /// The longest interval among them.
    slowest: Duration,
    /// Times everybody was excused for what we missed.
    pub(super) excuses_total: u64,
    stall_noticed: Option<Instant>,
    /// Confirmed to be gone; each waits for the guards' word. `true`: proven.
    confirmed: VecDeque<(BackendId, bool)>,
}

/// The probe that confirms a suspicion in a pool: of its own kind, or a plain
/// connect. Its time-out is the longest a try may have: what the pool itself
/// allows, within the detector's bounds.
pub(super) fn confirming(pool: &model::PoolConfig) -> Arc<ProbeSpec> {
    let kind = pool.probe.as_ref().map_or(ProbeKind::Tcp, |spec| spec.kind.clone());
    let allowed = pool.probe.as_ref().map_or(pool.connect_timeout, |spec| spec.timeout);
    let timeout = allowed.clamp(TRY_TIMEOUT_MIN, TRY_TIMEOUT_MAX);
    Arc::new(ProbeSpec {
        kind,
        interval: timeout,
        fast_interval: timeout,
        timeout,
        rise: 1,
        fall: 1,
        source: Arc::clone(&pool.source),
    })
}

// === impl Controller ===

impl Controller {
    /// A heartbeat of that backend arrived `at`.
    pub(super) fn beat(
        &mut self,
        id: BackendId,
        beat: &BeatInfo,
        state: SenderState,
        at: Instant,
        now: Instant,
    ) {
        let Some(entry) = self.backends.observe(id) else { return };
        let Some(heart) = &mut entry.heart else { return };
        let (arrival, step) = if state == SenderState::Stopping {
            (None, heart.detector.stopping(at))
        } else {
            let (arrival, step) = heart.detector.beat(beat, at);
            (Some(arrival), step)
        };
        let slowest = self.guards.slowest.max(beat.interval);
        if arrival != Some(ArrivalOrder::Old) && self.guards.channel.beat(slowest, at) {
            self.reconsider(None, now);
        }
        if !self.schedule.is_set(TimerKind::GuardTick) {
            self.guard_tick(now);
        }
        self.apply_step(id, step, now);
        self.rearm(id);
    }

    /// What its detector asked to be woken for.
    pub(super) fn check_heartbeat(&mut self, id: BackendId, now: Instant) {
        let channel = self.channel(now);
        let Some(entry) = self.backends.observe(id) else { return };
        let Some(heart) = &mut entry.heart else { return };
        let step = heart.detector.check(channel, now);
        self.apply_step(id, step, now);
        self.rearm(id);
    }

    /// A session's connect was refused.
    pub(super) fn refused(&mut self, id: BackendId, now: Instant) {
        let Some(entry) = self.backends.observe(id) else { return };
        let Some(heart) = &mut entry.heart else { return };
        let step = heart.detector.note_connect_refused(now);
        self.apply_step(id, step, now);
        self.rearm(id);
    }

    /// The result of a try; false if that token belongs to none.
    pub(super) fn confirmation_result(
        &mut self,
        id: BackendId,
        token: ProbeToken,
        outcome: &ProbeOutcome,
        now: Instant,
    ) -> bool {
        let Some(entry) = self.backends.observe(id) else { return false };
        let Some(trying) = entry.trying.take_if(|trying| trying.token == token) else {
            return false;
        };
        if let ProbeOutcome::Local { reason } = outcome {
            self.note_local_error(id, reason, now);
        }
        let Some(entry) = self.backends.observe(id) else { return true };
        let Some(heart) = &mut entry.heart else { return true };
        let answer = match outcome {
            ProbeOutcome::Success { .. } => TryResult::Answered,
            ProbeOutcome::Failure { reason } if reason == REFUSED => TryResult::Refused,
            ProbeOutcome::Failure { reason } => TryResult::Failed(reason.clone()),
            ProbeOutcome::Local { .. } => TryResult::Local,
        };
        let step = heart.detector.probed(trying.id, answer, now);
        let quiet = step.change.is_none();
        self.apply_step(id, step, now);
        if quiet {
            // Whether it answers may have changed nonetheless.
            self.pulse_changed(id, "a confirming probe was answered", None, now);
        }
        self.rearm(id);
        true
    }

    /// So many heartbeats were lost on this machine. Any sender's next one may have
    /// been among them, so each is given the time of one more, but all in all no
    /// more than `ttl`: losses without end must not keep a dead backend.
    pub(super) fn heartbeats_lost(&mut self, count: u64, now: Instant) {
        let s = if count == 1 { " was" } else { "s were" };
        self.notice_excuse(&format!("{count} heartbeat{s} lost on this machine"), now);
        self.guards.channel.ignore_silence(self.guards.slowest, now);
        for id in self.senders() {
            let Some(entry) = self.backends.observe(id) else { continue };
            let Some(heart) = &mut entry.heart else { continue };
            let pool = self.pools.get(entry.pool);
            let spec = pool.and_then(|pool| pool.spec.heartbeat.as_ref());
            let most = spec.map_or(Duration::ZERO, |spec| ttl(spec, heart.interval));
            let lost = heart.interval.min(most.saturating_sub(heart.deaf));
            heart.deaf += lost;
            if !lost.is_zero() {
                self.excuse(id, lost, now);
            }
        }
    }

    /// We were late by so much: that part of everybody's silence does not count.
    pub(super) fn ignore_silence(&mut self, lost: Duration, why: &str, now: Instant) {
        self.notice_excuse(why, now);
        self.guards.channel.ignore_silence(lost, now);
        self.senders().into_iter().for_each(|id| self.excuse(id, lost, now));
    }

    fn excuse(&mut self, id: BackendId, lost: Duration, now: Instant) {
        let Some(entry) = self.backends.observe(id) else { return };
        let Some(heart) = &mut entry.heart else { return };
        let silence = now.saturating_duration_since(heart.last_at);
        heart.excused = (heart.excused + lost).min(silence);
        let step = heart.detector.ignore_silence_until(lost, now);
        self.apply_step(id, step, now);
        self.rearm(id);
    }

    fn notice_excuse(&mut self, why: &str, now: Instant) {
        self.guards.excuses_total += 1;
        let quiet = |at: Instant| now.saturating_duration_since(at) < STALL_NOTICE_INTERVAL;
        if !self.guards.stall_noticed.is_some_and(quiet) {
            self.guards.stall_noticed = Some(now);
            let message = format!("{why}: so much of the backends' silence does not count");
            self.work.effects.push(ControlEffect::Notice(Notice {
                pool: "".into(),
                backend: None,
                message,
            }));
        }
    }

    /// The next gap in its sequence is of our making.
    pub(super) fn ignore_gap(&mut self, id: BackendId, at: Instant, now: Instant) {
        let Some(entry) = self.backends.observe(id) else { return };
        let Some(heart) = &mut entry.heart else { return };
        let step = heart.detector.ignore_silence_until(Duration::ZERO, at);
        self.apply_step(id, step, now);
    }

    /// Notices that the guards' own tick is late.
    pub(super) fn notice_stall(&mut self, now: Instant) {
        let Some(due) = self.schedule.due(TimerKind::GuardTick) else { return };
        if is_late(due, now, self.tick_interval()) {
            let late = now.saturating_duration_since(due);
            let why = format!("the control thread was {} ms late", late.as_millis());
            self.ignore_silence(late, &why, now);
            self.schedule.set(TimerKind::GuardTick, now + self.tick_interval());
        }
    }

    /// The guards' own tick: counts who is expected to be heard.
    pub(super) fn guard_tick(&mut self, now: Instant) {
        (self.guards.live, self.guards.slowest) = self.tallies.all.expected();
        if !self.tallies.all.hearts.is_empty() {
            self.schedule.set(TimerKind::GuardTick, now + self.tick_interval());
        }
    }

    /// A path guard asked to be woken; `None`: the one over all pools.
    pub(super) fn check_guard(&mut self, pool: Option<PoolId>, now: Instant) {
        let guard = match pool {
            None => Some(&self.guards.all),
            Some(id) => self.pool(id).map(|pool| &pool.guard),
        };
        // Who is heard matters to a guard that may thaw, and to no other.
        let thaws = guard.is_some_and(|guard| guard.due().is_some_and(|at| at <= now));
        let view = if thaws { self.path_view(pool, now) } else { self.path_counts(pool, now) };
        let guard = match pool {
            None => Some(&mut self.guards.all),
            Some(id) => self.pools.observe(id).map(|pool| &mut pool.guard),
        };
        let Some(guard) = guard else { return };
        let frost = guard.look(view, now);
        match guard.due() {
            Some(at) => self.schedule.set(TimerKind::CheckGuard(pool), at.max(now)),
            None => self.schedule.cancel(TimerKind::CheckGuard(pool)),
        }
        let Some(frost) = frost else { return };
        let name = pool.and_then(|id| self.pool(id)).map(|pool| Arc::clone(&pool.spec.name));
        let (message, thawed) = match frost {
            FreezeChange::Started(why) => {
                (format!("{why}: no silent backend is taken out for now"), false)
            }
            FreezeChange::Ended(why) => {
                (format!("{why}: silent backends are taken out again"), true)
            }
        };
        let pool_name = name.unwrap_or_else(|| "".into());
        self.work.effects.push(ControlEffect::Notice(Notice {
            pool: pool_name,
            backend: None,
            message,
        }));
        if thawed {
            self.reconsider(pool, now);
        }
    }

    /// The guards may have changed their mind about whom they held back.
    fn reconsider(&mut self, pool: Option<PoolId>, now: Instant) {
        let tally = self.tallies.of(pool);
        let suspects: Vec<BackendId> =
            tally.into_iter().flat_map(|tally| tally.suspects.iter().copied()).collect();
        for id in suspects {
            let Some(entry) = self.backends.observe(id) else { continue };
            let Some(heart) = &mut entry.heart else { continue };
            let step = heart.detector.reconsider(now);
            self.apply_step(id, step, now);
            self.rearm(id);
        }
    }

    /// Asks the guards about everybody who is confirmed to be gone.
    pub(super) fn eject_confirmed(&mut self, now: Instant) {
        while let Some((id, proven)) = self.guards.confirmed.pop_front() {
            let Some(pool) = self.backends.get(id).map(|entry| entry.pool) else { continue };
            self.check_both_guards(pool, now);
            let allowed = self.permitted(pool, proven, now);
            let Some(entry) = self.backends.observe(id) else { continue };
            let Some(heart) = &mut entry.heart else { continue };
            match allowed {
                Ok(()) => {
                    let step = heart.detector.eject(now);
                    self.apply_step(id, step, now);
                    self.rearm(id);
                }
                Err(objection) => {
                    if heart.detector.hold_in_rotation(objection.clone()) {
                        let message = format!("not taken out though silent: {objection}");
                        self.work.effects.push(ControlEffect::Notice(Notice {
                            pool: Arc::clone(&entry.state.pool),
                            backend: Some(Arc::clone(&entry.state.name)),
                            message,
                        }));
                    }
                }
            }
        }
    }

    /// Whether its `ttl` has to wait: it answers probes, and the silence may
    /// not be its own.
    pub(super) fn expiry_held(&self, id: BackendId, now: Instant) -> Option<Instant> {
        let entry = self.backends.get(id)?;
        let heart = entry.heart.as_deref()?;
        if !heart.detector.answers(now) {
            return None;
        }
        let frozen = self.guards.all.freeze().is_some()
            || self.pool(entry.pool).is_some_and(|pool| pool.guard.freeze().is_some());
        let held = frozen || self.channel(now) == ChannelState::Silent;
        held.then(|| now + HELD_EXPIRY_INTERVAL)
    }

    /// Brings the pulse up to date with the detector; records what that makes
    /// of the backend, if it is anything new.
    pub(super) fn pulse_changed(
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
        entry.health.pulse = entry.pulse_of(spec, now);
        let after = entry.health.observation();
        if before == after {
            // Unknown may serve or not.
            self.work.unsettled.insert(entry.pool);
            return;
        }
        let lasted = lasted.unwrap_or_else(|| now.saturating_duration_since(entry.observed_since));
        entry.observed_since = now;
        self.record(id, (before.name(), after.name()), reason.to_owned(), lasted, now);
    }

    /// What the heartbeats' channel as a whole is like.
    pub(super) fn channel(&self, now: Instant) -> ChannelState {
        self.guards.channel.state(self.guards.live, self.guards.slowest, now)
    }

    fn permitted(&self, pool: PoolId, proven: bool, now: Instant) -> Result<(), String> {
        let Some(entry) = self.pool(pool) else { return Ok(()) };
        let percent = self.max_down_percent(entry);
        let channel = self.channel(now);
        let view = match channel {
            ChannelState::Silent => self.path_view(Some(pool), now),
            ChannelState::Alive => self.path_counts(Some(pool), now),
        };
        let freezes = [entry.guard.freeze(), self.guards.all.freeze()];
        may_remove(proven, view, percent, channel, freezes)
    }

    /// Share of the pool that may be out at once.
    pub(super) fn max_down_percent(&self, pool: &super::PoolEntry) -> u8 {
        pool.spec.ejection.map_or(MAX_DOWN_PERCENT, |spec| spec.max_ejected_percent)
    }

    /// Carries one step of a detector out.
    fn apply_step(&mut self, id: BackendId, step: DetectorStep, now: Instant) {
        self.count(id);
        if let Some(change) = step.change {
            self.pulse_changed(id, &change.reason, Some(change.lasted), now);
            if change.to == DetectorState::Suspect
                && let Some(pool) = self.backends.get(id).map(|entry| entry.pool)
            {
                self.check_both_guards(pool, now);
            }
        }
        match step.ask {
            Some(DetectorRequest::Probe(next)) => self.start_try(id, next, now),
            Some(DetectorRequest::Eject { proven }) => {
                self.guards.confirmed.push_back((id, proven))
            }
            None => {}
        }
    }

    /// A pool's guard, and the one over all where there are several pools.
    fn check_both_guards(&mut self, pool: PoolId, now: Instant) {
        self.check_guard(Some(pool), now);
        if self.pools.listening() > 1 {
            self.check_guard(None, now);
        }
    }

    /// Asks the shell for one fresh connect; a regular probe gives way to it.
    fn start_try(&mut self, id: BackendId, next: ConfirmationTry, now: Instant) {
        let Some(entry) = self.backends.observe(id) else { return };
        let Some(pool) = self.pools.get(entry.pool) else { return };
        if entry.in_flight.take().is_some()
            && let Some(spec) = &pool.spec.probe
        {
            self.schedule.cancel(TimerKind::ProbeLost(id));
            self.schedule.set(TimerKind::Probe(id), now + spec.fast_interval);
        }
        self.ids.probe += 1;
        let token = ProbeToken(self.ids.probe);
        let timeout = next.timeout.min(pool.confirming.timeout);
        let spec = if timeout == pool.confirming.timeout {
            Arc::clone(&pool.confirming)
        } else {
            Arc::new(ProbeSpec { timeout, ..(*pool.confirming).clone() })
        };
        let lost_at = now + timeout + super::probing::PROBE_LOST_MARGIN;
        entry.trying = Some(ConfirmationInFlight { token, id: next.id, lost_at });
        self.work.effects.push(ControlEffect::Probe {
            lane: ProbeLane { pool: pool.id.0, urgent: true },
            backend: id,
            token,
            address: entry.state.address.clone(),
            spec,
        });
    }

    /// Wakes the detector when it wants to be; a little too early does no harm,
    /// and spares the schedule a change with every heartbeat.
    pub(super) fn rearm(&mut self, id: BackendId) {
        let heart = self.backends.get(id).and_then(|entry| entry.heart.as_deref());
        let Some(at) = heart.and_then(|heart| heart.detector.due()) else { return };
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

    /// Everybody whose heartbeats are (or were) heard.
    fn senders(&self) -> Vec<BackendId> {
        self.tallies.all.hearts.iter().copied().collect()
    }
}

impl super::BackendEntry {
    /// What its heartbeats amount to.
    pub(super) fn pulse_of(&self, spec: &HeartbeatSpec, now: Instant) -> HeartbeatHealth {
        let needed = self.origin == MemberSourceKind::Registered || spec.require;
        let undecided = if needed { HeartbeatHealth::Waiting } else { HeartbeatHealth::Absent };
        let Some(heart) = &self.heart else {
            let excused = self.heartbeats_from.is_some_and(|from| now < from);
            return if excused { HeartbeatHealth::Absent } else { undecided };
        };
        if heart.expired {
            return if needed { HeartbeatHealth::Expired } else { HeartbeatHealth::Absent };
        }
        match heart.detector.state() {
            DetectorState::Waiting => undecided,
            DetectorState::Up => HeartbeatHealth::OnTime,
            DetectorState::Suspect if heart.detector.answers(now) => {
                HeartbeatHealth::SilentButAnswering
            }
            DetectorState::Suspect => HeartbeatHealth::Suspect,
            DetectorState::Down => HeartbeatHealth::Silent,
            DetectorState::Recovering if heart.detector.was_down() => HeartbeatHealth::Silent,
            DetectorState::Recovering => undecided,
        }
    }

    /// Silence that ends what its heartbeats vouch for, and when that is.
    pub(super) fn expiry(&self, spec: &HeartbeatSpec) -> Option<(Duration, Instant)> {
        let heart = self.heart.as_deref()?;
        let ttl = ttl(spec, heart.interval);
        Some((ttl, heart.last_at + heart.excused + ttl))
    }
}
