//! The input of the status and metrics renderers, except the latencies.
//!
//! Filled by the control loop and moved to another thread, where the renderers read it.
//! It holds no locks. Workers keep counting during a rendering, so sums of one document
//! can differ by the events of that time.

use super::stream::StreamCounters;
use crate::event_log::{EventCounts, EventLog};
use crate::traffic::SharedTraffic;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_api::names::ServiceState;
use tidegate_core::control::source_ports::{PortLimits, PortWatch};
use tidegate_core::control::{ControlStatus, MembersIgnored};
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::model::SourceKey;
use tidegate_core::suspicion::rejections::Rejection;
use tidegate_core::table::Table;
use tidegate_discovery::resolver::Resolver;
use tidegate_discovery::tell::SourceCounters;
use tidegate_net::budget::MemoryBudget;
use tidegate_net::confinement::SandboxReport;

/// The state of the whole process at one moment.
#[derive(Debug)]
pub struct AdminSnapshot {
    /// Frontends, pools, backends.
    pub control: ControlStatus,
    /// The probe helper has ended.
    pub helper_failed: bool,
    /// In worker order.
    pub workers: Vec<Arc<WorkerCounters>>,
    /// Version of the program.
    pub version: &'static str,
    /// Engine in use, such as `epoll`.
    pub engine: &'static str,
    /// Why that engine.
    pub engine_reason: String,
    /// The time of the snapshot; ages are relative to it.
    pub now: Instant,
    /// The same time as Unix time in seconds.
    pub wall: f64,
    /// Time since the process started.
    pub uptime: Duration,
    /// `Serving` or `Draining`.
    pub state: ServiceState,
    /// Reloads since the start, by result.
    pub reloads: ReloadCounts,
    /// Backend state changes not logged because of the rate limit.
    pub transitions_unlogged: u64,
    /// Upgrades in place, by result.
    pub upgrades: UpgradeCounts,
    /// The table in force.
    pub table: Arc<Table>,
    /// Tables published so far.
    pub table_serial: u64,
    /// Sessions open in the whole process.
    pub connections_active: u32,
    /// Cap on those.
    pub connections_max: u32,
    /// Queued clients by pool, without pools whose queue is empty.
    pub queued: HashMap<Arc<str>, usize>,
    /// Memory used by session buffers.
    pub buffers: Arc<MemoryBudget>,
    /// Reads postponed because the cap on buffer memory was reached.
    pub buffers_refused: u64,
    /// Failed writes of operator intents to the state directory.
    pub state_unwritten: u64,
    /// Accepted settings that take effect after a restart, one sentence each.
    pub warnings: Vec<String>,
    /// Other warnings for status, such as local ports that are nearly used up.
    pub other_warnings: Vec<String>,
    /// Idle admin connections closed to accept newer ones.
    pub admin_dropped: u64,
    /// Events.
    pub events: EventCounts,
    /// Counts of the streams.
    pub streams: StreamCounters,
    /// The kept events.
    pub event_log: EventLog,
    /// The traffic of the last hour.
    pub traffic: SharedTraffic,
    /// The layers of the sandbox.
    pub confinement: SandboxReport,
    /// Local errors that the control thread counts.
    pub control_counts: Arc<WorkerCounters>,
    /// Lines of the program's log that were dropped.
    pub log_dropped: u64,
    /// Usage of local ports.
    pub ports: Arc<PortWatch>,
    /// Number of local ports that the kernel provides.
    pub port_limits: PortLimits,
    /// Counters of the member sources that this process asks.
    pub source_counters: HashMap<SourceKey, Arc<SourceCounters>>,
    /// Restarts of the thread of the member sources.
    pub source_restarts: u64,
    /// The resolver of the member sources; `None` without them.
    pub resolver: Option<Resolver>,
    /// Ignored members of sources, by reason.
    pub ignored_members: Vec<(MembersIgnored, u64)>,
    /// Counts of the heartbeat receiver.
    pub heartbeats: HeartbeatCounts,
    /// Cap on backends with metrics of their own. Above it no backend has its own series.
    pub backend_metrics_max: usize,
}

/// Counts of the heartbeat receiver; all zero if there is no receiver.
#[derive(Debug, Clone, Default)]
pub struct HeartbeatCounts {
    /// Addresses it listens on.
    pub listen: Vec<SocketAddr>,
    /// Accepted datagrams.
    pub accepted: u64,
    /// Rejected datagrams, by reason.
    pub rejected: Vec<(&'static str, u64)>,
    /// Datagrams that the kernel dropped because the receive buffer was full.
    pub kernel_drops: u64,
    /// Senders with rejected heartbeats, latest rejection first.
    pub rejections: Vec<Rejection>,
}

/// Reloads by result.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReloadCounts {
    /// A new generation took effect.
    pub changed: u64,
    /// The file was unchanged.
    pub unchanged: u64,
    /// The file was rejected, or a listener could not be bound.
    pub refused: u64,
}

/// Upgrades in place by result, including those of old processes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct UpgradeCounts {
    /// A new process took over.
    pub done: u64,
    /// The new process did not get to serving.
    pub failed: u64,
    /// The upgrade was rejected before a process was started.
    pub refused: u64,
}

#[cfg(test)]
impl AdminSnapshot {
    /// Returns the snapshot of a serving process with default values.
    pub(super) fn plain(control: ControlStatus, now: Instant) -> AdminSnapshot {
        use tidegate_core::control::source_ports::Reuse;
        AdminSnapshot {
            control,
            helper_failed: false,
            workers: Vec::new(),
            version: "0.1.0",
            engine: "epoll",
            engine_reason: "configured".to_owned(),
            now,
            wall: 1_000_000.0,
            uptime: Duration::from_millis(1_500),
            state: ServiceState::Serving,
            reloads: ReloadCounts::default(),
            transitions_unlogged: 0,
            upgrades: UpgradeCounts::default(),
            table: Arc::new(Table::empty()),
            table_serial: 12,
            connections_active: 5,
            connections_max: 100,
            queued: HashMap::from([("web".into(), 3)]),
            buffers: Arc::default(),
            buffers_refused: 0,
            state_unwritten: 0,
            warnings: vec!["workers waits".to_owned()],
            other_warnings: Vec::new(),
            admin_dropped: 0,
            events: EventCounts::default(),
            streams: StreamCounters::default(),
            event_log: EventLog::new(),
            traffic: SharedTraffic::default(),
            confinement: SandboxReport::none("off"),
            control_counts: Arc::new(WorkerCounters::new(1, 1)),
            log_dropped: 0,
            ports: Arc::default(),
            port_limits: PortLimits { ports: 28_232, reuse: Reuse::Loopback },
            source_counters: HashMap::new(),
            source_restarts: 0,
            resolver: None,
            ignored_members: Vec::new(),
            heartbeats: HeartbeatCounts::default(),
            backend_metrics_max: 100,
        }
    }
}
