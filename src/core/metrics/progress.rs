//! A worker's pulse: whether its loop turns, and what it was last about.
//!
//! The control thread asks, the worker answers when its loop comes by, and says
//! on its way what it is doing: relaxed stores to a cache line of its own. An idle
//! worker is woken by the question; nothing here waits or reads a clock.

use std::sync::atomic::{AtomicI32, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

/// What a worker's thread is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum WorkerStage {
    /// Nothing yet.
    Starting,
    /// Taking connections off a listen queue.
    Accepting,
    /// Moving bytes.
    Relaying,
    /// Obeying the control thread.
    RunningCommand,
    /// Sessions that connect or end; or asleep.
    Waiting,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct WorkerProgress {
    /// Number of the newest question; written by the control thread.
    asked: AtomicU64,
    /// Number of the newest answer; written by the worker, like the stage.
    answered: AtomicU64,
    stage: AtomicU8,
    /// The thread, as the kernel numbers it; 0 before there is one.
    thread: AtomicI32,
    /// For how long it has not turned, in milliseconds; 0 while it does. Written
    /// by the control thread.
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

    /// For the log and status.
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
    /// The thread that runs from now on.
    pub fn set_thread(&self, thread: i32) {
        self.thread.store(thread, Ordering::Relaxed);
    }

    /// What it is about now.
    #[inline]
    pub fn at(&self, stage: WorkerStage) {
        self.stage.store(stage as u8, Ordering::Relaxed);
    }

    /// The loop has come by.
    pub fn report_progress(&self) {
        self.answered.store(self.asked.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

// === impl WorkerProgress: the control thread's side ===

impl WorkerProgress {
    /// Asks, where the last question is answered; false where it is not. The
    /// worker has to be woken after it.
    pub fn request_progress(&self) -> bool {
        let answered = self.is_answered();
        if answered {
            self.asked.store(self.asked.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
        answered
    }

    /// Whether the loop has come by since the last question.
    pub fn is_answered(&self) -> bool {
        self.answered.load(Ordering::Relaxed) == self.asked.load(Ordering::Relaxed)
    }

    /// What it was about when somebody last heard of it.
    pub fn stage(&self) -> WorkerStage {
        let stage = usize::from(self.stage.load(Ordering::Relaxed));
        WorkerStage::ALL.get(stage).copied().unwrap_or(WorkerStage::Starting)
    }

    /// The thread, as the kernel numbers it; `None` before there is one.
    pub fn thread(&self) -> Option<i32> {
        Some(self.thread.load(Ordering::Relaxed)).filter(|thread| *thread != 0)
    }

    /// Says for how long it has not turned.
    pub fn set_stalled(&self, time: Option<Duration>) {
        let millis = time.map_or(0, |time| (time.as_millis() as u64).max(1));
        self.stalled.store(millis, Ordering::Relaxed);
    }

    /// For how long it has not turned, where that is too long.
    pub fn stalled_for(&self) -> Option<Duration> {
        let millis = self.stalled.load(Ordering::Relaxed);
        (millis != 0).then(|| Duration::from_millis(millis))
    }
}
