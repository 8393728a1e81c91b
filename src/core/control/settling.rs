//! Pools in which no backend serves because none has been judged yet: at the
//! start, and after a reload that left none of the backends that served.
//!
//! The controller calls it for each configuration and at the end of each event.
//! Until one of the new backends serves, or all of them have a verdict, or
//! `startup_grace` is over, such a pool keeps its former backends in service:
//! those that took sessions and left by the reload. Where there are none, clients
//! wait (`dataplane::accept::queue`). It judges nobody.

use super::PublishReason;
use super::backends::BackendEntry;
use super::pools::{PoolEntry, PoolId};
use super::schedule::{TimerKind, after};
use super::state::ControlState;
use crate::health::{Intent, Observation, RequestedState};
use crate::table::state::BackendId;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

/// See the module's documentation.
#[derive(Debug, Clone)]
pub(super) struct PoolSettling {
    /// When it ends in any case.
    until: Instant,
    /// Former backends, all of them leaving; one whose connects fail is dropped.
    pub(super) stand_ins: Vec<BackendId>,
}

/// Who served before a reload.
#[derive(Debug)]
pub(super) struct Former {
    /// By pool: the backends that took sessions, and those that stood in.
    backends: HashMap<Arc<str>, Vec<BackendId>>,
    /// By frontend: its pool.
    pools: HashMap<Arc<str>, Arc<str>>,
}

// === impl ControlState ===

impl ControlState {
    /// Who serves now; to be asked before a reload changes anything.
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

    /// Begins what each pool needs after a reload, or continues it.
    pub(super) fn begin_settling(&mut self, former: &Former, now: Instant) {
        // The pools that the same frontends led to: a pool may have a new name.
        let mut predecessors: HashMap<&str, BTreeSet<&str>> = HashMap::new();
        for frontend in self.frontends.iter() {
            if let Some(before) = former.pools.get(&frontend.spec.name) {
                predecessors.entry(&frontend.spec.pool).or_default().insert(before);
            }
        }
        let mut all = Vec::with_capacity(self.pools.iter().len());
        for pool in &self.pools {
            if !self.is_unsettled(pool) {
                self.schedule.cancel(TimerKind::SettlingEnds(pool.id));
                all.push((pool.id, None));
                continue;
            }
            let mut names = predecessors.get(&*pool.spec.name).cloned().unwrap_or_default();
            names.insert(&pool.spec.name);
            let ids = names.iter().filter_map(|name| former.backends.get(*name)).flatten();
            let stand_ins = ids.filter(|id| self.removed.get(**id).is_some()).copied().collect();
            let until = pool.settling().map(|settling| settling.until);
            let until = until.unwrap_or_else(|| after(now, pool.spec.startup_grace));
            self.schedule.set(TimerKind::SettlingEnds(pool.id), until.max(now));
            all.push((pool.id, Some(PoolSettling { until, stand_ins })));
        }
        all.into_iter().for_each(|(pool, settling)| self.pools.set_settling(pool, settling));
    }

    /// Whether no backend of the pool serves and some have no verdict yet.
    fn is_unsettled(&self, pool: &PoolEntry) -> bool {
        let members = || pool.members().iter().filter_map(|id| self.backends.get(*id));
        !members().any(|entry| entry.health.eligible()) && members().any(is_undecided)
    }

    /// Ends it in the pools that need it no more. An event changes few backends.
    pub(super) fn check_settling(&mut self) {
        if !self.pools.any_settling() {
            return;
        }
        let changed = self.backends.touched().iter().chain(self.backends.waiting());
        let pools: BTreeSet<PoolId> =
            changed.filter_map(|id| Some(self.backends.get(*id)?.pool)).collect();
        let over = |pool: &PoolId| {
            let pool = self.pool(*pool).filter(|pool| pool.settling().is_some());
            pool.is_some_and(|pool| !self.is_unsettled(pool))
        };
        let over: Vec<PoolId> = pools.into_iter().filter(over).collect();
        over.into_iter().for_each(|pool| self.settled(pool));
    }

    /// From now on the pool's own backends decide alone.
    pub(super) fn settled(&mut self, pool: PoolId) {
        self.schedule.cancel(TimerKind::SettlingEnds(pool));
        if self.pools.end_settling(pool) {
            self.pending.rebuild.get_or_insert(PublishReason::Health);
        }
    }

    /// A former backend does not take sessions any more.
    pub(super) fn stands_in_no_more(&mut self, id: BackendId) {
        if self.pools.any_settling() && self.pools.remove_stand_in(id) {
            self.pending.rebuild.get_or_insert(PublishReason::Health);
        }
    }
}

/// Whether it may serve once it has been judged for the first time.
fn is_undecided(entry: &BackendEntry) -> bool {
    let health = &entry.health;
    health.combined_observation() == Observation::Unknown
        && health.intent == Intent::Ready
        && health.requested == RequestedState::Ready
        && !health.outlier.is_ejected()
        && !health.eligible()
}
