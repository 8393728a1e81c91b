//! Counts of senders by state, per pool and over all pools.
//!
//! Called by `silence` after each step of a detector. The guards use the counts, because a
//! scan of thousands of backends per suspicion would be too expensive. Only the number of
//! backends heard now depends on the time. It is computed by a scan, if a guard needs it.

use super::HeartbeatWatch;
use super::reported::BackendHeartbeats;
use crate::control::pools::PoolId;
use crate::control::state::ControlState;
use crate::suspicion::{DetectorState, PathGuard, PathView};
use crate::table::state::BackendId;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

/// How one backend counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::control) struct CountedSender {
    pool: PoolId,
    state: DetectorState,
    was_down: bool,
    /// Its interval, if it should send heartbeats.
    interval: Option<Duration>,
}

/// The counts of one pool, or of all.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::control) struct PathCounts {
    /// All backends with heartbeats.
    pub(in crate::control) senders: BTreeSet<BackendId>,
    pub(in crate::control) suspects: BTreeSet<BackendId>,
    /// Up or suspect.
    live: usize,
    down: usize,
    /// Number of backends by interval, of those that should send heartbeats.
    intervals: BTreeMap<Duration, usize>,
}

/// See the module documentation.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::control) struct SilenceCounts {
    pub(in crate::control) all: PathCounts,
    pools: HashMap<PoolId, PathCounts>,
}

// === impl CountedSender ===

impl CountedSender {
    fn of(heartbeats: &BackendHeartbeats, pool: PoolId) -> CountedSender {
        let state = heartbeats.detector.state();
        let expected =
            matches!(state, DetectorState::Up | DetectorState::Suspect) && !heartbeats.expired;
        let was_down = heartbeats.detector.was_down();
        CountedSender { pool, state, was_down, interval: expected.then_some(heartbeats.interval) }
    }

    fn is_down(self) -> bool {
        self.state == DetectorState::Down
            || (self.state == DetectorState::Recovering && self.was_down)
    }

    fn is_live(self) -> bool {
        matches!(self.state, DetectorState::Up | DetectorState::Suspect)
    }
}

// === impl PathCounts ===

impl PathCounts {
    /// Returns the number of backends that should send heartbeats, and their longest
    /// interval.
    pub(in crate::control) fn expected(&self) -> (usize, Duration) {
        let slowest = self.intervals.keys().next_back().copied().unwrap_or_default();
        (self.intervals.values().sum(), slowest)
    }

    fn add(&mut self, id: BackendId, counted: CountedSender) {
        self.senders.insert(id);
        if counted.state == DetectorState::Suspect {
            self.suspects.insert(id);
        }
        self.live += usize::from(counted.is_live());
        self.down += usize::from(counted.is_down());
        if let Some(interval) = counted.interval {
            *self.intervals.entry(interval).or_default() += 1;
        }
    }

    fn remove(&mut self, id: BackendId, counted: CountedSender) {
        self.senders.remove(&id);
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

// === impl SilenceCounts ===

impl SilenceCounts {
    pub(in crate::control) fn of(&self, pool: Option<PoolId>) -> Option<&PathCounts> {
        match pool {
            None => Some(&self.all),
            Some(id) => self.pools.get(&id),
        }
    }

    fn add(&mut self, id: BackendId, counted: CountedSender) {
        self.all.add(id, counted);
        self.pools.entry(counted.pool).or_default().add(id, counted);
    }

    /// Removes a backend from the counts.
    pub(in crate::control) fn forget(
        &mut self,
        id: BackendId,
        heartbeats: Option<&mut BackendHeartbeats>,
    ) {
        let Some(counted) = heartbeats.and_then(|heartbeats| heartbeats.counted.take()) else {
            return;
        };
        self.all.remove(id, counted);
        if let Some(counts) = self.pools.get_mut(&counted.pool) {
            counts.remove(id, counted);
            if counts.senders.is_empty() {
                self.pools.remove(&counted.pool);
            }
        }
    }
}

// === impl HeartbeatWatch ===

impl HeartbeatWatch {
    /// Updates the counts to the backend's state.
    pub(in crate::control) fn count(&mut self, state: &mut ControlState, id: BackendId) {
        let Some(entry) = state.backends.observe(id) else { return };
        let Some(heartbeats) = entry.heartbeats.as_deref_mut() else { return };
        let counted = CountedSender::of(heartbeats, entry.pool);
        if heartbeats.counted != Some(counted) {
            self.counts.forget(id, Some(heartbeats));
            heartbeats.counted = Some(counted);
            self.counts.add(id, counted);
        }
    }

    /// Returns the view of one pool or of all pools, without `heard` and `answering`.
    /// `fresh` is computed only if half of the live backends are suspect, because fewer
    /// cannot start a freeze.
    pub(in crate::control) fn path_counts(
        &self,
        state: &ControlState,
        pool: Option<PoolId>,
        now: Instant,
    ) -> PathView {
        let Some(counts) = self.counts.of(pool) else { return PathView::default() };
        let suspects = counts.suspects.len();
        let detectors = counts.suspects.iter().filter_map(|id| {
            state.backends.get(*id)?.heartbeats.as_deref().map(|heartbeats| &heartbeats.detector)
        });
        let fresh = match suspects * 2 >= counts.live {
            true => PathView::of(detectors, None, now).fresh,
            false => 0,
        };
        let members = counts.senders.len();
        let (live, down) = (counts.live, counts.down);
        PathView { live, suspects, fresh, down, members, heard: 0, answering: 0 }
    }

    /// Returns the complete view by a scan of the backends.
    pub(in crate::control) fn path_view(
        &self,
        state: &ControlState,
        pool: Option<PoolId>,
        now: Instant,
    ) -> PathView {
        let guard = match pool {
            None => Some(&self.guards.all),
            Some(id) => state.pool(id).map(|pool| &pool.guard),
        };
        let frozen = guard.and_then(PathGuard::freeze).map(|freeze| freeze.since);
        let senders = self.counts.of(pool).into_iter().flat_map(|counts| &counts.senders);
        let detectors = senders.filter_map(|id| {
            state.backends.get(*id)?.heartbeats.as_deref().map(|heartbeats| &heartbeats.detector)
        });
        PathView::of(detectors, frozen, now)
    }

    /// Asserts that the counts match the backends.
    #[cfg(debug_assertions)]
    pub(in crate::control) fn check_counts(&self, state: &ControlState) {
        if state.backends.len() > 100 {
            return;
        }
        let mut counts = SilenceCounts::default();
        for entry in state.backends.iter() {
            if let Some(heartbeats) = entry.heartbeats.as_deref() {
                counts.add(entry.state.id, CountedSender::of(heartbeats, entry.pool));
            }
        }
        assert_eq!(self.counts, counts);
    }
}
