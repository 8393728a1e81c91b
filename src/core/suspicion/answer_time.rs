//! Answer time of one backend's probes, and the timeout of a try that follows from it.
//!
//! The heartbeat detector owns one. The timeout is learned from answers and doubles after
//! rounds without an answer. This code reads no clock.
//!
//! The estimate is the one of TCP's retransmission timer (RFC 6298): the smoothed time plus
//! four times its smoothed deviation. Each try is a separate connect, so an answer always
//! belongs to one try.

use std::time::Duration;

/// Shortest timeout of a try: allows for scheduling and queues. Two tries fit into the
/// bound on detection time.
pub const TRY_TIMEOUT_MIN: Duration = Duration::from_millis(100);

/// Longest timeout of a try. After 1 s the kernel retransmits a lost SYN, and a new connect
/// is as good.
pub const TRY_TIMEOUT_MAX: Duration = Duration::from_secs(1);

/// Gains of the smoothed time and of its deviation, RFC 6298 section 2.3.
const TIME_GAIN: f64 = 1.0 / 8.0;
const DEVIATION_GAIN: f64 = 1.0 / 4.0;
const DEVIATIONS: f64 = 4.0;

/// Initial deviation, as a share of the first answer time. The timeout is then twice that
/// time.
const DEVIATION_FIRST: f64 = 0.25;

/// After this many doublings the shortest timeout exceeds the longest.
const DOUBLINGS_MAX: u32 = 4;

/// See the module documentation.
#[derive(Debug, Clone, Default)]
pub(super) struct AnswerTime {
    /// Time and deviation in seconds; `None` before the first answer.
    known: Option<(f64, f64)>,
    /// Rounds without an answer since the last answer.
    failed: u32,
}

// === impl AnswerTime ===

impl AnswerTime {
    /// Restores values that the old process handed over. Ignores values out of range.
    pub(super) fn knowing(known: Option<(f64, f64)>) -> AnswerTime {
        let sane = |value: f64| (0.0..=3600.0).contains(&value);
        AnswerTime { known: known.filter(|(time, more)| sane(*time) && sane(*more)), failed: 0 }
    }

    /// Returns time and deviation, for an upgrade's handover.
    pub(super) fn known(&self) -> Option<(f64, f64)> {
        self.known
    }

    /// Records an answer.
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

    /// Records a round without an answer. Doubles the timeout, because the path may have
    /// become longer.
    pub(super) fn failed(&mut self) {
        self.failed = (self.failed + 1).min(DOUBLINGS_MAX);
    }

    /// Returns the timeout of the next try, within [`TRY_TIMEOUT_MIN`] and
    /// [`TRY_TIMEOUT_MAX`]; the latter before the first answer.
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
        let mut time = AnswerTime::default();
        answers.into_iter().for_each(|took| time.answered(ms(took)));
        time
    }

    #[test]
    fn near_backend_gets_the_shortest_timeout() {
        assert_eq!(after([1]).timeout(), TRY_TIMEOUT_MIN);
        assert_eq!(after((0..1000).map(|n| 40 + n % 10)).timeout(), TRY_TIMEOUT_MIN);
    }

    #[test]
    fn timeout_follows_the_answer_times_of_a_far_backend() {
        assert_eq!(after([300]).timeout(), ms(600), "twice the first answer");
        let steady = after([300; 100]).timeout();
        assert!(steady >= ms(300) && steady < ms(320), "{steady:?}");
        let shaky = after((0..100).map(|n| 250 + n % 2 * 100)).timeout();
        assert!(shaky > ms(450) && shaky < ms(550), "{shaky:?}");
        assert_eq!(after([60_000]).timeout(), TRY_TIMEOUT_MAX);
    }

    #[test]
    fn timeout_is_longest_without_any_answer_and_doubles_without_new_answers() {
        assert_eq!(AnswerTime::default().timeout(), TRY_TIMEOUT_MAX);
        let mut time = after([1; 10]);
        let mut timeouts = Vec::new();
        for _ in 0..6 {
            timeouts.push(time.timeout().as_millis());
            time.failed();
        }
        assert_eq!(timeouts, [100, 200, 400, 800, 1000, 1000]);
        time.answered(ms(1));
        assert_eq!(time.timeout(), TRY_TIMEOUT_MIN, "an answer resets the doublings");
    }
}
