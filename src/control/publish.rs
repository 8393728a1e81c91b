//! From standings to a table, and whether a new one is due.
//!
//! The controller calls it at the end of each event. It builds, it does not
//! publish: that is the shell's part.

use super::{BackendEntry, Controller, Leaving, Origin, PoolEntry, PoolId};
use crate::config::{self, WhenNoneEligible};
use crate::health::{Calling, Intent};
use crate::table::Table;
use crate::table::build::{self, BackendInput, FrontendInput, PoolInput};
use crate::table::state::BackendId;
use std::collections::BTreeMap;
use std::sync::Arc;

/// All that a table says of a backend and that can change between reloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Standing {
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
    /// Whether the table has it take sessions.
    pub(super) fn is_eligible(self) -> bool {
        self.weight > 0
    }

    fn of(entry: &BackendEntry, pool: &PoolEntry) -> Standing {
        Standing {
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

/// The former backends that serve until the pool's own have been judged, each with
/// what the table before said of it.
fn stand_ins(pool: &PoolEntry, leaving: &BTreeMap<BackendId, Leaving>) -> Vec<BackendInput> {
    let ids = pool.settling.iter().flat_map(|settling| &settling.stand_ins);
    let entries = ids.filter_map(|id| Some(&leaving.get(id)?.entry));
    let input = |entry: &BackendEntry| BackendInput {
        state: Arc::clone(&entry.state),
        effective_weight: entry.published.weight.max(1),
        connections_max: entry.published.connections_max,
        slow_start: entry.published.slow_start,
        backup: entry.spec.backup,
        eligible: true,
        on_trial: false,
        in_service: true,
    };
    entries.map(input).collect()
}

// === impl BackendEntry ===

impl BackendEntry {
    /// Neither an operator nor its own heartbeats have taken it out.
    fn in_service(&self) -> bool {
        self.health.intent == Intent::Ready && self.health.calling == Calling::Sessions
    }

    /// The cap in force; 0 means none.
    pub(super) fn cap(&self) -> u32 {
        ramped(self.spec.connections_max, self.ramp_share)
    }

    /// What it is balanced by.
    pub(super) fn weight(&self, pool: &config::Pool) -> Weight {
        Weight {
            base: self.base_weight(pool),
            health: self.health.weight_share(),
            ramp: self.ramp_share,
            load: self.load_share(),
        }
    }
}

// === impl Controller ===

impl Controller {
    /// The pool of a backend that the newest table is wrong about.
    pub(super) fn moved(&self, id: BackendId) -> Option<PoolId> {
        let entry = self.backends.get(&id)?;
        let pool = self.pool(entry.pool)?;
        (Standing::of(entry, pool) != entry.published).then_some(pool.id)
    }

    /// Whether the table may wait for that backend's news: it takes part with
    /// more than before, or for the first time, and heartbeats brought it.
    pub(super) fn may_wait(&self, id: BackendId) -> bool {
        let Some(entry) = self.backends.get(&id) else { return true };
        let Some(pool) = self.pool(entry.pool) else { return true };
        entry.origin == Origin::Registered
            && Standing::of(entry, pool).weight > entry.published.weight
    }

    /// Builds the next table: all of it after a reload, else the pools of which the
    /// newest one is wrong.
    pub(super) fn rebuild(&mut self) -> Arc<Table> {
        self.serial += 1;
        let table = if self.table.generation == self.generation {
            let places = self.wrong_pools().into_iter().filter_map(|id| self.pools.place(id));
            let places: Vec<usize> = places.collect();
            let changed = places.into_iter().filter_map(|place| self.pool_input(place));
            let changed = changed.collect();
            build::update(&self.table, self.serial, changed)
        } else {
            let places = 0..self.pools.iter().len();
            let pools = places.filter_map(|place| Some(self.pool_input(place)?.1)).collect();
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
            build::build(input, Some(&self.table))
        };
        #[cfg(test)]
        self.check_published();
        self.table = Arc::new(table);
        Arc::clone(&self.table)
    }

    /// What a table is to say of the pool at that place.
    fn pool_input(&mut self, place: usize) -> Option<(usize, PoolInput)> {
        let pool = self.pools.iter().as_slice().get(place)?;
        let mut backends = Vec::with_capacity(pool.members.len());
        for id in &pool.members {
            let Some(entry) = self.backends.get_mut(id) else { continue };
            entry.published = Standing::of(entry, pool);
            backends.push(BackendInput {
                state: Arc::clone(&entry.state),
                effective_weight: entry.published.weight.max(1),
                connections_max: entry.published.connections_max,
                slow_start: entry.published.slow_start,
                backup: entry.spec.backup,
                eligible: entry.published.weight > 0,
                on_trial: entry.published.on_trial,
                in_service: entry.in_service(),
            });
        }
        let input = PoolInput {
            spec: Arc::clone(&pool.spec),
            backends,
            stand_ins: stand_ins(pool, &self.leaving),
            undecided: pool.settling.is_some(),
        };
        Some((place, input))
    }

    /// No backend has moved without being noted.
    #[cfg(test)]
    fn check_published(&self) {
        // Where costs are measured it would be most of them.
        let checked = self.backends.keys().filter(|_| self.backends.len() < 10_000);
        for id in checked {
            assert!(self.moved(*id).is_none(), "{:?} has moved", self.name_of(*id));
        }
    }
}
