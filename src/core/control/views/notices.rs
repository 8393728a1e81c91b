//! Notices of views as log lines.
//!
//! Called by `views` after each change of a view. The view has already limited their rate.
//! This module decides nothing.

use super::ViewId;
use crate::control::state::ControlState;
use crate::control::{ControlEffect, Notice, NoticeFields, NoticeLevel};
use crate::discovery::view::{HeldReason, NoticeKind, RefusedCounts, ViewNotice};
use crate::discovery::{SourceFailure, Unreadable};
use std::sync::Arc;
use std::time::Duration;

// === impl ControlState ===

impl ControlState {
    /// Logs what the view has to say.
    pub(super) fn notice_view(&mut self, id: ViewId) {
        let Some(view) = self.views.views.get_mut(&id) else { return };
        let notices = view.view.take_notices();
        let (pool, source) = (Arc::clone(&view.key.pool), view.label.to_string());
        for notice in notices {
            let (message, fields) = line(&notice);
            let suppressed = u64::from(notice.suppressed);
            let fields = NoticeFields {
                source: Some(source.clone()),
                suppressed: (suppressed > 0).then_some(suppressed),
                ..fields
            };
            let level = level(&notice.kind);
            let notice = Notice { level, pool: Arc::clone(&pool), backend: None, message, fields };
            self.pending.effects.push(ControlEffect::Notice(Box::new(notice)));
        }
    }
}

/// Returns the level: whether a guard is in effect or the source fails.
fn level(kind: &NoticeKind) -> NoticeLevel {
    match kind {
        NoticeKind::Changed { .. }
        | NoticeKind::Recovered { .. }
        | NoticeKind::Confirmed { .. }
        | NoticeKind::BurstEnded
        | NoticeKind::StaleEnded => NoticeLevel::Info,
        _ => NoticeLevel::Warn,
    }
}

/// Returns the message and its fields.
fn line(notice: &ViewNotice) -> (&'static str, NoticeFields) {
    let none = NoticeFields::default;
    match &notice.kind {
        NoticeKind::Changed { joined, left, members, version } => (
            "members of a source have changed",
            NoticeFields {
                joined: count(*joined),
                removed: count(*left),
                members: count(*members),
                version: Some(version.clone()),
                ..none()
            },
        ),
        NoticeKind::Kept { why, detail, age } => (
            "member source gives no answer; keeping its last members",
            NoticeFields {
                reason: Some(format!("{why}: {detail}")),
                age: span(*age),
                help: failure_help(*why),
                ..none()
            },
        ),
        NoticeKind::Recovered { after } => {
            ("member source answers again", NoticeFields { age: span(*after), ..none() })
        }
        NoticeKind::Held { reason, removes, members } => (
            "answer of a member source would remove members; keeping them",
            NoticeFields {
                reason: Some(held_text(*reason).to_owned()),
                removed: count(*removes),
                members: count(*members),
                help: held_help(*reason),
                ..none()
            },
        ),
        NoticeKind::Confirmed { removed } => (
            "second answer of a member source confirms the removal of members",
            NoticeFields { removed: count(*removed), ..none() },
        ),
        NoticeKind::Refused { counts, unreadable } => (
            "announced members are ignored or changed",
            NoticeFields {
                reason: Some(refused_text(counts, unreadable)),
                help: "correct the announcements, or the keys addresses, backends_max and \
                       weight_max of the pool",
                ..none()
            },
        ),
        other => wish_line(other),
    }
}

/// As [`line`], for wishes and ages.
fn wish_line(kind: &NoticeKind) -> (&'static str, NoticeFields) {
    let none = NoticeFields::default;
    match kind {
        NoticeKind::Burst { critical, of } => (
            "member source reports most members critical at once; probes of this host decide",
            NoticeFields {
                removed: count(*critical),
                members: count(*of),
                help: "check the health checks of the registry",
                ..none()
            },
        ),
        NoticeKind::BurstEnded => ("states that the member source reports count again", none()),
        NoticeKind::LastEligible { address } => (
            "member source takes the last eligible member out of rotation; it stays",
            NoticeFields { address: Some(address.to_string()), ..none() },
        ),
        NoticeKind::Stale { age } => (
            "last answer of a member source is older than stale_for; draining its members",
            NoticeFields { age: span(*age), help: "restore the member source", ..none() },
        ),
        NoticeKind::StaleEnded => {
            ("member source answers again; its members are no longer drained", none())
        }
        // `line` has the others.
        _ => ("member source has changed", none()),
    }
}

fn count(number: u32) -> Option<u64> {
    Some(number.into())
}

/// Returns a duration in whole milliseconds below one second, else in whole seconds.
fn span(time: Duration) -> Option<String> {
    let rounded = match time.as_secs() {
        0 => Duration::from_millis(u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
        seconds => Duration::from_secs(seconds),
    };
    Some(humantime::format_duration(rounded).to_string())
}

fn failure_help(why: SourceFailure) -> &'static str {
    match why {
        SourceFailure::Connect => "check the address of the server and the network",
        SourceFailure::Timeout => "check the load of the server, or raise its timeout",
        SourceFailure::Auth => "check the token or the password and its permissions",
        SourceFailure::NotFound => "check the name that is asked for",
        SourceFailure::Protocol => "check that the address belongs to a server of this kind",
        SourceFailure::Compacted | SourceFailure::Stale => "check the health of the servers",
        SourceFailure::Local => "check the limits of this host and the permissions of its files",
    }
}

fn held_text(reason: HeldReason) -> &'static str {
    match reason {
        HeldReason::Missing => "fewer than `missing` answers in a row lack them",
        HeldReason::Small => "the answer has fewer members than min_backends",
        HeldReason::Kept => "the answer has fewer members than min_backends, and empty = keep",
        HeldReason::MaxRemoved => "the answer removes more than max_removed",
        HeldReason::Incomplete => "an answer before it was held, so it can be incomplete",
        HeldReason::Unreadable => "parts of the answer cannot be read",
        HeldReason::Untrusted => "the answer is not current",
        HeldReason::LastEligible => "no other member is eligible",
        HeldReason::Overlap => "the members that replace them are not up yet",
    }
}

fn held_help(reason: HeldReason) -> &'static str {
    match reason {
        HeldReason::Small | HeldReason::MaxRemoved | HeldReason::Incomplete => {
            "a second answer after confirm_after removes them"
        }
        HeldReason::Kept => "set empty to confirm or accept if the members are really gone",
        HeldReason::Unreadable => "correct the announcement that cannot be read",
        HeldReason::Untrusted => "check whether the servers have a leader",
        HeldReason::Missing | HeldReason::LastEligible | HeldReason::Overlap => "",
    }
}

/// Returns the counts as text: `2 not in addresses, 1 unreadable: "web-3"`.
fn refused_text(counts: &RefusedCounts, unreadable: &Unreadable) -> String {
    let all = [
        (counts.addresses, "not in addresses"),
        (counts.too_many, "beyond backends_max"),
        (counts.duplicate, "with the address of another"),
        (counts.bad_name, "with an invalid name"),
        (counts.weight_clamped, "above weight_max"),
    ];
    let texts = all.iter().filter(|(count, _)| *count > 0);
    let mut texts: Vec<String> = texts.map(|(count, what)| format!("{count} {what}")).collect();
    texts.extend((unreadable.count() > 0).then(|| unreadable.text()));
    texts.join(", ")
}
