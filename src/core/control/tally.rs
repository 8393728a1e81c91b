//! How those whose heartbeats are heard stand, counted as they change: by pool, and
//! over all pools.
//!
//! `suspicion` notes each step of a detector here and asks the guards with these
//! counts: a walk over thousands of backends for each suspicion costs more than the
//! suspicion is worth. Only what depends on the time (who is heard at this moment) is
//! still looked up, and only where a guard has to know it.

use super::heartbeats::BackendHeartbeats;
use super::{Controller, PoolId};
use crate::suspicion::{DetectorState, PathGuard, PathView};
use crate::table::state::BackendId;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

/// What one backend is counted as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TalliedBackend {
    pool: PoolId,
    state: DetectorState,
    was_down: bool,
    /// Where it is expected to be heard.
    interval: Option<Duration>,
}

/// The counts of one pool, or of all.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    /// Everybody.
    pub(super) hearts: BTreeSet<BackendId>,
    pub(super) suspects: BTreeSet<BackendId>,
    /// Up or suspect.
    live: usize,
    down: usize,
    /// Of those expected to be heard; how many have each.
    intervals: BTreeMap<Duration, usize>,
}

/// See the module's documentation.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Tallies {
    pub(super) all: Tally,
    pools: HashMap<PoolId, Tally>,
}

// === impl TalliedBackend ===

impl TalliedBackend {
    fn of(heart: &BackendHeartbeats, pool: PoolId) -> TalliedBackend {
        let state = heart.detector.state();
        let expected =
            matches!(state, DetectorState::Up | DetectorState::Suspect) && !heart.expired;
        let was_down = heart.detector.was_down();
        TalliedBackend { pool, state, was_down, interval: expected.then_some(heart.interval) }
    }

    fn is_down(self) -> bool {
        self.state == DetectorState::Down
            || (self.state == DetectorState::Recovering && self.was_down)
    }

    fn is_live(self) -> bool {
        matches!(self.state, DetectorState::Up | DetectorState::Suspect)
    }
}

// === impl Tally ===

impl Tally {
    /// Backends expected to be heard, and the longest interval among them.
    pub(super) fn expected(&self) -> (usize, Duration) {
        let slowest = self.intervals.keys().next_back().copied().unwrap_or_default();
        (self.intervals.values().sum(), slowest)
    }

    fn add(&mut self, id: BackendId, counted: TalliedBackend) {
        self.hearts.insert(id);
        if counted.state == DetectorState::Suspect {
            self.suspects.insert(id);
        }
        self.live += usize::from(counted.is_live());
        self.down += usize::from(counted.is_down());
        if let Some(interval) = counted.interval {
            *self.intervals.entry(interval).or_default() += 1;
        }
    }

    fn remove(&mut self, id: BackendId, counted: TalliedBackend) {
        self.hearts.remove(&id);
        self.suspects.remove(&id);
        self.live -= usize::from(counted.is_live());
        self.down -= usize::from(counted.is_down());
        if let Some(interval) = counted.interval
            && let Some(count) = self.intervals.get_mut(&interval)
        {
            *count -= 1;
            if *count == 0 {
                self.intervals.remove(&interval);
            }
        }
    }
}

// === impl Tallies ===

impl Tallies {
    pub(super) fn of(&self, pool: Option<PoolId>) -> Option<&Tally> {
        match pool {
            None => Some(&self.all),
            Some(id) => self.pools.get(&id),
        }
    }

    fn add(&mut self, id: BackendId, counted: TalliedBackend) {
        self.all.add(id, counted);
        self.pools.entry(counted.pool).or_default().add(id, counted);
    }

    /// The backend has no heart any more, or gets another.
    pub(super) fn forget(&mut self, id: BackendId, heart: Option<&mut BackendHeartbeats>) {
        let Some(counted) = heart.and_then(|heart| heart.counted.take()) else { return };
        self.all.remove(id, counted);
        if let Some(tally) = self.pools.get_mut(&counted.pool) {
            tally.remove(id, counted);
            if tally.hearts.is_empty() {
                self.pools.remove(&counted.pool);
            }
        }
    }
}

// === impl Controller ===

impl Controller {
    /// Counts the backend as it now is.
    pub(super) fn count(&mut self, id: BackendId) {
        let Some(entry) = self.backends.observe(id) else { return };
        let Some(heart) = entry.heart.as_deref_mut() else { return };
        let counted = TalliedBackend::of(heart, entry.pool);
        if heart.counted != Some(counted) {
            self.tallies.forget(id, Some(heart));
            heart.counted = Some(counted);
            self.tallies.add(id, counted);
        }
    }

    /// What the guards look at, of one pool or of all, without who is heard and who
    /// answers. Those who fell silent together are counted where half are suspect, for
    /// fewer are no reason for anything.
    pub(super) fn path_counts(&self, pool: Option<PoolId>, now: Instant) -> PathView {
        let Some(tally) = self.tallies.of(pool) else { return PathView::default() };
        let suspects = tally.suspects.len();
        let detectors = tally
            .suspects
            .iter()
            .filter_map(|id| self.backends.get(*id)?.heart.as_deref().map(|heart| &heart.detector));
        let fresh = match suspects * 2 >= tally.live {
            true => PathView::of(detectors, None, now).fresh,
            false => 0,
        };
        let members = tally.hearts.len();
        let (live, down) = (tally.live, tally.down);
        PathView { live, suspects, fresh, down, members, heard: 0, answering: 0 }
    }

    /// Everything the guards look at, by a look at each of those backends.
    pub(super) fn path_view(&self, pool: Option<PoolId>, now: Instant) -> PathView {
        let guard = match pool {
            None => Some(&self.guards.all),
            Some(id) => self.pool(id).map(|pool| &pool.guard),
        };
        let frozen = guard.and_then(PathGuard::freeze).map(|freeze| freeze.since);
        let hearts = self.tallies.of(pool).into_iter().flat_map(|tally| &tally.hearts);
        let detectors = hearts
            .filter_map(|id| self.backends.get(*id)?.heart.as_deref().map(|heart| &heart.detector));
        PathView::of(detectors, frozen, now)
    }

    /// Nobody has changed without being counted.
    #[cfg(debug_assertions)]
    pub(super) fn check_tallies(&self) {
        if self.backends.len() > 100 {
            return;
        }
        let mut tallies = Tallies::default();
        for entry in self.backends.iter() {
            if let Some(heart) = entry.heart.as_deref() {
                tallies.add(entry.state.id, TalliedBackend::of(heart, entry.pool));
            }
        }
        assert_eq!(self.tallies, tallies);
    }
}
