//! How long a backend takes to answer a probe, and so how long one may be
//! waited for.
//!
//! The heartbeat detector owns one and gives each try its time-out from it. It
//! learns from answers, becomes more patient where none come, judges nobody and
//! reads no clock.
//!
//! The estimate is that of TCP's retransmission timer (RFC 6298): a smoothed
//! time, plus four times its smoothed deviation. A try is a connect of its own,
//! so no answer is ever ambiguous.

use std::time::Duration;

/// A try is waited for at least that long, however near the backend: scheduling
/// and queues. Short enough for two within the promised bound.
pub const TRY_TIMEOUT_MIN: Duration = Duration::from_millis(100);

/// And at most that long: after a second the kernel repeats a lost SYN, and a
/// fresh connect is as good.
pub const TRY_TIMEOUT_MAX: Duration = Duration::from_secs(1);

/// Gains of the smoothed time and of its deviation, RFC 6298 section 2.3.
const TIME_GAIN: f64 = 1.0 / 8.0;
const DEVIATION_GAIN: f64 = 1.0 / 4.0;
const DEVIATIONS: f64 = 4.0;

/// Deviation assumed with the first answer, as a share of its time: with it a
/// try may take twice as long.
const DEVIATION_FIRST: f64 = 0.25;

/// Doubled so often, the least time-out is more than the largest.
const DOUBLINGS_MAX: u32 = 4;

/// See the module's documentation.
#[derive(Debug, Clone, Default)]
pub(super) struct AnswerTime {
    /// Time and deviation in seconds; `None` before the first answer.
    known: Option<(f64, f64)>,
    /// Rounds without an answer since the last.
    failed: u32,
}

// === impl AnswerTime ===

impl AnswerTime {
    /// As another process knew it; what makes no sense is not known.
    pub(super) fn knowing(known: Option<(f64, f64)>) -> AnswerTime {
        let sane = |value: f64| (0.0..=3600.0).contains(&value);
        AnswerTime { known: known.filter(|(time, more)| sane(*time) && sane(*more)), failed: 0 }
    }

    /// Time and deviation, for another process.
    pub(super) fn known(&self) -> Option<(f64, f64)> {
        self.known
    }

    /// It answered after that long.
    pub(super) fn answered(&mut self, took: Duration) {
        self.failed = 0;
        let took = took.as_secs_f64();
        self.known = Some(match self.known {
            None => (took, took * DEVIATION_FIRST),
            Some((time, deviation)) => (
                time + TIME_GAIN * (took - time),
                deviation + DEVIATION_GAIN * ((took - time).abs() - deviation),
            ),
        });
    }

    /// A whole round of tries had no answer. The way may have become longer, so
    /// the next is waited for twice as long.
    pub(super) fn failed(&mut self) {
        self.failed = (self.failed + 1).min(DOUBLINGS_MAX);
    }

    /// How long the next try may take, within [`TRY_TIMEOUT_MIN`] and
    /// [`TRY_TIMEOUT_MAX`]; the latter while nothing is known.
    pub(super) fn timeout(&self) -> Duration {
        let Some((time, deviation)) = self.known else { return TRY_TIMEOUT_MAX };
        let wanted = (time + DEVIATIONS * deviation).min(TRY_TIMEOUT_MAX.as_secs_f64());
        let wanted = Duration::from_secs_f64(wanted).max(TRY_TIMEOUT_MIN);
        (wanted * (1 << self.failed)).min(TRY_TIMEOUT_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn after(answers: impl IntoIterator<Item = u64>) -> AnswerTime {
        let mut reach = AnswerTime::default();
        answers.into_iter().for_each(|took| reach.answered(ms(took)));
        reach
    }

    #[test]
    fn a_near_backend_is_waited_for_no_less_than_the_least() {
        assert_eq!(after([1]).timeout(), TRY_TIMEOUT_MIN);
        assert_eq!(after((0..1000).map(|n| 40 + n % 10)).timeout(), TRY_TIMEOUT_MIN);
    }

    #[test]
    fn a_far_backend_is_waited_for_as_long_as_it_needs() {
        assert_eq!(after([300]).timeout(), ms(600), "twice the first answer");
        let steady = after([300; 100]).timeout();
        assert!(steady >= ms(300) && steady < ms(320), "{steady:?}");
        let shaky = after((0..100).map(|n| 250 + n % 2 * 100)).timeout();
        assert!(shaky > ms(450) && shaky < ms(550), "{shaky:?}");
        assert_eq!(after([60_000]).timeout(), TRY_TIMEOUT_MAX);
    }

    #[test]
    fn nothing_known_and_nothing_answered_is_waited_for_longest() {
        assert_eq!(AnswerTime::default().timeout(), TRY_TIMEOUT_MAX);
        let mut reach = after([1; 10]);
        let mut timeouts = Vec::new();
        for _ in 0..6 {
            timeouts.push(reach.timeout().as_millis());
            reach.failed();
        }
        assert_eq!(timeouts, [100, 200, 400, 800, 1000, 1000]);
        reach.answered(ms(1));
        assert_eq!(reach.timeout(), TRY_TIMEOUT_MIN, "it is near after all");
    }
}
