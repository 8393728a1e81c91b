//! Slow start: a backend that comes into rotation gets its weight step by step.
//!
//! Called by the controller at the end of each event, for backends whose eligibility can
//! have changed. `core::suspicion::Ramp` defines the curve. This module decides which
//! backends need a slow start. It does not change eligibility.
//!
//! - A backend starts slowly if its pool has been in service for at least `slow_start`.
//! - While the whole pool comes up, no backend starts slowly. Shares are relative, so the
//!   first backend would get all sessions anyway.
//! - For the same reason all slow starts of a pool end when no backend has its full share.

use super::pools::PoolId;
use super::schedule::TimerKind;
use super::state::ControlState;
use crate::suspicion::Ramp;
use crate::table::state::BackendId;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

// === impl ControlState ===

impl ControlState {
    /// Starts and ends slow starts of backends whose eligibility has changed.
    pub(super) fn settle_ramps(&mut self, now: Instant) {
        let mut changed = BTreeSet::new();
        let mut candidates = self.backends.take_fresh();
        candidates.extend(self.backends.touched());
        for id in candidates {
            if let Some(pool) = self.settle_ramp(id, now) {
                changed.insert(pool);
            }
        }
        for pool in changed {
            self.settle_pool_ramps(pool, now);
        }
    }

    /// Starts or ends the slow start of a backend. Returns its pool if its eligibility has
    /// changed.
    fn settle_ramp(&mut self, id: BackendId, now: Instant) -> Option<PoolId> {
        let entry = self.backends.get(id)?;
        let serves = entry.health.eligible();
        if entry.served == serves {
            return None;
        }
        let entry = self.backends.touch_later(id)?;
        let pool = self.pools.get(entry.pool)?;
        entry.served = serves;
        (entry.ramp, entry.ramp_share) = (None, 100);
        self.schedule.cancel(TimerKind::Ramp(id));
        if let Some(over) = pool.spec.slow_start
            && serves
            && pool.in_service_since.is_some_and(|at| now.saturating_duration_since(at) >= over)
        {
            let ramp = Ramp { since: now, over };
            entry.ramp_share = ramp.percent(now);
            if let Some(at) = ramp.next_step(now) {
                entry.ramp = Some(ramp);
                self.schedule.set(TimerKind::Ramp(id), at);
            }
        }
        Some(pool.id)
    }

    /// Updates since when the pool is in service. Ends all slow starts if no backend has
    /// its full share.
    pub(super) fn settle_pool_ramps(&mut self, pool: PoolId, now: Instant) {
        let Some(pool) = self.pools.get(pool) else { return };
        let serving = || {
            let members = pool.members().iter().filter_map(|id| self.backends.get(*id));
            members.filter(|member| member.served)
        };
        let serves = serving().next().is_some();
        let none_to_lag_behind = serves && serving().all(|member| member.ramp.is_some());
        let ramped = if none_to_lag_behind { pool.members().to_vec() } else { Vec::new() };
        let id = pool.id;
        if let Some(pool) = self.pools.observe(id) {
            pool.in_service_since = serves.then(|| pool.in_service_since.unwrap_or(now));
        }
        for id in ramped {
            let Some(member) = self.backends.touch_later(id) else { continue };
            (member.ramp, member.ramp_share) = (None, 100);
            self.schedule.cancel(TimerKind::Ramp(id));
        }
    }

    /// Continues a slow start of this age after an upgrade; without `age`, the backend has
    /// its full share. A backend in rotation in the old process starts no new slow start.
    pub(super) fn adopt_ramp(&mut self, id: BackendId, age: Option<Duration>, now: Instant) {
        let Some(entry) = self.backends.touch_later(id) else { return };
        let Some(pool) = self.pools.get(entry.pool) else { return };
        if !entry.health.eligible() {
            return;
        }
        entry.served = true;
        let since = age.and_then(|age| now.checked_sub(age));
        let ramp = since.zip(pool.spec.slow_start).map(|(since, over)| Ramp { since, over });
        entry.ramp_share = ramp.map_or(100, |ramp| ramp.percent(now));
        let next = ramp.and_then(|ramp| ramp.next_step(now));
        entry.ramp = ramp.filter(|_| next.is_some());
        match next {
            Some(at) => self.schedule.set(TimerKind::Ramp(id), at),
            None => self.schedule.cancel(TimerKind::Ramp(id)),
        }
    }

    /// Performs the due step of a slow start.
    pub(super) fn ramp_step(&mut self, id: BackendId, now: Instant) {
        let Some(entry) = self.backends.touch_later(id) else { return };
        let Some(ramp) = entry.ramp else { return };
        entry.ramp_share = ramp.percent(now);
        match ramp.next_step(now) {
            Some(at) => self.schedule.set(TimerKind::Ramp(id), at),
            None => entry.ramp = None,
        }
    }
}
