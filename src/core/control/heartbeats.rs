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

mod saved;

pub use saved::SavedHeart;

use super::misfits::HeartbeatIgnored;
use super::schedule::TimerKind;
use super::{BackendEntry, ControlEffect, Controller, MemberSourceKind, Notice, PoolId};
use crate::health::RequestedState;
use crate::model;
use crate::model::HeartbeatSpec;
use crate::suspicion::{BeatInfo, DetectorState, HeartbeatDetector};
use crate::table::state::BackendId;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_heartbeat::{Heartbeat, SenderState};

/// A sender's own interval counts within these bounds, the configuration's.
const INTERVAL_MIN: Duration = Duration::from_millis(20);
const INTERVAL_MAX: Duration = Duration::from_secs(10);

/// Heartbeats of a slow sender that must be missing before `ttl` is over.
const TTL_INTERVALS: u32 = 3;

/// A pool that is full says so this often.
const FULL_NOTICE_INTERVAL: Duration = Duration::from_secs(60);

/// What one backend's heartbeats have said.
#[derive(Debug)]
pub(super) struct BackendHeartbeats {
    /// What their rhythm means.
    pub(super) detector: HeartbeatDetector,
    pub(super) incarnation: u64,
    pub(super) key_id: u32,
    pub(super) state: SenderState,
    /// As asked for.
    pub(super) weight: u16,
    /// As it counts: it follows changes by a tenth or more.
    weight_in_force: u16,
    pub(super) in_flight: u32,
    pub(super) load: ReportedLoad,
    /// As declared, within bounds.
    pub(super) interval: Duration,
    pub(super) first_at: Instant,
    pub(super) last_at: Instant,
    /// Silent for `ttl`.
    pub(super) expired: bool,
    /// So much of the silence since then was our own doing.
    pub(super) excused: Duration,
    /// What of that was for heartbeats lost here, and not for being late.
    pub(super) deaf: Duration,
    /// Another process has said all this; nothing was heard here yet.
    adopted: bool,
    /// What it is counted as among all.
    pub(super) counted: Option<super::tally::TalliedBackend>,
}

/// How busy a sender says it is, made steady: an exponential mean, of which a
/// new share follows only where it changes it by a tenth.
#[derive(Debug, Clone, Copy)]
pub(super) struct ReportedLoad {
    /// As last said, 0..=1000.
    pub(super) said: u16,
    mean: f64,
    /// In percent, a multiple of [`ReportedLoad::STEP`], 25..=100.
    share: u32,
}

// === impl ReportedLoad ===

impl ReportedLoad {
    /// Weight of the newest heartbeat in the mean: a memory of ten.
    const GAIN: f64 = 0.1;

    /// Shares are multiples of it, so that a pool of many loads still has few
    /// different weights (each costs the round robin's preparation).
    const STEP: u32 = 5;

    fn new(said: u16) -> ReportedLoad {
        let mean = f64::from(said.min(1000));
        ReportedLoad { said, mean, share: ReportedLoad::wanted(mean) }
    }

    /// Takes the newest; true when the share changes.
    fn apply_heartbeat(&mut self, said: u16) -> bool {
        self.said = said;
        self.mean += ReportedLoad::GAIN * (f64::from(said.min(1000)) - self.mean);
        let wanted = ReportedLoad::wanted(self.mean);
        let changes = wanted.abs_diff(self.share) * 10 >= self.share && wanted != self.share;
        if changes {
            self.share = wanted;
        }
        changes
    }

    /// The share of its weight that is left to it, in percent.
    pub(super) fn share(&self) -> u32 {
        self.share
    }

    /// The smoothed load, 0..=1000.
    pub(super) fn mean(&self) -> f64 {
        self.mean
    }

    fn wanted(mean: f64) -> u32 {
        let percent = 100.0 - 75.0 * mean / 1000.0;
        (percent / f64::from(ReportedLoad::STEP)).round() as u32 * ReportedLoad::STEP
    }
}

// === impl BackendEntry ===

impl BackendEntry {
    /// The weight before anything lowers it: as configured, or less where its
    /// heartbeats ask for less.
    pub(super) fn base_weight(&self, pool: &model::PoolConfig) -> u16 {
        let Some(heart) = self.heart.as_deref().filter(|heart| !heart.expired) else {
            return self.spec.weight;
        };
        heart.weight_in_force.clamp(1, self.weight_max(pool))
    }

    /// The largest weight its heartbeats may ask for.
    pub(super) fn weight_max(&self, pool: &model::PoolConfig) -> u16 {
        match (self.origin, &pool.heartbeat) {
            (MemberSourceKind::Registered, Some(spec)) => spec.weight_max,
            _ => self.spec.weight,
        }
    }

    /// What its load leaves of the weight, in percent.
    pub(super) fn load_share(&self) -> u32 {
        let heart = self.heart.as_deref().filter(|heart| !heart.expired);
        heart.map_or(100, |heart| heart.load.share())
    }

    /// Whether it may serve only on the word of its heartbeats.
    pub(super) fn needs_heartbeats(&self, spec: &HeartbeatSpec) -> bool {
        self.origin == MemberSourceKind::Registered || spec.require
    }
}

// === impl Controller ===

impl Controller {
    /// Takes one authentic heartbeat, which arrived `at` and stands for so many
    /// of its sender.
    pub(super) fn heartbeat(
        &mut self,
        heartbeat: &Heartbeat,
        (at, stands_for): (Instant, u32),
        now: Instant,
    ) {
        match self.find_sender(heartbeat, now) {
            Ok(Some(id)) => {
                self.heartbeats_total += u64::from(stands_for);
                self.rejections.believed(&heartbeat.pool, &heartbeat.name);
                if stands_for > 1 {
                    self.ignore_gap(id, at, now);
                }
                self.update(id, heartbeat, at, now);
            }
            Ok(None) => {}
            Err(misfit) => self.misfit(misfit, heartbeat, now),
        }
    }

    /// The backend it speaks for, registered if need be. `None`: whoever says
    /// goodbye without having been known leaves nothing behind.
    fn find_sender(
        &mut self,
        heartbeat: &Heartbeat,
        now: Instant,
    ) -> Result<Option<BackendId>, HeartbeatIgnored> {
        let pool = self.pools.named(&heartbeat.pool).ok_or(HeartbeatIgnored::UnknownPool)?;
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
            let Some(other) = other.and_then(|id| self.backends.get(id)) else { continue };
            if other.origin == MemberSourceKind::File {
                return Err(configured);
            }
            if other.heart.as_ref().is_some_and(|h| h.incarnation >= heartbeat.incarnation) {
                return Err(HeartbeatIgnored::OlderSender);
            }
        }
        if !spec.register {
            return Err(HeartbeatIgnored::UnknownBackend);
        }
        if self.is_own_bind(heartbeat.address) {
            return Err(HeartbeatIgnored::OwnAddress);
        }
        for (gone, what) in [(named, "address"), (placed, "name")] {
            if let Some(gone) = gone {
                let reason = format!("its sender started anew under another {what}");
                self.unregister(gone, &reason, now);
            }
        }
        if heartbeat.state == SenderState::Stopping {
            return Ok(None);
        }
        self.check_room(id, &spec, now)?;
        Ok(Some(self.register(id, &spec, heartbeat, now)))
    }

    fn is_own_bind(&self, address: SocketAddr) -> bool {
        let any = match address.ip() {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        let wildcard = SocketAddr::new(any, address.port());
        self.own.contains(&address) || (address.ip().is_loopback() && self.own.contains(&wildcard))
    }

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
                "{} backends are registered, as many as backends_max allows: others are refused",
                entry.registered()
            );
            let pool = Arc::clone(&entry.spec.name);
            self.work.effects.push(ControlEffect::Notice(Notice { pool, backend: None, message }));
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
        let reason = format!(
            "registered by its heartbeat at {} (key {})",
            heartbeat.address, heartbeat.key_id
        );
        self.record_lazily(id, ("new", "unknown"), reason, Duration::ZERO, now);
        id
    }

    /// Takes a registered backend out of its pool for good.
    pub(super) fn unregister(&mut self, id: BackendId, reason: &str, now: Instant) {
        let Some(entry) = self.backends.remove(id) else { return };
        self.pools.remove_member(&entry);
        let Some(pool) = self.pools.get(entry.pool) else { return };
        let (rule, pool) = (pool.spec.on_removal, pool.id);
        self.work.unsettled.insert(pool);
        self.remove_backend(entry, reason, rule, now);
        self.settle_pool_ramps(pool, now);
    }

    /// Takes what a known backend's heartbeat says.
    fn update(&mut self, id: BackendId, heartbeat: &Heartbeat, at: Instant, now: Instant) {
        let Some(entry) = self.backends.observe(id) else { return };
        let Some(pool) = self.pools.get(entry.pool) else { return };
        let Some(spec) = pool.spec.heartbeat.clone() else { return };
        let interval = heartbeat.interval.clamp(INTERVAL_MIN, INTERVAL_MAX);
        let heart = entry.heart.get_or_insert_with(|| {
            Box::new(BackendHeartbeats::first(
                heartbeat,
                HeartbeatDetector::new(spec.interval, at),
                at,
            ))
        });
        let before = (heart.weight_in_force, heart.expired);
        heart.incarnation = heartbeat.incarnation;
        heart.key_id = heartbeat.key_id;
        heart.state = heartbeat.state;
        heart.weight = heartbeat.weight.max(1);
        let change = u32::from(heart.weight.abs_diff(heart.weight_in_force));
        if change * 10 >= u32::from(heart.weight_in_force) {
            heart.weight_in_force = heart.weight;
        }
        heart.in_flight = heartbeat.in_flight;
        heart.interval = interval;
        heart.last_at = heart.last_at.max(at);
        (heart.excused, heart.deaf) = (Duration::ZERO, Duration::ZERO);
        heart.expired = false;
        heart.adopted = false;
        let lighter = heart.load.apply_heartbeat(heartbeat.load);
        let ttl = ttl(&spec, interval);
        if lighter || before != (heart.weight_in_force, false) {
            self.backends.touch_later(id);
        }
        if !self.schedule.is_set(TimerKind::HeartbeatTtl(id)) {
            self.schedule.set(TimerKind::HeartbeatTtl(id), at + ttl);
        }
        if heartbeat.state == SenderState::Stopping
            && self.origin(id) == Some(MemberSourceKind::Registered)
        {
            self.unregister(id, "its heartbeat says that it stops", now);
            return;
        }
        self.count(id);
        self.apply_sender_state(id, now);
        if heartbeat.state == SenderState::Starting && self.has_no_heartbeat(id) {
            // There is nothing to ask it for yet, and nothing to miss.
            return;
        }
        let beat =
            BeatInfo { incarnation: heartbeat.incarnation, sequence: heartbeat.sequence, interval };
        self.beat(id, &beat, heartbeat.state, at, now);
    }

    fn origin(&self, id: BackendId) -> Option<MemberSourceKind> {
        self.backends.get(id).map(|entry| entry.origin)
    }

    /// Whether its detector has not been told of it.
    fn has_no_heartbeat(&self, id: BackendId) -> bool {
        let heart = self.backends.get(id).and_then(|entry| entry.heart.as_deref());
        heart.is_some_and(|heart| heart.detector.state() == DetectorState::Waiting)
    }

    /// Takes over what its heartbeats ask for, and records a change.
    fn apply_sender_state(&mut self, id: BackendId, now: Instant) {
        let Some(entry) = self.backends.get(id) else { return };
        let Some(heart) = &entry.heart else { return };
        let calling = requested(heart.state);
        let before = entry.health.calling;
        if before == calling {
            return;
        }
        let Some(entry) = self.backends.touch_later(id) else { return };
        entry.health.calling = calling;
        let lasted = now.saturating_duration_since(entry.calling_since);
        entry.calling_since = now;
        let sessions = entry.state.in_flight.get();
        let reason = match calling {
            RequestedState::Ready => "its heartbeats say that it takes sessions".to_owned(),
            _ => format!("its heartbeats say so; no new sessions, {sessions} go on"),
        };
        self.record_lazily(id, (before.name(), calling.name()), reason, lasted, now);
    }

    /// `ttl` may be over.
    pub(super) fn heartbeat_ttl(&mut self, id: BackendId, now: Instant) {
        let Some(entry) = self.backends.get(id) else { return };
        let Some(pool) = self.pools.get(entry.pool) else { return };
        let Some(spec) = pool.spec.heartbeat.clone() else { return };
        let Some((ttl, over)) = entry.expiry(&spec) else {
            self.pulse_changed(id, "no heartbeat since they are required", None, now);
            return;
        };
        if over > now {
            self.schedule.set(TimerKind::HeartbeatTtl(id), over);
            return;
        }
        if let Some(later) = self.expiry_held(id, now) {
            self.schedule.set(TimerKind::HeartbeatTtl(id), later);
            return;
        }
        let Some(entry) = self.backends.touch(id) else { return };
        let Some(heart) = &mut entry.heart else { return };
        heart.expired = true;
        let needed = entry.origin == MemberSourceKind::Registered || spec.require;
        if entry.origin == MemberSourceKind::Registered {
            self.schedule.set(
                TimerKind::Forget(id),
                super::schedule::after(over, spec.forget_after).max(now),
            );
        }
        if !needed {
            // Its heartbeats have no say any more, neither about sessions.
            self.tallies.forget(id, entry.heart.take().as_deref_mut());
            self.schedule.cancel(TimerKind::Heartbeat(id));
            self.clear_sender_state(id, now);
        }
        self.count(id);
        let ttl = humantime::format_duration(ttl);
        self.pulse_changed(id, &format!("no heartbeat for {ttl} (ttl)"), None, now);
    }

    /// Whatever its heartbeats asked for is over.
    pub(super) fn clear_sender_state(&mut self, id: BackendId, now: Instant) {
        let Some(entry) = self.backends.touch(id) else { return };
        let before = std::mem::replace(&mut entry.health.calling, RequestedState::Ready);
        if before != RequestedState::Ready {
            let lasted = now.saturating_duration_since(entry.calling_since);
            entry.calling_since = now;
            let reason = "its heartbeats have no say any more".to_owned();
            self.record(id, (before.name(), RequestedState::Ready.name()), reason, lasted, now);
        }
    }

    /// `forget_after` is over.
    pub(super) fn forget(&mut self, id: BackendId, now: Instant) {
        let still = |entry: &BackendEntry| {
            entry.origin == MemberSourceKind::Registered
                && entry.heart.as_ref().is_none_or(|heart| heart.expired)
        };
        if self.backends.get(id).is_some_and(still) {
            self.unregister(id, "no heartbeat for ttl and forget_after", now);
        }
    }
}

// === impl BackendHeartbeats ===

impl BackendHeartbeats {
    fn first(heartbeat: &Heartbeat, detector: HeartbeatDetector, at: Instant) -> BackendHeartbeats {
        BackendHeartbeats {
            detector,
            incarnation: heartbeat.incarnation,
            key_id: heartbeat.key_id,
            state: heartbeat.state,
            weight: heartbeat.weight,
            weight_in_force: heartbeat.weight.max(1),
            in_flight: heartbeat.in_flight,
            load: ReportedLoad::new(heartbeat.load),
            interval: heartbeat.interval,
            first_at: at,
            last_at: at,
            expired: false,
            excused: Duration::ZERO,
            deaf: Duration::ZERO,
            adopted: false,
            counted: None,
        }
    }
}

/// What a sender in that state asks for.
fn requested(state: SenderState) -> RequestedState {
    match state {
        SenderState::Ready => RequestedState::Ready,
        SenderState::Starting => RequestedState::Starting,
        SenderState::Draining => RequestedState::Draining,
        SenderState::Stopping => RequestedState::Stopping,
    }
}

/// Silence that ends what heartbeats vouch for: as configured, or three
/// heartbeats of a sender that is slower than that.
pub(super) fn ttl(spec: &HeartbeatSpec, interval: Duration) -> Duration {
    spec.ttl.max(interval * TTL_INTERVALS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_backend_keeps_a_quarter_of_its_share() {
        assert_eq!([0, 500, 1000].map(|load| ReportedLoad::new(load).share()), [100, 65, 25]);
    }

    #[test]
    fn small_changes_of_load_change_no_share() {
        let mut load = ReportedLoad::new(500);
        let changes = (0..1000).filter(|n| load.apply_heartbeat(500 + (n % 2) * 60)).count();
        assert_eq!(changes, 0);
        let steps = (0..1000).filter(|_| load.apply_heartbeat(1000)).count();
        assert!((1..=8).contains(&steps), "{steps} tables on the way");
        assert!(load.share() <= 30, "{load:?}");
    }
}
