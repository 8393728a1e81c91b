//! Waits with a deadline that scales with the speed of the machine.
//!
//! Used by every test binary that waits.

use std::time::{Duration, Instant};

/// Returns `limit` times the factor in `TIDEGATE_TEST_PATIENCE` (default 1), for slow
/// machines and tools such as valgrind.
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

/// Waits until `done` returns true. Panics with `what` after the scaled timeout.
#[track_caller]
pub fn eventually(timeout: Duration, what: &str, mut done: impl FnMut() -> bool) {
    eventually_some(timeout, what, || done().then_some(()));
}

/// Waits until `get` returns a value and returns it. Panics with `what` after the scaled
/// timeout.
#[track_caller]
pub fn eventually_some<T>(timeout: Duration, what: &str, get: impl FnMut() -> Option<T>) -> T {
    within(timeout, get).unwrap_or_else(|| panic!("not within {timeout:?}: {what}"))
}

/// Returns the first value that `get` gives within the scaled timeout, for callers with
/// their own error message. Calls `get` at least once.
pub fn within<T>(timeout: Duration, mut get: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + patience(timeout);
    loop {
        let got = get();
        if got.is_some() || Instant::now() >= deadline {
            return got;
        }
        // The polling interval.
        std::thread::sleep(ms(5));
    }
}
