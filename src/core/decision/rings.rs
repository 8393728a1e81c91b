//! The decisions of all workers: for each worker a ring of first picks, and one of failures
//! and retries.
//!
//! `daemon` makes it, each worker of the data plane writes its own part, and the admin API
//! reads all parts. Failures are rarer than first picks, so a ring of their own keeps them
//! longer.

use super::Decision;
use super::ring::DecisionRing;
use crate::model::{BackendId, PoolId};
use std::collections::BTreeMap;

/// First picks that each worker keeps.
pub const FIRST_MAX: usize = 4_096;

/// Failures and retries that each worker keeps.
pub const FAILED_MAX: usize = 1_024;

/// See the module's documentation.
#[derive(Debug)]
pub struct Decisions {
    workers: Box<[WorkerDecisions]>,
}

/// The decisions of one worker: less than 1 MiB.
#[derive(Debug)]
pub struct WorkerDecisions {
    /// The first pick of each session.
    pub first: DecisionRing,
    /// First picks that failed, once their failure is known, and all picks after a failure.
    pub failed: DecisionRing,
}

/// A backend's share of the last first picks of its pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PickShare {
    /// First picks that chose the backend.
    pub backend: u32,
    /// First picks of the pool that chose any backend.
    pub pool: u32,
}

const _: () = assert!((FIRST_MAX + FAILED_MAX) * DecisionRing::SLOT_BYTES < 1 << 20);

// === impl Decisions ===

impl Decisions {
    /// Empty rings for that many workers.
    pub fn new(workers: usize) -> Decisions {
        let one = || WorkerDecisions {
            first: DecisionRing::new(FIRST_MAX),
            failed: DecisionRing::new(FAILED_MAX),
        };
        Decisions { workers: (0..workers).map(|_| one()).collect() }
    }

    /// The rings of a worker, by its number.
    pub fn of(&self, worker: usize) -> &WorkerDecisions {
        &self.workers[worker]
    }

    /// The decisions of a session by attempt; empty if the rings hold none.
    pub fn of_session(&self, session: u64) -> Vec<Decision> {
        let mut attempts: BTreeMap<u8, Decision> = BTreeMap::new();
        let rings = self.workers.iter().flat_map(|worker| [&worker.first, &worker.failed]);
        for decision in rings.flat_map(|ring| ring.of_session(session)) {
            let known = attempts.get(&decision.attempt);
            // A copy of a failed pick; the one with the end of the session says more.
            if known.is_none_or(|known| known.outcome.end.is_none()) {
                attempts.insert(decision.attempt, decision);
            }
        }
        attempts.into_values().collect()
    }

    /// How many first picks of the pool the rings hold, and how many of them chose the
    /// backend.
    pub fn share_of(&self, pool: PoolId, backend: BackendId) -> PickShare {
        let mut share = PickShare::default();
        for decision in self.workers.iter().flat_map(|worker| worker.first.all()) {
            if decision.pool == Some(pool) && decision.chosen.is_some() {
                share.pool += 1;
                share.backend += u32::from(decision.chosen == Some(backend));
            }
        }
        share
    }

    /// How many of the first picks that the rings hold chose each of these backends.
    pub fn picks_of(&self, backends: &[BackendId]) -> Vec<u32> {
        let mut counts = vec![0; backends.len()];
        for decision in self.workers.iter().flat_map(|worker| worker.first.all()) {
            let Some(chosen) = decision.chosen else { continue };
            if let Some(place) = backends.iter().position(|backend| *backend == chosen) {
                counts[place] += 1;
            }
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decision::{AttemptFailureKind, Outcome};
    use crate::outcome::{Cause, Phase};
    use crate::testing;

    #[test]
    fn session_has_its_attempts_in_order_with_the_end_of_the_last() {
        let decisions = Decisions::new(2);
        let of = |attempt| Decision { session: 9, attempt, ..testing::decision(9) };
        let rings = decisions.of(1);
        let failure = Some((AttemptFailureKind::Refused, libc::ECONNREFUSED));
        let place = rings.first.push(&of(1));
        rings.first.set_outcome(place, 9, &Outcome { failure, ..Outcome::default() });
        rings
            .failed
            .push(&Decision { outcome: Outcome { failure, ..Outcome::default() }, ..of(1) });
        let place = rings.failed.push(&of(2));
        let end = Some((Cause::Finished, Phase::Closed));
        rings.failed.set_outcome(place, 9, &Outcome { end, ..Outcome::default() });
        decisions.of(0).first.push(&testing::decision(8));
        let found = decisions.of_session(9);
        assert_eq!(found.iter().map(|d| d.attempt).collect::<Vec<_>>(), [1, 2]);
        assert_eq!((found[0].outcome.failure, found[1].outcome.end), (failure, end));
        assert_eq!(decisions.of_session(7), []);
    }

    #[test]
    fn first_picks_are_counted_by_backend() {
        let decisions = Decisions::new(1);
        for session in [1, 2, 2, 3] {
            decisions.of(0).first.push(&testing::decision(session));
        }
        assert_eq!(decisions.picks_of(&[2, 3, 4].map(BackendId)), [2, 1, 0]);
        for (pool, chosen) in [(1, Some(2)), (1, Some(3)), (1, None), (2, Some(2))] {
            let pool = Some(PoolId(pool));
            let chosen = chosen.map(BackendId);
            decisions.of(0).first.push(&Decision { pool, chosen, ..testing::decision(9) });
        }
        let share = decisions.share_of(PoolId(1), BackendId(2));
        assert_eq!(share, PickShare { backend: 1, pool: 2 });
    }
}
