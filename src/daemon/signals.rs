//! Receives the signals that the process handles.
//!
//! Set up by `start` before the process reports ready, read by the control loop. `cli`
//! blocks these signals at the start of the process. A signal that arrived earlier is
//! delivered after [`Signals::unblock`].

use super::Failure;
use std::io;
use std::time::{Duration, Instant};
use tidegate_net::clock;
use tidegate_net::signals;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Stop signals within this time count as a single signal: timeout(1) sends one to the
/// process and one to its process group.
const REPEATED_WITHIN: Duration = Duration::from_millis(100);

/// The handled signals. Never yields a signal if signal handling is off.
#[derive(Debug, Default)]
pub(super) struct Signals {
    listeners: Option<[Signal; 4]>,
    /// When the last stop signal was returned.
    stopped: Option<Instant>,
}

/// A received signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SignalKindReceived {
    Reload,
    Upgrade,
    Stop(&'static str),
}

// === impl Signals ===

impl Signals {
    /// Installs the handlers, on the runtime of this thread.
    pub(super) fn install() -> Result<Signals, Failure> {
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

    /// Unblocks the signals in this thread. Threads that were started before still block
    /// them.
    pub(super) fn unblock(&self) {
        if self.listeners.is_some() {
            signals::unblock();
        }
    }

    /// Waits for the next signal that is not a repetition.
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
    fn repeated_stop_signal_counts_once() {
        let (mut signals, start) = (Signals::default(), clock::now());
        let at = |ms| start + Duration::from_millis(ms);
        let counted = [0, 0, 60, 99, 100, 150, 300].map(|ms| signals.counts(at(ms)));
        assert_eq!(counted, [true, false, false, false, true, false, true]);
    }
}
