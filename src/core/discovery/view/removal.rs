//! Which members leave: counts the answers that lack a member, judges the answer by the
//! guards, and keeps leaving members for newcomers that are not up yet.
//!
//! [`View`] calls it with each complete answer and at each step. Nothing here adds a
//! member.
//!
//! 1. A trusted answer that lacks a member starts or continues its [`Absence`].
//! 2. The answer as a whole can meet an objection: too small, too few left, unreadable
//!    announcements without a key, or an answer within the last `confirm_after` that was too
//!    small: a registry that returns from a backup is filled one member after another. Then only
//!    members leave that were already absent `confirm_after` earlier. Each member is confirmed by itself, so two answers need not be
//!    equal. An unreadable announcement with a key holds only what this key announced before.
//! 3. A member whose removal is decided leaves at once, unless it serves for a newcomer
//!    that is not up, or is the last eligible one of the pool and its removal is not
//!    confirmed.

use super::member::{Absence, Entry, HeldReason};
use super::notices::NoticeKind;
use super::{LocalSight, Reading, View};
use crate::discovery::Wish;
use crate::model::EmptyAnswer;
use std::time::{Duration, Instant};

/// Longest time that is added to an instant.
const FAR: Duration = Duration::from_secs(10 * 365 * 86_400);

/// What a guard decided about the members that an answer lacks.
#[derive(Debug, Clone, Copy, Default)]
struct Decided {
    leaving: usize,
    /// By the objection to the answer.
    held: usize,
    /// Only because their own announcements are unreadable.
    unread: usize,
}

/// Returns a later time.
pub(super) fn later(now: Instant, by: Duration) -> Instant {
    now + by.min(FAR)
}

// === impl View ===

impl View {
    /// Decides which of the members leave that the answer lacks. `present` counts those
    /// that the answer contains. Returns whether the answer is held although no member
    /// waits: it is the first one, and it is small.
    pub(super) fn judge_removal(&mut self, present: usize, reading: Reading<'_>) -> bool {
        let is_small = present < self.guards.min_backends.max(1) as usize;
        if !reading.trusted {
            self.answered |= !is_small;
            self.refuse_removal();
            return false;
        }
        let is_kept = is_small && self.empty_rule(present) == EmptyAnswer::Keep;
        self.count_absences(is_kept, reading);
        if !is_kept && !reading.again {
            self.read_at = Some(reading.at);
        }
        let is_first = is_small && !self.answered && self.holds_first(present, reading);
        if !is_small {
            self.small_since = None;
        }
        let decided = self.decide_all(present, is_small, reading);
        if !is_first && decided.held == 0 {
            self.base.accept(present, reading.at, self.window());
            (self.answered, self.shrunk_at) = (true, None);
        } else if !is_first {
            self.base.raise(present);
        }
        is_first
    }

    /// Marks the members that an answer lacks that is not trusted. They stay. A leaving
    /// member that it contains stays, too, as the answer could add it again.
    fn refuse_removal(&mut self) {
        for entry in &mut self.entries {
            if entry.present && entry.leaving.take().is_some() {
                self.changed |= entry.unhold();
            } else if entry.absence.is_none() {
                self.changed |= match entry.present {
                    true => entry.unhold(),
                    false => entry.hold(HeldReason::Untrusted, None),
                };
            }
        }
    }

    fn count_absences(&mut self, is_kept: bool, reading: Reading<'_>) {
        for entry in &mut self.entries {
            if entry.present {
                (entry.absence, entry.leaving) = (None, None);
                self.changed |= entry.unhold();
            } else if entry.leaving.is_none() && !is_kept {
                entry.count_absence(reading);
            }
        }
    }

    /// Whether a small answer waits for its confirmation, although no member does.
    fn holds_first(&mut self, present: usize, reading: Reading<'_>) -> bool {
        match self.empty_rule(present) {
            EmptyAnswer::Accept => false,
            EmptyAnswer::Keep => true,
            EmptyAnswer::Confirm => {
                let since = *self.small_since.get_or_insert(reading.now);
                reading.at.saturating_duration_since(since) < self.confirm_after(present)
            }
        }
    }

    /// Returns for how long a larger view counts after it has shrunk.
    fn window(&self) -> Duration {
        let is_limited = self.guards.max_removed < 100;
        if is_limited { self.guards.confirm_after } else { Duration::ZERO }
    }

    fn decide_all(&mut self, present: usize, is_small: bool, reading: Reading<'_>) -> Decided {
        loop {
            let objection = self.objection(present, is_small, reading);
            let decided = self.decide(objection, (present, is_small), reading);
            if decided.unread > 0 {
                self.note_held(HeldReason::Unreadable, decided.unread, reading.now);
            }
            let Some(reason) = objection else { return decided };
            if decided.leaving > 0 {
                let removed = decided.leaving as u32;
                self.notices.add(NoticeKind::Confirmed { removed }, reading.now);
                // The rest of the answer is judged by what is left.
                self.base.lower(decided.leaving, present);
                continue;
            }
            if decided.held > 0 {
                if reason.is_size() {
                    self.shrunk_at = Some(reading.at);
                }
                self.note_held(reason, decided.held, reading.now);
            }
            return decided;
        }
    }

    /// Returns what speaks against an answer that lacks members.
    fn objection(
        &self,
        present: usize,
        is_small: bool,
        reading: Reading<'_>,
    ) -> Option<HeldReason> {
        if !self.entries.iter().any(Entry::is_pending) {
            return None;
        }
        if is_small {
            return match self.empty_rule(present) {
                EmptyAnswer::Keep => Some(HeldReason::Kept),
                EmptyAnswer::Confirm => Some(HeldReason::Small),
                EmptyAnswer::Accept => None,
            };
        }
        let base = self.base.largest(reading.at, self.window());
        let shrinkage = base.saturating_sub(present);
        if shrinkage * 100 > usize::from(self.guards.max_removed) * base {
            return Some(HeldReason::MaxRemoved);
        }
        let is_incomplete = |at: Instant| reading.at.saturating_duration_since(at) < self.window();
        if self.shrunk_at.is_some_and(is_incomplete) {
            return Some(HeldReason::Incomplete);
        }
        let unreadable = reading.unreadable;
        let can_be_any = !unreadable.are_named() || !self.keys.are_known();
        (unreadable.count() > 0 && can_be_any).then_some(HeldReason::Unreadable)
    }

    fn decide(
        &mut self,
        objection: Option<HeldReason>,
        (present, is_small): (usize, bool),
        reading: Reading<'_>,
    ) -> Decided {
        let is_accepted = is_small && self.empty_rule(present) == EmptyAnswer::Accept;
        let (guards, confirm_after) = (&self.guards, self.confirm_after(present));
        let keys = &self.keys;
        let mut decided = Decided::default();
        for entry in self.entries.iter_mut().filter(|entry| entry.is_pending()) {
            let is_unread = keys.is_among(entry, reading.unreadable);
            let absence = entry.absence.as_mut().filter(|_| objection != Some(HeldReason::Kept));
            let Some(absence) = absence else {
                self.changed |= entry.hold(HeldReason::Kept, None);
                decided.held += 1;
                continue;
            };
            absence.sure |= is_accepted || absence.is_confirmed(reading.at, confirm_after);
            let confirmable = later(absence.since, confirm_after);
            match objection {
                Some(reason) if !absence.sure => {
                    self.changed |= entry.hold(reason, Some(confirmable));
                    decided.held += 1;
                }
                None if is_unread && !absence.sure => {
                    self.changed |= entry.hold(HeldReason::Unreadable, Some(confirmable));
                    decided.unread += 1;
                }
                _ if absence.answers < guards.missing => {
                    self.changed |= entry.hold(HeldReason::Missing, None);
                }
                _ => {
                    entry.leaving = Some(later(reading.now, guards.overlap));
                    decided.leaving += 1;
                }
            }
        }
        decided
    }

    /// Removes the members whose removal is decided, except those that serve for newcomers
    /// and an unconfirmed last eligible one. Returns their number.
    pub(super) fn release(&mut self, now: Instant, sight: &dyn LocalSight) -> usize {
        // Without the member that is absent for longest, fewer members are newcomers.
        let each = || Some(self.release_once(now, sight)).filter(|removed| *removed > 0);
        std::iter::from_fn(each).sum()
    }

    fn release_once(&mut self, now: Instant, sight: &dyn LocalSight) -> usize {
        let leavers = self.entries.iter().filter(|entry| entry.leaving.is_some());
        let Some(first) = leavers.filter_map(|entry| Some(entry.absence?.since)).min() else {
            return 0;
        };
        let mut fresh = self.fresh_newcomers(first, now, sight);
        let mut order: Vec<usize> = (0..self.entries.len())
            .filter(|at| self.entries[*at].leaving.is_some_and(|until| now < until))
            .collect();
        // Members that can serve stay rather than others.
        order.sort_by_key(|at| !self.can_serve(&self.entries[*at], sight));
        let mut stays: Vec<bool> =
            self.entries.iter().map(|entry| entry.leaving.is_none()).collect();
        for at in order {
            if fresh == 0 {
                break;
            }
            fresh -= 1;
            stays[at] = true;
            let entry = &mut self.entries[at];
            self.changed |= entry.hold(HeldReason::Overlap, entry.leaving);
        }
        self.keep_last_eligible(&mut stays, now, sight);
        let before = self.entries.len();
        let mut stays = stays.into_iter();
        self.entries.retain(|_| stays.next().unwrap_or(true));
        let removed = before - self.entries.len();
        self.changed |= removed > 0;
        removed
    }

    /// Whether the member gets sessions if it is a member.
    fn can_serve(&self, entry: &Entry, sight: &dyn LocalSight) -> bool {
        entry.desired(self.guards.critical).serves() && sight.is_up(entry.member.address)
    }

    /// Counts the newcomers since `first` that can serve in time and do not serve yet.
    fn fresh_newcomers(&self, first: Instant, now: Instant, sight: &dyn LocalSight) -> usize {
        let is_fresh = |entry: &&Entry| {
            let since = entry.member.since;
            let is_new = entry.leaving.is_none() && entry.absence.is_none() && since >= first;
            is_new
                && now < later(since, self.guards.overlap)
                && entry.wish != Wish::Draining
                && !self.can_serve(entry, sight)
        };
        self.entries.iter().filter(is_fresh).count()
    }

    /// Lets one member stay if no backend that stays in the pool is eligible, until its
    /// removal is confirmed.
    fn keep_last_eligible(&mut self, stays: &mut [bool], now: Instant, sight: &dyn LocalSight) {
        let rule = self.guards.critical;
        let is_eligible =
            |entry: &Entry| entry.desired(rule).serves() && sight.is_eligible(entry.member.address);
        let remains = |(entry, stays): (&Entry, &bool)| {
            (*stays || sight.is_listed_elsewhere(entry.member.address)) && is_eligible(entry)
        };
        if stays.iter().all(|stays| *stays)
            || self.entries.iter().zip(stays.iter()).any(remains)
            || self.has_eligible_outside(sight)
        {
            return;
        }
        let (read_at, after) = (self.read_at, self.guards.confirm_after);
        let is_unconfirmed = |absence: Absence| {
            !absence.sure && !read_at.is_some_and(|at| absence.is_confirmed(at, after))
        };
        let is_kept = |entry: &Entry| {
            entry.leaving.is_some()
                && is_eligible(entry)
                && entry.absence.is_some_and(is_unconfirmed)
        };
        let Some(at) = self.entries.iter().position(is_kept) else { return };
        stays[at] = true;
        let entry = &mut self.entries[at];
        let until = entry.absence.map(|absence| later(absence.since, after));
        if entry.hold(HeldReason::LastEligible, until) {
            self.changed = true;
            self.note_held(HeldReason::LastEligible, 1, now);
        }
    }
}

// === impl Entry ===

impl Entry {
    /// Whether the last answer lacks the member, and its removal is not decided.
    fn is_pending(&self) -> bool {
        !self.present && self.leaving.is_none()
    }

    fn unhold(&mut self) -> bool {
        super::set(&mut self.member.held, None)
    }

    fn count_absence(&mut self, reading: Reading<'_>) {
        match &mut self.absence {
            Some(_) if reading.again => {}
            Some(absence) => absence.answers = absence.answers.saturating_add(1),
            None => {
                self.absence = Some(Absence { since: reading.now, answers: 1, sure: false });
            }
        }
    }
}

// === impl Absence ===

impl Absence {
    /// Whether an answer at this time confirms the removal.
    fn is_confirmed(&self, at: Instant, after: Duration) -> bool {
        at.saturating_duration_since(self.since) >= after
    }
}
