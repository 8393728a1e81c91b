//! `GET /v1/status`: the whole balancer at one moment.
//!
//! Written by `daemon`, read by `tidegate status`, `drain --wait` and the demo. Plain
//! data: nothing here is worked out.

use super::names::{
    BackendStateName, EngineName, IntentName, NoneEligible, ObservationName, PolicyName, PulseName,
    SenderStateName, ServiceState,
};
use serde::{Deserialize, Serialize, Serializer};
use std::net::SocketAddr;

/// The document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StatusDoc {
    /// Version of the program.
    pub version: String,
    /// Configurations accepted so far; the number of the one in force.
    pub generation: u64,
    /// Tables published so far.
    pub table_serial: u64,
    /// What moves the bytes of sessions.
    pub engine: EngineName,
    /// Why that one.
    pub engine_reason: String,
    /// Worker threads.
    pub workers: u64,
    /// Workers that make no progress.
    pub stalled: Vec<StalledWorkerDoc>,
    /// Panics of sessions and workers.
    pub worker_panics_total: u64,
    /// Restarts of workers after a panic.
    pub worker_restarts_total: u64,
    /// Since the process started.
    pub uptime_seconds: f64,
    /// `serving` or `draining`.
    pub state: ServiceState,
    /// Sessions open in the whole process.
    pub connections_active: u32,
    /// Cap on those.
    pub connections_max: u32,
    /// Settings that wait for a restart and what runs short, one sentence each.
    pub warnings: Vec<String>,
    /// Layer by layer.
    pub confinement: Vec<SandboxLayerDoc>,
    /// `null` where no pool takes heartbeats.
    pub heartbeat: Option<HeartbeatChannelDoc>,
    /// In file order.
    pub frontends: Vec<FrontendDoc>,
    /// In file order.
    pub pools: Vec<PoolDoc>,
    /// Backends no longer configured that still hold sessions.
    pub leaving: Vec<RemovedBackendDoc>,
}

/// A worker that makes no progress.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StalledWorkerDoc {
    /// From 0.
    pub worker: u64,
    /// For how long.
    pub seconds: f64,
    /// What it did last, in words.
    pub stage: String,
}

/// One layer that can confine the process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SandboxLayerDoc {
    /// Such as `seccomp`; as in the metrics.
    pub layer: String,
    /// Whether it confines anything.
    pub in_force: bool,
    /// How far, or why not.
    pub detail: String,
}

/// Heartbeats as a whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HeartbeatChannelDoc {
    /// Where they are received.
    pub listen: Vec<SocketAddr>,
    /// Heartbeats believed.
    pub accepted_total: u64,
    /// Heartbeats rejected, for any reason.
    pub rejected_total: u64,
    /// Heartbeats that the kernel dropped.
    pub kernel_drops_total: u64,
    /// Senders whose heartbeats were rejected, the last first; at most 64.
    pub rejections: Vec<RejectedDoc>,
    /// Times no silence counted, because the balancer was late or lost heartbeats.
    pub excuses_total: u64,
    /// No heartbeat at all arrives.
    pub silent: bool,
    /// Why no silent backend of any pool is taken out, if so.
    pub frozen: Option<FreezeDoc>,
}

/// A guard that is in force.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FreezeDoc {
    /// One sentence.
    pub reason: String,
    /// Since it is in force.
    pub seconds: f64,
}

/// The last rejected heartbeat of one sender.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RejectedDoc {
    /// Pool that it names; `null` where that could not be read.
    pub pool: Option<String>,
    /// Backend that it names.
    pub backend: Option<String>,
    /// Where it came from.
    pub from: Option<SocketAddr>,
    /// The key that it names.
    pub key: Option<u32>,
    /// As in the metrics.
    pub reason: String,
    /// The sender's clock less this host's; `null` where no key in force has signed.
    pub skew_seconds: Option<f64>,
    /// Whether pool and backend are proven.
    pub signed: bool,
    /// Rejections of this sender.
    pub total: u64,
    /// Of those, since a heartbeat of this sender was believed.
    pub in_a_row: u64,
    /// When the last one came.
    pub seconds_ago: f64,
    /// What an operator can do about it.
    pub help: String,
}

/// One frontend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FrontendDoc {
    /// Its name.
    pub name: String,
    /// Where it listens.
    pub binds: Vec<SocketAddr>,
    /// Name of its pool.
    pub pool: String,
    /// Cap on its sessions; 0 means none.
    pub connections_max: u32,
    /// Sessions open.
    pub sessions_active: u32,
    /// Connections accepted.
    pub sessions_total: u64,
    /// From clients.
    pub bytes_in_total: u64,
    /// To clients.
    pub bytes_out_total: u64,
    /// Clients rejected before they had a backend.
    pub refused_total: u64,
}

/// One pool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PoolDoc {
    /// Its name.
    pub name: String,
    /// How it picks backends.
    pub balance: PolicyName,
    /// What it does with clients while no backend is eligible; `null` while one is.
    pub none_eligible: Option<NoneEligible>,
    /// Why no silent backend is taken out, if so.
    pub frozen: Option<FreezeDoc>,
    /// Backends that its heartbeats brought.
    pub registered: u64,
    /// Most of those; 0 where none may register.
    pub registered_max: u32,
    /// Whether its backends are probed.
    pub probes: bool,
    /// Whether it takes heartbeats.
    pub heartbeats: bool,
    /// Clients in its queue.
    pub queued: u64,
    /// In file order, then registered ones by age.
    pub backends: Vec<BackendDoc>,
}

/// One backend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackendDoc {
    /// Unique in its pool.
    pub name: String,
    /// `IP:PORT` or `unix:PATH`.
    pub address: String,
    /// Heartbeats brought it; it is not in the file.
    pub registered: bool,
    /// As configured, or as its heartbeats ask for.
    pub weight: u32,
    /// As balanced by; 0 while it is not eligible.
    #[serde(serialize_with = "whole_if_it_is")]
    pub effective_weight: f64,
    /// It gets sessions only while no other backend is eligible.
    pub backup: bool,
    /// Cap on its sessions; 0 means none.
    pub connections_max: u32,
    /// What the operator wants.
    pub intent: IntentName,
    /// What probes and heartbeats say.
    pub observation: ObservationName,
    /// Out for a time after failures.
    pub ejected: bool,
    /// It gets one session at a time, after an ejection.
    pub on_trial: bool,
    /// Times it was ejected.
    pub ejections_total: u64,
    /// Times the pool's guard prevented that.
    pub ejections_held_total: u64,
    /// It may receive new sessions, all things considered.
    pub eligible: bool,
    /// Part of its weight that its slow start has reached; 100 when that is over.
    pub ramp_percent: u32,
    /// `null` where none were heard, none are needed and none were rejected.
    pub heartbeat: Option<BackendHeartbeatDoc>,
    /// Sessions that hold it, from pick to close.
    pub sessions_active: u32,
    /// Sessions that were connected to it.
    pub sessions_total: u64,
    /// Failed connect attempts.
    pub connect_failures_total: u64,
    /// From clients.
    pub bytes_in_total: u64,
    /// To clients.
    pub bytes_out_total: u64,
    /// Time to connect.
    pub connect_seconds: QuantilesDoc,
    /// Time from the connection to the backend's first byte.
    pub first_byte_seconds: QuantilesDoc,
    /// The newest change, if any.
    pub last_transition: Option<TransitionDoc>,
}

/// A backend's heartbeats; what was never heard is `null`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackendHeartbeatDoc {
    /// What their silence means.
    pub pulse: PulseName,
    /// What they ask for.
    pub sender_state: Option<SenderStateName>,
    /// Since the newest one.
    pub silent_seconds: Option<f64>,
    /// Silence that makes it suspect.
    pub timeout_seconds: Option<f64>,
    /// Share of them that is lost, 0 to 1.
    pub loss: Option<f64>,
    /// How busy the backend says it is, 0 to 1000.
    pub load: Option<u16>,
    /// Why it is not taken out though confirmed, if so.
    pub held: Option<String>,
    /// The last one in its name that was rejected.
    pub rejected: Option<RejectedDoc>,
}

/// Both `null` until something was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuantilesDoc {
    /// Median.
    pub p50: Option<f64>,
    /// 99 of 100 were no longer.
    pub p99: Option<f64>,
}

/// One change of a backend's state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TransitionDoc {
    /// Before.
    pub from: BackendStateName,
    /// After.
    pub to: BackendStateName,
    /// The evidence, in words.
    pub reason: String,
    /// When.
    pub seconds_ago: f64,
    /// How long the state before had lasted.
    pub lasted_seconds: f64,
}

/// A backend no longer configured that still holds sessions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RemovedBackendDoc {
    /// The pool it was in.
    pub pool: String,
    /// Its name there.
    pub name: String,
    /// `IP:PORT` or `unix:PATH`.
    pub address: String,
    /// Sessions it holds.
    pub sessions_active: u32,
}

/// Whole numbers without a fraction: most weights are.
pub(super) fn whole_if_it_is<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    match value.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(value) {
        true => serializer.serialize_u32(*value as u32),
        false => serializer.serialize_f64(*value),
    }
}
