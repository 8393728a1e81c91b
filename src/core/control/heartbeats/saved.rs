//! Handover of a backend's heartbeats in an upgrade. Registered backends stay in rotation,
//! even before the new process has received a heartbeat.
//!
//! Called by `handover` in both processes. Restoring records no transition.

use super::HeartbeatWatch;
use super::reported::{BackendHeartbeats, ReportedLoad, requested};
use crate::control::handover::{SavedBackend, SavedPool};
use crate::control::members::PoolMember;
use crate::control::pools::PoolId;
use crate::control::schedule::{TimerKind, after};
use crate::control::state::ControlState;
use crate::control::{PublishReason, sessions_elsewhere};
use crate::model;
use crate::model::{BackendAddr, HeartbeatSpec};
use crate::suspicion::{BeatInfo, HeartbeatDetector, SavedDetector};
use crate::table::state::BackendId;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_heartbeat::SenderState;

/// [`BackendHeartbeats`] in a handover. Times are in milliseconds before the moment of
/// saving.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SavedHeartbeats {
    /// State of the detector.
    pub detector: SavedDetector,
    /// Incarnation of the sender.
    pub incarnation: u64,
    /// Key id of the last heartbeat.
    pub key_id: u32,
    /// Name of the last reported state.
    pub state: String,
    /// Requested weight.
    pub weight: u16,
    /// Weight in use.
    pub weight_in_force: u16,
    /// Reported requests in flight.
    pub in_flight: u32,
    /// Last reported load, 0..=1000.
    pub load: u16,
    /// Smoothed load.
    pub load_mean: f64,
    /// Declared interval.
    pub interval_ms: u64,
    /// Time since the first heartbeat.
    pub first_ms: u64,
    /// Time since the last heartbeat.
    pub last_ms: u64,
    /// No heartbeat for `ttl`.
    pub expired: bool,
}

fn ago(now: Instant, ms: u64) -> Instant {
    now.checked_sub(Duration::from_millis(ms)).unwrap_or(now)
}

// === impl BackendHeartbeats ===

impl BackendHeartbeats {
    pub(in crate::control) fn save(&self, now: Instant) -> SavedHeartbeats {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let ago = |then: Instant| millis(now.saturating_duration_since(then));
        SavedHeartbeats {
            detector: self.detector.save(now),
            incarnation: self.incarnation,
            key_id: self.key_id,
            state: self.state.name().to_owned(),
            weight: self.weight,
            weight_in_force: self.weight_in_force,
            in_flight: self.in_flight,
            load: self.load.said,
            load_mean: self.load.mean,
            interval_ms: millis(self.interval),
            first_ms: ago(self.first_at),
            last_ms: ago(self.last_at),
            expired: self.expired,
        }
    }

    fn restore(saved: &SavedHeartbeats, now: Instant) -> BackendHeartbeats {
        let named = |state: &SenderState| state.name() == saved.state;
        let state = SenderState::ALL.into_iter().find(named).unwrap_or(SenderState::Ready);
        let mut load = ReportedLoad::new(saved.load.min(1000));
        if (0.0..=1000.0).contains(&saved.load_mean) {
            load.mean = saved.load_mean;
            load.share = ReportedLoad::wanted(load.mean);
        }
        let interval = Duration::from_millis(saved.interval_ms);
        let last_at = ago(now, saved.last_ms);
        BackendHeartbeats {
            detector: HeartbeatDetector::restore(&saved.detector, now),
            incarnation: saved.incarnation,
            key_id: saved.key_id,
            state,
            weight: saved.weight.max(1),
            weight_in_force: saved.weight_in_force.max(1),
            in_flight: saved.in_flight,
            load,
            interval: interval.clamp(super::INTERVAL_MIN, super::INTERVAL_MAX),
            first_at: ago(now, saved.first_ms),
            last_at,
            expired: saved.expired,
            excused: Duration::ZERO,
            excused_for_losses: Duration::ZERO,
            adopted: true,
            counted: None,
        }
    }

    /// Applies heartbeats that this process has received, if they are newer.
    fn update_from(&mut self, own: &BackendHeartbeats) {
        let Some((newest, at)) = own.detector.newest() else { return };
        if self.detector.newest().is_some_and(|(saved, _)| saved >= newest) {
            return;
        }
        let (incarnation, sequence) = newest;
        let beat = BeatInfo { incarnation, sequence, interval: own.interval };
        // The detector repeats a requested probe that is not performed.
        let _ = self.detector.beat(&beat, at);
        self.incarnation = own.incarnation;
        self.key_id = own.key_id;
        self.state = own.state;
        self.weight = own.weight;
        self.weight_in_force = own.weight_in_force;
        self.in_flight = own.in_flight;
        self.load = own.load;
        self.interval = own.interval;
        self.last_at = own.last_at;
        self.expired = false;
        self.adopted = false;
    }
}

// === impl HeartbeatWatch ===

impl HeartbeatWatch {
    /// Restores the backend's heartbeats of another process.
    pub(in crate::control) fn adopt_heartbeats(
        &mut self,
        state: &mut ControlState,
        id: BackendId,
        saved: &SavedBackend,
        now: Instant,
    ) {
        let Some(heartbeats) = &saved.heartbeats else { return };
        let Some(entry) = state.backends.touch(id) else { return };
        let Some(pool) = state.pools.get(entry.pool) else { return };
        let Some(spec) = pool.spec.heartbeat.clone() else { return };
        let mut heartbeats = BackendHeartbeats::restore(heartbeats, now);
        if let Some(own) = &entry.heartbeats {
            heartbeats.update_from(own);
        }
        entry.health.requested = requested(heartbeats.state);
        entry.requested_since = ago(now, saved.requested_ms);
        let expired = heartbeats.expired;
        self.drop_sender(entry);
        entry.heartbeats = Some(Box::new(heartbeats));
        entry.heartbeats_from = None;
        entry.health.heartbeat_health = entry.heartbeat_health(&spec, now);
        if let Some((_, over)) = entry.expiry(&spec) {
            if !expired {
                state.schedule.set(TimerKind::HeartbeatTtl(id), over.max(now));
            } else if entry.origins.is_registered() {
                let forget = after(over, spec.forget_after).max(now);
                state.schedule.set(TimerKind::Forget(id), forget);
            }
        }
        self.count(state, id);
        state.rearm(id);
        if !state.schedule.is_set(TimerKind::GuardTick) {
            self.guard_tick(state, now);
        }
    }

    /// Removes registered backends that the old process removed during the upgrade.
    pub(in crate::control) fn drop_unregistered(
        &mut self,
        state: &mut ControlState,
        saved: &SavedPool,
        now: Instant,
    ) {
        let Some(pool) = state.pools.named(&saved.name).filter(|_| saved.takes_heartbeats) else {
            return;
        };
        let there: HashSet<&str> =
            saved.backends.iter().map(|backend| backend.name.as_str()).collect();
        let gone = |id: &&BackendId| {
            state.backends.get(**id).is_some_and(|entry| {
                entry.origins.is_registered()
                    && entry.heartbeats.as_ref().is_some_and(|heartbeats| heartbeats.adopted)
                    && !there.contains(&*entry.spec.name)
            })
        };
        let gone: Vec<BackendId> = pool.members().iter().filter(gone).copied().collect();
        for id in gone {
            let reason = "removed by the old process during the upgrade";
            state.withdraw_registration(self, id, reason, now);
        }
    }
}

// === impl ControlState ===

impl ControlState {
    /// Adds a backend that has registered with another process.
    pub(in crate::control) fn adopt_registered(
        &mut self,
        saved: &SavedPool,
        backend: &SavedBackend,
        now: Instant,
    ) -> Option<BackendId> {
        let heartbeats = backend.heartbeats.as_ref().filter(|_| backend.registered)?;
        let pool = self.pools.named(&saved.name)?;
        let (id, spec) = (pool.id, Arc::clone(pool.spec.heartbeat.as_ref()?));
        let BackendAddr::Tcp(address) = sessions_elsewhere::address_of(&backend.address)? else {
            return None;
        };
        let claimed =
            pool.member_named(&backend.name).is_some() || pool.member_at(address).is_some();
        if claimed || !spec.register || self.frontends.listens_at(address) {
            return None;
        }
        self.check_capacity(id, &spec, now).ok()?;
        let weight = heartbeats.weight;
        let backend = self.admit(id, &spec, (backend.name.as_str().into(), address, weight), now);
        self.pools.note_change(id);
        self.pending.rebuild.get_or_insert(PublishReason::Heartbeat);
        Some(backend)
    }

    /// Adds a registered member to the pool, or restores a removed one.
    pub(in crate::control) fn admit(
        &mut self,
        pool_id: PoolId,
        spec: &HeartbeatSpec,
        (name, address, weight): (Arc<str>, std::net::SocketAddr, u16),
        now: Instant,
    ) -> BackendId {
        let member = model::BackendConfig {
            name,
            address: BackendAddr::Tcp(address),
            weight: weight.clamp(1, spec.weight_max.max(1)),
            tier: 0,
            connections_max: 0,
        };
        self.join(pool_id, PoolMember::registered(member), (0, 1), now)
    }
}
