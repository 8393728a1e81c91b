//! What status and metrics show: a copy of everything the controller knows.
//!
//! Called by `app` for the admin API. It derives, it never changes anything.

use super::{
    BackendEntry, BackendStatus, ControlStatus, Controller, FrontendStatus, PoolEntry, PoolStatus,
};
use std::sync::Arc;

// === impl Controller ===

impl Controller {
    /// What status and metrics show.
    pub fn status(&self) -> ControlStatus {
        let leaving = self.leaving.values().map(|leaving| &leaving.entry.state);
        ControlStatus {
            generation: self.generation,
            frontends: self
                .frontends
                .iter()
                .map(|frontend| FrontendStatus {
                    state: Arc::clone(&frontend.state),
                    binds: frontend.spec.binds.clone(),
                    pool: Arc::clone(&frontend.spec.pool),
                    connections_max: frontend.spec.connections_max,
                })
                .collect(),
            pools: self.pools.iter().map(|pool| self.pool_status(pool)).collect(),
            leaving: leaving.filter(|state| state.in_flight.get() > 0).map(Arc::clone).collect(),
        }
    }

    fn pool_status(&self, pool: &PoolEntry) -> PoolStatus {
        let members = pool.members.iter().filter_map(|id| self.backends.get(id));
        PoolStatus {
            name: Arc::clone(&pool.spec.name),
            balance: pool.spec.balance.name(),
            backends: members.map(backend_status).collect(),
        }
    }
}

fn backend_status(entry: &BackendEntry) -> BackendStatus {
    BackendStatus {
        state: Arc::clone(&entry.state),
        weight: u32::from(entry.spec.weight),
        effective_weight: entry.health.effective_weight(entry.spec.weight),
        backup: entry.spec.backup,
        connections_max: entry.spec.connections_max,
        intent: entry.health.intent,
        observation: entry.health.observation(),
        ejected: entry.health.outlier.is_ejected(),
        ejections_total: entry.health.outlier.ejections_total(),
        ejections_held_total: entry.health.outlier.held_total(),
        eligible: entry.health.eligible(),
        last_transition: entry.last_transition.clone(),
    }
}
