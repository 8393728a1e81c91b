//! `GET /v1/status`: the state of the whole process.
//!
//! Written by `daemon`, read by `tidegate status`, `drain --wait` and the demo. It contains
//! only data and computes nothing.

use super::names::{
    BackendStateName, EngineName, IntentName, NoneEligible, ObservationName, PolicyName, PulseName,
    RoleName, SenderStateName, ServiceState,
};
use super::sources::MemberSourceDoc;
use serde::{Deserialize, Serialize, Serializer};
use std::net::SocketAddr;

/// The whole answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StatusDoc {
    /// Version of the program.
    pub version: String,
    /// Generation of the configuration in force.
    pub generation: u64,
    /// Serial number of the routing table in force.
    pub table_serial: u64,
    /// Engine in use.
    pub engine: EngineName,
    /// Why this engine is in use.
    pub engine_reason: String,
    /// Number of worker threads.
    pub workers: u64,
    /// Stalled workers.
    pub stalled: Vec<StalledWorkerDoc>,
    /// Panics of sessions and workers.
    pub worker_panics_total: u64,
    /// Restarts of workers after a panic.
    pub worker_restarts_total: u64,
    /// Time since the process started.
    pub uptime_seconds: f64,
    /// `serving` or `draining`.
    pub state: ServiceState,
    /// Sessions open in the whole process.
    pub connections_active: u32,
    /// Cap on open sessions.
    pub connections_max: u32,
    /// Warnings in one sentence each, such as settings that need a restart.
    pub warnings: Vec<String>,
    /// What is wrong, worst first; at most 50 findings.
    #[serde(default)]
    pub trouble: Vec<FindingDoc>,
    /// The layers of the sandbox.
    pub confinement: Vec<SandboxLayerDoc>,
    /// `null` if no pool accepts heartbeats.
    pub heartbeat: Option<HeartbeatChannelDoc>,
    /// Frontends, in file order.
    pub frontends: Vec<FrontendDoc>,
    /// Pools, in file order.
    pub pools: Vec<PoolDoc>,
    /// Removed backends that still have sessions.
    pub leaving: Vec<RemovedBackendDoc>,
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FindingDoc {
    /// `none-eligible`, `frozen`, `backends`, `queue`, `refused`, `cap`, `reload` or
    /// `warning`.
    pub kind: String,
    /// 3: clients are not served; 2: backends do not serve; 1: something may become worse.
    pub severity: u8,
    /// State of the backends: `down`, `ejected` or `suspect`; `null` if it is not about
    /// backends.
    pub state: Option<String>,
    /// What, in a few words.
    pub short: String,
    /// What, in one clause.
    pub title: String,
    /// Why, what the backends have in common, and what happened just before; can be empty.
    pub why: String,
    /// What it does to traffic; can be empty.
    pub effect: String,
    /// Its age; `null` if that is not known.
    pub since_seconds: Option<f64>,
    /// The pool, or `null`.
    pub pool: Option<String>,
    /// The backend, if it is about one; else `null`.
    pub backend: Option<String>,
    /// Number of backends.
    pub backends: u64,
}

/// Which of the backends of a pool the answer has, if the query selects some.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PageDoc {
    /// Backends of the pool.
    pub total: u64,
    /// Backends that match the query, on all pages.
    pub matched: u64,
    /// Value of `after` for the next page; `null` on the last one.
    pub next: Option<String>,
}

/// A stalled worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StalledWorkerDoc {
    /// Number of the worker, from 0.
    pub worker: u64,
    /// Time since its last progress.
    pub seconds: f64,
    /// Its last activity, in words.
    pub stage: String,
}

/// One layer of the sandbox.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SandboxLayerDoc {
    /// Name as in the metrics, such as `seccomp`.
    pub layer: String,
    /// Whether it restricts the process.
    pub in_force: bool,
    /// What it restricts, or why it is not in force.
    pub detail: String,
}

/// The heartbeat receiver.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HeartbeatChannelDoc {
    /// Addresses it listens on.
    pub listen: Vec<SocketAddr>,
    /// Accepted heartbeats.
    pub accepted_total: u64,
    /// Rejected heartbeats, for any reason.
    pub rejected_total: u64,
    /// Heartbeats that the kernel dropped.
    pub kernel_drops_total: u64,
    /// Senders with rejected heartbeats, latest rejection first; at most 64.
    pub rejections: Vec<RejectedDoc>,
    /// Times silence was ignored because the balancer was late or dropped heartbeats.
    pub excuses_total: u64,
    /// No heartbeat of any sender arrives.
    pub silent: bool,
    /// Why silent backends of all pools stay in rotation; `null` if they do not.
    pub frozen: Option<FreezeDoc>,
}

/// A guard that is in force.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FreezeDoc {
    /// The reason, in one sentence.
    pub reason: String,
    /// Time since it took effect.
    pub seconds: f64,
}

/// The last rejected heartbeat of one sender.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RejectedDoc {
    /// Pool that it names; `null` if it could not be read.
    pub pool: Option<String>,
    /// Backend that it names; `null` if it could not be read.
    pub backend: Option<String>,
    /// Address of the sender.
    pub from: Option<SocketAddr>,
    /// ID of the key that it names.
    pub key: Option<u32>,
    /// The reason, as in the metrics.
    pub reason: String,
    /// Sender's clock minus this host's clock; `null` if it has no valid signature.
    pub skew_seconds: Option<f64>,
    /// Whether a valid signature proves its pool and backend.
    pub signed: bool,
    /// Rejected heartbeats of this sender.
    pub total: u64,
    /// Rejected heartbeats since the last accepted one of this sender.
    pub in_a_row: u64,
    /// Time since the last rejected heartbeat.
    pub seconds_ago: f64,
    /// How an operator can correct it.
    pub help: String,
}

/// One frontend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FrontendDoc {
    /// Its name.
    pub name: String,
    /// Its bind addresses: `IP:PORT`, and `%` with the interface if it has one.
    pub binds: Vec<String>,
    /// Name of its pool.
    pub pool: String,
    /// Cap on its sessions; 0 means none.
    pub connections_max: u32,
    /// Open sessions.
    pub sessions_active: u32,
    /// Accepted connections.
    pub sessions_total: u64,
    /// Bytes from clients.
    pub bytes_in_total: u64,
    /// Bytes to clients.
    pub bytes_out_total: u64,
    /// Clients rejected before a backend connection was established.
    pub refused_total: u64,
}

/// One pool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PoolDoc {
    /// Its name.
    pub name: String,
    /// The pool whose backends and probes it uses; `null` if it has its own.
    #[serde(default)]
    pub of: Option<String>,
    /// Role that a backend needs to be eligible; `null`: any.
    #[serde(default)]
    pub role: Option<RoleName>,
    /// Its balancing policy.
    pub balance: PolicyName,
    /// What happens to clients if no backend is eligible; `null` if a backend is eligible.
    pub none_eligible: Option<NoneEligible>,
    /// Why silent backends stay in rotation; `null` if they do not.
    pub frozen: Option<FreezeDoc>,
    /// Backends registered by heartbeats.
    pub registered: u64,
    /// Cap on registered backends; 0 if registration is off.
    pub registered_max: u32,
    /// Whether its backends are probed.
    pub probes: bool,
    /// Whether it accepts heartbeats.
    pub heartbeats: bool,
    /// Its member sources, in order of precedence; empty if it has only the file and heartbeats.
    #[serde(default)]
    pub sources: Vec<MemberSourceDoc>,
    /// The tiers that serve, the lowest first; empty while no backend is eligible.
    #[serde(default)]
    pub tier_shares: Vec<TierShareDoc>,
    /// Clients in its queue.
    pub queued: u64,
    /// Set if the query selects backends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub page: Option<PageDoc>,
    /// Backends in file order, then registered ones by age.
    pub backends: Vec<BackendDoc>,
}

/// A tier of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TierShareDoc {
    /// Its number.
    pub tier: u8,
    /// Its share of the new sessions: 100, unless they spill to several tiers.
    pub percent: u8,
}

/// One backend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackendDoc {
    /// Name, unique in the pool.
    pub name: String,
    /// `IP:PORT` or `unix:PATH`.
    pub address: String,
    /// It joined by heartbeats and is not in the configuration file.
    pub registered: bool,
    /// From the configuration, or from its heartbeats.
    pub weight: u32,
    /// The weight that picks use; 0 while it is not eligible.
    #[serde(serialize_with = "whole_if_it_is")]
    pub effective_weight: f64,
    /// Its `tier` is above 0.
    pub backup: bool,
    /// Its tier: 0 to 9. Backends of the lowest tier serve first.
    #[serde(default)]
    pub tier: u8,
    /// Cap on its sessions; 0 means none.
    pub connections_max: u32,
    /// The operator's intent.
    pub intent: IntentName,
    /// What a member source wishes that restricts it: `starting`, `draining` or `suspect`. An
    /// agent can wish `draining`. `null` if none does.
    #[serde(default)]
    pub wish: Option<String>,
    /// The source with this wish, as in [`MemberSourceDoc::source`], or `agent`.
    #[serde(default)]
    pub wished_by: Option<String>,
    /// It is from a member source, and no connect to it has succeeded yet. Only in pools
    /// without probes.
    #[serde(default)]
    pub unverified: bool,
    /// The role that its probes have found; `null` if they have found none.
    #[serde(default)]
    pub role: Option<RoleDoc>,
    /// The result of its probes and heartbeats.
    pub observation: ObservationName,
    /// It is ejected now.
    pub ejected: bool,
    /// It gets one trial session at a time, after an ejection.
    pub on_trial: bool,
    /// Times it was ejected.
    pub ejections_total: u64,
    /// Times a guard prevented an ejection.
    pub ejections_held_total: u64,
    /// It may receive new sessions.
    pub eligible: bool,
    /// Share of its weight during a slow start; 100 after it.
    pub ramp_percent: u32,
    /// `null` if none was received, none is required and none was rejected.
    pub heartbeat: Option<BackendHeartbeatDoc>,
    /// Sessions that use it, counted from pick to close.
    pub sessions_active: u32,
    /// Sessions that connected to it.
    pub sessions_total: u64,
    /// Failed connect attempts.
    pub connect_failures_total: u64,
    /// Bytes from clients.
    pub bytes_in_total: u64,
    /// Bytes to clients.
    pub bytes_out_total: u64,
    /// Time to connect.
    pub connect_seconds: QuantilesDoc,
    /// Time from the connection to the backend's first byte.
    pub first_byte_seconds: QuantilesDoc,
    /// The newest state change; `null` if there was none.
    pub last_transition: Option<TransitionDoc>,
}

/// The role of a backend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RoleDoc {
    /// The role in the newest answer.
    pub name: RoleName,
    /// Time since probes have found this role and no other.
    pub seconds: f64,
    /// It is one of several primaries of its pool, and not the one in force.
    pub outranked: bool,
}

/// A backend's heartbeats. Fields are `null` if none was received.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackendHeartbeatDoc {
    /// What their arrival means for the backend.
    pub pulse: PulseName,
    /// The state that the sender reports.
    pub sender_state: Option<SenderStateName>,
    /// Time since the newest one.
    pub silent_seconds: Option<f64>,
    /// Time without a heartbeat after which it is suspect.
    pub timeout_seconds: Option<f64>,
    /// Share of lost heartbeats, 0 to 1.
    pub loss: Option<f64>,
    /// The load that the sender reports, 0 to 1000.
    pub load: Option<u16>,
    /// Why it stays in rotation although it is confirmed as down; else `null`.
    pub held: Option<String>,
    /// The last rejected heartbeat in its name.
    pub rejected: Option<RejectedDoc>,
}

/// Quantiles; both `null` before the first measurement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuantilesDoc {
    /// Median.
    pub p50: Option<f64>,
    /// 99th percentile.
    pub p99: Option<f64>,
}

/// One change of a backend's state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TransitionDoc {
    /// State before the change.
    pub from: BackendStateName,
    /// State after the change.
    pub to: BackendStateName,
    /// The evidence, in words.
    pub reason: String,
    /// Time since the change.
    pub seconds_ago: f64,
    /// Duration of the state before the change.
    pub lasted_seconds: f64,
}

/// A removed backend that still has sessions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RemovedBackendDoc {
    /// Its former pool.
    pub pool: String,
    /// Its name in that pool.
    pub name: String,
    /// `IP:PORT` or `unix:PATH`.
    pub address: String,
    /// Open sessions.
    pub sessions_active: u32,
}

/// Writes whole numbers without a fraction, because most weights are whole.
pub(super) fn whole_if_it_is<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    match value.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(value) {
        true => serializer.serialize_u32(*value as u32),
        false => serializer.serialize_f64(*value),
    }
}
