//! Operations the kernel had no memory for: kept until they are tried again.
//!
//! Used by `Ring` alone. The connection is well, so what runs short waits and
//! nobody learns of it; to its owner it stays in flight, with its bytes and its
//! socket, and can be cancelled like any other. Nothing here decides when to try
//! again: the engine's tick does.

use super::ops::{Op, OpKind};
use super::{Completion, CompletionKind, Ring, receive_entry};

/// See the module's documentation. Empty but in a shortage.
#[derive(Debug, Default)]
pub(super) struct RetryList {
    waiting: Vec<Op>,
    /// Cancelled while they waited: their last events are still to be told.
    cancelled: Vec<Op>,
}

// === impl Ring ===

impl Ring {
    /// Whether that completion is for want of memory alone.
    pub(super) fn is_shortage(work: OpKind, result: i32) -> bool {
        match work {
            // To a receive ENOBUFS is a lack of our own buffers.
            OpKind::Receive => -result == libc::ENOMEM,
            OpKind::Send(_) => matches!(-result, libc::ENOMEM | libc::ENOBUFS),
            // Whoever polls is told, and does without.
            OpKind::Poll => false,
        }
    }

    /// Puts an operation that ran short aside; false where it is not to go on.
    pub(super) fn add_retry(&mut self, op: Op) -> bool {
        let closing = self.closing;
        let Some(operation) = self.ops.get_mut(op).filter(|one| !one.cancelled && !closing) else {
            return false;
        };
        operation.shelved = true;
        operation.nudged = false;
        self.shelf.waiting.push(op);
        self.counts.short += 1;
        true
    }

    /// Has everything tried again that ran short.
    pub fn retry_all(&mut self) {
        for op in std::mem::take(&mut self.shelf.waiting) {
            let Some(operation) = self.ops.get_mut(op) else { continue };
            if !std::mem::take(&mut operation.shelved) {
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

    /// `op` is cancelled: where it is shelved, the kernel knows nothing of it. True
    /// then, and its last event comes from [`Ring::next_failed`].
    pub(super) fn fail_all(&mut self, op: Op) -> bool {
        let shelved =
            self.ops.get_mut(op).is_some_and(|operation| std::mem::take(&mut operation.shelved));
        if shelved {
            self.shelf.cancelled.push(op);
            self.pending = true;
        }
        shelved
    }

    /// The last event of an operation that was cancelled on the shelf.
    pub(super) fn next_failed(&mut self) -> Option<Completion> {
        let op = self.shelf.cancelled.pop()?;
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

    /// Gives all of it up, for a ring that ends.
    pub(super) fn clear_retries(&mut self) {
        for op in std::mem::take(&mut self.shelf.waiting) {
            self.fail_all(op);
        }
        while self.next_failed().is_some() {}
    }
}
