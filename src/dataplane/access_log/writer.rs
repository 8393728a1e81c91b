//! The access log's writer thread: drains the queues, formats and writes.
//!
//! Started by `AccessLog::start` and controlled by [`WriterCommand`]s. It never wakes or waits
//! for a worker. It holds at most one batch in memory in addition to the queues.

use super::AccessLogShared;
use super::sink::Sink;
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_net::clock;

/// Commands from `AccessLog`.
#[derive(Debug)]
pub(super) enum WriterCommand {
    /// Write to this target; `None`: discard all records.
    Switch(Option<Sink>),
    /// Write queued records until `deadline`, send the number of lines not written, and end.
    Close { deadline: Instant, done: Sender<u64> },
}

/// State of the writer thread.
#[derive(Debug)]
pub(super) struct AccessLogWriter {
    shared: Arc<AccessLogShared>,
    sink: Option<Sink>,
    /// Whole lines. The bytes before `written` have been written.
    batch: Vec<u8>,
    written: usize,
    /// Queue that the next batch starts with. It rotates, so that all queues get a turn.
    first: usize,
    /// When the path was last compared with the open file.
    checked: Instant,
    errors: WriteErrors,
}

/// Write errors since the last log line about them.
#[derive(Debug, Default)]
struct WriteErrors {
    count: u64,
    /// When errors were last logged.
    logged: Option<Instant>,
    /// No write before this time.
    retry: Option<Instant>,
}

/// Time between two passes over the queues: short enough for `tail -f`, long enough to fill
/// batches.
const TICK: Duration = Duration::from_millis(10);

/// Size of one write: half of a default pipe.
const BATCH_BYTES: usize = 32 * 1024;

/// Longest time of a pass, before the next command is read.
const PASS_MAX: Duration = Duration::from_millis(100);

/// Time between two comparisons of the path with the open file.
const REOPEN_CHECK: Duration = Duration::from_secs(1);

/// Time between two writes to a failing target, such as a full disk.
const RETRY: Duration = Duration::from_millis(100);

/// Time between two log lines about write errors.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

// === impl AccessLogWriter ===

impl AccessLogWriter {
    pub(super) fn new(shared: Arc<AccessLogShared>, sink: Option<Sink>) -> AccessLogWriter {
        AccessLogWriter {
            shared,
            sink,
            batch: Vec::with_capacity(BATCH_BYTES + 1024),
            written: 0,
            first: 0,
            checked: clock::now(),
            errors: WriteErrors::default(),
        }
    }

    /// Body of the thread. Ends on [`WriterCommand::Close`] or when `AccessLog` is dropped.
    pub(super) fn run(mut self, commands: &Receiver<WriterCommand>) {
        let mut more = false;
        loop {
            let command = match self.sink {
                // Queued records are left after a pass that took its longest time.
                Some(_) if more => commands.recv_timeout(Duration::ZERO),
                Some(_) => commands.recv_timeout(TICK),
                None => commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match command {
                Ok(WriterCommand::Switch(sink)) => self.switch(sink),
                Ok(WriterCommand::Close { deadline, done }) => {
                    self.finish(deadline);
                    // `AccessLog::close` may have timed out.
                    let _ = done.send(self.unwritten());
                    return;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return self.finish(clock::now()),
            }
            more = self.pass(clock::now());
        }
    }

    /// Reopens the target if due, then writes queued records. Returns true after [`PASS_MAX`]:
    /// a slow syslog receiver must not delay the next command.
    fn pass(&mut self, now: Instant) -> bool {
        if now.duration_since(self.checked) >= REOPEN_CHECK {
            self.checked = now;
            self.reopen_if_moved(now);
        }
        if self.sink.is_none() {
            // A worker that read `enabled` before the switch may push after it.
            self.discard();
            return false;
        }
        if self.errors.retry.is_some_and(|at| now < at) {
            return false;
        }
        loop {
            if self.written == self.batch.len() {
                self.refill();
            }
            if self.batch.is_empty() || !self.write_batch(now) {
                return false;
            }
            if clock::now().saturating_duration_since(now) >= PASS_MAX {
                return true;
            }
        }
    }

    fn switch(&mut self, sink: Option<Sink>) {
        self.sink = sink;
        self.errors.retry = None;
        // A partly written line goes to the new target as a whole.
        let line = self.batch[..self.written].iter().rposition(|byte| *byte == b'\n');
        self.written = line.map_or(0, |newline| newline + 1);
    }

    fn discard(&mut self) {
        self.batch.clear();
        self.written = 0;
        for queue in &self.shared.queues {
            // Bounded, because a worker may still push.
            for _ in 0..queue.capacity() {
                if queue.pop().is_none() {
                    break;
                }
            }
        }
    }

    fn reopen_if_moved(&mut self, now: Instant) {
        let Some(sink) = &self.sink else { return };
        match sink.replacement() {
            Ok(None) => {}
            Ok(Some(replacement)) => self.switch(Some(replacement)),
            Err(error) => self.errors.note(&error, &sink.name(), now),
        }
    }

    /// Starts a new batch from each queue in turn.
    fn refill(&mut self) {
        self.batch.clear();
        self.written = 0;
        let queues = &self.shared.queues;
        for turn in 0..queues.len() {
            let queue = &queues[(self.first + turn) % queues.len()];
            while self.batch.len() < BATCH_BYTES {
                let Some(record) = queue.pop() else { break };
                record.append_to(&mut self.batch);
            }
        }
        self.first = (self.first + 1) % queues.len().max(1);
    }

    /// Writes the rest of the batch, or what [`PASS_MAX`] allows. Returns false if the target
    /// takes no more now.
    fn write_batch(&mut self, now: Instant) -> bool {
        let Some(sink) = &mut self.sink else { return false };
        while self.written < self.batch.len() {
            match sink.write(&self.batch[self.written..]) {
                Ok(0) => return false,
                Ok(count) => {
                    self.written += count;
                    if clock::now().saturating_duration_since(now) >= PASS_MAX {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) => {
                    self.errors.retry = Some(now + RETRY);
                    self.errors.note(&error, &sink.name(), now);
                    return false;
                }
            }
        }
        self.errors.retry = None;
        true
    }

    /// Writes until all records are written or the deadline has passed. Tries at least once.
    fn finish(&mut self, deadline: Instant) {
        self.errors.retry = None;
        loop {
            let now = clock::now();
            self.pass(now);
            let keeps_bytes = self.sink.as_mut().is_some_and(Sink::keeps_bytes);
            let written = self.unwritten() == 0 && !keeps_bytes;
            if self.sink.is_none() || written || now >= deadline {
                return;
            }
            std::thread::park_timeout(TICK);
        }
    }

    fn unwritten(&self) -> u64 {
        let batch = self.batch[self.written..].iter().filter(|byte| **byte == b'\n').count();
        batch as u64 + self.shared.queued()
    }
}

// === impl WriteErrors ===

impl WriteErrors {
    fn note(&mut self, error: &io::Error, target: &str, now: Instant) {
        self.count += 1;
        if self.logged.is_none_or(|at| now.duration_since(at) >= LOG_INTERVAL) {
            let errors = std::mem::take(&mut self.count);
            self.logged = Some(now);
            tracing::warn!(
                target,
                errors,
                %error,
                "cannot write the access log; lines are dropped when the queue is full"
            );
        }
    }
}
