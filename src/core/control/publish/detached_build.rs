//! Pools too large for their part of a table to be made between two events: it is
//! made on another thread.
//!
//! `publish` leaves such a pool here when it is wrong. The controller asks the shell
//! with [`ControlEffect::Build`], and [`Event::Built`](super::ControlEvent::Built) brings the part,
//! which goes into the next table. One part of a pool is under way at a time; what
//! changes meanwhile makes one more. Whoever is taken out is shut at once, by a mark
//! that every pick looks at ([`InFlight::shut`]), so no table has to be waited for.
//! Nothing here starts a thread.
//!
//! [`InFlight::shut`]: crate::balance::in_flight::InFlight::shut

use super::Publisher;
use super::pacer::PublishReason;
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

/// Members up to which a pool's part is made at once: some 2 ms.
pub(in crate::control) const AT_ONCE_MAX: usize = 2_000;

/// Parts made for heartbeats take the other thread one part in so many of its time; all
/// together take half of it.
const SHARE: u32 = 10;

/// From so many changes on, members are gone through rather than looked for.
const LOOKED_FOR_MAX: usize = 32;

/// Names one part that is being made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BuildToken {
    pool: PoolId,
    number: u64,
}

/// What all pools have in common.
#[derive(Debug)]
pub(in crate::control) struct Builds {
    /// Members up to which a pool's part is made at once.
    pub(in crate::control) at_once_max: usize,
    /// The last number given out.
    number: u64,
    /// Pools that are wrong. One whose part is under way waits for its end.
    due: BTreeMap<PoolId, PublishReason>,
    /// Parts for the next table.
    ready: Vec<(PoolId, Arc<PoolTable>)>,
    /// When the last part was made, and how long that took: the other thread rests as
    /// long.
    last: Option<(Instant, Duration)>,
}

/// One pool's part.
#[derive(Debug, Default)]
pub(in crate::control) struct DetachedBuild {
    /// What the last part was made of; `None` while one is under way.
    roster: Option<Roster>,
    under_way: Option<UnderWay>,
    /// Members that the last part, made or under way, may be wrong about.
    moved: Vec<BackendId>,
    /// Taken out before a table says so, with the number of the first part that does.
    shut: BTreeMap<BackendId, (u64, Arc<BackendState>)>,
}

/// A part that is being made.
#[derive(Debug)]
struct UnderWay {
    number: u64,
    reason: PublishReason,
    /// Who stands in each line of its input.
    ids: Vec<BackendId>,
}

/// See [`DetachedBuild`]. The input travels to the other thread and back, so that a change of
/// one backend costs a change of one line in it.
#[derive(Debug)]
struct Roster {
    input: PoolInput,
    /// Who stands in each line.
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
    /// Whether the part of a pool of so many is made on another thread.
    pub(in crate::control) fn is_detached(&self, members: usize) -> bool {
        members > self.at_once_max
    }

    /// Whether that pool's part is still to be made.
    #[cfg(debug_assertions)]
    pub(in crate::control) fn is_due(&self, pool: PoolId) -> bool {
        self.due.contains_key(&pool)
    }
}

// === impl DetachedBuild ===

impl DetachedBuild {
    /// Keeps what was made between two events.
    fn of(input: PoolInput, ids: Vec<BackendId>) -> DetachedBuild {
        DetachedBuild { roster: Some(Roster { input, ids }), ..DetachedBuild::default() }
    }

    /// A table says of everybody what is so.
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
    /// Follows the members: those that left go, those that came stand at the end. (In
    /// between members keep their order.) The places of those that came are given.
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

    /// The places of those backends.
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
    /// Makes parts of more than so many members on another thread, and no others.
    pub(in crate::control) fn detach_builds_above(&mut self, members: usize) {
        self.builds.at_once_max = members;
    }

    /// A large pool is wrong about those `moved` (members came or went, where there are
    /// none). Whoever is taken out gets no session from now on.
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
        // The first part that will know of it is the next to begin.
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

    /// The pool's part has been made between two events: of that.
    pub(in crate::control) fn built_at_once(
        &mut self,
        state: &mut ControlState,
        id: PoolId,
        input: PoolInput,
    ) {
        let Some(pool) = state.pools.observe(id) else { return };
        if let Some(before) = pool.detached.take() {
            // What was under way or due is of no use any more.
            before.reopen();
        }
        self.builds.due.remove(&id);
        self.builds.ready.retain(|(pool, _)| *pool != id);
        if self.builds.is_detached(pool.members().len()) {
            pool.detached = Some(DetachedBuild::of(input, pool.members().to_vec()));
        }
    }

    /// Begins the parts that are due and not under way.
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
        // A pool that a reload has removed is not due any more.
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
        let mut roster = detached.roster.take().unwrap_or_else(|| Roster::nobody(pool));
        let came = roster.follow(pool.members());
        for place in roster.places(&moved) {
            if let Some(line) = roster.input.backends.get_mut(place)
                && let Some(input) = state.backends.publish(roster.ids[place], pool)
            {
                *line = input;
            }
        }
        // Every member is among the backends.
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

    /// A part is made, which `took` so long. One that a reload has overtaken is of no
    /// use.
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
        self.builds.ready.push((token.pool, built.table));
        state.pending.rebuild.get_or_insert(reason);
        self.builds.last = Some((now, took));
        if reason == PublishReason::Heartbeat {
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

    /// The parts that have been made and say something new, by their places.
    pub(in crate::control) fn take_ready(
        &mut self,
        state: &mut ControlState,
    ) -> Vec<(usize, Arc<PoolTable>)> {
        let ready = std::mem::take(&mut self.builds.ready);
        let placed =
            ready.into_iter().filter_map(|(id, table)| Some((state.pools.place(id)?, table)));
        let is_new = |(place, table): &(usize, Arc<PoolTable>)| {
            self.table.pools.get(*place).is_some_and(|before| !Arc::ptr_eq(before, table))
        };
        placed.filter(is_new).collect()
    }
}

// === impl ControlState ===

impl ControlState {
    /// A backend stands as the newest table, or the part under way, says: it may have
    /// been taken out and put back since.
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
    fn nobody(pool: &PoolEntry) -> Roster {
        let input = PoolInput {
            spec: Arc::clone(&pool.spec),
            backends: Vec::with_capacity(pool.members().len()),
            stand_ins: Vec::new(),
            undecided: false,
        };
        Roster { input, ids: Vec::new() }
    }
}
