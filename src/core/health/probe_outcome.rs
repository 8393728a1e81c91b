//! Result of one probe.
//!
//! `daemon` runs probes and passes the results to the controller. This code decides nothing.

use super::agent::AgentReport;
use crate::model::{NodeRole, Words};
use std::time::{Duration, Instant};

/// Result of one probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeOutcome {
    /// The expected answer arrived.
    Success {
        /// From connect to result.
        took: Duration,
        /// What the backend answered.
        answer: ProbeAnswer,
    },
    /// The backend or the path to it failed.
    Failure {
        /// From connect to result.
        took: Duration,
        /// For the log: `connection refused`, `status 503, expected 200-399`.
        reason: String,
    },
    /// Local error (no descriptors, no ports): no evidence about the backend.
    Local {
        /// For the log.
        reason: String,
    },
}

/// The part of a backend's answer that made a probe succeed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeAnswer {
    /// The connection was established. The probe needs no more.
    Connected,
    /// The TLS handshake was done. The probe needs no more.
    Handshake,
    /// The expected bytes.
    Expected,
    /// An HTTP status.
    Status(u16),
    /// The service works, and has this role.
    Role(NodeRole),
    /// The words of an agent. They can say that the service does not work.
    Agent(Box<AgentReport>),
}

/// The newest probe of a backend that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastProbe {
    /// When its result arrived.
    pub ended: Instant,
    /// Its result.
    pub outcome: ProbeOutcome,
    /// It was a confirmation probe, sent because heartbeats were overdue.
    pub confirmation: bool,
}

// === impl ProbeOutcome ===

impl ProbeOutcome {
    /// Returns the success of a probe that only connects.
    pub fn success(took: Duration) -> ProbeOutcome {
        ProbeOutcome::Success { took, answer: ProbeAnswer::Connected }
    }

    /// Returns a failure that took no time.
    pub fn failure(reason: impl Into<String>) -> ProbeOutcome {
        ProbeOutcome::Failure { took: Duration::ZERO, reason: reason.into() }
    }
}

impl std::fmt::Display for ProbeOutcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ProbeOutcome::Success { took, .. } => write!(f, "success after {took:.1?}"),
            ProbeOutcome::Failure { reason, .. } => write!(f, "failure: {reason}"),
            ProbeOutcome::Local { reason } => write!(f, "not run: {reason}"),
        }
    }
}

// === impl ProbeAnswer ===

impl ProbeAnswer {
    /// Returns the role in the answer.
    pub fn role(&self) -> Option<NodeRole> {
        match self {
            ProbeAnswer::Role(role) => Some(*role),
            ProbeAnswer::Connected
            | ProbeAnswer::Handshake
            | ProbeAnswer::Expected
            | ProbeAnswer::Status(_)
            | ProbeAnswer::Agent(_) => None,
        }
    }
}

impl std::fmt::Display for ProbeAnswer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ProbeAnswer::Connected => f.write_str("connection accepted"),
            ProbeAnswer::Handshake => f.write_str("TLS handshake done"),
            ProbeAnswer::Expected => f.write_str("expected answer received"),
            ProbeAnswer::Status(status) => write!(f, "status {status}"),
            ProbeAnswer::Role(role) => write!(f, "role {}", role.word()),
            ProbeAnswer::Agent(report) => report.fmt(f),
        }
    }
}
