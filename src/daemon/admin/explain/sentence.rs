//! The sentence of an explanation: the first fact that decides whether a backend is in
//! rotation, its evidence, and the consequence.
//!
//! Called by `explain`. Pure. `tidegate explain` prints the sentence after the verdict
//! `IN ROTATION` or `NOT IN ROTATION`; a sentence that begins with `although` continues it.

use std::time::{Duration, Instant};
use tidegate_core::balance::trial::TrialPhase;
use tidegate_core::control::explain::{Explanation, ProbeView};
use tidegate_core::discovery::view::MemberWish;
use tidegate_core::health::probe_detector::ProbeState;
use tidegate_core::health::{
    ConnectFailure, HeartbeatHealth, Intent, Observation, ProbeOutcome, RequestedState,
};
use tidegate_core::model::{Backups, Tiers, Words};
use tidegate_core::suspicion::rejections::Rejection;

/// Age up to which a rejection is mentioned. After this time without another one, the
/// sender has stopped, or Tidegate accepts its heartbeats again.
const REJECTION_AGE_MAX: Duration = Duration::from_secs(60);

/// Returns the sentence. `rejected` is the last rejected heartbeat with its name.
pub(super) fn why_sentence(explained: &Explanation, rejected: Option<&Rejection>) -> String {
    let mut text = state_sentence(explained);
    if let Some(prevented) = &explained.guards.prevented {
        text = format!("although {}: {}; {text}", prevented.evidence, prevented.reason);
    }
    text += &tier_note(explained);
    text += &released_note(explained);
    text += &cap_note(explained);
    text.push_str(none_eligible_note(explained));
    text + &rejected.map_or_else(String::new, |last| rejection_note(last, explained.now))
}

/// Returns when a backup gets sessions, and the share of a tier while sessions spill.
fn tier_note(explained: &Explanation) -> String {
    let (tier, rules) = (explained.backend.tier, explained.rules);
    if !explained.backend.eligible {
        return String::new();
    }
    if rules.tiers == Tiers::Spill {
        let share = explained.tier_shares.iter().find(|(of, _)| *of == tier);
        return match share {
            None => format!("; its tier {tier} gets no sessions, because lower tiers carry all"),
            Some((_, 100)) if tier == 0 => String::new(),
            Some((_, share)) => format!("; its tier {tier} gets {share}% of the new sessions"),
        };
    }
    match (tier, rules.backups) {
        (0, _) => String::new(),
        (1, Backups::All) => "; backup: it gets sessions only while no primary is eligible".into(),
        (_, Backups::All) => format!(
            "; backup of tier {tier}: it gets sessions only while no backend of a lower tier is \
             eligible"
        ),
        (1, Backups::One) => {
            "; backup: it gets sessions only while no primary and no backup before it is eligible"
                .into()
        }
        (_, Backups::One) => format!(
            "; backup of tier {tier}: it gets sessions only while no backend of a lower tier and \
             no backup before it is eligible"
        ),
    }
}

/// Returns when the open sessions of a backup are closed.
fn released_note(explained: &Explanation) -> String {
    let open = explained.backend.state.in_flight.get();
    match explained.closes_in.filter(|_| open > 0) {
        Some(left) => format!(
            "; a lower tier serves again, so its open sessions are closed in {} (on_recover)",
            brief(left)
        ),
        None => String::new(),
    }
}

/// Returns the first fact that decides. The operator's intent comes first, then the
/// sender's state, the wish of a member source, the wish of its agent, ejection, and
/// observation.
fn state_sentence(explained: &Explanation) -> String {
    let backend = &explained.backend;
    if backend.intent != Intent::Ready {
        return format!("an operator set it to {}", backend.intent.name());
    }
    if backend.requested != RequestedState::Ready {
        return format!("its sender reports {}", backend.requested.name());
    }
    if !backend.wish.serves() {
        return excluded_by_wish(explained);
    }
    if !backend.agent.serves() {
        return format!("its agent says {}", backend.agent.wish_word());
    }
    if backend.ejected {
        let left = explained
            .ejection
            .left
            .map_or_else(String::new, |left| format!("; its trial begins in {}", brief(left)));
        return format!("ejected{}{left}", evidence(explained, "ejected"));
    }
    if let Some(lasts) = explained.ejection.trial {
        return trial_sentence(explained, lasts);
    }
    match backend.observation {
        Observation::Down => format!("down{}", evidence(explained, "down")),
        Observation::Up | Observation::Suspect if backend.lacks_role => role_sentence(explained),
        Observation::Suspect => {
            let suspect = match backend.wish {
                MemberWish::Suspect => format!(": {}", says(explained)),
                _ => evidence(explained, "suspect"),
            };
            after_failures(explained, &format!("suspect, at 10% of its weight{suspect}"))
        }
        Observation::Up => in_rotation_sentence(explained, "up"),
        Observation::Unknown if backend.eligible => {
            in_rotation_sentence(explained, unknown(explained))
        }
        Observation::Unknown if backend.unverified => verification_sentence(explained),
        Observation::Unknown => {
            after_failures(explained, "waiting for its first probe result or heartbeat")
        }
    }
}

/// Returns the sentence of a backend without the role that its pool needs.
fn role_sentence(explained: &Explanation) -> String {
    let backend = &explained.backend;
    match backend.role {
        None => "its role is unknown".to_owned(),
        Some(_) if backend.outranked => {
            "one of several primaries, and not the one in force".to_owned()
        }
        Some(seen) => {
            let lasts = brief(explained.now.saturating_duration_since(seen.since));
            format!("its role is {} (for {lasts}), and its pool needs another", seen.role.word())
        }
    }
}

/// Returns the sentence of a backend that gets no new sessions by the wish of a member source.
fn excluded_by_wish(explained: &Explanation) -> String {
    let effect = match explained.backend.wish {
        MemberWish::Starting => "its source wishes for no sessions yet",
        _ => "drained by its source",
    };
    format!("{effect}: {}", says(explained))
}

/// Returns what the source says whose wish holds, and since when.
fn says(explained: &Explanation) -> String {
    let wish = explained.backend.wish;
    let lasts = brief(explained.wish_for);
    let Some(by) = explained.announced.iter().find(|by| by.wish == wish) else {
        let source = explained.backend.wished_by.as_deref().unwrap_or("a member source");
        return format!("{source} wishes {} (for {lasts})", wish.name());
    };
    let source = &by.source;
    match &*by.raw {
        _ if source.view.stale => {
            let silent = source.view.confirmed.map_or_else(String::new, |age| {
                format!(" for {}, longer than stale_for", brief(age))
            });
            format!("{} has given no complete answer{silent}", source.label)
        }
        "" => format!("{} wishes {} (for {lasts})", source.label, wish.name()),
        raw => format!("{} says {raw} (for {lasts})", source.label),
    }
}

/// Returns the sentence of a member that waits for its first successful connect.
fn verification_sentence(explained: &Explanation) -> String {
    let sources: Vec<&str> = explained.announced.iter().map(|by| &*by.source.label).collect();
    let announced = match sources.is_empty() {
        true => String::new(),
        false => format!(" (announced by {})", sources.join(" and ")),
    };
    let also = match explained.backend.heartbeat_health {
        HeartbeatHealth::Waiting => " and its first heartbeat",
        _ => "",
    };
    let failed = match explained.last_probe.as_ref().map(|last| (&last.outcome, last.ended)) {
        Some((
            ProbeOutcome::Failure { reason, .. }
            | ProbeOutcome::Undecided { reason, .. }
            | ProbeOutcome::Local { reason },
            at,
        )) => {
            let ago = brief(explained.now.saturating_duration_since(at));
            format!("; the last connect failed {ago} ago: {reason}")
        }
        Some((ProbeOutcome::Success { .. }, _)) | None => String::new(),
    };
    format!("waiting for a first successful connect{also}{announced}{failed}")
}

/// Returns the reason of the newest change to `state`, after a colon; empty if the history
/// has none.
fn evidence(explained: &Explanation, state: &str) -> String {
    // The newest change can have another subject, so the state is searched by name.
    let made = explained.history.iter().find(|t| t.to == state);
    made.map_or_else(String::new, |t| format!(": {}", t.reason))
}

fn trial_sentence(explained: &Explanation, lasts: Duration) -> String {
    let progress = match explained.ejection.trial_phase {
        TrialPhase::None | TrialPhase::Open => "no session has tried it yet",
        TrialPhase::Entered | TrialPhase::Claimed => "the trial session is connecting",
        TrialPhase::Connected => "the trial session is connected; neither side has sent data",
        TrialPhase::ClientSpoke => "the trial session waits for the first byte of the backend",
        TrialPhase::Passed => "the trial session has succeeded",
        TrialPhase::Failed => "the trial session has failed",
    };
    format!(
        "on trial for {} after an ejection; {progress}; a success ends the trial, a failure \
         ejects it again; ejected before{}",
        brief(lasts),
        evidence(explained, "ejected")
    )
}

/// Returns that an eligible backend is at its cap, as a suffix; empty if it is not.
fn cap_note(explained: &Explanation) -> String {
    let (open, cap) = (explained.backend.state.in_flight.get(), explained.connections_max);
    match explained.backend.eligible && cap > 0 && open >= cap {
        true => format!("; at its cap ({open} of {cap} sessions): no session until a slot is free"),
        false => String::new(),
    }
}

/// Returns what happens to new sessions while no backend of the pool is eligible, as a
/// suffix; empty if a backend is eligible.
fn none_eligible_note(explained: &Explanation) -> &'static str {
    match explained.none_eligible {
        Some("try-all") if explained.last_resort => {
            "; no backend of the pool is eligible, so it still gets new sessions \
             (when_none_eligible = \"try-all\")"
        }
        Some("try-all") => {
            "; no backend of the pool is eligible, so new sessions try the backends that are not \
             drained (when_none_eligible = \"try-all\")"
        }
        Some("refuse") => {
            "; no backend of the pool is eligible, so new sessions are reset \
             (when_none_eligible = \"refuse\")"
        }
        Some("queue") => {
            "; no backend of the pool is eligible, so new sessions wait in its queue \
             (when_none_eligible = \"wait\")"
        }
        Some("wait") => {
            "; no backend of the pool is eligible yet, so new sessions wait for the first result"
        }
        Some("former") => {
            "; no backend of the pool is eligible yet, so new sessions use the former backends"
        }
        _ => "",
    }
}

/// Returns the suffix for a backend with rejected heartbeats, else an empty string.
fn rejection_note(last: &Rejection, now: Instant) -> String {
    if last.row == 0 || now.saturating_duration_since(last.at) > REJECTION_AGE_MAX {
        return String::new();
    }
    let whose = if last.signed { "its heartbeats are" } else { "unverified heartbeats are" };
    format!("; {whose} rejected: {} ({})", last.words(), last.help)
}

/// Returns why there is no observation of an eligible backend.
fn unknown(explained: &Explanation) -> &'static str {
    if explained.backend.unverified {
        return "no connect to it has succeeded yet (in rotation because no backend of its pool \
                was eligible within startup_grace)";
    }
    match (&explained.probe, &explained.heartbeat_spec) {
        (Some(_), _) => "no probe result yet (in rotation until its first one)",
        (None, Some(_)) => "no probes configured and no heartbeats received",
        (None, None) => "no probes or heartbeats configured",
    }
}

/// Returns the sentence of a backend in rotation: its recent failures, its state, and its
/// share of the weight.
fn in_rotation_sentence(explained: &Explanation, state: &str) -> String {
    let weight = explained.weight;
    let share = match (weight.ramp, weight.load) {
        (100, 100) => "full weight".to_owned(),
        (ramp, 100) => format!("slow start at {ramp}% of its weight"),
        (100, load) => format!("reported load reduces its weight to {load}%"),
        (ramp, load) => format!("slow start at {ramp}%, reported load leaves {load}% of that"),
    };
    after_failures(explained, &format!("{state}, {share}"))
}

/// Returns `text` after the recent failures, if there are any.
fn after_failures(explained: &Explanation, text: &str) -> String {
    let failures = failures(explained);
    match failures.is_empty() {
        true => text.to_owned(),
        false => format!("{}; {text}", failures.join(", ")),
    }
}

/// Lists the recent failures: too few to remove the backend.
fn failures(explained: &Explanation) -> Vec<String> {
    let mut all = Vec::new();
    if let Some(ProbeView { state: ProbeState::Up { probes, .. }, spec, .. }) = &explained.probe
        && *probes > 0
    {
        all.push(format!("{probes} of {} probes failed in a row", spec.fall));
    }
    let failures = &explained.failures;
    let Some(recent) = failures.recent else { return all };
    let last = format!("last {} ago", brief(recent.last_ago));
    let connects = plural(recent.connects, "connect");
    let sessions = plural(recent.early_resets, "session");
    let within = brief(recent.within.max(Duration::from_millis(1)));
    let counted = match (recent.connects, recent.early_resets) {
        (_, 0) => format!("{connects} failed"),
        (0, _) => format!("{sessions} reset before the first byte"),
        _ => format!("{connects} failed and {sessions} reset before the first byte"),
    };
    let cause = match recent.last {
        ConnectFailure::EarlyReset => String::new(),
        other => format!(": {other}"),
    };
    all.push(format!("{counted} in the last {within} ({last}{cause})"));
    // The evidence of a prevented removal has the row.
    if failures.in_a_row > 0 && explained.guards.prevented.is_none() {
        all.push(match &explained.ejection.spec {
            Some(spec) => format!("{} in a row, ejection at {}", failures.in_a_row, spec.failures),
            None => format!("{} in a row, ejection is off", failures.in_a_row),
        });
    }
    all
}

fn plural(count: u32, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

/// Formats a duration for people: `40 ms`, `1.2 s`, `1m 5s`.
fn brief(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    match seconds {
        _ if seconds < 1.0 => format!("{} ms", time.as_millis()),
        _ if seconds < 60.0 => format!("{seconds:.1} s"),
        _ => humantime::format_duration(Duration::from_secs(time.as_secs())).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_core::control::explain::{EjectionView, FailuresView, GuardStatus};
    use tidegate_core::control::{AnnouncedBy, BackendStatus, SourceStatus, Weight};
    use tidegate_core::discovery::view::{AnswerCounts, RefusedCounts, ViewStatus};
    use tidegate_core::health::LastProbe;
    use tidegate_core::model::{BackendAddr, PoolId, SourceKey};
    use tidegate_core::suspicion::PathView;
    use tidegate_core::table::state::{BackendId, BackendState};
    use tidegate_core::table::tiers::TierRules;
    use tidegate_net::clock;

    fn consul() -> SourceStatus {
        SourceStatus {
            key: SourceKey { pool: "web".into(), backend: None },
            label: "consul".into(),
            moved: false,
            view: ViewStatus {
                last_word: None,
                confirmed: Some(Duration::from_secs(700)),
                version: "index 81".to_owned(),
                trusted: true,
                members: 3,
                announced: 3,
                held: 0,
                refused: RefusedCounts::default(),
                unreadable: Default::default(),
                answers: AnswerCounts::default(),
                stale: false,
                restored: false,
                burst: false,
                held_answer: None,
            },
        }
    }

    /// Returns a member of Consul with this wish and these words.
    fn member(wish: MemberWish, raw: &str) -> Explanation {
        let address = BackendAddr::Tcp(([10, 0, 0, 1], 80).into());
        let state = BackendState::new(BackendId(1), "web".into(), "a".into(), address, 1);
        let eligible = wish.serves();
        let by = AnnouncedBy {
            source: consul(),
            wish,
            raw: raw.into(),
            labels: Default::default(),
            weight: 2,
            listed_for: Duration::from_secs(90),
            held: None,
        };
        Explanation {
            now: clock::now(),
            pool: PoolId(1),
            backend: BackendStatus { wish, eligible, ..BackendStatus::plain(state, clock::now()) },
            intent_for: Duration::ZERO,
            observed_for: Duration::ZERO,
            requested_for: Duration::ZERO,
            wish_for: Duration::from_secs(125),
            announced: vec![by],
            weight: Weight { base: 2, health: 100, ramp: 100, load: 100 },
            connections_max: 0,
            probe: None,
            last_probe: None,
            probes: Default::default(),
            rules: TierRules { tiers: Tiers::Strict, backups: Backups::All },
            tier_shares: vec![(0, 100)],
            closes_in: None,
            none_eligible: None,
            last_resort: false,
            heartbeat_spec: None,
            rejected: None,
            ejection: EjectionView {
                spec: None,
                left: None,
                repeats: 0,
                trial: None,
                trial_phase: TrialPhase::None,
            },
            ramp: None,
            failures: FailuresView {
                recent: None,
                watched: Duration::ZERO,
                in_a_row: 0,
                connects_total: 0,
            },
            guards: GuardStatus {
                channel_silent: false,
                pool_frozen: None,
                all_frozen: None,
                view: PathView::default(),
                max_ejected_percent: 50,
                prevented: None,
            },
            history: Vec::new(),
        }
    }

    fn why(explained: &Explanation) -> String {
        why_sentence(explained, None)
    }

    #[test]
    fn wish_is_explained_with_its_source_and_its_words() {
        let drained = member(MemberWish::Draining, "maintenance");
        assert_eq!(why(&drained), "drained by its source: consul says maintenance (for 2m 5s)");
        let starting = member(MemberWish::Starting, "");
        assert_eq!(
            why(&starting),
            "its source wishes for no sessions yet: consul wishes starting (for 2m 5s)"
        );
        let mut suspect = member(MemberWish::Suspect, "critical");
        suspect.backend.observation = Observation::Suspect;
        assert_eq!(
            why(&suspect),
            "suspect, at 10% of its weight: consul says critical (for 2m 5s)"
        );
        let sessions = member(MemberWish::Sessions, "passing");
        assert_eq!(why(&sessions), "no probes or heartbeats configured, full weight");
    }

    #[test]
    fn operator_and_sender_are_named_before_a_wish_and_a_wish_before_an_ejection() {
        let mut drained = member(MemberWish::Draining, "critical");
        drained.backend.ejected = true;
        assert!(why(&drained).starts_with("drained by its source: consul says critical"));
        drained.backend.requested = RequestedState::Stopping;
        assert_eq!(why(&drained), "its sender reports stopping");
        drained.backend.intent = Intent::Draining;
        assert_eq!(why(&drained), "an operator set it to draining");
    }

    #[test]
    fn backup_is_explained_by_the_rule_of_its_pool() {
        let mut backup = member(MemberWish::Sessions, "passing");
        let mut note = |tier, tiers, backups, shares: &[(u8, u8)]| {
            backup.backend.tier = tier;
            (backup.rules, backup.tier_shares) = (TierRules { tiers, backups }, shares.to_vec());
            let text = why(&backup);
            text.split_once("; ").map_or(String::new(), |(_, note)| note.to_owned())
        };
        let (strict, spill) = (Tiers::Strict, Tiers::Spill);
        assert_eq!(note(0, strict, Backups::All, &[(0, 100)]), "");
        assert_eq!(
            note(1, strict, Backups::All, &[(0, 100)]),
            "backup: it gets sessions only while no primary is eligible"
        );
        assert_eq!(
            note(2, strict, Backups::One, &[(0, 100)]),
            "backup of tier 2: it gets sessions only while no backend of a lower tier and no backup \
             before it is eligible"
        );
        assert_eq!(note(0, spill, Backups::All, &[(0, 100)]), "");
        assert_eq!(
            note(1, spill, Backups::All, &[(0, 70), (1, 30)]),
            "its tier 1 gets 30% of the new sessions"
        );
        assert_eq!(
            note(2, spill, Backups::All, &[(0, 70), (1, 30)]),
            "its tier 2 gets no sessions, because lower tiers carry all"
        );
    }

    #[test]
    fn sessions_that_on_recover_closes_are_announced() {
        let mut backup = member(MemberWish::Sessions, "passing");
        backup.closes_in = Some(Duration::from_secs(8));
        assert!(!why(&backup).contains("on_recover"), "it has no session");
        assert!(backup.backend.state.in_flight.try_enter(0));
        let note =
            "; a lower tier serves again, so its open sessions are closed in 8.0 s (on_recover)";
        assert!(why(&backup).ends_with(note), "{}", why(&backup));
    }

    #[test]
    fn member_of_a_silent_source_is_drained_because_of_stale_for() {
        let mut drained = member(MemberWish::Draining, "passing");
        drained.announced[0].source.view.stale = true;
        assert_eq!(
            why(&drained),
            "drained by its source: consul has given no complete answer for 11m 40s, longer than \
             stale_for"
        );
    }

    #[test]
    fn unverified_member_waits_for_a_connect() {
        let mut waiting = member(MemberWish::Sessions, "passing");
        (waiting.backend.unverified, waiting.backend.eligible) = (true, false);
        assert_eq!(why(&waiting), "waiting for a first successful connect (announced by consul)");
        waiting.last_probe = Some(LastProbe {
            ended: waiting.now.checked_sub(Duration::from_millis(400)).unwrap(),
            outcome: ProbeOutcome::Failure {
                took: Duration::ZERO,
                reason: "connection refused".to_owned(),
            },
            confirmation: true,
        });
        assert_eq!(
            why(&waiting),
            "waiting for a first successful connect (announced by consul); the last connect failed \
             400 ms ago: connection refused"
        );
        waiting.backend.eligible = true;
        assert!(why(&waiting).starts_with("no connect to it has succeeded yet (in rotation"));
    }
}
