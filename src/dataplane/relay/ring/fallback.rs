//! When there is no buffer in the ring to receive into: with one of the
//! session's own, and where the process's budget has none left, with none. And
//! when the kernel itself has no memory: later.
//!
//! Driven by `RingEngine` for sides that starve. It never drops a byte: what can
//! be neither kept nor sent stays in the kernel's receive buffer, and TCP holds
//! the sender back.

use super::streams::{OpResult, OpUse, RingSession, tag};
use crate::local_errors::StreamError;
use crate::relay::close_state::TurnBytes;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use tidegate_core::outcome::SessionSide;
use tidegate_net::budget::MemoryBudget;
use tidegate_net::pipe::Pipes;
use tidegate_net::ring::{BUFFER_LEN, Chunk, PollInterest, Ring};
use tidegate_net::stream;

/// What is read with when the ring has no buffer.
#[derive(Debug)]
pub(super) struct FallbackBuffers {
    /// What is over moves to a buffer of the session's own.
    scratch: Box<[u8]>,
    budget: Arc<MemoryBudget>,
}

/// What came of asking for bytes without a receive in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FallbackResult {
    /// It is no longer starved.
    Done,
    /// It still is.
    MoreToRead,
    /// It waits for its own bytes to be sent.
    Waits,
    /// The kernel has no memory for it.
    Short,
    /// The side across has failed, and it is news.
    Failed,
}

// === impl FallbackBuffers ===

impl FallbackBuffers {
    pub(super) fn new(budget: Arc<MemoryBudget>) -> FallbackBuffers {
        FallbackBuffers { scratch: vec![0; BUFFER_LEN].into_boxed_slice(), budget }
    }
}

// === impl RingSession ===

impl RingSession {
    pub(super) fn note_no_buffer(&mut self, side: SessionSide) -> OpResult {
        let stream = &mut self.streams[side as usize];
        if std::mem::replace(&mut stream.starved, true) {
            return OpResult::Nothing;
        }
        OpResult::Starved { side, alone: stream.queued > 0 }
    }

    /// The kernel had no memory even to wait with: it is asked again at a tick.
    #[cold]
    pub(super) fn wait_short(&mut self, side: SessionSide) -> OpResult {
        let stream = &mut self.streams[side as usize];
        (stream.dry, stream.short) = (false, true);
        OpResult::Short(side)
    }

    /// Whether nothing is received from that side as its bytes wait.
    pub(super) fn is_stalled(&self, from: SessionSide) -> bool {
        let stream = &self.streams[from as usize];
        stream.receive.is_none()
            && stream.stalled_poll.is_none()
            && (stream.pipe.is_some() || stream.dry || stream.queued > 0 && stream.poll.is_none())
            && !stream.starved
            && !stream.short
            && !self.close.ended(from)
            && !self.close.failed(from.other())
    }

    /// Watches a side that still is stalled for its failure, which no receive
    /// would tell of.
    pub(super) fn watch_stalled(&mut self, key: u32, from: SessionSide, ring: &mut Ring) {
        self.streams[from as usize].listed = false;
        if self.halted || !self.is_stalled(from) {
            return;
        }
        if let Some(socket) = &self.sockets[from as usize] {
            let tag = tag(key, from, OpUse::Stalled);
            let poll = ring.poll(socket, tag, PollInterest::Failure);
            self.streams[from as usize].stalled_poll = Some(poll);
            self.operations += 1;
        }
    }

    /// Whether that side waits for a buffer.
    pub(super) fn is_without_buffer(&self, from: SessionSide) -> bool {
        !self.halted && self.streams[from as usize].starved
    }

    /// Gets a starved side going again: with a receive where there are buffers,
    /// else by reading what its empty queue can take, else by passing on what
    /// finds room at once.
    pub(super) fn receive_fallback(
        &mut self,
        key: u32,
        from: SessionSide,
        ring: &mut Ring,
        buffers: &mut FallbackBuffers,
        moved: &mut TurnBytes,
    ) -> FallbackResult {
        let stream = &mut self.streams[from as usize];
        if ring.buffers_shown() > 0 {
            stream.starved = false;
            self.arm(key, from, ring);
            return FallbackResult::Done;
        }
        if stream.queued > 0 {
            // The end of the send tries again.
            stream.starved = false;
            return FallbackResult::Waits;
        }
        let Some(socket) = self.sockets[from as usize].clone() else { return FallbackResult::Done };
        let FallbackBuffers { scratch, budget } = buffers;
        let keeps = budget.has(scratch.len());
        let there = match keeps {
            true => stream::receive(&socket, scratch),
            false => stream::peek(&socket, scratch),
        };
        match there {
            Ok(0) => {
                self.streams[from as usize].starved = false;
                self.end_of(from, 0, moved);
            }
            Ok(received) if keeps => {
                let chunk = Chunk::copied(&scratch[..received], budget.take(received));
                self.received(key, from, chunk, ring, moved);
                return FallbackResult::MoreToRead;
            }
            Ok(there) => {
                return self.pass_on(key, from, &socket, &mut scratch[..there], ring, moved);
            }
            Err(error) => return self.back_off(key, from, &error, ring, moved),
        }
        self.finish(from);
        FallbackResult::Done
    }

    fn back_off(
        &mut self,
        key: u32,
        from: SessionSide,
        error: &io::Error,
        ring: &mut Ring,
        moved: &mut TurnBytes,
    ) -> FallbackResult {
        match StreamError::of(error) {
            StreamError::Interrupted => return FallbackResult::MoreToRead,
            StreamError::Shortage => return self.note_shortage(from),
            StreamError::WouldBlock => self.wait(key, from, OpUse::Readable, ring),
            StreamError::Broken(errno) => {
                self.end_of(from, errno, moved);
            }
        }
        self.streams[from as usize].starved = false;
        self.finish(from);
        FallbackResult::Done
    }

    /// Sends what was seen at `from` and still is to be received there, and
    /// receives as much as found room. Nothing of this direction is in flight.
    fn pass_on(
        &mut self,
        key: u32,
        from: SessionSide,
        socket: &Rc<OwnedFd>,
        seen: &mut [u8],
        ring: &mut Ring,
        moved: &mut TurnBytes,
    ) -> FallbackResult {
        let Some(to) = &self.sockets[from.other() as usize] else { return FallbackResult::Done };
        let receive = |buffer: &mut [u8]| stream::receive(socket, buffer);
        let sent = match stream::send(to, seen).map_err(|error| StreamError::of(&error)) {
            Ok(sent) => sent,
            Err(StreamError::WouldBlock) => 0,
            Err(StreamError::Interrupted) => return FallbackResult::MoreToRead,
            Err(StreamError::Shortage) => return self.note_shortage(from),
            Err(StreamError::Broken(errno)) => {
                self.streams[from as usize].starved = false;
                self.send_failed(from, errno, ring);
                // It cannot be delivered; left unread it would turn a close in order into
                // a reset. What is wrong with this socket shows at its next read.
                let _ = self.close.receive_seen(from, seen, moved, receive);
                return FallbackResult::Failed;
            }
        };
        if sent > 0 {
            self.close.sent_on(from, sent, moved);
            let all = seen.len();
            if let Err(errno) = self.close.receive_seen(from, &mut seen[..sent], moved, receive) {
                self.streams[from as usize].starved = false;
                self.end_of(from, errno, moved);
                self.finish(from);
                return FallbackResult::Done;
            }
            if sent == all {
                return FallbackResult::MoreToRead;
            }
        }
        let stream = &mut self.streams[from as usize];
        (stream.starved, stream.dry) = (false, true);
        self.wait(key, from, OpUse::Writable, ring);
        FallbackResult::Waits
    }

    fn note_shortage(&mut self, from: SessionSide) -> FallbackResult {
        let stream = &mut self.streams[from as usize];
        (stream.starved, stream.short) = (false, true);
        FallbackResult::Short
    }

    /// Goes on where the kernel had no memory.
    pub(super) fn retry_short(
        &mut self,
        key: u32,
        from: SessionSide,
        ring: &mut Ring,
        pipes: &mut Pipes,
        moved: &mut TurnBytes,
    ) -> OpResult {
        let stream = &mut self.streams[from as usize];
        if self.halted || !std::mem::take(&mut stream.short) {
            return OpResult::Nothing;
        }
        if stream.pipe.is_none() {
            stream.starved = true;
            return OpResult::Starved { side: from, alone: true };
        }
        let meaning = self.splice(key, from, false, ring, pipes, moved);
        self.arm(key, from, ring);
        self.finish(from);
        meaning
    }
}
