//! The gray backend: it takes connections and then does not answer, or takes
//! ten times as long as its pool. What is counted goes in, a verdict comes out.
//!
//! The controller looks at every backend of a pool [`LOOK_INTERVAL`] apart and
//! makes a *suspect* of those found here, which lowers their weight and never
//! takes them out: a suspect keeps a trickle of sessions, and by those it is
//! cleared. It never reads a clock or a counter by itself.
//!
//! # What counts
//!
//! Only sessions in which the client spoke first: for those the time from the
//! client's first byte to the backend's says something, whatever the protocol.
//! How long a session goes on never counts. A backend is measured against the
//! others of its pool: *usual* is the median over them of the geometric mean of
//! their newest answers (a mean of logarithms, so that one answer of a minute
//! among ten quick ones is not ten quick ones forgotten).
//!
//! - **It hangs**: for `slow_first_byte`, or [`FACTOR`] times the usual time if
//!   that is longer, at each look at least [`WAITING_MIN`] of its sessions
//!   waited, and not one was answered; while not all of the others hang as
//!   well, and they have answered at least as many since the look before its
//!   last answer, and more than wait there now. (So a client that gives up after half
//!   a second does not hide a backend that hangs, as the next one waits then;
//!   nor do clients that are all stuck at it before long, and ask nobody else.)
//! - **It is slow**: over at least [`SAMPLES_MIN`] answers and half a second it
//!   took [`FACTOR`] times the usual time, and at least a tenth of
//!   `slow_first_byte`: below that, a hundred times nearly nothing is noise.
//!
//! It is **cleared** when [`CLEAR_MIN`] answers or more, all after it became a
//! suspect, took at most half of what makes a backend slow.
//!
//! # Whom it leaves alone
//!
//! A pool of one; a pool in which nobody answers, or all stop at once, as when
//! what is behind them fails; a pool in which everybody
//! answers late, as the usual time is long there (long polls); and one in which
//! about as many wait as are answered at the others, too (subscriptions). What
//! cannot be told apart is a pool where most requests are quick and some are
//! meant to wait on a fresh connection: those switch it off.

use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// Between two looks. A hang is found within two of them after it has lasted
/// long enough.
pub const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// After a look that comes later than this we may have stood still ourselves,
/// workers and all: what waits then has waited for us.
const LATE: Duration = Duration::from_millis(800);

/// Sessions that must wait: one or two may have asked for something long.
pub const WAITING_MIN: u64 = 3;

/// How many times worse than usual. Below that it is for balancing by load or
/// latency to deal with, not for health.
pub const FACTOR: f64 = 10.0;

/// Answers that make a mean worth judging by.
pub const SAMPLES_MIN: u64 = 10;

/// Answers that clear a suspect; fewer than it takes to suspect one, as it gets
/// a tenth of its sessions.
pub const CLEAR_MIN: u64 = 3;

/// A backend is slow from this part of `slow_first_byte` on.
const SLOW_PART: f64 = 0.1;

/// What clears is better than what makes suspect by this, so that nobody goes
/// to and fro at the edge.
const CLEAR_PART: f64 = 0.5;

/// Answers are judged in windows: of this length at least, and no longer than
/// the second where there are few.
const WINDOW_MIN: Duration = Duration::from_millis(500);
const WINDOW_MAX: Duration = Duration::from_secs(10);

/// Everything counted of a backend so far, over all workers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FirstByteCounts {
    /// Sessions whose client spoke first.
    pub questions: u64,
    /// Those that were answered.
    pub answers: u64,
    /// Those that ended unanswered.
    pub unanswered: u64,
    /// Sum of log2(microseconds) over `answers`, in `core::table::state::LOG_UNIT`ths.
    pub answer_log2: u64,
}

/// What is kept of one backend between looks.
#[derive(Debug, Clone, Default)]
pub struct SlowDetector {
    last: Option<FirstByteCounts>,
    looked: Option<Instant>,
    /// Answers came since the look before the last.
    answered: bool,
    /// What the others had answered by the last look and the one before.
    others: [u64; 2],
    hang: Option<HangEvidence>,
    window: Option<AnswerWindow>,
    /// A window that was closed by the last look.
    closed: Option<AnswerWindow>,
    /// Mean log2(microseconds) of the newest closed window.
    usual: Option<f64>,
    suspect: Option<Instant>,
}

/// What another process goes on with after an upgrade.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SavedSlowDetector {
    /// It has been a suspect for so long.
    pub suspect_ms: Option<u64>,
    /// See `usual` of [`SlowDetector`]. Without it the others would have nothing to be
    /// compared with, and suspects would be cleared at the first look.
    pub usual: Option<f64>,
}

#[derive(Debug, Clone, Copy)]
struct HangEvidence {
    since: Instant,
    /// What the others had answered by the look before the backend's last
    /// answer: whoever it was stuck at asked them until then.
    others: u64,
}

#[derive(Debug, Clone, Copy)]
struct AnswerWindow {
    since: Instant,
    answers: u64,
    log2: f64,
}

/// A pool at one look.
#[derive(Debug, Clone, Default)]
pub struct PoolView {
    /// Ascending.
    usuals: Vec<f64>,
    answers: u64,
    waiting: u64,
    /// Backends that have answered before, and seem to hang.
    hanging: usize,
}

/// What a look found out, with the evidence in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SlowVerdict {
    /// It is gray.
    Suspect(String),
    /// It is well again.
    Clear(String),
}

// === impl FirstByteCounts ===

impl FirstByteCounts {
    /// Sessions waiting now; the counts may be from slightly different moments.
    fn waiting(&self) -> u64 {
        self.questions.saturating_sub(self.answers.wrapping_add(self.unanswered))
    }
}

// === impl PoolView ===

impl PoolView {
    /// Over every backend of a pool, after each has taken its counts.
    pub fn of<'a>(watches: impl Iterator<Item = &'a SlowDetector>) -> PoolView {
        let mut view = PoolView::default();
        watches.for_each(|watch| view.add(watch));
        view.complete();
        view
    }

    /// Adds one that has taken its counts.
    pub fn add(&mut self, watch: &SlowDetector) {
        let counts = watch.last.unwrap_or_default();
        self.answers = self.answers.wrapping_add(counts.answers);
        self.waiting = self.waiting.saturating_add(counts.waiting());
        self.usuals.extend(watch.typical());
        self.hanging += usize::from(watch.hangs() && watch.typical().is_some());
    }

    /// All have been added.
    pub fn complete(&mut self) {
        self.usuals.sort_by(f64::total_cmp);
    }

    /// The others' usual time in seconds; of two in the middle the longer.
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
    /// Takes what is counted by now.
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

    /// Judges after every backend of the pool has taken its counts. `slow` is
    /// the pool's `slow_first_byte`. Applies nothing: that is for
    /// [`SlowDetector::suspect`] and [`SlowDetector::clear`].
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

    /// For another process.
    pub fn save(&self, now: Instant) -> SavedSlowDetector {
        let millis = |since: Instant| {
            u64::try_from(now.saturating_duration_since(since).as_millis()).unwrap_or(u64::MAX)
        };
        SavedSlowDetector { suspect_ms: self.suspect.map(millis), usual: self.typical() }
    }

    /// Goes on with what another process has said at `now`.
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

    /// It is a suspect from now on.
    pub fn suspect(&mut self, now: Instant) {
        self.suspect = Some(now);
        // What was before clears nobody.
        self.window = None;
        self.closed = None;
    }

    /// It is no suspect any more; since when it was one.
    pub fn clear(&mut self) -> Option<Instant> {
        self.hang = None;
        self.suspect.take()
    }

    /// Since when it is a suspect, if it is.
    pub fn suspect_since(&self) -> Option<Instant> {
        self.suspect
    }

    /// Whether it is a suspect.
    pub fn is_suspect(&self) -> bool {
        self.suspect.is_some()
    }

    /// For how long its sessions have waited without one being answered while
    /// others were, and how many wait.
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
        // A backend that has left the pool took its answers along.
        let answered = others.saturating_sub(hang.others);
        let known = usize::from(self.typical().is_some());
        let others_known = pool.usuals.len().saturating_sub(known);
        let others_hang = pool.hanging.saturating_sub(known) >= others_known;
        let others_wait = pool.waiting.saturating_sub(own.waiting());
        (!others_hang && answered >= WAITING_MIN && answered > others_wait)
            .then(|| (now.saturating_duration_since(hang.since), own.waiting()))
    }

    /// Enough wait, and nobody was answered since the look before.
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

    /// As of the newest window, or of the first one while it is open.
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

/// `1.3s`, `25ms`, `0.18ms`: two digits are all there is to it.
fn shown(seconds: f64) -> String {
    match seconds * 1e3 {
        ms if ms >= 1000.0 => format!("{:.1}s", ms / 1e3),
        ms if ms >= 10.0 => format!("{ms:.0}ms"),
        ms => format!("{ms:.2}ms"),
    }
}

#[cfg(test)]
mod tests;
