//! The signals a process of its own obeys.
//!
//! Taken over by `start` before anybody is told that the process serves, read by the
//! control loop. `cli` has held them back since the process began: what came until now
//! is delivered here.

use super::Failure;
use std::io;
use std::time::{Duration, Instant};
use tidegate_net::clock;
use tidegate_net::signals;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// A stop signal that is repeated within this counts once: timeout(1) sends one to the
/// process and one to its group.
const REPEATED_WITHIN: Duration = Duration::from_millis(100);

/// The documented signals; pending for ever where the process obeys none.
#[derive(Debug, Default)]
pub(super) struct Signals {
    listeners: Option<[Signal; 4]>,
    /// When the last stop signal that counted came.
    stopped: Option<Instant>,
}

/// One that has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SignalKindReceived {
    Reload,
    Upgrade,
    Stop(&'static str),
}

// === impl Signals ===

impl Signals {
    /// Puts the handlers up, within this thread's runtime.
    pub(super) fn obey() -> Result<Signals, Failure> {
        let all = || -> io::Result<[Signal; 4]> {
            Ok([
                signal(SignalKind::terminate())?,
                signal(SignalKind::interrupt())?,
                signal(SignalKind::hangup())?,
                signal(SignalKind::user_defined2())?,
            ])
        };
        let listeners = all().map_err(|error| {
            Failure::Runtime(format!("cannot install signal handlers: {error}"))
        })?;
        Ok(Signals { listeners: Some(listeners), stopped: None })
    }

    /// Lets them come, to this thread: those that were started before go on undisturbed.
    pub(super) fn let_through(&self) {
        if self.listeners.is_some() {
            signals::let_through();
        }
    }

    /// The next one that counts.
    pub(super) async fn next(&mut self) -> SignalKindReceived {
        loop {
            let caught = self.any().await;
            if !matches!(caught, SignalKindReceived::Stop(_)) || self.counts(clock::now()) {
                return caught;
            }
        }
    }

    async fn any(&mut self) -> SignalKindReceived {
        let Some([terminate, interrupt, hangup, user2]) = &mut self.listeners else {
            return std::future::pending().await;
        };
        tokio::select! {
            _ = terminate.recv() => SignalKindReceived::Stop("SIGTERM"),
            _ = interrupt.recv() => SignalKindReceived::Stop("SIGINT"),
            _ = hangup.recv() => SignalKindReceived::Reload,
            _ = user2.recv() => SignalKindReceived::Upgrade,
        }
    }

    fn counts(&mut self, now: Instant) -> bool {
        let repeated = |at: Instant| now.saturating_duration_since(at) < REPEATED_WITHIN;
        let counts = !self.stopped.is_some_and(repeated);
        if counts {
            self.stopped = Some(now);
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_signal_and_its_repetitions_count_once() {
        let (mut signals, start) = (Signals::default(), clock::now());
        let at = |ms| start + Duration::from_millis(ms);
        let counted = [0, 0, 60, 99, 100, 150, 300].map(|ms| signals.counts(at(ms)));
        assert_eq!(counted, [true, false, false, false, true, false, true]);
    }
}
