//! From standings to a table, and whether a new one is due.
//!
//! The controller calls it at the end of each event. It builds, it does not
//! publish: that is the shell's part.

pub(super) mod detached_build;
pub(super) mod pacer;

use super::backends::BackendEntry;
use super::pools::{PoolEntry, PoolId};
use super::state::ControlState;
use crate::health::{Intent, RequestedState};
use crate::model;
use crate::model::WhenNoneEligible;
use crate::table::build::{self, BackendInput, FrontendInput, PoolInput};
use crate::table::state::{BackendId, BackendState};
use crate::table::{PoolTable, Table};
use detached_build::Builds;
use pacer::{PublishPacer, PublishReason};
use std::sync::Arc;
use std::time::Instant;

/// The newest table, and what the next one waits for.
#[derive(Debug)]
pub(super) struct Publisher {
    /// Accepted configurations.
    generation: u64,
    /// Tables made.
    serial: u64,
    connections_max: u32,
    table: Arc<Table>,
    pacer: PublishPacer,
    builds: Builds,
    /// Shut, and not in the table that is about to be published.
    reopen: Vec<Arc<BackendState>>,
    /// Tables made by the processes before, by [`PublishReason`].
    carried: [u64; PublishReason::ALL.len()],
}

/// All that a table says of a backend and that can change between reloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct BackendTableState {
    /// In hundredths; 0: not eligible.
    weight: u32,
    /// Cap; 0 means none.
    connections_max: u32,
    /// It is in its slow start.
    slow_start: bool,
    /// Matters where there are backups, to step in meanwhile, and is false in
    /// other pools.
    on_trial: bool,
    /// Matters to `try-all` pools only, and is false in others.
    last_resort: bool,
}

/// A backend's weight and what lowers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Weight {
    /// As configured, or as its heartbeats ask for.
    pub base: u16,
    /// What its health leaves of it, in percent; 0: not eligible.
    pub health: u32,
    /// What its slow start leaves of it, in percent.
    pub ramp: u32,
    /// What its load leaves of it, in percent.
    pub load: u32,
}

/// Tables count weights in such parts of a configured one: a tenth of weight 1
/// is a tenth. (Balancers go by the lowest terms, so this costs nothing while
/// nobody's is lowered.)
const PARTS: u32 = 100;

// === impl BackendTableState ===

impl BackendTableState {
    /// Whether the table has it take sessions.
    pub(super) fn is_eligible(self) -> bool {
        self.weight > 0
    }

    /// What a table says of a backend with that standing.
    pub(super) fn input(self, entry: &BackendEntry) -> BackendInput {
        BackendInput {
            state: Arc::clone(&entry.state),
            effective_weight: self.weight.max(1),
            connections_max: self.connections_max,
            slow_start: self.slow_start,
            backup: entry.spec.backup,
            eligible: self.weight > 0,
            on_trial: self.on_trial,
            in_service: entry.in_service(),
        }
    }

    pub(super) fn of(entry: &BackendEntry, pool: &PoolEntry) -> BackendTableState {
        BackendTableState {
            weight: entry.weight(&pool.spec).parts(),
            connections_max: entry.cap(),
            slow_start: entry.ramp.is_some(),
            on_trial: entry.health.outlier.is_on_trial() && pool.has_backups,
            last_resort: pool.spec.when_none_eligible == WhenNoneEligible::TryAll
                && entry.in_service(),
        }
    }
}

// === impl Weight ===

impl Weight {
    /// In hundredths of a configured weight, at least one for whoever is
    /// eligible.
    fn parts(self) -> u32 {
        if self.health == 0 {
            return 0;
        }
        // Bounded by 1000 * 100^3 * 100.
        let product = u64::from(self.base)
            * u64::from(self.health)
            * u64::from(self.ramp)
            * u64::from(self.load)
            * u64::from(PARTS);
        u32::try_from(product / 1_000_000).unwrap_or(u32::MAX).max(1)
    }

    /// As balanced by; 0 while it is not eligible.
    pub fn in_force(self) -> f64 {
        f64::from(self.parts()) / f64::from(PARTS)
    }
}

/// A cap during a slow start: never less than one session, and none stays none.
fn ramped(connections_max: u32, share: u32) -> u32 {
    if connections_max == 0 {
        return 0;
    }
    let cap = u64::from(connections_max) * u64::from(share) / 100;
    u32::try_from(cap).unwrap_or(u32::MAX).max(1)
}

// === impl BackendEntry ===

impl BackendEntry {
    /// Neither an operator nor its own heartbeats have taken it out.
    fn in_service(&self) -> bool {
        self.health.intent == Intent::Ready && self.health.requested == RequestedState::Ready
    }

    /// The cap in force; 0 means none.
    pub(super) fn cap(&self) -> u32 {
        ramped(self.spec.connections_max, self.ramp_share)
    }

    /// What it is balanced by.
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
    /// An empty table.
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

    /// Accepted configurations.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Tables made.
    pub(super) fn serial(&self) -> u64 {
        self.serial
    }

    /// The newest table.
    pub(super) fn table(&self) -> &Arc<Table> {
        &self.table
    }

    /// A configuration was accepted: the next table is of the next generation.
    pub(super) fn configured(&mut self, connections_max: u32) {
        self.generation += 1;
        self.connections_max = connections_max;
    }

    /// Counts configurations and tables on from there.
    pub(super) fn count_on_from(&mut self, generation: u64, serial: u64) {
        (self.generation, self.serial) = (generation, serial);
    }

    /// Tables made for each reason, by all the processes so far.
    pub(super) fn published(&self) -> [(PublishReason, u64); PublishReason::ALL.len()] {
        let carried = |reason| self.carried[reason as usize];
        PublishReason::ALL
            .map(|reason| (reason, self.pacer.published(reason).saturating_add(carried(reason))))
    }

    /// Counts on from what the processes before have made.
    pub(super) fn carry(&mut self, published: [u64; PublishReason::ALL.len()]) {
        self.carried = published;
    }

    /// Makes the table that is due, if one is.
    pub(super) fn publish(&mut self, state: &mut ControlState, now: Instant) -> Option<Arc<Table>> {
        let reason = self.table_due(state, now)?;
        let table = self.rebuild(state, reason);
        self.table_made(state, reason, table.is_some(), now);
        table
    }

    /// Builds the next table: all of it after a reload, else the pools of which the
    /// newest one is wrong. `None` where their parts are made on another thread.
    pub(super) fn rebuild(
        &mut self,
        state: &mut ControlState,
        reason: PublishReason,
    ) -> Option<Arc<Table>> {
        let table = if self.table.generation == self.generation {
            let changed = self.rebuild_wrong(state, reason);
            if changed.is_empty() {
                self.reopen_left_out();
                return None;
            }
            build::update(&self.table, self.serial + 1, changed)
        } else {
            self.rebuild_all(state)
        };
        self.serial += 1;
        self.table = Arc::new(table);
        self.reopen_left_out();
        Some(Arc::clone(&self.table))
    }

    /// The parts of the next table that differ from the newest one's, by their places.
    fn rebuild_wrong(
        &mut self,
        state: &mut ControlState,
        reason: PublishReason,
    ) -> Vec<(usize, Arc<PoolTable>)> {
        let mut changed = self.take_ready(state);
        for (id, moved) in self.wrong_pools(state) {
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

    /// Those shut until a table would leave them out: this one does.
    fn reopen_left_out(&mut self) {
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

    /// No backend has changed without being noted.
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
    /// The pool of a backend that the newest table is wrong about.
    pub(super) fn moved(&self, id: BackendId) -> Option<PoolId> {
        let entry = self.backends.get(id)?;
        let pool = self.pool(entry.pool)?;
        (BackendTableState::of(entry, pool) != entry.published).then_some(pool.id)
    }

    /// Whether the table may wait for that backend's news: it takes part with
    /// more than before, or for the first time, and heartbeats brought it.
    pub(super) fn may_wait(&self, id: BackendId) -> bool {
        let Some(entry) = self.backends.get(id) else { return true };
        let Some(pool) = self.pool(entry.pool) else { return true };
        entry.origins.is_registered()
            && BackendTableState::of(entry, pool).weight > entry.published.weight
    }

    /// What a table is to say of the pool at that place.
    fn pool_input(&mut self, place: usize) -> Option<PoolInput> {
        let pool = self.pools.at(place)?;
        let members = pool.members().iter();
        let backends = members.filter_map(|id| self.backends.publish(*id, pool)).collect();
        Some(PoolInput {
            spec: Arc::clone(&pool.spec),
            backends,
            stand_ins: self.stand_ins_of(pool),
            undecided: pool.settling().is_some(),
        })
    }

    /// The former backends that serve until the pool's own have been judged, each with
    /// what the table before said of it.
    pub(super) fn stand_ins_of(&self, pool: &PoolEntry) -> Vec<BackendInput> {
        let ids = pool.settling().into_iter().flat_map(|settling| &settling.stand_ins);
        let entries = ids.filter_map(|id| self.removed.get(*id));
        let input = |entry: &BackendEntry| BackendInput {
            eligible: true,
            on_trial: false,
            in_service: true,
            ..entry.published.input(entry)
        };
        entries.map(input).collect()
    }
}
