//! From standings to a table, and whether a new one is due.
//!
//! The controller calls it at the end of each event. It builds, it does not
//! publish: that is the shell's part.

use super::{BackendEntry, Controller, PoolEntry};
use crate::config::WhenNoneEligible;
use crate::health::Intent;
use crate::table::Table;
use crate::table::build::{self, BackendInput, FrontendInput, PoolInput};
use crate::table::state::BackendId;
use std::sync::Arc;

/// All that a table says of a backend and that can change between reloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Standing {
    /// 0: not eligible.
    effective_weight: u32,
    /// Matters to `try-all` pools only, and is false in others.
    last_resort: bool,
}

/// The table of a process that has no configuration yet.
pub(super) fn empty_table() -> Table {
    let nothing = build::Input {
        generation: 0,
        serial: 0,
        connections_max: 0,
        frontends: Vec::new(),
        pools: Vec::new(),
    };
    build::build(nothing, None)
}

// === impl Standing ===

impl Standing {
    fn of(entry: &BackendEntry, pool: &PoolEntry) -> Standing {
        Standing {
            effective_weight: entry.health.effective_weight(entry.spec.weight),
            last_resort: pool.spec.when_none_eligible == WhenNoneEligible::TryAll
                && entry.in_service(),
        }
    }
}

// === impl BackendEntry ===

impl BackendEntry {
    /// No operator has taken it out.
    fn in_service(&self) -> bool {
        self.health.intent == Intent::Ready
    }
}

// === impl Controller ===

impl Controller {
    /// Whether the newest table is wrong about that backend.
    pub(super) fn moved(&self, id: BackendId) -> bool {
        let Some(entry) = self.backends.get(&id) else { return false };
        self.pool(entry.pool).is_some_and(|pool| Standing::of(entry, pool) != entry.published)
    }

    /// Builds the next table from everything known now.
    pub(super) fn rebuild(&mut self) -> Arc<Table> {
        self.serial += 1;
        let mut pools = Vec::with_capacity(self.pools.len());
        for pool in &self.pools {
            let mut backends = Vec::with_capacity(pool.members.len());
            for id in &pool.members {
                let Some(entry) = self.backends.get_mut(id) else { continue };
                entry.published = Standing::of(entry, pool);
                backends.push(BackendInput {
                    state: Arc::clone(&entry.state),
                    effective_weight: entry.published.effective_weight.max(1),
                    connections_max: entry.spec.connections_max,
                    backup: entry.spec.backup,
                    eligible: entry.published.effective_weight > 0,
                    in_service: entry.in_service(),
                });
            }
            pools.push(PoolInput { spec: Arc::clone(&pool.spec), backends });
        }
        let frontends = self.frontends.iter().map(|frontend| FrontendInput {
            state: Arc::clone(&frontend.state),
            spec: frontend.spec.clone(),
        });
        let input = build::Input {
            generation: self.generation,
            serial: self.serial,
            connections_max: self.connections_max,
            frontends: frontends.collect(),
            pools,
        };
        self.table = Arc::new(build::build(input, Some(&self.table)));
        Arc::clone(&self.table)
    }
}
