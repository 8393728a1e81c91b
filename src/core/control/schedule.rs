//! Timers of the controller: one due time per timer.
//!
//! The controller sets, cancels and pops timers. Every operation costs O(log n). This
//! module decides nothing and reads no clock.

use super::pools::PoolId;
use super::views::ViewId;
use crate::table::state::BackendId;
use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

/// Longest wait. A longer configured duration could overflow an `Instant`.
const WAIT_MAX: Duration = Duration::from_secs(10 * 365 * 86_400);

/// A timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum TimerKind {
    /// Request a probe.
    Probe(BackendId),
    /// Treat the running probe as lost.
    ProbeLost(BackendId),
    /// End the ejection and begin a trial.
    EjectionEnds(BackendId),
    /// Check the trial.
    CheckTrial(BackendId),
    /// Compare the first bytes of all backends.
    CheckSlow,
    /// End `startup_grace`: fail open without a result.
    GraceEnds(PoolId),
    /// End the settling of a pool.
    SettlingEnds(PoolId),
    /// End the removal grace: reset the sessions.
    ResetSessions(BackendId),
    /// End the time of `on_down`: reset the sessions.
    CutSessions(BackendId),
    /// End the time of `on_recover`: close the sessions.
    CloseReleased(BackendId),
    /// Drop removed backends without sessions.
    CheckRemoved,
    /// Check the heartbeat detector.
    Heartbeat(BackendId),
    /// Check whether the heartbeats have expired (`ttl`).
    HeartbeatTtl(BackendId),
    /// Drop a registered backend.
    Forget(BackendId),
    /// Check whether the control loop is late.
    GuardTick,
    /// Check the freeze of a pool; `None`: of all pools together.
    CheckGuard(Option<PoolId>),
    /// Verify a member by a connect, or miss its result.
    Verify(BackendId),
    /// Look at the view of a member source.
    View(ViewId),
    /// Next step of a slow start.
    Ramp(BackendId),
    /// Publish the delayed table.
    Publish,
    /// Begin the delayed builds of table parts.
    Build,
}

/// Invariant: `queue` holds exactly the pairs of `due`.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    queue: BTreeSet<(Instant, TimerKind)>,
    due: HashMap<TimerKind, Instant>,
}

/// Returns `from` plus `wait`; at most ten years.
pub(super) fn after(from: Instant, wait: Duration) -> Instant {
    from + wait.min(WAIT_MAX)
}

// === impl Schedule ===

impl Schedule {
    /// Sets the time of a timer.
    pub(super) fn set(&mut self, job: TimerKind, at: Instant) {
        self.cancel(job);
        self.due.insert(job, at);
        self.queue.insert((at, job));
    }

    /// Moves a timer to `at` if it is set to a later time.
    pub(super) fn bring_forward(&mut self, job: TimerKind, at: Instant) {
        if self.due.get(&job).is_some_and(|due| *due > at) {
            self.set(job, at);
        }
    }

    /// Cancels a timer.
    pub(super) fn cancel(&mut self, job: TimerKind) {
        if let Some(at) = self.due.remove(&job) {
            self.queue.remove(&(at, job));
        }
    }

    /// Whether the timer is set.
    pub(super) fn is_set(&self, job: TimerKind) -> bool {
        self.due.contains_key(&job)
    }

    /// Returns the time of a timer.
    pub(super) fn due(&self, job: TimerKind) -> Option<Instant> {
        self.due.get(&job).copied()
    }

    /// Removes and returns the first timer that is due by `now`.
    pub(super) fn pop_due(&mut self, now: Instant) -> Option<TimerKind> {
        if self.queue.first()?.0 > now {
            return None;
        }
        let (_, job) = self.queue.pop_first()?;
        self.due.remove(&job);
        Some(job)
    }

    /// Returns the earliest due time.
    pub(super) fn next(&self) -> Option<Instant> {
        self.queue.first().map(|(at, _)| *at)
    }
}
