//! State of this process: starting, serving, leaving or draining.
//!
//! Owned by the control loop, which triggers each change. It reports the state through
//! `/ready`, the service manager and the pid file. It ends no session and closes no
//! listener: `drain` does.

use super::ProcessEnvironment;
use super::due;
use super::notify::Notifier;
use super::sandbox::AppliedSandbox;
use super::signals::{SignalKindReceived, Signals};
use crate::admin::ReadyState;
use std::time::{Duration, Instant};
use tidegate_net::clock;
use tidegate_supervisor::pid_file::PidFile;

/// Time between two checks of a drain.
const DRAIN_STEP: Duration = Duration::from_millis(20);

/// How long the process waits for reset sessions to be counted and logged.
const RESET_GRACE: Duration = Duration::from_millis(1500);

/// Time until a failed write of the pid file is retried.
const PID_FILE_RETRY: Duration = Duration::from_millis(500);

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Lifecycle {
    signals: Signals,
    readiness: ReadyState,
    notifier: Notifier,
    confined: AppliedSandbox,
    /// End of `leave_delay`: until then `/ready` fails and clients are accepted.
    leaving: Option<Instant>,
    draining: Option<DrainState>,
    pid_file: Option<PidFile>,
    pid_file_due: Option<Instant>,
}

/// A drain in progress.
#[derive(Debug)]
struct DrainState {
    deadline: Instant,
    /// A point in time, so that other events do not delay the check.
    next_check: Instant,
    /// Set at the deadline: how many sessions were reset, and when.
    reset: Option<(u32, Instant)>,
}

/// An event of the process.
#[derive(Debug)]
pub(super) enum LifecycleEvent {
    Signal(SignalKindReceived),
    /// The watchdog of the service manager needs a notification.
    NotifyWatchdog,
    /// A check of the drain is due, or `leave_delay` has ended.
    DrainStep,
    /// A retry of writing the pid file is due.
    PidFile,
}

/// Result of a check of the drain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DrainProgress {
    /// Sessions are open.
    Wait,
    /// The deadline has passed. The remaining sessions must be reset.
    Reset,
    /// The drain is complete. The number of sessions that were reset.
    Done(u32),
}

// === impl Lifecycle ===

impl Lifecycle {
    /// Takes the notifier, the sandbox and the pid file from `environment`.
    pub(super) fn new(signals: Signals, environment: &mut ProcessEnvironment) -> Lifecycle {
        Lifecycle {
            signals,
            readiness: ReadyState::new(),
            notifier: std::mem::take(&mut environment.notifier),
            confined: std::mem::take(&mut environment.confined),
            leaving: None,
            draining: None,
            pid_file: environment.pid_file.take().map(|path| PidFile::at(path, false)),
            pid_file_due: None,
        }
    }

    /// Waits for the next event.
    pub(super) async fn wake(&mut self) -> LifecycleEvent {
        let beat_due = self.notifier.next_beat(clock::now());
        let drain_due = self.draining.as_ref().map(|drain| drain.next_check).or(self.leaving);
        tokio::select! {
            signal = self.signals.next() => LifecycleEvent::Signal(signal),
            () = due::reached(beat_due) => LifecycleEvent::NotifyWatchdog,
            () = due::reached(drain_due) => LifecycleEvent::DrainStep,
            () = due::reached(self.pid_file_due) => LifecycleEvent::PidFile,
        }
    }

    /// Unblocks signals in this thread.
    pub(super) fn unblock_signals(&self) {
        self.signals.unblock();
    }

    /// Returns the state that `/ready` reports. Clones share it.
    pub(super) fn readiness(&self) -> &ReadyState {
        &self.readiness
    }

    /// Returns the sandbox of this process.
    pub(super) fn confined(&self) -> &AppliedSandbox {
        &self.confined
    }

    /// Returns the connection to the service manager.
    pub(super) fn notifier(&mut self) -> &mut Notifier {
        &mut self.notifier
    }

    /// Returns whether the process is neither leaving nor draining.
    pub(super) fn is_serving(&self) -> bool {
        self.draining.is_none() && self.leaving.is_none()
    }

    pub(super) fn is_draining(&self) -> bool {
        self.draining.is_some()
    }

    pub(super) fn is_leaving(&self) -> bool {
        self.leaving.is_some()
    }

    /// Reports not ready. The drain is due after `delay`.
    pub(super) fn leave(&mut self, delay: Duration) {
        self.notifier.stopping();
        self.readiness.set_draining();
        self.leaving = Some(clock::now() + delay);
    }

    /// Returns whether `leave_delay` has ended, so that the drain must start.
    pub(super) fn has_left(&self) -> bool {
        self.leaving.is_some_and(|until| clock::now() >= until)
    }

    /// Starts a drain of at most `timeout`.
    pub(super) fn drain(&mut self, timeout: Duration) {
        self.leaving = None;
        self.readiness.set_draining();
        let now = clock::now();
        self.draining = Some(DrainState { deadline: now + timeout, next_check: now, reset: None });
    }

    /// Shortens the deadline of a drain to `time` from now.
    pub(super) fn end_within(&mut self, time: Duration) {
        let now = clock::now();
        if let Some(draining) = &mut self.draining {
            draining.deadline = draining.deadline.min(now + time);
            draining.next_check = now;
        }
    }

    /// Returns whether a drain is past its deadline.
    pub(super) fn is_past_deadline(&self) -> bool {
        self.draining.as_ref().is_some_and(|drain| clock::now() >= drain.deadline)
    }

    /// Checks a drain. `open`: sessions that are still open. `over`: the drain waits for
    /// nothing else.
    pub(super) fn drain_step(&mut self, open: u32, over: bool) -> DrainProgress {
        let Some(draining) = &mut self.draining else { return DrainProgress::Wait };
        let now = clock::now();
        draining.next_check = now + DRAIN_STEP;
        match draining.reset {
            reset if open == 0 && over => DrainProgress::Done(reset.map_or(0, |(reset, _)| reset)),
            None if now >= draining.deadline => {
                draining.reset = Some((open, now));
                DrainProgress::Reset
            }
            Some((reset, at)) if now >= at + RESET_GRACE => DrainProgress::Done(reset),
            _ => DrainProgress::Wait,
        }
    }

    /// Serves again, because the new process of an upgrade has exited.
    pub(super) fn serve_again(&mut self) {
        self.draining = None;
        self.readiness.set_ready_again();
        self.notifier.resume();
        self.write_pid_file();
    }

    /// Reports ready and writes the pid file.
    pub(super) fn serve(&mut self) {
        self.write_pid_file();
        self.readiness.set_ready();
        self.notifier.ready();
    }

    /// Writes the pid file, if there is one. Schedules a retry if that fails.
    pub(super) fn write_pid_file(&mut self) {
        let Some(file) = &mut self.pid_file else { return };
        file.write();
        self.pid_file_due = (!file.is_written()).then(|| clock::now() + PID_FILE_RETRY);
    }

    /// Names the new process to the service manager. The new process writes the pid file.
    pub(super) fn hand_over(&mut self, pid: u32) {
        self.notifier.hand_over(pid);
        self.pid_file_due = None;
    }

    /// Removes the pid file, if it belongs to this process.
    pub(super) fn remove_pid_file(&mut self) {
        self.pid_file = None;
    }
}
