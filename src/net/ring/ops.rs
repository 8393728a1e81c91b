//! Operations in flight: what the kernel may still touch, kept until it is done.
//!
//! Used by `Ring` alone. An operation owns a share of its socket and the memory
//! it sends from, so neither can go away beneath it; its name carries a
//! generation, so that a late completion never meets another operation.

#![allow(unsafe_code)]

use super::buffers::Chunk;
use io_uring::{opcode, squeue, types};
use slab::Slab;
use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;

/// Chunks one send takes at most.
pub const SEND_CHUNKS_MAX: usize = 32;

/// Messages kept for the next queue to be sent; more would only hold memory.
const SPARE_MESSAGES: usize = 64;

/// An operation's name: generation and slot, the latter from 1. Also the
/// completion's `user_data`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Op(NonZeroU64);

/// A place for an operation in flight. Small: an idle session has two, always.
#[derive(Debug)]
pub(super) struct InFlightOp {
    /// The caller's word for it.
    pub(super) tag: u64,
    /// None while the place is free.
    socket: Option<Rc<OwnedFd>>,
    pub(super) work: OpKind,
    generation: u32,
    /// Not to be resumed when it comes back short.
    pub(super) cancelled: bool,
    /// Cancelled only to learn how far it has come.
    pub(super) nudged: bool,
    /// Unknown to the kernel until it is tried again.
    pub(super) shelved: bool,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum OpKind {
    Receive,
    Poll,
    /// What is sent is found there.
    Send(SendSlot),
}

/// Where the bytes of a send in flight are kept.
#[derive(Debug, Clone, Copy)]
pub(super) struct SendSlot(u32);

/// The bytes of a send in flight.
#[derive(Debug)]
pub(super) enum SendBytes {
    One(Chunk),
    Many(Rc<SendMessage>),
}

/// A header and its vector for sendmsg(2), with the chunks they point into.
/// Never moved: it lives in an `Rc`.
pub(super) struct SendMessage {
    pub(super) header: libc::msghdr,
    vector: [libc::iovec; SEND_CHUNKS_MAX],
    chunks: Vec<Chunk>,
}

#[derive(Debug, Default)]
pub(super) struct Ops {
    slots: Vec<InFlightOp>,
    free: Vec<u32>,
    /// Those of sends; few are in flight at once, and reused while still hot.
    parcels: Slab<SendBytes>,
    spare: Vec<Rc<SendMessage>>,
}

// === impl Op ===

impl Op {
    fn new(generation: u32, index: u32) -> Op {
        let name = u64::from(generation) << 32 | (u64::from(index) + 1);
        Op(NonZeroU64::new(name).expect("one was added"))
    }

    /// Of a completion; `None` for what is no operation's name.
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
        let (cancelled, nudged, shelved) = (false, false, false);
        if let Some(index) = self.free.pop() {
            let place = &mut self.slots[index as usize];
            let generation = place.generation;
            *place = InFlightOp { tag, socket, work, generation, cancelled, nudged, shelved };
            return Op::new(generation, index);
        }
        let index = self.slots.len() as u32;
        self.slots.push(InFlightOp {
            tag,
            socket,
            work,
            generation: 0,
            cancelled,
            nudged,
            shelved,
        });
        Op::new(0, index)
    }

    #[inline]
    pub(super) fn get_mut(&mut self, op: Op) -> Option<&mut InFlightOp> {
        let place = self.slots.get_mut(op.index() as usize)?;
        (place.generation == op.generation() && place.socket.is_some()).then_some(place)
    }

    /// It is over: lets go of its socket. A no-op where it was before.
    #[inline]
    pub(super) fn remove(&mut self, op: Op) {
        if let Some(place) = self.get_mut(op) {
            place.socket = None;
            place.generation = place.generation.wrapping_add(1);
            self.free.push(op.index());
        }
    }

    /// Keeps bytes that are to be sent until they are unpacked again.
    #[inline]
    pub(super) fn store_send(&mut self, bytes: SendBytes) -> SendSlot {
        SendSlot(self.parcels.insert(bytes) as u32)
    }

    #[inline]
    pub(super) fn bytes(&self, parcel: SendSlot) -> &SendBytes {
        &self.parcels[parcel.0 as usize]
    }

    #[inline]
    pub(super) fn bytes_mut(&mut self, parcel: SendSlot) -> &mut SendBytes {
        &mut self.parcels[parcel.0 as usize]
    }

    /// The send is over: gives its chunks back.
    #[inline]
    pub(super) fn take_send(&mut self, parcel: SendSlot) {
        if let SendBytes::Many(message) = self.parcels.remove(parcel.0 as usize) {
            self.recycle(message);
        }
    }

    /// How many are in flight.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// A message with up to [`SEND_CHUNKS_MAX`] chunks off the front of `queue`,
    /// and the bytes in them.
    pub(super) fn message(&mut self, queue: &mut VecDeque<Chunk>) -> Rc<SendMessage> {
        let mut message = self.spare.pop().unwrap_or_else(|| Rc::new(SendMessage::new()));
        let inner = Rc::get_mut(&mut message).expect("a spare message has one owner");
        let count = queue.len().min(SEND_CHUNKS_MAX);
        inner.chunks.extend(queue.drain(..count));
        inner.point();
        message
    }

    /// Gives its chunks back and keeps the message for the next.
    fn recycle(&mut self, mut message: Rc<SendMessage>) {
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
        std::mem::forget(std::mem::take(&mut self.parcels));
    }
}

// === impl SendMessage ===

impl SendMessage {
    fn new() -> SendMessage {
        let empty = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        // SAFETY: zeros are a valid `msghdr`: null pointers and lengths of zero.
        // (Some C libraries pad it with private fields, so it cannot be spelt
        // out.)
        let header = unsafe { std::mem::zeroed::<libc::msghdr>() };
        let chunks = Vec::with_capacity(SEND_CHUNKS_MAX);
        SendMessage { header, vector: [empty; SEND_CHUNKS_MAX], chunks }
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

impl std::fmt::Debug for SendMessage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Message of {} chunks", self.chunks.len())
    }
}

// === impl InFlightOp ===

impl InFlightOp {
    /// The descriptor it works on; -1, which is none, once it is over.
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

    /// Forgets the first `bytes`, which are sent.
    pub(super) fn advance(&mut self, bytes: usize) {
        match self {
            SendBytes::One(chunk) => chunk.advance(bytes),
            SendBytes::Many(message) => {
                Rc::get_mut(message).expect("only `ops` holds a message").advance(bytes);
            }
        }
    }

    /// The submission for a send of them, or of what is left of them.
    #[inline]
    pub(super) fn send_entry(&self, fd: RawFd) -> squeue::Entry {
        // Waiting for all of it measured 3 to 5 % better than resuming here; it
        // comes back short all the same now and then.
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
