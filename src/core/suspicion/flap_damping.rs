//! Flap damping: the hold-down of a backend that fails repeatedly doubles each time.
//!
//! The heartbeat detector owns one. This code computes the duration of a hold-down and
//! reads no clock.

use std::time::{Duration, Instant};

/// Hold-down after the first failure.
pub const HOLD_MIN: Duration = Duration::from_secs(1);

/// Longest hold-down.
pub const HOLD_MAX: Duration = Duration::from_secs(60);

/// This time in rotation removes one failure from the count.
pub const FORGIVEN_AFTER: Duration = Duration::from_secs(60);

/// 1, 2, 4, 8, 16, 32, 60 s. A larger count would not lengthen the hold-down, only the
/// time until it fades.
const COUNT_MAX: u32 = 7;

/// Failures in a row, reduced by time in rotation.
#[derive(Debug, Clone, Default)]
pub struct FlapDamping {
    count: u32,
    /// When the backend last came into rotation; `None` while it is out.
    up_since: Option<Instant>,
}

// === impl FlapDamping ===

impl FlapDamping {
    /// Records that the backend is in rotation from now on.
    pub fn up(&mut self, now: Instant) {
        self.up_since = Some(now);
    }

    /// Records a failure and returns the end of the hold-down.
    pub fn down(&mut self, now: Instant) -> Instant {
        self.decay(now);
        self.count = (self.count + 1).min(COUNT_MAX);
        now + HOLD_MIN.saturating_mul(1 << (self.count - 1)).min(HOLD_MAX)
    }

    /// Records a stop without a failure.
    pub fn stopped(&mut self, now: Instant) {
        self.decay(now);
    }

    /// Restores values that the old process handed over.
    pub(super) fn of(count: u32, up_since: Option<Instant>) -> FlapDamping {
        FlapDamping { count: count.min(COUNT_MAX), up_since }
    }

    /// Returns the values for an upgrade's handover.
    pub(super) fn parts(&self) -> (u32, Option<Instant>) {
        (self.count, self.up_since)
    }

    /// Returns the failures that still count.
    pub fn count(&self) -> u32 {
        self.count
    }

    fn decay(&mut self, now: Instant) {
        let Some(since) = self.up_since.take() else { return };
        let forgiven =
            now.saturating_duration_since(since).as_secs() / FORGIVEN_AFTER.as_secs().max(1);
        self.count = self.count.saturating_sub(u32::try_from(forgiven).unwrap_or(u32::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(up_for: Duration, failures: usize) -> Vec<u64> {
        let mut now = tidegate_net::clock::now();
        let mut flaps = FlapDamping::default();
        let mut holds = Vec::new();
        for _ in 0..failures {
            flaps.up(now);
            now += up_for;
            let until = flaps.down(now);
            holds.push((until - now).as_secs());
            now = until;
        }
        holds
    }

    #[test]
    fn each_failure_in_a_row_doubles_the_hold_down_up_to_60_s() {
        assert_eq!(holds(Duration::from_secs(5), 9), [1, 2, 4, 8, 16, 32, 60, 60, 60]);
    }

    #[test]
    fn each_minute_in_rotation_removes_one_failure() {
        assert_eq!(holds(Duration::from_secs(61), 5), [1, 1, 1, 1, 1]);
        let mut now = tidegate_net::clock::now();
        let mut flaps = FlapDamping::default();
        for _ in 0..7 {
            flaps.up(now);
            flaps.down(now);
        }
        flaps.up(now);
        now += Duration::from_secs(3 * 60);
        assert_eq!(flaps.down(now) - now, Duration::from_secs(16), "7 - 3 + 1 failures");
    }
}
