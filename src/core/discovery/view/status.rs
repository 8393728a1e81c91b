//! The state of a view for `status`, `explain` and metrics.
//!
//! The controller asks for it. Nothing here changes the view.

use super::member::HeldReason;
use super::removal::later;
use super::{View, WholeSet};
use crate::discovery::{SourceFailure, Unreadable};
use std::time::{Duration, Instant};

/// The state of a view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ViewStatus {
    /// What the source said last; `None`: nothing in this process.
    pub last_word: Option<LastWord>,
    /// Time since the last complete answer or sign of life, also of another process;
    /// `None`: there was none.
    pub confirmed: Option<Duration>,
    /// Version of the last complete answer; empty if there was none or it has none.
    pub version: String,
    /// Whether the last complete answer was current.
    pub trusted: bool,
    /// Members of the view, held ones included.
    pub members: u32,
    /// Announcements in the last complete answer, refused ones included.
    pub announced: u32,
    /// Members that the last answer lacks.
    pub held: u32,
    /// Announcements of the last answer that were refused or changed.
    pub refused: RefusedCounts,
    /// Announcements of the last answer that the source could not read.
    pub unreadable: Unreadable,
    /// Answers of this process.
    pub answers: AnswerCounts,
    /// The members drain, because `stale_for` is over.
    pub stale: bool,
    /// The view is from the state directory or another process, and the source has given
    /// no complete answer since.
    pub restored: bool,
    /// More than half of the members turned critical at once; these wishes do not count.
    pub burst: bool,
    /// The last answer waits for its confirmation.
    pub held_answer: Option<HeldAnswer>,
}

/// What a source said last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastWord {
    /// `None`: an answer or a sign of life.
    pub failure: Option<SourceFailure>,
    /// A sign of life without a set.
    pub alive: bool,
    /// The failure in words, or the version of the answer.
    pub detail: String,
    /// Time since then.
    pub age: Duration,
}

/// Announcements of one answer that were refused or changed, by reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RefusedCounts {
    /// Not in `addresses`, or no address of a backend: port 0, unspecified, multicast,
    /// broadcast.
    pub addresses: u32,
    /// Beyond `backends_max`, or beyond the bound of all views.
    pub too_many: u32,
    /// With the address of another announcement.
    pub duplicate: u32,
    /// The source could not read it.
    pub unreadable: u32,
    /// Accepted, but its name is no valid name of a backend. The address is the name.
    pub bad_name: u32,
    /// Accepted with `weight_max`, because the announced weight is higher.
    pub weight_clamped: u32,
}

/// Answers by result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AnswerCounts {
    /// The members differ, and no guard objected.
    pub changed: u64,
    /// Nothing differs.
    pub same: u64,
    /// A guard holds removals.
    pub held: u64,
    /// The answer would remove members and is not trusted.
    pub refused: u64,
    /// The source gave no answer.
    pub failed: u64,
}

/// The result of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnswerResult {
    /// [`AnswerCounts::changed`]
    Changed,
    /// [`AnswerCounts::same`]
    Same,
    /// [`AnswerCounts::held`]
    Held,
    /// [`AnswerCounts::refused`]
    Refused,
    /// [`AnswerCounts::failed`]
    Failed,
}

/// An answer that waits for its confirmation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldAnswer {
    /// The guard.
    pub reason: HeldReason,
    /// Members that it would remove.
    pub removes: u32,
    /// Time until a trusted answer can confirm it, 0 if it can already; `None`: no answer
    /// can.
    pub confirmable_in: Option<Duration>,
}

// === impl View ===

impl View {
    /// Returns the state of the view.
    pub fn status(&self, now: Instant) -> ViewStatus {
        let age = |at: Instant| now.saturating_duration_since(at);
        let last_word = self.word.as_ref().map(|word| LastWord {
            failure: word.failure,
            alive: word.alive,
            detail: word.detail.clone(),
            age: age(word.at),
        });
        let held = self.entries.iter().filter(|entry| entry.member.held.is_some()).count();
        ViewStatus {
            last_word,
            confirmed: self.confirmed.map(age),
            version: self.version().to_owned(),
            trusted: self.last.as_ref().is_some_and(|set| set.trusted),
            members: self.entries.len() as u32,
            announced: self.announced,
            held: held as u32,
            refused: self.refused,
            unreadable: self.unreadable.clone(),
            answers: self.answers,
            stale: self.stale,
            restored: self.restored,
            burst: self.burst.is_some(),
            held_answer: self.held_answer(now),
        }
    }

    pub(super) fn version(&self) -> &str {
        self.last
            .as_ref()
            .map_or("", |set: &WholeSet| super::cut(&set.version, super::TEXT_BYTES_MAX))
    }

    fn held_answer(&self, now: Instant) -> Option<HeldAnswer> {
        let held = || {
            let held = self.entries.iter().filter_map(|entry| entry.member.held);
            held.filter(|held| held.reason.holds_answer())
        };
        let wait = |until: Instant| until.saturating_duration_since(now);
        let Some(first) = held().next() else {
            // The first answers can be small; then the view has no member to hold.
            let last = self.last.as_ref().filter(|_| !self.answered)?;
            let reason = match (last.trusted, self.small_since) {
                (false, _) => HeldReason::Untrusted,
                (true, Some(_)) => HeldReason::Small,
                (true, None) => HeldReason::Kept,
            };
            let since = self.small_since.filter(|_| last.trusted);
            let end = since.map(|since| later(since, self.confirm_after(self.announced as usize)));
            return Some(HeldAnswer { reason, removes: 0, confirmable_in: end.map(wait) });
        };
        let removes = held().count() as u32;
        let confirmable_in = held().filter_map(|held| held.until).min().map(wait);
        Some(HeldAnswer { reason: first.reason, removes, confirmable_in })
    }
}

// === impl AnswerCounts ===

impl AnswerCounts {
    pub(super) fn count(&mut self, result: AnswerResult) {
        let counter = match result {
            AnswerResult::Changed => &mut self.changed,
            AnswerResult::Same => &mut self.same,
            AnswerResult::Held => &mut self.held,
            AnswerResult::Refused => &mut self.refused,
            AnswerResult::Failed => &mut self.failed,
        };
        *counter = counter.saturating_add(1);
    }
}
