//! An io_uring for sockets: multishot receives into shared buffers, sends that are resumed
//! until complete, and polls.
//!
//! Used by the ring engine, only on the thread that made it. The ring owns all memory and
//! sockets of an operation until the kernel has completed it. Therefore no error of a
//! caller can make the kernel write to freed memory or send on a closed socket. It never
//! blocks, except on drop.
//!
//! See io_uring_setup(2), io_uring_enter(2), io_uring_register_buf_ring(3) and
//! io_uring_prep_recv_multishot(3). It needs Linux 6.1 or later.

#![allow(unsafe_code)]

mod buffers;
mod event;
mod ops;
mod retry_list;
#[cfg(test)]
mod tests;
mod uring;

pub use buffers::{BUFFER_LEN, Chunk};
pub use event::{Completion, CompletionKind, PollInterest, RingCounts, RingSettings};
pub use ops::{Op, SEND_CHUNKS_MAX};

use crate::ring::retry_list::RetryList;
use buffers::BufferRing;
use io_uring::{cqueue, opcode, squeue, types};
use ops::{OpKind, Ops, SendBytes, SendSlot};
use std::collections::VecDeque;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::atomic::{Ordering, fence};
use uring::{RingBacklog, RingDriver};

/// Most submissions between two system calls. More wait in the backlog.
const SUBMISSIONS: u32 = 2048;

/// Size of the completion queue. On overflow the kernel allocates memory per completion,
/// which is counted.
const COMPLETIONS: u32 = 8192;

/// Attempts to run deferred work without a completion, after which its flag counts as
/// stale. Each attempt runs up to 20 items, which nearly always give a completion.
const STALE_FLAG_TRIES: u32 = 4;

/// The ID of the only buffer group.
const GROUP: u16 = 0;

/// `user_data` of cancellations. Their results are ignored.
const IGNORED: u64 = u64::MAX;

/// Number and duration of the waits of a dropped ring for operations in flight. Then the
/// ring leaks their memory.
const REAP_WAITS: u32 = 40;
const REAP_WAIT_NANOS: u32 = 50_000_000;

/// A descriptor that becomes readable when an armed ring has work.
#[derive(Debug, Clone)]
pub struct RingWaker(Rc<OwnedFd>);

/// An io_uring for sockets.
pub struct Ring {
    ring: ManuallyDrop<RingDriver>,
    buffers: BufferRing,
    ops: Ops,
    wake: RingWaker,
    /// Entries that did not fit into the submission queue.
    backlog: VecDeque<squeue::Entry>,
    /// Entries of the completion queue. The first `taken` of them are handled.
    completed: Vec<cqueue::Entry>,
    taken: usize,
    /// Operations that failed because the kernel was out of memory.
    retries: RetryList,
    /// True if an entry was queued after the last system call.
    pending: bool,
    counts: RingCounts,
    closing: bool,
}

// === impl Ring: making one ===

impl Ring {
    /// Makes a ring. Only the calling thread may use it.
    pub fn new(settings: RingSettings) -> io::Result<Ring> {
        let ring = RingDriver::new(SUBMISSIONS, COMPLETIONS)?;
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let wake = RingWaker(Rc::new(rustix::event::eventfd(0, flags)?));
        let mut buffers = BufferRing::new(settings.buffers, settings.shown)?;
        ring.register_eventfd(wake.as_raw_fd())?;
        let (address, count) = (buffers.address(), buffers.count());
        // SAFETY: the address is that of `count` zeroed, page-aligned entries. They live as
        // long as `buffers`, which is freed only after the ring is closed (see `drop`).
        unsafe { ring.register_buffers(address, count, GROUP) }?;
        buffers.refill();
        let mut ring = Ring {
            ring: ManuallyDrop::new(ring),
            buffers,
            ops: Ops::default(),
            wake,
            backlog: VecDeque::new(),
            completed: Vec::new(),
            taken: 0,
            retries: RetryList::default(),
            pending: false,
            counts: RingCounts::default(),
            closing: false,
        };
        ring.disarm_wakeup();
        Ok(ring)
    }

    /// Checks that io_uring works in this process: makes a ring and moves a byte through it
    /// on the calling thread.
    pub fn probe() -> io::Result<()> {
        let mut ring = Ring::new(RingSettings { buffers: 2, shown: 2 })?;
        let (left, right) = std::os::unix::net::UnixStream::pair()?;
        let [left, right] = [left, right].map(|socket| Rc::new(OwnedFd::from(socket)));
        ring.send(
            &left,
            0,
            Chunk::copied(
                b"?",
                std::sync::Arc::new(super::budget::MemoryBudget::default()).take(1),
            ),
        );
        ring.receive(&right, 1);
        ring.enter()?;
        let mut arrived = false;
        while let Some(event) = ring.next_event() {
            arrived |= matches!(event.what, CompletionKind::Data(_));
        }
        if arrived { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)) }
    }

    /// Returns the descriptor that becomes readable when an armed ring has work.
    pub fn wake(&self) -> RingWaker {
        self.wake.clone()
    }

    /// Returns the counters of the ring.
    pub fn counts(&self) -> RingCounts {
        self.counts
    }

    /// Returns the number of pool buffers that neither the kernel nor a chunk holds.
    pub fn buffers_free(&self) -> usize {
        self.buffers.free()
    }

    /// Returns the number of pool buffers that the kernel can receive into.
    #[inline]
    pub fn buffers_shown(&self) -> usize {
        usize::from(self.buffers.shown())
    }

    /// Returns the number of all pool buffers.
    pub fn buffers_total(&self) -> usize {
        usize::from(self.buffers.count())
    }

    /// Returns the number of operations in flight.
    #[inline]
    pub fn in_flight(&self) -> usize {
        self.ops.len()
    }

    /// Shows freed buffers to the kernel. [`Ring::enter`] also does this.
    pub fn show_buffers(&mut self) {
        self.buffers.refill();
    }

    /// Returns whether operations wait for [`Ring::enter`] to start them.
    #[inline]
    pub fn has_pending(&self) -> bool {
        self.pending
    }

    /// Doubles the number of buffers that are shown to the kernel. Call it after a receive
    /// found no buffer.
    pub fn widen(&mut self) {
        self.buffers.widen();
    }

    /// Halves the number of buffers that are shown to the kernel, so that they stay in the
    /// CPU cache. Call it periodically while all receives find buffers.
    pub fn narrow(&mut self) {
        self.buffers.narrow();
    }
}

/// Makes the submission of a multishot receive into pool buffers.
#[inline]
fn receive_entry(fd: RawFd) -> squeue::Entry {
    opcode::RecvMulti::new(types::Fd(fd), GROUP).build()
}

// === impl Ring: operations ===

impl Ring {
    /// Receives from `socket` into pool buffers until the last event.
    pub fn receive(&mut self, socket: &Rc<OwnedFd>, tag: u64) -> Op {
        let entry = receive_entry(socket.as_raw_fd());
        self.start(socket, tag, OpKind::Receive, entry)
    }

    /// Sends all of `chunk`.
    pub fn send(&mut self, socket: &Rc<OwnedFd>, tag: u64, chunk: Chunk) -> Op {
        self.send_bytes(socket, tag, SendBytes::One(chunk))
    }

    /// Removes the first [`SEND_CHUNKS_MAX`] chunks from `queue` and sends all of them.
    pub fn send_queue(
        &mut self,
        socket: &Rc<OwnedFd>,
        tag: u64,
        queue: &mut VecDeque<Chunk>,
    ) -> Op {
        let message = self.ops.message(queue);
        self.send_bytes(socket, tag, SendBytes::Many(message))
    }

    #[inline]
    fn send_bytes(&mut self, socket: &Rc<OwnedFd>, tag: u64, bytes: SendBytes) -> Op {
        let entry = bytes.send_entry(socket.as_raw_fd());
        let slot = self.ops.store_send(bytes);
        self.start(socket, tag, OpKind::Send(slot), entry)
    }

    /// Reports once when `socket` is in the state of `interest`.
    pub fn poll(&mut self, socket: &Rc<OwnedFd>, tag: u64, interest: PollInterest) -> Op {
        let mask = match interest {
            PollInterest::Failure => 0,
            PollInterest::Readable => libc::POLLIN | libc::POLLRDHUP,
            PollInterest::Writable => libc::POLLOUT,
        };
        let entry = opcode::PollAdd::new(types::Fd(socket.as_raw_fd()), mask as u32).build();
        self.start(socket, tag, OpKind::Poll, entry)
    }

    /// Cancels `op`. Its last event follows. It has no effect if `op` has ended.
    pub fn cancel(&mut self, op: Op) {
        if let Some(operation) = self.ops.get_mut(op) {
            operation.cancelled = true;
            if !self.fail_all(op) {
                self.push_cancel(op);
            }
        }
    }

    /// Requests the progress of a send. If it has sent bytes, a [`CompletionKind::Sent`]
    /// follows that is not the last event, and the send continues.
    ///
    /// The kernel operation is cancelled to learn its progress and then submitted again.
    pub fn request_progress(&mut self, op: Op) {
        let operation = self.ops.get_mut(op).filter(|operation| !operation.awaits_retry);
        if let Some(operation) = operation {
            operation.progress_requested = true;
            self.push_cancel(op);
        }
    }

    fn push_cancel(&mut self, op: Op) {
        let entry = opcode::AsyncCancel::new(op.user_data()).build();
        self.push(entry.user_data(IGNORED).flags(squeue::Flags::SKIP_SUCCESS));
    }

    fn start(&mut self, socket: &Rc<OwnedFd>, tag: u64, work: OpKind, entry: squeue::Entry) -> Op {
        let op = self.ops.insert(Rc::clone(socket), tag, work);
        self.push(entry.user_data(op.user_data()));
        op
    }

    /// Queues an entry. Its memory and socket must belong to an operation in `ops`, unless
    /// it has none.
    fn push(&mut self, entry: squeue::Entry) {
        self.pending = true;
        if !self.backlog.is_empty() {
            self.backlog.push_back(entry);
            return;
        }
        // SAFETY: the entry points to the chunks and the message header of its operation.
        // `ops` keeps them at the same address until the kernel completes the operation,
        // or leaks them (`drop`). Receives have no pointer; their buffers belong to the
        // pool.
        let pushed = unsafe { self.ring.push(&entry) };
        if !pushed {
            self.backlog.push_back(entry);
        }
    }
}

// === impl Ring: submitting and completing ===

impl Ring {
    /// Submits the queued entries, runs deferred work of the kernel, and takes the
    /// completions. It makes a system call only if one of them needs it.
    pub fn enter(&mut self) -> io::Result<()> {
        self.buffers.refill();
        self.pending = false;
        loop {
            self.shorten_backlog();
            let RingBacklog { queued, deferred, overflowed } = self.ring.pending_work();
            let needed = queued > 0 || deferred || overflowed;
            self.counts.overflows += u64::from(overflowed);
            if needed && let Err(error) = self.ring.enter(queued) {
                match error.raw_os_error() {
                    // The call was interrupted, or completions must be taken first.
                    Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => {}
                    _ => return Err(error),
                }
            }
            self.take_completions();
            // The backlog is submitted as far as completions fit.
            if self.backlog.is_empty() || self.completed.len() >= COMPLETIONS as usize {
                self.pending = !self.backlog.is_empty();
                return Ok(());
            }
        }
    }

    fn shorten_backlog(&mut self) {
        if self.backlog.is_empty() {
            return;
        }
        while let Some(entry) = self.backlog.front() {
            // SAFETY: as in `push`.
            if !unsafe { self.ring.push(entry) } {
                break;
            }
            self.backlog.pop_front();
        }
    }

    fn take_completions(&mut self) {
        if self.taken == self.completed.len() {
            self.completed.clear();
            self.taken = 0;
        }
        self.ring.take(&mut self.completed);
    }

    /// Arms the waker if the ring has no work. Returns whether it is armed.
    ///
    /// [`RingWaker`] then becomes readable when the ring has work. [`Ring::disarm_wakeup`]
    /// disarms it.
    pub fn arm_wakeup(&mut self) -> bool {
        if !self.backlog.is_empty() || self.taken != self.completed.len() {
            return false;
        }
        self.ring.set_wakeup(true);
        // The kernel reads the flag after it queues a completion. This code checks for
        // completions after it sets the flag. One of them sees the write of the other.
        // Some kernel paths lack a full barrier; the caller's periodic check covers them.
        fence(Ordering::SeqCst);
        let idle = self.nothing_waits();
        if !idle {
            self.disarm_wakeup();
        }
        idle
    }

    /// Returns whether the ring has no entry to submit, no completion and no deferred work.
    ///
    /// The kernel queues deferred work and then sets TASKRUN. If the work runs between
    /// these steps, the flag stays set without work until other work arrives. If the flag
    /// always counted as work, the worker would never sleep. So the flag counts only while
    /// running deferred work gives completions.
    fn nothing_waits(&mut self) -> bool {
        for _ in 0..STALE_FLAG_TRIES {
            if self.ring.has_completions() {
                return false;
            }
            let RingBacklog { queued, deferred, overflowed } = self.ring.pending_work();
            if queued > 0 || overflowed {
                return false;
            }
            if !deferred {
                return true;
            }
            if self.ring.enter(0).is_err() {
                return false;
            }
        }
        self.counts.stale_flags += 1;
        !self.ring.has_completions()
    }

    /// Disarms the waker, because each wake-up costs the kernel a write.
    pub fn disarm_wakeup(&mut self) {
        self.ring.set_wakeup(false);
    }

    /// Makes [`RingWaker`] readable, armed or not.
    pub fn signal_wakeup(&self) -> io::Result<()> {
        match rustix::io::write(&*self.wake.0, &1_u64.to_ne_bytes()) {
            // The counter is full, so the descriptor is already readable.
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Returns the next event of the completions that [`Ring::enter`] took.
    #[inline]
    pub fn next_event(&mut self) -> Option<Completion> {
        if let Some(event) = self.next_failed() {
            return Some(event);
        }
        while let Some(completion) = self.completed.get(self.taken) {
            let (result, flags) = (completion.result(), completion.flags());
            let user_data = completion.user_data();
            self.taken += 1;
            if let Some(event) = self.event(user_data, result, flags) {
                return Some(event);
            }
        }
        None
    }

    fn event(&mut self, user_data: u64, result: i32, flags: u32) -> Option<Completion> {
        // The kernel removed the buffer from the ring even if the operation is unknown.
        let chunk = cqueue::buffer_select(flags)
            .map(|id| self.buffers.taken(id, usize::try_from(result).unwrap_or(0)));
        if user_data == IGNORED {
            return None;
        }
        let op = Op::named(user_data);
        let Some((op, operation)) = op.and_then(|op| Some((op, self.ops.get_mut(op)?))) else {
            self.counts.strays += 1;
            return None;
        };
        let (tag, work) = (operation.tag, operation.work);
        let last = !cqueue::more(flags);
        if last && Ring::is_shortage(work, result) && self.add_retry(op) {
            return None;
        }
        let what = match work {
            OpKind::Receive => self.received(result, chunk),
            OpKind::Poll => CompletionKind::Polled(match result {
                errno if errno < 0 => Err(-errno),
                mask => Ok(mask & i32::from(libc::POLLERR | libc::POLLHUP) != 0),
            }),
            OpKind::Send(slot) => return self.sent(op, slot, result),
        };
        if last {
            self.ops.remove(op);
        }
        Some(Completion { op, tag, last, what })
    }

    fn received(&mut self, result: i32, chunk: Option<Chunk>) -> CompletionKind {
        match (result, chunk) {
            (1.., Some(chunk)) => CompletionKind::Data(chunk),
            // A result above 0 without a buffer means that the kernel lost bytes.
            (1.., None) => CompletionKind::Failed(libc::EIO),
            (0, _) => CompletionKind::End,
            (result, _) => match -result {
                libc::ENOBUFS => {
                    self.counts.starved += 1;
                    CompletionKind::Starved
                }
                libc::ECANCELED | libc::EINTR | libc::EAGAIN => CompletionKind::Stopped,
                errno => CompletionKind::Failed(errno),
            },
        }
    }

    /// Handles the completion of a send: resumes a short send, reports a complete one.
    fn sent(&mut self, op: Op, slot: SendSlot, result: i32) -> Option<Completion> {
        let closing = self.closing;
        let left = self.ops.bytes(slot).len();
        let operation = self.ops.get_mut(op)?;
        let tag = operation.tag;
        let sent = usize::try_from(result).unwrap_or(0);
        let progress_requested = std::mem::take(&mut operation.progress_requested);
        let resumable = sent > 0
            || matches!(-result, libc::EAGAIN | libc::EINTR)
            || progress_requested && -result == libc::ECANCELED;
        if sent < left && resumable && !operation.cancelled && !closing {
            let fd = operation.fd();
            let bytes = self.ops.bytes_mut(slot);
            bytes.advance(sent);
            let entry = bytes.send_entry(fd);
            self.push(entry.user_data(op.user_data()));
            self.counts.resumed += 1;
            // The send continues, so this reports progress only.
            return (sent > 0).then_some(Completion {
                op,
                tag,
                last: false,
                what: CompletionKind::Sent(sent),
            });
        }
        self.ops.remove(op);
        self.ops.take_send(slot);
        let what = match result {
            1.. if sent == left => CompletionKind::Sent(sent),
            1.. => CompletionKind::SendCut(sent),
            // Without progress or an errno, the send cannot continue.
            0 => CompletionKind::SendFailed(libc::EPIPE),
            errno => CompletionKind::SendFailed(-errno),
        };
        Some(Completion { op, tag, last: true, what })
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.closing = true;
        self.clear_retries();
        if self.in_flight() > 0 {
            let everything = types::CancelBuilder::any().all();
            let entry = opcode::AsyncCancel2::new(everything).build().user_data(IGNORED);
            self.push(entry);
        }
        for _ in 0..REAP_WAITS {
            if self.enter().is_err() {
                break;
            }
            while self.next_event().is_some() {}
            if self.in_flight() == 0 {
                break;
            }
            self.ring.wait(REAP_WAIT_NANOS);
        }
        if self.in_flight() > 0 {
            self.buffers.leak();
            self.ops.leak();
        }
        // SAFETY: the ring is dropped only here and not used afterwards. It is dropped
        // before the other fields, because the kernel could still use their memory.
        unsafe { ManuallyDrop::drop(&mut self.ring) };
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("in_flight", &self.in_flight())
            .field("counts", &self.counts)
            .finish_non_exhaustive()
    }
}

// === impl RingWaker ===

impl AsRawFd for RingWaker {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for RingWaker {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}
