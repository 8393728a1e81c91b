//! Settling of a pool: no backend is eligible because none has a result yet. This happens
//! after a start, and after a reload that replaces all eligible backends.
//!
//! Called by the controller for each configuration and at the end of each event.
//!
//! - Settling ends when a new backend is eligible, when all have a result, or after
//!   `startup_grace`. A pool without an eligible backend also settles until its member
//!   sources have answered, at most for `first_wait`.
//! - Until then the former backends, which the reload removed, stay in rotation as
//!   *stand-ins*.
//! - Without stand-ins, clients wait in the queue (`dataplane::accept::queue`).

use super::PublishReason;
use super::backends::BackendEntry;
use super::pools::{PoolEntry, PoolId};
use super::schedule::{TimerKind, after};
use super::state::ControlState;
use crate::health::{Intent, Observation};
use crate::table::state::BackendId;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

/// See the module documentation.
#[derive(Debug, Clone)]
pub(super) struct PoolSettling {
    /// Latest end of the settling.
    until: Instant,
    /// Removed backends that stay in rotation. A failed connect drops the backend.
    pub(super) stand_ins: Vec<BackendId>,
}

/// The backends in rotation before a reload.
#[derive(Debug)]
pub(super) struct Former {
    /// Eligible backends and stand-ins, by pool.
    backends: HashMap<Arc<str>, Vec<BackendId>>,
    /// Pool of each frontend.
    pools: HashMap<Arc<str>, Arc<str>>,
}

// === impl ControlState ===

impl ControlState {
    /// Returns the backends in rotation. Call it before a reload changes anything.
    pub(super) fn former(&self) -> Former {
        let mut backends = HashMap::new();
        for pool in &self.pools {
            let serves = |id: &&BackendId| {
                self.backends.get(**id).is_some_and(|entry| entry.published.is_eligible())
            };
            let mut ids: Vec<BackendId> = pool.members().iter().filter(serves).copied().collect();
            ids.extend(pool.settling().into_iter().flat_map(|settling| &settling.stand_ins));
            backends.insert(Arc::clone(&pool.spec.name), ids);
        }
        let frontends = self.frontends.iter().map(|frontend| &frontend.spec);
        let pools = frontends.map(|spec| (Arc::clone(&spec.name), Arc::clone(&spec.pool)));
        Former { backends, pools: pools.collect() }
    }

    /// Begins, continues or ends the settling of each pool after a reload.
    pub(super) fn begin_settling(&mut self, former: &Former, now: Instant) {
        // The pools that the same frontends were routed to, because a pool can have a new
        // name.
        let mut predecessors: HashMap<&str, BTreeSet<&str>> = HashMap::new();
        for frontend in self.frontends.iter() {
            if let Some(before) = former.pools.get(&frontend.spec.name) {
                predecessors.entry(&frontend.spec.pool).or_default().insert(before);
            }
        }
        let mut all = Vec::with_capacity(self.pools.iter().len());
        for pool in &self.pools {
            if !self.is_unsettled(pool, now) {
                self.schedule.cancel(TimerKind::SettlingEnds(pool.id));
                all.push((pool.id, None));
                continue;
            }
            let mut names = predecessors.get(&*pool.spec.name).cloned().unwrap_or_default();
            names.insert(&pool.spec.name);
            // A former backend has no role of which a probe of this configuration tells.
            names.retain(|_| pool.spec.role.is_none());
            let ids = names.iter().filter_map(|name| former.backends.get(*name)).flatten();
            let stand_ins = ids.filter(|id| self.removed.get(**id).is_some()).copied().collect();
            let until = pool.settling().map(|settling| settling.until);
            let until = until.unwrap_or_else(|| self.settling_until(pool, now));
            self.schedule.set(TimerKind::SettlingEnds(pool.id), until.max(now));
            all.push((pool.id, Some(PoolSettling { until, stand_ins })));
        }
        all.into_iter().for_each(|(pool, settling)| self.pools.set_settling(pool, settling));
    }

    /// Whether no backend of the pool is eligible, and some have no result yet or a member
    /// source has not answered yet.
    fn is_unsettled(&self, pool: &PoolEntry, now: Instant) -> bool {
        let members = || pool.members().iter().filter_map(|id| self.backends.get(*id));
        !members().any(|entry| entry.health.eligible())
            && (members().any(is_undecided) || self.views.awaited(&pool.spec.name, now).is_some())
    }

    /// Returns the latest end of a settling that begins now: the end of `startup_grace`, or
    /// of the wait for a member source.
    fn settling_until(&self, pool: &PoolEntry, now: Instant) -> Instant {
        let awaited = self.views.awaited(&pool.spec.name, now);
        let grace = after(now, pool.spec.startup_grace);
        match awaited {
            Some(until) if pool.members().is_empty() => until,
            awaited => awaited.map_or(grace, |until| until.max(grace)),
        }
    }

    /// Ends or extends the settling of a pool after the first answer of a member source:
    /// its members have `startup_grace` for their first results.
    pub(super) fn first_answer(&mut self, pool: PoolId, now: Instant) {
        let Some(pool) = self.pool(pool).filter(|pool| pool.settling().is_some()) else { return };
        let id = pool.id;
        if !self.is_unsettled(pool, now) {
            self.settled(id);
            return;
        }
        let until = self.settling_until(pool, now);
        if let Some(pool) = self.pools.observe(id)
            && let Some(settling) = pool.settling_mut()
        {
            settling.until = settling.until.max(until);
            self.schedule.set(TimerKind::SettlingEnds(id), settling.until);
        }
    }

    /// Ends the settling of pools that no longer need it. Checks changed backends only.
    pub(super) fn check_settling(&mut self, now: Instant) {
        if !self.pools.any_settling() {
            return;
        }
        let changed = self.backends.touched().iter().chain(self.backends.waiting());
        let pools: BTreeSet<PoolId> =
            changed.filter_map(|id| Some(self.backends.get(*id)?.pool)).collect();
        let over = |pool: &PoolId| {
            let pool = self.pool(*pool).filter(|pool| pool.settling().is_some());
            pool.is_some_and(|pool| !self.is_unsettled(pool, now))
        };
        let over: Vec<PoolId> = pools.into_iter().filter(over).collect();
        over.into_iter().for_each(|pool| self.settled(pool));
    }

    /// Ends the settling of a pool.
    pub(super) fn settled(&mut self, pool: PoolId) {
        self.schedule.cancel(TimerKind::SettlingEnds(pool));
        if self.pools.end_settling(pool) {
            self.pending.rebuild.get_or_insert(PublishReason::Health);
        }
    }

    /// Removes a former backend from the stand-ins.
    pub(super) fn drop_stand_in(&mut self, id: BackendId) {
        if self.pools.any_settling() && self.pools.remove_stand_in(id) {
            self.pending.rebuild.get_or_insert(PublishReason::Health);
        }
    }
}

/// Whether the backend can become eligible with its first result.
fn is_undecided(entry: &BackendEntry) -> bool {
    let health = &entry.health;
    health.combined_observation() == Observation::Unknown
        && health.intent == Intent::Ready
        && health.is_wanted()
        && !health.outlier.is_ejected()
        && !health.eligible()
}
