//! Operations that failed because the kernel was out of memory, kept until they are
//! retried.
//!
//! Used only by `Ring`. The connection has not failed, so the caller gets no event. For
//! the caller the operation stays in flight, with its bytes and its socket, and can be
//! cancelled. The engine decides when to retry; this code never does.

use super::ops::{Op, OpKind};
use super::{Completion, CompletionKind, Ring, receive_entry};

/// The operations to retry. Empty unless the kernel is out of memory.
#[derive(Debug, Default)]
pub(super) struct RetryList {
    waiting: Vec<Op>,
    /// Operations that were cancelled while they waited. Their last events are not yet
    /// reported.
    cancelled: Vec<Op>,
}

// === impl Ring ===

impl Ring {
    /// Returns whether the operation failed only because the kernel was out of memory.
    pub(super) fn is_shortage(work: OpKind, result: i32) -> bool {
        match work {
            // For a receive, ENOBUFS means that no pool buffer was free.
            OpKind::Receive => -result == libc::ENOMEM,
            OpKind::Send(_) => matches!(-result, libc::ENOMEM | libc::ENOBUFS),
            // Callers handle a failed poll themselves.
            OpKind::Poll => false,
        }
    }

    /// Adds an operation to the retry list. Returns false if it must not be retried.
    pub(super) fn add_retry(&mut self, op: Op) -> bool {
        let closing = self.closing;
        let Some(operation) = self.ops.get_mut(op).filter(|one| !one.cancelled && !closing) else {
            return false;
        };
        operation.awaits_retry = true;
        operation.progress_requested = false;
        self.retries.waiting.push(op);
        self.counts.short += 1;
        true
    }

    /// Submits all waiting operations again.
    pub fn retry_all(&mut self) {
        for op in std::mem::take(&mut self.retries.waiting) {
            let Some(operation) = self.ops.get_mut(op) else { continue };
            if !std::mem::take(&mut operation.awaits_retry) {
                continue;
            }
            let fd = operation.fd();
            let entry = match operation.work {
                OpKind::Receive => receive_entry(fd),
                OpKind::Send(parcel) => self.ops.bytes(parcel).send_entry(fd),
                OpKind::Poll => continue,
            };
            self.push(entry.user_data(op.user_data()));
        }
    }

    /// Cancels `op` if it waits for a retry, because the kernel does not know it then.
    ///
    /// Returns whether it did. [`Ring::next_failed`] then returns its last event.
    pub(super) fn fail_all(&mut self, op: Op) -> bool {
        let awaits_retry = self
            .ops
            .get_mut(op)
            .is_some_and(|operation| std::mem::take(&mut operation.awaits_retry));
        if awaits_retry {
            self.retries.cancelled.push(op);
            self.pending = true;
        }
        awaits_retry
    }

    /// Returns the last event of an operation that was cancelled in the retry list.
    pub(super) fn next_failed(&mut self) -> Option<Completion> {
        let op = self.retries.cancelled.pop()?;
        let operation = self.ops.get_mut(op)?;
        let (tag, work) = (operation.tag, operation.work);
        self.ops.remove(op);
        let what = match work {
            OpKind::Send(parcel) => {
                self.ops.take_send(parcel);
                CompletionKind::SendFailed(libc::ECANCELED)
            }
            OpKind::Receive | OpKind::Poll => CompletionKind::Stopped,
        };
        Some(Completion { op, tag, last: true, what })
    }

    /// Cancels all waiting operations, because the ring is being dropped.
    pub(super) fn clear_retries(&mut self) {
        for op in std::mem::take(&mut self.retries.waiting) {
            self.fail_all(op);
        }
        while self.next_failed().is_some() {}
    }
}
