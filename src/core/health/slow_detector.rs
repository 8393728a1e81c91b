//! Detector for backends that accept connections but do not answer, or answer ten
//! times slower than the rest of the pool (gray failure).
//!
//! The controller checks every backend of a pool each [`LOOK_INTERVAL`] and makes the
//! backends that this detector reports *suspect*. A suspect backend keeps a tenth of
//! its weight, and its remaining sessions can clear it. The detector never removes a
//! backend, and it reads no clock and no counter itself.
//!
//! # Rules
//!
//! Only sessions in which the client sends first count. For them the time from the
//! client's first byte to the backend's first byte is meaningful in every protocol. The
//! duration of a session does not count. Each backend is compared with the others of its
//! pool. The *pool median* is the median over the other backends of the geometric mean
//! of their newest answers. (A geometric mean limits the effect of one answer that takes
//! a minute.)
//!
//! - **Hang.** For `slow_first_byte`, or [`FACTOR`] times the pool median if that is
//!   longer, at least [`WAITING_MIN`] of the backend's sessions were waiting at each
//!   check, and none was answered. In addition, at least one other backend does not
//!   hang, and the other backends have answered at least [`WAITING_MIN`] sessions, and
//!   more than are waiting at them now. Their answers count from the check before the
//!   backend's last answer. A client that gives up does not hide the hang, because the
//!   next client waits then. Clients that all wait at this backend do not hide it either,
//!   because the answers from before count.
//! - **Slow.** Over at least [`SAMPLES_MIN`] answers and 500 ms, the mean was at least
//!   [`FACTOR`] times the pool median and at least a tenth of `slow_first_byte`. Below
//!   that bound, a large factor is noise.
//! - **Cleared.** At least [`CLEAR_MIN`] answers since the backend became suspect took
//!   at most half of the bound for slow.
//!
//! # Pools in which no backend becomes suspect
//!
//! - A pool of one backend.
//! - A pool in which no backend answers, or all stop at once, for example because a
//!   shared database fails.
//! - A pool in which all backends answer late (long polls), because its median is long.
//! - A pool in which about as many sessions wait at the other backends as are answered
//!   there (subscriptions).
//!
//! The detector cannot recognise a pool in which most requests are quick and some wait
//! by design on a fresh connection. Set `slow_first_byte = "off"` for such pools.

use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// Time between two checks. A hang is found at most two checks after it has lasted long
/// enough.
pub const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// If a check is later than this, this host may have stalled, workers included. The
/// sessions then waited for Tidegate, not for the backend.
const LATE: Duration = Duration::from_millis(800);

/// Sessions that must wait. One or two may have requested something that takes long.
pub const WAITING_MIN: u64 = 3;

/// Ratio to the pool median. Smaller differences are left to the balancing policy.
pub const FACTOR: f64 = 10.0;

/// Answers that a mean needs.
pub const SAMPLES_MIN: u64 = 10;

/// Answers that clear a suspect. Fewer than [`SAMPLES_MIN`], because a suspect gets a
/// tenth of its sessions.
pub const CLEAR_MIN: u64 = 3;

/// Lower bound for slow, as a share of `slow_first_byte`.
const SLOW_PART: f64 = 0.1;

/// Bound for clearing, as a share of the bound for slow. The distance prevents
/// oscillation.
const CLEAR_PART: f64 = 0.5;

/// A window of answers closes after `WINDOW_MIN` with [`SAMPLES_MIN`] answers, else after
/// `WINDOW_MAX`.
const WINDOW_MIN: Duration = Duration::from_millis(500);
const WINDOW_MAX: Duration = Duration::from_secs(10);

/// Totals of a backend over all workers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FirstByteCounts {
    /// Sessions in which the client sent first.
    pub questions: u64,
    /// Of `questions`, sessions with a first byte from the backend.
    pub answers: u64,
    /// Of `questions`, sessions that ended without it.
    pub unanswered: u64,
    /// Sum of log2(microseconds) over `answers`, in units of
    /// 1/`core::table::state::LOG_UNIT`.
    pub answer_log2: u64,
}

/// State of one backend between checks.
#[derive(Debug, Clone, Default)]
pub struct SlowDetector {
    last: Option<FirstByteCounts>,
    looked: Option<Instant>,
    /// Answers arrived between the last two checks.
    answered: bool,
    /// Answers of the other backends at the last check and at the check before.
    others: [u64; 2],
    hang: Option<HangEvidence>,
    window: Option<AnswerWindow>,
    /// The window that the last check closed.
    closed: Option<AnswerWindow>,
    /// Mean log2(microseconds) of the newest closed window.
    usual: Option<f64>,
    suspect: Option<Instant>,
}

/// A [`SlowDetector`] in an upgrade's handover.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SavedSlowDetector {
    /// How long the backend has been suspect.
    pub suspect_ms: Option<u64>,
    /// See `usual` of [`SlowDetector`]. Without it the other backends would have nothing
    /// to be compared with, and the first check would clear all suspects.
    pub usual: Option<f64>,
}

#[derive(Debug, Clone, Copy)]
struct HangEvidence {
    since: Instant,
    /// Answers of the other backends at the check before this backend's last answer.
    /// Clients that now wait here used the other backends until then.
    others: u64,
}

#[derive(Debug, Clone, Copy)]
struct AnswerWindow {
    since: Instant,
    answers: u64,
    log2: f64,
}

/// A pool at one check.
#[derive(Debug, Clone, Default)]
pub struct PoolView {
    /// Ascending.
    usuals: Vec<f64>,
    answers: u64,
    waiting: u64,
    /// Backends that have answered before and hang now.
    hanging: usize,
}

/// Result of a check, with the evidence as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SlowVerdict {
    /// The backend hangs or is slow.
    Suspect(String),
    /// The backend answers in time again.
    Clear(String),
}

// === impl FirstByteCounts ===

impl FirstByteCounts {
    /// Returns the sessions waiting for a first byte. Saturates, because the counts are
    /// not read at the same moment.
    fn waiting(&self) -> u64 {
        self.questions.saturating_sub(self.answers.wrapping_add(self.unanswered))
    }
}

// === impl PoolView ===

impl PoolView {
    /// Returns the view over all backends of a pool, after each has recorded its counts.
    pub fn of<'a>(detectors: impl Iterator<Item = &'a SlowDetector>) -> PoolView {
        let mut view = PoolView::default();
        detectors.for_each(|detector| view.add(detector));
        view.complete();
        view
    }

    /// Adds a backend that has recorded its counts.
    pub fn add(&mut self, detector: &SlowDetector) {
        let counts = detector.last.unwrap_or_default();
        self.answers = self.answers.wrapping_add(counts.answers);
        self.waiting = self.waiting.saturating_add(counts.waiting());
        self.usuals.extend(detector.typical());
        self.hanging += usize::from(detector.hangs() && detector.typical().is_some());
    }

    /// Completes the view after all backends have been added.
    pub fn complete(&mut self) {
        self.usuals.sort_by(f64::total_cmp);
    }

    /// Returns the median of the other backends in seconds; the upper median of an even
    /// number.
    fn pool_median_without(&self, own: Option<f64>) -> Option<f64> {
        let own = own.map(|own| self.usuals.partition_point(|usual| *usual < own));
        let others = self.usuals.len() - usize::from(own.is_some());
        if others == 0 {
            return None;
        }
        let middle = others / 2;
        let index = if own.is_some_and(|own| own <= middle) { middle + 1 } else { middle };
        Some(seconds(self.usuals[index]))
    }
}

// === impl SlowDetector ===

impl SlowDetector {
    /// Records the current totals.
    pub fn take(&mut self, counts: FirstByteCounts, now: Instant) {
        self.closed = None;
        let before = self.looked.replace(now);
        if before.is_some_and(|at| now.saturating_duration_since(at) > LATE) {
            self.hang = None;
        }
        let window = self.window.get_or_insert(AnswerWindow { since: now, answers: 0, log2: 0.0 });
        if let Some(last) = self.last.replace(counts) {
            let answers = counts.answers.wrapping_sub(last.answers);
            let log2 = counts.answer_log2.wrapping_sub(last.answer_log2);
            self.answered = answers > 0;
            window.answers += answers;
            window.log2 += log2 as f64 / crate::table::state::LOG_UNIT;
        }
        let age = now.saturating_duration_since(window.since);
        if age >= WINDOW_MAX || (age >= WINDOW_MIN && window.answers >= SAMPLES_MIN) {
            self.closed = self.window.take().filter(|window| window.answers > 0);
            self.usual = self.closed.map(|window| window.mean()).or(self.usual);
        }
    }

    /// Returns a verdict once every backend of the pool has recorded its counts. `slow`
    /// is the pool's `slow_first_byte`. The caller applies the verdict with
    /// [`SlowDetector::suspect`] or [`SlowDetector::clear`].
    pub fn judge(&mut self, pool: &PoolView, slow: Duration, now: Instant) -> Option<SlowVerdict> {
        let usual = pool.pool_median_without(self.typical());
        let hanging = self.detect_hang(pool, now);
        let Some(usual) = usual else {
            let alone = "no other backend to compare with".to_owned();
            return self.is_suspect().then_some(SlowVerdict::Clear(alone));
        };
        let bound = (slow.as_secs_f64() * SLOW_PART).max(usual * FACTOR);
        if self.is_suspect() {
            return self.detect_recovery(hanging.is_some(), bound, usual);
        }
        if let Some((lasted, waiting)) = hanging
            && lasted.as_secs_f64() >= slow.as_secs_f64().max(usual * FACTOR)
        {
            return Some(SlowVerdict::Suspect(format!(
                "{waiting} sessions wait for a first byte and none received one for {}; \
                 pool median {}",
                shown(lasted.as_secs_f64()),
                shown(usual)
            )));
        }
        let window = self.closed.filter(|window| window.answers >= SAMPLES_MIN)?;
        let mean = seconds(window.mean());
        (mean >= bound).then(|| {
            SlowVerdict::Suspect(format!(
                "time to first byte {}; pool median {}",
                shown(mean),
                shown(usual)
            ))
        })
    }

    /// Returns the state for an upgrade's handover.
    pub fn save(&self, now: Instant) -> SavedSlowDetector {
        let millis = |since: Instant| {
            u64::try_from(now.saturating_duration_since(since).as_millis()).unwrap_or(u64::MAX)
        };
        SavedSlowDetector { suspect_ms: self.suspect.map(millis), usual: self.typical() }
    }

    /// Restores a state that the old process handed over at `now`.
    pub fn restore(&mut self, saved: &SavedSlowDetector, now: Instant) {
        let before = |ms| now.checked_sub(Duration::from_millis(ms)).unwrap_or(now);
        self.usual = saved.usual.filter(|log2| log2.is_finite()).or(self.usual);
        match saved.suspect_ms.map(before) {
            Some(since) => self.suspect(since),
            None => {
                self.clear();
            }
        }
    }

    /// Makes the backend suspect from now on.
    pub fn suspect(&mut self, now: Instant) {
        self.suspect = Some(now);
        // Earlier answers must not clear the backend.
        self.window = None;
        self.closed = None;
    }

    /// Clears the backend and returns since when it was suspect.
    pub fn clear(&mut self) -> Option<Instant> {
        self.hang = None;
        self.suspect.take()
    }

    /// Returns since when the backend is suspect, if it is.
    pub fn suspect_since(&self) -> Option<Instant> {
        self.suspect
    }

    /// Whether the backend is suspect.
    pub fn is_suspect(&self) -> bool {
        self.suspect.is_some()
    }

    /// Returns how long the backend has hung, and how many sessions wait.
    fn detect_hang(&mut self, pool: &PoolView, now: Instant) -> Option<(Duration, u64)> {
        let own = self.last?;
        let others = pool.answers.wrapping_sub(own.answers);
        let [last, before] = self.others;
        self.others = [others, last];
        if !self.hangs() {
            self.hang = None;
            return None;
        }
        let hang = *self.hang.get_or_insert(HangEvidence { since: now, others: before });
        // Saturates: the answers of a backend that has left the pool are missing.
        let answered = others.saturating_sub(hang.others);
        let known = usize::from(self.typical().is_some());
        let others_known = pool.usuals.len().saturating_sub(known);
        let others_hang = pool.hanging.saturating_sub(known) >= others_known;
        let others_wait = pool.waiting.saturating_sub(own.waiting());
        (!others_hang && answered >= WAITING_MIN && answered > others_wait)
            .then(|| (now.saturating_duration_since(hang.since), own.waiting()))
    }

    /// Whether enough sessions wait and none was answered since the last check.
    fn hangs(&self) -> bool {
        !self.answered && self.last.is_some_and(|counts| counts.waiting() >= WAITING_MIN)
    }

    fn detect_recovery(&self, hanging: bool, bound: f64, usual: f64) -> Option<SlowVerdict> {
        let window = self.closed.or(self.window)?;
        let mean = seconds(window.mean());
        let well = !hanging && window.answers >= CLEAR_MIN && mean <= bound * CLEAR_PART;
        well.then(|| {
            SlowVerdict::Clear(format!(
                "time to first byte back to {}; pool median {}",
                shown(mean),
                shown(usual)
            ))
        })
    }

    /// Returns the mean of the newest closed window, or of the first window while it is
    /// open.
    fn typical(&self) -> Option<f64> {
        let open = self.window.filter(|window| window.answers > 0);
        self.usual.or_else(|| open.map(|window| window.mean()))
    }
}

// === impl AnswerWindow ===

impl AnswerWindow {
    fn mean(&self) -> f64 {
        self.log2 / self.answers.max(1) as f64
    }
}

fn seconds(log2_micros: f64) -> f64 {
    log2_micros.exp2() / 1e6
}

/// Formats a time with about two digits: `1.3s`, `25ms`, `0.18ms`.
fn shown(seconds: f64) -> String {
    match seconds * 1e3 {
        ms if ms >= 1000.0 => format!("{:.1}s", ms / 1e3),
        ms if ms >= 10.0 => format!("{ms:.0}ms"),
        ms => format!("{ms:.2}ms"),
    }
}

#[cfg(test)]
mod tests;
