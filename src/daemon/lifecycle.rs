//! Where this process is in its life: starting, serving, leaving, draining; and everyone
//! who is to know it: `/ready`, the service manager, the pid file.
//!
//! Owned by the control loop, which says when. It ends nothing itself: `drain` does.

use super::ProcessEnvironment;
use super::due;
use super::notify::Notifier;
use super::sandbox::AppliedSandbox;
use super::signals::{SignalKindReceived, Signals};
use crate::admin::ReadyState;
use std::time::{Duration, Instant};
use tidegate_net::clock;
use tidegate_supervisor::pid_file::PidFile;

/// How often the progress of a drain is looked at.
const DRAIN_STEP: Duration = Duration::from_millis(20);

/// How long cut sessions may take to be accounted for.
const CUT_GRACE: Duration = Duration::from_millis(1500);

/// How soon a pid file that cannot be written is tried again.
const PID_FILE_RETRY: Duration = Duration::from_millis(500);

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Lifecycle {
    signals: Signals,
    readiness: ReadyState,
    notifier: Notifier,
    confined: AppliedSandbox,
    /// It was told to stop and still accepts, while `/ready` says no: until then.
    leaving: Option<Instant>,
    draining: Option<DrainState>,
    pid_file: Option<PidFile>,
    pid_file_due: Option<Instant>,
}

/// A drain under way.
#[derive(Debug)]
struct DrainState {
    deadline: Instant,
    /// A point in time, not a pause: other events must not put it off.
    next_look: Instant,
    /// Set at the deadline: how many sessions were cut, and when.
    cut: Option<(u32, Instant)>,
}

/// What happens next to the process.
#[derive(Debug)]
pub(super) enum LifecycleEvent {
    Signal(SignalKindReceived),
    /// The service manager wants a sign of life.
    NotifyWatchdog,
    /// A drain goes a step further, or begins.
    DrainStep,
    /// The pid file could not be written, and is tried again.
    PidFile,
}

/// How far a drain is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DrainProgress {
    /// Sessions are open.
    Wait,
    /// The deadline has passed: the rest is to be cut.
    Cut,
    /// Over; so many sessions were cut.
    Done(u32),
}

// === impl Lifecycle ===

impl Lifecycle {
    /// Takes what this part needs of `surroundings`.
    pub(super) fn new(signals: Signals, surroundings: &mut ProcessEnvironment) -> Lifecycle {
        Lifecycle {
            signals,
            readiness: ReadyState::new(),
            notifier: std::mem::take(&mut surroundings.notifier),
            confined: std::mem::take(&mut surroundings.confined),
            leaving: None,
            draining: None,
            pid_file: surroundings.pid_file.take().map(|path| PidFile::at(path, false)),
            pid_file_due: None,
        }
    }

    /// What happens next.
    pub(super) async fn wake(&mut self) -> LifecycleEvent {
        let beat_due = self.notifier.next_beat(clock::now());
        let drain_due = self.draining.as_ref().map(|drain| drain.next_look).or(self.leaving);
        tokio::select! {
            signal = self.signals.next() => LifecycleEvent::Signal(signal),
            () = due::reached(beat_due) => LifecycleEvent::NotifyWatchdog,
            () = due::reached(drain_due) => LifecycleEvent::DrainStep,
            () = due::reached(self.pid_file_due) => LifecycleEvent::PidFile,
        }
    }

    /// Lets signals come.
    pub(super) fn obey_signals(&self) {
        self.signals.let_through();
    }

    /// What `/ready` says; clones share it.
    pub(super) fn readiness(&self) -> &ReadyState {
        &self.readiness
    }

    /// What this process has given up.
    pub(super) fn confined(&self) -> &AppliedSandbox {
        &self.confined
    }

    /// The way to the service manager.
    pub(super) fn notifier(&mut self) -> &mut Notifier {
        &mut self.notifier
    }

    /// Neither leaving nor draining.
    pub(super) fn is_serving(&self) -> bool {
        self.draining.is_none() && self.leaving.is_none()
    }

    pub(super) fn is_draining(&self) -> bool {
        self.draining.is_some()
    }

    pub(super) fn is_leaving(&self) -> bool {
        self.leaving.is_some()
    }

    /// Says that it is not ready any more; the drain is due in `delay`.
    pub(super) fn leave(&mut self, delay: Duration) {
        self.notifier.stopping();
        self.readiness.set_draining();
        self.leaving = Some(clock::now() + delay);
    }

    /// Whether the time of leaving is over and the drain has to begin.
    pub(super) fn has_left(&self) -> bool {
        self.leaving.is_some_and(|until| clock::now() >= until)
    }

    /// Drains from now on, for `timeout` at most.
    pub(super) fn drain(&mut self, timeout: Duration) {
        self.leaving = None;
        self.readiness.set_draining();
        let now = clock::now();
        self.draining = Some(DrainState { deadline: now + timeout, next_look: now, cut: None });
    }

    /// Ends a drain within that time.
    pub(super) fn end_within(&mut self, time: Duration) {
        let now = clock::now();
        if let Some(draining) = &mut self.draining {
            draining.deadline = draining.deadline.min(now + time);
            draining.next_look = now;
        }
    }

    /// Whether a drain is past its deadline.
    pub(super) fn is_past_deadline(&self) -> bool {
        self.draining.as_ref().is_some_and(|drain| clock::now() >= drain.deadline)
    }

    /// Takes a drain further. `open` sessions are left; `over`: nothing else is waited
    /// for.
    pub(super) fn drain_step(&mut self, open: u32, over: bool) -> DrainProgress {
        let Some(draining) = &mut self.draining else { return DrainProgress::Wait };
        let now = clock::now();
        draining.next_look = now + DRAIN_STEP;
        match draining.cut {
            cut if open == 0 && over => DrainProgress::Done(cut.map_or(0, |(cut, _)| cut)),
            None if now >= draining.deadline => {
                draining.cut = Some((open, now));
                DrainProgress::Cut
            }
            Some((cut, at)) if now >= at + CUT_GRACE => DrainProgress::Done(cut),
            _ => DrainProgress::Wait,
        }
    }

    /// Serves again: the process that was to take over has ended.
    pub(super) fn serve_again(&mut self) {
        self.draining = None;
        self.readiness.set_ready_again();
        self.notifier.goes_on();
        self.write_pid_file();
    }

    /// Serves from now on, and leaves its number in the pid file, if it has one.
    pub(super) fn serve(&mut self) {
        self.write_pid_file();
        self.readiness.set_ready();
        self.notifier.ready();
    }

    /// Leaves this process's number; where it cannot be written, it is tried again.
    pub(super) fn write_pid_file(&mut self) {
        let Some(file) = &mut self.pid_file else { return };
        file.write();
        self.pid_file_due = (!file.is_written()).then(|| clock::now() + PID_FILE_RETRY);
    }

    /// Another process is the service: its number is to be in the pid file.
    pub(super) fn hand_over(&mut self, pid: u32) {
        self.notifier.successor(pid);
        self.pid_file_due = None;
    }

    /// Removes the pid file, where it is this process's.
    pub(super) fn remove_pid_file(&mut self) {
        self.pid_file = None;
    }
}
