//! The time between two requests of a source.
//!
//! Each source that asks repeatedly has a [`Pause`]. It spreads the requests of many
//! processes over time after a failure (full jitter) and bounds the rate of requests whose
//! answers change nothing. It sends nothing itself.

use std::time::{Duration, Instant};
use tidegate_net::clock;
use tokio::time::sleep;

/// Upper bound of the delay after the first failure; it doubles with each further failure.
pub const BACKOFF_MIN: Duration = Duration::from_millis(200);

/// Upper bound of each delay after a failure. With a connect, a source recovers within 5 s
/// after its server.
pub const BACKOFF_MAX: Duration = Duration::from_secs(4);

/// Time between the starts of two requests of which the first changed nothing.
pub const UNCHANGED_MIN: Duration = Duration::from_secs(1);

/// Time between the starts of two requests whose answers change something. A table is built
/// at most every 100 ms.
pub const CHANGED_MIN: Duration = Duration::from_millis(100);

/// Shortest delay after a failure.
const DELAY_MIN: Duration = Duration::from_millis(50);

/// Paces the requests of one question. Call [`begin`](Pause::begin) before each request, and
/// one of the other functions after it.
#[derive(Debug)]
pub struct Pause {
    begun: Instant,
    failures: u32,
    changed: Duration,
    unchanged: Duration,
}

impl Pause {
    /// No request was sent.
    #[expect(clippy::new_without_default, reason = "reads the clock")]
    pub fn new() -> Pause {
        Pause::paced(CHANGED_MIN, UNCHANGED_MIN)
    }

    /// As [`new`](Pause::new), with other times than [`CHANGED_MIN`] and [`UNCHANGED_MIN`].
    pub fn paced(changed: Duration, unchanged: Duration) -> Pause {
        Pause { begun: clock::now(), failures: 0, changed, unchanged }
    }

    /// A request begins.
    pub fn begin(&mut self) {
        self.begun = clock::now();
    }

    /// The request failed. Waits between 0 and the current upper bound, counted from the
    /// begin of the request: time in a timeout was a wait already.
    pub async fn failed(&mut self) {
        sleep(self.delay_after_failure()).await;
    }

    /// As [`failed`](Pause::failed), for a caller that waits itself.
    pub fn delay_after_failure(&mut self) -> Duration {
        let delay = backoff_delay(self.failures, fastrand::f64());
        self.failures = self.failures.saturating_add(1);
        self.left(delay).max(DELAY_MIN)
    }

    /// The request succeeded. The caller waits itself.
    pub fn succeeded(&mut self) {
        self.failures = 0;
    }

    /// The answer changes nothing. Waits until [`UNCHANGED_MIN`] after the begin.
    pub async fn unchanged(&mut self) {
        self.failures = 0;
        sleep(self.left(self.unchanged)).await;
    }

    /// The answer changes something. Waits until [`CHANGED_MIN`] after the begin.
    pub async fn changed(&mut self) {
        self.failures = 0;
        sleep(self.left(self.changed)).await;
    }

    /// The answer was good. Waits until `interval` after the begin, plus or minus 10 %.
    pub async fn interval(&mut self, interval: Duration) {
        self.failures = 0;
        sleep(self.left(interval.mul_f64(0.9 + 0.2 * fastrand::f64()))).await;
    }

    /// Failures since the last answer.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    fn left(&self, delay: Duration) -> Duration {
        delay.saturating_sub(clock::now().saturating_duration_since(self.begun))
    }
}

/// Returns the delay after a failure, if `failures` preceded it. `random` is in 0..1.
fn backoff_delay(failures: u32, random: f64) -> Duration {
    let bound = BACKOFF_MIN.saturating_mul(1 << failures.min(16)).min(BACKOFF_MAX);
    bound.mul_f64(random)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delay_doubles_up_to_the_maximum_and_is_spread_from_zero() {
        let bounds = [0.2, 0.4, 0.8, 1.6, 3.2, 4.0, 4.0];
        for (failures, bound) in (0..).zip(bounds) {
            assert_eq!(backoff_delay(failures, 1.0), Duration::from_secs_f64(bound));
            assert_eq!(backoff_delay(failures, 0.5), Duration::from_secs_f64(bound / 2.0));
            assert_eq!(backoff_delay(failures, 0.0), Duration::ZERO);
        }
        assert_eq!(backoff_delay(u32::MAX, 1.0), BACKOFF_MAX);
    }

    #[tokio::test]
    async fn answers_that_change_nothing_are_a_second_apart_and_reset_the_backoff() {
        let mut pause = Pause::new();
        pause.failures = 9;
        pause.begin();
        let begin = clock::now();
        pause.unchanged().await;
        assert!(clock::now().duration_since(begin) >= UNCHANGED_MIN);
        assert_eq!(pause.failures(), 0);
        // A request that took longer is followed at once.
        pause.begun = begin - Duration::from_secs(9);
        let begin = clock::now();
        pause.unchanged().await;
        assert!(clock::now().duration_since(begin) < UNCHANGED_MIN / 2);
    }
}
