//! An io_uring of our own for sockets: multishot receive into shared buffers,
//! sends that are carried to their end, polls.
//!
//! Driven by the ring engine, from the one thread that made it. Everything the
//! kernel may touch is owned in here until the kernel is done with it, so no
//! mistake of the caller's can make it write to freed memory or send on a
//! socket that was closed. It never blocks, except when it is dropped.
//!
//! See io_uring_setup(2), io_uring_enter(2), io_uring_register_buf_ring(3) and
//! io_uring_prep_recv_multishot(3). Linux 6.1 or later.

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

/// Submissions between two system calls; more wait in a queue here.
const SUBMISSIONS: u32 = 2048;

/// Completions the kernel can leave before it has to keep them itself, which
/// costs it an allocation each and is counted.
const COMPLETIONS: u32 = 8192;

/// Fruitless tries to have deferred work done after which its flag is taken to
/// be stale. Each does up to twenty pieces of work, and those rarely leave no
/// completion behind.
const STALE_FLAG_TRIES: u32 = 4;

/// The one group of buffers.
const GROUP: u16 = 0;

/// `user_data` of cancellations, whose outcome nobody waits for.
const NOBODY: u64 = u64::MAX;

/// How often, and for how long each time, a dropped ring waits for what is in
/// flight. After that the memory is given up for lost.
const REAP_WAITS: u32 = 40;
const REAP_WAIT_NANOS: u32 = 50_000_000;

/// Becomes readable when the ring should be looked at, if it was dozing.
#[derive(Debug, Clone)]
pub struct RingWaker(Rc<OwnedFd>);

/// The ring.
pub struct Ring {
    ring: ManuallyDrop<RingDriver>,
    buffers: BufferRing,
    ops: Ops,
    wake: RingWaker,
    /// What did not fit into the submission queue.
    backlog: VecDeque<squeue::Entry>,
    /// Taken off the completion queue; `taken` of them are dealt with.
    completed: Vec<cqueue::Entry>,
    taken: usize,
    /// What ran short of memory.
    shelf: RetryList,
    /// Something was queued since the last system call.
    pending: bool,
    counts: RingCounts,
    closing: bool,
}

// === impl Ring: making one ===

impl Ring {
    /// A ring of the calling thread's, which alone may use it.
    pub fn new(settings: RingSettings) -> io::Result<Ring> {
        let ring = RingDriver::new(SUBMISSIONS, COMPLETIONS)?;
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let wake = RingWaker(Rc::new(rustix::event::eventfd(0, flags)?));
        let mut buffers = BufferRing::new(settings.buffers, settings.shown)?;
        ring.register_eventfd(wake.as_raw_fd())?;
        let (address, count) = (buffers.address(), buffers.count());
        // SAFETY: the address is that of `count` zeroed entries, page-aligned.
        // They live as long as `buffers`, which is freed only after the ring is
        // closed (see `drop`).
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
            shelf: RetryList::default(),
            pending: false,
            counts: RingCounts::default(),
            closing: false,
        };
        ring.disarm_wakeup();
        Ok(ring)
    }

    /// Whether this kernel lets us have a ring that works: makes one and moves
    /// a byte through it. On the calling thread.
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

    /// Readable when the ring should be looked at.
    pub fn wake(&self) -> RingWaker {
        self.wake.clone()
    }

    /// What went on inside.
    pub fn counts(&self) -> RingCounts {
        self.counts
    }

    /// Pool buffers that neither the kernel nor a chunk holds.
    pub fn buffers_free(&self) -> usize {
        self.buffers.free()
    }

    /// Pool buffers the kernel can receive into now.
    #[inline]
    pub fn buffers_shown(&self) -> usize {
        usize::from(self.buffers.shown())
    }

    /// All pool buffers.
    pub fn buffers_total(&self) -> usize {
        usize::from(self.buffers.count())
    }

    /// Operations in flight.
    #[inline]
    pub fn in_flight(&self) -> usize {
        self.ops.len()
    }

    /// Shows the kernel buffers that have come free, before `enter` does.
    pub fn show_buffers(&mut self) {
        self.buffers.refill();
    }

    /// Whether operations wait for `enter` to start them.
    #[inline]
    pub fn has_pending(&self) -> bool {
        self.pending
    }

    /// Shows the kernel twice as many buffers from now on: streams starve.
    pub fn widen(&mut self) {
        self.buffers.widen();
    }

    /// To be called now and then while nobody starves: shows the kernel fewer
    /// buffers again, which stay hot.
    pub fn narrow(&mut self) {
        self.buffers.narrow();
    }
}

/// The submission for a multishot receive into pool buffers.
#[inline]
fn receive_entry(fd: RawFd) -> squeue::Entry {
    opcode::RecvMulti::new(types::Fd(fd), GROUP).build()
}

// === impl Ring: operations ===

impl Ring {
    /// Receives from `socket` into pool buffers as bytes come, until the last
    /// event.
    pub fn receive(&mut self, socket: &Rc<OwnedFd>, tag: u64) -> Op {
        let entry = receive_entry(socket.as_raw_fd());
        self.start(socket, tag, OpKind::Receive, entry)
    }

    /// Sends all of `chunk`.
    pub fn send(&mut self, socket: &Rc<OwnedFd>, tag: u64, chunk: Chunk) -> Op {
        self.send_bytes(socket, tag, SendBytes::One(chunk))
    }

    /// Sends all of the first [`SEND_CHUNKS_MAX`] chunks of `queue`, which
    /// leave it.
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
        let parcel = self.ops.store_send(bytes);
        self.start(socket, tag, OpKind::Send(parcel), entry)
    }

    /// Reports once when `socket` is as `interest` asks.
    pub fn poll(&mut self, socket: &Rc<OwnedFd>, tag: u64, interest: PollInterest) -> Op {
        let mask = match interest {
            PollInterest::Failure => 0,
            PollInterest::Readable => libc::POLLIN | libc::POLLRDHUP,
            PollInterest::Writable => libc::POLLOUT,
        };
        let entry = opcode::PollAdd::new(types::Fd(socket.as_raw_fd()), mask as u32).build();
        self.start(socket, tag, OpKind::Poll, entry)
    }

    /// Ends `op` early; its last event still comes. A no-op where it is over.
    pub fn cancel(&mut self, op: Op) {
        if let Some(operation) = self.ops.get_mut(op) {
            operation.cancelled = true;
            if !self.fail_all(op) {
                self.push_cancel(op);
            }
        }
    }

    /// Asks a send how far it has come: where it has moved at all, a
    /// [`CompletionKind::Sent`] that is not the last comes, and it goes on.
    pub fn request_progress(&mut self, op: Op) {
        if let Some(operation) = self.ops.get_mut(op).filter(|operation| !operation.shelved) {
            operation.nudged = true;
            self.push_cancel(op);
        }
    }

    fn push_cancel(&mut self, op: Op) {
        let entry = opcode::AsyncCancel::new(op.user_data()).build();
        self.push(entry.user_data(NOBODY).flags(squeue::Flags::SKIP_SUCCESS));
    }

    fn start(&mut self, socket: &Rc<OwnedFd>, tag: u64, work: OpKind, entry: squeue::Entry) -> Op {
        let op = self.ops.insert(Rc::clone(socket), tag, work);
        self.push(entry.user_data(op.user_data()));
        op
    }

    /// Queues an entry. Only for entries whose memory and socket belong to an
    /// operation in `ops`, or that have none.
    fn push(&mut self, entry: squeue::Entry) {
        self.pending = true;
        if !self.backlog.is_empty() {
            self.backlog.push_back(entry);
            return;
        }
        // SAFETY: what the entry points to is the chunks and message header of
        // the operation it is named for, which `ops` keeps, unmoved, until the
        // kernel reports the operation over, or for ever (`drop`). Receives
        // point nowhere; their buffers are the pool's.
        let pushed = unsafe { self.ring.push(&entry) };
        if !pushed {
            self.backlog.push_back(entry);
        }
    }
}

// === impl Ring: submitting and completing ===

impl Ring {
    /// Hands over what is queued, lets the kernel do what it has put off, and
    /// takes what is completed. A system call only where there is need.
    pub fn enter(&mut self) -> io::Result<()> {
        self.buffers.refill();
        self.pending = false;
        loop {
            self.shorten_backlog();
            let RingBacklog { queued, deferred, overflowed } = self.ring.standing();
            let needed = queued > 0 || deferred || overflowed;
            self.counts.overflows += u64::from(overflowed);
            if needed && let Err(error) = self.ring.enter(queued) {
                match error.raw_os_error() {
                    // Interrupted, or completions must be taken first.
                    Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => {}
                    _ => return Err(error),
                }
            }
            self.take_completions();
            // What waited here goes on as far as there is room for answers.
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

    /// Whether nothing waits to be dealt with. Then the ring dozes: [`RingWaker`]
    /// becomes readable once something does. [`Ring::disarm_wakeup`] ends that.
    pub fn arm_wakeup(&mut self) -> bool {
        if !self.backlog.is_empty() || self.taken != self.completed.len() {
            return false;
        }
        self.ring.wake_me(true);
        // The kernel looks at the flag after it has queued something; we look
        // for something queued after setting the flag. One of the two sees the
        // other. (The kernel's side has no full barrier everywhere, hence the
        // caller's safety tick.)
        fence(Ordering::SeqCst);
        let idle = self.nothing_waits();
        if !idle {
            self.disarm_wakeup();
        }
        idle
    }

    /// Whether there is nothing to submit, to take or to have done.
    ///
    /// The kernel queues deferred work first and sets TASKRUN after it; where
    /// we run the work in between, the flag stays behind for work that is no
    /// more, until other work comes. (Taken for work, it kept a worker busy for
    /// ever.) So the flag counts only while having it done brings something.
    fn nothing_waits(&mut self) -> bool {
        for _ in 0..STALE_FLAG_TRIES {
            if self.ring.has_completions() {
                return false;
            }
            let RingBacklog { queued, deferred, overflowed } = self.ring.standing();
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

    /// Ends a doze: no more wake-ups, as they cost the kernel a write each.
    pub fn disarm_wakeup(&mut self) {
        self.ring.wake_me(false);
    }

    /// Makes [`RingWaker`] readable, whether it dozes or not.
    pub fn signal_wakeup(&self) -> io::Result<()> {
        match rustix::io::write(&*self.wake.0, &1_u64.to_ne_bytes()) {
            // Full: readable it is.
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The next thing that happened, of what `enter` took.
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
        // Taken off the ring whatever else the completion says.
        let chunk = cqueue::buffer_select(flags)
            .map(|id| self.buffers.taken(id, usize::try_from(result).unwrap_or(0)));
        if user_data == NOBODY {
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
            OpKind::Send(parcel) => return self.sent(op, parcel, result),
        };
        if last {
            self.ops.remove(op);
        }
        Some(Completion { op, tag, last, what })
    }

    fn received(&mut self, result: i32, chunk: Option<Chunk>) -> CompletionKind {
        match (result, chunk) {
            (1.., Some(chunk)) => CompletionKind::Data(chunk),
            // Bytes without a buffer cannot be: a kernel that lost some.
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

    /// A send came back: resumed where it is short, reported where it is over.
    fn sent(&mut self, op: Op, parcel: SendSlot, result: i32) -> Option<Completion> {
        let closing = self.closing;
        let left = self.ops.bytes(parcel).len();
        let operation = self.ops.get_mut(op)?;
        let tag = operation.tag;
        let sent = usize::try_from(result).unwrap_or(0);
        let nudged = std::mem::take(&mut operation.nudged);
        let resumable = sent > 0
            || matches!(-result, libc::EAGAIN | libc::EINTR)
            || nudged && -result == libc::ECANCELED;
        if sent < left && resumable && !operation.cancelled && !closing {
            let fd = operation.fd();
            let bytes = self.ops.bytes_mut(parcel);
            bytes.advance(sent);
            let entry = bytes.send_entry(fd);
            self.push(entry.user_data(op.user_data()));
            self.counts.resumed += 1;
            // Not an end: progress, where there was any.
            return (sent > 0).then_some(Completion {
                op,
                tag,
                last: false,
                what: CompletionKind::Sent(sent),
            });
        }
        self.ops.remove(op);
        self.ops.take_send(parcel);
        let what = match result {
            1.. if sent == left => CompletionKind::Sent(sent),
            1.. => CompletionKind::SendCut(sent),
            // A send that takes nothing and names no reason cannot go on.
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
            let entry = opcode::AsyncCancel2::new(everything).build().user_data(NOBODY);
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
        // SAFETY: dropped here only, and not used after. It goes before the
        // fields below it, whose memory it could still use.
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
