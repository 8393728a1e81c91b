//! Failed connects and early resets of one backend during the last minute, for
//! `status` and `explain`.
//!
//! The controller records every reported failure, including those during an
//! ejection. The counts decide nothing. This code reads no clock.

use super::ConnectFailure;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How long a failure counts.
pub const RECENT: Duration = Duration::from_secs(60);

/// Failures within this time share one count.
const SLICE: Duration = Duration::from_secs(5);

/// See the module documentation. Holds at most `RECENT / SLICE + 1` slices.
#[derive(Debug, Clone, Default)]
pub struct RecentFailures {
    slices: VecDeque<Slice>,
    last: Option<(ConnectFailure, Instant)>,
}

#[derive(Debug, Clone, Copy)]
struct Slice {
    begun: Instant,
    connects: u32,
    early_resets: u32,
}

/// The failures of the last minute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recent {
    /// Connects that failed.
    pub connects: u32,
    /// Sessions that the backend reset before its first byte.
    pub early_resets: u32,
    /// Time since the oldest of these failures, at most [`RECENT`].
    pub within: Duration,
    /// The newest failure.
    pub last: ConnectFailure,
    /// Time since the newest failure.
    pub last_ago: Duration,
}

// === impl RecentFailures ===

impl RecentFailures {
    /// Counts one failure.
    pub fn note(&mut self, failure: ConnectFailure, now: Instant) {
        self.slices.retain(|slice| slice.is_recent(now));
        let fresh = Slice { begun: now, connects: 0, early_resets: 0 };
        match self.slices.back() {
            Some(slice) if now.saturating_duration_since(slice.begun) < SLICE => {}
            _ => self.slices.push_back(fresh),
        }
        if let Some(slice) = self.slices.back_mut() {
            let count = match failure {
                ConnectFailure::EarlyReset => &mut slice.early_resets,
                _ => &mut slice.connects,
            };
            *count = count.saturating_add(1);
        }
        self.last = Some((failure, now));
    }

    /// Returns the failures of the last minute; `None` if there were none.
    pub fn view(&self, now: Instant) -> Option<Recent> {
        let recent = || self.slices.iter().filter(|slice| slice.is_recent(now));
        let begun = recent().next()?.begun;
        let (last, at) = self.last?;
        Some(Recent {
            connects: recent().map(|slice| slice.connects).fold(0, u32::saturating_add),
            early_resets: recent().map(|slice| slice.early_resets).fold(0, u32::saturating_add),
            within: now.saturating_duration_since(begun),
            last,
            last_ago: now.saturating_duration_since(at),
        })
    }
}

impl Slice {
    fn is_recent(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.begun) < RECENT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_counted_by_kind_and_forgotten_after_a_minute() {
        let start = tidegate_net::clock::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut recent = RecentFailures::default();
        assert_eq!(recent.view(at(0)), None);
        recent.note(ConnectFailure::Refused, at(0));
        recent.note(ConnectFailure::Refused, at(2));
        recent.note(ConnectFailure::EarlyReset, at(40));
        let view = recent.view(at(41)).unwrap();
        assert_eq!((view.connects, view.early_resets), (2, 1));
        assert_eq!((view.within, view.last_ago), (at(41) - start, at(41) - at(40)));
        assert_eq!(view.last, ConnectFailure::EarlyReset);
        let view = recent.view(at(61)).unwrap();
        assert_eq!((view.connects, view.early_resets), (0, 1));
        assert_eq!(recent.view(at(100)), None);
    }

    #[test]
    fn memory_is_bounded_at_1000_failures_per_second() {
        let start = tidegate_net::clock::now();
        let mut recent = RecentFailures::default();
        for ms in 0..200_000 {
            recent.note(ConnectFailure::Timeout, start + Duration::from_millis(ms));
        }
        assert!(recent.slices.len() <= 13, "{}", recent.slices.len());
        let view = recent.view(start + Duration::from_secs(200)).unwrap();
        assert!((55_000..=60_000).contains(&view.connects), "{view:?}");
    }
}
