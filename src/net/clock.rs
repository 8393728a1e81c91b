//! The only place that reads the clocks of the host.
//!
//! Workers, probes, the control loop and the access log read the time here. `core` takes
//! the time as an argument and never reads a clock. No other code calls `Instant::now` or
//! `SystemTime::now`.

use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime};

/// The time of the first use of [`millis`].
static ORIGIN: LazyLock<Instant> = LazyLock::new(now);

/// Returns the milliseconds from the first call in this process to `at`.
///
/// All callers share that origin. Times before it give 0. Later calls read no clock.
pub fn millis(at: Instant) -> u64 {
    at.saturating_duration_since(*ORIGIN).as_millis() as u64
}

/// Reads the monotonic clock.
#[allow(clippy::disallowed_methods)]
pub fn now() -> Instant {
    #[cfg(any(test, feature = "fake"))]
    if crate::fake::is_installed() {
        return tokio::time::Instant::now().into_std();
    }
    Instant::now()
}

/// Reads the wall clock, which can jump. Use it only for timestamps that people read or
/// that other hosts compare.
#[allow(clippy::disallowed_methods)]
pub fn wall() -> SystemTime {
    SystemTime::now()
}

/// Reads the monotonic clock in microseconds (clock_gettime(2), CLOCK_MONOTONIC). All
/// processes of this host read the same value.
pub fn monotonic_micros() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let (seconds, nanos) = (u64::try_from(time.tv_sec), u64::try_from(time.tv_nsec));
    seconds.unwrap_or_default() * 1_000_000 + nanos.unwrap_or_default() / 1000
}

/// Blocks the calling thread for `time`. A worker must never call it. The control thread
/// may call it only before it serves.
#[allow(clippy::disallowed_methods)]
pub fn pause(time: Duration) {
    std::thread::sleep(time);
}
