//! Slow start: the share of its weight that a backend gets while it warms up.
//!
//! The controller applies the percentage to the weight and to the cap. Policies that
//! compare loads prefer an empty backend whatever its weight, so the balancer also bounds
//! the backend's share of the picks during the ramp. This code reads no clock and holds no
//! timer.

use std::time::{Duration, Instant};

/// Steps of one ramp. Each step publishes a new table.
const STEPS: u32 = 20;

/// Start of a ramp, in percent: enough sessions to see failures.
pub const PERCENT_MIN: u32 = 10;

/// A linear ramp from [`PERCENT_MIN`] to 100 percent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ramp {
    /// When the ramp began.
    pub since: Instant,
    /// Duration of the ramp; zero: no ramp.
    pub over: Duration,
}

// === impl Ramp ===

impl Ramp {
    /// Returns the share at `now`, in percent, [`PERCENT_MIN`]..=100.
    pub fn percent(&self, now: Instant) -> u32 {
        (self.step(now) * 100 / STEPS).clamp(PERCENT_MIN, 100)
    }

    /// Whether the share is 100 percent.
    pub fn is_over(&self, now: Instant) -> bool {
        self.step(now) >= STEPS
    }

    /// Returns when the share next increases; later than `now`; `None` at the end.
    pub fn next_step(&self, now: Instant) -> Option<Instant> {
        // The first steps are below `PERCENT_MIN` and change nothing.
        let next = (self.step(now) + 1).max(PERCENT_MIN * STEPS / 100 + 1);
        (next <= STEPS).then(|| {
            // Rounded up, so that the step is reached at that time.
            let nanos = (self.over.as_nanos() * u128::from(next)).div_ceil(u128::from(STEPS));
            self.since + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
        })
    }

    fn step(&self, now: Instant) -> u32 {
        if self.over.is_zero() {
            return STEPS;
        }
        let done = now.saturating_duration_since(self.since).as_nanos();
        let step = done.saturating_mul(u128::from(STEPS)) / self.over.as_nanos();
        u32::try_from(step).unwrap_or(STEPS).min(STEPS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ramp_rises_in_at_most_20_steps_from_10_to_100_percent() {
        let since = tidegate_net::clock::now();
        let ramp = Ramp { since, over: Duration::from_millis(9_999) };
        let mut now = since;
        let mut shares = vec![ramp.percent(now)];
        while let Some(next) = ramp.next_step(now) {
            assert!(next > now);
            now = next;
            shares.push(ramp.percent(now));
        }
        assert_eq!((shares[0], shares[shares.len() - 1]), (10, 100));
        assert!(shares.windows(2).all(|pair| pair[0] < pair[1]), "{shares:?}");
        assert!(shares.len() <= 20);
        assert!(ramp.is_over(now) && now - since <= Duration::from_secs(10));
    }

    #[test]
    fn zero_duration_is_no_ramp() {
        let since = tidegate_net::clock::now();
        let ramp = Ramp { since, over: Duration::ZERO };
        assert_eq!((ramp.percent(since), ramp.next_step(since)), (100, None));
    }
}
