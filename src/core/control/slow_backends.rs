//! Gray backends: reads what workers count of first bytes, and makes suspects.
//!
//! Called by the controller every [`LOOK_INTERVAL`] while some pool of several
//! backends has `slow_first_byte`. A look at many backends takes several turns, so
//! that nothing else has to wait for it. The judgement is `core::health::slow_detector`'s; here
//! counts go in, and the guard is kept: as many backends of a pool as may be
//! ejected at once, and at least one, may be suspect or ejected. It never takes
//! a backend out of service.

use super::pools::{PoolEntry, PoolId};
use super::schedule::TimerKind;
use super::state::ControlState;
use crate::health::slow_detector::{
    FirstByteCounts, LOOK_INTERVAL, PoolView, SlowDetector, SlowVerdict,
};
use crate::table::state::{BackendId, BackendState};
use std::time::{Duration, Instant};

/// Backends that are looked at in one turn (each is looked at twice in a look): some
/// half a millisecond.
const TURN_MAX: usize = 1_000;

/// From one turn of a look to the next.
const TURN_PAUSE: Duration = Duration::from_millis(1);

/// A look that is under way.
#[derive(Debug, Default)]
pub(super) struct SlowBackends {
    began: Option<Instant>,
    /// Still to come, the next one last.
    pools: Vec<PoolId>,
    stage: Option<Stage>,
}

/// How far the look at one pool is.
#[derive(Debug)]
struct Stage {
    pool: PoolId,
    /// As they were when it began.
    members: Vec<BackendId>,
    /// Those before have been looked at.
    at: usize,
    view: PoolView,
    /// All have taken their counts.
    judging: bool,
}

/// `slow_first_byte` where there is somebody to compare with.
pub(super) fn watched(pool: &PoolEntry) -> Option<Duration> {
    let slow = pool.spec.ejection.and_then(|spec| spec.slow_first_byte);
    slow.filter(|_| pool.members().len() > 1)
}

fn counted(state: &BackendState) -> FirstByteCounts {
    let counters = &state.counters;
    FirstByteCounts {
        // First, so that what comes between makes nobody wait.
        questions: counters.sum(|c| c.questions.get()),
        answers: counters.sum(|c| c.answers.get()),
        unanswered: counters.sum(|c| c.unanswered.get()),
        answer_log2: counters.sum(|c| c.answer_log2.get()),
    }
}

// === impl SlowBackends ===

impl SlowBackends {
    /// After a reload: whoever is watched no more is no suspect, and looks go on
    /// while somebody is.
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

    /// Goes on with the look at every backend that is watched, or begins one.
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

    /// Looks at some backends of a pool: all of them take their counts before the
    /// first is judged. `None` once it is done.
    fn check_pool(
        &mut self,
        state: &mut ControlState,
        mut stage: Stage,
        left: &mut usize,
        now: Instant,
    ) -> Option<Stage> {
        // A reload may have switched it off meanwhile.
        let slow = state.pool(stage.pool).and_then(watched)?;
        let end = stage.members.len().min(stage.at + *left);
        let slice = stage.at..end;
        *left -= slice.len();
        stage.at = end;
        let mut found = Vec::new();
        for id in &stage.members[slice] {
            let Some(entry) = state.backends.observe(*id) else { continue };
            let watch = &mut entry.health.slow;
            if !stage.judging {
                watch.take(counted(&entry.state), now);
                stage.view.add(watch);
            } else if let Some(verdict) = watch.judge(&stage.view, slow, now) {
                found.push((*id, verdict));
            }
        }
        for (id, verdict) in found {
            match verdict {
                SlowVerdict::Suspect(reason) => state.make_suspect(id, reason, now),
                SlowVerdict::Clear(reason) => state.clear_suspect(id, reason, now),
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
        // One that takes no sessions, or one alone, could not get fewer.
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
            // Probes or heartbeats say worse of it, or the same.
            return;
        }
        entry.observed_since = now;
        self.record(id, (from, to), reason, now.saturating_duration_since(since), now);
    }
}
