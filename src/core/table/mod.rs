//! The table: an immutable snapshot of where sessions go.
//!
//! Built by `build` from the model and the backends' statuses, published by
//! `publish`, loaded once by each session. It holds no health: only what is
//! eligible now, and the prepared balancer over it. Nothing here does I/O.

pub mod build;
pub mod publish;
pub mod routes;
pub mod source_addrs;
pub mod state;

use crate::balance::trial::{TrialId, TrialPhase};
use crate::balance::{Balancer, PickError, PickKey};
use crate::model;
use crate::model::BindKey;
use state::{BackendState, FrontendId, FrontendState};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// Frontends, the pools they route to and what is eligible in them, as of one
/// moment.
#[derive(Debug)]
pub struct Table {
    /// Counts accepted configurations; what operators see as *generation*.
    pub generation: u64,
    /// Counts published tables: health and operators make new ones too.
    pub serial: u64,
    /// Cap on sessions in the whole process.
    pub connections_max: u32,
    /// In file order.
    pub frontends: Vec<Arc<FrontendRoute>>,
    /// In file order.
    pub pools: Vec<Arc<PoolTable>>,
    /// Positions in `frontends`; shared by the tables of a configuration.
    by_bind: Arc<HashMap<BindKey, usize>>,
    /// The same.
    by_id: Arc<HashMap<FrontendId, usize>>,
}

/// A frontend and where it routes to.
#[derive(Debug)]
pub struct FrontendRoute {
    /// Long-lived counters and cap.
    pub state: Arc<FrontendState>,
    /// The model's view: timers and limits.
    pub spec: model::FrontendConfig,
    /// In the order of `spec.routes`; `None` where a route refuses.
    pub routes: Box<[Option<Arc<PoolTable>>]>,
    /// Where sessions go that no route matches.
    pub pool: Arc<PoolTable>,
    /// What it waits for before a session is routed; mostly nothing.
    pub preread: Option<Preread>,
}

/// The first bytes of a client that its route needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preread {
    /// How many; at least one, and no more than a socket's receive queue holds.
    pub bytes: u32,
    /// How long they have to arrive.
    pub timeout: Duration,
}

/// A pool as sessions see it.
#[derive(Debug)]
pub struct PoolTable {
    /// The model's view: connect timeout, attempts.
    pub spec: Arc<model::PoolConfig>,
    /// The tier in service: the eligible primaries, or the eligible backups
    /// where there is no such primary, or (`try-all`) everything no operator
    /// took out. Same order and indices as the balancer's candidates.
    pub serving: Vec<Arc<BackendState>>,
    /// Over `serving`; `None` when nobody may serve. Tables in a row share it
    /// while it would come out the same.
    pub balancer: Option<Arc<Balancer>>,
    /// Nobody serves, and a first verdict is due: clients wait for it.
    pub undecided: bool,
}

/// A chosen backend whose in-flight count was raised; dropping it lowers the
/// count again.
#[derive(Debug)]
pub struct Reservation {
    /// Position in the pool's `serving`, for the list of tried ones.
    pub index: usize,
    backend: Arc<BackendState>,
    trial: Option<TrialId>,
}

/// Why a pool gave no backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoBackend {
    /// Nobody is eligible.
    NoneEligible,
    /// Nobody is yet, and a first verdict is due.
    Undecided,
    /// Everybody in service was tried already.
    Exhausted,
    /// Whoever is untried is at its cap.
    AtCapacity,
}

// === impl Table ===

impl Table {
    /// No frontends, no pools: what is published before the first
    /// configuration. Generation and serial are 0.
    pub fn empty() -> Table {
        Table {
            generation: 0,
            serial: 0,
            connections_max: 0,
            frontends: Vec::new(),
            pools: Vec::new(),
            by_bind: Arc::default(),
            by_id: Arc::default(),
        }
    }

    /// The frontend that owns that bind.
    #[inline]
    pub fn frontend_at(&self, bind: &BindKey) -> Option<&Arc<FrontendRoute>> {
        self.frontends.get(*self.by_bind.get(bind)?)
    }

    /// What has become of the frontend with that state; `None` where it has left.
    pub fn frontend(&self, state: &Arc<FrontendState>) -> Option<&Arc<FrontendRoute>> {
        let route = self.frontends.get(*self.by_id.get(&state.id)?)?;
        Arc::ptr_eq(&route.state, state).then_some(route)
    }
}

// === impl PoolTable ===

impl PoolTable {
    /// Chooses a backend outside `tried` (positions in `serving`).
    pub fn pick(&self, key: PickKey, tried: &[usize]) -> Result<Reservation, NoBackend> {
        let Some(balancer) = &self.balancer else {
            let due = self.undecided;
            return Err(if due { NoBackend::Undecided } else { NoBackend::NoneEligible });
        };
        match balancer.pick(key, tried) {
            Ok(index) => {
                let backend = Arc::clone(&self.serving[index]);
                let trial = backend.in_flight.claim_trial();
                Ok(Reservation { index, backend, trial })
            }
            Err(PickError::Exhausted) => Err(NoBackend::Exhausted),
            Err(PickError::AtCapacity) => Err(NoBackend::AtCapacity),
        }
    }

    /// False only while every backend in service is at its cap: then new
    /// connections had better wait in the kernel's queue.
    #[inline]
    pub fn has_room(&self) -> bool {
        self.balancer.as_ref().is_none_or(|balancer| balancer.has_room())
    }
}

// === impl Reservation ===

impl Reservation {
    /// The chosen backend.
    pub fn backend(&self) -> &Arc<BackendState> {
        &self.backend
    }

    /// The trial that this session is to decide, if its backend is on one. Given
    /// once: whoever has it sees to it that it is decided or opened again.
    pub fn take_trial(&mut self) -> Option<TrialId> {
        self.trial.take()
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // Nobody has tried: the next session is to.
        if let Some(trial) = self.trial.take() {
            self.backend.in_flight.advance_trial(trial, TrialPhase::Open);
        }
        self.backend.in_flight.leave();
    }
}
