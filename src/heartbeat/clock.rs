//! Reads the clocks for senders.
//!
//! Called by `sender`. It is never used to verify heartbeats: that code gets the time as
//! an argument.

use std::time::{Instant, SystemTime};

/// Reads the monotonic clock.
#[expect(clippy::disallowed_methods, reason = "the only place in this package")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Reads the wall clock.
#[expect(clippy::disallowed_methods, reason = "the only place in this package")]
pub(crate) fn wall() -> SystemTime {
    SystemTime::now()
}
