//! Sentences about picks: what decided, what was passed over, why a connect failed.
//!
//! Used by `session` and `forecast`. Each name of the documents has its own sentence. A name
//! of a newer balancer is printed as it is.

use super::short;
use crate::table::cell_text;
use rustix::io::Errno;
use tidegate_api::decision::{BackendRefDoc, FiguresDoc, LoadDoc, SkippedDoc};
use tidegate_api::names::{FailureName, PolicyName, SkipReasonName, WhyName};

/// Backends passed over that a text names; it counts the others.
const SKIPPED_SHOWN: usize = 8;

/// Whether a text reports a pick or forecasts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tense {
    Past,
    Present,
}

/// Tier of the picked backend, and whether sessions spill over several.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct PickedTier {
    pub(super) tier: u8,
    pub(super) spills: bool,
}

/// Returns `pool/name (address)`.
pub(super) fn backend(backend: &BackendRefDoc) -> String {
    match backend.address.is_empty() {
        true => removed(backend),
        false => format!("{} ({})", name(backend), cell_text(&backend.address)),
    }
}

/// Returns `pool/name`.
pub(super) fn name(backend: &BackendRefDoc) -> String {
    match backend.backend.is_empty() {
        true => removed(backend),
        false => format!("{}/{}", cell_text(&backend.pool), cell_text(&backend.backend)),
    }
}

/// Describes a backend whose name is no longer known.
fn removed(backend: &BackendRefDoc) -> String {
    match backend.pool.is_empty() {
        true => "a removed backend".to_owned(),
        false => format!("a removed backend of {}", cell_text(&backend.pool)),
    }
}

/// Returns what decided, as the predicate of a sentence about the picked backend.
pub(super) fn why(
    why: &WhyName,
    policy: Option<&PolicyName>,
    figures: &FiguresDoc,
    waited_seconds: Option<f64>,
    tier: PickedTier,
    tense: Tense,
) -> String {
    let past = tense == Tense::Past;
    let (was, had) = if past { ("was", "had") } else { ("is", "has") };
    let could = if past { "could" } else { "can" };
    let figures = figures_note(figures);
    let with = |text: String| format!("{text}{}", figures.clone());
    match why {
        WhyName::None => format!("{was} not picked"),
        WhyName::Turn => with(format!("{was} next in turn")),
        WhyName::Least => with(match policy {
            Some(PolicyName::TwoChoices | PolicyName::PeakEwma) => {
                format!("{had} the lower load of two random backends")
            }
            _ => format!("{had} the lowest load"),
        }),
        WhyName::Draw => with(format!("{was} drawn at random")),
        WhyName::Hash => with(format!("{was} chosen by the hash of the client's address")),
        WhyName::Only => format!("{was} the only backend that {could} be picked"),
        WhyName::Retry => with(format!("{was} picked because the attempt before it failed")),
        WhyName::Trial => format!("{was} on trial after an ejection, and this session decides it"),
        WhyName::Queue => match waited_seconds {
            Some(waited) => {
                format!("{was} picked after {} in the queue of the pool", short(waited))
            }
            None => format!("{was} picked for the first client in the queue of the pool"),
        },
        WhyName::FailOpen => {
            let none = if past { "was" } else { "is" };
            format!(
                "{was} picked although no backend {none} eligible: the pool fails open \
                 (when_none_eligible = \"try-all\")"
            )
        }
        WhyName::Backup => backup(tier, was),
        WhyName::Sticky => format!("{was} picked by an entry of the session table"),
        WhyName::Other(other) => format!("{was} picked ({})", cell_text(other)),
    }
}

fn backup(tier: PickedTier, was: &str) -> String {
    let PickedTier { tier, spills } = tier;
    match (tier, spills) {
        (_, true) => format!(
            "{was} picked as a backup because the lower tiers {} carry only a part of the sessions \
             (tier {tier}, tiers = \"spill\")",
            if was == "was" { "could" } else { "can" }
        ),
        (0 | 1, false) => format!("{was} picked as a backup because no primary {was} eligible"),
        (_, false) => format!(
            "{was} picked as a backup because no backend of a lower tier {was} eligible (tier {tier})"
        ),
    }
}

/// Returns the figures in parentheses, or nothing.
fn figures_note(figures: &FiguresDoc) -> String {
    let text = match figures {
        FiguresDoc::None | FiguresDoc::Other => return String::new(),
        FiguresDoc::Turn { position, period } => {
            format!("position {} of {}", number(position.saturating_add(1)), number(*period))
        }
        FiguresDoc::Loads { chosen, other: None } => load(chosen),
        FiguresDoc::Loads { chosen, other: Some(other) } => {
            format!("{}; {}: {}", load(chosen), name(&other.backend), load(&other.load))
        }
        FiguresDoc::Slot { slot, slots, alternative: 0 } => {
            format!("slot {} of {}", number(u64::from(*slot) + 1), number(u64::from(*slots)))
        }
        // After 16 alternatives, the policy looks at all backends.
        FiguresDoc::Slot { alternative: 17.., .. } => {
            "no backend of the client's slots could be picked".to_owned()
        }
        FiguresDoc::Slot { slot, slots, alternative } => format!(
            "alternative {alternative} of the client's slot: slot {} of {}",
            number(u64::from(*slot) + 1),
            number(u64::from(*slots)),
        ),
        FiguresDoc::Share { weight, total } => {
            format!("weight {weight} of {total}: {:.1}%", weight / total.max(1e-9) * 100.0)
        }
    };
    format!(" ({text})")
}

fn load(load: &LoadDoc) -> String {
    let sessions = crate::table::plural(load.sessions, "session");
    match load.answer_seconds {
        Some(answer) => format!("{sessions}, weight {}, answers in {}", load.weight, short(answer)),
        None => format!("{sessions}, weight {}", load.weight),
    }
}

/// Returns the backends that were passed over, with reasons; `None` if there were none.
pub(super) fn skipped(list: &[SkippedDoc], total: u32) -> Option<String> {
    if total == 0 {
        return None;
    }
    let named = list.iter().take(SKIPPED_SHOWN);
    let mut text: Vec<String> =
        named.map(|one| format!("{} ({})", name(&one.backend), skip_reason(one))).collect();
    let more = u64::from(total).saturating_sub(text.len() as u64);
    if more > 0 {
        text.push(format!("{} more", number(more)));
    }
    Some(text.join(", "))
}

/// Returns why a backend was passed over.
fn skip_reason(skipped: &SkippedDoc) -> String {
    let time = time(skipped.seconds);
    match &skipped.reason {
        SkipReasonName::Down => format!("down for {time}"),
        SkipReasonName::Ejected => format!("ejected for {time} more"),
        SkipReasonName::Draining => format!("drained by an operator for {time}"),
        SkipReasonName::Maintenance => format!("in maintenance for {time}"),
        SkipReasonName::DrainingBySender => {
            format!("reported as not ready by its sender for {time}")
        }
        SkipReasonName::DrainingByRegistry => {
            format!("drained by a member source for {time}")
        }
        SkipReasonName::DrainedByAgent => format!("drained by its agent for {time}"),
        SkipReasonName::Unverified => format!("no connect to it has succeeded for {time}"),
        SkipReasonName::NoVerdict => format!("no probe result or heartbeat for {time}"),
        SkipReasonName::AtCap => "at its cap".to_owned(),
        SkipReasonName::TrialOpen => "its trial session is not decided".to_owned(),
        SkipReasonName::SlowStart => "its slow start limits its share".to_owned(),
        SkipReasonName::Tried => "already tried by this session".to_owned(),
        SkipReasonName::Excluded => "excluded by --without".to_owned(),
        SkipReasonName::OtherRole => "it does not have the role that the pool needs".to_owned(),
        SkipReasonName::Outranked => format!("one of several primaries for {time}"),
        SkipReasonName::Other(other) => cell_text(other),
    }
}

/// Returns why a connect attempt failed, as a sentence.
pub(super) fn failure(
    failure: &FailureName,
    errno: Option<i32>,
    local: bool,
    after: Option<f64>,
) -> String {
    // Zero: Tidegate knew that this host cannot connect.
    let after = after.filter(|after| *after > 0.0);
    let after = after.map_or_else(String::new, |after| format!(" after {}", short(after)));
    let what = match failure {
        FailureName::Refused => "refused".to_owned(),
        FailureName::Timeout => "no answer within connect_timeout".to_owned(),
        FailureName::Unreachable => "the backend is unreachable".to_owned(),
        FailureName::EarlyReset => {
            let errno = errno.map_or_else(String::new, |errno| format!(" ({})", errno_name(errno)));
            return format!(
                "The backend reset the connection{after}, before its first byte{errno}."
            );
        }
        FailureName::Unspecified if local => "error of this host".to_owned(),
        FailureName::Unspecified => "error of the backend or its path".to_owned(),
        FailureName::Descriptors => "this host has no free file descriptor".to_owned(),
        FailureName::Ports => "this host has no free local port".to_owned(),
        FailureName::Memory => "this host is out of memory".to_owned(),
        FailureName::Route => "this host has no route".to_owned(),
        FailureName::Other(other) => cell_text(other),
    };
    let errno = errno.map_or_else(String::new, |errno| format!(" ({})", errno_name(errno)));
    format!("The connect failed{after}: {what}{errno}.")
}

/// Returns the symbol of an errno that a connect can fail with.
fn errno_name(errno: i32) -> String {
    let known = [
        (Errno::CONNREFUSED, "ECONNREFUSED"),
        (Errno::CONNRESET, "ECONNRESET"),
        (Errno::TIMEDOUT, "ETIMEDOUT"),
        (Errno::HOSTUNREACH, "EHOSTUNREACH"),
        (Errno::HOSTDOWN, "EHOSTDOWN"),
        (Errno::NETUNREACH, "ENETUNREACH"),
        (Errno::NETDOWN, "ENETDOWN"),
        (Errno::NOENT, "ENOENT"),
        (Errno::ACCESS, "EACCES"),
        (Errno::PERM, "EPERM"),
        (Errno::ADDRNOTAVAIL, "EADDRNOTAVAIL"),
        (Errno::ADDRINUSE, "EADDRINUSE"),
        (Errno::MFILE, "EMFILE"),
        (Errno::NFILE, "ENFILE"),
        (Errno::NOMEM, "ENOMEM"),
        (Errno::NOBUFS, "ENOBUFS"),
        (Errno::NOSPC, "ENOSPC"),
        (Errno::PIPE, "EPIPE"),
    ];
    let name = known.iter().find(|(known, _)| known.raw_os_error() == errno);
    name.map_or_else(|| format!("errno {errno}"), |(_, name)| (*name).to_owned())
}

/// Returns a whole number of seconds as text: `41 s`, `2m 5s`.
fn time(seconds: u32) -> String {
    match seconds {
        0 => "less than 1 s".to_owned(),
        1..60 => format!("{seconds} s"),
        _ => crate::table::age(f64::from(seconds)),
    }
}

/// Returns a number with commas: `65,537`.
pub(super) fn number(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;
    use tidegate_api::decision::OtherLoadDoc;

    fn of(backend: &str) -> BackendRefDoc {
        let address = "10.0.0.1:80".to_owned();
        BackendRefDoc { pool: "web".to_owned(), backend: backend.to_owned(), address }
    }

    #[test]
    fn each_reason_of_a_pick_has_a_sentence() {
        let names = [
            "none",
            "turn",
            "least",
            "draw",
            "hash",
            "only",
            "retry",
            "trial",
            "queue",
            "fail-open",
            "backup",
            "sticky",
            "by-mood",
        ];
        let sentence = |name: &&str, tense| {
            let tier = PickedTier::default();
            why(&WhyName::from(*name), None, &FiguresDoc::None, Some(1.25), tier, tense)
        };
        let past: Vec<_> = names.iter().map(|name| sentence(name, Tense::Past)).collect();
        expect![[r#"
            was not picked
            was next in turn
            had the lowest load
            was drawn at random
            was chosen by the hash of the client's address
            was the only backend that could be picked
            was picked because the attempt before it failed
            was on trial after an ejection, and this session decides it
            was picked after 1.25 s in the queue of the pool
            was picked although no backend was eligible: the pool fails open (when_none_eligible = "try-all")
            was picked as a backup because no primary was eligible
            was picked by an entry of the session table
            was picked (by-mood)"#]]
        .assert_eq(&past.join("\n"));
        let present: Vec<_> = names.iter().map(|name| sentence(name, Tense::Present)).collect();
        expect![[r#"
            is not picked
            is next in turn
            has the lowest load
            is drawn at random
            is chosen by the hash of the client's address
            is the only backend that can be picked
            is picked because the attempt before it failed
            is on trial after an ejection, and this session decides it
            is picked after 1.25 s in the queue of the pool
            is picked although no backend is eligible: the pool fails open (when_none_eligible = "try-all")
            is picked as a backup because no primary is eligible
            is picked by an entry of the session table
            is picked (by-mood)"#]]
        .assert_eq(&present.join("\n"));
    }

    #[test]
    fn backup_is_picked_because_of_its_tier() {
        let sentence = |tier, spills, tense| {
            let tier = PickedTier { tier, spills };
            why(&WhyName::Backup, None, &FiguresDoc::None, None, tier, tense)
        };
        let all = [
            sentence(1, false, Tense::Past),
            sentence(2, false, Tense::Past),
            sentence(1, true, Tense::Past),
            sentence(2, true, Tense::Present),
        ];
        expect![[r#"
            was picked as a backup because no primary was eligible
            was picked as a backup because no backend of a lower tier was eligible (tier 2)
            was picked as a backup because the lower tiers could carry only a part of the sessions (tier 1, tiers = "spill")
            is picked as a backup because the lower tiers can carry only a part of the sessions (tier 2, tiers = "spill")"#]]
        .assert_eq(&all.join("\n"));
    }

    #[test]
    fn each_kind_of_figures_has_a_text() {
        let load = |sessions, answer_seconds| LoadDoc { sessions, weight: 2.0, answer_seconds };
        let other = OtherLoadDoc { backend: of("b"), load: load(5, None) };
        let all = [
            (WhyName::Turn, FiguresDoc::Turn { position: 2, period: 101 }),
            (WhyName::Least, FiguresDoc::Loads { chosen: load(1, None), other: Some(other) }),
            (WhyName::Least, FiguresDoc::Loads { chosen: load(0, Some(0.012)), other: None }),
            (WhyName::Hash, FiguresDoc::Slot { slot: 40_210, slots: 65_537, alternative: 0 }),
            (WhyName::Hash, FiguresDoc::Slot { slot: 7, slots: 65_537, alternative: 2 }),
            (WhyName::Hash, FiguresDoc::Slot { slot: 7, slots: 65_537, alternative: 17 }),
            (WhyName::Draw, FiguresDoc::Share { weight: 1.0, total: 4.0 }),
            (WhyName::Draw, FiguresDoc::Other),
        ];
        let policy = Some(&PolicyName::TwoChoices);
        let text: Vec<_> = all
            .iter()
            .map(|(one, figures)| {
                why(one, policy, figures, None, PickedTier::default(), Tense::Past)
            })
            .collect();
        expect![[r#"
            was next in turn (position 3 of 101)
            had the lower load of two random backends (1 session, weight 2; web/b: 5 sessions, weight 2)
            had the lower load of two random backends (0 sessions, weight 2, answers in 12 ms)
            was chosen by the hash of the client's address (slot 40,211 of 65,537)
            was chosen by the hash of the client's address (alternative 2 of the client's slot: slot 8 of 65,537)
            was chosen by the hash of the client's address (no backend of the client's slots could be picked)
            was drawn at random (weight 1 of 4: 25.0%)
            was drawn at random"#]]
        .assert_eq(&text.join("\n"));
    }

    #[test]
    fn each_reason_to_pass_over_a_backend_has_a_text() {
        let names = [
            "down",
            "ejected",
            "draining",
            "maintenance",
            "draining-by-sender",
            "draining-by-registry",
            "no-verdict",
            "unverified",
            "at-cap",
            "trial-open",
            "slow-start",
            "tried",
            "excluded",
            "other-role",
            "outranked",
            "draining-by-agent",
            "new-reason",
        ];
        let one = |name: &&str| SkippedDoc {
            backend: of("b"),
            reason: SkipReasonName::from(*name),
            seconds: 41,
        };
        let text: Vec<_> = names.iter().map(|name| skip_reason(&one(name))).collect();
        expect![[r#"
            down for 41 s
            ejected for 41 s more
            drained by an operator for 41 s
            in maintenance for 41 s
            reported as not ready by its sender for 41 s
            drained by a member source for 41 s
            no probe result or heartbeat for 41 s
            no connect to it has succeeded for 41 s
            at its cap
            its trial session is not decided
            its slow start limits its share
            already tried by this session
            excluded by --without
            it does not have the role that the pool needs
            one of several primaries for 41 s
            drained by its agent for 41 s
            new-reason"#]]
        .assert_eq(&text.join("\n"));
        let list: Vec<_> = names.iter().take(2).map(one).collect();
        let text = skipped(&list, 1_002).expect("some were passed over");
        assert_eq!(text, "web/b (down for 41 s), web/b (ejected for 41 s more), 1,000 more");
        assert_eq!(skipped(&[], 0), None);
    }

    #[test]
    fn each_failure_of_a_connect_has_a_sentence() {
        let names = [
            "refused",
            "timeout",
            "unreachable",
            "early-reset",
            "other",
            "descriptors",
            "ports",
            "memory",
            "route",
            "moved",
        ];
        let mut text: Vec<_> = names
            .iter()
            .map(|name| failure(&FailureName::from(*name), Some(111), false, Some(0.000_2)))
            .collect();
        text.push(failure(&FailureName::Unspecified, Some(999), true, None));
        text.push(failure(&FailureName::Ports, Some(99), true, Some(0.0)));
        expect![[r#"
            The connect failed after 0.2 ms: refused (ECONNREFUSED).
            The connect failed after 0.2 ms: no answer within connect_timeout (ECONNREFUSED).
            The connect failed after 0.2 ms: the backend is unreachable (ECONNREFUSED).
            The backend reset the connection after 0.2 ms, before its first byte (ECONNREFUSED).
            The connect failed after 0.2 ms: error of the backend or its path (ECONNREFUSED).
            The connect failed after 0.2 ms: this host has no free file descriptor (ECONNREFUSED).
            The connect failed after 0.2 ms: this host has no free local port (ECONNREFUSED).
            The connect failed after 0.2 ms: this host is out of memory (ECONNREFUSED).
            The connect failed after 0.2 ms: this host has no route (ECONNREFUSED).
            The connect failed after 0.2 ms: moved (ECONNREFUSED).
            The connect failed: error of this host (errno 999).
            The connect failed: this host has no free local port (EADDRNOTAVAIL)."#]]
        .assert_eq(&text.join("\n"));
    }

    #[test]
    fn numbers_have_commas() {
        let all = [0, 12, 999, 1_000, 65_537, 1_234_567].map(number);
        assert_eq!(all, ["0", "12", "999", "1,000", "65,537", "1,234,567"]);
    }
}
