//! Which members get new sessions: the wishes of the source, the guard against a burst of
//! critical members, and the age of the view.
//!
//! [`View`] calls it with each complete answer and at each step. Nothing here adds or
//! removes a member.
//!
//! - A source that takes more than half of an answer's members out of rotation within
//!   [`BURST_TIME`] is not believed: these members keep their sessions, and local probes
//!   decide. The wishes count again when at most half of an answer's members have such a
//!   wish. The same applies to a first answer with several members that all have such a wish.
//! - A wish never takes the last eligible backend of the pool out of rotation.
//! - After `stale_for` without an answer, all members drain that only this source lists. One
//!   stays if no other backend of the pool is eligible.

use super::member::{Entry, MemberWish, is_bad, set};
use super::notices::NoticeKind;
use super::offers::OfferedMember;
use super::{LocalSight, View};
use crate::discovery::Wish;
use crate::model::CriticalRule;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Time in which more than half of a view must turn critical for the guard.
pub const BURST_TIME: Duration = Duration::from_secs(2);

// === impl View ===

impl View {
    /// Starts and ends the guard against a burst. With `critical = "remove"`, members that
    /// are critical count as absent, unless the guard excuses them. Returns whether the
    /// guard excuses newcomers, too.
    pub(super) fn judge_burst(
        &mut self,
        joining: &mut Vec<&OfferedMember<'_>>,
        now: Instant,
    ) -> bool {
        // The source never had a member that could have turned.
        let is_first = self.entries.is_empty() && !self.answered && !self.heard;
        let members = || self.entries.iter().filter(|entry| entry.present);
        let is_recent = |at: Instant| now.saturating_duration_since(at) <= BURST_TIME;
        let turned = members().filter(|entry| entry.turned.is_some_and(is_recent)).count();
        let bad_joining = joining.iter().filter(|offer| is_bad(offer.wish)).count();
        let bad = members().filter(|entry| is_bad(entry.wish)).count() + bad_joining;
        let all = members().count() + joining.len();
        let is_all_new = is_first && all > 1 && bad_joining == all;
        if self.burst.is_none() && (turned * 2 > all || is_all_new) {
            self.burst = Some(now);
            self.notices.add(NoticeKind::Burst { critical: bad as u32, of: all as u32 }, now);
        } else if self.burst.is_some() && bad * 2 <= all {
            self.burst = None;
            self.entries.iter_mut().for_each(|entry| entry.excused = false);
            self.notices.add(NoticeKind::BurstEnded, now);
        }
        if let Some(start) = self.burst {
            let in_burst = |at: Instant| at + BURST_TIME >= start;
            for entry in self.entries.iter_mut().filter(|entry| is_bad(entry.wish)) {
                entry.excused |= entry.turned.is_some_and(in_burst);
            }
        }
        let excuses_newcomers = is_all_new && self.burst == Some(now);
        if self.guards.critical == CriticalRule::Remove {
            for entry in &mut self.entries {
                entry.present &= entry.wish != Wish::Critical || entry.excused;
            }
            joining.retain(|offer| excuses_newcomers || offer.wish != Wish::Critical);
        }
        excuses_newcomers
    }

    /// Applies `stale_for`.
    pub(super) fn judge_age(&mut self, now: Instant) {
        let age = self.confirmed.map(|at| now.saturating_duration_since(at));
        let is_stale = self.guards.stale_for.zip(age).is_some_and(|(limit, age)| age >= limit);
        let is_stale = is_stale && !self.entries.is_empty();
        if set(&mut self.stale, is_stale) {
            let age = age.unwrap_or_default();
            let kind = if is_stale { NoticeKind::Stale { age } } else { NoticeKind::StaleEnded };
            self.notices.add(kind, now);
        }
    }

    /// Sets the wish of each member.
    pub(super) fn settle_wishes(&mut self, sight: &dyn LocalSight, now: Instant) {
        let (rule, stale) = (self.guards.critical, self.stale);
        let keeper = if stale { self.freshest(sight) } else { self.last_eligible(sight) };
        if keeper != self.keeper {
            self.keeper = keeper;
            if let Some(address) = keeper.filter(|_| !stale) {
                self.notices.add(NoticeKind::LastEligible { address }, now);
            }
        }
        for entry in &mut self.entries {
            let wish = if Some(entry.member.address) == keeper {
                MemberWish::Sessions
            } else if stale && !sight.is_listed_elsewhere(entry.member.address) {
                MemberWish::Draining
            } else {
                entry.desired(rule)
            };
            self.changed |= set(&mut entry.member.wish, wish);
        }
    }

    /// Returns the member of a stale view that continues to serve: an eligible one, else
    /// one that is up; the present one first. `None` if the pool has other eligible
    /// backends.
    fn freshest(&self, sight: &dyn LocalSight) -> Option<SocketAddr> {
        let rule = self.guards.critical;
        let remains = |entry: &Entry| {
            let address = entry.member.address;
            sight.is_listed_elsewhere(address)
                && entry.desired(rule).serves()
                && sight.is_eligible(address)
        };
        if self.entries.iter().any(remains) || self.has_eligible_outside(sight) {
            return None;
        }
        let find = |fits: &dyn Fn(SocketAddr) -> bool| {
            let mut addresses = self.entries.iter().map(|entry| entry.member.address);
            self.keeper.filter(|kept| fits(*kept)).or_else(|| addresses.find(|one| fits(*one)))
        };
        let is_member = |address: SocketAddr| self.find(address).is_some();
        find(&|one| sight.is_eligible(one) && is_member(one))
            .or_else(|| find(&|one| sight.is_up(one) && is_member(one)))
    }

    /// Whether the pool has an eligible backend that this view does not list.
    pub(super) fn has_eligible_outside(&self, sight: &dyn LocalSight) -> bool {
        sight.has_eligible_outside(&|address| self.find(address).is_some())
    }

    /// Returns the member that the wishes would drain although no other backend of the pool
    /// is eligible.
    fn last_eligible(&self, sight: &dyn LocalSight) -> Option<SocketAddr> {
        let rule = self.guards.critical;
        let would_go = |entry: &&Entry| entry.member.wish.serves() && !entry.desired(rule).serves();
        if !self.entries.iter().any(|entry| would_go(&entry)) {
            return None;
        }
        let is_eligible = |entry: &&Entry| sight.is_eligible(entry.member.address);
        let serves = |entry: &&Entry| entry.desired(rule).serves();
        if self.entries.iter().filter(serves).any(|entry| is_eligible(&entry))
            || self.has_eligible_outside(sight)
        {
            return None;
        }
        let kept = self.keeper.and_then(|kept| self.find(kept));
        let mut all = kept.into_iter().chain(&self.entries).filter(would_go);
        all.find(is_eligible).map(|entry| entry.member.address)
    }

    fn find(&self, address: SocketAddr) -> Option<&Entry> {
        let place = self.entries.binary_search_by_key(&address, |entry| entry.member.address);
        place.ok().and_then(|at| self.entries.get(at))
    }
}
