//! The access log: one JSON line for each session that ended.
//!
//! Workers push [`AccessLogRecord`]s into a queue of their own and never wait;
//! a writer thread formats and writes them, and `daemon` starts, switches and
//! closes it. It never holds traffic up: when the target is slow, full or
//! stuck, queues fill, `push` says false and the worker counts the loss.
//!
//! Lines are whole: what a short write left of a line goes out before anything
//! else; a line cut off by an earlier crash or a full disk is ended with a
//! newline when its file is opened again; a line that was under way when the
//! target changed is written to the new target from its start.

mod record;
mod sink;
mod writer;

pub use record::{AccessLogRecord, TryRecord};

use crossbeam::channel::{Sender, bounded, unbounded};
use crossbeam::queue::ArrayQueue;
use sink::Sink;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;
use writer::{AccessLogWriter, WriterCommand};

/// Where lines go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccessLogDestination {
    /// Nowhere; workers skip building records.
    Off,
    /// Standard output.
    Stdout,
    /// Appended to this file, created with mode 0640; opened anew when the path
    /// no longer names it (log rotation by rename). A FIFO may be without a
    /// reader.
    File(PathBuf),
}

/// The running access log; held by `daemon`.
#[derive(Debug)]
pub struct AccessLog {
    target: AccessLogDestination,
    shared: Arc<AccessLogShared>,
    commands: Sender<WriterCommand>,
    thread: JoinHandle<()>,
}

/// One worker's end.
#[derive(Debug, Clone)]
pub struct AccessLogSender {
    shared: Arc<AccessLogShared>,
    worker: usize,
}

#[derive(Debug)]
struct AccessLogShared {
    enabled: AtomicBool,
    /// One a worker, so that workers share no cache line and keep their order.
    queues: Box<[ArrayQueue<AccessLogRecord>]>,
}

/// Records one worker may have waiting: at 100,000 sessions a second the writer
/// may stall for 80 ms before a line is lost. About 2 MB a worker.
pub const QUEUE_MAX: usize = 8_192;

/// How long [`AccessLog::close`] lets the writer go on: an exit waits no longer
/// for a full disk or a stuck pipe.
pub const CLOSE_MAX: Duration = Duration::from_secs(2);

// === impl AccessLog ===

impl AccessLog {
    /// Opens `target` and starts the writer; gives one sender a worker.
    ///
    /// # Errors
    /// The target cannot be opened, or no thread can be started.
    pub fn start(
        target: AccessLogDestination,
        workers: usize,
    ) -> io::Result<(AccessLog, Vec<AccessLogSender>)> {
        let sink = Sink::open(&target)?;
        let shared = Arc::new(AccessLogShared {
            enabled: AtomicBool::new(sink.is_some()),
            queues: (0..workers).map(|_| ArrayQueue::new(QUEUE_MAX)).collect(),
        });
        let (commands, inbox) = unbounded();
        let writer = AccessLogWriter::new(Arc::clone(&shared), sink);
        let thread =
            Builder::new().name("access-log".to_owned()).spawn(move || writer.run(&inbox))?;
        let senders = (0..workers)
            .map(|worker| AccessLogSender { shared: Arc::clone(&shared), worker })
            .collect();
        Ok((AccessLog { target, shared, commands, thread }, senders))
    }

    /// Switches to another target while running; what is queued goes to the new
    /// one, or nowhere when that is [`AccessLogDestination::Off`].
    ///
    /// # Errors
    /// The new target cannot be opened; then the old one stays.
    pub fn set_target(&mut self, target: AccessLogDestination) -> io::Result<()> {
        if target == self.target {
            return Ok(());
        }
        let sink = Sink::open(&target)?;
        self.shared.enabled.store(sink.is_some(), Ordering::Relaxed);
        self.target = target;
        self.commands
            .send(WriterCommand::Switch(sink))
            .map_err(|_| io::Error::other("the access log's writer thread has exited"))
    }

    /// Writes what is queued, for at most [`CLOSE_MAX`], and ends the writer
    /// (or abandons it when it is stuck in a write). Gives the number of lines
    /// that did not get out.
    pub fn close(self) -> u64 {
        let (done, finished) = bounded(1);
        let deadline = tidegate_net::clock::now() + CLOSE_MAX;
        let sent = self.commands.send(WriterCommand::Close { deadline, done });
        // The writer keeps to the deadline by itself unless a write blocks.
        let margin = Duration::from_millis(200);
        match sent.ok().and_then(|()| finished.recv_timeout(CLOSE_MAX + margin).ok()) {
            Some(lost) => {
                // It has said its last word; a panic in it has been reported.
                let _ = self.thread.join();
                lost
            }
            None => self.shared.queued(),
        }
    }
}

// === impl AccessLogSender ===

impl AccessLogSender {
    /// False while the log is off: then no record need be built.
    #[inline]
    pub fn enabled(&self) -> bool {
        self.shared.enabled.load(Ordering::Relaxed)
    }

    /// Queues a record; false when the queue was full and the record is lost.
    /// Never blocks. While the log is off, records vanish and that is no loss.
    #[inline]
    pub fn push(&self, record: AccessLogRecord) -> bool {
        !self.enabled() || self.shared.queues[self.worker].push(record).is_ok()
    }
}

#[cfg(test)]
impl AccessLogSender {
    /// A log that keeps its records until [`AccessLogSender::take`] takes them.
    pub(crate) fn kept() -> AccessLogSender {
        let queues = Box::new([ArrayQueue::new(QUEUE_MAX)]);
        AccessLogSender {
            shared: Arc::new(AccessLogShared { enabled: AtomicBool::new(true), queues }),
            worker: 0,
        }
    }

    pub(crate) fn take(&self) -> Option<AccessLogRecord> {
        self.shared.queues[self.worker].pop()
    }
}

// === impl AccessLogShared ===

impl AccessLogShared {
    fn queued(&self) -> u64 {
        self.queues.iter().map(|queue| queue.len() as u64).sum()
    }
}

#[cfg(test)]
mod tests;
