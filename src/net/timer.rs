//! A timer that can sit in an epoll set, exact to the microsecond where
//! epoll_wait(2) counts in milliseconds. See timerfd_create(2).
//!
//! Used by the load generator's fixed-rate mode. It fires once for each arming
//! and never by itself.

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// The timer, disarmed until [`Timer::arm`].
#[derive(Debug)]
pub struct Timer(OwnedFd);

// === impl Timer ===

impl Timer {
    /// A disarmed timer.
    pub fn new() -> io::Result<Timer> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Timer(timerfd_create(TimerfdClockId::Monotonic, flags)?))
    }

    /// Becomes readable `after` from now (at least a nanosecond), instead of
    /// whenever it was to fire before.
    pub fn arm(&self, after: Duration) -> io::Result<()> {
        // All zero would disarm it.
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
