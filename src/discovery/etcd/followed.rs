//! One prefix that a follower keeps current: its contents, its questions and what they were
//! told.
//!
//! The follower calls it. Nothing here does I/O or reads a clock.

use super::codec::{KeyValue, RangeAnswer, RangeRequest, WatchCreate, WatchMessage};
use super::contents::PrefixContents;
use crate::client::HttpFailure;
use crate::tell::Teller;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tidegate_core::discovery::Told;

/// Shortest time between two sets. Changes in between are told together.
const TELL_PACE: Duration = Duration::from_millis(50);

/// A prefix with at least one question.
#[derive(Debug)]
pub(super) struct Followed {
    contents: PrefixContents,
    /// By the number of the question.
    tellers: Vec<(u64, Teller)>,
    /// Whether the contents can be continued by a watch.
    current: bool,
    /// The prefix was refused; it is not listed before this time.
    pub(super) retry_at: Option<Instant>,
    /// The contents were read at least once.
    known: bool,
    /// The contents differ from the last set that was told.
    untold: bool,
    told_at: Option<Instant>,
    /// The last check differed from the contents, which were at this revision.
    doubt: Option<i64>,
}

/// The contents when a check was sent.
#[derive(Debug)]
pub(super) struct Expected {
    revision: i64,
    count: i64,
}

/// What a check means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CheckResult {
    /// The contents are those of the server, or events arrived while the check ran.
    Holds,
    /// The contents differ. The events can still be on their way.
    Differs,
    /// The contents differ for the second time, and no event arrived between.
    Missed,
}

// === impl Followed ===

impl Followed {
    pub(super) fn new(prefix: Arc<str>) -> Followed {
        Followed {
            contents: PrefixContents::new(prefix),
            tellers: Vec::new(),
            current: false,
            retry_at: None,
            known: false,
            untold: false,
            told_at: None,
            doubt: None,
        }
    }

    pub(super) fn prefix(&self) -> &Arc<str> {
        self.contents.prefix()
    }

    /// Whether a watch can continue the contents.
    pub(super) fn is_current(&self) -> bool {
        self.current
    }

    /// The contents must be listed before the next watch.
    pub(super) fn must_list(&mut self) {
        self.current = false;
    }

    /// Returns whether the prefix must be listed now.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        !self.current && self.retry_at.is_none_or(|at| at <= now)
    }

    // === questions ===

    pub(super) fn has_question(&self, number: u64) -> bool {
        self.tellers.iter().any(|(known, _)| *known == number)
    }

    /// Adds a question. It gets the contents at once if they are current.
    pub(super) fn add_question(&mut self, number: u64, teller: &Teller, trusted: bool) {
        if self.current && self.known {
            teller.tell(Told::Whole(self.contents.whole(trusted)));
        }
        self.tellers.push((number, teller.clone()));
    }

    /// Keeps the questions for which `asked` holds. Returns whether any is left.
    pub(super) fn keep_questions(&mut self, asked: impl Fn(u64) -> bool) -> bool {
        self.tellers.retain(|(number, _)| asked(*number));
        !self.tellers.is_empty()
    }

    // === contents ===

    /// Takes a list of the whole prefix.
    pub(super) fn take_list(&mut self, listed: Vec<KeyValue>, count: i64, revision: i64) {
        let again = std::mem::replace(&mut self.known, true);
        let changed = self.contents.replace(listed, count, revision);
        self.untold |= changed || !again;
        (self.current, self.retry_at, self.doubt) = (true, None, None);
        if again {
            self.each(|teller| {
                teller.counters().relists.fetch_add(1, Ordering::Relaxed);
            });
        }
        if !self.untold {
            self.tell(&Told::Alive);
        }
    }

    /// The watch that continues the contents.
    pub(super) fn watch(&self, watch_id: i64) -> WatchCreate {
        let RangeRequest { key, range_end, .. } = RangeRequest::below(self.prefix());
        WatchCreate { key, range_end, start_revision: self.next_revision(), watch_id }
    }

    /// Applies the events of a message.
    pub(super) fn take_events(&mut self, message: WatchMessage) {
        self.doubt = None;
        match self.contents.is_cut() {
            // The entries after the last known one are not known.
            true => self.must_list(),
            false => self.untold |= self.contents.apply(message.events),
        }
    }

    pub(super) fn revision(&self) -> i64 {
        self.contents.revision()
    }

    /// The first revision that the contents do not have. A store never reaches the last one.
    fn next_revision(&self) -> i64 {
        self.revision().saturating_add(1)
    }

    // === checks ===

    /// The cheap read that shows changes and deletions after the contents' revision.
    pub(super) fn check(&self) -> (RangeRequest, Expected) {
        let (revision, count) = (self.contents.revision(), self.contents.count());
        let request = RangeRequest {
            limit: 1,
            min_mod_revision: self.next_revision(),
            keys_only: true,
            ..RangeRequest::below(self.prefix())
        };
        (request, Expected { revision, count })
    }

    /// Compares the answer of a check, read at `revision`, with the contents.
    pub(super) fn take_check(
        &mut self,
        sent: &Expected,
        answer: &RangeAnswer,
        revision: i64,
    ) -> CheckResult {
        let moved = self.contents.revision() != sent.revision;
        let equal = answer.kvs.is_empty() && answer.count == sent.count;
        if moved || equal {
            self.doubt = None;
            if equal && !moved {
                self.contents.advance(revision);
            }
            if !self.untold {
                self.tell(&Told::Alive);
            }
            return CheckResult::Holds;
        }
        match self.doubt.replace(sent.revision) == Some(sent.revision) {
            true => CheckResult::Missed,
            false => CheckResult::Differs,
        }
    }

    // === telling ===

    /// Tells the set if it changed and the pace allows it. Returns when it must be told
    /// otherwise.
    pub(super) fn tell_due(&mut self, now: Instant, trusted: bool) -> Option<Instant> {
        if !self.untold || !self.current {
            return None;
        }
        let due = self.told_at.map_or(now, |at| at + TELL_PACE);
        if due > now {
            return Some(due);
        }
        self.untold = false;
        self.told_at = Some(now);
        self.tell(&Told::Whole(self.contents.whole(trusted)));
        None
    }

    /// Whether no set was told for this time.
    pub(super) fn is_quiet(&self, now: Instant, time: Duration) -> bool {
        !self.untold && self.told_at.is_none_or(|at| now.saturating_duration_since(at) >= time)
    }

    /// The set must be told again, because its trust changed.
    pub(super) fn must_tell(&mut self) {
        self.untold = true;
    }

    /// Tells a failure. The contents stay.
    pub(super) fn tell_failure(&self, failure: &HttpFailure) {
        self.tell(&failure.clone().told());
    }

    /// Counts a watch that began again.
    pub(super) fn count_restart(&self) {
        self.each(|teller| {
            teller.counters().watch_restarts.fetch_add(1, Ordering::Relaxed);
        });
    }

    fn tell(&self, told: &Told) {
        self.each(|teller| teller.tell(told.clone()));
    }

    fn each(&self, act: impl Fn(&Teller)) {
        self.tellers.iter().for_each(|(_, teller)| act(teller));
    }
}
