//! The documents of member sources, for `status` and `explain`.
//!
//! Called by their renderers with the controller's data. Pure.

use super::status::millis;
use std::time::Instant;
use tidegate_api::sources::{
    AnnouncementDoc, HeldAnswerDoc, HeldRemovalDoc, LastWordDoc, MemberSourceDoc,
    RefusedAnnouncementsDoc, SourceAnswersDoc,
};
use tidegate_core::control::{AnnouncedBy, SourceStatus};
use tidegate_core::discovery::view::{
    AnswerCounts, HeldAnswer, HeldRemoval, LastWord, RefusedCounts, ViewStatus,
};

/// Returns the document of one source.
pub(super) fn source(status: &SourceStatus) -> MemberSourceDoc {
    let SourceStatus { key, label, moved, view } = status;
    let ViewStatus { members, announced, held, trusted, stale, restored, burst, .. } = *view;
    MemberSourceDoc {
        source: label.to_string(),
        backend: key.backend.as_ref().map(ToString::to_string),
        members,
        announced,
        held,
        refused: refused(view.refused),
        unreadable: view.unreadable.keys().iter().map(ToString::to_string).collect(),
        answers: answers(view.answers),
        version: view.version.clone(),
        trusted,
        stale,
        restored,
        moved: *moved,
        burst,
        confirmed_seconds_ago: view.confirmed.map(millis),
        last_word: view.last_word.as_ref().map(last_word),
        held_answer: view.held_answer.as_ref().map(held_answer),
    }
}

/// Returns what a source says about one backend.
pub(super) fn announcement(by: &AnnouncedBy, now: Instant) -> AnnouncementDoc {
    AnnouncementDoc {
        from: source(&by.source),
        wish: by.wish.name().to_owned(),
        raw: by.raw.to_string(),
        labels: by.labels.iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
        weight: by.weight,
        listed_seconds: millis(by.listed_for),
        held: by.held.as_ref().map(|held| held_removal(held, now)),
    }
}

fn held_removal(held: &HeldRemoval, now: Instant) -> HeldRemovalDoc {
    let left = |until: Instant| until.saturating_duration_since(now);
    HeldRemovalDoc {
        reason: held.reason.name().to_owned(),
        until_seconds: held.until.map(left).map(millis),
    }
}

fn last_word(word: &LastWord) -> LastWordDoc {
    LastWordDoc {
        failure: word.failure.map(|why| why.name().to_owned()),
        detail: word.detail.clone(),
        seconds_ago: millis(word.age),
    }
}

fn held_answer(held: &HeldAnswer) -> HeldAnswerDoc {
    HeldAnswerDoc {
        reason: held.reason.name().to_owned(),
        removes: held.removes,
        confirmable_in_seconds: held.confirmable_in.map(millis),
    }
}

fn refused(counts: RefusedCounts) -> RefusedAnnouncementsDoc {
    let RefusedCounts { addresses, too_many, duplicate, unreadable, bad_name, weight_clamped } =
        counts;
    RefusedAnnouncementsDoc { addresses, too_many, duplicate, unreadable, bad_name, weight_clamped }
}

fn answers(counts: AnswerCounts) -> SourceAnswersDoc {
    let AnswerCounts { changed, same, held, refused, failed } = counts;
    SourceAnswersDoc { changed, same, held, refused, failed }
}
