//! Names of frontends, pools and backends by id, also of removed ones.
//!
//! `daemon` resolves the ids of decisions with [`Controller::names_of`]. A configured item
//! is found in its set, a removed one in a bounded list. Nothing here changes the
//! configuration.

use super::Controller;
use super::backends::BackendEntry;
use super::state::ControlState;
use crate::model::{BackendId, FrontendId, PoolId};
use crate::table::state::BackendState;
use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::sync::Arc;

/// Removed frontends, pools and backends whose names are kept, at most. The oldest is
/// dropped first.
pub const REMOVED_NAMES_MAX: usize = 4_096;

/// Pool, name and address of a backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendName {
    /// Name of its pool.
    pub pool: Arc<str>,
    /// Its name in the pool.
    pub name: Arc<str>,
    /// `IP:PORT` or `unix:PATH`.
    pub address: Arc<str>,
}

/// Names of some ids. An id without a name was removed too long ago.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    /// Names of frontends.
    pub frontends: HashMap<FrontendId, Arc<str>>,
    /// Names of pools.
    pub pools: HashMap<PoolId, Arc<str>>,
    /// Names of backends.
    pub backends: HashMap<BackendId, BackendName>,
}

/// Ids whose names are wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NamedIds {
    /// Frontends.
    pub frontends: Vec<FrontendId>,
    /// Pools.
    pub pools: Vec<PoolId>,
    /// Backends.
    pub backends: Vec<BackendId>,
}

/// Names of removed frontends, pools and backends.
#[derive(Debug, Default)]
pub(super) struct RemovedNames {
    names: Names,
    /// Oldest first, without repetitions.
    order: VecDeque<AnyId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AnyId {
    Frontend(FrontendId),
    Pool(PoolId),
    Backend(BackendId),
}

// === impl BackendName ===

impl BackendName {
    fn of(state: &BackendState) -> BackendName {
        let (pool, name, address) = state.identity();
        BackendName { pool, name, address }
    }
}

// === impl RemovedNames ===

impl RemovedNames {
    /// Keeps the name of a removed frontend.
    pub(super) fn keep_frontend(&mut self, id: FrontendId, name: &Arc<str>) {
        if self.names.frontends.insert(id, Arc::clone(name)).is_none() {
            self.keep(AnyId::Frontend(id));
        }
    }

    /// Keeps the name of a removed pool.
    pub(super) fn keep_pool(&mut self, id: PoolId, name: &Arc<str>) {
        if self.names.pools.insert(id, Arc::clone(name)).is_none() {
            self.keep(AnyId::Pool(id));
        }
    }

    /// Keeps the name of a removed backend.
    pub(super) fn keep_backend(&mut self, entry: &BackendEntry) {
        let id = entry.state.id;
        if self.names.backends.insert(id, BackendName::of(&entry.state)).is_none() {
            self.keep(AnyId::Backend(id));
        }
    }

    fn keep(&mut self, id: AnyId) {
        self.order.push_back(id);
        while self.order.len() > REMOVED_NAMES_MAX {
            match self.order.pop_front() {
                Some(AnyId::Frontend(id)) => drop(self.names.frontends.remove(&id)),
                Some(AnyId::Pool(id)) => drop(self.names.pools.remove(&id)),
                Some(AnyId::Backend(id)) => drop(self.names.backends.remove(&id)),
                None => {}
            }
        }
    }
}

// === impl Controller ===

impl Controller {
    /// Returns the names of these ids.
    pub fn names_of(&self, ids: &NamedIds) -> Names {
        let state = &self.state;
        Names {
            frontends: named(&ids.frontends, |id| state.frontend_name(id)),
            pools: named(&ids.pools, |id| state.pool_name(id)),
            backends: named(&ids.backends, |id| state.backend_name(id)),
        }
    }
}

// === impl ControlState ===

impl ControlState {
    fn frontend_name(&self, id: FrontendId) -> Option<Arc<str>> {
        let configured = self.frontends.iter().find(|entry| entry.state.id == id);
        let name = configured.map(|entry| &entry.spec.name);
        name.or_else(|| self.removed_names.names.frontends.get(&id)).cloned()
    }

    fn pool_name(&self, id: PoolId) -> Option<Arc<str>> {
        let configured = self.pool(id).map(|pool| &pool.spec.name);
        configured.or_else(|| self.removed_names.names.pools.get(&id)).cloned()
    }

    fn backend_name(&self, id: BackendId) -> Option<BackendName> {
        let known = self.backends.get(id).or_else(|| self.removed.get(id));
        let name = known.map(|entry| BackendName::of(&entry.state));
        name.or_else(|| self.removed_names.names.backends.get(&id).cloned())
    }
}

fn named<I: Copy + Eq + Hash, N>(ids: &[I], name: impl Fn(I) -> Option<N>) -> HashMap<I, N> {
    ids.iter().filter_map(|id| Some((*id, name(*id)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oldest_removed_name_is_dropped_at_the_bound() {
        let mut removed = RemovedNames::default();
        removed.keep_frontend(FrontendId(1), &"web".into());
        removed.keep_frontend(FrontendId(1), &"web".into());
        removed.keep_pool(PoolId(1), &"shop".into());
        for id in 2..REMOVED_NAMES_MAX as u32 {
            removed.keep_pool(PoolId(id), &"p".into());
        }
        assert!(removed.names.frontends.contains_key(&FrontendId(1)));
        removed.keep_pool(PoolId(9_999), &"p".into());
        assert!(!removed.names.frontends.contains_key(&FrontendId(1)));
        assert_eq!(removed.names.pools[&PoolId(1)].as_ref(), "shop");
        assert_eq!(removed.order.len(), REMOVED_NAMES_MAX);
    }
}
