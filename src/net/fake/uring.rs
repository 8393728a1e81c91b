//! The io_uring of the fake kernel. Completions are late, in random order and sometimes
//! short.
//!
//! `net::ring` uses it in place of a real ring. It reads and writes the memory of
//! submissions late, so that memory that is freed too early shows as garbled bytes. It
//! never reads a submission differently from Linux. See io_uring_enter(2) and the header
//! `linux/io_uring.h`.

#![allow(unsafe_code)]

use super::poll::signal;
use super::socket::write_stream;
use super::{InjectedFault, SimCall, SimKernel, try_with};
use fastrand::Rng;
use io_uring::squeue;
use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;

/// A completion: `user_data`, result, flags.
pub type SimCqe = (u64, i32, u32);

const SEND_MESSAGE: u8 = 9;
const POLL: u8 = 6;
const CANCEL: u8 = 14;
const SEND: u8 = 26;
const RECEIVE: u8 = 27;

/// Flags of completions.
const BUFFER: u32 = 1;
const MORE: u32 = 2;
const BUFFER_SHIFT: u32 = 16;

/// Flag of a cancellation: all operations.
const CANCEL_ANY: u32 = 1 << 2;

/// Flag of submissions: no completion on success.
const SKIP_SUCCESS: u8 = 1 << 6;

/// Most buffers that one receive uses in a row.
const MULTISHOT_MAX: u32 = 8;

#[derive(Debug, Default)]
pub(super) struct SimRing {
    /// Most submissions before an enter.
    size: usize,
    queued: VecDeque<SimSqe>,
    in_flight: Vec<SimOp>,
    /// Completions that appear at the next enter.
    deferred: VecDeque<SimCqe>,
    completed: VecDeque<SimCqe>,
    eventfd: Option<RawFd>,
    wakes: bool,
    /// Address and number of the entries of the buffer ring.
    buffers: (u64, u16),
    /// Number of buffers that were taken.
    head: u16,
    /// The flag for deferred work. It can be set without deferred work.
    flagged: bool,
}

/// The fields of a submission, read at the offsets of the header.
#[derive(Debug, Clone, Copy)]
struct SimSqe {
    code: u8,
    flags: u8,
    fd: RawFd,
    address: u64,
    len: u32,
    bits: u32,
    user_data: u64,
}

/// An entry of the buffer ring (`struct io_uring_buf`).
#[repr(C)]
struct ShownBuffer {
    address: u64,
    len: u32,
    id: u16,
    _reserved: u16,
}

#[derive(Debug)]
struct SimOp {
    entry: SimSqe,
    socket: usize,
    /// For a send: bytes that were sent.
    done: u64,
}

// === the ring, as `net::ring` uses it ===

pub fn ring_new() -> bool {
    super::is_installed()
}

pub fn ring_register_eventfd(eventfd: RawFd) {
    on(|kernel| (kernel.uring.eventfd, kernel.uring.wakes) = (Some(eventfd), true));
}

pub fn ring_register_buffers(address: u64, count: u16) {
    on(|kernel| kernel.uring.buffers = (address, count));
}

/// Queues a submission. Returns false if the queue is full.
pub fn ring_push(entry: &squeue::Entry) -> bool {
    on(|kernel| {
        let uring = &mut kernel.uring;
        let fits = uring.queued.len() < uring.size;
        if fits {
            uring.queued.push_back(SimSqe::read(entry));
        }
        fits
    })
}

/// Returns the number of queued submissions, and the flag for deferred work.
pub fn ring_pending_work() -> (u32, bool) {
    on(|kernel| (kernel.uring.queued.len() as u32, kernel.uring.flagged))
}

pub fn ring_enter() -> io::Result<()> {
    on(SimKernel::enter_ring)
}

pub fn ring_take() -> Vec<SimCqe> {
    on(|kernel| kernel.uring.completed.drain(..).collect())
}

pub fn ring_has_completions() -> bool {
    on(|kernel| !kernel.uring.completed.is_empty())
}

pub fn ring_wakes(wakes: bool) {
    on(|kernel| kernel.uring.wakes = wakes);
}

/// Completes every operation that can complete, as if time passed.
pub fn ring_wait() {
    on(|kernel| kernel.run_ring(true));
}

fn on<T>(run: impl FnOnce(&mut SimKernel) -> T) -> T {
    try_with(run).expect("a fake ring needs a fake kernel")
}

// === impl SimRing ===

impl SimRing {
    pub(super) fn new(rng: &mut Rng) -> SimRing {
        let size = rng.choice([3, 64]).unwrap_or(64);
        SimRing { size, ..SimRing::default() }
    }

    /// Defers a completion to the next enter, as with IORING_SETUP_DEFER_TASKRUN.
    fn complete(&mut self, completion: SimCqe) {
        self.deferred.push_back(completion);
        self.flagged = true;
        if self.wakes
            && let Some(eventfd) = self.eventfd
        {
            signal(eventfd);
        }
    }

    /// Takes a buffer. Returns its address, length and number; `None` if all are taken.
    fn take_buffer(&mut self) -> Option<(*mut u8, u32, u16)> {
        let (address, count) = self.buffers;
        let at = |index: u16, offset: u64| address + u64::from(index) * 16 + offset;
        // SAFETY: the owner of the ring has registered an array of `count` entries of 16
        // bytes at this address, which lives as long as the ring. The tail is the u16 at
        // offset 14 of the first entry (`struct io_uring_buf_ring`). Only this thread
        // writes it, and not during this call.
        let tail = unsafe { std::ptr::read_volatile(at(0, 14) as *const u16) };
        if tail == self.head {
            return None;
        }
        let index = self.head & (count - 1);
        self.head = self.head.wrapping_add(1);
        let entry = at(index, 0) as *const ShownBuffer;
        // SAFETY: the entry is in the same array, and entries below the tail are
        // initialised.
        let ShownBuffer { address, len, id, .. } = unsafe { std::ptr::read(entry) };
        Some((address as *mut u8, len, id))
    }
}

// === impl SimSqe ===

impl SimSqe {
    fn read(entry: &squeue::Entry) -> SimSqe {
        // SAFETY: an entry is 64 initialised bytes (`struct io_uring_sqe`). The reference
        // is valid during the copy.
        let bytes = unsafe { *std::ptr::from_ref(entry).cast::<[u8; 64]>() };
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"));
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight"));
        SimSqe {
            code: bytes[0],
            flags: bytes[1],
            fd: word(4) as RawFd,
            address: long(16),
            len: word(24),
            bits: word(28),
            user_data: long(32),
        }
    }

    /// Returns the memory ranges of a send.
    fn memory(&self) -> Vec<(*const u8, usize)> {
        if self.code == SEND {
            return vec![(self.address as *const u8, self.len as usize)];
        }
        // SAFETY: the submitter keeps the header valid until the operation completes. It
        // has not completed yet.
        let header = unsafe { &*(self.address as *const libc::msghdr) };
        // SAFETY: the submitter also keeps the vector of that length valid.
        let vector = unsafe { std::slice::from_raw_parts(header.msg_iov, header.msg_iovlen as _) };
        vector.iter().map(|part| (part.iov_base.cast_const().cast(), part.iov_len)).collect()
    }

    /// Copies at most `most` bytes after the first `skip`.
    fn bytes(&self, skip: u64, most: u64) -> Vec<u8> {
        let mut all = Vec::new();
        for (start, len) in self.memory() {
            // SAFETY: the submitter keeps the bytes valid and unchanged until the
            // operation completes. It has not completed yet.
            all.extend_from_slice(unsafe { std::slice::from_raw_parts(start, len) });
        }
        let skip = skip as usize;
        let end = all.len().min(skip + most as usize);
        all[skip..end].to_vec()
    }

    fn total(&self) -> u64 {
        self.memory().iter().map(|(_, len)| *len as u64).sum()
    }
}

// === impl SimKernel ===

impl SimKernel {
    fn enter_ring(&mut self) -> io::Result<()> {
        if let Some(InjectedFault::Errno(errno)) = self.fault(SimCall::Enter, None) {
            return Err(io::Error::from_raw_os_error(errno));
        }
        while let Some(entry) = self.uring.queued.pop_front() {
            self.submit(entry);
        }
        self.run_ring(false);
        self.uring.flagged = self.rng.u8(..16) == 0;
        let SimKernel { uring, .. } = self;
        uring.completed.append(&mut uring.deferred);
        Ok(())
    }

    fn submit(&mut self, entry: SimSqe) {
        if entry.code == CANCEL {
            return self.cancel(entry);
        }
        match self.find(entry.fd) {
            Some(socket) => self.uring.in_flight.push(SimOp { entry, socket, done: 0 }),
            None => {
                self.misused += 1;
                self.uring.complete((entry.user_data, -libc::EBADF, 0));
            }
        }
    }

    fn cancel(&mut self, entry: SimSqe) {
        let all = entry.bits & CANCEL_ANY != 0;
        let mut found = false;
        for at in (0..self.uring.in_flight.len()).rev() {
            let SimOp { entry: other, socket, .. } = self.uring.in_flight[at];
            // With a probability of 1/4, the cancellation misses a running receive.
            let busy = other.code == RECEIVE && self.sockets[socket].waiting() > 0;
            let missed = !all && busy && self.rng.u8(..4) == 0;
            if (all || other.user_data == entry.address) && !missed {
                let operation = self.uring.in_flight.swap_remove(at);
                let done = operation.done as i32;
                let result = if done > 0 { done } else { -libc::ECANCELED };
                self.uring.complete((operation.entry.user_data, result, 0));
                found = true;
            }
        }
        if !found || entry.flags & SKIP_SUCCESS == 0 {
            let result = if found { 0 } else { -libc::ENOENT };
            self.uring.complete((entry.user_data, result, 0));
        }
    }

    /// Runs operations in random order: a random subset, or all with `all`.
    pub(super) fn run_ring(&mut self, all: bool) {
        let mut order: Vec<u64> =
            self.uring.in_flight.iter().map(|operation| operation.entry.user_data).collect();
        self.rng.shuffle(&mut order);
        for user_data in order {
            if all || self.rng.u8(..4) > 0 {
                let same = |operation: &SimOp| operation.entry.user_data == user_data;
                if let Some(at) = self.uring.in_flight.iter().position(same) {
                    self.run_operation(at);
                }
            }
        }
    }

    fn run_operation(&mut self, at: usize) {
        let SimOp { entry, socket, .. } = self.uring.in_flight[at];
        let over = match entry.code {
            RECEIVE => self.run_receive(entry, socket),
            SEND | SEND_MESSAGE => self.run_send(at),
            POLL => self.run_poll(entry, socket),
            other => panic!("operation {other} is not simulated"),
        };
        if let Some(result) = over {
            self.note((entry.user_data, result));
            self.uring.in_flight.swap_remove(at);
            self.uring.complete((entry.user_data, result, 0));
        }
    }

    /// Runs a multishot receive. Returns its result if it has ended.
    fn run_receive(&mut self, entry: SimSqe, socket: usize) -> Option<i32> {
        for _ in 0..MULTISHOT_MAX {
            if self.sockets[socket].ready() & libc::POLLIN as u32 == 0 {
                return None;
            }
            let Some((to, len, id)) = self.uring.take_buffer() else {
                return Some(-libc::ENOBUFS);
            };
            match self.take(SimCall::RingReceive, socket, u64::from(len)) {
                Ok((stream, from, count)) if count > 0 => {
                    // SAFETY: a shown buffer of `len` bytes belongs to the kernel until a
                    // completion names it, and `count` is at most `len`.
                    let bytes = unsafe { std::slice::from_raw_parts_mut(to, count as usize) };
                    write_stream(stream, from, bytes);
                    let flags = BUFFER | MORE | u32::from(id) << BUFFER_SHIFT;
                    self.uring.complete((entry.user_data, count as i32, flags));
                }
                ended => {
                    self.uring.head = self.uring.head.wrapping_sub(1);
                    return Some(ended.map_or_else(|e| -e.raw_os_error().unwrap_or(0), |_| 0));
                }
            }
        }
        None
    }

    fn run_send(&mut self, at: usize) -> Option<i32> {
        let SimOp { entry, socket, done } = self.uring.in_flight[at];
        let waits = self.sockets[socket].ready() & libc::POLLOUT as u32 == 0;
        if waits && self.rng.u8(..16) > 0 {
            return None;
        }
        let left = entry.total() - done;
        let partial = |result: i32| if done > 0 { done as i32 } else { result };
        match self.may_send(SimCall::RingSend, socket, left) {
            Ok(count) => {
                let bytes = entry.bytes(done, count);
                self.sockets[socket].put(&bytes);
                self.after_put(socket);
                self.uring.in_flight[at].done += count;
                // The send completes, or it returns short with a probability of 1/4.
                let short = count < left && self.rng.u8(..4) == 0;
                (count == left || short).then_some((done + count) as i32)
            }
            Err(error) => match error.raw_os_error().unwrap_or(libc::EIO) {
                // The send waits for space, or returns EAGAIN with a probability of 1/8.
                libc::EAGAIN if self.rng.u8(..8) > 0 => None,
                errno => Some(partial(-errno)),
            },
        }
    }

    fn run_poll(&mut self, entry: SimSqe, socket: usize) -> Option<i32> {
        let always = (libc::POLLERR | libc::POLLHUP) as u32;
        let ready = self.sockets[socket].ready() & (entry.bits | always);
        if ready == 0 && self.rng.u8(..16) > 0 {
            return None;
        }
        match self.fault(SimCall::RingPoll, Some(socket)) {
            Some(InjectedFault::Errno(errno)) => Some(-errno),
            _ => (ready != 0).then_some(ready as i32),
        }
    }
}
