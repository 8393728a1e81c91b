//! The access log's writer thread: drains the queues, formats, writes.
//!
//! Started by `AccessLog::start`, told what to do by commands. It never wakes
//! or waits for a worker, and keeps at most one batch in memory besides the
//! queues.

use super::AccessLogShared;
use super::sink::Sink;
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_net::clock;

/// What `AccessLog` asks for.
#[derive(Debug)]
pub(super) enum WriterCommand {
    /// Go on with this target; `None`: discard everything.
    Switch(Option<Sink>),
    /// Write what is queued until `deadline`, then end and say how many lines
    /// were left.
    Close { deadline: Instant, done: Sender<u64> },
}

/// State of the thread.
#[derive(Debug)]
pub(super) struct AccessLogWriter {
    shared: Arc<AccessLogShared>,
    sink: Option<Sink>,
    /// Whole lines; those before `written` are out.
    batch: Vec<u8>,
    written: usize,
    /// Queue to look at first, so that none starves.
    first: usize,
    checked: Instant,
    trouble: WriteErrors,
}

/// Write errors not yet told of.
#[derive(Debug, Default)]
struct WriteErrors {
    count: u64,
    reported: Option<Instant>,
    retry: Option<Instant>,
}

/// How far lines may lag behind; short enough for `tail -f`, long enough to
/// make batches.
const TICK: Duration = Duration::from_millis(10);

/// One write; half of a default pipe.
const BATCH_BYTES: usize = 32 * 1024;

/// Before commands are looked at again: 32 MB a pass.
const BATCHES_A_PASS: usize = 1024;

/// How often the path is compared with the open file.
const REOPEN_CHECK: Duration = Duration::from_secs(1);

/// A full disk is asked again this often, not on every tick.
const RETRY: Duration = Duration::from_millis(100);

/// Write errors are logged at most this often, with their number.
const REPORT: Duration = Duration::from_secs(10);

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
            trouble: WriteErrors::default(),
        }
    }

    /// The thread's body; ends on `CloseMode` or when `AccessLog` is dropped.
    pub(super) fn run(mut self, commands: &Receiver<WriterCommand>) {
        loop {
            let command = match self.sink {
                Some(_) => commands.recv_timeout(TICK),
                None => commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match command {
                Ok(WriterCommand::Switch(sink)) => self.switch(sink),
                Ok(WriterCommand::Close { deadline, done }) => {
                    self.finish(deadline);
                    // Whoever asked may have given up waiting.
                    let _ = done.send(self.unwritten());
                    return;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return self.finish(clock::now()),
            }
            self.pass(clock::now());
        }
    }

    /// One round: reopen if due, then write what there is.
    fn pass(&mut self, now: Instant) {
        if now.duration_since(self.checked) >= REOPEN_CHECK {
            self.checked = now;
            self.reopen_if_moved(now);
        }
        if self.sink.is_none() {
            // A worker that saw "enabled" late may have pushed after the switch.
            return self.discard();
        }
        if self.trouble.retry.is_some_and(|at| now < at) {
            return;
        }
        for _ in 0..BATCHES_A_PASS {
            if self.written == self.batch.len() {
                self.refill();
            }
            if self.batch.is_empty() || !self.write_batch(now) {
                return;
            }
        }
    }

    fn switch(&mut self, sink: Option<Sink>) {
        self.sink = sink;
        self.trouble.retry = None;
        // The line under way goes to the new target as a whole.
        let line = self.batch[..self.written].iter().rposition(|byte| *byte == b'\n');
        self.written = line.map_or(0, |newline| newline + 1);
    }

    fn discard(&mut self) {
        self.batch.clear();
        self.written = 0;
        for queue in &self.shared.queues {
            // Bounded, should somebody still be pushing.
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
            Err(error) => self.trouble.note(&error, &sink.name(), now),
        }
    }

    /// Starts a new batch, taking from each queue in turn.
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

    /// Writes the rest of the batch; false when it did not go out whole.
    fn write_batch(&mut self, now: Instant) -> bool {
        let Some(sink) = &mut self.sink else { return false };
        while self.written < self.batch.len() {
            match sink.write(&self.batch[self.written..]) {
                Ok(0) => return false,
                Ok(count) => self.written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) => {
                    self.trouble.retry = Some(now + RETRY);
                    self.trouble.note(&error, &sink.name(), now);
                    return false;
                }
            }
        }
        self.trouble.retry = None;
        true
    }

    /// Goes on until everything is out or the deadline has come; tries at least
    /// once.
    fn finish(&mut self, deadline: Instant) {
        self.trouble.retry = None;
        loop {
            let now = clock::now();
            self.pass(now);
            if self.sink.is_none() || self.unwritten() == 0 || now >= deadline {
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
        if self.reported.is_none_or(|at| now.duration_since(at) >= REPORT) {
            let errors = std::mem::take(&mut self.count);
            self.reported = Some(now);
            tracing::warn!(
                target,
                errors,
                %error,
                "cannot write the access log; lines are dropped when the queue is full"
            );
        }
    }
}
