//! Stopping in order: `leave_delay`, in which routers notice; then
//! no new clients; sessions finish until the deadline, the rest is cut and counted,
//! every thread is joined.
//!
//! Part of the control loop. How far a drain is, `lifecycle` knows.

use super::RunEnd;
use super::control_loop::Control;
use super::lifecycle::DrainProgress;
use std::time::Duration;
use tidegate_core::outcome::Cause;
use tidegate_dataplane::worker::WorkerCommand;

impl Control {
    /// A signal to stop: leaves, and if it leaves already, drains at once.
    pub(super) fn told_to_stop(&mut self, why: &str) {
        if self.lifecycle.is_leaving() {
            self.begin_drain(why);
        } else {
            self.leave(why);
        }
    }

    /// Says that it is not ready any more, and starts the drain `leave_delay`
    /// later; without effect once it has said so.
    pub(super) fn leave(&mut self, why: &str) {
        let delay = self.reloads.config().process.leave_delay;
        if !self.lifecycle.is_serving() {
            return;
        }
        if delay.is_zero() {
            self.begin_drain(why);
            return;
        }
        self.cancel_upgrade();
        self.lifecycle.leave(delay);
        tracing::info!(reason = why, leave_delay = ?delay, "leaving; /ready fails, and clients are accepted until leave_delay ends or a second signal arrives");
    }

    /// Starts the drain; without effect while one is under way.
    pub(super) fn begin_drain(&mut self, why: &str) {
        if self.lifecycle.is_draining() {
            return;
        }
        self.cancel_upgrade();
        self.lifecycle.notifier().stopping();
        self.binds.retire_all(self.workers.list(), &self.supervised);
        self.start_draining(why);
        self.order_end_within(self.reloads.config().process.drain_timeout);
    }

    /// Starts a drain in which the listeners are not this function's business: another
    /// process may have them.
    pub(super) fn start_draining(&mut self, why: &str) {
        let timeout = self.reloads.config().process.drain_timeout;
        let sessions = self.sessions();
        tracing::info!(
            reason = why,
            sessions,
            ?timeout,
            "draining; no new connections are accepted"
        );
        self.lifecycle.drain(timeout);
    }

    /// Looks at a drain's progress; gives the number of sessions cut once it is
    /// over.
    pub(super) fn drain_step(&mut self) -> Option<u32> {
        if self.lifecycle.has_left() {
            self.begin_drain("leave_delay ended");
        }
        let closed = self.binds.forget_retired();
        self.report();
        // Those of the process before go on until the same deadline.
        let open = self.sessions();
        // What the process before still counts goes on with this one's farewell.
        let counted = !self.upgrades.handed_over()
            || !self.upgrades.awaits_old_process()
            || self.lifecycle.is_past_deadline();
        let over = closed && counted && !self.upgrades.is_stepping_down();
        match self.lifecycle.drain_step(open, over) {
            DrainProgress::Wait => None,
            DrainProgress::Cut => {
                tracing::warn!(
                    sessions = open,
                    "drain timeout reached; resetting the remaining sessions"
                );
                self.workers.send_all(|| WorkerCommand::ResetAll(Cause::DrainDeadline));
                self.order_end_within(Duration::ZERO);
                None
            }
            DrainProgress::Done(cut) => Some(cut),
        }
    }

    /// Sessions of this process and those before.
    pub(super) fn sessions(&self) -> u32 {
        self.workers.sessions().saturating_add(self.upgrades.sessions_elsewhere())
    }

    /// Ends the workers and flushes the access log.
    pub(super) async fn finish(&mut self, cut: u32) -> RunEnd {
        self.send_final_counts().await;
        self.workers.finish().await;
        self.admin.finish().await;
        self.lifecycle.remove_pid_file();
        tracing::info!(sessions_reset = cut, "drained");
        RunEnd::Drained { cut }
    }
}
