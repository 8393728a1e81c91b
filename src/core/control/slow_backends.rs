//! Slow and hanging backends: reads the workers' counters of first bytes and makes
//! backends suspect.
//!
//! Called by the controller every [`LOOK_INTERVAL`], if a pool with several backends has
//! `slow_first_byte`. It removes no backend.
//!
//! - `core::health::slow_detector` decides; this module passes in the counts.
//! - A check of many backends is split into turns, so that other events do not wait.
//! - Guard: at most as many backends of a pool as may be ejected, and at least one, are
//!   suspect or ejected at a time.

use super::pools::{PoolEntry, PoolId};
use super::schedule::TimerKind;
use super::state::ControlState;
use crate::health::slow_detector::{
    FirstByteCounts, LOOK_INTERVAL, PoolView, SlowDetector, SlowVerdict,
};
use crate::table::state::{BackendId, BackendState};
use std::time::{Duration, Instant};

/// Backends per turn: about 0.5 ms. A check visits each backend twice.
const TURN_MAX: usize = 1_000;

/// Time between two turns of a check.
const TURN_PAUSE: Duration = Duration::from_millis(1);

/// The running check.
#[derive(Debug, Default)]
pub(super) struct SlowBackends {
    began: Option<Instant>,
    /// Remaining pools, the next one last.
    pools: Vec<PoolId>,
    stage: Option<Stage>,
}

/// Progress of the check in one pool.
#[derive(Debug)]
struct Stage {
    pool: PoolId,
    /// Members at the start of the check.
    members: Vec<BackendId>,
    /// Position of the next member.
    at: usize,
    view: PoolView,
    /// All members have recorded their counts; the verdicts follow.
    judging: bool,
}

/// Returns `slow_first_byte` if the pool has several backends.
pub(super) fn watched(pool: &PoolEntry) -> Option<Duration> {
    let slow = pool.spec.ejection.and_then(|spec| spec.slow_first_byte);
    slow.filter(|_| pool.members().len() > 1)
}

fn counted(state: &BackendState) -> FirstByteCounts {
    let counters = &state.counters;
    FirstByteCounts {
        // First, so that sessions answered between the reads do not count as waiting.
        questions: counters.sum(|c| c.questions.get()),
        answers: counters.sum(|c| c.answers.get()),
        unanswered: counters.sum(|c| c.unanswered.get()),
        answer_log2: counters.sum(|c| c.answer_log2.get()),
    }
}

// === impl SlowBackends ===

impl SlowBackends {
    /// Applies a reload: clears suspects in pools without `slow_first_byte`, and starts or
    /// stops the checks.
    pub(super) fn configure(&mut self, state: &mut ControlState, now: Instant) {
        let unwatched = state.pools.iter().filter(|pool| watched(pool).is_none());
        let members: Vec<BackendId> =
            unwatched.flat_map(|pool| pool.members().iter().copied()).collect();
        for id in members {
            let reason = "slow_first_byte was disabled in the configuration".to_owned();
            state.clear_suspect(id, reason, now);
            if let Some(entry) = state.backends.touch(id) {
                entry.health.slow = SlowDetector::default();
            }
        }
        if !state.pools.iter().any(|pool| watched(pool).is_some()) {
            state.schedule.cancel(TimerKind::CheckSlow);
            *self = SlowBackends::default();
        } else if !state.schedule.is_set(TimerKind::CheckSlow) {
            state.schedule.set(TimerKind::CheckSlow, now + LOOK_INTERVAL);
        }
    }

    /// Continues the running check, or begins one.
    pub(super) fn check(&mut self, state: &mut ControlState, now: Instant) {
        if self.began.is_none() {
            let watched = state.pools.iter().filter(|pool| watched(pool).is_some());
            self.pools = watched.map(|pool| pool.id).collect();
            self.pools.reverse();
        }
        let began = *self.began.get_or_insert(now);
        let mut left = TURN_MAX;
        while left > 0 {
            let stage = self.stage.take();
            let Some(stage) = stage.or_else(|| self.next_pool(state)) else {
                *self = SlowBackends::default();
                let next = (began + LOOK_INTERVAL).max(now + TURN_PAUSE);
                state.schedule.set(TimerKind::CheckSlow, next);
                return;
            };
            self.stage = self.check_pool(state, stage, &mut left, now);
        }
        state.schedule.set(TimerKind::CheckSlow, now + TURN_PAUSE);
    }

    fn next_pool(&mut self, state: &mut ControlState) -> Option<Stage> {
        let id = self.pools.pop()?;
        let members = state.pool(id).map_or_else(Vec::new, |pool| pool.members().to_vec());
        Some(Stage { pool: id, members, at: 0, view: PoolView::default(), judging: false })
    }

    /// Checks some backends of a pool. All backends record their counts before the first
    /// verdict. Returns `None` when the pool is done.
    fn check_pool(
        &mut self,
        state: &mut ControlState,
        mut stage: Stage,
        left: &mut usize,
        now: Instant,
    ) -> Option<Stage> {
        // A reload since the start of the check can have disabled `slow_first_byte`.
        let slow = state.pool(stage.pool).and_then(watched)?;
        let end = stage.members.len().min(stage.at + *left);
        let slice = stage.at..end;
        *left -= slice.len();
        stage.at = end;
        let mut found = Vec::new();
        for id in &stage.members[slice] {
            let Some(entry) = state.backends.observe(*id) else { continue };
            let detector = &mut entry.health.slow;
            if !stage.judging {
                detector.take(counted(&entry.state), now);
                stage.view.add(detector);
            } else if let Some(verdict) = detector.judge(&stage.view, slow, now) {
                found.push((*id, verdict));
            }
        }
        for (id, verdict) in found {
            match verdict {
                SlowVerdict::Suspect(reason) => {
                    state.verdict(id, "first-byte", "suspect", &reason);
                    state.make_suspect(id, reason, now);
                }
                SlowVerdict::Clear(reason) => {
                    state.verdict(id, "first-byte", "clear", &reason);
                    state.clear_suspect(id, reason, now);
                }
            }
        }
        if end == stage.members.len() {
            if stage.judging {
                return None;
            }
            stage.view.complete();
            (stage.judging, stage.at) = (true, 0);
        }
        Some(stage)
    }
}

// === impl ControlState ===

impl ControlState {
    fn make_suspect(&mut self, id: BackendId, reason: String, now: Instant) {
        let Some(entry) = self.backends.get(id) else { return };
        let Some(pool) = self.pool(entry.pool) else { return };
        // The weight of a backend without sessions, or without others, cannot be reduced.
        if !entry.health.is_fully_eligible() || !self.guard_view(pool).allows_suspect() {
            return;
        }
        let from = entry.health.observation().name();
        let lasted = now.saturating_duration_since(entry.health.settled_since());
        if let Some(entry) = self.backends.touch(id) {
            entry.health.slow.suspect(now);
            entry.observed_since = now;
            self.ejections.note(entry);
        }
        self.record(id, (from, "suspect"), reason, lasted, now);
    }

    fn clear_suspect(&mut self, id: BackendId, reason: String, now: Instant) {
        let Some(entry) = self.backends.touch(id) else { return };
        let from = entry.health.observation().name();
        let Some(since) = entry.health.slow.clear() else { return };
        self.ejections.clear_suspect(entry);
        let to = entry.health.observation().name();
        if from == to {
            // Probes or heartbeats keep the backend in the same state.
            return;
        }
        entry.observed_since = now;
        self.record(id, (from, to), reason, now.saturating_duration_since(since), now);
    }
}
