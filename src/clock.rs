//! Real time, in one place.
//!
//! The shells (workers, probes, the control loop, the access log) read time
//! here and pass it down; the core takes it as an argument. Nothing else in the
//! crate calls `Instant::now` or `SystemTime::now`.

use std::time::{Instant, SystemTime};

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
