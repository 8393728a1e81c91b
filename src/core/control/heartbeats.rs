//! What accepted heartbeats mean: who joins, who leaves, what share they get.
//!
//! Called by the controller for [`Event::Heartbeat`](super::ControlEvent::Heartbeat)
//! and for the times they set. Signatures and freshness are proven before; here
//! a heartbeat is held against the configuration: whom it may speak for, and
//! how much it may ask. Whether silence means death is `suspicion`'s business.
//!
//! # Who is who
//!
//! A heartbeat whose pool, name and address are those of a configured backend
//! is that backend's. One that names a configured backend at another address is
//! refused. Any other makes a *registered* backend where the pool lets senders
//! register, known by pool, name and address as all are. Of two senders that
//! claim one name (or one address) the one that started later is believed: the
//! other backend leaves, and what its sender goes on saying is refused.
//!
//! # What share it gets
//!
//! `weight x (1 - 3/4 x load / 1000)`, where the weight is what the sender asks
//! for and at most the configured one (`weight_max` for a registered backend),
//! and the load is smoothed ([`ReportedLoad`]). Changes of either by less than a tenth
//! change nothing. No load takes more than three quarters:
//! a backend that says it is full still shows whether it is.

pub(super) mod confirmation;
pub(super) mod ignored;
pub(super) mod reported;
mod saved;
pub(super) mod silence;
mod silence_counts;

pub use saved::SavedHeartbeats;

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

/// A sender's own interval counts within these bounds, the configuration's.
const INTERVAL_MIN: Duration = Duration::from_millis(20);
const INTERVAL_MAX: Duration = Duration::from_secs(10);

/// A pool that is full says so this often.
const FULL_NOTICE_INTERVAL: Duration = Duration::from_secs(60);

/// Everything that is known of heartbeats beside the backends themselves: the guards,
/// how many senders are silent, and what was counted.
#[derive(Debug, Default)]
pub(super) struct HeartbeatWatch {
    guards: silence::HeartbeatGuards,
    counts: silence_counts::SilenceCounts,
    /// Authentic heartbeats that changed nothing, by [`HeartbeatIgnored`].
    ignored: [u64; HeartbeatIgnored::ALL.len()],
    /// Their senders.
    rejections: Rejections,
    /// Heartbeats of known backends.
    taken: u64,
    /// Counted by the processes before.
    carried: CarriedHeartbeats,
}

/// What the processes before this one have counted of heartbeats.
#[derive(Debug, Default)]
pub(super) struct CarriedHeartbeats {
    pub(super) taken: u64,
    pub(super) ignored: [u64; HeartbeatIgnored::ALL.len()],
    pub(super) excuses: u64,
}

// === impl HeartbeatWatch ===

impl HeartbeatWatch {
    /// Whose heartbeats were rejected of late, and why.
    pub(super) fn rejections(&self) -> &Rejections {
        &self.rejections
    }

    /// Heartbeats of known backends, by all the processes so far.
    pub(super) fn taken(&self) -> u64 {
        self.taken.saturating_add(self.carried.taken)
    }

    /// The same of heartbeats that changed nothing.
    pub(super) fn ignored(&self) -> [(HeartbeatIgnored, u64); HeartbeatIgnored::ALL.len()] {
        let sum = |why: HeartbeatIgnored| {
            self.ignored[why as usize].saturating_add(self.carried.ignored[why as usize])
        };
        HeartbeatIgnored::ALL.map(|why| (why, sum(why)))
    }

    /// The same of times no backend's silence counted.
    pub(super) fn excuses(&self) -> u64 {
        self.guards.excuses_total.saturating_add(self.carried.excuses)
    }

    /// Counts on from what the processes before have counted.
    pub(super) fn carry(&mut self, counted: CarriedHeartbeats) {
        self.carried = counted;
    }

    /// Fits what is known of the backend's heartbeats to what its pool now expects of
    /// them. It is `unprepared` where it served without any so far.
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
            // It had no time to send any.
            entry.heartbeats_from = Some(now + spec.ttl);
            state.schedule.set(TimerKind::HeartbeatTtl(id), now + spec.ttl);
        }
        if let Some((_, at)) = entry.expiry(spec) {
            state.schedule.set(TimerKind::HeartbeatTtl(id), at.max(now));
        }
        entry.health.heartbeat_health = entry.heartbeat_health(spec, now);
    }

    /// The backend's heartbeats count no more.
    pub(super) fn drop_sender(&mut self, entry: &mut BackendEntry) {
        self.counts.forget(entry.state.id, entry.heartbeats.take().as_deref_mut());
    }

    /// The guard over the backends of all pools.
    pub(super) fn guard_over_all(&self) -> &PathGuard {
        &self.guards.all
    }

    /// Takes one authentic heartbeat, which arrived `at` and stands for so many
    /// of its sender.
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

    /// The backend it speaks for, registered if need be. `None`: whoever says
    /// goodbye without having been known leaves nothing behind.
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
        state.check_room(id, &spec, now)?;
        Ok(Some(state.register(id, &spec, heartbeat, now)))
    }

    /// Takes what a known backend's heartbeat says.
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
        (heartbeats.excused, heartbeats.deaf) = (Duration::ZERO, Duration::ZERO);
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
            // There is nothing to ask it for yet, and nothing to miss.
            return;
        }
        let beat =
            BeatInfo { incarnation: heartbeat.incarnation, sequence: heartbeat.sequence, interval };
        self.beat(state, id, &beat, heartbeat.state, at, now);
    }

    /// `ttl` may be over.
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
            // Its heartbeats have no say any more, neither about sessions.
            self.drop_sender(entry);
            state.schedule.cancel(TimerKind::Heartbeat(id));
            state.clear_sender_state(id, now);
        }
        self.count(state, id);
        let ttl = humantime::format_duration(ttl);
        state.heartbeat_health_changed(id, &format!("no heartbeat for {ttl} (ttl)"), None, now);
    }

    /// `forget_after` is over.
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
    fn check_room(
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
            let message = format!(
                "pool is full: {} registered backends (backends_max); rejecting new senders",
                entry.registered()
            );
            let pool = Arc::clone(&entry.spec.name);
            self.warn(pool, message);
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
        let who = (Arc::clone(&heartbeat.name), heartbeat.address, heartbeat.weight);
        let id = self.admit(pool_id, spec, who, now);
        let reason =
            format!("registered by heartbeat: {}, key {}", heartbeat.address, heartbeat.key_id);
        self.record_lazily(id, ("new", "unknown"), reason, Duration::ZERO, now);
        id
    }

    /// Whether its detector has not been told of it.
    fn has_no_heartbeat(&self, id: BackendId) -> bool {
        let heartbeats = self.backends.get(id).and_then(|entry| entry.heartbeats.as_deref());
        heartbeats.is_some_and(|heartbeats| heartbeats.detector.state() == DetectorState::Waiting)
    }

    /// Takes over what its heartbeats ask for, and records a change.
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

    /// Whatever its heartbeats asked for is over.
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
