//! The table: an immutable snapshot of where sessions go.
//!
//! `build` makes it from the model and the backends' states. `publish` publishes it.
//! Each session loads it once. It holds no health: only the eligible backends and a
//! prepared balancer over them. Nothing here does I/O.

pub mod build;
pub mod decide;
pub mod forecast;
pub mod publish;
pub mod routes;
pub mod source_addrs;
pub mod state;
pub mod tiers;

use crate::balance::tiered::TierBalancers;
use crate::balance::trial::{TrialId, TrialPhase};
use crate::balance::{PickError, PickKey};
use crate::model;
use crate::model::{BindKey, WhenNoneEligible};
use crate::rebalance::BackendLoad;
use decide::{LeftOut, ServingTier, TierStart};
use state::{BackendState, FrontendId, FrontendState, PoolId};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// Frontends, the pools they route to, and the eligible backends of each pool at one
/// moment.
#[derive(Debug)]
pub struct Table {
    /// Number of the accepted configuration; operators see it as *generation*.
    pub generation: u64,
    /// Number of the published table. Health changes and operators also publish tables.
    pub serial: u64,
    /// Cap on sessions of the whole process.
    pub connections_max: u32,
    /// In file order.
    pub frontends: Vec<Arc<FrontendRoute>>,
    /// In file order.
    pub pools: Vec<Arc<PoolTable>>,
    /// Positions in `frontends` by bind. Tables of the same configuration share it.
    by_bind: Arc<HashMap<BindKey, usize>>,
    /// Positions in `frontends` by id. Tables of the same configuration share it.
    by_id: Arc<HashMap<FrontendId, usize>>,
}

/// A frontend and the pools it routes to.
#[derive(Debug)]
pub struct FrontendRoute {
    /// Long-lived counters and cap.
    pub state: Arc<FrontendState>,
    /// The configuration: timeouts and limits.
    pub spec: model::FrontendConfig,
    /// In the order of `spec.routes`; `None` if the route rejects the connection.
    pub routes: Box<[Option<Arc<PoolTable>>]>,
    /// Pool of the sessions that no route matches.
    pub pool: Arc<PoolTable>,
    /// What the frontend waits for before it routes a session (`client_first`); usually `None`.
    pub preread: Option<Preread>,
}

/// The first bytes of a client that routing needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preread {
    /// Number of bytes: at least one, at most the size of a socket's receive queue.
    pub bytes: u32,
    /// Time for these bytes to arrive.
    pub timeout: Duration,
}

impl Preread {
    fn first_byte(timeout: Duration) -> Preread {
        Preread { bytes: 1, timeout }
    }
}

/// A pool as sessions use it.
#[derive(Debug)]
pub struct PoolTable {
    /// Number of the pool.
    pub id: PoolId,
    /// The configuration: connect timeout, attempts.
    pub spec: Arc<model::PoolConfig>,
    /// The eligible backends of the tiers in use, the lowest tier first; or former backends
    /// that stand in; or (`try-all`) all backends that no operator drains. Same order and
    /// indices as the balancer's candidates.
    pub serving: Vec<Arc<BackendState>>,
    /// Balancers over `serving`; `None` if `serving` is empty. Consecutive tables share
    /// each while it stays equivalent.
    pub balancer: Option<TierBalancers>,
    /// Whether no backend serves and a first probe result is due. Clients wait for it.
    pub undecided: bool,
    /// Which members serve.
    pub tier: ServingTier,
    /// The tiers in `serving`; empty if the members serve whatever their tiers are.
    pub tiers: Box<[TierStart]>,
    /// Members that do not, with reasons.
    pub left_out: LeftOut,
}

/// A picked backend with a raised in-flight count. Dropping it lowers the count.
#[derive(Debug)]
pub struct Reservation {
    /// Position in the pool's `serving`, for the list of tried backends.
    pub index: usize,
    backend: Arc<BackendState>,
    trial: Option<TrialId>,
}

/// Why a pool returned no backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoBackend {
    /// No backend is eligible.
    NoneEligible,
    /// No backend is eligible yet, and a first probe result is due.
    Undecided,
    /// No backend is eligible, and clients of the pool wait for one.
    Awaited,
    /// Every backend in use was already tried.
    Exhausted,
    /// All untried backends are at their caps.
    AtCapacity,
}

// === impl Table ===

impl Table {
    /// Returns the table without frontends and pools that is published before the first
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

    /// Returns the frontend with this bind.
    #[inline]
    pub fn frontend_at(&self, bind: &BindKey) -> Option<&Arc<FrontendRoute>> {
        self.frontends.get(*self.by_bind.get(bind)?)
    }

    /// Returns the frontend with this state in this table; `None` if it was removed.
    pub fn frontend(&self, state: &Arc<FrontendState>) -> Option<&Arc<FrontendRoute>> {
        let route = self.frontends.get(*self.by_id.get(&state.id)?)?;
        Arc::ptr_eq(&route.state, state).then_some(route)
    }
}

// === impl FrontendRoute ===

impl FrontendRoute {
    /// Returns whether known peers of this bind send PROXY headers.
    pub fn expects_header(&self, bind: &BindKey) -> bool {
        let expects = |known: &model::Bind| known.options.proxy_protocol && known.key == *bind;
        self.spec.proxy_protocol.is_some() && self.spec.binds.iter().any(expects)
    }
}

// === impl PoolTable ===

impl NoBackend {
    /// Whether a client without a backend waits in the pool's queue.
    pub fn queues(self) -> bool {
        match self {
            NoBackend::AtCapacity | NoBackend::Undecided | NoBackend::Awaited => true,
            NoBackend::NoneEligible | NoBackend::Exhausted => false,
        }
    }
}

impl PoolTable {
    /// Returns each backend that gets new sessions, and its share of them over time.
    pub fn shares(&self) -> impl Iterator<Item = (&Arc<BackendState>, f64)> {
        let shares = self.balancer.as_ref().map(TierBalancers::shares).unwrap_or_default();
        self.serving.iter().zip(shares)
    }

    /// Returns the sessions and the share of each backend that gets new sessions.
    pub fn loads(&self) -> Vec<BackendLoad> {
        let load = |(backend, share): (&Arc<BackendState>, f64)| BackendLoad {
            name: Arc::clone(&backend.name),
            sessions: backend.in_flight.get().into(),
            share,
        };
        self.shares().map(load).collect()
    }

    /// Picks a backend that is not in `tried` (positions in `serving`).
    pub fn pick(&self, key: PickKey, tried: &[usize]) -> Result<Reservation, NoBackend> {
        self.reserve(|balancer| balancer.pick(key, tried))
    }

    #[inline]
    fn reserve(
        &self,
        pick: impl FnOnce(&TierBalancers) -> Result<usize, PickError>,
    ) -> Result<Reservation, NoBackend> {
        let Some(balancer) = &self.balancer else { return Err(self.without_balancer()) };
        let index = pick(balancer)?;
        let backend = Arc::clone(&self.serving[index]);
        let trial = backend.in_flight.claim_trial();
        Ok(Reservation { index, backend, trial })
    }

    fn without_balancer(&self) -> NoBackend {
        match self.spec.when_none_eligible {
            _ if self.undecided => NoBackend::Undecided,
            WhenNoneEligible::Wait => NoBackend::Awaited,
            WhenNoneEligible::Refuse | WhenNoneEligible::TryAll => NoBackend::NoneEligible,
        }
    }

    /// Returns false only while every backend in use is at its cap, or while clients wait
    /// for an eligible one. New connections should then stay in the listen queue.
    #[inline]
    pub fn has_room(&self) -> bool {
        match &self.balancer {
            Some(balancer) => balancer.has_room(),
            None => self.without_balancer() != NoBackend::Awaited,
        }
    }
}

// === impl Reservation ===

impl Reservation {
    /// Returns the picked backend.
    pub fn backend(&self) -> &Arc<BackendState> {
        &self.backend
    }

    /// Whether the session decides a trial.
    pub fn is_on_trial(&self) -> bool {
        self.trial.is_some()
    }

    /// Returns the trial that this session must decide, if its backend is on trial.
    /// Returns it once: the caller must decide or reopen the trial.
    pub fn take_trial(&mut self) -> Option<TrialId> {
        self.trial.take()
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // The session did not try the backend, so the trial goes to the next session.
        if let Some(trial) = self.trial.take() {
            self.backend.in_flight.advance_trial(trial, TrialPhase::Open);
        }
        self.backend.in_flight.leave();
    }
}
