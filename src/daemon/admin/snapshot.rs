//! Everything status and metrics are rendered from, borrowed for one rendering.
//!
//! Filled in by the control loop in `daemon`, read by the pure renderers. It holds
//! no locks: counters are read while workers go on counting, so sums of one
//! rendering may differ by what happened meanwhile.

use super::process::ProcessFacts;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::control::ControlStatus;
use tidegate_core::control::source_ports::{PortLimits, PortWatch};
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::metrics::histograms::MergedHistograms;
use tidegate_core::suspicion::rejections::Rejection;
use tidegate_net::budget::MemoryBudget;
use tidegate_net::confinement::SandboxReport;

/// One moment of the whole process.
#[derive(Debug, Clone, Copy)]
pub struct AdminSnapshot<'a> {
    /// Frontends, pools, backends.
    pub control: &'a ControlStatus,
    /// In worker order.
    pub workers: &'a [Arc<WorkerCounters>],
    /// Connect, first-byte and session times.
    pub latency: &'a MergedHistograms,
    /// Of the program.
    pub version: &'a str,
    /// Engine in use, such as `epoll`.
    pub engine: &'a str,
    /// Why that engine.
    pub engine_reason: &'a str,
    /// Now; ages in status are counted from here.
    pub now: Instant,
    /// Since the process started.
    pub uptime: Duration,
    /// Whether it is on its way out.
    pub state: ServiceState,
    /// Reloads since the start, by result.
    pub reloads: ReloadCounts,
    /// Changes of standing that the log left out.
    pub transitions_unlogged: u64,
    /// Upgrades in place, by result.
    pub upgrades: UpgradeCounts,
    /// Tables published so far.
    pub table_serial: u64,
    /// Sessions open in the whole process.
    pub connections_active: u32,
    /// Cap on those.
    pub connections_max: u32,
    /// Clients in line, by pool; pools without any are left out.
    pub queued: &'a HashMap<Arc<str>, usize>,
    /// What sessions' buffers take.
    pub buffers: &'a MemoryBudget,
    /// Times bytes were left with the kernel for want of room in those.
    pub buffers_refused: u64,
    /// Settings that were accepted and wait for a restart, in words.
    pub warnings: &'a [String],
    /// Admin connections closed to make room for newer ones.
    pub admin_crowded: u64,
    /// What confines the process.
    pub confinement: &'a SandboxReport,
    /// What runs short on this machine, in words.
    pub troubles: &'a [String],
    /// What the control thread counts of trouble of our own.
    pub control_counts: &'a WorkerCounters,
    /// Lines of the program's log that were lost.
    pub log_dropped: u64,
    /// Local ports in use.
    pub ports: &'a PortWatch,
    /// What the kernel has of those.
    pub port_limits: PortLimits,
    /// What the kernel says of the process.
    pub process: ProcessFacts,
    /// What the receiver of heartbeats has counted.
    pub heartbeats: &'a HeartbeatCounts,
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

/// Where the process is in its life, as status shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServiceState {
    /// Takes new connections.
    Serving,
    /// Finishes old ones.
    Draining,
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

// === impl ServiceState ===

impl ServiceState {
    /// As in status.
    pub fn name(self) -> &'static str {
        match self {
            ServiceState::Serving => "serving",
            ServiceState::Draining => "draining",
        }
    }
}
