//! Accepted heartbeats: registration of backends, requested states and weights.
//!
//! Called by the controller for [`ControlEvent::Heartbeat`](super::ControlEvent::Heartbeat)
//! and for the timers that heartbeats set. Signature and freshness are already checked.
//! This module checks a heartbeat against the configuration. `silence` and
//! `core::suspicion` handle missing heartbeats.
//!
//! # Identity
//!
//! - A heartbeat belongs to the configured backend with the same pool, name and address.
//! - A heartbeat with the name of a configured backend and another address is rejected.
//! - Any other heartbeat adds a *registered* backend, if the pool allows registration.
//! - If two senders use the same name or the same address, the one that started later
//!   takes precedence. The other backend leaves, and its heartbeats are rejected.
//!
//! # Weight
//!
//! `weight x (1 - 3/4 x load / 1000)`. `weight` is the requested weight, at most the
//! configured one (`weight_max` for a registered backend). `load` is smoothed
//! ([`ReportedLoad`]). Changes of less than a tenth are ignored. A full backend keeps a
//! quarter of its weight, so that its sessions show whether it is full.

pub(super) mod confirmation;
pub(super) mod ignored;
pub(super) mod reported;
mod saved;
pub(super) mod silence;
mod silence_counts;

pub use saved::SavedHeartbeats;

use super::NoticeFields;
use super::backends::BackendEntry;
use super::members::{MemberSource, Origins};
use super::pools::PoolId;
use super::schedule::{TimerKind, after};
use super::state::ControlState;
use crate::health::{HeartbeatHealth, RequestedState};
use crate::model;
use crate::model::HeartbeatSpec;
use crate::suspicion::rejections::Rejections;
use crate::suspicion::{BeatInfo, DetectorState, HeartbeatDetector, PathGuard};
use crate::table::state::BackendId;
use ignored::HeartbeatIgnored;
use reported::{BackendHeartbeats, requested, ttl};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_heartbeat::{Heartbeat, SenderState};

/// Bounds of the interval that a sender declares; the same as in the configuration.
const INTERVAL_MIN: Duration = Duration::from_millis(20);
const INTERVAL_MAX: Duration = Duration::from_secs(10);

/// Shortest time between two notices about a full pool.
const FULL_NOTICE_INTERVAL: Duration = Duration::from_secs(60);

/// State of heartbeats that belongs to no single backend: guards, sender counts, totals.
#[derive(Debug, Default)]
pub(super) struct HeartbeatWatch {
    guards: silence::HeartbeatGuards,
    counts: silence_counts::SilenceCounts,
    /// Accepted heartbeats that match no backend, by [`HeartbeatIgnored`].
    ignored: [u64; HeartbeatIgnored::ALL.len()],
    /// Senders of these heartbeats.
    rejections: Rejections,
    /// Heartbeats of known backends.
    taken: u64,
    /// Counts of the old processes.
    carried: CarriedHeartbeats,
}

/// Heartbeat counts of the old processes.
#[derive(Debug, Default)]
pub(super) struct CarriedHeartbeats {
    pub(super) taken: u64,
    pub(super) ignored: [u64; HeartbeatIgnored::ALL.len()],
    pub(super) excuses: u64,
}

// === impl HeartbeatWatch ===

impl HeartbeatWatch {
    /// Returns the senders with rejected heartbeats.
    pub(super) fn rejections(&self) -> &Rejections {
        &self.rejections
    }

    /// Returns the heartbeats of known backends, including those of the old processes.
    pub(super) fn taken(&self) -> u64 {
        self.taken.saturating_add(self.carried.taken)
    }

    /// Returns the ignored heartbeats by reason, including those of the old processes.
    pub(super) fn ignored(&self) -> [(HeartbeatIgnored, u64); HeartbeatIgnored::ALL.len()] {
        let sum = |why: HeartbeatIgnored| {
            self.ignored[why as usize].saturating_add(self.carried.ignored[why as usize])
        };
        HeartbeatIgnored::ALL.map(|why| (why, sum(why)))
    }

    /// Returns how often silence was excluded, including the old processes.
    pub(super) fn excuses(&self) -> u64 {
        self.guards.excuses_total.saturating_add(self.carried.excuses)
    }

    /// Sets the counts of the old processes.
    pub(super) fn carry(&mut self, counted: CarriedHeartbeats) {
        self.carried = counted;
    }

    /// Applies the pool's heartbeat settings to a backend. `unprepared`: heartbeats were
    /// not required for the backend before.
    pub(super) fn configure(
        &mut self,
        state: &mut ControlState,
        entry: &mut BackendEntry,
        pool: &model::PoolConfig,
        unprepared: bool,
        now: Instant,
    ) {
        let id = entry.state.id;
        let Some(spec) = &pool.heartbeat else {
            self.drop_sender(entry);
            entry.confirmation = None;
            entry.heartbeats_from = None;
            entry.health.heartbeat_health = HeartbeatHealth::Absent;
            entry.health.requested = RequestedState::Ready;
            state.schedule.cancel(TimerKind::Heartbeat(id));
            state.schedule.cancel(TimerKind::HeartbeatTtl(id));
            state.schedule.cancel(TimerKind::Forget(id));
            return;
        };
        if unprepared && entry.needs_heartbeats(spec) && entry.heartbeats.is_none() {
            // The sender needs time to start.
            entry.heartbeats_from = Some(now + spec.ttl);
            state.schedule.set(TimerKind::HeartbeatTtl(id), now + spec.ttl);
        }
        if let Some((_, at)) = entry.expiry(spec) {
            state.schedule.set(TimerKind::HeartbeatTtl(id), at.max(now));
        }
        entry.health.heartbeat_health = entry.heartbeat_health(spec, now);
    }

    /// Drops the state of the backend's heartbeats.
    pub(super) fn drop_sender(&mut self, entry: &mut BackendEntry) {
        self.counts.forget(entry.state.id, entry.heartbeats.take().as_deref_mut());
    }

    /// Returns the guard over the backends of all pools.
    pub(super) fn guard_over_all(&self) -> &PathGuard {
        &self.guards.all
    }

    /// Applies one accepted heartbeat. It arrived `at`; `stands_for` heartbeats of the
    /// sender were merged into it.
    pub(super) fn heartbeat(
        &mut self,
        state: &mut ControlState,
        heartbeat: &Heartbeat,
        (at, stands_for): (Instant, u32),
        now: Instant,
    ) {
        match self.find_sender(state, heartbeat, now) {
            Ok(Some(id)) => {
                self.taken += u64::from(stands_for);
                self.rejections.believed(&heartbeat.pool, &heartbeat.name);
                if stands_for > 1 {
                    self.ignore_gap(state, id, at, now);
                }
                self.update(state, id, heartbeat, at, now);
            }
            Ok(None) => {}
            Err(why) => self.ignore(state, why, heartbeat, now),
        }
    }

    /// Returns the backend of a heartbeat, and registers a new one. `None`: an unknown
    /// sender reported stopping.
    fn find_sender(
        &mut self,
        state: &mut ControlState,
        heartbeat: &Heartbeat,
        now: Instant,
    ) -> Result<Option<BackendId>, HeartbeatIgnored> {
        let pool = state.pools.named(&heartbeat.pool).ok_or(HeartbeatIgnored::UnknownPool)?;
        let spec = Arc::clone(pool.spec.heartbeat.as_ref().ok_or(HeartbeatIgnored::UnknownPool)?);
        let named = pool.member_named(&heartbeat.name);
        let placed = pool.member_at(heartbeat.address);
        if let (Some(named), Some(placed)) = (named, placed)
            && named == placed
        {
            return Ok(Some(named));
        }
        let id = pool.id;
        for (other, configured) in [
            (named, HeartbeatIgnored::ConfiguredName),
            (placed, HeartbeatIgnored::ConfiguredAddress),
        ] {
            let Some(other) = other.and_then(|id| state.backends.get(id)) else { continue };
            if other.origins != Origins::of(MemberSource::Heartbeats) {
                return Err(configured);
            }
            if other.heartbeats.as_ref().is_some_and(|h| h.incarnation >= heartbeat.incarnation) {
                return Err(HeartbeatIgnored::OlderSender);
            }
        }
        if !spec.register {
            return Err(HeartbeatIgnored::UnknownBackend);
        }
        if state.frontends.listens_at(heartbeat.address) {
            return Err(HeartbeatIgnored::OwnAddress);
        }
        for (gone, what) in [(named, "address"), (placed, "name")] {
            if let Some(gone) = gone {
                let reason = format!("the sender restarted with another {what}");
                state.withdraw_registration(self, gone, &reason, now);
            }
        }
        if heartbeat.state == SenderState::Stopping {
            return Ok(None);
        }
        state.check_capacity(id, &spec, now)?;
        Ok(Some(state.register(id, &spec, heartbeat, now)))
    }

    /// Applies the content of a known backend's heartbeat.
    fn update(
        &mut self,
        state: &mut ControlState,
        id: BackendId,
        heartbeat: &Heartbeat,
        at: Instant,
        now: Instant,
    ) {
        let Some(entry) = state.backends.observe(id) else { return };
        let Some(pool) = state.pools.get(entry.pool) else { return };
        let Some(spec) = pool.spec.heartbeat.clone() else { return };
        let interval = heartbeat.interval.clamp(INTERVAL_MIN, INTERVAL_MAX);
        let heartbeats = entry.heartbeats.get_or_insert_with(|| {
            Box::new(BackendHeartbeats::first(
                heartbeat,
                HeartbeatDetector::new(spec.interval, at),
                at,
            ))
        });
        let before = (heartbeats.weight_in_force, heartbeats.expired);
        heartbeats.incarnation = heartbeat.incarnation;
        heartbeats.key_id = heartbeat.key_id;
        heartbeats.state = heartbeat.state;
        heartbeats.weight = heartbeat.weight.max(1);
        let change = u32::from(heartbeats.weight.abs_diff(heartbeats.weight_in_force));
        if change * 10 >= u32::from(heartbeats.weight_in_force) {
            heartbeats.weight_in_force = heartbeats.weight;
        }
        heartbeats.in_flight = heartbeat.in_flight;
        heartbeats.interval = interval;
        heartbeats.last_at = heartbeats.last_at.max(at);
        (heartbeats.excused, heartbeats.excused_for_losses) = (Duration::ZERO, Duration::ZERO);
        heartbeats.expired = false;
        heartbeats.adopted = false;
        let lighter = heartbeats.load.apply_heartbeat(heartbeat.load);
        let ttl = ttl(&spec, interval);
        if lighter || before != (heartbeats.weight_in_force, false) {
            state.backends.touch_later(id);
        }
        if !state.schedule.is_set(TimerKind::HeartbeatTtl(id)) {
            state.schedule.set(TimerKind::HeartbeatTtl(id), at + ttl);
        }
        if heartbeat.state == SenderState::Stopping
            && state
                .backends
                .get(id)
                .is_some_and(|entry| entry.origins == Origins::of(MemberSource::Heartbeats))
        {
            state.withdraw_registration(self, id, "the sender reported stopping", now);
            return;
        }
        self.count(state, id);
        state.apply_sender_state(id, now);
        if heartbeat.state == SenderState::Starting && state.has_no_heartbeat(id) {
            // The backend accepts no sessions yet, so its silence does not matter.
            return;
        }
        let beat =
            BeatInfo { incarnation: heartbeat.incarnation, sequence: heartbeat.sequence, interval };
        self.beat(state, id, &beat, heartbeat.state, at, now);
    }

    /// Expires the heartbeats of a backend if `ttl` has passed.
    pub(super) fn heartbeat_ttl(&mut self, state: &mut ControlState, id: BackendId, now: Instant) {
        let Some(entry) = state.backends.get(id) else { return };
        let Some(pool) = state.pools.get(entry.pool) else { return };
        let Some(spec) = pool.spec.heartbeat.clone() else { return };
        let Some((ttl, over)) = entry.expiry(&spec) else {
            let reason = "no heartbeat received since heartbeats became required";
            state.heartbeat_health_changed(id, reason, None, now);
            return;
        };
        if over > now {
            state.schedule.set(TimerKind::HeartbeatTtl(id), over);
            return;
        }
        if let Some(later) = self.expiry_held(state, id, now) {
            state.schedule.set(TimerKind::HeartbeatTtl(id), later);
            return;
        }
        let Some(entry) = state.backends.touch(id) else { return };
        let Some(heartbeats) = &mut entry.heartbeats else { return };
        heartbeats.expired = true;
        let needed = entry.needs_heartbeats(&spec);
        if entry.origins.is_registered() {
            state.schedule.set(TimerKind::Forget(id), after(over, spec.forget_after).max(now));
        }
        if !needed {
            // Optional heartbeats that have expired no longer count.
            self.drop_sender(entry);
            state.schedule.cancel(TimerKind::Heartbeat(id));
            state.clear_sender_state(id, now);
        }
        self.count(state, id);
        let ttl = humantime::format_duration(ttl);
        state.heartbeat_health_changed(id, &format!("no heartbeat for {ttl} (ttl)"), None, now);
    }

    /// Removes a registered backend at the end of `forget_after`.
    pub(super) fn forget(&mut self, state: &mut ControlState, id: BackendId, now: Instant) {
        let still = |entry: &BackendEntry| {
            entry.origins.is_registered()
                && entry.heartbeats.as_ref().is_none_or(|heartbeats| heartbeats.expired)
        };
        if state.backends.get(id).is_some_and(still) {
            state.withdraw_registration(self, id, "no heartbeat for ttl + forget_after", now);
        }
    }
}

// === impl ControlState ===

impl ControlState {
    /// Checks the cap on registered backends. Logs a notice if the pool is full.
    fn check_capacity(
        &mut self,
        pool: PoolId,
        spec: &HeartbeatSpec,
        now: Instant,
    ) -> Result<(), HeartbeatIgnored> {
        let Some(entry) = self.pools.observe(pool) else {
            return Err(HeartbeatIgnored::UnknownPool);
        };
        if entry.registered() < spec.backends_max as usize {
            return Ok(());
        }
        let quiet = |at: Instant| now.saturating_duration_since(at) < FULL_NOTICE_INTERVAL;
        if !entry.full_noticed.is_some_and(quiet) {
            entry.full_noticed = Some(now);
            let fields = NoticeFields {
                registered: Some(entry.registered() as u64),
                limit: Some(spec.backends_max.into()),
                help: HeartbeatIgnored::PoolFull.help(),
                ..NoticeFields::default()
            };
            let pool = Arc::clone(&entry.spec.name);
            self.warn(pool, "pool is full; rejecting heartbeats of new senders", fields);
        }
        Err(HeartbeatIgnored::PoolFull)
    }

    fn register(
        &mut self,
        pool_id: PoolId,
        spec: &HeartbeatSpec,
        heartbeat: &Heartbeat,
        now: Instant,
    ) -> BackendId {
        let member = (Arc::clone(&heartbeat.name), heartbeat.address, heartbeat.weight);
        let id = self.admit(pool_id, spec, member, now);
        let reason =
            format!("registered by heartbeat: {}, key {}", heartbeat.address, heartbeat.key_id);
        self.record_lazily(id, ("new", "unknown"), reason, Duration::ZERO, now);
        id
    }

    /// Whether its detector has received no heartbeat.
    fn has_no_heartbeat(&self, id: BackendId) -> bool {
        let heartbeats = self.backends.get(id).and_then(|entry| entry.heartbeats.as_deref());
        heartbeats.is_some_and(|heartbeats| heartbeats.detector.state() == DetectorState::Waiting)
    }

    /// Applies the state that its heartbeats request, and records a change.
    fn apply_sender_state(&mut self, id: BackendId, now: Instant) {
        let Some(entry) = self.backends.get(id) else { return };
        let Some(heartbeats) = &entry.heartbeats else { return };
        let wanted = requested(heartbeats.state);
        let before = entry.health.requested;
        if before == wanted {
            return;
        }
        let Some(entry) = self.backends.touch_later(id) else { return };
        entry.health.requested = wanted;
        let lasted = now.saturating_duration_since(entry.requested_since);
        entry.requested_since = now;
        let sessions = entry.state.in_flight.get();
        let reason = match wanted {
            RequestedState::Ready => "the sender reported ready".to_owned(),
            _ => format!("the sender reported {}; open sessions: {sessions}", wanted.name()),
        };
        self.record_lazily(id, (before.name(), wanted.name()), reason, lasted, now);
    }

    /// Resets the requested state, and records a change.
    pub(super) fn clear_sender_state(&mut self, id: BackendId, now: Instant) {
        let Some(entry) = self.backends.touch(id) else { return };
        let before = std::mem::replace(&mut entry.health.requested, RequestedState::Ready);
        if before != RequestedState::Ready {
            let lasted = now.saturating_duration_since(entry.requested_since);
            entry.requested_since = now;
            let reason = "the state that the sender reported no longer applies".to_owned();
            self.record(id, (before.name(), RequestedState::Ready.name()), reason, lasted, now);
        }
    }
}
