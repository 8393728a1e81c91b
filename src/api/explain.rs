//! `GET /v1/pools/{pool}/backends/{name}/explain`: one backend, with everything that
//! decides which sessions it gets.
//!
//! Written by `daemon`, read by `tidegate explain`, `drain --wait` and the demo. Plain
//! data: nothing here is worked out.

use super::names::{
    DetectorName, IntentName, ObservationName, ProbeKindName, PulseName, SenderStateName,
};
use super::status::{FreezeDoc, RejectedDoc, TransitionDoc, whole_if_it_is};
use serde::{Deserialize, Serialize};

/// The document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExplainDoc {
    /// Pool name.
    pub pool: String,
    /// Backend name.
    pub backend: String,
    /// `IP:PORT` or `unix:PATH`.
    pub address: String,
    /// Heartbeats brought it; it is not in the file.
    pub registered: bool,
    /// It may receive new sessions, all things considered.
    pub eligible: bool,
    /// The first thing that decides, in one sentence.
    pub why: String,
    /// What probes and heartbeats say.
    pub observation: ObservationName,
    /// For how long.
    pub observation_seconds: f64,
    /// What the operator wants.
    pub intent: IntentName,
    /// For how long.
    pub intent_seconds: f64,
    /// It gets sessions only while no other backend is eligible.
    pub backup: bool,
    /// Cap on its sessions; 0 means none.
    pub connections_max: u32,
    /// The same during a slow start.
    pub connections_max_in_force: u32,
    /// Sessions that hold it, from pick to close.
    pub sessions_active: u32,
    /// The factors of its weight.
    pub weight: WeightDoc,
    /// `null` where its pool has no probes.
    pub probe: Option<ProbeDoc>,
    /// `null` where its pool takes no heartbeats.
    pub heartbeat: Option<HeartbeatDoc>,
    /// Passive removal after failures.
    pub ejection: EjectionDoc,
    /// Failed connects and early resets during the last minute.
    pub failures: FailuresDoc,
    /// `null` while no slow start is under way.
    pub slow_start: Option<SlowStartDoc>,
    /// What can prevent its removal.
    pub guards: GuardsDoc,
    /// Its changes, newest first.
    pub history: Vec<TransitionDoc>,
}

/// The factors of the effective weight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WeightDoc {
    /// As balanced by; 0 while it is not eligible.
    #[serde(serialize_with = "whole_if_it_is")]
    pub effective: f64,
    /// As configured, or as its heartbeats ask for.
    pub configured: u16,
    /// What its health leaves of that.
    pub health_percent: u32,
    /// What its slow start leaves of that.
    pub ramp_percent: u32,
    /// What its load leaves of that.
    pub load_percent: u32,
}

/// Active checks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbeDoc {
    /// What one does.
    pub kind: ProbeKindName,
    /// Between two.
    pub interval_seconds: f64,
    /// Deadline of one.
    pub timeout_seconds: f64,
    /// Successes in a row that bring it up.
    pub rise: u32,
    /// Failures in a row that take it down.
    pub fall: u32,
    /// What they say.
    pub observation: ObservationName,
    /// For how long.
    pub seconds: f64,
    /// Probes failed in a row, while it is up.
    pub failed_in_a_row: u32,
    /// Connects of sessions failed in a row, while it is up.
    pub connects_failed_in_a_row: u32,
    /// Probes succeeded in a row, while it is down.
    pub succeeded_in_a_row: u32,
    /// It is eligible until its first result.
    pub fails_open: bool,
}

/// Heartbeats.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HeartbeatDoc {
    /// It is eligible only while it sends them.
    pub required: bool,
    /// What their silence means.
    pub pulse: PulseName,
    /// `null` where none were heard.
    pub sender: Option<SenderDoc>,
    /// The last one in its name that was rejected.
    pub rejected: Option<RejectedDoc>,
}

/// What the sender says, and how its rhythm reads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SenderDoc {
    /// What it asks for.
    pub state: SenderStateName,
    /// For how long.
    pub state_seconds: f64,
    /// Number of the key that signs.
    pub key: u32,
    /// Grows with every start of the sender.
    pub incarnation: Option<u64>,
    /// Grows with every heartbeat of an incarnation.
    pub sequence: Option<u64>,
    /// What it gets may be less.
    pub weight_asked: u16,
    /// How busy it says it is, 0 to 1000.
    pub load: u16,
    /// The same, smoothed.
    pub load_smoothed: f64,
    /// Connections it says it has.
    pub in_flight: u32,
    /// Since its first heartbeat.
    pub known_seconds: f64,
    /// State of the detector.
    pub detector: DetectorName,
    /// For how long.
    pub detector_seconds: f64,
    /// Heartbeats that counted.
    pub received_total: u64,
    /// Heartbeats lost, outages included.
    pub lost_total: u64,
    /// Of both together, the share that was lost, 0 to 1.
    pub lost_share: f64,
    /// What the timeout is made for: recent losses, and some in reserve; 0 to 1.
    pub loss: f64,
    /// Share of losses followed by another, 0 to 1.
    pub loss_after_loss: f64,
    /// Deviation of arrivals from their expected times.
    pub jitter_seconds: f64,
    /// Between two heartbeats, as the sender says.
    pub interval_seconds: f64,
    /// The same, as measured.
    pub interval_learned_seconds: f64,
    /// Heartbeats that may be missing in a row.
    pub missing_allowed: u32,
    /// Silence that makes it suspect.
    pub timeout_seconds: f64,
    /// Deadline of a confirmation probe.
    pub try_timeout_seconds: f64,
    /// Since its newest heartbeat.
    pub silent_seconds: Option<f64>,
    /// Silence that expires its heartbeats.
    pub ttl_seconds: f64,
    /// It was silent for that long.
    pub expired: bool,
    /// Suspicion level (normal tail), for information.
    pub phi_normal: f64,
    /// Suspicion level (exponential tail), for information.
    pub phi_exponential: f64,
    /// Times it became suspect.
    pub suspicions_total: u64,
    /// Times it was taken out.
    pub downs_total: u64,
    /// Failures that still delay its return.
    pub flaps: u32,
    /// Why it is not taken out though confirmed, if so.
    pub held: Option<String>,
}

/// Passive removal after failures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EjectionDoc {
    /// Whether its pool has it.
    pub on: bool,
    /// It is out now.
    pub ejected: bool,
    /// Until it is back.
    pub seconds_left: Option<f64>,
    /// Ejections in a row, as of the last one.
    pub in_a_row: u32,
    /// For how long it has had one session at a time, if so.
    pub trial_seconds: Option<f64>,
    /// Times it was ejected.
    pub total: u64,
    /// Times the pool's guard prevented that.
    pub held_total: u64,
}

/// Failed connects and early resets during the last minute.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FailuresDoc {
    /// The time that was looked at, at most a minute.
    pub within_seconds: f64,
    /// Connects that failed.
    pub connects: u32,
    /// Sessions that the backend reset before its first byte.
    pub early_resets: u32,
    /// The newest failure in words; `null` where there was none.
    pub last: Option<String>,
    /// When that was.
    pub last_seconds_ago: Option<f64>,
    /// Failures in a row.
    pub in_a_row: u32,
    /// Length of a row that ejects it; `null` where ejection is off.
    pub eject_at: Option<u32>,
    /// Connects that failed since it was configured.
    pub connects_total: u64,
}

/// A slow start under way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SlowStartDoc {
    /// From its begin to its end.
    pub takes_seconds: f64,
    /// Since its begin.
    pub seconds: f64,
    /// Part of the weight that is reached.
    pub percent: u32,
}

/// What can prevent a backend's removal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GuardsDoc {
    /// No heartbeat at all arrives.
    pub channel_silent: bool,
    /// Why no silent backend of its pool is taken out, if so.
    pub pool_frozen: Option<FreezeDoc>,
    /// Why no silent backend of any pool is taken out, if so.
    pub all_frozen: Option<FreezeDoc>,
    /// Share of the pool that may be out at once.
    pub max_ejected_percent: u8,
    /// Backends of its pool that are down.
    pub pool_down: u64,
    /// Those that are suspect.
    pub pool_suspect: u64,
    /// Those heard in time or answering probes.
    pub pool_heard: u64,
    /// All that send heartbeats.
    pub pool_senders: u64,
}
