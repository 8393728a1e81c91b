//! Table parts of large pools, built on another thread.
//!
//! Called by `publish` for an outdated pool that is too large to build between two events.
//! This module starts no thread.
//!
//! 1. The controller returns a [`ControlEffect::Build`].
//! 2. The daemon runs the build and reports it with
//!    [`ControlEvent::Built`](crate::control::ControlEvent::Built).
//! 3. The part is published at once. A pool has one build at a time. Changes during the build
//!    cause another build, those of heartbeats and member sources at the time that `pacer` sets.
//!
//! A backend that is no longer eligible is shut at once: every pick checks a flag
//! ([`InFlight::shut`]), so the backend gets no session before the next table.
//!
//! [`InFlight::shut`]: crate::balance::in_flight::InFlight::shut

use super::Publisher;
use super::pacer::{PublishReason, SHARE};
use crate::control::ControlEffect;
use crate::control::pools::{PoolEntry, PoolId};
use crate::control::schedule::TimerKind;
use crate::control::state::ControlState;
use crate::table::PoolTable;
use crate::table::build::{PoolBuild, PoolBuilt, PoolInput};
use crate::table::state::{BackendId, BackendState};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Largest pool whose part is built at once: about 2 ms.
pub(in crate::control) const AT_ONCE_MAX: usize = 2_000;

/// Up to this many changes, each changed member is searched; with more, one scan finds all.
const LOOKED_FOR_MAX: usize = 32;

/// Identifies one build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BuildToken {
    pool: PoolId,
    number: u64,
}

/// State of the builds of all pools.
#[derive(Debug)]
pub(in crate::control) struct Builds {
    /// Largest pool whose part is built at once.
    pub(in crate::control) at_once_max: usize,
    /// The last build number.
    number: u64,
    /// Outdated pools. A pool with a running build waits for its end.
    due: BTreeMap<PoolId, PublishReason>,
    /// Parts for the next table.
    ready: Vec<(PoolId, PublishReason, Arc<PoolTable>)>,
    /// End and duration of the last build. The other thread then pauses for that duration,
    /// so all builds together use at most half of its time.
    last: Option<(Instant, Duration)>,
}

/// State of the builds of one pool.
#[derive(Debug, Default)]
pub(in crate::control) struct DetachedBuild {
    /// Input of the last build; `None` while one is running.
    roster: Option<Roster>,
    under_way: Option<UnderWay>,
    /// Members that may differ from the last build, complete or running.
    moved: Vec<BackendId>,
    /// Shut backends, each with the number of the first build without it.
    shut: BTreeMap<BackendId, (u64, Arc<BackendState>)>,
}

/// A running build.
#[derive(Debug)]
struct UnderWay {
    number: u64,
    reason: PublishReason,
    /// Backend of each line of the input.
    ids: Vec<BackendId>,
}

/// Input of a build. It is moved to the other thread and back, so that a change of one
/// backend costs a change of one line.
#[derive(Debug)]
struct Roster {
    input: PoolInput,
    /// Backend of each line.
    ids: Vec<BackendId>,
}

impl Default for Builds {
    fn default() -> Builds {
        let (due, ready) = (BTreeMap::new(), Vec::new());
        Builds { at_once_max: AT_ONCE_MAX, number: 0, due, ready, last: None }
    }
}

// === impl Builds ===

impl Builds {
    /// Whether another thread builds the part of a pool of this size.
    pub(in crate::control) fn is_detached(&self, members: usize) -> bool {
        members > self.at_once_max
    }

    /// Whether a build of the pool is due.
    #[cfg(debug_assertions)]
    pub(in crate::control) fn is_due(&self, pool: PoolId) -> bool {
        self.due.contains_key(&pool)
    }
}

// === impl DetachedBuild ===

impl DetachedBuild {
    /// Returns the state after a part was built at once.
    fn of(input: PoolInput, ids: Vec<BackendId>) -> DetachedBuild {
        DetachedBuild { roster: Some(Roster { input, ids }), ..DetachedBuild::default() }
    }

    /// Reopens all shut backends, because the table is up to date.
    pub(in crate::control) fn reopen(&self) {
        self.shut.values().for_each(|(_, state)| state.in_flight.reopen());
    }

    fn reopen_one(&mut self, id: BackendId) {
        if let Some((_, state)) = self.shut.remove(&id) {
            state.in_flight.reopen();
        }
    }
}

// === impl Roster ===

impl Roster {
    /// Updates the lines to `members`: removes backends that left, and leaves the new ones
    /// for the caller to append. The other members keep their order. Returns the positions
    /// of the new members.
    fn follow(&mut self, members: &[BackendId]) -> std::ops::Range<usize> {
        if self.ids != members {
            let mut left = members.iter().peekable();
            let stays: Vec<bool> =
                self.ids.iter().map(|id| left.next_if(|next| *next == id).is_some()).collect();
            let mut stay = stays.iter();
            self.input.backends.retain(|_| stay.next().copied().unwrap_or(false));
            self.ids = members.to_vec();
        }
        self.input.backends.len()..self.ids.len()
    }

    /// Returns the positions of these backends.
    fn places(&self, moved: &[BackendId]) -> Vec<usize> {
        if moved.len() <= LOOKED_FOR_MAX {
            let place = |id: &BackendId| self.ids.iter().position(|one| one == id);
            return moved.iter().filter_map(place).collect();
        }
        let moved: HashSet<BackendId> = moved.iter().copied().collect();
        let places = self.ids.iter().enumerate().filter(|(_, id)| moved.contains(id));
        places.map(|(place, _)| place).collect()
    }
}

// === impl Publisher ===

impl Publisher {
    /// Builds parts on another thread for pools with more than `members` backends only.
    pub(in crate::control) fn detach_builds_above(&mut self, members: usize) {
        self.builds.at_once_max = members;
    }

    /// Schedules a build of a large pool whose `moved` backends have changed (empty: its
    /// members have changed). Shuts backends that are no longer eligible.
    pub(in crate::control) fn detach(
        &mut self,
        state: &mut ControlState,
        pool: PoolId,
        moved: BTreeSet<BackendId>,
        reason: PublishReason,
    ) {
        let Some(pool) = state.pools.observe(pool) else { return };
        self.builds.due.entry(pool.id).or_insert(reason);
        let detached = pool.detached.get_or_insert_default();
        // The next build is the first one without the shut backends.
        let first = self.builds.number + 1;
        for id in &moved {
            let Some(entry) = state.backends.get(*id) else { continue };
            if entry.health.eligible() {
                detached.reopen_one(*id);
            } else if !detached.shut.contains_key(id) && entry.state.in_flight.shut() {
                detached.shut.insert(*id, (first, Arc::clone(&entry.state)));
            }
        }
        detached.moved.extend(moved);
    }

    /// Records that the pool's part was built at once from `input`.
    pub(in crate::control) fn built_at_once(
        &mut self,
        state: &mut ControlState,
        id: PoolId,
        input: PoolInput,
    ) {
        let Some(pool) = state.pools.observe(id) else { return };
        if let Some(before) = pool.detached.take() {
            // Running and due builds are outdated.
            before.reopen();
        }
        self.builds.due.remove(&id);
        self.builds.ready.retain(|(pool, ..)| *pool != id);
        if self.builds.is_detached(pool.members().len()) {
            pool.detached = Some(DetachedBuild::of(input, pool.members().to_vec()));
        }
    }

    /// Begins the due builds of pools without a running build.
    pub(in crate::control) fn begin_builds(&mut self, state: &mut ControlState, now: Instant) {
        if self.builds.due.is_empty() {
            return;
        }
        if let Some((at, took)) = self.builds.last
            && now.saturating_duration_since(at) < took
        {
            state.schedule.set(TimerKind::Build, at + took);
            return;
        }
        // Includes pools that a reload has removed; their builds end in `begin_build`.
        let idle = |id: &PoolId| {
            let detached = state.pool(*id).and_then(|pool| pool.detached.as_ref());
            detached.is_none_or(|detached| detached.under_way.is_none())
        };
        let begin: Vec<PoolId> = self.builds.due.keys().copied().filter(idle).collect();
        for id in begin {
            let reason = self.builds.due.remove(&id).unwrap_or(PublishReason::Health);
            self.begin_build(state, id, reason);
        }
    }

    fn begin_build(&mut self, state: &mut ControlState, id: PoolId, reason: PublishReason) {
        let previous = state.pools.place(id).and_then(|place| self.table.pools.get(place)).cloned();
        let stand_ins = state.pool(id).map_or_else(Vec::new, |pool| state.stand_ins_of(pool));
        let Some(pool) = state.pools.observe(id) else { return };
        let Some(mut detached) = pool.detached.take() else { return };
        self.builds.number += 1;
        let number = self.builds.number;
        let moved = std::mem::take(&mut detached.moved);
        let mut roster = detached.roster.take().unwrap_or_else(|| Roster::empty(pool));
        let came = roster.follow(pool.members());
        for place in roster.places(&moved) {
            if let Some(line) = roster.input.backends.get_mut(place)
                && let Some(input) = state.backends.publish(roster.ids[place], pool)
            {
                *line = input;
            }
        }
        let came = came.filter_map(|place| state.backends.publish(roster.ids[place], pool));
        roster.input.backends.extend(came);
        roster.input.spec = Arc::clone(&pool.spec);
        roster.input.stand_ins = stand_ins;
        roster.input.undecided = pool.settling().is_some();
        detached.under_way = Some(UnderWay { number, reason, ids: roster.ids });
        pool.detached = Some(detached);
        let token = BuildToken { pool: id, number };
        let build = Box::new(PoolBuild { input: roster.input, previous });
        state.pending.effects.push(ControlEffect::Build { token, build });
    }

    /// Records a complete build. Ignores a build from before a reload.
    pub(in crate::control) fn built(
        &mut self,
        state: &mut ControlState,
        token: BuildToken,
        built: PoolBuilt,
        took: Duration,
        now: Instant,
    ) {
        let Some(pool) = state.pools.observe(token.pool) else { return };
        let Some(detached) = &mut pool.detached else { return };
        let Some(UnderWay { reason, ids, .. }) =
            detached.under_way.take_if(|part| part.number == token.number)
        else {
            return;
        };
        detached.roster = Some(Roster { input: built.input, ids });
        self.builds.ready.push((token.pool, reason, built.table));
        self.builds.last = Some((now, took));
        if reason.is_paced() {
            self.pacer.wait_until(now + took * (SHARE - 1));
        }
        detached.shut.retain(|_, (first, state)| {
            let known = *first <= token.number;
            if known {
                self.reopen.push(Arc::clone(state));
            }
            !known
        });
    }

    /// Returns why a table of complete parts is due; `None` if there is none.
    pub(in crate::control) fn parts_due(&self) -> Option<PublishReason> {
        self.builds.ready.first().map(|(_, reason, _)| *reason)
    }

    /// Removes and returns the complete parts that differ from the table, by position.
    pub(in crate::control) fn take_ready(
        &mut self,
        state: &mut ControlState,
    ) -> Vec<(usize, Arc<PoolTable>)> {
        let ready = std::mem::take(&mut self.builds.ready);
        let placed =
            ready.into_iter().filter_map(|(id, _, table)| Some((state.pools.place(id)?, table)));
        let is_new = |(place, table): &(usize, Arc<PoolTable>)| {
            self.table.pools.get(*place).is_some_and(|before| !Arc::ptr_eq(before, table))
        };
        placed.filter(is_new).collect()
    }
}

// === impl ControlState ===

impl ControlState {
    /// Reopens an eligible backend that equals its published state. It can have been shut
    /// and become eligible again since.
    pub(in crate::control) fn came_back(&mut self, id: BackendId) {
        let Some(entry) = self.backends.get(id).filter(|entry| entry.health.eligible()) else {
            return;
        };
        if let Some(detached) =
            self.pools.observe(entry.pool).and_then(|pool| pool.detached.as_mut())
        {
            detached.reopen_one(id);
        }
    }
}

impl Roster {
    fn empty(pool: &PoolEntry) -> Roster {
        let input = PoolInput {
            id: pool.id,
            spec: Arc::clone(&pool.spec),
            backends: Vec::with_capacity(pool.members().len()),
            stand_ins: Vec::new(),
            undecided: false,
        };
        Roster { input, ids: Vec::new() }
    }
}
