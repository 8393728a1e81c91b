//! The queues of an io_uring and the system calls on them, or those of the fake kernel.
//!
//! Used only by `Ring`, which ensures that queued entries are valid. Each function wraps
//! one call of the `io_uring` crate. It never interprets entries.

#![allow(unsafe_code)]

#[cfg(any(test, feature = "fake"))]
use crate::fake;
use io_uring::{EnterFlags, IoUring, cqueue, squeue, types};
use std::io;
use std::os::fd::RawFd;

/// The real io_uring or, in tests, that of the fake kernel.
#[cfg_attr(
    any(test, feature = "fake"),
    expect(
        clippy::large_enum_variant,
        reason = "one per worker; outside tests the only variant is the large one"
    )
)]
pub(super) enum RingDriver {
    Real(IoUring),
    /// The fake kernel of this thread.
    #[cfg(any(test, feature = "fake"))]
    Fake,
}

/// The pending work of a ring.
pub(super) struct RingBacklog {
    /// Number of queued submissions.
    pub(super) queued: u32,
    /// The kernel's flag for deferred work is set. It can be stale.
    pub(super) deferred: bool,
    /// The completion queue has overflowed.
    pub(super) overflowed: bool,
}

/// Runs the first expression on a fake ring and the second on a real ring.
macro_rules! either {
    ($uring:expr, $fake:expr, $ring:ident => $real:expr) => {
        match $uring {
            RingDriver::Real($ring) => $real,
            #[cfg(any(test, feature = "fake"))]
            RingDriver::Fake => $fake,
        }
    };
}

impl RingDriver {
    pub(super) fn new(submissions: u32, completions: u32) -> io::Result<RingDriver> {
        #[cfg(any(test, feature = "fake"))]
        if fake::ring_new() {
            return Ok(RingDriver::Fake);
        }
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .setup_cqsize(completions)
            .build(submissions)?;
        if !ring.params().is_feature_nodrop() || !ring.params().is_feature_skip_cqe_on_success() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        Ok(RingDriver::Real(ring))
    }

    /// Registers an eventfd that the kernel signals on a completion, while wake-ups are
    /// enabled.
    pub(super) fn register_eventfd(&self, eventfd: RawFd) -> io::Result<()> {
        either!(self, { fake::ring_register_eventfd(eventfd); Ok(()) }, ring => {
            ring.submitter().register_eventfd(eventfd)
        })
    }

    /// Registers a ring of buffers.
    ///
    /// # Safety
    /// `address` must point to `count` initialised, page-aligned entries that outlive this
    /// ring.
    pub(super) unsafe fn register_buffers(
        &self,
        address: u64,
        count: u16,
        group: u16,
    ) -> io::Result<()> {
        either!(self, { fake::ring_register_buffers(address, count); Ok(()) }, ring => {
            // SAFETY: the caller guarantees it.
            unsafe { ring.submitter().register_buf_ring_with_flags(address, count, group, 0) }
        })
    }

    /// Queues an entry. Returns false if the submission queue is full.
    ///
    /// # Safety
    /// The memory that the entry points to must stay valid until its completion.
    #[inline]
    pub(super) unsafe fn push(&mut self, entry: &squeue::Entry) -> bool {
        either!(self, fake::ring_push(entry), ring => {
            // SAFETY: the caller guarantees it.
            unsafe { ring.submission().push(entry) }.is_ok()
        })
    }

    #[inline]
    pub(super) fn pending_work(&mut self) -> RingBacklog {
        #[cfg(any(test, feature = "fake"))]
        let faked = || {
            let (queued, deferred) = fake::ring_pending_work();
            RingBacklog { queued, deferred, overflowed: false }
        };
        either!(self, faked(), ring => {
            let submission = ring.submission();
            RingBacklog {
                queued: submission.len() as u32,
                deferred: submission.taskrun(),
                overflowed: submission.cq_overflow(),
            }
        })
    }

    /// Submits the queued entries and runs deferred work in the same system call. Sends and
    /// cancellations often leave deferred work.
    #[inline]
    pub(super) fn enter(&self, queued: u32) -> io::Result<()> {
        either!(self, fake::ring_enter(), ring => {
            let flags = EnterFlags::GETEVENTS.bits();
            // SAFETY: no argument is a pointer, the call does not wait, and `push` requires
            // that the memory of queued entries stays valid.
            unsafe { ring.submitter().enter::<libc::sigset_t>(queued, 0, flags, None) }.map(drop)
        })
    }

    /// Moves all completions to `into`.
    #[inline]
    pub(super) fn take(&mut self, into: &mut Vec<cqueue::Entry>) {
        either!(self, into.extend(fake::ring_take().into_iter().map(completion)), ring => {
            into.extend(ring.completion());
        })
    }

    #[inline]
    pub(super) fn has_completions(&mut self) -> bool {
        either!(self, fake::ring_has_completions(), ring => !ring.completion().is_empty())
    }

    /// Enables or disables the signalling of the eventfd.
    #[inline]
    pub(super) fn set_wakeup(&mut self, wake: bool) {
        either!(self, fake::ring_wakes(wake), ring => match wake {
            true => ring.completion().enable_eventfd(),
            false => ring.completion().disable_eventfd(),
        })
    }

    /// Waits at most `nanos` for a completion.
    pub(super) fn wait(&self, nanos: u32) {
        either!(self, fake::ring_wait(), ring => {
            let wait = types::Timespec::new().nsec(nanos);
            let arguments = types::SubmitArgs::new().timespec(&wait);
            // A timeout is not an error here. Any other error recurs in `enter`.
            let _ = ring.submitter().submit_with_args(1, &arguments);
        })
    }
}

#[cfg(any(test, feature = "fake"))]
fn completion((user_data, result, flags): fake::SimCqe) -> cqueue::Entry {
    #[repr(C)]
    struct Plain(u64, i32, u32);
    // SAFETY: a completion consists of these three fields (`struct io_uring_cqe`), without
    // padding, and every value is valid.
    unsafe { std::mem::transmute::<Plain, cqueue::Entry>(Plain(user_data, result, flags)) }
}
