//! A timer for an epoll set. It has a resolution of microseconds, while epoll_wait(2)
//! counts milliseconds. See timerfd_create(2).
//!
//! Used by the fixed-rate mode of the load generator. It fires once after each
//! [`Timer::arm`] and never repeats.

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// A timer.
#[derive(Debug)]
pub struct Timer(OwnedFd);

// === impl Timer ===

impl Timer {
    /// Makes a disarmed timer.
    pub fn new() -> io::Result<Timer> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Timer(timerfd_create(TimerfdClockId::Monotonic, flags)?))
    }

    /// Makes the descriptor readable `after` from now, at least 1 ns. It replaces an
    /// earlier time.
    pub fn arm(&self, after: Duration) -> io::Result<()> {
        // A time of zero would disarm the timer.
        let after = after.max(Duration::from_nanos(1));
        let once = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec {
                tv_sec: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: after.subsec_nanos().into(),
            },
        };
        timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &once)?;
        Ok(())
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
