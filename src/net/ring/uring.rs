//! The kernel's side of a ring: its queues, and the system calls on them.
//!
//! Used by `Ring` alone, which says what may stand in the queues. In tests a
//! fake kernel can take its place; otherwise each function is what it wraps.

#![allow(unsafe_code)]

#[cfg(any(test, feature = "fake"))]
use crate::fake;
use io_uring::{EnterFlags, IoUring, cqueue, squeue, types};
use std::io;
use std::os::fd::RawFd;

/// See the module's documentation.
#[cfg_attr(
    any(test, feature = "fake"),
    expect(clippy::large_enum_variant, reason = "one a worker; outside tests it is the other")
)]
pub(super) enum RingDriver {
    Real(IoUring),
    /// The fake kernel of this thread.
    #[cfg(any(test, feature = "fake"))]
    Fake,
}

/// What waits in the kernel, or for it.
pub(super) struct RingBacklog {
    /// Submissions.
    pub(super) queued: u32,
    /// It has put work off, or says so.
    pub(super) deferred: bool,
    /// Completions have outgrown their queue.
    pub(super) overflowed: bool,
}

/// The same on the real one; what is said first, on the fake one.
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

    /// Rings that when something is completed, while it is to.
    pub(super) fn register_eventfd(&self, bell: RawFd) -> io::Result<()> {
        either!(self, { fake::ring_register_bell(bell); Ok(()) }, ring => {
            ring.submitter().register_eventfd(bell)
        })
    }

    /// Shows it a ring of buffers.
    ///
    /// # Safety
    /// `address` is that of `count` initialised entries, page-aligned, which live
    /// as long as this does.
    pub(super) unsafe fn register_buffers(
        &self,
        address: u64,
        count: u16,
        group: u16,
    ) -> io::Result<()> {
        either!(self, { fake::ring_register_buffers(address, count); Ok(()) }, ring => {
            // SAFETY: as the caller says.
            unsafe { ring.submitter().register_buf_ring_with_flags(address, count, group, 0) }
        })
    }

    /// Queues an entry; false where there is no room.
    ///
    /// # Safety
    /// What the entry points to stays, unmoved, until its completion.
    #[inline]
    pub(super) unsafe fn push(&mut self, entry: &squeue::Entry) -> bool {
        either!(self, fake::ring_push(entry), ring => {
            // SAFETY: as the caller says.
            unsafe { ring.submission().push(entry) }.is_ok()
        })
    }

    #[inline]
    pub(super) fn standing(&mut self) -> RingBacklog {
        #[cfg(any(test, feature = "fake"))]
        let faked = || {
            let (queued, deferred) = fake::ring_standing();
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

    /// Submits, and has what was put off done in the same system call: sends
    /// and cancellations often leave some.
    #[inline]
    pub(super) fn enter(&self, queued: u32) -> io::Result<()> {
        either!(self, fake::ring_enter(), ring => {
            let flags = EnterFlags::GETEVENTS.bits();
            // SAFETY: no argument is passed by pointer, nothing is waited for, and
            // what the queued entries point to is kept as `push` says.
            unsafe { ring.submitter().enter::<libc::sigset_t>(queued, 0, flags, None) }.map(drop)
        })
    }

    /// Takes what is completed.
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

    /// Whether the eventfd is to be rung.
    #[inline]
    pub(super) fn wake_me(&mut self, wake: bool) {
        either!(self, fake::ring_wakes(wake), ring => match wake {
            true => ring.completion().enable_eventfd(),
            false => ring.completion().disable_eventfd(),
        })
    }

    /// Waits for a completion, for so long at most.
    pub(super) fn wait(&self, nanos: u32) {
        either!(self, fake::ring_wait(), ring => {
            let wait = types::Timespec::new().nsec(nanos);
            let arguments = types::SubmitArgs::new().timespec(&wait);
            // A time-out is no error here, and any other shows in `enter`.
            let _ = ring.submitter().submit_with_args(1, &arguments);
        })
    }
}

#[cfg(any(test, feature = "fake"))]
fn completion((user_data, result, flags): fake::SimCqe) -> cqueue::Entry {
    #[repr(C)]
    struct Plain(u64, i32, u32);
    // SAFETY: a completion is these three (`struct io_uring_cqe`), without
    // padding and with any values.
    unsafe { std::mem::transmute::<Plain, cqueue::Entry>(Plain(user_data, result, flags)) }
}
