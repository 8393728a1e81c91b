//! `GET /v1/pools/{pool}/backends/{name}/explain`: one backend, with everything that
//! decides which sessions it gets.
//!
//! Written by `daemon`, read by `tidegate explain`, `drain --wait` and the demo. It
//! contains only data and computes nothing.

use super::names::{
    DetectorName, IntentName, NoneEligible, ObservationName, ProbeKindName, ProbeResultName,
    PulseName, SenderStateName,
};
use super::sources::AnnouncementDoc;
use super::status::{FreezeDoc, RejectedDoc, RoleDoc, TransitionDoc, whole_if_it_is};
use serde::{Deserialize, Serialize};

/// The whole answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExplainDoc {
    /// Pool name.
    pub pool: String,
    /// Backend name.
    pub backend: String,
    /// `IP:PORT` or `unix:PATH`.
    pub address: String,
    /// It joined by heartbeats and is not in the configuration file.
    pub registered: bool,
    /// It may receive new sessions.
    pub eligible: bool,
    /// The first fact that decides whether it is eligible, in one sentence.
    pub why: String,
    /// The result of its probes and heartbeats.
    pub observation: ObservationName,
    /// Age of `observation`.
    pub observation_seconds: f64,
    /// The operator's intent.
    pub intent: IntentName,
    /// Age of `intent`.
    pub intent_seconds: f64,
    /// Its `tier` is above 0.
    pub backup: bool,
    /// Its tier: 0 to 9. Backends of the lowest tier serve first.
    #[serde(default)]
    pub tier: u8,
    /// Cap on its sessions; 0 means none.
    pub connections_max: u32,
    /// Cap in force, which is lower during a slow start; 0 means none.
    pub connections_max_in_force: u32,
    /// Sessions that use it, counted from pick to close.
    pub sessions_active: u32,
    /// Its share of the last first picks of its pool.
    pub picks: PicksDoc,
    /// The factors of its weight.
    pub weight: WeightDoc,
    /// `null` if its pool has no probes.
    pub probe: Option<ProbeDoc>,
    /// The role that its probes have found; `null` if they have found none.
    #[serde(default)]
    pub role: Option<RoleDoc>,
    /// What its agent has said; `null` if that changes nothing.
    #[serde(default)]
    pub agent: Option<AgentDoc>,
    /// The newest probe that has ended; `null` if none has in this process.
    pub last_probe: Option<LastProbeDoc>,
    /// What happens to clients if no backend of the pool is eligible; `null` if a backend
    /// is eligible.
    pub none_eligible: Option<NoneEligible>,
    /// `null` if its pool accepts no heartbeats.
    pub heartbeat: Option<HeartbeatDoc>,
    /// Passive removal after failures.
    pub ejection: EjectionDoc,
    /// Failed connects and early resets during the last minute.
    pub failures: FailuresDoc,
    /// `null` while no slow start is in progress.
    pub slow_start: Option<SlowStartDoc>,
    /// Guards that can prevent its removal.
    pub guards: GuardsDoc,
    /// Whether the file lists it.
    #[serde(default)]
    pub in_file: bool,
    /// What each member source says that lists it.
    #[serde(default)]
    pub announced: Vec<AnnouncementDoc>,
    /// Its last state changes, newest first.
    pub history: Vec<TransitionDoc>,
}

/// Share of a backend of the last first picks of its pool. A first pick is that of a
/// session's first connect attempt; each worker keeps the last 4,096.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicksDoc {
    /// First picks that chose the backend.
    pub backend: u32,
    /// First picks of the pool that are kept.
    pub pool: u32,
}

/// The factors of the effective weight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WeightDoc {
    /// The weight that picks use; 0 while it is not eligible.
    #[serde(serialize_with = "whole_if_it_is")]
    pub effective: f64,
    /// From the configuration, or from its heartbeats.
    pub configured: u16,
    /// Factor for its health.
    pub health_percent: u32,
    /// Factor for its slow start.
    pub ramp_percent: u32,
    /// Factor for the load it reports.
    pub load_percent: u32,
}

/// What an agent has said about its backend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AgentDoc {
    /// `up`, `down`, `fail` or `stopped`; `null` if no answer had such a word.
    pub verdict: Option<String>,
    /// `ready`, `drain` or `maint`.
    pub wish: String,
    /// Share of the configured weight.
    pub weight_percent: u32,
    /// Cap on its sessions; 0 means none.
    pub connections_max: u32,
}

/// Active checks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbeDoc {
    /// Kind of check.
    pub kind: ProbeKindName,
    /// Time between two probes.
    pub interval_seconds: f64,
    /// Timeout of one probe.
    pub timeout_seconds: f64,
    /// Successful probes in a row that set it to `up`.
    pub rise: u32,
    /// Failures in a row that set it to `down`.
    pub fall: u32,
    /// The result of the probes alone.
    pub observation: ObservationName,
    /// Age of `observation`.
    pub seconds: f64,
    /// Failed probes in a row while it is up.
    pub failed_in_a_row: u32,
    /// Failed connects of sessions in a row while it is up.
    pub connects_failed_in_a_row: u32,
    /// Successful probes in a row while it is down.
    pub succeeded_in_a_row: u32,
    /// It is eligible before its first result.
    pub fails_open: bool,
}

/// The newest probe that has ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LastProbeDoc {
    /// Its result.
    pub result: ProbeResultName,
    /// What the backend answered, or why the probe failed; at most 256 bytes.
    pub detail: String,
    /// Time from its connect to its result; `null` if it did not run.
    pub took_seconds: Option<f64>,
    /// Time since its result.
    pub ended_seconds_ago: f64,
    /// It was sent because heartbeats were overdue.
    pub confirmation: bool,
}

/// Heartbeats.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HeartbeatDoc {
    /// It is eligible only while its heartbeats arrive.
    pub required: bool,
    /// What the arrival of its heartbeats means for it.
    pub pulse: PulseName,
    /// `null` if none was received.
    pub sender: Option<SenderDoc>,
    /// The last rejected heartbeat in its name.
    pub rejected: Option<RejectedDoc>,
}

/// What the sender reports, and the detector's measurements of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SenderDoc {
    /// The state that it reports.
    pub state: SenderStateName,
    /// Age of `state`.
    pub state_seconds: f64,
    /// Number of the key that signs its heartbeats.
    pub key: u32,
    /// Grows with every start of the sender.
    pub incarnation: Option<u64>,
    /// Grows with every heartbeat of an incarnation.
    pub sequence: Option<u64>,
    /// The weight that it reports; the effective weight can be lower.
    pub weight_asked: u16,
    /// The load that it reports, 0 to 1000.
    pub load: u16,
    /// Smoothed `load`.
    pub load_smoothed: f64,
    /// The number of connections that it reports.
    pub in_flight: u32,
    /// Time since its first heartbeat.
    pub known_seconds: f64,
    /// State of the detector.
    pub detector: DetectorName,
    /// Age of `detector`.
    pub detector_seconds: f64,
    /// Heartbeats that the detector used.
    pub received_total: u64,
    /// Heartbeats lost, including those of outages.
    pub lost_total: u64,
    /// Lost heartbeats divided by lost plus received ones, 0 to 1.
    pub lost_share: f64,
    /// Loss rate that the timeout allows for: the recent rate plus a reserve, 0 to 1.
    pub loss: f64,
    /// Share of losses that are followed by another loss, 0 to 1.
    pub loss_after_loss: f64,
    /// Deviation of arrivals from their expected times.
    pub jitter_seconds: f64,
    /// Time between two heartbeats, as the sender reports it.
    pub interval_seconds: f64,
    /// Measured time between two heartbeats.
    pub interval_learned_seconds: f64,
    /// Missing heartbeats in a row that the timeout allows.
    pub missing_allowed: u32,
    /// Time without a heartbeat after which it is suspect.
    pub timeout_seconds: f64,
    /// Timeout of a confirmation probe.
    pub try_timeout_seconds: f64,
    /// Time since its newest heartbeat; `null` before the first.
    pub silent_seconds: Option<f64>,
    /// Time without a heartbeat after which its heartbeats expire.
    pub ttl_seconds: f64,
    /// Its heartbeats have expired.
    pub expired: bool,
    /// Suspicion level (normal tail), for information.
    pub phi_normal: f64,
    /// Suspicion level (exponential tail), for information.
    pub phi_exponential: f64,
    /// Times it became suspect.
    pub suspicions_total: u64,
    /// Times it was set to `down`.
    pub downs_total: u64,
    /// Past failures that lengthen its next hold-down.
    pub flaps: u32,
    /// Why it stays in rotation although it is confirmed as down; else `null`.
    pub held: Option<String>,
}

/// Passive removal after failures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EjectionDoc {
    /// Whether ejection is configured for its pool.
    pub on: bool,
    /// It is ejected now.
    pub ejected: bool,
    /// Time until its ejection ends.
    pub seconds_left: Option<f64>,
    /// Ejections in a row, including the last one.
    pub in_a_row: u32,
    /// Time since its trial began; `null` if it is not on trial.
    pub trial_seconds: Option<f64>,
    /// Times it was ejected.
    pub total: u64,
    /// Times a guard prevented an ejection.
    pub held_total: u64,
}

/// Failed connects and early resets during the last minute.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FailuresDoc {
    /// Length of the period that the counts cover, at most 60 s.
    pub within_seconds: f64,
    /// Connects that failed.
    pub connects: u32,
    /// Sessions that the backend reset before its first byte.
    pub early_resets: u32,
    /// The newest failure in words; `null` if there was none.
    pub last: Option<String>,
    /// Time since the newest failure.
    pub last_seconds_ago: Option<f64>,
    /// Failures in a row.
    pub in_a_row: u32,
    /// Failures in a row at which it is ejected; `null` if ejection is off.
    pub eject_at: Option<u32>,
    /// Failed connects since it was configured.
    pub connects_total: u64,
}

/// A slow start in progress.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SlowStartDoc {
    /// Total time of the slow start.
    pub takes_seconds: f64,
    /// Time since the slow start began.
    pub seconds: f64,
    /// Share of the weight that is in force.
    pub percent: u32,
}

/// Guards that can prevent the removal of a backend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GuardsDoc {
    /// No heartbeat of any sender arrives.
    pub channel_silent: bool,
    /// Why silent backends of its pool stay in rotation; `null` if they do not.
    pub pool_frozen: Option<FreezeDoc>,
    /// Why silent backends of all pools stay in rotation; `null` if they do not.
    pub all_frozen: Option<FreezeDoc>,
    /// Largest share of the pool that can be removed at the same time.
    pub max_ejected_percent: u8,
    /// Backends of its pool that are down.
    pub pool_down: u64,
    /// Backends of its pool that are suspect.
    pub pool_suspect: u64,
    /// Backends of its pool whose heartbeats are on time or whose probes succeed.
    pub pool_heard: u64,
    /// Backends of its pool that send heartbeats.
    pub pool_senders: u64,
    /// The removal of this backend that a guard prevents; `null` if there is none.
    pub prevented: Option<PreventedDoc>,
}

/// A removal that a guard prevents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreventedDoc {
    /// The evidence against the backend.
    pub evidence: String,
    /// Why the guard prevents the removal.
    pub reason: String,
}
