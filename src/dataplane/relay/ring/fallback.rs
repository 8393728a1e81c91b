//! Moves bytes while the ring has no buffer to receive into.
//!
//! Called by `RingEngine` for sides that wait for a buffer. It drops no bytes.
//!
//! - While the process's budget has room, a session uses its own buffer.
//! - Otherwise it uses none: bytes that cannot be sent stay in the kernel's receive queue, and
//!   TCP flow control stops the sender.
//! - If the kernel has no memory, it retries at the next tick.

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

/// Buffers used while the ring has none.
#[derive(Debug)]
pub(super) struct FallbackBuffers {
    /// Shared by all sessions. Received bytes are copied to a buffer of the session.
    scratch: Box<[u8]>,
    budget: Arc<MemoryBudget>,
}

/// Result of a receive without a ring buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FallbackResult {
    /// The side does not wait for a buffer any more.
    Done,
    /// The side still waits for a buffer.
    MoreToRead,
    /// The side waits until its bytes are sent.
    Waits,
    /// The kernel has no memory.
    Short,
    /// The other side has failed.
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
        if std::mem::replace(&mut stream.needs_buffer, true) {
            return OpResult::Nothing;
        }
        OpResult::NoBuffer { side, alone: stream.queued > 0 }
    }

    /// Marks the side for a retry at the next tick, because the kernel had no memory for a poll.
    #[cold]
    pub(super) fn wait_short(&mut self, side: SessionSide) -> OpResult {
        let stream = &mut self.streams[side as usize];
        (stream.unbuffered, stream.short) = (false, true);
        OpResult::Short(side)
    }

    /// Whether the receive of this side is stopped because its bytes wait to be sent.
    pub(super) fn is_stalled(&self, from: SessionSide) -> bool {
        let stream = &self.streams[from as usize];
        stream.receive.is_none()
            && stream.stalled_poll.is_none()
            && (stream.pipe.is_some()
                || stream.unbuffered
                || stream.queued > 0 && stream.poll.is_none())
            && !stream.needs_buffer
            && !stream.short
            && !self.close.ended(from)
            && !self.close.failed(from.other())
    }

    /// Starts to watch a side for failure if it is still stalled, because no receive would
    /// report the failure.
    pub(super) fn watch_stalled(&mut self, key: u32, from: SessionSide, ring: &mut Ring) {
        self.streams[from as usize].stall_reported = false;
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

    /// Whether the side waits for a buffer.
    pub(super) fn is_without_buffer(&self, from: SessionSide) -> bool {
        !self.halted && self.streams[from as usize].needs_buffer
    }

    /// Continues a side that waits for a buffer, by the first of these that is possible:
    ///
    /// 1. Arm a ring receive, if the pool has buffers.
    /// 2. Receive into a buffer of the session, if the budget has room.
    /// 3. Peek, and send what the other side accepts now.
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
            stream.needs_buffer = false;
            self.arm(key, from, ring);
            return FallbackResult::Done;
        }
        if stream.queued > 0 {
            // The completion of the send retries.
            stream.needs_buffer = false;
            return FallbackResult::Waits;
        }
        let Some(socket) = self.sockets[from as usize].clone() else { return FallbackResult::Done };
        let FallbackBuffers { scratch, budget } = buffers;
        let keeps = budget.has(scratch.len());
        let received = match keeps {
            true => stream::receive(&socket, scratch),
            false => stream::peek(&socket, scratch),
        };
        match received {
            Ok(0) => {
                self.streams[from as usize].needs_buffer = false;
                self.end_of(from, 0, moved);
            }
            Ok(received) if keeps => {
                let chunk = Chunk::copied(&scratch[..received], budget.take(received));
                self.received(key, from, chunk, ring, moved);
                return FallbackResult::MoreToRead;
            }
            Ok(peeked) => {
                return self.pass_on(key, from, &socket, &mut scratch[..peeked], ring, moved);
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
        self.streams[from as usize].needs_buffer = false;
        self.finish(from);
        FallbackResult::Done
    }

    /// Sends bytes that were peeked at `from`, then consumes the sent ones from its receive
    /// queue. No operation of this direction may be in flight.
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
                self.streams[from as usize].needs_buffer = false;
                self.send_failed(from, errno, ring);
                // Discard the bytes: left unread, they would turn a close with FIN into a
                // reset. An error of this socket is reported by its next receive.
                let _ = self.close.receive_seen(from, seen, moved, receive);
                return FallbackResult::Failed;
            }
        };
        if sent > 0 {
            self.close.sent_on(from, sent, moved);
            let all = seen.len();
            if let Err(errno) = self.close.receive_seen(from, &mut seen[..sent], moved, receive) {
                self.streams[from as usize].needs_buffer = false;
                self.end_of(from, errno, moved);
                self.finish(from);
                return FallbackResult::Done;
            }
            if sent == all {
                return FallbackResult::MoreToRead;
            }
        }
        let stream = &mut self.streams[from as usize];
        (stream.needs_buffer, stream.unbuffered) = (false, true);
        self.wait(key, from, OpUse::Writable, ring);
        FallbackResult::Waits
    }

    fn note_shortage(&mut self, from: SessionSide) -> FallbackResult {
        let stream = &mut self.streams[from as usize];
        (stream.needs_buffer, stream.short) = (false, true);
        FallbackResult::Short
    }

    /// Continues a side for which the kernel had no memory.
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
            stream.needs_buffer = true;
            return OpResult::NoBuffer { side: from, alone: true };
        }
        let result = self.splice(key, from, false, ring, pipes, moved);
        self.arm(key, from, ring);
        self.finish(from);
        result
    }
}
