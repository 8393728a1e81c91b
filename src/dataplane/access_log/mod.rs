//! The access log: one JSON line for each ended session.
//!
//! `daemon` starts, switches and closes it. Workers push [`AccessLogRecord`]s, each into its
//! own queue; a writer thread formats and writes them. Traffic never waits for the log: if the
//! target is slow or full, the queue fills, `push` returns false and the worker counts the
//! dropped line.
//!
//! Lines stay whole:
//!
//! - After a short write, the rest of the line is written next.
//! - A partial line from a crash or a full disk gets a newline when its file is opened.
//! - If the target changes during a line, the new target gets that line from its start.

mod record;
mod sink;
mod syslog;
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
use tidegate_logging::syslog::{SyslogAddress, SyslogHeader};
use writer::{AccessLogWriter, WriterCommand};

/// Where lines go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccessLogDestination {
    /// No log. Workers build no records.
    Off,
    /// Standard output.
    Stdout,
    /// Append to this file, created with mode 0640. It is reopened if the path no longer
    /// names it (log rotation by rename). A FIFO needs no reader.
    File(PathBuf),
    /// Send each line as a message with this header.
    Syslog(SyslogAddress, SyslogHeader),
}

/// The running access log, owned by `daemon`.
#[derive(Debug)]
pub struct AccessLog {
    target: AccessLogDestination,
    shared: Arc<AccessLogShared>,
    commands: Sender<WriterCommand>,
    thread: JoinHandle<()>,
}

/// A worker's handle to its queue.
#[derive(Debug, Clone)]
pub struct AccessLogSender {
    shared: Arc<AccessLogShared>,
    worker: usize,
}

#[derive(Debug)]
struct AccessLogShared {
    enabled: AtomicBool,
    /// One per worker: workers share no cache line, and each queue keeps its order.
    queues: Box<[ArrayQueue<AccessLogRecord>]>,
}

/// Queued records per worker. At 100,000 sessions per second, the writer can stall for 80 ms
/// before a line is dropped. About 2 MB per worker.
pub const QUEUE_MAX: usize = 8_192;

/// Timeout of [`AccessLog::close`], so that a full disk or a stuck pipe delays no exit.
pub const CLOSE_MAX: Duration = Duration::from_secs(2);

// === impl AccessLog ===

impl AccessLog {
    /// Opens `target` and starts the writer. Returns one sender per worker.
    ///
    /// # Errors
    /// The target cannot be opened, or the thread cannot be started.
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

    /// Switches to another target while running. Queued records go to the new target;
    /// [`AccessLogDestination::Off`] discards them.
    ///
    /// # Errors
    /// The new target cannot be opened. The old target stays in use.
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

    /// Writes queued records for at most [`CLOSE_MAX`] and ends the writer. Abandons the
    /// writer if a write blocks. Returns the number of lines not written.
    pub fn close(self) -> u64 {
        let (done, finished) = bounded(1);
        let deadline = tidegate_net::clock::now() + CLOSE_MAX;
        let sent = self.commands.send(WriterCommand::Close { deadline, done });
        // The writer keeps the deadline itself unless a write blocks.
        let margin = Duration::from_millis(200);
        match sent.ok().and_then(|()| finished.recv_timeout(CLOSE_MAX + margin).ok()) {
            Some(lost) => {
                // The thread is about to end; the panic hook has logged a panic in it.
                let _ = self.thread.join();
                lost
            }
            None => self.shared.queued(),
        }
    }
}

// === impl AccessLogSender ===

impl AccessLogSender {
    /// False while the log is off. Callers then build no record.
    #[inline]
    pub fn enabled(&self) -> bool {
        self.shared.enabled.load(Ordering::Relaxed)
    }

    /// Queues a record without blocking. Returns false if the queue is full and the record is
    /// dropped. While the log is off, discards the record and returns true.
    #[inline]
    pub fn push(&self, record: AccessLogRecord) -> bool {
        !self.enabled() || self.shared.queues[self.worker].push(record).is_ok()
    }
}

#[cfg(test)]
impl AccessLogSender {
    /// Returns a sender without a writer; [`AccessLogSender::take`] returns its records.
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
