//! What is known of a backend, kept apart by who knows it, and what follows.
//!
//! Operator intent, observation and ejection are stored; *eligible* is derived
//! here and nowhere stored. Used by the controller. Detectors are pure; only
//! `probe` (a shell) does I/O.

pub mod detector;
pub mod outlier;
pub mod probe;

use std::time::{Duration, Instant};

/// What the operator wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Intent {
    /// Take traffic.
    Ready,
    /// No new sessions; old ones finish.
    Draining,
    /// Out of service.
    Maintenance,
}

/// What probes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Observation {
    /// No result yet.
    Unknown,
    /// Works.
    Up,
    /// In doubt: takes part at reduced weight.
    Suspect,
    /// Does not work.
    Down,
}

/// How one probe ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeOutcome {
    /// As wished; how long it took.
    Success {
        /// From connect to verdict.
        took: Duration,
    },
    /// The backend's or its path's fault, in words for the log.
    Failure {
        /// Such as `connection refused` or `status 503, expected 200-399`.
        reason: String,
    },
    /// Our own trouble (no descriptors, no ports): proves nothing.
    Local {
        /// In words for the log.
        reason: String,
    },
}

/// How a session's connect attempt failed, where the backend or its path is to
/// blame. Local trouble never gets here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectFailure {
    /// RST to our SYN, or no such socket.
    Refused,
    /// No answer within the connect timeout.
    Timeout,
    /// ICMP unreachable and the like.
    Unreachable,
    /// Any other errno.
    Other(i32),
}

/// A change of a backend's standing, logged once.
#[derive(Debug, Clone)]
pub struct Transition {
    /// Pool name.
    pub pool: std::sync::Arc<str>,
    /// Backend name.
    pub backend: std::sync::Arc<str>,
    /// State before, such as `up`, `ejected`, `draining`.
    pub from: &'static str,
    /// State after.
    pub to: &'static str,
    /// The evidence, in words.
    pub reason: String,
    /// When.
    pub at: Instant,
    /// How long the state before had lasted.
    pub lasted: Duration,
}

// === impl Intent ===

impl Intent {
    /// As in status.
    pub fn name(self) -> &'static str {
        match self {
            Intent::Ready => "ready",
            Intent::Draining => "draining",
            Intent::Maintenance => "maintenance",
        }
    }
}

// === impl Observation ===

impl Observation {
    /// As in status.
    pub fn name(self) -> &'static str {
        match self {
            Observation::Unknown => "unknown",
            Observation::Up => "up",
            Observation::Suspect => "suspect",
            Observation::Down => "down",
        }
    }
}

// === impl ConnectFailure ===

impl std::fmt::Display for ConnectFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ConnectFailure::Refused => f.write_str("connection refused"),
            ConnectFailure::Timeout => f.write_str("connect timed out"),
            ConnectFailure::Unreachable => f.write_str("host unreachable"),
            ConnectFailure::Other(errno) => {
                write!(f, "connect failed: {}", std::io::Error::from_raw_os_error(*errno))
            }
        }
    }
}
