//! One confirmation probe: a round of tries, one after another, that ends with the first
//! answer.
//!
//! The heartbeat detector owns at most one at a time. This code requests tries and counts
//! their results. It makes no connect and reads no clock.

use super::TRY_TIMEOUT_MIN;
use std::time::{Duration, Instant};

/// If no result is reported this long after the timeout of a try, the report is lost, and
/// the try is repeated.
const REPORT_MARGIN: Duration = Duration::from_millis(200);

/// Tries of one round that are repeated because the control loop was late.
const REPEATS_MAX: u32 = 2;

/// Identifies one try of one detector, so that a late result does not count for a newer
/// try.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TryId(pub u64);

/// A connect to be made now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConfirmationTry {
    /// Returned with the result.
    pub id: TryId,
    /// The try fails without an answer within this time.
    pub timeout: Duration,
}

/// Result of a try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TryResult {
    /// The service works.
    Answered,
    /// The service does not work, or did not answer in time. Holds the reason for the log.
    Failed(String),
    /// The host refused the connect: the path works, the service does not.
    Refused,
    /// A local error prevented the try: no evidence.
    Local,
}

/// State of a round after a result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ConfirmationProgress {
    /// The round did not wait for this result.
    Ignored,
    /// The next try is due now.
    Again(ConfirmationTry),
    /// The next try is due later.
    Wait,
    /// Ended: the service answered after this time.
    Answered(Duration),
    /// Ended: every try failed. Holds the evidence as text.
    Failed(String),
    /// Ended: refused.
    Refused,
}

/// See the module documentation.
#[derive(Debug, Clone)]
pub(super) struct Confirmation {
    /// Tries that must fail; at least 1.
    tries: u32,
    failed: u32,
    /// Tries repeated because the control loop was late.
    repeats: u32,
    /// Timeout of each try.
    timeout: Duration,
    stage: ConfirmationStage,
}

/// Each stage has a due time, so a round always ends.
#[derive(Debug, Clone, Copy)]
enum ConfirmationStage {
    InFlight { id: TryId, since: Instant, lost_at: Instant },
    Pausing { until: Instant },
}

// === impl Confirmation ===

impl Confirmation {
    /// Starts a round and returns its first try. `serial` numbers the tries of the
    /// detector.
    pub(super) fn start(
        (tries, timeout): (u32, Duration),
        serial: &mut u64,
        now: Instant,
    ) -> (Confirmation, ConfirmationTry) {
        let (stage, next) = send_try(timeout, serial, now);
        (Confirmation { tries: tries.max(1), failed: 0, repeats: 0, timeout, stage }, next)
    }

    /// Records the result of a try.
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

    /// Repeats the current try after the control loop was late by `lost`, because a
    /// failure can have a local cause. Earlier failures count. After [`REPEATS_MAX`]
    /// repeats the round waits longer instead, so that repeated lateness cannot keep it
    /// from ending.
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

    /// Returns the next try if it is due.
    pub(super) fn check(&mut self, serial: &mut u64, now: Instant) -> Option<ConfirmationTry> {
        if now < self.due() {
            return None;
        }
        let (stage, next) = send_try(self.timeout, serial, now);
        self.stage = stage;
        Some(next)
    }

    /// Returns when to call [`Confirmation::check`].
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
