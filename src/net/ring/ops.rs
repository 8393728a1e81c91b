//! Operations in flight, with the sockets and memory that the kernel may still use.
//!
//! Used only by `Ring`. An operation owns a share of its socket and the memory that it
//! sends from, so neither is freed while it runs. Its name has a generation, so that a
//! late completion never matches another operation.

#![allow(unsafe_code)]

use super::buffers::Chunk;
use io_uring::{opcode, squeue, types};
use slab::Slab;
use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;

/// Most chunks per send.
pub const SEND_CHUNKS_MAX: usize = 32;

/// Most unused messages that are kept for later sends.
const SPARE_MESSAGES: usize = 64;

/// The name of an operation: generation and slot, slots from 1. It is also the
/// `user_data` of its completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Op(NonZeroU64);

/// A slot for an operation in flight. It is small, because an idle session has two.
#[derive(Debug)]
pub(super) struct InFlightOp {
    /// The tag of the caller.
    pub(super) tag: u64,
    /// `None` while the slot is free.
    socket: Option<Rc<OwnedFd>>,
    pub(super) work: OpKind,
    generation: u32,
    /// A short send must not be resumed.
    pub(super) cancelled: bool,
    /// The kernel operation is cancelled only to learn its progress.
    pub(super) progress_requested: bool,
    /// In the retry list. The kernel does not know the operation until it is retried.
    pub(super) awaits_retry: bool,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum OpKind {
    Receive,
    Poll,
    /// A send of the bytes in the slot.
    Send(SendSlot),
}

/// Index of the bytes of a send in flight.
#[derive(Debug, Clone, Copy)]
pub(super) struct SendSlot(u32);

/// The bytes of a send in flight.
#[derive(Debug)]
pub(super) enum SendBytes {
    One(Chunk),
    Many(Rc<SendMessage>),
}

/// A header and a vector for sendmsg(2), with the chunks that they point into. It never
/// moves, because it lives in an `Rc`.
pub(super) struct SendMessage {
    pub(super) header: libc::msghdr,
    vector: [libc::iovec; SEND_CHUNKS_MAX],
    chunks: Vec<Chunk>,
}

#[derive(Debug, Default)]
pub(super) struct Ops {
    slots: Vec<InFlightOp>,
    free: Vec<u32>,
    /// The bytes of sends. Few are in flight at a time, and the slots are reused while they
    /// are in the CPU cache.
    sends: Slab<SendBytes>,
    spare: Vec<Rc<SendMessage>>,
}

// === impl Op ===

impl Op {
    fn new(generation: u32, index: u32) -> Op {
        let name = u64::from(generation) << 32 | (u64::from(index) + 1);
        Op(NonZeroU64::new(name).expect("one was added"))
    }

    /// Returns the operation of a completion. `None`: the value is not the name of an
    /// operation.
    #[inline]
    pub(super) fn named(user_data: u64) -> Option<Op> {
        NonZeroU64::new(user_data).map(Op)
    }

    #[inline]
    pub(super) fn user_data(self) -> u64 {
        self.0.get()
    }

    fn generation(self) -> u32 {
        (self.0.get() >> 32) as u32
    }

    fn index(self) -> u32 {
        (self.0.get() as u32).wrapping_sub(1)
    }
}

// === impl Ops ===

impl Ops {
    #[inline]
    pub(super) fn insert(&mut self, socket: Rc<OwnedFd>, tag: u64, work: OpKind) -> Op {
        let socket = Some(socket);
        let (cancelled, progress_requested, awaits_retry) = (false, false, false);
        if let Some(index) = self.free.pop() {
            let place = &mut self.slots[index as usize];
            let generation = place.generation;
            *place = InFlightOp {
                tag,
                socket,
                work,
                generation,
                cancelled,
                progress_requested,
                awaits_retry,
            };
            return Op::new(generation, index);
        }
        let index = self.slots.len() as u32;
        self.slots.push(InFlightOp {
            tag,
            socket,
            work,
            generation: 0,
            cancelled,
            progress_requested,
            awaits_retry,
        });
        Op::new(0, index)
    }

    #[inline]
    pub(super) fn get_mut(&mut self, op: Op) -> Option<&mut InFlightOp> {
        let place = self.slots.get_mut(op.index() as usize)?;
        (place.generation == op.generation() && place.socket.is_some()).then_some(place)
    }

    /// Removes an operation that has ended and releases its socket. It has no effect if the
    /// operation was removed before.
    #[inline]
    pub(super) fn remove(&mut self, op: Op) {
        if let Some(place) = self.get_mut(op) {
            place.socket = None;
            place.generation = place.generation.wrapping_add(1);
            self.free.push(op.index());
        }
    }

    /// Stores the bytes of a send until [`Ops::take_send`].
    #[inline]
    pub(super) fn store_send(&mut self, bytes: SendBytes) -> SendSlot {
        SendSlot(self.sends.insert(bytes) as u32)
    }

    #[inline]
    pub(super) fn bytes(&self, slot: SendSlot) -> &SendBytes {
        &self.sends[slot.0 as usize]
    }

    #[inline]
    pub(super) fn bytes_mut(&mut self, slot: SendSlot) -> &mut SendBytes {
        &mut self.sends[slot.0 as usize]
    }

    /// Frees the chunks of a send that has ended.
    #[inline]
    pub(super) fn take_send(&mut self, slot: SendSlot) {
        if let SendBytes::Many(message) = self.sends.remove(slot.0 as usize) {
            self.recycle(message);
        }
    }

    /// Returns the number of operations in flight.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Removes up to [`SEND_CHUNKS_MAX`] chunks from the front of `queue` and returns a
    /// message with them.
    pub(super) fn message(&mut self, queue: &mut VecDeque<Chunk>) -> Rc<SendMessage> {
        let mut message = self.spare.pop().unwrap_or_else(|| Rc::new(SendMessage::new()));
        let inner = Rc::get_mut(&mut message).expect("a spare message has one owner");
        let count = queue.len().min(SEND_CHUNKS_MAX);
        inner.chunks.extend(queue.drain(..count));
        inner.point();
        message
    }

    /// Frees the chunks of a message and keeps the message for a later send.
    fn recycle(&mut self, mut message: Rc<SendMessage>) {
        if self.spare.len() < SPARE_MESSAGES
            && let Some(inner) = Rc::get_mut(&mut message)
        {
            inner.chunks.clear();
            self.spare.push(message);
        }
    }

    /// Leaks the sockets and memory of all operations in flight.
    pub(super) fn leak(&mut self) {
        std::mem::forget(std::mem::take(&mut self.slots));
        std::mem::forget(std::mem::take(&mut self.sends));
    }
}

// === impl SendMessage ===

impl SendMessage {
    fn new() -> SendMessage {
        let empty = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        // SAFETY: a zeroed `msghdr` is valid: null pointers and lengths of zero. Some C
        // libraries add private padding fields, so a struct literal does not compile.
        let header = unsafe { std::mem::zeroed::<libc::msghdr>() };
        let chunks = Vec::with_capacity(SEND_CHUNKS_MAX);
        SendMessage { header, vector: [empty; SEND_CHUNKS_MAX], chunks }
    }

    /// Sets the pointers of the header to the vector and of the vector to the chunks.
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

    /// Removes the first `bytes`, which were sent.
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

impl std::fmt::Debug for SendMessage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Message of {} chunks", self.chunks.len())
    }
}

// === impl InFlightOp ===

impl InFlightOp {
    /// Returns the descriptor of the operation; -1 after it has ended.
    #[inline]
    pub(super) fn fd(&self) -> RawFd {
        self.socket.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }
}

// === impl SendBytes ===

impl SendBytes {
    #[inline]
    pub(super) fn len(&self) -> usize {
        match self {
            SendBytes::One(chunk) => chunk.len(),
            SendBytes::Many(message) => message.len(),
        }
    }

    /// Removes the first `bytes`, which were sent.
    pub(super) fn advance(&mut self, bytes: usize) {
        match self {
            SendBytes::One(chunk) => chunk.advance(bytes),
            SendBytes::Many(message) => {
                Rc::get_mut(message).expect("only `ops` holds a message").advance(bytes);
            }
        }
    }

    /// Makes the submission for a send of the remaining bytes.
    #[inline]
    pub(super) fn send_entry(&self, fd: RawFd) -> squeue::Entry {
        // MSG_WAITALL was 3 to 5% faster than resuming short sends here. A send can still
        // return short.
        let flags = libc::MSG_WAITALL | libc::MSG_NOSIGNAL;
        match self {
            SendBytes::One(chunk) => {
                opcode::Send::new(types::Fd(fd), chunk.pointer(), chunk.len() as u32)
                    .flags(flags)
                    .build()
            }
            SendBytes::Many(message) => {
                opcode::SendMsg::new(types::Fd(fd), &raw const message.header)
                    .flags(flags as u32)
                    .build()
            }
        }
    }
}
