//! Waiting for what must come, as long as the machine may take and no longer.
//!
//! Used by every suite that waits.

use std::time::{Duration, Instant};

/// `limit` times the factor in `TIDEGATE_TEST_PATIENCE` (1 where it is unset):
/// for slow machines, valgrind and the like.
pub fn patience(limit: Duration) -> Duration {
    let factor = std::env::var("TIDEGATE_TEST_PATIENCE")
        .map(|text| text.parse::<f64>().expect("TIDEGATE_TEST_PATIENCE is a number"))
        .unwrap_or(1.0);
    limit.mul_f64(factor)
}

/// Seconds, for readable call sites.
pub const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// Milliseconds, for readable call sites.
pub const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Waits until `done` holds; panics naming `what` after the (patient) timeout.
#[track_caller]
pub fn eventually(timeout: Duration, what: &str, mut done: impl FnMut() -> bool) {
    eventually_some(timeout, what, || done().then_some(()));
}

/// Waits until `get` gives something and returns it; panics naming `what`
/// after the (patient) timeout.
#[track_caller]
pub fn eventually_some<T>(timeout: Duration, what: &str, get: impl FnMut() -> Option<T>) -> T {
    within(timeout, get).unwrap_or_else(|| panic!("waited {timeout:?} in vain: {what}"))
}

/// What `get` gives first within the (patient) timeout, for callers with more to
/// say of a failure. Asks once at least.
pub fn within<T>(timeout: Duration, mut get: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + patience(timeout);
    loop {
        let got = get();
        if got.is_some() || Instant::now() >= deadline {
            return got;
        }
        // Between two questions.
        std::thread::sleep(ms(5));
    }
}
