//! What one direction has received and not sent yet.
//!
//! Owned by a stream of `streams`; it decides nothing about when to receive or
//! send.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use tidegate_net::ring::{Chunk, Op, Ring};

/// Chunks that wait to be sent: mostly none, and then no memory either.
#[derive(Debug, Default)]
#[expect(clippy::box_collection, reason = "a quarter of the room in every idle session")]
pub(super) struct SendQueue(Option<Box<VecDeque<Chunk>>>);

// === impl SendQueue ===

impl SendQueue {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// Behind the rest, and within its last buffer where it can be.
    pub(super) fn push(&mut self, chunk: Chunk) {
        let queue = self.0.get_or_insert_default();
        if !queue.back_mut().is_some_and(|tail| tail.absorb(&chunk)) {
            queue.push_back(chunk);
        }
    }

    /// Sends as much of it as one send takes; nothing where it is empty.
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
