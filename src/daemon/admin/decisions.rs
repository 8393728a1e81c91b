//! Renders the decisions about one session: `GET /v1/explain?session=N`.
//!
//! Called by `questions` on a blocking thread. Pure: it reads no ring and no clock.

use std::time::{Duration, UNIX_EPOCH};
use tidegate_api::decision::{
    BackendRefDoc, DecisionDoc, FiguresDoc, LoadDoc, OtherLoadDoc, SessionEndDoc,
    SessionExplanation, SkippedDoc,
};
use tidegate_api::names::SessionStateName;
use tidegate_core::control::WEIGHT_PARTS;
use tidegate_core::control::names::{BackendName, NamedIds, Names};
use tidegate_core::decision::{AttemptFailureKind, Decision, Figures, Load, Skipped};
use tidegate_core::model::{BackendId, Words};

/// Returns the ids whose names [`session`] needs.
pub(super) fn ids(decisions: &[Decision]) -> NamedIds {
    let mut ids = NamedIds::default();
    for decision in decisions {
        ids.frontends.push(decision.frontend);
        ids.pools.extend(decision.pool);
        ids.backends.extend(decision.chosen);
        ids.backends.extend(decision.skipped.named().iter().map(|skipped| skipped.backend));
        if let Figures::Loads { other: Some((other, _)), .. } = decision.figures {
            ids.backends.push(other);
        }
    }
    ids
}

/// Returns the explanation of a session from its decisions, by attempt; `None` if there is
/// no decision.
pub(super) fn session(decisions: &[Decision], names: &Names) -> Option<SessionExplanation> {
    let last = decisions.last()?;
    let end = last.outcome.end.map(|(cause, phase)| SessionEndDoc {
        cause: cause.name().into(),
        phase: phase.name().into(),
        lasted_seconds: f64::from(last.outcome.lasted_millis) / 1e3,
    });
    let state = match (&end, last.outcome.failure) {
        (Some(_), _) => SessionStateName::Ended,
        (None, None) => SessionStateName::Open,
        // Retries are overwritten before first picks.
        (None, Some(_)) => SessionStateName::Unknown,
    };
    Some(SessionExplanation {
        session: last.session,
        frontend: names.frontends.get(&last.frontend).map(|name| name.to_string()),
        client: last.client.to_string(),
        peer: last.peer.map(|peer| peer.to_string()),
        route: (last.route > 0).then_some(last.route),
        state,
        end,
        decisions: decisions.iter().map(|one| decision(one, names)).collect(),
    })
}

fn decision(decision: &Decision, names: &Names) -> DecisionDoc {
    let pool = decision.pool.and_then(|pool| names.pools.get(&pool));
    let named = |id: BackendId| {
        let pool = pool.map_or_else(String::new, |pool| pool.to_string());
        names.backends.get(&id).map_or_else(
            || BackendRefDoc { pool, backend: String::new(), address: String::new() },
            backend_ref,
        )
    };
    let outcome = &decision.outcome;
    DecisionDoc {
        time: time(decision.at_micros),
        attempt: decision.attempt,
        table: decision.serial,
        pool: pool.map(|pool| pool.to_string()),
        policy: decision.pool.map(|_| decision.policy.word().into()),
        why: decision.why.name().into(),
        backend: decision.chosen.map(named),
        tier: decision.tier,
        spilled: decision.spilled,
        candidates: decision.candidates,
        figures: figures(decision.figures, named),
        waited_seconds: (decision.waited_micros > 0).then(|| seconds(decision.waited_micros)),
        skipped: decision.skipped.named().iter().map(|one| skipped(one, named)).collect(),
        skipped_total: decision.skipped.total(),
        connect_seconds: outcome.connect_micros.map(seconds),
        failure: outcome.failure.map(|(kind, _)| kind.name().into()),
        local_error: matches!(outcome.failure, Some((AttemptFailureKind::Local(_), _))),
        errno: outcome.failure.map(|(_, errno)| errno).filter(|errno| *errno != 0),
        failed_after_seconds: outcome.failure.map(|_| seconds(outcome.failed_micros)),
    }
}

pub(super) fn backend_ref(name: &BackendName) -> BackendRefDoc {
    BackendRefDoc {
        pool: name.pool.to_string(),
        backend: name.name.to_string(),
        address: name.address.to_string(),
    }
}

pub(super) fn skipped(
    skipped: &Skipped,
    named: impl FnOnce(BackendId) -> BackendRefDoc,
) -> SkippedDoc {
    SkippedDoc {
        backend: named(skipped.backend),
        reason: skipped.reason.name().into(),
        seconds: skipped.seconds,
    }
}

pub(super) fn figures(
    figures: Figures,
    named: impl FnOnce(BackendId) -> BackendRefDoc,
) -> FiguresDoc {
    match figures.named(|id| Some(named(id))) {
        Figures::None => FiguresDoc::None,
        Figures::Turn { position, period } => FiguresDoc::Turn { position, period },
        Figures::Loads { chosen, other } => FiguresDoc::Loads {
            chosen: load(chosen),
            other: other.map(|(backend, other)| OtherLoadDoc { backend, load: load(other) }),
        },
        Figures::Slot { slot, slots, alternative } => FiguresDoc::Slot { slot, slots, alternative },
        Figures::Share { weight: one, total } => {
            FiguresDoc::Share { weight: weight(u64::from(one)), total: weight(total) }
        }
    }
}

fn load(load: Load) -> LoadDoc {
    LoadDoc {
        sessions: load.sessions,
        weight: weight(u64::from(load.weight)),
        answer_seconds: (load.answer_micros > 0).then(|| seconds(load.answer_micros)),
    }
}

/// Returns a weight of a table in the unit of the configuration.
fn weight(parts: u64) -> f64 {
    parts as f64 / f64::from(WEIGHT_PARTS)
}

fn seconds(micros: u32) -> f64 {
    f64::from(micros) / 1e6
}

fn time(micros: u64) -> String {
    humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_micros(micros)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_api::names::{FailureName, SkipReasonName, WhyName};
    use tidegate_core::decision::{Outcome, SkipReason, SkippedList, Why};
    use tidegate_core::outcome::{Cause, Phase};
    use tidegate_core::testing;

    fn names(decision: &Decision) -> Names {
        let name = |id: u32| BackendName {
            pool: "web".into(),
            name: format!("b{id}").into(),
            address: format!("10.0.0.{id}:80").into(),
        };
        let mut names = Names::default();
        names.frontends.insert(decision.frontend, "in".into());
        names.pools.extend(decision.pool.map(|pool| (pool, "web".into())));
        names.backends.extend((1..9).map(|id| (BackendId(id), name(id))));
        names
    }

    #[test]
    fn failed_attempt_and_its_retry_make_one_explanation() {
        let mut skips = SkippedList::EMPTY;
        skips.push(Skipped { backend: BackendId(3), reason: SkipReason::Tried, seconds: 0 });
        let first = Decision {
            chosen: Some(BackendId(3)),
            outcome: Outcome {
                failure: Some((AttemptFailureKind::Refused, 111)),
                failed_micros: 250,
                ..Outcome::default()
            },
            waited_micros: 0,
            ..testing::decision(7)
        };
        let second = Decision {
            at_micros: first.at_micros + 250,
            why: Why::Retry,
            chosen: Some(BackendId(4)),
            attempt: 2,
            skipped: skips,
            outcome: Outcome {
                connect_micros: Some(1_500),
                failure: None,
                failed_micros: 0,
                end: Some((Cause::Finished, Phase::Closed)),
                lasted_millis: 2_500,
            },
            ..first.clone()
        };
        let (names, both) = (names(&first), [first, second]);
        let told = session(&both[..1], &names).expect("a decision");
        assert_eq!((told.state, told.end), (SessionStateName::Unknown, None), "a retry is missing");
        let told = session(&both, &names).expect("two decisions");
        assert_eq!((told.session, told.frontend.as_deref()), (7, Some("in")));
        assert_eq!(told.state, SessionStateName::Ended);
        assert_eq!(told.end.as_ref().map(|end| end.lasted_seconds), Some(2.5));
        let [one, two] = &*told.decisions else { panic!("{told:#?}") };
        assert_eq!(one.failure, Some(FailureName::Refused));
        assert_eq!((one.errno, one.local_error), (Some(111), false));
        assert_eq!(one.failed_after_seconds, Some(0.000_25));
        assert_eq!((&two.why, two.connect_seconds), (&WhyName::Retry, Some(0.001_5)));
        assert_eq!(two.backend.as_ref().map(|backend| &*backend.address), Some("10.0.0.4:80"));
        assert_eq!(two.skipped[0].reason, SkipReasonName::Tried);
        assert_eq!(two.skipped[0].backend.backend, "b3");
        let text = serde_json::to_string(&told).expect("JSON");
        assert_eq!(serde_json::from_str::<SessionExplanation>(&text).expect("the type"), told);
    }

    #[test]
    fn open_session_with_forgotten_names_has_no_end() {
        let told = session(&[testing::decision(1)], &Names::default()).expect("a decision");
        assert_eq!((told.state, told.end, told.frontend), (SessionStateName::Open, None, None));
        assert!(session(&[], &Names::default()).is_none());
    }

    #[test]
    fn names_of_decisions_are_names_of_the_documents() {
        for why in Why::ALL {
            assert!(!matches!(WhyName::from(why.name()), WhyName::Other(_)), "{why:?}");
        }
        for reason in SkipReason::ALL {
            let name = SkipReasonName::from(reason.name());
            assert!(!matches!(name, SkipReasonName::Other(_)), "{reason:?}");
        }
        for kind in AttemptFailureKind::ALL {
            let name = FailureName::from(kind.name());
            assert!(!matches!(name, FailureName::Other(_)), "{kind:?}");
        }
        for cause in Cause::ALL {
            let name = tidegate_api::names::CauseName::from(cause.name());
            assert!(!matches!(name, tidegate_api::names::CauseName::Other(_)), "{cause:?}");
        }
        for phase in Phase::ALL {
            let name = tidegate_api::names::PhaseName::from(phase.name());
            assert!(!matches!(name, tidegate_api::names::PhaseName::Other(_)), "{phase:?}");
        }
    }
}
