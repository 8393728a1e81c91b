//! A view in the state directory and in an upgrade.
//!
//! The controller saves and restores it. A restored view decides like the saved one. It
//! holds no answer of the source, so it cannot judge changed guards before the next one.

use super::base::Base;
use super::keys::MemberKeys;
use super::member::{
    Absence, Entry, HeldReason, HeldRemoval, MemberWish, RAW_BYTES_MAX, ViewMember, is_bad,
};
use super::offers::{canonical, is_usable, member_name};
use super::{View, cut};
use crate::discovery::labels::MemberLabels;
use crate::discovery::{MEMBERS_MAX, Wish};
use crate::model::{TIER_MAX, ViewGuards};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A saved view. Times are in milliseconds before the moment of saving, unless they end
/// with `in_ms`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SavedView {
    /// Whether a complete answer arrived.
    pub heard: bool,
    /// Whether a set was accepted.
    pub answered: bool,
    /// Members of the last accepted answer.
    pub base: usize,
    /// Larger sizes before, each with its end.
    pub larger_ms: Vec<(u64, usize)>,
    /// The last complete answer or sign of life.
    pub confirmed_ms: Option<u64>,
    /// The last trusted answer.
    pub read_ms: Option<u64>,
    /// The first small answer.
    pub small_ms: Option<u64>,
    /// The last answer that was held because it was too small.
    pub shrunk_ms: Option<u64>,
    /// Start of the guard against a burst of critical members.
    pub burst_ms: Option<u64>,
    /// The member that serves because no other one would be eligible.
    pub keeper: Option<SocketAddr>,
    /// Whether the members were saved with their keys.
    pub keyed: bool,
    /// In order of their addresses.
    pub members: Vec<SavedViewMember>,
}

/// A member of a saved view.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedViewMember {
    /// Its name in the view.
    pub name: Arc<str>,
    /// The name as announced; `None`: the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub announced: Option<Arc<str>>,
    /// Its key at the source; `None`: the announced name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<Arc<str>>,
    /// Where it listens.
    pub address: SocketAddr,
    /// In use.
    pub weight: u16,
    /// Whether `tier` is above 0. A program without tiers writes and reads this alone.
    #[serde(default)]
    pub backup: bool,
    /// Its tier; 0 if `backup` alone counts.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub tier: u8,
    /// What the source wishes.
    #[serde(default)]
    pub wish: Wish,
    /// The wish in use.
    #[serde(default)]
    pub in_use: MemberWish,
    /// In the words of the source.
    #[serde(default)]
    pub raw: Arc<str>,
    /// When it joined.
    pub since_ms: u64,
    /// When the wish took it out of rotation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub turned_ms: Option<u64>,
    /// The guard against a burst ignores the wish.
    #[serde(default)]
    pub excused: bool,
    /// Why it stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<HeldReason>,
    /// The first answer in a row that lacks it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub absent_ms: Option<u64>,
    /// Time from that answer until another one can confirm the removal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirm_ms: Option<u64>,
    /// Number of these answers.
    #[serde(default)]
    pub absent_answers: u32,
    /// The removal needs no further confirmation.
    #[serde(default)]
    pub absent_sure: bool,
    /// Time that it stays for newcomers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leaves_in_ms: Option<u64>,
}

fn is_zero(tier: &u8) -> bool {
    *tier == 0
}

// === impl SavedView ===

impl SavedView {
    /// Makes all ages relative to a moment that is `time` later.
    pub fn add_age(&mut self, time: Duration) {
        let more = millis(time);
        let add = |ms: &mut u64| *ms = ms.saturating_add(more);
        let ages =
            [&mut self.confirmed_ms, &mut self.read_ms, &mut self.small_ms, &mut self.burst_ms];
        ages.into_iter().flatten().for_each(add);
        self.larger_ms.iter_mut().for_each(|(end, _)| add(end));
        for member in &mut self.members {
            add(&mut member.since_ms);
            [&mut member.turned_ms, &mut member.absent_ms].into_iter().flatten().for_each(add);
            if let Some(left) = &mut member.leaves_in_ms {
                *left = left.saturating_sub(more);
            }
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn ago(now: Instant, ms: u64) -> Instant {
    now.checked_sub(Duration::from_millis(ms)).unwrap_or(now)
}

// === impl View ===

impl View {
    /// Returns the view of the state directory or of another process. Members that `guards`
    /// refuse are dropped. `stale_for` continues from the saved time.
    pub fn restore(guards: ViewGuards, saved: &SavedView, now: Instant) -> View {
        let mut view = View::new(guards);
        let time = |ms: Option<u64>| ms.map(|ms| ago(now, ms));
        (view.heard, view.answered) = (saved.heard, saved.answered);
        let larger = saved.larger_ms.iter().map(|(end, size)| (ago(now, *end), *size));
        view.base = Base::of(saved.base, larger);
        view.confirmed = time(saved.confirmed_ms);
        view.read_at = time(saved.read_ms);
        view.small_since = time(saved.small_ms);
        view.shrunk_at = time(saved.shrunk_ms);
        view.burst = time(saved.burst_ms);
        view.restored = true;
        view.seen = Some(now);
        let mut names = HashSet::new();
        let present = saved.members.iter().filter(|member| member.is_present()).count();
        let confirm_after = view.confirm_after(present);
        let entries = saved.members.iter().filter(|member| is_permitted(member, &view.guards));
        let mut entries: Vec<Entry> = entries
            .take(MEMBERS_MAX)
            .map(|member| member.restore(view.guards.weight_max, confirm_after, now))
            .collect();
        entries.sort_by_key(|entry| entry.member.address);
        entries.dedup_by_key(|entry| entry.member.address);
        entries.retain(|entry| names.insert(Arc::clone(&entry.member.name)));
        view.keeper = saved
            .keeper
            .filter(|address| entries.iter().any(|entry| entry.member.address == *address));
        let keys = saved.members.iter().filter_map(|m| Some((m.address, m.key.clone()?)));
        view.keys = MemberKeys::of(keys.take(MEMBERS_MAX), saved.keyed || entries.is_empty());
        view.entries = entries;
        view.plan(now);
        view
    }

    /// Returns the view for the state directory or another process.
    pub fn save(&self, now: Instant) -> SavedView {
        let since = |at: Instant| millis(now.saturating_duration_since(at));
        SavedView {
            heard: self.heard,
            answered: self.answered,
            base: self.base.size(),
            larger_ms: self.base.before().map(|(end, size)| (since(end), size)).collect(),
            confirmed_ms: self.confirmed.map(since),
            read_ms: self.read_at.map(since),
            small_ms: self.small_since.map(since),
            shrunk_ms: self.shrunk_at.map(since),
            burst_ms: self.burst.map(since),
            keeper: self.keeper,
            keyed: self.keys.are_known(),
            members: self.entries.iter().map(|entry| entry.save(&self.keys, now)).collect(),
        }
    }
}

/// Whether the guards permit the address, which can have changed since the view was saved.
fn is_permitted(member: &SavedViewMember, guards: &ViewGuards) -> bool {
    let address = member.address;
    canonical(address) == address && is_usable(address) && guards.permit(address.ip())
}

// === impl SavedViewMember ===

impl SavedViewMember {
    /// Whether the last complete answer contained it.
    fn is_present(&self) -> bool {
        self.held.is_none() && (self.leaves_in_ms.is_none() || self.absent_ms.is_none())
    }

    fn restore(&self, weight_max: u16, confirm_after: Duration, now: Instant) -> Entry {
        let name = self.valid_name();
        let announced = self.announced.as_ref().unwrap_or(&self.name);
        let absence = self.absent_ms.map(|ms| Absence {
            since: ago(now, ms),
            answers: self.absent_answers,
            sure: self.absent_sure,
        });
        let leaving = self.leaves_in_ms.filter(|_| absence.is_some());
        let leaving = leaving.map(|ms| super::removal::later(now, Duration::from_millis(ms)));
        let until = |reason| match reason {
            HeldReason::Overlap => leaving,
            HeldReason::Missing | HeldReason::Kept | HeldReason::Untrusted => None,
            HeldReason::Small
            | HeldReason::MaxRemoved
            | HeldReason::Incomplete
            | HeldReason::Unreadable
            | HeldReason::LastEligible => {
                let after = self.confirm_ms.map_or(confirm_after, Duration::from_millis);
                absence.map(|absence| super::removal::later(absence.since, after))
            }
        };
        let member = ViewMember {
            name,
            address: self.address,
            weight: self.weight.clamp(1, weight_max.max(1)),
            tier: self.tier.max(u8::from(self.backup)).min(TIER_MAX),
            wish: self.in_use,
            raw: cut(&self.raw, RAW_BYTES_MAX).into(),
            labels: MemberLabels::default(),
            since: ago(now, self.since_ms),
            held: self.held.map(|reason| HeldRemoval { reason, until: until(reason) }),
        };
        Entry {
            member,
            announced: Arc::clone(announced),
            wish: self.wish,
            turned: self.turned_ms.map(|ms| ago(now, ms)).filter(|_| is_bad(self.wish)),
            excused: self.excused && is_bad(self.wish),
            present: self.is_present(),
            absence,
            leaving,
            unnamed: false,
        }
    }

    /// Returns the name if the view can have given it, else the address.
    fn valid_name(&self) -> Arc<str> {
        let (plain, suffix) = self.name.split_once('@').unwrap_or((&self.name, ""));
        let has_suffix = !suffix.is_empty() && suffix == self.address.to_string();
        let valid = member_name(&plain.into(), self.address);
        if *valid == *plain && (suffix.is_empty() || has_suffix) {
            Arc::clone(&self.name)
        } else {
            self.address.to_string().into()
        }
    }
}

// === impl Entry ===

impl Entry {
    /// Returns the time from the first answer that lacks the member until another one can
    /// confirm its removal.
    fn confirm_after(&self) -> Option<Duration> {
        let held = self.member.held.filter(|held| held.reason != HeldReason::Overlap)?;
        Some(held.until?.saturating_duration_since(self.absence?.since))
    }

    fn save(&self, keys: &MemberKeys, now: Instant) -> SavedViewMember {
        let since = |at: Instant| millis(now.saturating_duration_since(at));
        let leaving = self.leaving.map(|until| until.saturating_duration_since(now));
        let announced = Some(Arc::clone(&self.announced));
        SavedViewMember {
            name: Arc::clone(&self.member.name),
            announced: announced.filter(|name| *name != self.member.name),
            key: keys.other(self.member.address).cloned(),
            address: self.member.address,
            weight: self.member.weight,
            backup: self.member.tier > 0,
            tier: self.member.tier,
            wish: self.wish,
            in_use: self.member.wish,
            raw: Arc::clone(&self.member.raw),
            since_ms: since(self.member.since),
            turned_ms: self.turned.map(since),
            excused: self.excused,
            held: self.member.held.map(|held| held.reason),
            absent_ms: self.absence.map(|absence| since(absence.since)),
            confirm_ms: self.confirm_after().map(millis),
            absent_answers: self.absence.map_or(0, |absence| absence.answers),
            absent_sure: self.absence.is_some_and(|absence| absence.sure),
            leaves_in_ms: leaving.map(millis),
        }
    }
}
