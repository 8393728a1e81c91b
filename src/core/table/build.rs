//! Builds a [`Table`] from the model and the backends' states.
//!
//! Called by the controller on every change. All expensive work (smooth sequences,
//! Maglev tables) happens here, before the table is published. Pure: it reads only its
//! arguments. Unchanged parts are shared with the previous table, so a backend that
//! goes down causes work only for its own pool.

use super::decide::{LeftOut, ServingTier, TierStart};
use super::state::{BackendState, FrontendState, PoolId};
use super::tiers::{TierMember, TierRules, TierRun};
use super::{FrontendRoute, PoolTable, Table};
use crate::balance::tiered::{TierBalancer, TierBalancers};
use crate::balance::{Balancer, Candidate};
use crate::model;
use crate::model::{RouteTarget, TIER_MAX, WhenNoneEligible};
use std::collections::HashMap;
use std::sync::Arc;

/// Input of a table.
#[derive(Debug)]
pub struct TableInput {
    /// Generation of the configuration.
    pub generation: u64,
    /// Serial of the new table.
    pub serial: u64,
    /// Cap on sessions of the whole process.
    pub connections_max: u32,
    /// In file order.
    pub frontends: Vec<FrontendInput>,
    /// In file order; must contain every pool of the frontends.
    pub pools: Vec<PoolInput>,
}

/// A frontend.
#[derive(Debug)]
pub struct FrontendInput {
    /// Long-lived state.
    pub state: Arc<FrontendState>,
    /// The configuration.
    pub spec: model::FrontendConfig,
}

/// A pool.
#[derive(Debug)]
pub struct PoolInput {
    /// Number of the pool.
    pub id: PoolId,
    /// The configuration.
    pub spec: Arc<model::PoolConfig>,
    /// In file order.
    pub backends: Vec<BackendInput>,
    /// Former backends that serve while no backend of `backends` does.
    pub stand_ins: Vec<BackendInput>,
    /// Whether some backends have no probe result yet, and clients wait for one instead
    /// of being rejected.
    pub undecided: bool,
}

/// The status of a backend at this moment.
#[derive(Debug)]
pub struct BackendInput {
    /// Long-lived state.
    pub state: Arc<BackendState>,
    /// Weight after all reductions, at least 1. The unit is arbitrary but the same for
    /// the whole pool.
    pub effective_weight: u32,
    /// Cap; 0 means no cap.
    pub connections_max: u32,
    /// Whether the backend is in slow start. Its share of new sessions is then at most
    /// the share of its weight.
    pub slow_start: bool,
    /// 0..=[`TIER_MAX`].
    pub tier: u8,
    /// Derived by `health`.
    pub eligible: bool,
    /// Whether the backend is on trial. Backends on trial are not enough to fill a
    /// tier.
    pub on_trial: bool,
    /// Whether the backend waits for its first result. It does not count for the share of its
    /// tier.
    pub undecided: bool,
    /// Whether no operator drains the backend. `try-all` can then use it.
    pub in_service: bool,
}

/// One pool's part of the next table, to be built on any thread.
#[derive(Debug)]
pub struct PoolBuild {
    /// Input of the build.
    pub input: PoolInput,
    /// The part it replaces. A round robin continues from its position.
    pub previous: Option<Arc<PoolTable>>,
}

/// Result of a [`PoolBuild`].
#[derive(Debug)]
pub struct PoolBuilt {
    /// The input, for reuse in the next build.
    pub input: PoolInput,
    /// The built part, for [`update`].
    pub table: Arc<PoolTable>,
}

/// Builds the table. `previous` is the table it replaces: round robins continue from
/// their positions in it.
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
                preread: frontend.spec.client_first.map(super::Preread::first_byte),
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

/// Builds the table after `previous` with the same configuration. `changed` lists pools
/// by position, built by [`build_pool`] or a [`PoolBuild`]. All other pools are shared
/// with `previous` and are not examined.
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
    /// Builds the part. Takes about 25 ms for 20,000 backends.
    pub fn run(self) -> PoolBuilt {
        let table = build_pool(&self.input, self.previous.as_ref());
        PoolBuilt { input: self.input, table }
    }
}

fn by_name(pools: &[Arc<PoolTable>]) -> HashMap<&str, &Arc<PoolTable>> {
    pools.iter().map(|pool| (&*pool.spec.name, pool)).collect()
}

/// Builds the pool's part of a table. Returns `previous` itself if nothing changes.
pub fn build_pool(pool: &PoolInput, previous: Option<&Arc<PoolTable>>) -> Arc<PoolTable> {
    let (tier, runs) = active_tiers(pool);
    let in_service = runs.iter().flat_map(|run| &run.members);
    let serving: Vec<_> = in_service.map(|b| Arc::clone(&b.state)).collect();
    let balancer = build_balancer(pool, &runs, previous);
    let undecided = pool.undecided && serving.is_empty();
    let left_out = left_out(pool, tier, &runs);
    let tiers = tier_starts(&runs);
    let (id, spec) = (pool.id, Arc::clone(&pool.spec));
    let built = PoolTable { id, spec, serving, balancer, undecided, tier, tiers, left_out };
    match previous {
        Some(before) if is_same(&built, before) => Arc::clone(before),
        _ => Arc::new(built),
    }
}

/// Backends that serve, of one tier.
struct ServingRun<'a> {
    /// `None`: the backends serve whatever their tiers are.
    tier: Option<u8>,
    /// Share of the new sessions in per cent, if the tiers spill.
    load: Option<u8>,
    members: Vec<&'a BackendInput>,
}

/// Returns the eligible backends of the tiers that serve. If there are none, former backends
/// stand in. If the list is still empty and the policy is `try-all`, returns all backends that
/// no operator drains.
fn active_tiers(pool: &PoolInput) -> (ServingTier, Vec<ServingRun<'_>>) {
    let members: Vec<TierMember> = pool.backends.iter().map(tier_member).collect();
    let runs = TierRules::of(&pool.spec).serving(&members);
    if !runs.is_empty() {
        let run = |run: TierRun| ServingRun {
            tier: Some(run.tier),
            load: run.load,
            members: run.members.into_iter().map(|place| &pool.backends[place]).collect(),
        };
        return (ServingTier::Eligible, runs.into_iter().map(run).collect());
    }
    let whatever = |members: Vec<_>| match members.is_empty() {
        true => Vec::new(),
        false => vec![ServingRun { tier: None, load: None, members }],
    };
    if !pool.stand_ins.is_empty() {
        return (ServingTier::Eligible, whatever(pool.stand_ins.iter().collect()));
    }
    if pool.spec.when_none_eligible != WhenNoneEligible::TryAll {
        return (ServingTier::Eligible, Vec::new());
    }
    let in_service = pool.backends.iter().filter(|b| b.in_service).collect();
    (ServingTier::FailOpen, whatever(in_service))
}

fn tier_member(backend: &BackendInput) -> TierMember {
    let &BackendInput { tier, eligible, on_trial, undecided, .. } = backend;
    TierMember { tier, eligible, on_trial, undecided }
}

fn tier_starts(runs: &[ServingRun<'_>]) -> Box<[TierStart]> {
    let mut first = 0;
    let starts = runs.iter().filter_map(|run| {
        let start = TierStart { tier: run.tier?, first };
        first += run.members.len();
        Some(start)
    });
    starts.collect()
}

/// Returns the members that are not eligible, up to the highest tier that serves. A pool that
/// fails open leaves out only drained members.
fn left_out(pool: &PoolInput, tier: ServingTier, runs: &[ServingRun<'_>]) -> LeftOut {
    let mut list = LeftOut::default();
    let highest = runs.iter().filter_map(|run| run.tier).max().unwrap_or(TIER_MAX);
    for backend in &pool.backends {
        let unused = backend.tier > highest;
        let serves = tier == ServingTier::FailOpen && backend.in_service;
        if !backend.eligible && !unused && !serves {
            list.push(&backend.state);
        }
    }
    list
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

/// Returns one balancer, or one per tier if the tiers spill.
fn build_balancer(
    pool: &PoolInput,
    runs: &[ServingRun<'_>],
    previous: Option<&Arc<PoolTable>>,
) -> Option<TierBalancers> {
    let before = previous.and_then(|pool| pool.balancer.as_ref()).map_or(&[][..], |b| b.tiers());
    let mut first = 0;
    let mut tiers = Vec::new();
    let spills = runs.iter().any(|run| run.load.is_some());
    // Members on trial of a lower tier share the balancer of the tier that serves.
    for part in runs.chunk_by(|_, _| !spills) {
        let members = part.iter().flat_map(|run| &run.members);
        let candidates: Vec<Candidate> = members.map(|b| candidate(b)).collect();
        let count = candidates.len();
        let (tier, load) = (part[0].tier.unwrap_or(0), part[0].load.unwrap_or(100));
        let same_tier = before.iter().find(|one| one.tier == tier);
        let replaced = same_tier.or_else(|| before.first().filter(|_| !spills));
        let balancer = tier_balancer(&pool.spec, candidates, replaced.map(|one| &one.balancer));
        tiers.push(TierBalancer { tier, load, first, balancer });
        first += count;
    }
    TierBalancers::new(tiers)
}

fn tier_balancer(
    spec: &model::PoolConfig,
    candidates: Vec<Candidate>,
    before: Option<&Arc<Balancer>>,
) -> Arc<Balancer> {
    let (policy, slots) = (spec.balance, spec.hash_slots);
    match before {
        Some(same) if same.can_reuse_for(policy, &candidates, slots) => Arc::clone(same),
        _ => Arc::new(Balancer::of_pool(policy, candidates, slots, before.map(|b| &**b))),
    }
}

/// Returns whether both parts are equal. Comparing balancers is not enough: a new state
/// can reuse the in-flight count of an old one.
fn is_same(built: &PoolTable, before: &PoolTable) -> bool {
    let same_balancer = match (&built.balancer, &before.balancer) {
        (Some(new), Some(old)) => new.is_same(old),
        (None, None) => true,
        _ => false,
    };
    same_balancer
        && built.id == before.id
        && built.tier == before.tier
        && built.tiers == before.tiers
        && built.left_out.is_same(&before.left_out)
        && built.undecided == before.undecided
        && Arc::ptr_eq(&built.spec, &before.spec)
        && built.serving.len() == before.serving.len()
        && built.serving.iter().zip(&before.serving).all(|(new, old)| Arc::ptr_eq(new, old))
}

#[cfg(test)]
#[cfg(not(feature = "loom"))]
mod tests;
