//! How often a worker may begin anew.
//!
//! Carried from one thread of a worker to the next. Pure: time comes in.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Restarts of one worker in [`WINDOW`]. What made it panic once a day is better
/// survived; what does so every few seconds is a state that only a new process is
/// free of, and its sessions are cut each time.
pub(crate) const RESTARTS_MAX: usize = 5;
const WINDOW: Duration = Duration::from_secs(60);

/// A worker's restarts of late; see [`RESTARTS_MAX`].
#[derive(Debug, Default)]
pub(crate) struct RestartLimit(VecDeque<Instant>);

impl RestartLimit {
    /// Whether there may be one more, which is counted.
    pub(crate) fn allow_restart(&mut self, now: Instant) -> bool {
        while self.0.front().is_some_and(|at| now.saturating_duration_since(*at) >= WINDOW) {
            self.0.pop_front();
        }
        let allowed = self.0.len() < RESTARTS_MAX;
        if allowed {
            self.0.push_back(now);
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_in_a_minute_and_no_sixth_until_the_first_is_forgotten() {
        let (start, mut restarts) = (tidegate_net::clock::now(), RestartLimit::default());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!((0..5).all(|n| restarts.allow_restart(at(n * 10))));
        assert!(!restarts.allow_restart(at(59)));
        assert!(restarts.allow_restart(at(60)));
        assert!(!restarts.allow_restart(at(69)));
        assert!(restarts.allow_restart(at(70)));
    }

    #[test]
    fn one_a_while_goes_on_for_ever() {
        let (start, mut restarts) = (tidegate_net::clock::now(), RestartLimit::default());
        assert!((0..1000).all(|n| restarts.allow_restart(start + Duration::from_secs(n * 13))));
    }
}
