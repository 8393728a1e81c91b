//! The newest changes of one backend's standing, for `tidegate explain`.
//!
//! The controller adds each transition it records. A bounded ring: what is
//! older than the newest [`TRANSITIONS_MAX`] is only in the log.

use crate::health::Transition;
use std::collections::VecDeque;

/// Enough for the story of a bad night, little enough for ten thousand
/// backends.
pub const TRANSITIONS_MAX: usize = 32;

/// See the module's documentation.
#[derive(Debug, Clone, Default)]
pub(super) struct History {
    /// Oldest first; at most [`TRANSITIONS_MAX`].
    ring: VecDeque<Transition>,
}

// === impl History ===

impl History {
    pub(super) fn add(&mut self, transition: Transition) {
        if self.ring.len() == TRANSITIONS_MAX {
            self.ring.pop_front();
        }
        self.ring.push_back(transition);
    }

    /// The newest, if there was any.
    pub(super) fn last(&self) -> Option<&Transition> {
        self.ring.back()
    }

    /// Newest first.
    pub(super) fn newest_first(&self) -> impl Iterator<Item = &Transition> {
        self.ring.iter().rev()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_newest_transitions_are_kept_and_no_more() {
        let mut history = History::default();
        for number in 0..40 {
            history.add(Transition {
                pool: "p".into(),
                backend: "b".into(),
                from: "up",
                to: "down",
                reason: number.to_string(),
                at: crate::clock::now(),
                lasted: Duration::ZERO,
            });
        }
        let reasons: Vec<&str> = history.newest_first().map(|t| t.reason.as_str()).collect();
        assert_eq!((reasons.len(), reasons[0], reasons[31]), (TRANSITIONS_MAX, "39", "8"));
        assert_eq!(history.last().unwrap().reason, "39");
    }
}
