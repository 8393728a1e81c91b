//! A member of a view, and what the view remembers of it.
//!
//! The other files of the view read and change [`Entry`]. The controller sees only
//! [`ViewMember`]. Nothing here decides about a removal.

use super::offers::OfferedMember;
use crate::discovery::Wish;
use crate::discovery::labels::MemberLabels;
use crate::model::{CriticalRule, TIER_MAX};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

/// A member of a view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ViewMember {
    /// Unique in the view: the announced name, or the address if the announced name is no
    /// valid name of a backend, or `NAME@IP:PORT` if another member still has the name.
    pub name: Arc<str>,
    /// Unique in the view; never an IPv4-mapped IPv6 address.
    pub address: SocketAddr,
    /// 1..=`weight_max`.
    pub weight: u16,
    /// 0..=[`TIER_MAX`](crate::model::TIER_MAX).
    pub tier: u8,
    /// What the source wishes for it, as far as the guards permit.
    pub wish: MemberWish,
    /// The state in the words of the source, at most [`RAW_BYTES_MAX`]; empty if it has none.
    pub raw: Arc<str>,
    /// As announced. They are not saved: the next answer has them.
    pub labels: MemberLabels,
    /// When it joined with this name and this address.
    pub since: Instant,
    /// The last answer lacks the member, and it stays for this reason.
    pub held: Option<HeldRemoval>,
}

/// Longest `raw` of a member. The rest is cut off.
pub const RAW_BYTES_MAX: usize = 64;

/// What a source wishes for a member, after the rule for critical members.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemberWish {
    /// New sessions.
    #[default]
    Sessions,
    /// No new sessions yet.
    Starting,
    /// No new sessions; open ones finish.
    Draining,
    /// A tenth of its weight.
    Suspect,
}

/// Why a member stays that the last answer lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldRemoval {
    /// The reason.
    pub reason: HeldReason,
    /// [`HeldReason::Overlap`]: when the member leaves at the latest. A reason that can be
    /// confirmed: when a trusted answer can confirm the removal. `None`: no time is known.
    pub until: Option<Instant>,
}

/// Why a member stays that the last answer lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HeldReason {
    /// Fewer than `missing` complete answers in a row lack it.
    Missing,
    /// The answer is empty or below `min_backends`, and waits for its confirmation.
    Small,
    /// The same with `empty = "keep"`: no answer confirms it.
    Kept,
    /// The answer shrinks the view by more than `max_removed`.
    MaxRemoved,
    /// An answer within the last `confirm_after` was too small, so this one can be incomplete.
    Incomplete,
    /// The answer has announcements that the source could not read. One of them was this
    /// member before, or its key is not known and it can be any member.
    Unreadable,
    /// The answer is not trusted.
    Untrusted,
    /// No other member is eligible.
    LastEligible,
    /// Newcomers of the answer are not up yet.
    Overlap,
}

/// A member, and what the view remembers of it.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) member: ViewMember,
    /// The name as announced; together with the address the identity at the source.
    pub(super) announced: Arc<str>,
    /// What the source wishes.
    pub(super) wish: Wish,
    /// When `wish` took the member out of rotation; `None` for other wishes and for a
    /// member that joined with such a wish.
    pub(super) turned: Option<Instant>,
    /// The guard against a burst of critical members ignores `wish`.
    pub(super) excused: bool,
    /// Whether the last complete answer contains it.
    pub(super) present: bool,
    /// Trusted answers lack it.
    pub(super) absence: Option<Absence>,
    /// Its removal is decided. It stays for newcomers, at most until then.
    pub(super) leaving: Option<Instant>,
    /// `member.name` does not follow `announced` yet.
    pub(super) unnamed: bool,
}

/// Trusted complete answers in a row that lack a member.
#[derive(Debug, Clone, Copy)]
pub(super) struct Absence {
    /// The first of them.
    pub(super) since: Instant,
    /// Their number.
    pub(super) answers: u32,
    /// The removal needs no further confirmation.
    pub(super) sure: bool,
}

/// Sets a value. Returns whether it differs from before.
pub(super) fn set<T: PartialEq>(place: &mut T, value: T) -> bool {
    let differs = *place != value;
    if differs {
        *place = value;
    }
    differs
}

// === impl HeldReason ===

impl HeldReason {
    /// Returns the name in `explain`.
    pub fn name(self) -> &'static str {
        match self {
            HeldReason::Missing => "missing",
            HeldReason::Small => "small",
            HeldReason::Kept => "kept",
            HeldReason::MaxRemoved => "max-removed",
            HeldReason::Incomplete => "incomplete",
            HeldReason::Unreadable => "unreadable",
            HeldReason::Untrusted => "untrusted",
            HeldReason::LastEligible => "last-eligible",
            HeldReason::Overlap => "overlap",
        }
    }

    /// Whether the answer as a whole was too small.
    pub(super) fn is_size(self) -> bool {
        matches!(self, HeldReason::Small | HeldReason::Kept | HeldReason::MaxRemoved)
    }

    /// Whether the reason holds a whole answer.
    pub(super) fn holds_answer(self) -> bool {
        match self {
            HeldReason::Missing | HeldReason::Untrusted | HeldReason::Overlap => false,
            HeldReason::Small
            | HeldReason::Kept
            | HeldReason::MaxRemoved
            | HeldReason::Incomplete
            | HeldReason::Unreadable
            | HeldReason::LastEligible => true,
        }
    }
}

// === impl MemberWish ===

impl MemberWish {
    /// Returns the name in `explain`.
    pub fn name(self) -> &'static str {
        match self {
            MemberWish::Sessions => "sessions",
            MemberWish::Starting => "starting",
            MemberWish::Draining => "draining",
            MemberWish::Suspect => "suspect",
        }
    }

    /// Whether the member gets new sessions.
    pub fn serves(self) -> bool {
        matches!(self, MemberWish::Sessions | MemberWish::Suspect)
    }
}

// === impl Entry ===

impl Entry {
    /// Returns a newcomer, still without its name.
    /// `turned`: the guard against a burst excuses it.
    pub(super) fn of(offer: &OfferedMember<'_>, turned: Option<Instant>, now: Instant) -> Entry {
        let member = ViewMember {
            name: Arc::clone(&offer.from.name),
            address: offer.address,
            weight: offer.weight,
            tier: offer.from.tier.min(TIER_MAX),
            wish: MemberWish::Starting,
            raw: offer.raw(),
            labels: offer.from.labels.clone(),
            since: now,
            held: None,
        };
        Entry {
            member,
            announced: Arc::clone(&offer.from.name),
            wish: offer.wish,
            turned,
            excused: turned.is_some(),
            present: true,
            absence: None,
            leaving: None,
            unnamed: true,
        }
    }

    /// Brings the member to what the answer announces. Only a trusted answer changes the
    /// name, since this replaces a member by another. Returns whether the member differs.
    pub(super) fn alter(&mut self, offer: &OfferedMember<'_>, trusted: bool, now: Instant) -> bool {
        let member = &mut self.member;
        let mut changed = set(&mut member.weight, offer.weight);
        changed |= set(&mut member.tier, offer.from.tier.min(TIER_MAX));
        // They change no table.
        set(&mut member.labels, offer.from.labels.clone());
        if *member.raw != *offer.raw_text() {
            member.raw = offer.raw();
            changed = true;
        }
        if trusted && self.announced != offer.from.name {
            self.announced = Arc::clone(&offer.from.name);
            self.member.since = now;
            (self.unnamed, changed) = (true, true);
        }
        if is_bad(offer.wish) && self.wish == Wish::Sessions {
            self.turned = Some(now);
        }
        if !is_bad(offer.wish) {
            (self.turned, self.excused) = (None, false);
        }
        self.wish = offer.wish;
        changed
    }

    /// Returns the wish by the rule for critical members, before the guards that keep
    /// members in rotation.
    pub(super) fn desired(&self, rule: CriticalRule) -> MemberWish {
        match (self.wish, rule) {
            (_, _) if self.excused => MemberWish::Sessions,
            (Wish::Sessions, _) => MemberWish::Sessions,
            (Wish::Starting, _) => MemberWish::Starting,
            (Wish::Critical, CriticalRule::Suspect) => MemberWish::Suspect,
            (Wish::Draining | Wish::Critical, _) => MemberWish::Draining,
        }
    }

    /// Whether the removal waits for a trusted answer.
    pub(super) fn is_held_for_trust(&self) -> bool {
        self.member.held.is_some_and(|held| held.reason == HeldReason::Untrusted)
    }

    /// Whether the removal waits for a confirmation of the answer.
    pub(super) fn holds_answer(&self) -> bool {
        self.member.held.is_some_and(|held| held.reason.holds_answer())
    }

    /// Sets why the member stays. Returns whether this differs from before.
    pub(super) fn hold(&mut self, reason: HeldReason, until: Option<Instant>) -> bool {
        set(&mut self.member.held, Some(HeldRemoval { reason, until }))
    }
}

/// Whether the wish takes a member out of rotation that served before.
pub(super) fn is_bad(wish: Wish) -> bool {
    match wish {
        Wish::Sessions | Wish::Starting => false,
        Wish::Draining | Wish::Critical => true,
    }
}
