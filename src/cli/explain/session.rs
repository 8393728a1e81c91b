//! `tidegate explain --session`: one session in sentences, one paragraph per attempt.
//!
//! Called by `explain`. It prints the document's facts and computes nothing.

use super::sentences::{PickedTier, Tense, backend, failure, number, skipped, why};
use super::short;
use crate::table::{cell_text, plural};
use std::fmt::Write;
use tidegate_api::decision::{DecisionDoc, SessionExplanation};
use tidegate_api::names::{SessionStateName, WhyName};

pub(super) fn render(session: &SessionExplanation) -> String {
    let mut text = format!("{}\n", headline(session));
    for decision in &session.decisions {
        let _ = write!(text, "\n{}\n", attempt(decision, session.route));
    }
    text
}

fn headline(session: &SessionExplanation) -> String {
    let frontend = match &session.frontend {
        Some(name) => format!("frontend {}", cell_text(name)),
        None => "a removed frontend".to_owned(),
    };
    let first = session.decisions.first();
    let at = first.map_or_else(String::new, |first| {
        // A queued session was accepted earlier.
        let event = if first.waited_seconds.is_some() { ", first pick" } else { "" };
        format!("{event} at {}", cell_text(&first.time))
    });
    let mut text = format!("Session {} of {} on {frontend}{at}.", session.session, session.client);
    if let Some(peer) = &session.peer {
        let _ = write!(text, " Its PROXY header came from {peer}.");
    }
    if let Some(route) = session.route {
        let _ = write!(text, " It took route {route}.");
    } else if first.is_some_and(|first| first.pool.is_some()) {
        text.push_str(" It took the frontend's pool.");
    }
    match &session.end {
        Some(end) => {
            let lasted = match end.lasted_seconds {
                0.0 => "less than 1 ms".to_owned(),
                lasted => short(lasted),
            };
            let _ = write!(text, " It ended after {lasted}: {}, phase {}.", end.cause, end.phase);
        }
        None if session.state == SessionStateName::Unknown => text.push_str(
            " The rest is unknown: its next decision is no longer kept, or not made yet.",
        ),
        None => text.push_str(" It is open."),
    }
    text
}

fn attempt(decision: &DecisionDoc, route: Option<u8>) -> String {
    // The time of day of `2026-11-30T12:00:01.234Z`.
    let time = decision.time.split_once('T').map_or(&*decision.time, |(_, time)| time);
    let time = cell_text(time.trim_end_matches('Z'));
    let mut text = format!("Attempt {}, {time}: ", decision.attempt);
    match (&decision.backend, &decision.pool) {
        (Some(chosen), _) => {
            let waited = decision.waited_seconds;
            let policy = decision.policy.as_ref();
            let tier = PickedTier { tier: decision.tier, spills: decision.spilled };
            let reason = why(&decision.why, policy, &decision.figures, waited, tier, Tense::Past);
            let _ = write!(text, "{} {reason}.", backend(chosen));
        }
        (None, Some(pool)) => {
            let _ = write!(text, "no backend of pool {} could be picked.", cell_text(pool));
        }
        (None, None) if decision.policy.is_some() => {
            text.push_str("no backend of a removed pool could be picked.");
        }
        (None, None) => match route {
            Some(route) => {
                let _ = write!(text, "no backend was picked: route {route} rejects the client.");
            }
            None => text.push_str("no backend was picked: the client was rejected first."),
        },
    }
    if let Some(waited) = decision.waited_seconds
        && decision.why != WhyName::Queue
    {
        let _ = write!(text, " The client had waited {}.", short(waited));
    }
    if let Some(passed) = skipped(&decision.skipped, decision.skipped_total) {
        let _ = write!(text, " Passed over: {passed}.");
    }
    if decision.pool.is_some() {
        let candidates = plural(decision.candidates, "candidate");
        let _ = write!(text, " Table {} had {candidates}.", number(decision.table));
    }
    if let Some(took) = decision.connect_seconds {
        let _ = write!(text, " Connected after {}.", short(took));
    }
    if let Some(reason) = &decision.failure {
        let (errno, after) = (decision.errno, decision.failed_after_seconds);
        let _ = write!(text, " {}", failure(reason, errno, decision.local_error, after));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::wrap;
    use expect_test::expect;

    const EXAMPLE: &str = r#"{
        "session": 4711, "frontend": "web", "client": "10.1.2.3:40112", "route": null,
        "state": "ended",
        "end": {"cause": "finished", "phase": "closed", "lasted_seconds": 2.5},
        "decisions": [{
            "time": "2026-11-30T12:00:01.234Z", "attempt": 1, "table": 9, "pool": "web",
            "policy": "weighted-round-robin", "why": "turn",
            "backend": {"pool": "web", "backend": "dead", "address": "127.0.0.1:1"},
            "candidates": 2, "figures": {"kind": "turn", "position": 2, "period": 101},
            "waited_seconds": null, "skipped": [], "skipped_total": 0,
            "connect_seconds": null, "failure": "refused", "local_error": false, "errno": 111,
            "failed_after_seconds": 0.0002
        }, {
            "time": "2026-11-30T12:00:01.234Z", "attempt": 2, "table": 9, "pool": "web",
            "policy": "weighted-round-robin", "why": "retry",
            "backend": {"pool": "web", "backend": "b", "address": "10.0.0.2:80"},
            "candidates": 2, "figures": {"kind": "of-a-newer-version", "x": 1},
            "waited_seconds": null,
            "skipped": [{"pool": "web", "backend": "dead", "address": "127.0.0.1:1",
                "reason": "tried", "seconds": 0}],
            "skipped_total": 1, "connect_seconds": 0.0004, "failure": null,
            "local_error": false, "errno": null, "failed_after_seconds": null
        }]
    }"#;

    #[test]
    fn session_reads_as_one_paragraph_per_attempt() {
        let session = serde_json::from_str(EXAMPLE).expect("the document");
        let text = wrap(&render(&session), Some(80));
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        expect![[r#"
            Session 4711 of 10.1.2.3:40112 on frontend web at 2026-11-30T12:00:01.234Z. It
                took the frontend's pool. It ended after 2.5 s: finished, phase closed.

            Attempt 1, 12:00:01.234: web/dead (127.0.0.1:1) was next in turn (position 3 of
                101). Table 9 had 2 candidates. The connect failed after 0.2 ms: refused
                (ECONNREFUSED).

            Attempt 2, 12:00:01.234: web/b (10.0.0.2:80) was picked because the attempt
                before it failed. Passed over: web/dead (already tried by this session).
                Table 9 had 2 candidates. Connected after 0.4 ms."#]]
        .assert_eq(&text);
    }

    #[test]
    fn open_and_rejected_sessions_read_as_sentences() {
        let mut session: SessionExplanation = serde_json::from_str(EXAMPLE).expect("the document");
        session.decisions.truncate(1);
        (session.end, session.route) = (None, Some(3));
        session.state = SessionStateName::Unknown;
        let unknown = "The rest is unknown: its next decision is no longer kept, or not made yet.";
        assert!(headline(&session).ends_with(unknown), "{}", headline(&session));
        session.state = SessionStateName::Open;
        let decision = &mut session.decisions[0];
        (decision.backend, decision.failure) = (None, None);
        expect![[r#"
            Session 4711 of 10.1.2.3:40112 on frontend web at 2026-11-30T12:00:01.234Z. It took route 3. It is open.

            Attempt 1, 12:00:01.234: no backend of pool web could be picked. Table 9 had 2 candidates.
        "#]].assert_eq(&render(&session));
        session.decisions[0].pool = None;
        let removed = attempt(&session.decisions[0], None);
        assert!(removed.ends_with(": no backend of a removed pool could be picked."), "{removed}");
        session.decisions[0].policy = None;
        let refused = attempt(&session.decisions[0], session.route);
        assert!(
            refused.ends_with("no backend was picked: route 3 rejects the client."),
            "{refused}"
        );
        (session.frontend, session.route) = (None, None);
        expect![[r#"
            Session 4711 of 10.1.2.3:40112 on a removed frontend at 2026-11-30T12:00:01.234Z. It is open.

            Attempt 1, 12:00:01.234: no backend was picked: the client was rejected first.
        "#]].assert_eq(&render(&session));
    }

    #[test]
    fn queued_session_has_the_time_of_its_first_pick() {
        let mut session: SessionExplanation = serde_json::from_str(EXAMPLE).expect("the document");
        session.decisions[0].waited_seconds = Some(1.5);
        let text = headline(&session);
        assert!(
            text.contains(" on frontend web, first pick at 2026-11-30T12:00:01.234Z."),
            "{text}"
        );
        let decision = &mut session.decisions[0];
        (decision.why, decision.backend) = (WhyName::None, None);
        let text = attempt(decision, None);
        assert!(text.contains("could be picked. The client had waited 1.5 s. Table 9"), "{text}");
    }
}
