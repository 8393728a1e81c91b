//! The last second of a process whose successor serves: it accepts nothing, but keeps
//! everything, and goes on if the successor ends.
//!
//! Part of the control loop. A successor that has got so far and ends at once has met
//! something that no check could show: a signal, a limit, a bug in its first sessions.

use super::message::Ready;
use super::process;
use super::reports::OldProcessOrder;
use super::{UpgradeEvent, Upgrades};
use crate::control_loop::Control;
use crate::supervised;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::model::BindKey;
use tidegate_net::clock;
use tokio::sync::oneshot;

/// How long the successor has to live.
const STEPPING_DOWN: Duration = Duration::from_secs(1);

/// How long its last orders may take to be read once it has ended: a bound for a
/// machine that is short of CPU.
const LAST_ORDERS_MAX: Duration = Duration::from_secs(2);

/// How long the status of a successor that has ended may take to be collected.
const COLLECTED_MAX: Duration = Duration::from_secs(2);

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct SteppingDown {
    until: Instant,
    /// Addresses the successor does not serve.
    not_taken: Vec<BindKey>,
    admin_taken: bool,
    /// The successor, where this process is its parent.
    child: Option<u32>,
    /// Its end, where this process is its parent.
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
        // This process may have been stopped meanwhile: its clock has gone on without it.
        if self.child.is_some_and(process::has_ended)
            && let Ok(status) = tokio::time::timeout(COLLECTED_MAX, self.failed()).await
        {
            return UpgradeEvent::Ended(status);
        }
        UpgradeEvent::SteppedDown
    }

    /// Waits until the successor has ended without success.
    async fn failed(&mut self) -> ExitStatus {
        if let Some(receiver) = &mut self.ended {
            let came = receiver.await;
            // It is not to be asked again.
            self.ended = None;
            if let Ok(status) = came
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
    /// Whether this process might go on yet.
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
        if admin_taken {
            self.admin.step_down();
        }
        let child = self.supervised.link().is_none().then_some(pid);
        let ended = Some(ended);
        self.upgrades.stepping_down =
            Some(SteppingDown { until, not_taken, admin_taken, child, ended });
        self.start_draining("upgrade: the new process serves");
    }

    /// The successor lives: this process lets go.
    pub(super) fn stepped_down(&mut self) {
        let Some(stepping) = self.upgrades.stepping_down.take() else { return };
        self.binds.hand_over(&stepping.not_taken, self.workers.list(), &self.supervised);
        self.evidence.heartbeats.hand_over();
        if stepping.admin_taken {
            self.admin.hand_over();
        }
        if let Some(link) = self.supervised.link() {
            link.let_go();
        }
    }

    /// The successor has ended: this process serves again.
    pub(crate) async fn go_on(&mut self, status: ExitStatus) {
        // Too late: the supervisor learns of it by what was said before.
        let Some(stepping) = self.upgrades.stepping_down.take() else { return };
        let reason = supervised::in_words(status);
        tracing::error!(reason, "new process exited; this process accepts connections again");
        self.take_last_intents().await;
        self.upgrades.successor = None;
        self.upgrades.counts.done = self.upgrades.counts.done.saturating_sub(1);
        self.upgrades.counts.failed += 1;
        self.binds.go_on(&stepping.not_taken, self.workers.list());
        if stepping.admin_taken {
            let readiness = self.lifecycle.readiness().clone();
            let counters = Arc::clone(self.telemetry.local());
            self.admin.serve_again(&self.reloads.started_with().admin, readiness, counters);
        }
        if let Err(error) = self.evidence.heartbeats.go_on(self.reloads.config()) {
            tracing::error!(error, "cannot receive heartbeats again");
        }
        self.lifecycle.serve_again();
        if let Some(link) = self.supervised.link() {
            link.goes_on();
        }
        self.keep_intents();
        self.supervised.in_force.write();
    }

    /// What operators have wanted of the successor: what it has sent here, and what it
    /// has left with the supervisor, which comes before an operator has an answer.
    async fn take_last_intents(&mut self) {
        let mut intents = Vec::new();
        if let Some(successor) = &mut self.upgrades.successor {
            let orders = &mut successor.orders;
            // It has ended, and so its orders end.
            let all = async {
                while let Some(order) = orders.recv().await {
                    intents.extend(order.intent);
                }
            };
            let _ = tokio::time::timeout(LAST_ORDERS_MAX, all).await;
        }
        for intent in intents {
            self.obey(&OldProcessOrder { intent: Some(intent), ..OldProcessOrder::default() });
        }
        if let Some(newer) = self.supervised.read_intents() {
            let effects = self.controller.adopt_intents(&newer, clock::now());
            self.apply_effects(effects);
        }
    }
}
