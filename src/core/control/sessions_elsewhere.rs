//! Open sessions of the old processes, after upgrades.
//!
//! Called by `daemon` with the reports of the old process, and for the reports of this
//! process to the next one. This module changes no session.
//!
//! - Usually both processes share the counters in memory. A report then only makes a
//!   backend known here.
//! - If the old process has its own counters, its sessions are added to those of this
//!   process (`InFlight::set_elsewhere`). `status`, caps and `removal` use the sum.
//! - A backend that only the old process knows is added to the removed backends.

use super::backends::BackendEntry;
use super::pools::PoolId;
use super::state::ControlState;
use super::{ControlEffect, Controller};
use crate::model;
use crate::model::{BackendAddr, OnRemoval};
use crate::table::state::{BackendId, BackendState, FrontendState};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Instant;

/// Most unconfigured backends that are listed for their sessions in other processes. The
/// sessions of further backends count only in the total of the process.
pub const FOREIGN_BACKENDS_MAX: usize = 10_000;

/// Sessions on one backend.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HeldBackend {
    /// Name of the pool.
    pub pool: String,
    /// Name of the backend.
    pub name: String,
    /// Address as spelled in the file.
    pub address: String,
    /// Open sessions.
    pub sessions: u32,
    /// The processes share the counter. `sessions` then only shows whether there are any.
    pub shared: bool,
}

/// Sessions of one frontend.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HeldFrontend {
    /// Name of the frontend.
    pub name: String,
    /// Open sessions.
    pub sessions: u32,
    /// The processes share the counter.
    pub shared: bool,
}

// === impl Controller ===

impl Controller {
    /// Applies a report of the old process. The report lists changed counts only.
    pub fn held_elsewhere(
        &mut self,
        backends: &[HeldBackend],
        frontends: &[HeldFrontend],
        now: Instant,
    ) -> Vec<ControlEffect> {
        self.run_due(now);
        for held in backends {
            let id = self.state.find_known(&held.pool, &held.name, &held.address);
            let id =
                id.or_else(|| (held.sessions > 0).then(|| self.state.add_foreign(held, now))?);
            if let Some(state) = id.and_then(|id| self.state.known(id)) {
                state.in_flight.set_elsewhere(added(held.sessions, held.shared));
            }
        }
        for held in frontends {
            if let Some(entry) = self.state.frontends.named(&held.name) {
                entry.state.in_flight.set_elsewhere(added(held.sessions, held.shared));
            }
        }
        self.finish(now)
    }

    /// Records that the old processes have no session left.
    pub fn held_here_alone(&mut self) {
        for state in self.every_known() {
            state.in_flight.set_elsewhere(0);
        }
        for frontend in self.state.frontends.iter() {
            frontend.state.in_flight.set_elsewhere(0);
        }
    }

    /// Returns the configured, registered and removed backends, in no order.
    pub fn every_known(&self) -> impl Iterator<Item = &Arc<BackendState>> {
        let removed = self.state.removed.iter().map(|entry| &entry.state);
        self.backends().chain(removed)
    }

    /// Returns all frontends, in file order.
    pub fn frontends(&self) -> impl Iterator<Item = &Arc<FrontendState>> {
        self.state.frontends.iter().map(|entry| &entry.state)
    }

    /// Returns the backend with this id, configured or removed.
    pub fn known(&self, id: BackendId) -> Option<&Arc<BackendState>> {
        self.state.known(id)
    }

    /// Returns the backend with these names, configured or removed.
    pub fn find_known(&self, pool: &str, name: &str, address: &str) -> Option<BackendId> {
        self.state.find_known(pool, name, address)
    }
}

// === impl ControlState ===

impl ControlState {
    /// Returns the backend with this id, configured or removed.
    pub(super) fn known(&self, id: BackendId) -> Option<&Arc<BackendState>> {
        self.backends.get(id).or_else(|| self.removed.get(id)).map(|entry| &entry.state)
    }

    /// Returns the backend with these names, configured or removed.
    pub(super) fn find_known(&self, pool: &str, name: &str, address: &str) -> Option<BackendId> {
        self.find_saved(pool, name, address)
            .or_else(|| self.removed.find(&(pool.into(), name.into(), address_of(address)?)))
    }

    /// Adds a backend of another process to the removed backends.
    fn add_foreign(&mut self, held: &HeldBackend, now: Instant) -> Option<BackendId> {
        if self.removed.len() >= FOREIGN_BACKENDS_MAX {
            return None;
        }
        let spec = model::BackendConfig {
            name: held.name.as_str().into(),
            address: address_of(&held.address)?,
            weight: 1,
            tier: 0,
            connections_max: 0,
        };
        let pool = self.pools.named(&held.pool);
        let rule = pool.map_or(OnRemoval::Keep, |pool| pool.spec.on_removal);
        let pool_id = pool.map_or(PoolId::NONE, |pool| pool.id);
        let state = self.allocator.backend(held.pool.as_str().into(), &spec);
        let id = state.id;
        self.keep_removed(BackendEntry::new(state, pool_id, spec, now), rule, now);
        Some(id)
    }
}

fn added(sessions: u32, shared: bool) -> u32 {
    if shared { 0 } else { sessions }
}

/// Parses an address as spelled in the file.
pub(super) fn address_of(text: &str) -> Option<BackendAddr> {
    text.parse().ok()
}
