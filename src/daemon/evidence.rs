//! Collects evidence about backends: probe results, heartbeats and failed connects.
//!
//! Owned by the control loop, which feeds the evidence to the controller. It never
//! interprets the evidence.

use super::due;
use super::heartbeats::HeartbeatReceiver;
use crate::probe::runner::{PROBES_RUNNING_MAX, ProbeRunner};
use crate::probe_helper::ProbeHelper;
use std::sync::Arc;
use std::time::Instant;
use tidegate_core::control::ControlEvent;
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_dataplane::worker::context::{ReportQueue, WorkerReport};
use tokio::sync::mpsc;

/// Probe results that wait for the control loop at most.
const PROBE_RESULTS_MAX: usize = 1024;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Evidence {
    pub(super) probes: ProbeRunner,
    pub(super) helper: ProbeHelper,
    results: mpsc::Receiver<ControlEvent>,
    pub(super) heartbeats: HeartbeatReceiver,
    reports: Arc<ReportQueue>,
}

/// New evidence, or a due decision.
#[derive(Debug)]
pub(super) enum EvidenceEvent {
    /// A probe result. More may wait.
    Probed(ControlEvent),
    /// Reports of the workers.
    Reports,
    /// Heartbeats have arrived, or the controller's next decision is due.
    Due,
}

// === impl Evidence ===

impl Evidence {
    /// Starts the probe runner on the current runtime. `counters`: where local errors of
    /// probes are counted.
    pub(super) fn new(
        heartbeats: HeartbeatReceiver,
        reports: Arc<ReportQueue>,
        counters: Arc<WorkerCounters>,
        helper: ProbeHelper,
    ) -> Evidence {
        let (sender, results) = mpsc::channel(PROBE_RESULTS_MAX);
        let probes = ProbeRunner::start(sender, PROBES_RUNNING_MAX, counters, helper.clone());
        Evidence { probes, helper, results, heartbeats, reports }
    }

    /// Waits for the next event. `decide_at`: when the controller's next decision is due.
    pub(super) async fn wake(&mut self, decide_at: Option<Instant>) -> EvidenceEvent {
        tokio::select! {
            Some(event) = self.results.recv() => EvidenceEvent::Probed(event),
            () = self.reports.arrived() => EvidenceEvent::Reports,
            () = self.heartbeats.arrived() => EvidenceEvent::Due,
            () = due::reached(decide_at) => EvidenceEvent::Due,
        }
    }

    /// Converts `event` to events of the controller, without heartbeats. Includes all
    /// waiting probe results, so that they cause a single new table.
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

    /// Takes all waiting probe results.
    pub(super) fn take_probed(&mut self) -> impl Iterator<Item = ControlEvent> {
        std::iter::from_fn(|| self.results.try_recv().ok())
    }
}
