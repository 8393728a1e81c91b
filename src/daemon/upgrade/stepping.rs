//! The first second after *serving*, in the old process: it accepts no connections but
//! keeps its sockets, and accepts again if the new process fails.
//!
//! Part of the control loop. It covers failures that no check before *serving* can find:
//! a signal, a resource limit, a bug in the first sessions of the new process.

use super::message::Ready;
use super::process;
use super::reports::OldProcessOrder;
use super::{UpgradeEvent, Upgrades};
use crate::control_loop::Control;
use crate::event_log::NewEvent;
use crate::supervised;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_api::names::EventLevelName;
use tidegate_core::model::BindKey;
use tidegate_net::clock;
use tokio::sync::oneshot;

/// Time that the new process must run before this process gives up its sockets.
const STEPPING_DOWN: Duration = Duration::from_secs(1);

/// Timeout for reading the last orders of a new process that has exited. It matters only
/// on a host with too little CPU.
const LAST_ORDERS_MAX: Duration = Duration::from_secs(2);

/// Timeout for the exit status of a new process that has exited.
const REAP_MAX: Duration = Duration::from_secs(2);

/// State of an old process that can still accept again.
#[derive(Debug)]
pub(super) struct SteppingDown {
    until: Instant,
    /// Addresses that the new process does not serve.
    not_taken: Vec<BindKey>,
    admin_taken: bool,
    /// Process ID of the new process, if this process is its parent.
    child: Option<u32>,
    /// Exit status of the new process, if this process is its parent.
    ended: Option<oneshot::Receiver<ExitStatus>>,
}

// === impl SteppingDown ===

impl SteppingDown {
    pub(super) async fn next(&mut self) -> UpgradeEvent {
        let until = self.until.into();
        tokio::select! {
            status = self.failed() => return UpgradeEvent::Ended(status),
            () = tokio::time::sleep_until(until) => {}
        }
        // If this process was stopped, the timer can expire before an earlier exit is seen.
        if self.child.is_some_and(process::has_ended)
            && let Ok(status) = tokio::time::timeout(REAP_MAX, self.failed()).await
        {
            return UpgradeEvent::Ended(status);
        }
        UpgradeEvent::SteppedDown
    }

    /// Waits until the new process has exited with an error.
    async fn failed(&mut self) -> ExitStatus {
        if let Some(receiver) = &mut self.ended {
            let received = receiver.await;
            // A completed receiver must not be polled again.
            self.ended = None;
            if let Ok(status) = received
                && !status.success()
            {
                return status;
            }
        }
        std::future::pending().await
    }
}

// === impl Upgrades ===

impl Upgrades {
    /// Returns whether this process can still accept again.
    pub(crate) fn is_stepping_down(&self) -> bool {
        self.stepping_down.is_some()
    }
}

// === impl Control ===

impl Control {
    pub(super) fn step_down(
        &mut self,
        ready: &Ready,
        pid: u32,
        ended: oneshot::Receiver<ExitStatus>,
    ) {
        let until = clock::now() + STEPPING_DOWN;
        let (not_taken, admin_taken) = (ready.not_taken.clone(), ready.admin_taken);
        self.binds.step_down(&not_taken, self.workers.list());
        self.evidence.heartbeats.step_down();
        self.sources.stop();
        if admin_taken {
            self.admin.step_down();
        }
        let child = self.supervised.link().is_none().then_some(pid);
        let ended = Some(ended);
        self.upgrades.stepping_down =
            Some(SteppingDown { until, not_taken, admin_taken, child, ended });
        self.start_draining("upgrade: the new process serves");
    }

    /// Gives up the sockets: the new process has run long enough.
    pub(super) fn stepped_down(&mut self) {
        let Some(stepping) = self.upgrades.stepping_down.take() else { return };
        self.binds.hand_over(&stepping.not_taken, self.workers.list(), &self.supervised);
        self.evidence.heartbeats.hand_over();
        if stepping.admin_taken {
            self.admin.hand_over();
        }
        if let Some(link) = self.supervised.link() {
            link.sockets_closed();
        }
    }

    /// Serves again after the new process has exited.
    pub(crate) async fn resume_serving(&mut self, status: ExitStatus) {
        // Too late: this process has given up its sockets, and the supervisor knows it.
        let Some(stepping) = self.upgrades.stepping_down.take() else { return };
        let reason = supervised::exit_reason(status);
        tracing::error!(reason, "new process exited; this process accepts connections again");
        let text = format!("new process exited; this process accepts connections again: {reason}");
        self.telemetry.events.record(NewEvent::of_process(EventLevelName::Bad, text));
        self.take_last_intents().await;
        self.upgrades.new_process = None;
        self.upgrades.counts.done = self.upgrades.counts.done.saturating_sub(1);
        self.upgrades.counts.failed += 1;
        self.binds.resume(&stepping.not_taken, self.workers.list());
        if stepping.admin_taken {
            let readiness = self.lifecycle.readiness().clone();
            let counters = Arc::clone(self.telemetry.local());
            self.admin.serve_again(&self.reloads.started_with().admin, readiness, counters);
        }
        if let Err(error) = self.evidence.heartbeats.resume(self.reloads.config()) {
            tracing::error!(error, "cannot receive heartbeats again");
        }
        self.sources.configure(self.reloads.config());
        self.lifecycle.serve_again();
        if let Some(link) = self.supervised.link() {
            link.resumed();
        }
        self.keep_intents();
        self.supervised.in_force.write();
    }

    /// Adopts the intents that operators set in the new process: those it sent as orders,
    /// and those it left with the supervisor. Both happen before an operator gets an answer.
    async fn take_last_intents(&mut self) {
        let mut intents = Vec::new();
        if let Some(new_process) = &mut self.upgrades.new_process {
            let orders = &mut new_process.orders;
            // The channel closes after the last order, because the new process has exited.
            let all = async {
                while let Some(order) = orders.recv().await {
                    intents.extend(order.intent);
                }
            };
            let _ = tokio::time::timeout(LAST_ORDERS_MAX, all).await;
        }
        for intent in intents {
            self.execute_order(&OldProcessOrder {
                intent: Some(intent),
                ..OldProcessOrder::default()
            });
        }
        if let Some(newer) = self.supervised.read_intents() {
            let effects = self.controller.adopt_intents(&newer, clock::now());
            self.apply_effects(effects);
        }
    }
}
