//! From model and statuses to a [`Table`]: all the expensive work (smooth
//! sequences, Maglev tables) happens here, before anything is published.
//!
//! Called by the controller on every change. Pure: it reads nothing but its
//! arguments.

use super::state::{BackendState, FrontendState};
use super::{FrontendRoute, PoolTable, Table};
use crate::balance::{Balancer, Candidate};
use crate::config::{self, WhenNoneEligible};
use std::sync::Arc;

/// Everything a table is made of.
#[derive(Debug)]
pub struct Input {
    /// Of the configuration.
    pub generation: u64,
    /// Of this table.
    pub serial: u64,
    /// Whole process.
    pub connections_max: u32,
    /// In file order.
    pub frontends: Vec<FrontendInput>,
    /// In file order; every frontend's pool is among them.
    pub pools: Vec<PoolInput>,
}

/// One frontend.
#[derive(Debug)]
pub struct FrontendInput {
    /// Long-lived state.
    pub state: Arc<FrontendState>,
    /// Model.
    pub spec: config::Frontend,
}

/// One pool.
#[derive(Debug)]
pub struct PoolInput {
    /// Model.
    pub spec: Arc<config::Pool>,
    /// In file order.
    pub backends: Vec<BackendInput>,
}

/// One backend's standing at this moment.
#[derive(Debug)]
pub struct BackendInput {
    /// Long-lived state.
    pub state: Arc<BackendState>,
    /// Weight after whatever lowers it; at least 1.
    pub effective_weight: u32,
    /// Cap; 0 means none.
    pub connections_max: u32,
    /// Serves only when no primary is eligible.
    pub backup: bool,
    /// Derived by `health`.
    pub eligible: bool,
    /// No operator took it out: `try-all` may use it.
    pub in_service: bool,
}

/// Builds the table. `previous` is the one it replaces: round robins go on
/// from their position in it.
pub fn build(input: Input, previous: Option<&Table>) -> Table {
    let pools: Vec<Arc<PoolTable>> = input
        .pools
        .into_iter()
        .map(|pool| {
            let before =
                previous.and_then(|t| t.pools.iter().find(|p| p.spec.name == pool.spec.name));
            Arc::new(build_pool(pool, before.map(|p| &**p)))
        })
        .collect();
    let frontends: Vec<Arc<FrontendRoute>> = input
        .frontends
        .into_iter()
        .filter_map(|frontend| {
            let pool = pools.iter().find(|p| p.spec.name == frontend.spec.pool)?;
            Some(Arc::new(FrontendRoute {
                state: frontend.state,
                spec: frontend.spec,
                pool: Arc::clone(pool),
            }))
        })
        .collect();
    let by_bind = frontends
        .iter()
        .flat_map(|f| f.spec.binds.iter().map(move |bind| (*bind, Arc::clone(f))))
        .collect();
    Table {
        generation: input.generation,
        serial: input.serial,
        connections_max: input.connections_max,
        frontends,
        pools,
        by_bind,
    }
}

fn build_pool(pool: PoolInput, previous: Option<&PoolTable>) -> PoolTable {
    let tier = |backup: bool| -> Vec<&BackendInput> {
        pool.backends.iter().filter(|b| b.eligible && b.backup == backup).collect()
    };
    let mut serving = tier(false);
    if serving.is_empty() {
        serving = tier(true);
    }
    if serving.is_empty() && pool.spec.when_none_eligible == WhenNoneEligible::TryAll {
        serving = pool.backends.iter().filter(|b| b.in_service).collect();
    }
    let candidates: Vec<Candidate> = serving
        .iter()
        .map(|b| Candidate {
            key: Arc::clone(&b.state.address_text),
            weight: b.effective_weight.max(1),
            connections_max: b.connections_max,
            in_flight: Arc::clone(&b.state.in_flight),
        })
        .collect();
    let balancer = (!candidates.is_empty()).then(|| {
        Balancer::new(pool.spec.balance, candidates, previous.and_then(|p| p.balancer.as_ref()))
    });
    PoolTable {
        serving: serving.into_iter().map(|b| Arc::clone(&b.state)).collect(),
        balancer,
        spec: pool.spec,
    }
}
