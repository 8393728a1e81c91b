//! What is due when: one due time for each job.
//!
//! The controller sets, cancels and pops jobs; every operation costs O(log n),
//! so ten thousand probed backends are no burden. It decides nothing and reads
//! no clock.

use super::pools::PoolId;
use crate::table::state::BackendId;
use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

/// No wait is longer, whatever the configuration says: adding an absurd
/// duration to an instant would overflow.
const WAIT_MAX: Duration = Duration::from_secs(10 * 365 * 86_400);

/// Something to do at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum TimerKind {
    /// Ask for a probe.
    Probe(BackendId),
    /// Stop waiting for a probe's result.
    ProbeLost(BackendId),
    /// Let one session try it.
    EjectionEnds(BackendId),
    /// See how that session does.
    CheckTrial(BackendId),
    /// Compare first bytes.
    CheckSlow,
    /// Fail open unless there was a result.
    GraceEnds(PoolId),
    /// Wait no longer for a pool's first verdict.
    SettlingEnds(PoolId),
    /// Its removal grace is over.
    ResetSessions(BackendId),
    /// Forget removed backends without sessions.
    CheckRemoved,
    /// Its detector wants to look at how long it has been silent.
    Heartbeat(BackendId),
    /// It may have been silent for too long altogether.
    HeartbeatTtl(BackendId),
    /// Forget a registered backend.
    Forget(BackendId),
    /// Notice whether we are late.
    GuardTick,
    /// See whether those that fell silent together did so alone; `None`: over
    /// all pools.
    CheckGuard(Option<PoolId>),
    /// Its next step towards its full share.
    Ramp(BackendId),
    /// Make the table that heartbeats had to wait for.
    Publish,
    /// Begin the parts of tables that had to wait for the other thread.
    Build,
}

/// Invariant: `queue` holds exactly the pairs of `due`.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    queue: BTreeSet<(Instant, TimerKind)>,
    due: HashMap<TimerKind, Instant>,
}

/// `from` plus `wait`, or plus ten years if that is less.
pub(super) fn after(from: Instant, wait: Duration) -> Instant {
    from + wait.min(WAIT_MAX)
}

// === impl Schedule ===

impl Schedule {
    /// Sets the job's time, whatever it was before.
    pub(super) fn set(&mut self, job: TimerKind, at: Instant) {
        self.cancel(job);
        self.due.insert(job, at);
        self.queue.insert((at, job));
    }

    /// Moves the job's time to `at` if it is set to a later one.
    pub(super) fn bring_forward(&mut self, job: TimerKind, at: Instant) {
        if self.due.get(&job).is_some_and(|due| *due > at) {
            self.set(job, at);
        }
    }

    /// Forgets the job.
    pub(super) fn cancel(&mut self, job: TimerKind) {
        if let Some(at) = self.due.remove(&job) {
            self.queue.remove(&(at, job));
        }
    }

    /// Whether the job has a time.
    pub(super) fn is_set(&self, job: TimerKind) -> bool {
        self.due.contains_key(&job)
    }

    /// The job's time.
    pub(super) fn due(&self, job: TimerKind) -> Option<Instant> {
        self.due.get(&job).copied()
    }

    /// Takes the first job that is due by `now`.
    pub(super) fn pop_due(&mut self, now: Instant) -> Option<TimerKind> {
        if self.queue.first()?.0 > now {
            return None;
        }
        let (_, job) = self.queue.pop_first()?;
        self.due.remove(&job);
        Some(job)
    }

    /// The first due time.
    pub(super) fn next(&self) -> Option<Instant> {
        self.queue.first().map(|(at, _)| *at)
    }
}
