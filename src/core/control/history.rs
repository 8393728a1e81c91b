//! The newest transitions of one backend, for `tidegate explain`.
//!
//! The controller adds each transition that it records. The ring holds the newest
//! [`TRANSITIONS_MAX`]. Older transitions are in the log only.

use crate::health::Transition;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Transitions kept per backend. Bounds the memory for ten thousand backends.
pub const TRANSITIONS_MAX: usize = 32;

/// See the module documentation.
#[derive(Debug, Clone, Default)]
pub(super) struct TransitionHistory {
    /// Oldest first; at most [`TRANSITIONS_MAX`].
    ring: VecDeque<Transition>,
    /// This many of the oldest are from another process.
    adopted: usize,
}

/// A transition in a handover. Times are in milliseconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SavedTransition {
    /// State before.
    pub from: String,
    /// State after.
    pub to: String,
    /// The evidence.
    pub reason: String,
    /// Time from the transition to the moment of saving.
    pub ago_ms: u64,
    /// How long the state before had lasted.
    pub lasted_ms: u64,
}

/// All states of a transition.
const STATES: [&str; 13] = [
    "new",
    "unknown",
    "up",
    "suspect",
    "down",
    "ejected",
    "trial",
    "removed",
    "ready",
    "draining",
    "maintenance",
    "starting",
    "stopping",
];

// === impl TransitionHistory ===

impl TransitionHistory {
    pub(super) fn add(&mut self, transition: Transition) {
        if self.ring.len() == TRANSITIONS_MAX {
            self.ring.pop_front();
            self.adopted = self.adopted.saturating_sub(1);
        }
        // Most members of a source have one transition. A ring that grows by itself begins
        // with four places, 120 bytes each.
        if self.ring.len() == self.ring.capacity() {
            self.ring.reserve_exact(self.ring.len().max(1));
        }
        self.ring.push_back(transition);
    }

    /// Returns the newest `count` transitions for a handover.
    pub(super) fn save(&self, count: usize, now: Instant) -> Vec<SavedTransition> {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let saved = |transition: &Transition| SavedTransition {
            from: transition.from.to_owned(),
            to: transition.to.to_owned(),
            reason: transition.reason.clone(),
            ago_ms: millis(now.saturating_duration_since(transition.at)),
            lasted_ms: millis(transition.lasted),
        };
        self.ring.iter().skip(self.ring.len().saturating_sub(count)).map(saved).collect()
    }

    /// Replaces the transitions from another process by `saved`. They precede those
    /// of this process.
    pub(super) fn adopt(
        &mut self,
        saved: &[SavedTransition],
        (pool, backend): (&Arc<str>, &Arc<str>),
        now: Instant,
    ) {
        self.ring.drain(..self.adopted);
        let free = TRANSITIONS_MAX - self.ring.len();
        let newest = &saved[saved.len().saturating_sub(free)..];
        self.adopted = newest.len();
        let state =
            |name: &str| STATES.into_iter().find(|state| *state == name).unwrap_or("unknown");
        for one in newest.iter().rev() {
            self.ring.push_front(Transition {
                pool: Arc::clone(pool),
                backend: Arc::clone(backend),
                from: state(&one.from),
                to: state(&one.to),
                reason: one.reason.clone(),
                at: now.checked_sub(Duration::from_millis(one.ago_ms)).unwrap_or(now),
                lasted: Duration::from_millis(one.lasted_ms),
            });
        }
    }

    /// Returns the newest transition.
    pub(super) fn last(&self) -> Option<&Transition> {
        self.ring.back()
    }

    /// Returns the transitions, newest first.
    pub(super) fn newest_first(&self) -> impl Iterator<Item = &Transition> {
        self.ring.iter().rev()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn history_keeps_the_newest_transitions_up_to_its_bound() {
        let mut history = TransitionHistory::default();
        for number in 0..40 {
            history.add(Transition {
                pool: "p".into(),
                backend: "b".into(),
                from: "up",
                to: "down",
                reason: number.to_string(),
                at: tidegate_net::clock::now(),
                lasted: Duration::ZERO,
            });
        }
        let reasons: Vec<&str> = history.newest_first().map(|t| t.reason.as_str()).collect();
        assert_eq!((reasons.len(), reasons[0], reasons[31]), (TRANSITIONS_MAX, "39", "8"));
        assert_eq!(history.last().unwrap().reason, "39");
    }
}
