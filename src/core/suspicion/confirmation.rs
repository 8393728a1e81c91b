//! One round of a confirming probe: some tries, one after another, of which a
//! single answer is enough.
//!
//! The heartbeat detector owns at most one at a time. It asks for tries and
//! counts what becomes of them; it never makes one, and reads no clock.

use super::TRY_TIMEOUT_MIN;
use std::time::{Duration, Instant};

/// A try whose result has not been reported that long after its timeout is
/// made again: then the report is lost, not the answer.
const REPORT_MARGIN: Duration = Duration::from_millis(200);

/// Tries of one round that are made again because we were late.
const REPEATS_MAX: u32 = 2;

/// Names one try of one detector, so that a late result is not taken for a
/// newer one's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TryId(pub u64);

/// A connect to be made now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConfirmationTry {
    /// To be given back with the result.
    pub id: TryId,
    /// No answer by then is a failure.
    pub timeout: Duration,
}

/// What became of a try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TryResult {
    /// The service works.
    Answered,
    /// It does not, or nothing came in time; in words for the log.
    Failed(String),
    /// Its host said that nobody listens: the path works, the service does not.
    Refused,
    /// The try could not be made for want of something here: proves nothing.
    Local,
}

/// Where a round stands after an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ConfirmationProgress {
    /// Nobody waited for that.
    Ignored,
    /// The next try is due now.
    Again(ConfirmationTry),
    /// The next try is due later.
    Wait,
    /// Over: it works, and took that long to say so.
    Answered(Duration),
    /// Over: every try failed; the evidence in words.
    Failed(String),
    /// Over: refused.
    Refused,
}

/// See the module's documentation.
#[derive(Debug, Clone)]
pub(super) struct Confirmation {
    /// Tries that have to fail; at least 1.
    tries: u32,
    failed: u32,
    /// Tries made again for our being late.
    repeats: u32,
    /// Of each try.
    timeout: Duration,
    stage: ConfirmationStage,
}

/// Invariant: there is always a next event, so a round never hangs.
#[derive(Debug, Clone, Copy)]
enum ConfirmationStage {
    InFlight { id: TryId, since: Instant, lost_at: Instant },
    Pausing { until: Instant },
}

// === impl Confirmation ===

impl Confirmation {
    /// The first try is due now. `serial` numbers the owner's tries.
    pub(super) fn start(
        (tries, timeout): (u32, Duration),
        serial: &mut u64,
        now: Instant,
    ) -> (Confirmation, ConfirmationTry) {
        let (stage, next) = send_try(timeout, serial, now);
        (Confirmation { tries: tries.max(1), failed: 0, repeats: 0, timeout, stage }, next)
    }

    /// Takes a result.
    pub(super) fn answer(
        &mut self,
        id: TryId,
        answer: TryResult,
        serial: &mut u64,
        now: Instant,
    ) -> ConfirmationProgress {
        let since = match self.stage {
            ConfirmationStage::InFlight { id: awaited, since, .. } if awaited == id => since,
            _ => return ConfirmationProgress::Ignored,
        };
        match answer {
            TryResult::Answered => {
                ConfirmationProgress::Answered(now.saturating_duration_since(since))
            }
            TryResult::Refused => ConfirmationProgress::Refused,
            TryResult::Local => {
                self.stage = ConfirmationStage::Pausing { until: now + TRY_TIMEOUT_MIN };
                ConfirmationProgress::Wait
            }
            TryResult::Failed(reason) => {
                self.failed += 1;
                if self.failed >= self.tries {
                    let failed = self.failed;
                    let s = if failed == 1 { "" } else { "s" };
                    return ConfirmationProgress::Failed(format!(
                        "{failed} confirmation probe{s} failed, last: {reason}"
                    ));
                }
                let (stage, next) = send_try(self.timeout, serial, now);
                self.stage = stage;
                ConfirmationProgress::Again(next)
            }
        }
    }

    /// We were late for so long: the try to make again, as what becomes of the one
    /// under way may be our own doing. What failed before it stays failed, and after
    /// [`REPEATS_MAX`] the one under way is waited for: being late again and again
    /// must not keep a round from its end.
    pub(super) fn repeat(
        &mut self,
        lost: Duration,
        serial: &mut u64,
        now: Instant,
    ) -> Option<ConfirmationTry> {
        match &mut self.stage {
            ConfirmationStage::InFlight { lost_at, .. } if self.repeats >= REPEATS_MAX => {
                *lost_at = lost_at.checked_add(lost).unwrap_or(now).min(now + self.timeout);
                None
            }
            ConfirmationStage::InFlight { .. } => {
                self.repeats += 1;
                let (stage, next) = send_try(self.timeout, serial, now);
                self.stage = stage;
                Some(next)
            }
            ConfirmationStage::Pausing { .. } => None,
        }
    }

    /// The try to make now, if its time has come.
    pub(super) fn check(&mut self, serial: &mut u64, now: Instant) -> Option<ConfirmationTry> {
        if now < self.due() {
            return None;
        }
        let (stage, next) = send_try(self.timeout, serial, now);
        self.stage = stage;
        Some(next)
    }

    /// When [`Confirmation::check`] has something to do.
    pub(super) fn due(&self) -> Instant {
        match self.stage {
            ConfirmationStage::InFlight { lost_at, .. } => lost_at,
            ConfirmationStage::Pausing { until } => until,
        }
    }
}

fn send_try(
    timeout: Duration,
    serial: &mut u64,
    now: Instant,
) -> (ConfirmationStage, ConfirmationTry) {
    *serial += 1;
    let id = TryId(*serial);
    let lost_at = now + timeout + REPORT_MARGIN;
    (ConfirmationStage::InFlight { id, since: now, lost_at }, ConfirmationTry { id, timeout })
}
