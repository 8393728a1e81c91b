//! From the answers about A and AAAA to the addresses of a name.
//!
//! The resolver calls it. Everything here is pure.

use super::ResolveFailure;
use super::cache::{RecordAnswer, RecordOutcome};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

/// What is known about the addresses of a name.
#[derive(Debug, Clone)]
pub(crate) struct AddressAnswer {
    pub(crate) outcome: AddressOutcome,
    pub(crate) dates: AnswerDates,
    /// Records that no member can have, such as the address 0.0.0.0.
    pub(crate) unusable: u32,
}

/// When the records were asked and when to ask them again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AnswerDates {
    /// Start of the oldest exchange.
    pub(crate) asked: Instant,
    /// All records are asked again: the smallest TTL is over.
    pub(crate) all_due: Instant,
    /// The next question, if only about the part that failed.
    pub(crate) due: Instant,
}

/// How the question about a name ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum AddressOutcome {
    /// At least one address, and no part failed.
    Whole(Vec<IpAddr>),
    /// The name does not exist.
    NoName,
    /// The name exists without addresses of the family.
    Nothing,
    /// At least one part failed.
    Part(PartialAnswer),
}

/// Addresses of a name of which at least one part, A or AAAA, failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PartialAnswer {
    /// Addresses of the part that did not fail.
    pub(crate) fresh: Vec<IpAddr>,
    /// Last known addresses of the failed part.
    pub(crate) kept: Vec<IpAddr>,
    /// Whether the last addresses of each failed part are known, so that the addresses here
    /// remove none by the failure.
    pub(crate) complete: bool,
    pub(crate) failure: ResolveFailure,
}

// === impl AddressAnswer ===

impl AddressAnswer {
    /// Combines the answers of the address families; at least one.
    pub(super) fn combine(answers: &[Arc<RecordAnswer>], now: Instant) -> AddressAnswer {
        let (mut fresh, mut kept) = (Vec::new(), Vec::new());
        let (mut complete, mut unusable, mut failure) = (true, 0, None);
        for answer in answers {
            match (&answer.outcome, &answer.known) {
                (RecordOutcome::Records(set), _) => {
                    unusable += set.unusable;
                    fresh.extend_from_slice(&set.addresses);
                }
                (RecordOutcome::Failed(error), known) => {
                    complete &= known.is_some();
                    kept.extend(known.iter().flat_map(|set| set.addresses.iter().copied()));
                    failure = Some(error.clone());
                }
                _ => {}
            }
        }
        let exists = answers.iter().any(|answer| !matches!(answer.outcome, RecordOutcome::NoName));
        let outcome = match failure {
            Some(failure) => AddressOutcome::Part(PartialAnswer { fresh, kept, complete, failure }),
            None if !fresh.is_empty() => AddressOutcome::Whole(fresh),
            None if exists => AddressOutcome::Nothing,
            None => AddressOutcome::NoName,
        };
        AddressAnswer { outcome, dates: AnswerDates::of(answers, now), unusable }
    }

    /// Combines the answers about names of which none has an address; at least one.
    pub(super) fn without_records(answers: &[AddressAnswer], now: Instant) -> AddressAnswer {
        let exists = answers.iter().any(|answer| answer.outcome == AddressOutcome::Nothing);
        let outcome = if exists { AddressOutcome::Nothing } else { AddressOutcome::NoName };
        let dates = answers.iter().map(|answer| answer.dates).reduce(AnswerDates::and);
        let dates = dates.unwrap_or(AnswerDates::local(now, now));
        AddressAnswer {
            outcome,
            dates,
            unusable: answers.iter().map(|answer| answer.unusable).sum(),
        }
    }

    /// Addresses that no server was asked for.
    pub(super) fn local(addresses: Vec<IpAddr>, now: Instant, until: Instant) -> AddressAnswer {
        let outcome = AddressOutcome::Whole(addresses);
        AddressAnswer { outcome, dates: AnswerDates::local(now, until), unusable: 0 }
    }

    /// A failure before any server was asked.
    pub(super) fn failed(failure: ResolveFailure, now: Instant, until: Instant) -> AddressAnswer {
        let (fresh, kept) = (Vec::new(), Vec::new());
        let outcome = AddressOutcome::Part(PartialAnswer { fresh, kept, complete: false, failure });
        AddressAnswer { outcome, dates: AnswerDates::local(now, until), unusable: 0 }
    }
}

// === impl AnswerDates ===

impl AnswerDates {
    pub(super) fn of(answers: &[Arc<RecordAnswer>], now: Instant) -> AnswerDates {
        let until = |wanted: fn(&RecordOutcome) -> bool| {
            let found = answers.iter().filter(move |answer| wanted(&answer.outcome));
            found.map(|answer| answer.until).min()
        };
        let of_records = until(|outcome| matches!(outcome, RecordOutcome::Records(_)));
        let of_failed = until(|outcome| matches!(outcome, RecordOutcome::Failed(_)));
        let all_due = of_records.or_else(|| until(|_| true)).unwrap_or(now);
        AnswerDates {
            asked: answers.iter().map(|answer| answer.asked).min().unwrap_or(now),
            all_due,
            due: of_failed.map_or(all_due, |failed| failed.min(all_due)),
        }
    }

    pub(super) fn local(asked: Instant, until: Instant) -> AnswerDates {
        AnswerDates { asked, all_due: until, due: until }
    }

    /// Returns the dates of an answer that needs both.
    pub(crate) fn and(self, other: AnswerDates) -> AnswerDates {
        AnswerDates {
            asked: self.asked.min(other.asked),
            all_due: self.all_due.min(other.all_due),
            due: self.due.min(other.due),
        }
    }
}
