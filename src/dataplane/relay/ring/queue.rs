//! The bytes of a direction that are received and not yet sent.
//!
//! Owned by a direction in `streams`, which decides when to receive and send.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use tidegate_net::ring::{Chunk, Op, Ring};

/// Chunks to be sent. Usually empty, and then without memory.
#[derive(Debug, Default)]
#[expect(clippy::box_collection, reason = "a quarter of the size in every idle session")]
pub(super) struct SendQueue(Option<Box<VecDeque<Chunk>>>);

// === impl SendQueue ===

impl SendQueue {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// Appends a chunk, to the last buffer of the queue if that has room.
    pub(super) fn push(&mut self, chunk: Chunk) {
        let queue = self.0.get_or_insert_default();
        if !queue.back_mut().is_some_and(|tail| tail.absorb(&chunk)) {
            queue.push_back(chunk);
        }
    }

    /// Starts a send of as many chunks as one operation takes. `None`: the queue is empty.
    #[inline]
    pub(super) fn send(&mut self, to: &Rc<OwnedFd>, tag: u64, ring: &mut Ring) -> Option<Op> {
        let queue = self.0.as_mut()?;
        let op = ring.send_queue(to, tag, queue);
        if queue.is_empty() {
            self.0 = None;
        }
        Some(op)
    }
}
