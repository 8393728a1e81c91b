//! Member sources in text, for `tidegate status` and `tidegate explain`.
//!
//! Called by both with documents of the admin API. It chooses words and computes no facts.

use super::table::{age, cell_text, plural};
use tidegate_api::sources::{
    AnnouncementDoc, HeldAnswerDoc, HeldRemovalDoc, MemberSourceDoc, RefusedAnnouncementsDoc,
};

/// Describes a source in one line, and in further lines what its guards hold or refuse.
pub(super) fn describe(source: &MemberSourceDoc) -> String {
    let mut text =
        format!("{}: {}{}", name(source), plural(source.members, "member"), state(source));
    if let Some(held) = &source.held_answer {
        text.push_str(&format!("\n  ANSWER HELD: {}", held_answer(held, source.members)));
    }
    if source.burst {
        text.push_str(
            "\n  more than half of the members turned critical at once; local probes decide",
        );
    }
    let refused = refused(&source.refused, &source.unreadable);
    if !refused.is_empty() {
        text.push_str(&format!("\n  refused: {refused}"));
    }
    text
}

/// Describes what a source says about one backend.
pub(super) fn announced(announced: &AnnouncementDoc) -> String {
    let AnnouncementDoc { from, wish, raw, labels, weight, listed_seconds, held } = announced;
    let raw = if raw.is_empty() { String::new() } else { format!(" ({})", cell_text(raw)) };
    let mut text = format!(
        "{}: listed for {}, wishes {}{raw}, weight {weight}\n{}: {}",
        name(from),
        age(*listed_seconds),
        cell_text(wish),
        name(from),
        state(from).trim_start_matches(", "),
    );
    if !labels.is_empty() {
        let labels: Vec<String> =
            labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        text.push_str(&format!("\n{}: labels {}", name(from), cell_text(&labels.join(", "))));
    }
    if let Some(unread) = unread(from.refused.unreadable, &from.unreadable) {
        text.push_str(&format!("\n{}: {unread}", name(from)));
    }
    if let Some(held) = held {
        text.push_str(&format!(
            "\nSTAYS although the last answer lacks it: {}",
            held_removal(held)
        ));
    }
    text
}

fn name(source: &MemberSourceDoc) -> String {
    match &source.backend {
        Some(backend) => format!("{} (backend {})", cell_text(&source.source), cell_text(backend)),
        None => cell_text(&source.source),
    }
}

/// Describes the age and the origin of the members, as a suffix.
fn state(source: &MemberSourceDoc) -> String {
    let version = match source.version.is_empty() {
        true => String::new(),
        false => format!(", {}", cell_text(&source.version)),
    };
    let failed = source.last_word.as_ref().and_then(|word| Some((word.failure.as_ref()?, word)));
    let confirmed = source.confirmed_seconds_ago.map(age);
    let mut text = match (failed, confirmed) {
        (Some((why, word)), confirmed) => format!(
            ", NO ANSWER: {} ({}), {} ago; {}",
            cell_text(why),
            cell_text(&word.detail),
            age(word.seconds_ago),
            confirmed.map_or("no answer yet".to_owned(), |at| format!("last answer {at} ago")),
        ),
        (None, Some(at)) => format!("{version}, last answer {at} ago"),
        (None, None) => ", no answer yet".to_owned(),
    };
    if source.confirmed_seconds_ago.is_some() && failed.is_none() && !source.trusted {
        text.push_str(", not trusted: it removes no members");
    }
    if source.restored {
        text.push_str("; the members are from before the start");
    }
    if source.moved {
        text.push_str("; the members are from the former configuration");
    }
    if source.stale {
        text.push_str("; STALE: the members drain (stale_for)");
    }
    text
}

fn held_answer(held: &HeldAnswerDoc, members: u32) -> String {
    let HeldAnswerDoc { reason, removes, confirmable_in_seconds } = held;
    let what = match removes {
        0 => "it lists too few members".to_owned(),
        _ => format!("it would remove {removes} of {members}"),
    };
    let confirmed = match confirmable_in_seconds {
        Some(0.0) => "; the next answer can confirm it".to_owned(),
        Some(left) => format!("; an answer in {} can confirm it", age(*left)),
        None => "; no answer can confirm it".to_owned(),
    };
    format!("{what} ({}){confirmed}", cell_text(reason))
}

fn held_removal(held: &HeldRemovalDoc) -> String {
    let until = held.until_seconds.map(age);
    match (held.reason.as_str(), until) {
        ("overlap", Some(until)) => {
            format!("the newcomers are not up yet (overlap); it leaves in {until} at the latest")
        }
        (reason, Some(until)) => {
            format!("guard {}; an answer in {until} can confirm the removal", cell_text(reason))
        }
        (reason, None) => format!("guard {}", cell_text(reason)),
    }
}

/// Most keys of unreadable announcements in a line.
const KEYS_SHOWN_MAX: usize = 3;

fn refused(refused: &RefusedAnnouncementsDoc, unreadable: &[String]) -> String {
    let counts = [
        (refused.addresses, "outside of addresses"),
        (refused.too_many, "beyond backends_max"),
        (refused.duplicate, "with the address of another one"),
        (refused.bad_name, "named by address, because the name is not valid"),
        (refused.weight_clamped, "lowered to weight_max"),
    ];
    let counts = counts.iter().filter(|(count, _)| *count > 0);
    let mut texts: Vec<String> = counts.map(|(count, what)| format!("{count} {what}")).collect();
    texts.extend(unread(refused.unreadable, unreadable));
    texts.join(", ")
}

/// Describes the announcements that the source could not read: the first keys, and how many
/// more there are.
fn unread(count: u32, keys: &[String]) -> Option<String> {
    let shown: Vec<String> = keys.iter().take(KEYS_SHOWN_MAX).map(|key| cell_text(key)).collect();
    let more = (count as usize).saturating_sub(shown.len());
    let (shown, known) = (shown.join(", "), !shown.is_empty());
    match (count, known, more) {
        (0, ..) => None,
        (_, false, _) => Some(format!("{count} unreadable")),
        (_, true, 0) => Some(format!("{count} unreadable: {shown}")),
        (_, true, _) => Some(format!("{count} unreadable: {shown} and {more} more")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_api::sources::{LastWordDoc, SourceAnswersDoc};

    fn consul() -> MemberSourceDoc {
        MemberSourceDoc {
            source: "consul".to_owned(),
            backend: None,
            members: 10,
            announced: 10,
            held: 0,
            refused: RefusedAnnouncementsDoc::default(),
            unreadable: Vec::new(),
            answers: SourceAnswersDoc::default(),
            version: "index 81".to_owned(),
            trusted: true,
            stale: false,
            restored: false,
            moved: false,
            burst: false,
            confirmed_seconds_ago: Some(2.0),
            last_word: None,
            held_answer: None,
        }
    }

    #[test]
    fn source_that_answers_has_one_line() {
        assert_eq!(describe(&consul()), "consul: 10 members, index 81, last answer 2s ago");
    }

    #[test]
    fn failure_names_its_reason_and_the_age_of_the_members() {
        let word = LastWordDoc {
            failure: Some("connect".to_owned()),
            detail: "127.0.0.1:8500: connection refused".to_owned(),
            seconds_ago: 1.0,
        };
        let away = MemberSourceDoc { last_word: Some(word), ..consul() };
        assert_eq!(
            describe(&away),
            "consul: 10 members, NO ANSWER: connect (127.0.0.1:8500: connection refused), 1s \
             ago; last answer 2s ago"
        );
    }

    #[test]
    fn unreadable_announcements_have_their_first_keys() {
        let unreadable = ["a", "b\u{1b}", "c", "d"].map(str::to_owned).to_vec();
        let refused = RefusedAnnouncementsDoc { unreadable: 5, ..consul().refused };
        let text = describe(&MemberSourceDoc { refused, unreadable, ..consul() });
        assert!(text.contains("\n  refused: 5 unreadable: a, b"), "{text}");
        assert!(text.ends_with(", c and 2 more") && !text.contains('\u{1b}'), "{text}");
    }

    #[test]
    fn held_answer_says_what_it_would_remove_and_what_confirms_it() {
        let held = HeldAnswerDoc {
            reason: "max-removed".to_owned(),
            removes: 9,
            confirmable_in_seconds: Some(8.0),
        };
        let text = describe(&MemberSourceDoc { held_answer: Some(held), ..consul() });
        assert!(
            text.contains(
                "ANSWER HELD: it would remove 9 of 10 (max-removed); an answer in 8s can confirm it"
            ),
            "{text}"
        );
    }
}
