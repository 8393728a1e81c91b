//! Stopping in order: `leave_delay`, in which routers notice; then
//! no new clients; sessions finish until the deadline, the rest is cut and counted,
//! every thread is joined.
//!
//! Driven by the control loop's ticks.

use super::RunEnd;
use super::control_loop::Control;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tidegate_core::outcome::Cause;
use tidegate_dataplane::worker::WorkerCommand;
use tidegate_net::clock;

/// How often progress is looked at.
const STEP: Duration = Duration::from_millis(20);

/// How long cut sessions may take to be accounted for.
const CUT_GRACE: Duration = Duration::from_millis(1500);

/// How long workers may take to end once they are told to.
const JOIN_MAX: Duration = Duration::from_secs(2);

/// A drain under way.
#[derive(Debug)]
pub(super) struct DrainState {
    deadline: Instant,
    /// A point in time, not a pause: other events must not put it off.
    next_look: Instant,
    /// Set at the deadline: how many sessions were cut, and when.
    cut: Option<(u32, Instant)>,
}

// === impl DrainState ===

impl DrainState {
    /// When [`Control::drain_step`] is wanted next.
    pub(super) fn next_look(&self) -> Instant {
        self.next_look
    }
}

/// A process that was told to stop and still accepts, while `/ready` says no.
#[derive(Debug, Clone, Copy)]
pub(super) struct Leaving {
    /// Then the drain begins.
    pub(super) until: Instant,
}

impl Control {
    /// A signal to stop: leaves, and if it leaves already, drains at once.
    pub(super) fn told_to_stop(&mut self, why: &str) {
        if self.leaving.is_some() {
            self.begin_drain(why);
        } else {
            self.leave(why);
        }
    }

    /// Says that it is not ready any more, and starts the drain `leave_delay`
    /// later; without effect once it has said so.
    pub(super) fn leave(&mut self, why: &str) {
        let delay = self.config.process.leave_delay;
        if self.draining.is_some() || self.leaving.is_some() {
            return;
        }
        if delay.is_zero() {
            self.begin_drain(why);
            return;
        }
        self.cancel_upgrade();
        self.notifier.stopping();
        self.readiness.set_draining();
        self.leaving = Some(Leaving { until: clock::now() + delay });
        tracing::info!(reason = why, leave_delay = ?delay, "leaving: /ready says no, clients are still accepted; a second signal starts the drain");
    }

    /// Starts the drain; without effect while one is under way.
    pub(super) fn begin_drain(&mut self, why: &str) {
        if self.draining.is_some() {
            return;
        }
        self.leaving = None;
        self.cancel_upgrade();
        self.notifier.stopping();
        self.binds.retire_all(&self.workers, &self.supervised);
        self.start_draining(why);
        self.order_end_within(self.config.process.drain_timeout);
    }

    /// The same once another process has taken the listeners over.
    pub(super) fn drain_removed_binds(&mut self) {
        self.start_draining("another process serves");
    }

    fn start_draining(&mut self, why: &str) {
        self.readiness.set_draining();
        let timeout = self.config.process.drain_timeout;
        let sessions = self.sessions();
        tracing::info!(reason = why, sessions, ?timeout, "draining");
        let now = clock::now();
        self.draining = Some(DrainState { deadline: now + timeout, next_look: now, cut: None });
    }

    /// Looks at a drain's progress; gives the number of sessions cut once it is
    /// over.
    pub(super) fn drain_step(&mut self) -> Option<u32> {
        if self.leaving.is_some_and(|leaving| clock::now() >= leaving.until) {
            self.begin_drain("leave_delay is over");
        }
        let closed = self.binds.forget_retired();
        self.report();
        // Those of the process before go on until the same deadline.
        let open = self.sessions();
        let draining = self.draining.as_mut()?;
        let now = clock::now();
        draining.next_look = now + STEP;
        let cut = draining.cut.map_or(0, |(cut, _)| cut);
        // What the process before still counts goes on with this one's farewell.
        let counted = !self.upgrades.handed_over()
            || !self.upgrades.awaits_old_process()
            || now >= draining.deadline;
        if closed && open == 0 && counted && !self.upgrades.is_stepping_down() {
            return Some(cut);
        }
        match draining.cut {
            None if now >= draining.deadline => {
                draining.cut = Some((open, now));
                tracing::warn!(sessions = open, "drain deadline: sessions are cut");
                for worker in &self.workers {
                    worker.mailbox.send(WorkerCommand::ResetAll(Cause::DrainDeadline));
                }
                self.order_end_within(Duration::ZERO);
                None
            }
            Some((cut, at)) if now >= at + CUT_GRACE => Some(cut),
            _ => None,
        }
    }

    /// Sessions of this process and those before.
    pub(super) fn sessions(&self) -> u32 {
        let own = self.shared.sessions.load(Ordering::Relaxed);
        own.saturating_add(self.upgrades.sessions_elsewhere())
    }

    /// Another process wants this one to end within that time.
    pub(super) fn end_within(&mut self, time: Duration) {
        let now = clock::now();
        if let Some(draining) = &mut self.draining {
            draining.deadline = draining.deadline.min(now + time);
            draining.next_look = now;
        }
    }

    /// Ends the workers and flushes the access log.
    pub(super) async fn finish(mut self, cut: u32) -> RunEnd {
        self.send_final_counts().await;
        for worker in &self.workers {
            worker.mailbox.send(WorkerCommand::Stop);
        }
        let deadline = clock::now() + JOIN_MAX;
        while self.workers.iter().any(|worker| !worker.is_finished()) && clock::now() < deadline {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        for worker in self.workers.drain(..) {
            if worker.is_finished() {
                worker.join();
            } else {
                tracing::error!("a worker thread did not end in time and is abandoned");
            }
        }
        if let Some(access_log) = self.access_log.take() {
            let lost = access_log.close();
            if lost > 0 {
                tracing::warn!(lines = lost, "access-log lines lost at exit");
            }
        }
        if let Some(admin) = self.admin.take() {
            admin.ended().await;
        }
        drop(self.pid_file.take());
        tracing::info!(sessions_cut = cut, "drained");
        RunEnd::Drained { cut }
    }
}
