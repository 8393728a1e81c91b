//! Everything that status and metrics are rendered from, except the latencies.
//!
//! Filled in by the control loop, taken to another thread and read there by the pure
//! renderers. It holds no locks: workers keep counting during a rendering, so its sums
//! may differ by what happened in that time.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_api::names::ServiceState;
use tidegate_core::control::ControlStatus;
use tidegate_core::control::source_ports::{PortLimits, PortWatch};
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::suspicion::rejections::Rejection;
use tidegate_net::budget::MemoryBudget;
use tidegate_net::confinement::SandboxReport;

/// One moment of the whole process.
#[derive(Debug)]
pub struct AdminSnapshot {
    /// Frontends, pools, backends.
    pub control: ControlStatus,
    /// In worker order.
    pub workers: Vec<Arc<WorkerCounters>>,
    /// Version of the program.
    pub version: &'static str,
    /// Engine in use, such as `epoll`.
    pub engine: &'static str,
    /// Why that engine.
    pub engine_reason: String,
    /// Now; ages in status are counted from here.
    pub now: Instant,
    /// Since the process started.
    pub uptime: Duration,
    /// `Serving` or `Draining`.
    pub state: ServiceState,
    /// Reloads since the start, by result.
    pub reloads: ReloadCounts,
    /// Changes of backends that the log left out.
    pub transitions_unlogged: u64,
    /// Upgrades in place, by result.
    pub upgrades: UpgradeCounts,
    /// Tables published so far.
    pub table_serial: u64,
    /// Sessions open in the whole process.
    pub connections_active: u32,
    /// Cap on those.
    pub connections_max: u32,
    /// Queued clients, by pool; pools without any are left out.
    pub queued: HashMap<Arc<str>, usize>,
    /// What sessions' buffers take.
    pub buffers: Arc<MemoryBudget>,
    /// Times bytes were left with the kernel because those were full.
    pub buffers_refused: u64,
    /// Times operators' intents could not be written to the state directory.
    pub state_unwritten: u64,
    /// Settings that were accepted and wait for a restart, in words.
    pub warnings: Vec<String>,
    /// What runs short on this host, in words.
    pub troubles: Vec<String>,
    /// Admin connections closed to make room for newer ones.
    pub admin_crowded: u64,
    /// The layers of the sandbox.
    pub confinement: SandboxReport,
    /// Local errors that the control thread counts.
    pub control_counts: Arc<WorkerCounters>,
    /// Lines of the program's log that were dropped.
    pub log_dropped: u64,
    /// Local ports in use.
    pub ports: Arc<PortWatch>,
    /// What the kernel has of those.
    pub port_limits: PortLimits,
    /// What the receiver of heartbeats has counted.
    pub heartbeats: HeartbeatCounts,
    /// With more backends than that the metrics have no series of each.
    pub backend_metrics_max: usize,
}

/// What the receiver of heartbeats has counted; all zero where there is none.
#[derive(Debug, Clone, Default)]
pub struct HeartbeatCounts {
    /// Where it listens.
    pub listen: Vec<SocketAddr>,
    /// Datagrams believed.
    pub accepted: u64,
    /// Datagrams refused, by reason.
    pub rejected: Vec<(&'static str, u64)>,
    /// Datagrams the kernel dropped because the socket's buffer was full.
    pub kernel_drops: u64,
    /// Senders whose heartbeats were refused, the last first.
    pub rejections: Vec<Rejection>,
}

/// How reloads ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReloadCounts {
    /// A new generation is in force.
    pub changed: u64,
    /// The file said nothing new.
    pub unchanged: u64,
    /// The file was bad, or a listener could not be bound.
    pub refused: u64,
}

/// How upgrades in place ended, those of the processes before included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct UpgradeCounts {
    /// Another process took over.
    pub done: u64,
    /// The new process did not get as far as serving.
    pub failed: u64,
    /// It was not tried.
    pub refused: u64,
}

#[cfg(test)]
impl AdminSnapshot {
    /// A serving process about which there is nothing else to say.
    pub(super) fn plain(control: ControlStatus, now: Instant) -> AdminSnapshot {
        use tidegate_core::control::source_ports::Reuse;
        AdminSnapshot {
            control,
            workers: Vec::new(),
            version: "0.1.0",
            engine: "epoll",
            engine_reason: "configured".to_owned(),
            now,
            uptime: Duration::from_millis(1_500),
            state: ServiceState::Serving,
            reloads: ReloadCounts::default(),
            transitions_unlogged: 0,
            upgrades: UpgradeCounts::default(),
            table_serial: 12,
            connections_active: 5,
            connections_max: 100,
            queued: HashMap::from([("web".into(), 3)]),
            buffers: Arc::default(),
            buffers_refused: 0,
            state_unwritten: 0,
            warnings: vec!["workers waits".to_owned()],
            troubles: Vec::new(),
            admin_crowded: 0,
            confinement: SandboxReport::none("off"),
            control_counts: Arc::new(WorkerCounters::new(1, 1)),
            log_dropped: 0,
            ports: Arc::default(),
            port_limits: PortLimits { ports: 28_232, reuse: Reuse::Loopback },
            heartbeats: HeartbeatCounts::default(),
            backend_metrics_max: 100,
        }
    }
}
