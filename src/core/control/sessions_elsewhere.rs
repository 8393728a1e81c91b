//! Sessions that the processes before this one still hold.
//!
//! Called by `daemon` with what the old process reports after an upgrade, and for
//! what this one reports to the next. Usually both processes count in the same memory,
//! and a report only makes a backend known here; of a process that counts by itself
//! the sessions are added to this one's (`InFlight::set_elsewhere`). So status, caps and
//! `leaving` see both together. A backend that only the old process knows becomes one
//! of `leaving`. It never touches a session.

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

/// Most backends that are in no configuration and are shown because of sessions
/// elsewhere; the sessions of further ones are only in the process's sum.
pub const STRANGERS_MAX: usize = 10_000;

/// Sessions on one backend.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HeldBackend {
    /// Of the backend.
    pub pool: String,
    /// Of the backend.
    pub name: String,
    /// As the file spells it.
    pub address: String,
    /// Open now.
    pub sessions: u32,
    /// They are counted where this process counts, too; `sessions` only says whether
    /// there are any.
    pub shared: bool,
}

/// Sessions of one frontend.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HeldFrontend {
    /// Of the frontend.
    pub name: String,
    /// Open now.
    pub sessions: u32,
    /// As of a backend.
    pub shared: bool,
}

// === impl Controller ===

impl Controller {
    /// Takes what the process before says of its sessions: those counts that have
    /// changed.
    pub fn held_elsewhere(
        &mut self,
        backends: &[HeldBackend],
        frontends: &[HeldFrontend],
        now: Instant,
    ) -> Vec<ControlEffect> {
        self.run_due(now);
        for held in backends {
            let id = self.state.find_known(&held.pool, &held.name, &held.address);
            let id = id.or_else(|| (held.sessions > 0).then(|| self.state.stranger(held, now))?);
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

    /// The processes before hold no session any more.
    pub fn held_here_alone(&mut self) {
        for state in self.every_known() {
            state.in_flight.set_elsewhere(0);
        }
        for frontend in self.state.frontends.iter() {
            frontend.state.in_flight.set_elsewhere(0);
        }
    }

    /// Configured, registered and leaving backends, in no order.
    pub fn every_known(&self) -> impl Iterator<Item = &Arc<BackendState>> {
        let removed = self.state.removed.iter().map(|entry| &entry.state);
        self.backends().chain(removed)
    }

    /// Every frontend, in file order.
    pub fn frontends(&self) -> impl Iterator<Item = &Arc<FrontendState>> {
        self.state.frontends.iter().map(|entry| &entry.state)
    }

    /// The backend of that number, configured or removed.
    pub fn known(&self, id: BackendId) -> Option<&Arc<BackendState>> {
        self.state.known(id)
    }

    /// The backend that another process knows by these, configured or removed.
    pub fn find_known(&self, pool: &str, name: &str, address: &str) -> Option<BackendId> {
        self.state.find_known(pool, name, address)
    }
}

// === impl ControlState ===

impl ControlState {
    /// The backend of that number, configured or removed.
    pub(super) fn known(&self, id: BackendId) -> Option<&Arc<BackendState>> {
        self.backends.get(id).or_else(|| self.removed.get(id)).map(|entry| &entry.state)
    }

    /// The backend that another process knows by these, configured or removed.
    pub(super) fn find_known(&self, pool: &str, name: &str, address: &str) -> Option<BackendId> {
        self.find_saved(pool, name, address)
            .or_else(|| self.removed.find(&(pool.into(), name.into(), address_of(address)?)))
    }

    /// Keeps a backend that is not known here as one that was removed.
    fn stranger(&mut self, held: &HeldBackend, now: Instant) -> Option<BackendId> {
        if self.removed.len() >= STRANGERS_MAX {
            return None;
        }
        let spec = model::BackendConfig {
            name: held.name.as_str().into(),
            address: address_of(&held.address)?,
            weight: 1,
            backup: false,
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

/// The address of that spelling.
pub(super) fn address_of(text: &str) -> Option<BackendAddr> {
    match text.strip_prefix("unix:") {
        Some(path) => Some(BackendAddr::Unix(path.into())),
        None => text.parse().ok().map(BackendAddr::Tcp),
    }
}
