//! The loop of the control thread: waits for an event of one of its parts and handles
//! it.
//!
//! Entered by `start`. It never serves a session. If the loop blocks, sessions continue
//! with the last published table.
//!
//! - Each part is a type in its own file, with its own state and due times. Its `wake`
//!   resolves with the next event. Dropping a `wake` future loses no event.
//! - Code that needs several parts is in `impl Control`, in the file named after the
//!   task.

use super::RunEnd;
use super::admin_api::AdminEndpoint;
use super::binds::Binds;
use super::cap_watch::CapWatch;
use super::config_reloads::{ConfigReloads, ReloadEvent};
use super::evidence::{Evidence, EvidenceEvent};
use super::lifecycle::{Lifecycle, LifecycleEvent};
use super::member_sources::{MemberSources, SourceEvent};
use super::planes::Planes;
use super::signals::SignalKindReceived;
use super::state_directory::StateDirectory;
use super::supervised::{Supervised, SupervisedEvent};
use super::telemetry::{Telemetry, TelemetryEvent};
use super::upgrade::{RareCounters, UpgradeEvent, Upgrades};
use super::worker_set::WorkerSet;
use crate::admin::AdminRequest;
use tidegate_core::control::{ControlEvent, Controller};
use tidegate_net::clock;
use tidegate_supervisor::{SuccessorChanges, SupervisorEvent};

/// Everything the control thread owns.
#[derive(Debug)]
pub(super) struct Control {
    pub(super) controller: Controller,
    pub(super) evidence: Evidence,
    pub(super) sources: MemberSources,
    pub(super) planes: Planes,
    pub(super) workers: WorkerSet,
    pub(super) binds: Binds,
    pub(super) reloads: ConfigReloads,
    pub(super) admin: AdminEndpoint,
    pub(super) telemetry: Telemetry,
    pub(super) caps: CapWatch,
    pub(super) upgrades: Upgrades,
    pub(super) supervised: Supervised,
    pub(super) state: StateDirectory,
    pub(super) lifecycle: Lifecycle,
}

/// An event of one of the parts.
enum LoopEvent {
    Evidence(EvidenceEvent),
    Sources(SourceEvent),
    /// The builder has finished a pool's part of a table.
    Built(ControlEvent),
    Workers,
    /// Retired addresses may be ready to close.
    Binds,
    Reload(ReloadEvent),
    Request(AdminRequest),
    Telemetry(TelemetryEvent),
    Upgrade(UpgradeEvent),
    Supervised(SupervisedEvent),
    Lifecycle(LifecycleEvent),
}

impl Control {
    /// Runs until the process must end.
    pub(super) async fn run(mut self) -> RunEnd {
        self.reloads.watch();
        if self.upgrades.awaits_old_process() || self.supervised.in_force.needs_reload() {
            self.catch_up().await;
        }
        loop {
            let event = self.wake().await;
            if let Some(end) = self.handle(event).await {
                return end;
            }
            if let Some(end) = self.check_threads() {
                return end;
            }
        }
    }

    async fn wake(&mut self) -> LoopEvent {
        let decide_at = self.controller.next_due();
        tokio::select! {
            event = self.evidence.wake(decide_at) => LoopEvent::Evidence(event),
            event = self.sources.wake() => LoopEvent::Sources(event),
            event = self.planes.wake() => LoopEvent::Built(event),
            () = self.workers.wake() => LoopEvent::Workers,
            () = self.binds.wake() => LoopEvent::Binds,
            event = self.reloads.wake() => LoopEvent::Reload(event),
            request = self.admin.wake() => LoopEvent::Request(request),
            event = self.telemetry.wake() => LoopEvent::Telemetry(event),
            event = self.upgrades.wake() => LoopEvent::Upgrade(event),
            event = self.supervised.wake() => LoopEvent::Supervised(event),
            event = self.lifecycle.wake() => LoopEvent::Lifecycle(event),
        }
    }

    async fn handle(&mut self, event: LoopEvent) -> Option<RunEnd> {
        match event {
            LoopEvent::Evidence(event) => self.take_evidence(event),
            LoopEvent::Sources(event) => self.source_event(event),
            LoopEvent::Built(event) => self.feed([event]),
            LoopEvent::Workers => {
                self.lifecycle.readiness().set_stalled(self.workers.check());
                self.watch_caps();
            }
            LoopEvent::Binds => {}
            LoopEvent::Reload(event) => self.reload_event(event).await,
            LoopEvent::Request(request) => self.answer(request).await,
            LoopEvent::Telemetry(event) => self.telemetry_event(event),
            LoopEvent::Upgrade(event) => self.upgrade_event(event).await,
            LoopEvent::Supervised(event) => self.supervised_event(event).await,
            LoopEvent::Lifecycle(event) => return self.lifecycle_event(event).await,
        }
        None
    }

    /// Runs the checks that follow every event.
    fn check_threads(&mut self) -> Option<RunEnd> {
        self.bound_latency();
        self.note_views();
        // Every event restarts the wait of `Binds::wake`, which never ends on a busy loop.
        self.binds.close_retired();
        if self.evidence.heartbeats.has_exited() {
            tracing::error!("heartbeat receiver thread exited; shutting down");
            return Some(RunEnd::ThreadExited);
        }
        if self.workers.has_exited() {
            tracing::error!(
                "worker thread exited; shutting down so that another process can start"
            );
            return Some(RunEnd::ThreadExited);
        }
        None
    }

    async fn lifecycle_event(&mut self, event: LifecycleEvent) -> Option<RunEnd> {
        match event {
            LifecycleEvent::Signal(signal) => return self.signal(signal).await,
            LifecycleEvent::NotifyWatchdog => {
                let stalled = self.workers.longest_stall();
                self.lifecycle.notifier().beat(clock::now(), stalled);
            }
            LifecycleEvent::PidFile => self.lifecycle.write_pid_file(),
            LifecycleEvent::DrainStep => {
                let reset = self.drain_step()?;
                return Some(self.finish(reset).await);
            }
        }
        None
    }

    async fn signal(&mut self, signal: SignalKindReceived) -> Option<RunEnd> {
        match signal {
            SignalKindReceived::Stop(name) if self.upgrades.ignores_first_stop_signal() => {
                tracing::info!(
                    signal = name,
                    "already draining after an upgrade; the next signal exits at once"
                );
            }
            SignalKindReceived::Stop(_) if self.lifecycle.is_draining() => {
                tracing::warn!("second stop signal; exiting without waiting for sessions");
                return Some(RunEnd::SecondSignal);
            }
            SignalKindReceived::Stop(name) => self.stop_signal(name),
            SignalKindReceived::Reload => self.reload_by_signal().await,
            SignalKindReceived::Upgrade => {
                self.begin_upgrade(SuccessorChanges::default(), None, "SIGUSR2".to_owned(), None)
            }
        }
        None
    }

    async fn supervised_event(&mut self, event: SupervisedEvent) {
        match event {
            SupervisedEvent::Supervisor(SupervisorEvent::Resume(status)) => {
                self.resume_serving(status).await
            }
            SupervisedEvent::Supervisor(SupervisorEvent::SupervisorExited) => {
                tracing::error!("supervisor exited; draining and exiting");
                self.begin_drain("supervisor exited");
            }
            SupervisedEvent::Snapshot => {
                self.supervised.write(self.reloads.digest(), &self.controller);
            }
        }
    }

    fn telemetry_event(&mut self, event: TelemetryEvent) {
        match event {
            TelemetryEvent::Render => self.render_step(),
            TelemetryEvent::SampleTraffic => self.sample_traffic(),
            TelemetryEvent::Suppressed => self.telemetry.log_suppressed(),
            TelemetryEvent::SamplePorts => {
                let notices = self.telemetry.ports.sample(&self.controller, clock::now());
                notices.iter().for_each(|notice| self.telemetry.log_notice(notice));
            }
        }
    }

    /// Returns the counters of rare events, including those of old processes.
    pub(super) fn rare_counters(&self) -> RareCounters {
        let refused = self.workers.context().buffers.refused();
        self.telemetry.rare_counters(self.admin.dropped(), refused, self.state.failures())
    }
}
