//! Real time, in one place.
//!
//! The shells (workers, probes, the control loop, the access log) read time
//! here and pass it down; the core takes it as an argument. Nothing else in the
//! crate calls `Instant::now` or `SystemTime::now`.

use std::sync::LazyLock;
use std::time::{Instant, SystemTime};

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
    Instant::now()
}

/// The wall clock, for timestamps people read; it may jump.
#[allow(clippy::disallowed_methods)]
pub fn wall() -> SystemTime {
    SystemTime::now()
}
