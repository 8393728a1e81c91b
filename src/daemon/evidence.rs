//! What is measured of backends: results of probes, heartbeats, and connects that failed
//! in the workers.
//!
//! Owned by the control loop, which feeds all of it to the controller. It judges nothing.

use super::due;
use super::heartbeats::HeartbeatReceiver;
use crate::probe::runner::{PROBES_RUNNING_MAX, ProbeRunner};
use std::sync::Arc;
use std::time::Instant;
use tidegate_core::control::ControlEvent;
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_dataplane::worker::context::{ReportQueue, WorkerReport};
use tokio::sync::mpsc;

/// Probe results that may wait for the control loop.
const PROBE_RESULTS_MAX: usize = 1024;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Evidence {
    pub(super) probes: ProbeRunner,
    results: mpsc::Receiver<ControlEvent>,
    pub(super) heartbeats: HeartbeatReceiver,
    reports: Arc<ReportQueue>,
}

/// What has arrived.
#[derive(Debug)]
pub(super) enum EvidenceEvent {
    /// A probe's result; more may wait.
    Probed(ControlEvent),
    /// Reports of the workers.
    Reports,
    /// Heartbeats, or the time at which the controller has something to decide.
    Due,
}

// === impl Evidence ===

impl Evidence {
    /// Starts the probes on the current runtime; local errors are counted in `counters`.
    pub(super) fn new(
        heartbeats: HeartbeatReceiver,
        reports: Arc<ReportQueue>,
        counters: Arc<WorkerCounters>,
    ) -> Evidence {
        let (sender, results) = mpsc::channel(PROBE_RESULTS_MAX);
        let probes = ProbeRunner::start(sender, PROBES_RUNNING_MAX, counters);
        Evidence { probes, results, heartbeats, reports }
    }

    /// What arrives next; `decide_at` is when the controller wants to decide.
    pub(super) async fn wake(&mut self, decide_at: Option<Instant>) -> EvidenceEvent {
        tokio::select! {
            Some(event) = self.results.recv() => EvidenceEvent::Probed(event),
            () = self.reports.arrived() => EvidenceEvent::Reports,
            () = self.heartbeats.arrived() => EvidenceEvent::Due,
            () = due::reached(decide_at) => EvidenceEvent::Due,
        }
    }

    /// What `event` brings for the controller, beside heartbeats: results of probes that
    /// came together make one table.
    pub(super) fn take(&mut self, event: EvidenceEvent) -> Vec<ControlEvent> {
        match event {
            EvidenceEvent::Probed(first) => {
                let mut events = vec![first];
                events.extend(self.take_probed());
                events
            }
            EvidenceEvent::Reports => std::iter::from_fn(|| self.reports.pop())
                .map(|report| match report {
                    WorkerReport::ConnectFailed { backend, failure, in_a_row, begun } => {
                        ControlEvent::ConnectFailed { backend, failure, in_a_row, begun }
                    }
                })
                .collect(),
            EvidenceEvent::Due => vec![ControlEvent::Tick],
        }
    }

    /// Results of probes that wait.
    pub(super) fn take_probed(&mut self) -> impl Iterator<Item = ControlEvent> {
        std::iter::from_fn(|| self.results.try_recv().ok())
    }
}
