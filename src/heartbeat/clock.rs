//! Reading the time, for senders.
//!
//! Called by `sender`. What decides whether a heartbeat is believed gets the time as an
//! argument.

use std::time::{Instant, SystemTime};

/// Now, by the clock that never goes back.
#[expect(clippy::disallowed_methods, reason = "the one place of this package")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Now, by the wall clock.
#[expect(clippy::disallowed_methods, reason = "the one place of this package")]
pub(crate) fn wall() -> SystemTime {
    SystemTime::now()
}
