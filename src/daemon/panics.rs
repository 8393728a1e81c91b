//! The panic hook: one line in the program's log for each panic, with its place
//! and its thread, and few of them.
//!
//! Installed by `start` with the log. It ends nothing and mends nothing: what
//! happens next is up to whoever contains the panic.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::panic::PanicHookInfo;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tidegate_net::clock;

/// Panics logged in each [`WINDOW`]; the rest is counted and told of with the next
/// one. A bug that every session meets makes one for each connection.
const LOGGED_MAX: u32 = 10;
const WINDOW: Duration = Duration::from_secs(10);

static LIMIT: Mutex<PanicLogLimit> =
    Mutex::new(PanicLogLimit { window: None, logged: 0, silent: 0 });

#[derive(Debug)]
struct PanicLogLimit {
    window: Option<Instant>,
    logged: u32,
    /// Not logged since the last one that was.
    silent: u64,
}

/// Puts the hook in place for the whole process.
pub(super) fn install() {
    std::panic::set_hook(Box::new(report));
}

fn report(panic: &PanicHookInfo<'_>) {
    let allowed = LIMIT.lock().unwrap_or_else(PoisonError::into_inner).allows(clock::now());
    let Some(suppressed) = allowed else { return };
    let thread = std::thread::current();
    let thread = thread.name().unwrap_or("?");
    let location = panic.location().map_or_else(|| "?".to_owned(), ToString::to_string);
    let payload = panic.payload();
    let text = payload.downcast_ref::<&str>().copied();
    let reason = text.or(payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("?");
    tracing::error!(thread, location, suppressed, reason, "thread panicked");
    let (backtrace, thread) = (Backtrace::capture(), thread.to_owned());
    if backtrace.status() == BacktraceStatus::Captured {
        // Finding the names takes a second at first, and a worker has to begin
        // anew meanwhile. Without a thread there is no backtrace.
        let tell = move || {
            for line in backtrace.to_string().lines() {
                tracing::error!(thread, line, "panic backtrace");
            }
        };
        let _ = std::thread::Builder::new().name("backtrace".to_owned()).spawn(tell);
    }
}

// === impl PanicLogLimit ===

impl PanicLogLimit {
    /// Whether one more may be logged; then, how many were not since the last.
    fn allows(&mut self, now: Instant) -> Option<u64> {
        if self.window.is_none_or(|since| now.saturating_duration_since(since) >= WINDOW) {
            (self.window, self.logged) = (Some(now), 0);
        }
        if self.logged == LOGGED_MAX {
            self.silent += 1;
            return None;
        }
        self.logged += 1;
        Some(std::mem::take(&mut self.silent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_ten_lines_and_a_number() {
        let (start, mut limit) =
            (clock::now(), PanicLogLimit { window: None, logged: 0, silent: 0 });
        let logged = (0..1000).filter(|_| limit.allows(start).is_some()).count();
        assert_eq!(logged, 10);
        assert_eq!(limit.allows(start + WINDOW), Some(990));
        assert_eq!(limit.allows(start + WINDOW), Some(0));
    }
}
