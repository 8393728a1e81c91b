//! Panics of the tasks on the discovery thread: each is caught, counted and becomes a failure.
//!
//! Everything that the member sources spawn runs in [`caught`] or [`blocking`]. One rule holds
//! for all of them: a panic ends only its task, the sources that need the task tell a failure,
//! and the owner starts it again after a pause. The panic hook of the daemon logs the place.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;

/// A kind of task; the label of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskKind {
    /// A question of one source.
    Source,
    /// The watch of all questions to one etcd registry.
    Follower,
    /// The session of all questions to one ZooKeeper registry.
    Session,
    /// A lookup of a name.
    Lookup,
    /// A connection to an HTTP server.
    Connection,
    /// A reader of files or large answers, on another thread.
    Reader,
}

/// The task panicked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TaskPanicked;

/// What sources tell about a task that panicked and restarts.
pub(crate) const PANICKED: &str = "the task panicked and restarts; please report this";

/// Panics of this process by kind.
static PANICS: [AtomicU64; TaskKind::ALL.len()] =
    [const { AtomicU64::new(0) }; TaskKind::ALL.len()];

/// Runs a task up to its end or its first panic, which is counted.
pub(crate) async fn caught<F: Future>(kind: TaskKind, task: F) -> Result<F::Output, TaskPanicked> {
    let mut task = pin!(task);
    let ended = std::future::poll_fn(|context| {
        // The task is not polled again after a panic.
        match catch_unwind(AssertUnwindSafe(|| task.as_mut().poll(context))) {
            Ok(polled) => polled.map(Ok),
            Err(_) => Poll::Ready(Err(TaskPanicked)),
        }
    });
    ended.await.inspect_err(|TaskPanicked| kind.count())
}

/// Runs `work` on a blocking thread. A panic is counted.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, TaskPanicked> {
    // Fails otherwise only while the runtime ends.
    tokio::task::spawn_blocking(work).await.map_err(|_| {
        TaskKind::Reader.count();
        TaskPanicked
    })
}

// === impl TaskKind ===

impl TaskKind {
    /// All kinds, in the order of the variants.
    pub const ALL: [TaskKind; 6] = [
        TaskKind::Source,
        TaskKind::Follower,
        TaskKind::Session,
        TaskKind::Lookup,
        TaskKind::Connection,
        TaskKind::Reader,
    ];

    /// Returns the label value in metrics.
    pub fn name(self) -> &'static str {
        match self {
            TaskKind::Source => "source",
            TaskKind::Follower => "follower",
            TaskKind::Session => "session",
            TaskKind::Lookup => "lookup",
            TaskKind::Connection => "connection",
            TaskKind::Reader => "reader",
        }
    }

    /// Returns the panics of this process so far.
    pub fn panics(self) -> u64 {
        PANICS[self as usize].load(Ordering::Relaxed)
    }

    fn count(self) {
        PANICS[self as usize].fetch_add(1, Ordering::Relaxed);
    }
}

/// Panics if a test wants it.
#[cfg(not(test))]
pub(crate) fn panic_point(_kind: TaskKind) {}

#[cfg(test)]
pub(crate) use points::panic_point;

#[cfg(test)]
pub(crate) mod points {
    use super::TaskKind;
    use std::cell::Cell;

    thread_local! {
        static WANTED: Cell<Option<TaskKind>> = const { Cell::new(None) };
    }

    /// The next task of this kind on this thread panics.
    pub(crate) fn panic_next(kind: TaskKind) {
        WANTED.set(Some(kind));
    }

    pub(crate) fn panic_point(kind: TaskKind) {
        if WANTED.get() == Some(kind) {
            WANTED.set(None);
            panic!("on purpose");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn panics_are_counted_by_kind_and_results_pass() {
        assert_eq!(caught(TaskKind::Connection, async { 7 }).await, Ok(7));
        let before = TaskKind::Connection.panics();
        let panicking = async {
            tokio::task::yield_now().await;
            panic!("on purpose")
        };
        assert_eq!(caught::<_>(TaskKind::Connection, panicking).await, Err::<(), _>(TaskPanicked));
        assert!(TaskKind::Connection.panics() > before);
        let before = TaskKind::Reader.panics();
        assert_eq!(blocking(|| panic!("on purpose")).await, Err::<(), _>(TaskPanicked));
        assert!(TaskKind::Reader.panics() > before);
    }
}
