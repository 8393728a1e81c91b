//! The panic hook: logs each panic with location and thread, at a limited rate.
//!
//! Installed by `start` together with the log. It does not handle the panic: the code
//! that catches it does.

use crate::event_log::{EventLog, NewEvent};
use std::backtrace::{Backtrace, BacktraceStatus};
use std::panic::PanicHookInfo;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tidegate_api::names::EventLevelName;
use tidegate_net::clock;

/// Panics logged per [`WINDOW`]. Further panics are counted, and the next logged panic
/// reports their number. A bug that affects every session causes one panic per
/// connection.
const LOGGED_MAX: u32 = 10;
const WINDOW: Duration = Duration::from_secs(10);

static LIMIT: Mutex<PanicLogLimit> =
    Mutex::new(PanicLogLimit { window: None, logged: 0, suppressed: 0 });

#[derive(Debug)]
struct PanicLogLimit {
    window: Option<Instant>,
    logged: u32,
    /// Panics that were not logged since the last logged panic.
    suppressed: u64,
}

/// Installs the hook for the whole process. Logged panics are also events.
pub(super) fn install(events: EventLog) {
    std::panic::set_hook(Box::new(move |panic| report(panic, &events)));
}

fn report(panic: &PanicHookInfo<'_>, events: &EventLog) {
    let allowed = LIMIT.lock().unwrap_or_else(PoisonError::into_inner).allows(clock::now());
    let Some(suppressed) = allowed else { return };
    let thread = std::thread::current();
    let thread = thread.name().unwrap_or("?");
    let location = panic.location().map_or_else(|| "?".to_owned(), ToString::to_string);
    let payload = panic.payload();
    let text = payload.downcast_ref::<&str>().copied();
    let reason = text.or(payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("?");
    tracing::error!(thread, location, suppressed, reason, "thread panicked");
    let text = format!("thread {thread} panicked at {location}: {reason}");
    events.record(NewEvent::of_process(EventLevelName::Bad, text));
    let (backtrace, thread) = (Backtrace::capture(), thread.to_owned());
    if backtrace.status() == BacktraceStatus::Captured {
        // Resolving symbols takes about a second the first time. A separate thread does
        // it so that a worker restarts without delay.
        let log = move || {
            for line in backtrace.to_string().lines() {
                tracing::error!(thread, line, "panic backtrace");
            }
        };
        let _ = std::thread::Builder::new().name("backtrace".to_owned()).spawn(log);
    }
}

// === impl PanicLogLimit ===

impl PanicLogLimit {
    /// Returns the number of suppressed panics if this panic must be logged; otherwise
    /// `None`.
    fn allows(&mut self, now: Instant) -> Option<u64> {
        if self.window.is_none_or(|since| now.saturating_duration_since(since) >= WINDOW) {
            (self.window, self.logged) = (Some(now), 0);
        }
        if self.logged == LOGGED_MAX {
            self.suppressed += 1;
            return None;
        }
        self.logged += 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_panics_are_logged_and_the_rest_is_counted() {
        let (start, mut limit) =
            (clock::now(), PanicLogLimit { window: None, logged: 0, suppressed: 0 });
        let logged = (0..1000).filter(|_| limit.allows(start).is_some()).count();
        assert_eq!(logged, 10);
        assert_eq!(limit.allows(start + WINDOW), Some(990));
        assert_eq!(limit.allows(start + WINDOW), Some(0));
    }
}
