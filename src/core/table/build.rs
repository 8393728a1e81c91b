//! From model and statuses to a [`Table`]: all the expensive work (smooth
//! sequences, Maglev tables) happens here, before anything is published.
//!
//! Called by the controller on every change. Pure: it reads nothing but its
//! arguments. What a change does not touch is shared with the table before, so
//! a backend that goes down costs its own pool's preparation, not everybody's.

use super::state::{BackendState, FrontendState};
use super::{FrontendRoute, PoolTable, Table};
use crate::balance::{Balancer, Candidate};
use crate::model;
use crate::model::{RouteTarget, WhenNoneEligible};
use std::collections::HashMap;
use std::sync::Arc;

/// Everything a table is made of.
#[derive(Debug)]
pub struct TableInput {
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
    pub spec: model::FrontendConfig,
}

/// One pool.
#[derive(Debug)]
pub struct PoolInput {
    /// Model.
    pub spec: Arc<model::PoolConfig>,
    /// In file order.
    pub backends: Vec<BackendInput>,
    /// Former backends that serve while none of those does.
    pub stand_ins: Vec<BackendInput>,
    /// Some of the backends have no verdict yet, and clients wait for one rather
    /// than be refused.
    pub undecided: bool,
}

/// One backend's standing at this moment.
#[derive(Debug)]
pub struct BackendInput {
    /// Long-lived state.
    pub state: Arc<BackendState>,
    /// Weight after whatever lowers it, in a unit of the caller's choice that is
    /// the same for the whole pool; at least 1.
    pub effective_weight: u32,
    /// Cap; 0 means none.
    pub connections_max: u32,
    /// It is in its slow start: its share of new sessions is at most that of its
    /// weight.
    pub slow_start: bool,
    /// Serves only when no primary is eligible.
    pub backup: bool,
    /// Derived by `health`.
    pub eligible: bool,
    /// One session is to try it: it does for no tier alone.
    pub on_trial: bool,
    /// No operator took it out: `try-all` may use it.
    pub in_service: bool,
}

/// One pool's part of the next table, to be made on any thread.
#[derive(Debug)]
pub struct PoolBuild {
    /// What it is made of.
    pub input: PoolInput,
    /// The part it replaces: a round robin continues from its position in it.
    pub previous: Option<Arc<PoolTable>>,
}

/// That part, made.
#[derive(Debug)]
pub struct PoolBuilt {
    /// As it was given, to be changed and given again.
    pub input: PoolInput,
    /// For [`update`].
    pub table: Arc<PoolTable>,
}

/// Builds the table. `previous` is the one it replaces: round robins go on
/// from their position in it.
pub fn build(input: &TableInput, previous: Option<&Table>) -> Table {
    let pools_before = by_name(previous.map_or(&[], |table| &table.pools));
    let pools: Vec<Arc<PoolTable>> = input
        .pools
        .iter()
        .map(|pool| build_pool(pool, pools_before.get(&*pool.spec.name).copied()))
        .collect();
    let pools_by_name = by_name(&pools);
    let frontends: Vec<Arc<FrontendRoute>> = input
        .frontends
        .iter()
        .filter_map(|frontend| {
            let by_name = |name: &str| pools_by_name.get(name).map(|pool| Arc::clone(pool));
            let routes = frontend.spec.routes.iter().map(|route| match &route.target {
                RouteTarget::Pool(name) => by_name(name),
                RouteTarget::Refuse => None,
            });
            Some(Arc::new(FrontendRoute {
                state: Arc::clone(&frontend.state),
                routes: routes.collect(),
                pool: by_name(&frontend.spec.pool)?,
                preread: None,
                spec: frontend.spec.clone(),
            }))
        })
        .collect();
    let by_bind = (0..).zip(&frontends).flat_map(|(place, route)| {
        route.spec.binds.iter().map(move |bind| (bind.key.clone(), place))
    });
    let by_bind = Arc::new(by_bind.collect());
    let by_id = Arc::new(frontends.iter().map(|route| route.state.id).zip(0..).collect());
    Table {
        generation: input.generation,
        serial: input.serial,
        connections_max: input.connections_max,
        frontends,
        pools,
        by_bind,
        by_id,
    }
}

/// The table after `previous`, of the same configuration: what is not among `changed`
/// (pools by their places, from [`build_pool`] or a [`PoolBuild`]) is as before, and
/// costs no look.
pub fn update(previous: &Table, serial: u64, changed: Vec<(usize, Arc<PoolTable>)>) -> Table {
    let mut pools = previous.pools.clone();
    let mut replaced: HashMap<*const PoolTable, Arc<PoolTable>> = HashMap::new();
    for (place, built) in changed {
        let Some(before) = previous.pools.get(place) else { continue };
        if !Arc::ptr_eq(&built, before) {
            replaced.insert(Arc::as_ptr(before), Arc::clone(&built));
            pools[place] = built;
        }
    }
    let frontends = previous.frontends.iter().map(|route| {
        let newest =
            |pool: &Arc<PoolTable>| Arc::clone(replaced.get(&Arc::as_ptr(pool)).unwrap_or(pool));
        if !route.pools().any(|pool| replaced.contains_key(&Arc::as_ptr(pool))) {
            return Arc::clone(route);
        }
        Arc::new(FrontendRoute {
            state: Arc::clone(&route.state),
            routes: route.routes.iter().map(|pool| pool.as_ref().map(newest)).collect(),
            pool: newest(&route.pool),
            spec: route.spec.clone(),
            preread: route.preread,
        })
    });
    Table {
        generation: previous.generation,
        serial,
        connections_max: previous.connections_max,
        frontends: frontends.collect(),
        pools,
        by_bind: Arc::clone(&previous.by_bind),
        by_id: Arc::clone(&previous.by_id),
    }
}

// === impl PoolBuild ===

impl PoolBuild {
    /// Makes it. Some 25 ms for 20,000 backends.
    pub fn run(self) -> PoolBuilt {
        let table = build_pool(&self.input, self.previous.as_ref());
        PoolBuilt { input: self.input, table }
    }
}

fn by_name(pools: &[Arc<PoolTable>]) -> HashMap<&str, &Arc<PoolTable>> {
    pools.iter().map(|pool| (&*pool.spec.name, pool)).collect()
}

/// The pool's part of a table; `previous` itself where nothing changes.
pub fn build_pool(pool: &PoolInput, previous: Option<&Arc<PoolTable>>) -> Arc<PoolTable> {
    let in_service = active_tier(pool);
    let serving: Vec<_> = in_service.iter().map(|b| Arc::clone(&b.state)).collect();
    let candidates = in_service.iter().map(|b| candidate(b)).collect();
    let balancer = build_balancer(pool, candidates, previous);
    let undecided = pool.undecided && serving.is_empty();
    let built = PoolTable { serving, balancer, undecided, spec: Arc::clone(&pool.spec) };
    match previous {
        Some(before) if is_same(&built, before) => Arc::clone(before),
        _ => Arc::new(built),
    }
}

/// The eligible primaries, else the eligible backups (which join primaries that
/// are all on trial), else former ones that stand in, else (`try-all`) everything no
/// operator took out.
fn active_tier(pool: &PoolInput) -> Vec<&BackendInput> {
    let eligible = |backup: bool| -> Vec<&BackendInput> {
        pool.backends.iter().filter(|b| b.eligible && b.backup == backup).collect()
    };
    let mut tier = eligible(false);
    if tier.iter().all(|b| b.on_trial) {
        tier.extend(eligible(true));
    }
    if tier.is_empty() {
        tier.extend(&pool.stand_ins);
    }
    if tier.is_empty() && pool.spec.when_none_eligible == WhenNoneEligible::TryAll {
        tier = pool.backends.iter().filter(|b| b.in_service).collect();
    }
    tier
}

fn candidate(backend: &BackendInput) -> Candidate {
    Candidate {
        key: Arc::clone(&backend.state.address_text),
        weight: backend.effective_weight.max(1),
        connections_max: backend.connections_max,
        slow_start: backend.slow_start,
        in_flight: Arc::clone(&backend.state.in_flight),
        latency: Arc::clone(&backend.state.latency),
    }
}

fn build_balancer(
    pool: &PoolInput,
    candidates: Vec<Candidate>,
    previous: Option<&Arc<PoolTable>>,
) -> Option<Arc<Balancer>> {
    if candidates.is_empty() {
        return None;
    }
    let (policy, slots) = (pool.spec.balance, pool.spec.hash_slots);
    let before = previous.and_then(|p| p.balancer.as_ref());
    match before {
        Some(same) if same.can_reuse_for(policy, &candidates, slots) => Some(Arc::clone(same)),
        _ => Some(Arc::new(Balancer::of_pool(policy, candidates, slots, before.map(|b| &**b)))),
    }
}

/// Whether the pool before says the same. Same balancers mean the same
/// in-flight counts, but a state may come anew around one.
fn is_same(built: &PoolTable, before: &PoolTable) -> bool {
    let same_balancer = match (&built.balancer, &before.balancer) {
        (Some(new), Some(old)) => Arc::ptr_eq(new, old),
        (None, None) => true,
        _ => false,
    };
    same_balancer
        && built.undecided == before.undecided
        && Arc::ptr_eq(&built.spec, &before.spec)
        && built.serving.len() == before.serving.len()
        && built.serving.iter().zip(&before.serving).all(|(new, old)| Arc::ptr_eq(new, old))
}

#[cfg(test)]
#[cfg(not(tidegate_loom))]
mod tests;
