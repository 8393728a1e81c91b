//! The view: which members of one source a pool has, decided from the source's answers.
//!
//! The controller keeps one [`View`] per source of a pool. It passes each [`Told`] to
//! [`View::take`], calls [`View::step`] at [`View::next_due`], and makes [`View::members`]
//! members of the pool. Nothing here asks a source, reads a clock or knows a backend.
//!
//! An answer that removes is evidence, not an order:
//! - A failure changes nothing. Only `stale_for` limits the age of a view.
//! - Members join and change at once. A member leaves after `missing` complete answers
//!   without it, and only if no guard objects to the answer ([`HeldReason`]). A second
//!   trusted answer without the member, `confirm_after` later, overrides the guard.
//! - An answer that is not trusted neither removes a member nor confirms a removal.
//! - A newcomer that is not up keeps one leaving member in the view, at most for `overlap`.
//! - The order and the version of an answer mean nothing, only its content.
//!
//! | file | decides |
//! |---|---|
//! | `base` | what a share of removals is relative to |
//! | `offers` | which announcements can become members |
//! | `removal` | which members leave |
//! | `keys` | which members an unreadable announcement can be |
//! | `wishes` | which members get new sessions |
//! | `notices`, `status`, `saved` | what the operator and the next process read |

mod base;
mod keys;
mod member;
mod notices;
mod offers;
mod removal;
mod saved;
mod status;
#[cfg(test)]
mod tests;
mod wishes;

pub use member::{HeldReason, HeldRemoval, MemberWish, RAW_BYTES_MAX, ViewMember};
pub use notices::{NOTICE_INTERVAL, NoticeKind, ViewNotice};
pub use offers::canonical;
pub use saved::{SavedView, SavedViewMember};
pub use status::{AnswerCounts, AnswerResult, HeldAnswer, LastWord, RefusedCounts, ViewStatus};
pub use wishes::BURST_TIME;

use super::{MEMBERS_MAX, SourceFailure, Told, Unreadable, WholeSet};
use crate::model::{EmptyAnswer, ViewGuards};
use base::Base;
use keys::MemberKeys;
use member::{Entry, set};
use notices::Notices;
use offers::{OfferedMember, Offers};
use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time between two looks at local health while a newcomer or a last backend is watched.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// The same while the view is stale, or keeps the last eligible member.
const SLOW_LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Longest text of a source that is kept: versions and failures. The rest is cut off.
pub const TEXT_BYTES_MAX: usize = 300;

/// What this host knows about an address.
pub trait LocalSight {
    /// Whether this host finds the address up: by probe, heartbeat or verification.
    fn is_up(&self, address: SocketAddr) -> bool;
    /// Whether a backend with this address is eligible.
    fn is_eligible(&self, address: SocketAddr) -> bool;
    /// Whether the backend with this address stays in the pool without the view.
    fn is_listed_elsewhere(&self, address: SocketAddr) -> bool;
    /// Whether the pool has an eligible backend with none of these addresses.
    fn has_eligible_outside(&self, lists: &dyn Fn(SocketAddr) -> bool) -> bool;
}

/// The accepted members of one source.
#[derive(Debug)]
pub struct View {
    guards: ViewGuards,
    /// Sorted by address, unique by address and by name; at most [`MEMBERS_MAX`].
    entries: Vec<Entry>,
    /// The last complete answer.
    last: Option<WholeSet>,
    /// Arrival of the last trusted answer or its last repetition.
    read_at: Option<Instant>,
    /// Shrinkage is relative to it.
    base: Base,
    /// A complete answer arrived.
    heard: bool,
    answered: bool,
    /// First of the small answers that arrived before any other.
    small_since: Option<Instant>,
    /// The last answer that was held because it was too small, until one is accepted.
    shrunk_at: Option<Instant>,
    /// No answer since the restoration.
    restored: bool,
    /// Arrival of the last complete answer or sign of life.
    confirmed: Option<Instant>,
    /// `stale_for` is over.
    stale: bool,
    /// Start of the guard against a burst of critical members.
    burst: Option<Instant>,
    /// The member that serves because no other one would be eligible.
    keeper: Option<SocketAddr>,
    /// The guards changed.
    reconsider: bool,
    /// The last call that had the time.
    seen: Option<Instant>,
    due: Option<Instant>,
    /// Whether `members` differs since the start of this call.
    changed: bool,
    word: Option<Word>,
    /// First failure after the last answer.
    failing: Option<Instant>,
    keys: MemberKeys,
    refused: RefusedCounts,
    unreadable: Unreadable,
    announced: u32,
    answers: AnswerCounts,
    notices: Notices,
}

/// The last word of the source.
#[derive(Debug)]
struct Word {
    failure: Option<SourceFailure>,
    alive: bool,
    detail: String,
    at: Instant,
}

/// How an answer counts.
#[derive(Debug, Clone, Copy)]
struct Reading<'s> {
    now: Instant,
    /// When the source gave it.
    at: Instant,
    trusted: bool,
    /// The view looks at an old answer again, after a change of the guards. It is no
    /// further evidence.
    again: bool,
    unreadable: &'s Unreadable,
}

// === impl View ===

impl View {
    /// Returns an empty view.
    pub fn new(guards: ViewGuards) -> View {
        View {
            guards,
            entries: Vec::new(),
            last: None,
            read_at: None,
            base: Base::default(),
            heard: false,
            answered: false,
            small_since: None,
            shrunk_at: None,
            restored: false,
            confirmed: None,
            stale: false,
            burst: None,
            keeper: None,
            reconsider: false,
            seen: None,
            due: None,
            changed: false,
            word: None,
            failing: None,
            keys: MemberKeys::default(),
            refused: RefusedCounts::default(),
            unreadable: Unreadable::default(),
            announced: 0,
            answers: AnswerCounts::default(),
            notices: Notices::default(),
        }
    }

    /// Replaces the guards. The next [`step`](View::step) is due at once and judges the last
    /// answer by them. Members that they refuse leave as if an answer lacked them.
    pub fn set_guards(&mut self, guards: ViewGuards) {
        if self.guards == guards {
            return;
        }
        self.guards = guards;
        self.reconsider = true;
        self.due = self.seen;
    }

    /// Forgets what the answers so far lack: the next one answers another question, or comes
    /// from a source that was not followed in between. The members stay.
    pub fn forget_answers(&mut self) {
        (self.last, self.read_at) = (None, None);
        (self.small_since, self.shrunk_at, self.heard) = (None, None, false);
        for entry in &mut self.entries {
            entry.present = true;
            (entry.absence, entry.leaving, entry.member.held) = (None, None, None);
        }
        self.due = self.seen;
    }

    /// Takes a word of the source. Returns whether [`members`](View::members) differs from
    /// before.
    pub fn take(&mut self, told: &Told, now: Instant, sight: &dyn LocalSight) -> bool {
        self.begin(now);
        match told {
            Told::Whole(set) => {
                self.heard(None, false, &set.version, now);
                let reading = Reading::of(set, now);
                let result = self.read(set, reading, sight);
                self.answers.count(result);
                (self.last, self.heard) = (Some(set.clone()), true);
                self.reconsider = false;
            }
            Told::Failed { why, detail } => {
                self.heard(Some(*why), false, detail, now);
                self.answers.count(AnswerResult::Failed);
            }
            Told::Alive => {
                self.heard(None, true, "", now);
                let result = self.repeat(now, false, sight);
                self.answers.count(result);
            }
        }
        self.finish(now, sight)
    }

    /// Does what is due by time or by local health: ends overlaps, applies `stale_for`,
    /// and relieves the last eligible member. Returns whether [`members`](View::members)
    /// differs from before. Further calls, such as after a change of health, do no harm.
    pub fn step(&mut self, now: Instant, sight: &dyn LocalSight) -> bool {
        self.begin(now);
        if std::mem::take(&mut self.reconsider) {
            self.repeat(now, true, sight);
        }
        self.finish(now, sight)
    }

    /// Returns when [`step`](View::step) has something to do; `None` while nothing is
    /// pending.
    pub fn next_due(&self) -> Option<Instant> {
        self.due
    }

    /// Returns the members, sorted by address. Names and addresses are unique.
    pub fn members(&self) -> impl Iterator<Item = &ViewMember> {
        self.entries.iter().map(|entry| &entry.member)
    }

    /// Whether a guard holds the last answer.
    pub fn holds_answer(&self) -> bool {
        self.entries.iter().any(Entry::holds_answer)
    }

    /// Whether a set was accepted or restored.
    pub fn has_answer(&self) -> bool {
        self.answered
    }

    /// Returns what the operator should read, and forgets it. There is at most one notice
    /// of a kind per [`NOTICE_INTERVAL`].
    pub fn take_notices(&mut self) -> Vec<ViewNotice> {
        self.notices.take()
    }

    /// Returns the least time between an answer with this many members and the second one
    /// that confirms it.
    fn confirm_after(&self, present: usize) -> Duration {
        let hold_empty = if present == 0 { self.guards.hold_empty } else { Duration::ZERO };
        self.guards.confirm_after.max(hold_empty)
    }

    /// Returns what a small answer with this many members does.
    fn empty_rule(&self, present: usize) -> EmptyAnswer {
        match self.guards.empty {
            EmptyAnswer::Accept if present == 0 && !self.guards.hold_empty.is_zero() => {
                EmptyAnswer::Confirm
            }
            rule => rule,
        }
    }

    fn begin(&mut self, now: Instant) {
        self.changed = false;
        self.seen = Some(now);
    }

    fn finish(&mut self, now: Instant, sight: &dyn LocalSight) -> bool {
        let left = self.release(now, sight);
        if left > 0 {
            let version = self.version().to_owned();
            self.note_change(0, left, &version, now);
        }
        self.name_newcomers();
        self.judge_age(now);
        self.settle_wishes(sight, now);
        self.plan(now);
        self.changed
    }

    fn heard(&mut self, failure: Option<SourceFailure>, alive: bool, detail: &str, now: Instant) {
        match failure {
            None => {
                if let Some(since) = self.failing.take() {
                    let after = now.saturating_duration_since(since);
                    self.notices.add(NoticeKind::Recovered { after }, now);
                }
                self.confirmed = Some(now);
            }
            Some(why) => {
                let since = *self.failing.get_or_insert(now);
                let confirmed = self.confirmed.unwrap_or(since);
                let age = now.saturating_duration_since(confirmed);
                let detail = bounded(detail);
                self.notices.add(NoticeKind::Kept { why, detail, age }, now);
            }
        }
        self.word = Some(Word { failure, alive, detail: bounded(detail), at: now });
    }

    /// Reads the last complete answer again.
    fn repeat(&mut self, now: Instant, again: bool, sight: &dyn LocalSight) -> AnswerResult {
        let is_pending = again
            || self.small_since.is_some()
            || self.entries.iter().any(|entry| entry.absence.is_some());
        let Some(set) = self.last.take_if(|_| is_pending) else {
            return AnswerResult::Same;
        };
        let at = if again { self.read_at.unwrap_or(now) } else { now };
        let reading = Reading { at, again, ..Reading::of(&set, now) };
        let result = self.read(&set, reading, sight);
        self.last = Some(set);
        result
    }

    /// Brings the view to a complete answer, as far as the guards permit.
    fn read(
        &mut self,
        set: &WholeSet,
        reading: Reading<'_>,
        sight: &dyn LocalSight,
    ) -> AnswerResult {
        let was_changed = std::mem::take(&mut self.changed);
        let offers = Offers::of(&set.members, &self.guards);
        let before = self.entries.len();
        let mut joining = self.alter(&offers, reading);
        let is_excused = self.judge_burst(&mut joining, reading.now);
        let present = self.entries.iter().filter(|entry| entry.present).count() + joining.len();
        let is_first_held = self.judge_removal(present, reading);
        let joined = self.join(&joining, is_excused, reading.now);
        if !reading.trusted {
            self.base.raise(self.base.size() + joined);
        }
        let mut refused = offers.refused;
        refused.unreadable = set.unreadable.count();
        refused.too_many += (joining.len() - joined) as u32;
        self.announced = (set.members.len() as u32).saturating_add(set.unreadable.count());
        self.note_refused(refused, &set.unreadable, reading.now);
        self.keys.note(set, &self.entries);
        self.restored = false;
        self.release(reading.now, sight);
        let left = (before + joined).saturating_sub(self.entries.len());
        self.note_change(joined, left, &set.version, reading.now);
        let result = if reading.trusted && (is_first_held || self.holds_answer()) {
            AnswerResult::Held
        } else if !reading.trusted && self.entries.iter().any(Entry::is_held_for_trust) {
            AnswerResult::Refused
        } else if self.changed {
            AnswerResult::Changed
        } else {
            AnswerResult::Same
        };
        self.changed |= was_changed;
        result
    }

    /// Brings members that the answer contains to what it announces. Returns the
    /// announcements without a member.
    fn alter<'o, 's>(
        &mut self,
        offers: &'o Offers<'s>,
        reading: Reading<'_>,
    ) -> Vec<&'o OfferedMember<'s>> {
        let mut joining = Vec::new();
        let mut offers = offers.list.iter().peekable();
        for entry in &mut self.entries {
            let address = entry.member.address;
            while let Some(offer) = offers.next_if(|offer| offer.address < address) {
                joining.push(offer);
            }
            let offer = offers.next_if(|offer| offer.address == address);
            entry.present = offer.is_some();
            if let Some(offer) = offer {
                self.changed |= entry.alter(offer, reading.trusted, reading.now);
            }
        }
        joining.extend(offers);
        joining
    }

    /// Adds newcomers, as far as there is room. Leaving members make room for them. The
    /// names follow in [`name_newcomers`](View::name_newcomers).
    fn join(&mut self, joining: &[&OfferedMember<'_>], is_excused: bool, now: Instant) -> usize {
        if joining.is_empty() {
            return 0;
        }
        let mut excess = (self.entries.len() + joining.len()).saturating_sub(MEMBERS_MAX);
        if excess > 0 {
            self.entries.retain(|entry| {
                let goes = excess > 0 && entry.leaving.is_some();
                excess -= usize::from(goes);
                !goes
            });
        }
        let joined = joining.len() - excess;
        let joined_by =
            |offer: &&OfferedMember<'_>| Entry::of(offer, is_excused.then_some(now), now);
        self.entries.extend(joining[..joined].iter().map(joined_by));
        self.entries.sort_by_key(|entry| entry.member.address);
        self.changed = true;
        joined
    }

    /// Names new and renamed members. A name that another member still has gets the
    /// address as a suffix: `NAME@IP:PORT`.
    fn name_newcomers(&mut self) {
        if !self.entries.iter().any(|entry| entry.unnamed) {
            return;
        }
        let named = self.entries.iter().filter(|entry| !entry.unnamed);
        let mut used: HashSet<Arc<str>> =
            named.map(|entry| Arc::clone(&entry.member.name)).collect();
        for entry in self.entries.iter_mut().filter(|entry| entry.unnamed) {
            let address = entry.member.address;
            let mut name = offers::member_name(&entry.announced, address);
            if used.contains(&name) {
                name = format!("{name}@{address}").into();
            }
            used.insert(Arc::clone(&name));
            self.changed |= set(&mut entry.member.name, name);
            entry.unnamed = false;
        }
    }

    /// Sets the next time at which [`step`](View::step) has something to do.
    fn plan(&mut self, now: Instant) {
        let leaving = self.entries.iter().filter_map(|entry| entry.leaving).min();
        let leaving = leaving.map(|until| match until > now {
            true => until.min(now + LOOK_INTERVAL),
            false => now + SLOW_LOOK_INTERVAL,
        });
        let is_watched = self.stale || self.keeper.is_some();
        let watched = is_watched.then(|| now + SLOW_LOOK_INTERVAL);
        let age = self.guards.stale_for.zip(self.confirmed);
        let age = age.and_then(|(limit, confirmed)| confirmed.checked_add(limit));
        let age = age.filter(|_| !self.stale && !self.entries.is_empty());
        let reconsider = self.reconsider.then_some(now);
        self.due = [leaving, watched, age, reconsider].into_iter().flatten().min();
    }
}

// === impl Reading ===

impl Reading<'_> {
    fn of(set: &WholeSet, now: Instant) -> Reading<'_> {
        let (trusted, unreadable) = (set.trusted, &set.unreadable);
        Reading { now, at: now, trusted, again: false, unreadable }
    }
}

/// Cuts a text off, at most `most` bytes from its start.
fn cut(text: &str, most: usize) -> &str {
    let mut end = text.len().min(most);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

fn bounded(text: &str) -> String {
    cut(text, TEXT_BYTES_MAX).to_owned()
}
