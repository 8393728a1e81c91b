//! What this process reports of itself: its log, its counts and latencies, and what is
//! rendered of them for status and metrics.
//!
//! Owned by the control loop. It changes nothing about traffic.

use super::due;
use super::logging::LogHandle;
use super::ports::PortSampler;
use super::rendering::{Latencies, Rendering};
use super::transition_log::TransitionLog;
use super::upgrade::RareCounters;
use std::sync::Arc;
use std::time::{Instant, SystemTime};
use tidegate_core::control::Notice;
use tidegate_core::health::Transition;
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::model::LogLevel;
use tidegate_net::clock;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Telemetry {
    pub(super) started: Instant,
    pub(super) started_wall: SystemTime,
    pub(super) latency: Latencies,
    pub(super) rendering: Rendering,
    pub(super) ports: PortSampler,
    /// What the control thread counts.
    local: Arc<WorkerCounters>,
    log: LogHandle,
    transitions: TransitionLog,
    /// Of the processes before.
    before: RareCounters,
}

/// What there is to do.
#[derive(Debug)]
pub(super) enum TelemetryEvent {
    /// Status or metrics are under way.
    Render,
    /// It is time to look at some backends' local ports.
    SamplePorts,
    /// Lines of the log have been left out, and it is time to say how many.
    Suppressed,
}

// === impl Telemetry ===

impl Telemetry {
    pub(super) fn new(log: LogHandle, local: Arc<WorkerCounters>) -> Telemetry {
        Telemetry {
            started: clock::now(),
            started_wall: clock::wall(),
            latency: Latencies::default(),
            rendering: Rendering::default(),
            ports: PortSampler::new(clock::now()),
            local,
            log,
            transitions: TransitionLog::default(),
            before: RareCounters::default(),
        }
    }

    /// What is to be done next.
    pub(super) async fn wake(&mut self) -> TelemetryEvent {
        let (ports_due, transitions_due) = (self.ports.due(), self.transitions.due());
        tokio::select! {
            () = self.rendering.due() => TelemetryEvent::Render,
            () = due::reached(Some(ports_due)) => TelemetryEvent::SamplePorts,
            () = due::reached(transitions_due) => TelemetryEvent::Suppressed,
        }
    }

    /// What the control thread counts.
    pub(super) fn local(&self) -> &Arc<WorkerCounters> {
        &self.local
    }

    /// Changes the level of the log.
    pub(super) fn set_log_level(&self, level: LogLevel) {
        self.log.set_level(level);
    }

    /// Logs a backend's change of state, where its pool has a line left.
    pub(super) fn log_transition(&mut self, transition: &Transition) {
        self.transitions.log(transition, clock::now());
    }

    /// Says how many changes were left out.
    pub(super) fn log_suppressed(&mut self) {
        self.transitions.log_suppressed(clock::now());
    }

    /// Logs what an operator should know of.
    pub(super) fn log_notice(&self, notice: &Notice) {
        if notice.pool.is_empty() {
            tracing::warn!("{}", notice.message);
        } else {
            let backend = notice.backend.as_deref();
            tracing::warn!(pool = %notice.pool, backend, "{}", notice.message);
        }
    }

    /// Counts on from the processes before; may be called again with something newer.
    pub(super) fn restore_counts(&mut self, before: RareCounters) {
        self.before = before;
    }

    /// What hardly ever happens, as often as it did in this process and those before;
    /// `crowded`, `buffers_refused` and `unwritten` are this process's.
    pub(super) fn rare_counters(
        &self,
        crowded: u64,
        buffers_refused: u64,
        unwritten: u64,
    ) -> RareCounters {
        let before = self.before;
        RareCounters {
            log_dropped: before.log_dropped.saturating_add(self.log.dropped()),
            unlogged: before.unlogged.saturating_add(self.transitions.unlogged()),
            admin_crowded: before.admin_crowded.saturating_add(crowded),
            buffers_refused: before.buffers_refused.saturating_add(buffers_refused),
            state_unwritten: before.state_unwritten.saturating_add(unwritten),
        }
    }
}
