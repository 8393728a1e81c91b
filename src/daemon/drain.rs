//! Stops the process: `leave_delay`, drain, end of the workers.
//!
//! Part of the control loop. `lifecycle` keeps the state and the deadline.
//!
//! 1. During `leave_delay`, `/ready` fails and clients are accepted, so that routers can
//!    react.
//! 2. The drain accepts no new clients and lets sessions finish until the deadline.
//! 3. The remaining sessions are reset and counted, and every thread is joined.

use super::RunEnd;
use super::control_loop::Control;
use super::event_log::NewEvent;
use super::lifecycle::DrainProgress;
use std::time::Duration;
use tidegate_api::names::EventLevelName;
use tidegate_core::outcome::Cause;
use tidegate_dataplane::worker::WorkerCommand;

impl Control {
    /// Handles a stop signal: starts `leave_delay`, or ends it if it has already started.
    pub(super) fn stop_signal(&mut self, why: &str) {
        if self.lifecycle.is_leaving() {
            self.begin_drain(why);
        } else {
            self.leave(why, why);
        }
    }

    /// Reports not ready and schedules the drain after `leave_delay`. No effect if the
    /// process is already leaving or draining. `who`: the originator, as events name it.
    pub(super) fn leave(&mut self, why: &str, who: &str) {
        let delay = self.reloads.config().process.leave_delay;
        if !self.lifecycle.is_serving() {
            return;
        }
        let text = "stop ordered: no new clients, open sessions finish";
        self.telemetry.events.record(NewEvent::of_process(EventLevelName::Info, text).by(who));
        if delay.is_zero() {
            self.begin_drain(why);
            return;
        }
        self.cancel_upgrade();
        self.lifecycle.leave(delay);
        tracing::info!(reason = why, leave_delay = ?delay, "leaving; /ready fails, and clients are accepted until leave_delay ends or a second signal arrives");
    }

    /// Starts the drain. No effect if the process is already draining.
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

    /// Starts a drain without retiring the listeners, which another process may use.
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
        self.sources.stop();
    }

    /// Checks the drain. Returns the number of sessions that were reset when the drain
    /// is complete.
    pub(super) fn drain_step(&mut self) -> Option<u32> {
        if self.lifecycle.has_left() {
            self.begin_drain("leave_delay ended");
        }
        let closed = self.binds.close_retired();
        self.report();
        // Includes the sessions of old processes, which have the same deadline.
        let open = self.sessions();
        // After a handover, the final counts of this process must include the final
        // counts of its old process.
        let counted = !self.upgrades.handed_over()
            || !self.upgrades.awaits_old_process()
            || self.lifecycle.is_past_deadline();
        let over = closed && counted && !self.upgrades.is_stepping_down();
        match self.lifecycle.drain_step(open, over) {
            DrainProgress::Wait => None,
            DrainProgress::Reset => {
                tracing::warn!(
                    sessions = open,
                    "drain timeout reached; resetting the remaining sessions"
                );
                self.workers.send_all(|| WorkerCommand::ResetAll(Cause::DrainDeadline));
                self.order_end_within(Duration::ZERO);
                None
            }
            DrainProgress::Done(reset) => Some(reset),
        }
    }

    /// Returns the open sessions of this process and of old processes.
    pub(super) fn sessions(&self) -> u32 {
        self.workers.sessions().saturating_add(self.upgrades.sessions_elsewhere())
    }

    /// Ends the workers, flushes the access log and closes the admin socket.
    pub(super) async fn finish(&mut self, reset: u32) -> RunEnd {
        self.send_final_counts().await;
        self.workers.finish().await;
        self.admin.finish().await;
        self.lifecycle.remove_pid_file();
        tracing::info!(sessions_reset = reset, "drained");
        RunEnd::Drained { reset }
    }
}
