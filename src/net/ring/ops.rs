//! Operations in flight: what the kernel may still touch, kept until it is done.
//!
//! Used by `Ring` alone. An operation owns a share of its socket and the memory
//! it sends from, so neither can go away beneath it; its name carries a
//! generation, so that a late completion never meets another operation.

#![allow(unsafe_code)]

use super::buffers::{Bulk, Chunk};
use io_uring::{opcode, squeue, types};
use std::collections::VecDeque;
use std::os::fd::{OwnedFd, RawFd};
use std::rc::Rc;

/// Chunks one send takes at most.
pub const SEND_CHUNKS_MAX: usize = 32;

/// Messages kept for the next queue to be sent; more would only hold memory.
const SPARE_MESSAGES: usize = 64;

/// An operation's name: generation and slot. Also the completion's `user_data`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Op(pub(super) u64);

#[derive(Debug)]
pub(super) struct InFlight {
    /// The caller's word for it.
    pub(super) tag: u64,
    pub(super) socket: Rc<OwnedFd>,
    pub(super) work: Work,
    /// Not to be resumed when it comes back short.
    pub(super) cancelled: bool,
    /// Cancelled only to learn how far it has come.
    pub(super) nudged: bool,
}

#[derive(Debug)]
pub(super) enum Work {
    Receive,
    ReceiveBulk(Bulk),
    Poll,
    SendOne(Chunk),
    SendMany(Rc<Message>),
}

/// A header and its vector for sendmsg(2), with the chunks they point into.
/// Never moved: it lives in an `Rc`.
pub(super) struct Message {
    pub(super) header: libc::msghdr,
    vector: [libc::iovec; SEND_CHUNKS_MAX],
    chunks: Vec<Chunk>,
}

#[derive(Debug, Default)]
pub(super) struct Ops {
    slots: Vec<Slot>,
    free: Vec<u32>,
    spare: Vec<Rc<Message>>,
}

#[derive(Debug)]
struct Slot {
    generation: u32,
    operation: Option<InFlight>,
}

// === impl Ops ===

impl Ops {
    #[inline]
    pub(super) fn insert(&mut self, operation: InFlight) -> Op {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, operation: None });
            (self.slots.len() - 1) as u32
        });
        let slot = &mut self.slots[index as usize];
        slot.operation = Some(operation);
        Op(u64::from(slot.generation) << 32 | u64::from(index))
    }

    #[inline]
    pub(super) fn get_mut(&mut self, op: Op) -> Option<&mut InFlight> {
        let slot = self.slots.get_mut(op.0 as u32 as usize)?;
        if slot.generation != (op.0 >> 32) as u32 {
            return None;
        }
        slot.operation.as_mut()
    }

    #[inline]
    pub(super) fn remove(&mut self, op: Op) -> Option<InFlight> {
        let index = op.0 as u32;
        let slot = self.slots.get_mut(index as usize)?;
        if slot.generation != (op.0 >> 32) as u32 {
            return None;
        }
        let operation = slot.operation.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(index);
        Some(operation)
    }

    /// How many are in flight.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// A message with up to [`SEND_CHUNKS_MAX`] chunks off the front of `queue`,
    /// and the bytes in them.
    pub(super) fn message(&mut self, queue: &mut VecDeque<Chunk>) -> Rc<Message> {
        let mut message = self.spare.pop().unwrap_or_else(|| Rc::new(Message::new()));
        let inner = Rc::get_mut(&mut message).expect("a spare message has one owner");
        let count = queue.len().min(SEND_CHUNKS_MAX);
        inner.chunks.extend(queue.drain(..count));
        inner.point();
        message
    }

    /// Gives its chunks back and keeps the message for the next.
    pub(super) fn recycle(&mut self, mut message: Rc<Message>) {
        if self.spare.len() < SPARE_MESSAGES
            && let Some(inner) = Rc::get_mut(&mut message)
        {
            inner.chunks.clear();
            self.spare.push(message);
        }
    }

    /// Keeps everything in flight for ever.
    pub(super) fn leak(&mut self) {
        std::mem::forget(std::mem::take(&mut self.slots));
    }
}

// === impl Message ===

impl Message {
    fn new() -> Message {
        let empty = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        // SAFETY: zeros are a valid `msghdr`: null pointers and lengths of zero.
        // (Some C libraries pad it with private fields, so it cannot be spelt
        // out.)
        let header = unsafe { std::mem::zeroed::<libc::msghdr>() };
        let chunks = Vec::with_capacity(SEND_CHUNKS_MAX);
        Message { header, vector: [empty; SEND_CHUNKS_MAX], chunks }
    }

    /// Points the header at the vector and the vector at the chunks.
    fn point(&mut self) {
        for (entry, chunk) in self.vector.iter_mut().zip(&self.chunks) {
            entry.iov_base = chunk.pointer().cast_mut().cast();
            entry.iov_len = chunk.len();
        }
        self.header.msg_iov = self.vector.as_mut_ptr();
        self.header.msg_iovlen = self.chunks.len() as _;
    }

    pub(super) fn len(&self) -> usize {
        self.chunks.iter().map(Chunk::len).sum()
    }

    /// Forgets the first `bytes`, which are sent.
    pub(super) fn advance(&mut self, mut bytes: usize) {
        let whole = self.chunks.iter().take_while(|chunk| {
            let whole = chunk.len() <= bytes;
            bytes -= if whole { chunk.len() } else { 0 };
            whole
        });
        let whole = whole.count();
        self.chunks.drain(..whole);
        if let Some(first) = self.chunks.first_mut() {
            first.advance(bytes);
        }
        self.point();
    }
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Message of {} chunks", self.chunks.len())
    }
}

/// The submission for a send, or for what is left of it.
pub(super) fn send_entry(fd: RawFd, work: &Work) -> squeue::Entry {
    // Waiting for all of it measured 3 to 5 % better than resuming here; it
    // comes back short all the same now and then.
    let flags = libc::MSG_WAITALL | libc::MSG_NOSIGNAL;
    match work {
        Work::SendOne(chunk) => {
            opcode::Send::new(types::Fd(fd), chunk.pointer(), chunk.len() as u32)
                .flags(flags)
                .build()
        }
        Work::SendMany(message) => opcode::SendMsg::new(types::Fd(fd), &raw const message.header)
            .flags(flags as u32)
            .build(),
        Work::Receive | Work::ReceiveBulk(_) | Work::Poll => unreachable!("only sends are sent"),
    }
}
