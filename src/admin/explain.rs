//! `/v1/pools/{pool}/backends/{name}/explain`: one backend, with everything
//! that decides what it gets.
//!
//! Called by the control loop with what the controller knows. Pure: it reads no
//! clock and does no I/O.

use super::status::{
    Frozen, LastTransition, Number, frozen, last_transition, millis, number, thousandths,
};
use crate::config::ProbeKind;
use crate::control::explain::{Explained, GuardView, ProbeView};
use crate::control::{BackendStatus, HeartStatus, Origin};
use crate::health::detector::State;
use crate::health::{Calling, Intent, Observation};
use serde::Serialize;
use std::time::Duration;

#[derive(Serialize)]
struct Document<'a> {
    pool: &'a str,
    backend: &'a str,
    address: String,
    registered: bool,
    eligible: bool,
    /// One sentence.
    why: String,
    observation: &'static str,
    observation_seconds: f64,
    intent: &'static str,
    intent_seconds: f64,
    backup: bool,
    connections_max: u32,
    connections_max_in_force: u32,
    sessions_active: u32,
    weight: WeightView,
    probe: Option<Probe>,
    heartbeat: Option<Heartbeat>,
    ejection: Ejection,
    slow_start: Option<SlowStart>,
    guards: Guards<'a>,
    /// Newest first.
    history: Vec<LastTransition<'a>>,
}

/// The factors of the effective weight.
#[derive(Serialize)]
struct WeightView {
    effective: Number,
    configured: u16,
    health_percent: u32,
    ramp_percent: u32,
    load_percent: u32,
}

#[derive(Serialize)]
struct Probe {
    kind: &'static str,
    interval_seconds: f64,
    timeout_seconds: f64,
    rise: u32,
    fall: u32,
    observation: &'static str,
    seconds: f64,
    failed_in_a_row: u32,
    connects_failed_in_a_row: u32,
    succeeded_in_a_row: u32,
    fails_open: bool,
}

#[derive(Serialize)]
struct Heartbeat {
    required: bool,
    pulse: &'static str,
    sender: Option<Sender>,
}

/// What the sender says and how its rhythm reads.
#[derive(Serialize)]
struct Sender {
    state: &'static str,
    state_seconds: f64,
    key: u32,
    incarnation: Option<u64>,
    sequence: Option<u64>,
    weight_asked: u16,
    load: u16,
    load_smoothed: f64,
    in_flight: u32,
    known_seconds: f64,
    detector: &'static str,
    detector_seconds: f64,
    received_total: u64,
    lost_total: u64,
    loss: f64,
    loss_after_loss: f64,
    jitter_seconds: f64,
    interval_seconds: f64,
    interval_learned_seconds: f64,
    missing_allowed: u32,
    timeout_seconds: f64,
    try_timeout_seconds: f64,
    silent_seconds: Option<f64>,
    ttl_seconds: f64,
    expired: bool,
    phi_normal: f64,
    phi_exponential: f64,
    suspicions_total: u64,
    downs_total: u64,
    flaps: u32,
    /// Why it is not taken out though confirmed to be gone.
    held: Option<String>,
}

#[derive(Serialize)]
struct Ejection {
    on: bool,
    ejected: bool,
    seconds_left: Option<f64>,
    in_a_row: u32,
    total: u64,
    held_total: u64,
}

#[derive(Serialize)]
struct SlowStart {
    takes_seconds: f64,
    seconds: f64,
    percent: u32,
}

#[derive(Serialize)]
struct Guards<'a> {
    channel_silent: bool,
    pool_frozen: Option<Frozen<'a>>,
    all_frozen: Option<Frozen<'a>>,
    max_ejected_percent: u8,
    pool_down: usize,
    pool_suspect: usize,
    pool_heard: usize,
    pool_senders: usize,
}

/// The text of the explanation.
pub fn render(explained: &Explained) -> String {
    let backend = &explained.backend;
    let document = Document {
        pool: &backend.state.pool,
        backend: &backend.state.name,
        address: backend.state.address.to_string(),
        registered: backend.origin == Origin::Registered,
        eligible: backend.eligible,
        why: why(explained),
        observation: backend.observation.name(),
        observation_seconds: millis(explained.observed_for),
        intent: backend.intent.name(),
        intent_seconds: millis(explained.intent_for),
        backup: backend.backup,
        connections_max: backend.connections_max,
        connections_max_in_force: explained.connections_max,
        sessions_active: backend.state.in_flight.total(),
        weight: weight(explained),
        probe: explained.probe.as_ref().map(probe),
        heartbeat: heartbeat(explained),
        ejection: ejection(explained),
        slow_start: explained.ramp.map(|(takes, since)| SlowStart {
            takes_seconds: millis(takes),
            seconds: millis(since),
            percent: explained.weight.ramp,
        }),
        guards: guards(&explained.guards),
        history: explained.history.iter().map(|t| last_transition(t, explained.now)).collect(),
    };
    serde_json::to_string(&document).expect("plain data with string keys always serialises")
}

/// The first thing that decides, in one sentence.
fn why(explained: &Explained) -> String {
    let backend = &explained.backend;
    let newest = explained.history.first();
    let evidence = || newest.map_or_else(String::new, |t| format!(": {}", t.reason));
    if backend.intent != Intent::Ready {
        return format!("an operator has taken it out ({})", backend.intent.name());
    }
    if backend.calling != Calling::Sessions {
        return format!("its own heartbeats say that it is {}", backend.calling.name());
    }
    if backend.ejected {
        return format!("it is ejected for its failed connects{}", evidence());
    }
    match backend.observation {
        Observation::Down => format!("it is down{}", evidence()),
        Observation::Suspect => format!("it is in doubt and serves at a tenth{}", evidence()),
        Observation::Up => serves(explained, "it is well"),
        Observation::Unknown if backend.eligible => {
            serves(explained, "nothing is known against it")
        }
        Observation::Unknown => {
            "it waits for the first word of its probes or heartbeats".to_owned()
        }
    }
}

/// It serves; what is left of its weight, if that is not all.
fn serves(explained: &Explained, well: &str) -> String {
    let weight = explained.weight;
    match (weight.ramp, weight.load) {
        (100, 100) => format!("{well}, and serves at full weight"),
        (ramp, 100) => format!("{well}, and starts slowly: {ramp}% of its weight by now"),
        (100, load) => format!("{well}; its load leaves it {load}% of its weight"),
        (ramp, load) => {
            format!("{well}; {ramp}% by its slow start, of which its load leaves {load}%")
        }
    }
}

fn weight(explained: &Explained) -> WeightView {
    let weight = explained.weight;
    WeightView {
        effective: number(explained.backend.effective_weight),
        configured: weight.base,
        health_percent: weight.health,
        ramp_percent: weight.ramp,
        load_percent: weight.load,
    }
}

fn probe(view: &ProbeView) -> Probe {
    let (failed, connects, succeeded) = match view.state {
        State::Unknown => (0, 0, 0),
        State::Up { probes, connects } => (probes, connects, 0),
        State::Down { successes } => (0, 0, successes),
    };
    Probe {
        kind: match view.spec.kind {
            ProbeKind::Tcp => "tcp",
            ProbeKind::SendExpect { .. } => "send-expect",
            ProbeKind::Http { .. } => "http",
        },
        interval_seconds: millis(view.spec.interval),
        timeout_seconds: millis(view.spec.timeout),
        rise: view.spec.rise,
        fall: view.spec.fall,
        observation: view.observation.name(),
        seconds: millis(view.lasted),
        failed_in_a_row: failed,
        connects_failed_in_a_row: connects,
        succeeded_in_a_row: succeeded,
        fails_open: view.fails_open,
    }
}

fn heartbeat(explained: &Explained) -> Option<Heartbeat> {
    let spec = explained.heartbeat_spec.as_ref()?;
    let backend = &explained.backend;
    Some(Heartbeat {
        required: spec.require || backend.origin == Origin::Registered,
        pulse: backend.pulse.name(),
        sender: backend.heart.as_ref().map(|heart| sender(heart, backend, explained)),
    })
}

fn sender(heart: &HeartStatus, backend: &BackendStatus, explained: &Explained) -> Sender {
    let reading = &heart.reading;
    let exact = |time: Duration| thousandths(time.as_secs_f64());
    Sender {
        state: backend.calling.name(),
        state_seconds: millis(explained.calling_for),
        key: heart.key_id,
        incarnation: reading.incarnation,
        sequence: reading.sequence,
        weight_asked: heart.weight,
        load: heart.load,
        load_smoothed: thousandths(heart.load_mean),
        in_flight: heart.in_flight,
        known_seconds: millis(heart.known_for),
        detector: reading.state.name(),
        detector_seconds: millis(explained.now.saturating_duration_since(reading.since)),
        received_total: reading.beats_total,
        lost_total: reading.lost_total,
        loss: thousandths(reading.loss),
        loss_after_loss: thousandths(reading.loss_after_loss),
        jitter_seconds: reading.jitter.as_micros() as f64 / 1e6,
        interval_seconds: exact(reading.interval),
        interval_learned_seconds: exact(reading.mean_interval),
        missing_allowed: reading.missing_allowed,
        timeout_seconds: exact(reading.timeout),
        try_timeout_seconds: exact(reading.try_timeout),
        silent_seconds: reading.silence.map(millis),
        ttl_seconds: millis(heart.ttl),
        expired: heart.expired,
        phi_normal: thousandths(reading.phi_normal),
        phi_exponential: thousandths(reading.phi_exponential),
        suspicions_total: reading.suspicions_total,
        downs_total: reading.downs_total,
        flaps: reading.flaps,
        held: reading.held.clone(),
    }
}

fn ejection(explained: &Explained) -> Ejection {
    let backend = &explained.backend;
    Ejection {
        on: explained.ejection.spec.is_some(),
        ejected: backend.ejected,
        seconds_left: explained.ejection.left.map(millis),
        in_a_row: explained.ejection.repeats,
        total: backend.ejections_total,
        held_total: backend.ejections_held_total,
    }
}

fn guards(view: &GuardView) -> Guards<'_> {
    Guards {
        channel_silent: view.channel_silent,
        pool_frozen: view.pool_frozen.as_ref().map(frozen),
        all_frozen: view.all_frozen.as_ref().map(frozen),
        max_ejected_percent: view.max_ejected_percent,
        pool_down: view.view.down,
        pool_suspect: view.view.suspects,
        pool_heard: view.view.heard,
        pool_senders: view.view.members,
    }
}
