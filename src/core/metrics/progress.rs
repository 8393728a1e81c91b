//! Progress reports of a worker: whether its event loop makes progress, and its stage.
//!
//! The control thread requests a report, and the worker's loop answers in its next
//! turn. The worker also stores its stage. Both are relaxed stores to a separate cache
//! line. A request wakes an idle worker. Nothing here waits or reads a clock.

use std::sync::atomic::{AtomicI32, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

/// What a worker's thread is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum WorkerStage {
    /// No stage yet.
    Starting,
    /// Accepting connections.
    Accepting,
    /// Moving bytes.
    Relaying,
    /// Executing a command of the control thread.
    RunningCommand,
    /// Connecting or closing sessions, or sleeping.
    Waiting,
}

/// Progress of a worker; see the module's documentation.
#[derive(Debug, Default)]
pub struct WorkerProgress {
    /// Number of the last request; written by the control thread.
    requested: AtomicU64,
    /// Number of the last answered request; written by the worker, as is the stage.
    reported: AtomicU64,
    stage: AtomicU8,
    /// Thread id of the kernel; 0 before the thread exists.
    thread: AtomicI32,
    /// Duration of the current stall in milliseconds; 0 if there is none. Written by
    /// the control thread.
    stalled: AtomicU64,
}

// === impl WorkerStage ===

impl WorkerStage {
    const ALL: [WorkerStage; 5] = [
        WorkerStage::Starting,
        WorkerStage::Accepting,
        WorkerStage::Relaying,
        WorkerStage::RunningCommand,
        WorkerStage::Waiting,
    ];

    /// Text for the log and status.
    pub fn name(self) -> &'static str {
        match self {
            WorkerStage::Starting => "starting",
            WorkerStage::Accepting => "accepting",
            WorkerStage::Relaying => "relaying",
            WorkerStage::RunningCommand => "running a command",
            WorkerStage::Waiting => "connecting, closing or waiting",
        }
    }
}

// === impl WorkerProgress: the worker's side ===

impl WorkerProgress {
    /// Sets the thread that runs the worker from now on.
    pub fn set_thread(&self, thread: i32) {
        self.thread.store(thread, Ordering::Relaxed);
    }

    /// Sets the current stage.
    #[inline]
    pub fn at(&self, stage: WorkerStage) {
        self.stage.store(stage as u8, Ordering::Relaxed);
    }

    /// Answers the last request. Called once per turn of the event loop.
    pub fn report_progress(&self) {
        self.reported.store(self.requested.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

// === impl WorkerProgress: the control thread's side ===

impl WorkerProgress {
    /// Requests a progress report. Returns false if the last request is still open. The
    /// caller must wake the worker.
    pub fn request_progress(&self) -> bool {
        let reported = self.has_reported();
        if reported {
            self.requested.store(self.requested.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
        reported
    }

    /// Returns whether the worker has answered the last request.
    pub fn has_reported(&self) -> bool {
        self.reported.load(Ordering::Relaxed) == self.requested.load(Ordering::Relaxed)
    }

    /// Returns the last stage that the worker stored.
    pub fn stage(&self) -> WorkerStage {
        let stage = usize::from(self.stage.load(Ordering::Relaxed));
        WorkerStage::ALL.get(stage).copied().unwrap_or(WorkerStage::Starting)
    }

    /// Returns the thread id of the kernel; `None` before the thread exists.
    pub fn thread(&self) -> Option<i32> {
        Some(self.thread.load(Ordering::Relaxed)).filter(|thread| *thread != 0)
    }

    /// Sets the duration of the current stall; `None` if the worker is responsive.
    pub fn set_stalled(&self, time: Option<Duration>) {
        let millis = time.map_or(0, |time| (time.as_millis() as u64).max(1));
        self.stalled.store(millis, Ordering::Relaxed);
    }

    /// Returns the duration of the current stall; `None` if the worker is responsive.
    pub fn stalled_for(&self) -> Option<Duration> {
        let millis = self.stalled.load(Ordering::Relaxed);
        (millis != 0).then(|| Duration::from_millis(millis))
    }
}
