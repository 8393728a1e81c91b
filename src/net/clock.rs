//! Real time, in one place.
//!
//! The shells (workers, probes, the control loop, the access log) read time
//! here and pass it down; the core takes it as an argument. Nothing else in the
//! crate calls `Instant::now` or `SystemTime::now`.

use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime};

/// The first time anybody asked for.
static ORIGIN: LazyLock<Instant> = LazyLock::new(now);

/// Milliseconds from a moment at the start of the process, the same for every
/// caller, to `at`; 0 before it. Reads no clock.
pub fn millis(at: Instant) -> u64 {
    at.saturating_duration_since(*ORIGIN).as_millis() as u64
}

/// The monotonic clock.
#[allow(clippy::disallowed_methods)]
pub fn now() -> Instant {
    #[cfg(any(test, feature = "fake"))]
    if crate::fake::is_installed() {
        return tokio::time::Instant::now().into_std();
    }
    Instant::now()
}

/// The wall clock, for timestamps people read; it may jump.
#[allow(clippy::disallowed_methods)]
pub fn wall() -> SystemTime {
    SystemTime::now()
}

/// Microseconds of the monotonic clock, as other processes of this machine count
/// them (clock_gettime(2), CLOCK_MONOTONIC).
pub fn monotonic_micros() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let (seconds, nanos) = (u64::try_from(time.tv_sec), u64::try_from(time.tv_nsec));
    seconds.unwrap_or_default() * 1_000_000 + nanos.unwrap_or_default() / 1000
}

/// Blocks the calling thread for so long. For threads that may wait: never a
/// worker, and the control thread only before it serves.
#[allow(clippy::disallowed_methods)]
pub fn pause(time: Duration) {
    std::thread::sleep(time);
}
