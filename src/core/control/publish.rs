//! Builds the next table if the state of a backend differs from the newest table.
//!
//! Called by the controller at the end of each event. The daemon performs the publication.

pub(super) mod detached_build;
pub(super) mod pacer;

use super::backends::BackendEntry;
use super::members::MemberSource;
use super::pools::{PoolEntry, PoolId};
use super::state::ControlState;
use crate::decision::SkipReason;
use crate::health::probe_detector::ProbeDetector;
use crate::health::{Intent, Observation, RequestedState};
use crate::model;
use crate::model::{Tiers, WhenNoneEligible};
use crate::table::build::{self, BackendInput, FrontendInput, PoolInput};
use crate::table::state::{BackendId, BackendState};
use crate::table::tiers::TierMember;
use crate::table::{PoolTable, Table};
use detached_build::Builds;
use pacer::{PublishPacer, PublishReason, TableDue};
use std::sync::Arc;
use std::time::Instant;

/// The newest table and the pending parts of the next one.
#[derive(Debug)]
pub(super) struct Publisher {
    /// Number of accepted configurations.
    generation: u64,
    /// Number of tables.
    serial: u64,
    connections_max: u32,
    table: Arc<Table>,
    pacer: PublishPacer,
    builds: Builds,
    /// Shut backends that are not in the table about to be published.
    reopen: Vec<Arc<BackendState>>,
    /// Tables of the old processes, by [`PublishReason`].
    carried: [u64; PublishReason::ALL.len()],
}

/// The part of a backend's table entry that can change between reloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct BackendTableState {
    /// In hundredths; 0: not eligible.
    weight: u32,
    /// Cap; 0: none.
    connections_max: u32,
    /// Whether a slow start is running.
    slow_start: bool,
    /// Its tier.
    tier: u8,
    /// Whether a trial is running. Set only in pools with several tiers: the next tier then takes
    /// part.
    on_trial: bool,
    /// Whether it waits for its first result. Set only in pools whose sessions spill.
    undecided: bool,
    /// Whether `try-all` can pick the backend. Set only in `try-all` pools.
    last_resort: bool,
}

/// The weight of a backend and the factors that reduce it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Weight {
    /// Configured weight, or requested by its heartbeats.
    pub base: u16,
    /// Share left by its health, in percent; 0: not eligible.
    pub health: u32,
    /// Share left by its slow start, in percent.
    pub ramp: u32,
    /// Share left by its load, in percent.
    pub load: u32,
}

/// Tables and decisions hold weights in units of 1/`WEIGHT_PARTS`, so that a reduced weight of 1 stays exact.
/// (Balancers reduce all weights by their greatest common divisor, so the unit costs
/// nothing while no weight is reduced.)
pub const WEIGHT_PARTS: u32 = 100;

// === impl BackendTableState ===

impl BackendTableState {
    /// Whether picks can use the backend while no backend is eligible.
    pub(super) fn is_last_resort(self) -> bool {
        self.last_resort
    }

    /// Whether the backend is eligible in the table.
    pub(super) fn is_eligible(self) -> bool {
        self.weight > 0
    }

    /// Returns the backend as the rules of tiers see it.
    pub(super) fn tier_member(self) -> TierMember {
        let BackendTableState { tier, on_trial, undecided, .. } = self;
        TierMember { tier, eligible: self.weight > 0, on_trial, undecided }
    }

    /// Returns the table entry of the backend.
    pub(super) fn input(self, entry: &BackendEntry) -> BackendInput {
        BackendInput {
            state: Arc::clone(&entry.state),
            effective_weight: self.weight.max(1),
            connections_max: self.connections_max,
            slow_start: self.slow_start,
            tier: self.tier,
            eligible: self.weight > 0,
            on_trial: self.on_trial,
            undecided: self.undecided,
            in_service: entry.in_service(),
        }
    }

    /// Returns the effective weight, at least 1, if `base` were the configured weight.
    pub(super) fn weight_if(entry: &BackendEntry, pool: &PoolEntry, base: u16) -> u32 {
        Weight { base, ..entry.weight(&pool.spec) }.parts().max(1)
    }

    pub(super) fn of(entry: &BackendEntry, pool: &PoolEntry) -> BackendTableState {
        BackendTableState {
            weight: entry.weight(&pool.spec).parts(),
            connections_max: entry.cap(),
            slow_start: entry.ramp.is_some(),
            tier: entry.spec.tier,
            on_trial: entry.health.outlier.is_on_trial() && pool.has_tiers,
            undecided: pool.spec.tiers == Tiers::Spill && entry.waits_for_result(),
            last_resort: pool.spec.when_none_eligible == WhenNoneEligible::TryAll
                && entry.in_service(),
        }
    }
}

// === impl Weight ===

impl Weight {
    /// Returns the weight in units of 1/[`WEIGHT_PARTS`]; at least 1 if eligible.
    fn parts(self) -> u32 {
        if self.health == 0 {
            return 0;
        }
        // Bounded by 1000 * 100^3 * 100.
        let product = u64::from(self.base)
            * u64::from(self.health)
            * u64::from(self.ramp)
            * u64::from(self.load)
            * u64::from(WEIGHT_PARTS);
        u32::try_from(product / 1_000_000).unwrap_or(u32::MAX).max(1)
    }

    /// Returns the weight used for balancing; 0 while not eligible.
    pub fn in_force(self) -> f64 {
        f64::from(self.parts()) / f64::from(WEIGHT_PARTS)
    }
}

/// Returns the cap during a slow start: at least 1; 0 (none) stays 0.
fn ramped(connections_max: u32, share: u32) -> u32 {
    if connections_max == 0 {
        return 0;
    }
    let cap = u64::from(connections_max) * u64::from(share) / 100;
    u32::try_from(cap).unwrap_or(u32::MAX).max(1)
}

// === impl BackendEntry ===

impl BackendEntry {
    /// Whether the operator's intent, its heartbeats, its registries and its agent allow sessions.
    fn in_service(&self) -> bool {
        self.health.intent == Intent::Ready && self.health.is_wanted()
    }

    /// Tells picks why the backend is not eligible, if that has changed.
    pub(super) fn note_left_out(&self) {
        let reason = self.left_out().map(|reason| (reason, self.left_out_at(reason)));
        if self.state.left_out() != reason {
            self.state.set_left_out(reason);
        }
    }

    /// Whether it is not eligible because it has no result yet.
    fn waits_for_result(&self) -> bool {
        matches!(self.left_out(), Some(SkipReason::NoVerdict | SkipReason::Unverified))
    }

    /// Why the backend is not eligible.
    fn left_out(&self) -> Option<SkipReason> {
        let health = &self.health;
        if health.weight_share() > 0 {
            return None;
        }
        Some(match (health.intent, health.observation()) {
            (Intent::Draining, _) => SkipReason::DrainedByOperator,
            (Intent::Maintenance, _) => SkipReason::Maintenance,
            _ if health.requested != RequestedState::Ready => SkipReason::DrainedBySender,
            _ if !health.wish.serves() => SkipReason::DrainedByRegistry,
            _ if !health.is_wanted() => SkipReason::DrainedByAgent,
            _ if health.outlier.is_ejected() => SkipReason::Ejected,
            (_, Observation::Down) => SkipReason::Down,
            _ if health.unverified => SkipReason::Unverified,
            _ if health.has_role() || health.observation() == Observation::Unknown => {
                SkipReason::NoVerdict
            }
            _ if health.role.outranked => SkipReason::Outranked,
            _ => SkipReason::OtherRole,
        })
    }

    /// Since when that reason holds; for an ejection, until when.
    fn left_out_at(&self, reason: SkipReason) -> Instant {
        match reason {
            SkipReason::DrainedByOperator | SkipReason::Maintenance => self.health.intent_since,
            SkipReason::DrainedBySender => self.requested_since,
            SkipReason::DrainedByRegistry => self.wish_since,
            SkipReason::DrainedByAgent => {
                self.health.detector.as_ref().map_or(self.health.since, ProbeDetector::agent_since)
            }
            SkipReason::Ejected => self.health.outlier.until().unwrap_or(self.observed_since),
            SkipReason::NoVerdict | SkipReason::Unverified => self.health.since,
            SkipReason::OtherRole | SkipReason::Outranked => {
                self.health.seen_role().map_or(self.health.since, |seen| seen.since)
            }
            _ => self.observed_since,
        }
    }

    /// Returns the effective cap; 0: none.
    pub(super) fn cap(&self) -> u32 {
        ramped(self.health.agent().cap(self.spec.connections_max), self.ramp_share)
    }

    /// Returns its weight.
    pub(super) fn weight(&self, pool: &model::PoolConfig) -> Weight {
        Weight {
            base: self.base_weight(pool),
            health: self.health.weight_share(),
            ramp: self.ramp_share,
            load: self.load_share(),
        }
    }
}

// === impl Publisher ===

impl Publisher {
    /// Returns a publisher with an empty table.
    pub(super) fn new() -> Publisher {
        Publisher {
            generation: 0,
            serial: 0,
            connections_max: 0,
            table: Arc::new(Table::empty()),
            pacer: PublishPacer::default(),
            builds: Builds::default(),
            reopen: Vec::new(),
            carried: [0; PublishReason::ALL.len()],
        }
    }

    /// Returns the number of accepted configurations.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Returns the number of tables.
    pub(super) fn serial(&self) -> u64 {
        self.serial
    }

    /// Returns the newest table.
    pub(super) fn table(&self) -> &Arc<Table> {
        &self.table
    }

    /// Begins a new generation after a configuration was accepted.
    pub(super) fn configured(&mut self, connections_max: u32) {
        self.generation += 1;
        self.connections_max = connections_max;
    }

    /// Sets the numbers to continue from.
    pub(super) fn count_on_from(&mut self, generation: u64, serial: u64) {
        (self.generation, self.serial) = (generation, serial);
    }

    /// Returns the tables by reason, including those of the old processes.
    pub(super) fn published(&self) -> [(PublishReason, u64); PublishReason::ALL.len()] {
        let carried = |reason| self.carried[reason as usize];
        PublishReason::ALL
            .map(|reason| (reason, self.pacer.published(reason).saturating_add(carried(reason))))
    }

    /// Sets the counts of the old processes.
    pub(super) fn carry(&mut self, published: [u64; PublishReason::ALL.len()]) {
        self.carried = published;
    }

    /// Returns the due table, if any.
    pub(super) fn publish(&mut self, state: &mut ControlState, now: Instant) -> Option<Arc<Table>> {
        let due = self.table_due(state, now)?;
        let table = self.rebuild(state, due);
        match due {
            TableDue::Changes(reason) => self.table_made(state, reason, table.is_some(), now),
            TableDue::Parts(reason) => self.parts_published(reason, table.is_some()),
        }
        table
    }

    /// Builds the next table: the whole table after a reload, else the parts that are due.
    /// Returns `None` if another thread builds them.
    pub(super) fn rebuild(
        &mut self,
        state: &mut ControlState,
        due: TableDue,
    ) -> Option<Arc<Table>> {
        let table = if self.table.generation == self.generation {
            let mut changed = self.take_ready(state);
            if let TableDue::Changes(reason) = due {
                changed.extend(self.rebuild_outdated(state, reason));
            }
            if changed.is_empty() {
                self.reopen_removed();
                return None;
            }
            build::update(&self.table, self.serial + 1, changed)
        } else {
            self.rebuild_all(state)
        };
        self.serial += 1;
        self.table = Arc::new(table);
        self.reopen_removed();
        Some(Arc::clone(&self.table))
    }

    /// Returns the outdated parts of the table, rebuilt, by position.
    fn rebuild_outdated(
        &mut self,
        state: &mut ControlState,
        reason: PublishReason,
    ) -> Vec<(usize, Arc<PoolTable>)> {
        let mut changed = Vec::new();
        for (id, moved) in self.outdated_pools(state) {
            let Some(place) = state.pools.place(id) else { continue };
            let members = state.pool(id).map_or(0, |pool| pool.members().len());
            if self.builds.is_detached(members) && !state.pending.at_once {
                self.detach(state, id, moved, reason);
            } else if let Some(input) = state.pool_input(place) {
                changed.push((place, build::build_pool(&input, self.table.pools.get(place))));
                self.built_at_once(state, id, input);
            }
        }
        changed
    }

    /// Reopens backends that were shut until a table lacks them, as this one does.
    fn reopen_removed(&mut self) {
        self.reopen.drain(..).for_each(|state| state.in_flight.reopen());
    }

    fn rebuild_all(&mut self, state: &mut ControlState) -> Table {
        let places = 0..state.pools.iter().len();
        let pools = places.filter_map(|place| state.pool_input(place)).collect();
        let frontends = state.frontends.iter().map(|frontend| FrontendInput {
            state: Arc::clone(&frontend.state),
            spec: frontend.spec.clone(),
        });
        let input = build::TableInput {
            generation: self.generation,
            serial: self.serial + 1,
            connections_max: self.connections_max,
            frontends: frontends.collect(),
            pools,
        };
        let table = build::build(&input, Some(&self.table));
        let ids: Vec<PoolId> = state.pools.iter().map(|pool| pool.id).collect();
        for (id, input) in ids.into_iter().zip(input.pools) {
            self.built_at_once(state, id, input);
        }
        table
    }

    /// Asserts that every changed backend is marked.
    #[cfg(debug_assertions)]
    pub(super) fn check_noted(&self, state: &ControlState) {
        if state.backends.len() > 100 {
            return;
        }
        for entry in state.backends.iter() {
            let id = entry.state.id;
            let noted = |pool| state.backends.waiting().contains(&id) || self.builds.is_due(pool);
            assert!(state.moved(id).is_none_or(noted), "{} has moved", entry.state.name);
        }
    }
}

// === impl ControlState ===

impl ControlState {
    /// Returns the pool of the backend if the backend differs from the newest table.
    pub(super) fn moved(&self, id: BackendId) -> Option<PoolId> {
        let entry = self.backends.get(id)?;
        let pool = self.pool(entry.pool)?;
        (BackendTableState::of(entry, pool) != entry.published).then_some(pool.id)
    }

    /// Whether the table may delay the change of this backend: the file does not list it,
    /// and its weight increases.
    pub(super) fn may_wait(&self, id: BackendId) -> bool {
        let Some(entry) = self.backends.get(id) else { return true };
        let Some(pool) = self.pool(entry.pool) else { return true };
        !entry.origins.contains(MemberSource::File)
            && BackendTableState::of(entry, pool).weight > entry.published.weight
    }

    /// Returns the input for the table part of the pool at this position.
    fn pool_input(&mut self, place: usize) -> Option<PoolInput> {
        let pool = self.pools.at(place)?;
        let members = pool.members().iter();
        let backends = members.filter_map(|id| self.backends.publish(*id, pool)).collect();
        Some(PoolInput {
            id: pool.id,
            spec: Arc::clone(&pool.spec),
            backends,
            stand_ins: self.stand_ins_of(pool),
            undecided: pool.settling().is_some(),
        })
    }

    /// Returns the stand-ins of a settling pool, each with its last published state.
    pub(super) fn stand_ins_of(&self, pool: &PoolEntry) -> Vec<BackendInput> {
        let ids = pool.settling().into_iter().flat_map(|settling| &settling.stand_ins);
        let entries = ids.filter_map(|id| self.removed.get(*id));
        let input = |entry: &BackendEntry| BackendInput {
            eligible: true,
            on_trial: false,
            undecided: false,
            in_service: true,
            ..entry.published.input(entry)
        };
        entries.map(input).collect()
    }
}
