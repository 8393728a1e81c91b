//! What the operator should read about a view, at most one notice of a kind per
//! [`NOTICE_INTERVAL`].
//!
//! The other files of the view add notices, the controller takes them for the log. Nothing
//! here decides anything.

use super::member::HeldReason;
use super::{RefusedCounts, View, bounded};
use crate::discovery::{SourceFailure, Unreadable};
use std::mem::discriminant;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Shortest time between two notices of one kind.
pub const NOTICE_INTERVAL: Duration = Duration::from_secs(10);

/// An event that the operator should read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ViewNotice {
    /// The event.
    pub kind: NoticeKind,
    /// When it occurred.
    pub at: Instant,
    /// Events of this kind that were suppressed since the last notice of the kind.
    pub suppressed: u32,
}

/// An event of a view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoticeKind {
    /// Members joined or left.
    Changed {
        /// Newcomers.
        joined: u32,
        /// Members that left.
        left: u32,
        /// Members now.
        members: u32,
        /// Version of the answer.
        version: String,
    },
    /// The source failed, and the view stays.
    Kept {
        /// The kind of failure.
        why: SourceFailure,
        /// What happened.
        detail: String,
        /// Time since the last answer, or since the first failure if there was none.
        age: Duration,
    },
    /// The source answers again.
    Recovered {
        /// Time since the first failure.
        after: Duration,
    },
    /// Removals of an answer are held.
    Held {
        /// The guard.
        reason: HeldReason,
        /// Members that the answer would remove.
        removes: u32,
        /// Members now.
        members: u32,
    },
    /// A second answer confirmed held removals.
    Confirmed {
        /// Members that leave.
        removed: u32,
    },
    /// An answer has announcements that are refused or changed. The notice is repeated only
    /// if the counts or the unreadable keys change.
    Refused {
        /// By reason.
        counts: RefusedCounts,
        /// Those that the source could not read.
        unreadable: Unreadable,
    },
    /// The source took more than half of the members out of rotation at once. It is not
    /// believed.
    Burst {
        /// Members with such a wish.
        critical: u32,
        /// Members now.
        of: u32,
    },
    /// At most half of the members have such a wish, so the wishes count again.
    BurstEnded,
    /// A member stays in rotation against the wish of its source, because no other one is
    /// eligible.
    LastEligible {
        /// The member.
        address: SocketAddr,
    },
    /// `stale_for` is over; the members drain.
    Stale {
        /// Time since the last answer.
        age: Duration,
    },
    /// A source answers again whose view was stale.
    StaleEnded,
}

/// Notices that were not taken, and the last one of each kind.
#[derive(Debug, Default)]
pub(super) struct Notices {
    waiting: Vec<ViewNotice>,
    /// One entry per kind.
    last: Vec<ViewNotice>,
}

// === impl Notices ===

impl Notices {
    /// Adds a notice, unless one of its kind is younger than [`NOTICE_INTERVAL`].
    pub(super) fn add(&mut self, kind: NoticeKind, now: Instant) {
        let is_kind = |notice: &&mut ViewNotice| discriminant(&notice.kind) == discriminant(&kind);
        let notice = match self.last.iter_mut().find(is_kind) {
            None => {
                let notice = ViewNotice { kind, at: now, suppressed: 0 };
                self.last.push(notice.clone());
                notice
            }
            Some(last) if now.saturating_duration_since(last.at) < NOTICE_INTERVAL => {
                last.suppressed = last.suppressed.saturating_add(1);
                return;
            }
            Some(last) => {
                let suppressed = std::mem::take(&mut last.suppressed);
                last.at = now;
                ViewNotice { kind, at: now, suppressed }
            }
        };
        let is_kind = |other: &ViewNotice| discriminant(&other.kind) == discriminant(&notice.kind);
        self.waiting.retain(|other| !is_kind(other));
        self.waiting.push(notice);
    }

    pub(super) fn take(&mut self) -> Vec<ViewNotice> {
        std::mem::take(&mut self.waiting)
    }
}

// === impl View ===

impl View {
    pub(super) fn note_change(&mut self, joined: usize, left: usize, version: &str, now: Instant) {
        if joined + left > 0 {
            let (joined, left) = (joined as u32, left as u32);
            let (members, version) = (self.entries.len() as u32, bounded(version));
            self.notices.add(NoticeKind::Changed { joined, left, members, version }, now);
        }
    }

    pub(super) fn note_held(&mut self, reason: HeldReason, removes: usize, now: Instant) {
        let (removes, members) = (removes as u32, self.entries.len() as u32);
        self.notices.add(NoticeKind::Held { reason, removes, members }, now);
    }

    pub(super) fn note_refused(
        &mut self,
        counts: RefusedCounts,
        unreadable: &Unreadable,
        now: Instant,
    ) {
        if counts == self.refused && *unreadable == self.unreadable {
            return;
        }
        (self.refused, self.unreadable) = (counts, unreadable.clone());
        if counts != RefusedCounts::default() {
            let unreadable = unreadable.clone();
            self.notices.add(NoticeKind::Refused { counts, unreadable }, now);
        }
    }
}
