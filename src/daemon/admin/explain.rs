//! Renders `/v1/pools/{pool}/backends/{name}/explain`: one backend and every fact
//! that decides which sessions it gets.
//!
//! Called by the control loop with the controller's [`Explanation`]. Pure: it reads
//! no clock and does no I/O.

mod sentence;

use super::status::{frozen, last_transition, millis, thousandths};
use super::{rejections, sources};
use sentence::why_sentence;
use std::time::{Duration, Instant};
use tidegate_api::explain::{
    AgentDoc, EjectionDoc, ExplainDoc, FailuresDoc, GuardsDoc, HeartbeatDoc, LastProbeDoc,
    PicksDoc, PreventedDoc, ProbeDoc, SenderDoc, SlowStartDoc, WeightDoc,
};
use tidegate_api::names::{ProbeKindName, ProbeResultName};
use tidegate_core::control::MemberSource;
use tidegate_core::control::explain::{Explanation, GuardStatus, ProbeView};
use tidegate_core::control::{BackendHeartbeatStatus, BackendStatus};
use tidegate_core::decision::rings::PickShare;
use tidegate_core::health::agent::AgentState;
use tidegate_core::health::probe_detector::ProbeState;
use tidegate_core::health::{LastProbe, ProbeOutcome};
use tidegate_core::model::{ProbeKind, Words};
use tidegate_core::suspicion::rejections::Rejection;

/// Renders the explanation as JSON. `rejected_on_receipt` is the last heartbeat in the
/// backend's name that the receiver rejected; `explained.rejected` is the last one that
/// the controller rejected.
pub fn render(
    explained: &Explanation,
    rejected_on_receipt: Option<&Rejection>,
    picks: PickShare,
) -> String {
    let rejected = match (rejected_on_receipt, &explained.rejected) {
        (Some(one), Some(other)) => Some(rejections::preferred(one, other)),
        (one, other) => one.or(other.as_ref()),
    };
    let backend = &explained.backend;
    let document = ExplainDoc {
        pool: backend.state.pool.to_string(),
        backend: backend.state.name.to_string(),
        address: backend.state.address.to_string(),
        registered: backend.origins.is_registered(),
        eligible: backend.eligible,
        why: why_sentence(explained, rejected),
        observation: backend.observation.name().into(),
        observation_seconds: millis(explained.observed_for),
        intent: backend.intent.name().into(),
        intent_seconds: millis(explained.intent_for),
        backup: backend.tier > 0,
        tier: backend.tier,
        connections_max: backend.connections_max,
        connections_max_in_force: explained.connections_max,
        sessions_active: backend.state.in_flight.get(),
        picks: PicksDoc { backend: picks.backend, pool: picks.pool },
        weight: weight(explained),
        probe: explained.probe.as_ref().map(probe),
        role: super::status::role(backend, explained.now),
        agent: agent(backend.agent),
        last_probe: explained.last_probe.as_ref().map(|last| last_probe(last, explained.now)),
        none_eligible: explained.none_eligible.map(Into::into),
        heartbeat: heartbeat(explained, rejected),
        ejection: ejection(explained),
        failures: failures(explained),
        slow_start: explained.ramp.map(|(takes, since)| SlowStartDoc {
            takes_seconds: millis(takes),
            seconds: millis(since),
            percent: explained.weight.ramp,
        }),
        guards: guards(&explained.guards),
        in_file: backend.origins.contains(MemberSource::File),
        announced: explained
            .announced
            .iter()
            .map(|by| sources::announcement(by, explained.now))
            .collect(),
        history: explained.history.iter().map(|t| last_transition(t, explained.now)).collect(),
    };
    serde_json::to_string(&document).expect("plain data with string keys always serialises")
}

fn weight(explained: &Explanation) -> WeightDoc {
    let weight = explained.weight;
    WeightDoc {
        effective: explained.backend.effective_weight,
        configured: weight.base,
        health_percent: weight.health,
        ramp_percent: weight.ramp,
        load_percent: weight.load,
    }
}

fn probe(view: &ProbeView) -> ProbeDoc {
    let (failed, connects, succeeded) = match view.state {
        ProbeState::Unknown => (0, 0, 0),
        ProbeState::Up { probes, connects } => (probes, connects, 0),
        ProbeState::Down { successes } => (0, 0, successes),
    };
    ProbeDoc {
        kind: probe_kind(&view.spec.kind),
        interval_seconds: millis(view.spec.interval),
        timeout_seconds: millis(view.spec.timeout),
        rise: view.spec.rise,
        fall: view.spec.fall,
        observation: view.observation.name().into(),
        seconds: millis(view.lasted),
        failed_in_a_row: failed,
        connects_failed_in_a_row: connects,
        succeeded_in_a_row: succeeded,
        fails_open: view.fails_open,
    }
}

/// Returns the name of a kind of probe.
pub(super) fn probe_kind(kind: &ProbeKind) -> ProbeKindName {
    match kind {
        ProbeKind::Tcp => ProbeKindName::Tcp,
        ProbeKind::SendExpect { .. } => ProbeKindName::SendExpect,
        ProbeKind::Steps { .. } => ProbeKindName::Steps,
        ProbeKind::Http(_) => ProbeKindName::Http,
        ProbeKind::Redis(_) => ProbeKindName::Redis,
        ProbeKind::Postgres(_) => ProbeKindName::Postgres,
        ProbeKind::Mysql(_) => ProbeKindName::Mysql,
        ProbeKind::Smtp => ProbeKindName::Smtp,
        ProbeKind::Ldap => ProbeKindName::Ldap,
        ProbeKind::Dns(_) => ProbeKindName::Dns,
        ProbeKind::Agent { .. } => ProbeKindName::Agent,
        ProbeKind::Exec(_) => ProbeKindName::Exec,
    }
}

fn agent(said: AgentState) -> Option<AgentDoc> {
    (said != AgentState::default()).then(|| AgentDoc {
        verdict: said.verdict.map(|verdict| verdict.word().to_owned()),
        wish: said.wish.word().to_owned(),
        weight_percent: said.share,
        connections_max: said.connections_max,
    })
}

fn last_probe(last: &LastProbe, now: Instant) -> LastProbeDoc {
    let (result, detail, took) = match &last.outcome {
        ProbeOutcome::Success { took, answer } => {
            (ProbeResultName::Success, answer.to_string(), Some(*took))
        }
        ProbeOutcome::Failure { took, reason } => {
            (ProbeResultName::Failure, reason.clone(), Some(*took))
        }
        ProbeOutcome::Undecided { took, reason } => {
            (ProbeResultName::Undecided, reason.clone(), Some(*took))
        }
        ProbeOutcome::Local { reason } => (ProbeResultName::NotRun, reason.clone(), None),
    };
    LastProbeDoc {
        result,
        detail,
        took_seconds: took.map(|took| took.as_micros() as f64 / 1e6),
        ended_seconds_ago: millis(now.saturating_duration_since(last.ended)),
        confirmation: last.confirmation,
    }
}

fn heartbeat(explained: &Explanation, rejected: Option<&Rejection>) -> Option<HeartbeatDoc> {
    let spec = explained.heartbeat_spec.as_ref()?;
    let backend = &explained.backend;
    Some(HeartbeatDoc {
        required: spec.require || backend.origins.is_registered(),
        pulse: backend.heartbeat_health.name().into(),
        sender: backend.heartbeats.as_ref().map(|status| sender(status, backend, explained)),
        rejected: rejected.map(|last| rejections::rejected(last, explained.now)),
    })
}

fn sender(
    heartbeats: &BackendHeartbeatStatus,
    backend: &BackendStatus,
    explained: &Explanation,
) -> SenderDoc {
    let reading = &heartbeats.reading;
    let exact = |time: Duration| thousandths(time.as_secs_f64());
    SenderDoc {
        state: backend.requested.name().into(),
        state_seconds: millis(explained.requested_for),
        key: heartbeats.key_id,
        incarnation: reading.incarnation,
        sequence: reading.sequence,
        weight_asked: heartbeats.weight,
        load: heartbeats.load,
        load_smoothed: thousandths(heartbeats.load_mean),
        in_flight: heartbeats.in_flight,
        known_seconds: millis(heartbeats.known_for),
        detector: reading.state.name().into(),
        detector_seconds: millis(explained.now.saturating_duration_since(reading.since)),
        received_total: reading.beats_total,
        lost_total: reading.lost_total,
        lost_share: lost_share(reading.lost_total, reading.beats_total),
        loss: thousandths(reading.loss),
        loss_after_loss: thousandths(reading.loss_after_loss),
        jitter_seconds: reading.jitter.as_micros() as f64 / 1e6,
        interval_seconds: exact(reading.interval),
        interval_learned_seconds: exact(reading.mean_interval),
        missing_allowed: reading.missing_allowed,
        timeout_seconds: exact(reading.timeout),
        try_timeout_seconds: exact(reading.try_timeout),
        silent_seconds: reading.silence.map(millis),
        ttl_seconds: millis(heartbeats.ttl),
        expired: heartbeats.expired,
        phi_normal: thousandths(reading.phi_normal),
        phi_exponential: thousandths(reading.phi_exponential),
        suspicions_total: reading.suspicions_total,
        downs_total: reading.downs_total,
        flaps: reading.flaps,
        held: reading.held.clone(),
    }
}

fn lost_share(lost: u64, received: u64) -> f64 {
    thousandths(lost as f64 / (lost + received).max(1) as f64)
}

fn ejection(explained: &Explanation) -> EjectionDoc {
    let backend = &explained.backend;
    EjectionDoc {
        on: explained.ejection.spec.is_some(),
        ejected: backend.ejected,
        seconds_left: explained.ejection.left.map(millis),
        in_a_row: explained.ejection.repeats,
        trial_seconds: explained.ejection.trial.map(millis),
        total: backend.ejections_total,
        held_total: backend.ejections_held_total,
    }
}

fn failures(explained: &Explanation) -> FailuresDoc {
    let view = &explained.failures;
    FailuresDoc {
        within_seconds: millis(view.recent.map_or(view.watched, |recent| recent.within)),
        connects: view.recent.map_or(0, |recent| recent.connects),
        early_resets: view.recent.map_or(0, |recent| recent.early_resets),
        last: view.recent.map(|recent| recent.last.to_string()),
        last_seconds_ago: view.recent.map(|recent| millis(recent.last_ago)),
        in_a_row: view.in_a_row,
        eject_at: explained.ejection.spec.map(|spec| spec.failures),
        connects_total: view.connects_total,
    }
}

fn guards(view: &GuardStatus) -> GuardsDoc {
    GuardsDoc {
        channel_silent: view.channel_silent,
        pool_frozen: view.pool_frozen.as_ref().map(frozen),
        all_frozen: view.all_frozen.as_ref().map(frozen),
        max_ejected_percent: view.max_ejected_percent,
        pool_down: view.view.down as u64,
        pool_suspect: view.view.suspects as u64,
        pool_heard: view.view.heard as u64,
        pool_senders: view.view.members as u64,
        prevented: view.prevented.as_ref().map(|prevented| PreventedDoc {
            evidence: prevented.evidence.clone(),
            reason: prevented.reason.clone(),
        }),
    }
}
