//! Renders `/v1/pools/{pool}/backends/{name}/explain`: one backend and every fact
//! that decides which sessions it gets.
//!
//! Called by the control loop with the controller's [`Explanation`]. Pure: it reads
//! no clock and does no I/O.

use super::rejections;
use super::status::{frozen, last_transition, millis, thousandths};
use std::time::{Duration, Instant};
use tidegate_api::explain::{
    EjectionDoc, ExplainDoc, FailuresDoc, GuardsDoc, HeartbeatDoc, PicksDoc, ProbeDoc, SenderDoc,
    SlowStartDoc, WeightDoc,
};
use tidegate_api::names::ProbeKindName;
use tidegate_core::control::explain::{Explanation, GuardStatus, ProbeView};
use tidegate_core::control::{BackendHeartbeatStatus, BackendStatus};
use tidegate_core::decision::rings::PickShare;
use tidegate_core::health::probe_detector::ProbeState;
use tidegate_core::health::{Intent, Observation, RequestedState};
use tidegate_core::model::ProbeKind;
use tidegate_core::suspicion::rejections::Rejection;

/// Age up to which a rejection is mentioned. After this time without another one, the
/// sender has stopped, or Tidegate accepts its heartbeats again.
const REJECTION_AGE_MAX: Duration = Duration::from_secs(60);

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
        why: why_sentence(explained)
            + &rejected.map_or_else(String::new, |last| rejection_note(last, explained.now)),
        observation: backend.observation.name().into(),
        observation_seconds: millis(explained.observed_for),
        intent: backend.intent.name().into(),
        intent_seconds: millis(explained.intent_for),
        backup: backend.backup,
        connections_max: backend.connections_max,
        connections_max_in_force: explained.connections_max,
        sessions_active: backend.state.in_flight.get(),
        picks: PicksDoc { backend: picks.backend, pool: picks.pool },
        weight: weight(explained),
        probe: explained.probe.as_ref().map(probe),
        heartbeat: heartbeat(explained, rejected),
        ejection: ejection(explained),
        failures: failures(explained),
        slow_start: explained.ramp.map(|(takes, since)| SlowStartDoc {
            takes_seconds: millis(takes),
            seconds: millis(since),
            percent: explained.weight.ramp,
        }),
        guards: guards(&explained.guards),
        history: explained.history.iter().map(|t| last_transition(t, explained.now)).collect(),
    };
    serde_json::to_string(&document).expect("plain data with string keys always serialises")
}

/// Returns one sentence with the first fact that decides whether the backend is in
/// rotation. The operator's intent comes first, then the sender's state, ejection, and
/// observation.
fn why_sentence(explained: &Explanation) -> String {
    let backend = &explained.backend;
    // The newest change can have another subject, so the state is searched by name.
    let evidence = |state: &str| {
        let made = explained.history.iter().find(|t| t.to == state);
        made.map_or_else(String::new, |t| format!(": {}", t.reason))
    };
    if backend.intent != Intent::Ready {
        return format!("an operator set it to {}", backend.intent.name());
    }
    if backend.requested != RequestedState::Ready {
        return format!("its sender reports {}", backend.requested.name());
    }
    if backend.ejected {
        return format!("ejected{}", evidence("ejected"));
    }
    if let Some(lasts) = explained.ejection.trial {
        let ejected = evidence("ejected");
        return format!(
            "on trial for {} after an ejection{ejected}; one session at a time is admitted \
             until one succeeds",
            brief(lasts)
        );
    }
    match backend.observation {
        Observation::Down => format!("down{}", evidence("down")),
        Observation::Suspect => {
            format!("suspect, at 10% of its weight{}", evidence("suspect"))
        }
        Observation::Up => in_rotation_sentence(explained, "up"),
        Observation::Unknown if backend.eligible => {
            in_rotation_sentence(explained, unknown(explained))
        }
        Observation::Unknown => "waiting for its first probe result or heartbeat".to_owned(),
    }
}

/// Returns the suffix for a backend whose heartbeats are being rejected, else an empty
/// string.
fn rejection_note(last: &Rejection, now: Instant) -> String {
    if last.row == 0 || now.saturating_duration_since(last.at) > REJECTION_AGE_MAX {
        return String::new();
    }
    let whose = if last.signed { "its heartbeats are" } else { "unverified heartbeats are" };
    format!("; {whose} rejected: {} ({})", last.words(), last.help)
}

/// Returns why there is no observation of an eligible backend.
fn unknown(explained: &Explanation) -> &'static str {
    match (&explained.probe, &explained.heartbeat_spec) {
        (Some(_), _) => "no probe result yet (in rotation until its first one)",
        (None, Some(_)) => "no probes configured and no heartbeats received",
        (None, None) => "no probes or heartbeats configured",
    }
}

/// Lists the recent failures of a backend in rotation: too few to remove it.
fn minor_failures(explained: &Explanation) -> Vec<String> {
    let mut all = Vec::new();
    if let Some(ProbeView { state: ProbeState::Up { probes, .. }, spec, .. }) = &explained.probe
        && *probes > 0
    {
        all.push(format!("{probes} of {} probes failed in a row", spec.fall));
    }
    let failures = &explained.failures;
    let Some(recent) = failures.recent else { return all };
    let within = brief(recent.within);
    if recent.connects > 0 {
        all.push(format!("{} failed in the last {within}", plural(recent.connects, "connect")));
    }
    if recent.early_resets > 0 {
        let sessions = plural(recent.early_resets, "session");
        all.push(format!("{sessions} reset before the first byte in the last {within}"));
    }
    all.push(format!("last {} ago: {}", brief(recent.last_ago), recent.last));
    if let Some(spec) = &explained.ejection.spec
        && failures.in_a_row > 0
    {
        all.push(match &explained.ejection.prevented {
            Some(why) => format!("{} in a row, ejection prevented: {why}", failures.in_a_row),
            None => format!("{} in a row, ejection at {}", failures.in_a_row, spec.failures),
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

/// Returns the sentence of a backend in rotation: its state, its share of the weight and
/// its recent failures.
fn in_rotation_sentence(explained: &Explanation, state: &str) -> String {
    let weight = explained.weight;
    let failures = minor_failures(explained);
    let share = match (weight.ramp, weight.load) {
        (100, 100) => "full weight".to_owned(),
        (ramp, 100) => format!("slow start at {ramp}% of its weight"),
        (100, load) => format!("reported load reduces its weight to {load}%"),
        (ramp, load) => format!("slow start at {ramp}%, reported load leaves {load}% of that"),
    };
    match failures.is_empty() {
        true => format!("{state}, {share}"),
        false => format!("{state}, {share}; {}", failures.join(", ")),
    }
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
        kind: match view.spec.kind {
            ProbeKind::Tcp => ProbeKindName::Tcp,
            ProbeKind::SendExpect { .. } => ProbeKindName::SendExpect,
            ProbeKind::Http { .. } => ProbeKindName::Http,
        },
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
    }
}
