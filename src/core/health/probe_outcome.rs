//! Result of one probe.
//!
//! `daemon` runs probes and passes the results to the controller. This code decides nothing.

use super::agent::AgentReport;
use crate::model::{NodeRole, Words};
use std::collections::VecDeque;
use std::sync::Arc;
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
    /// The probe ran and says nothing about the backend.
    Undecided {
        /// From start to result.
        took: Duration,
        /// What it said instead.
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
    /// A command exited with a code that means success; the code and its first line.
    Command(Box<str>),
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

/// Ended probes that are kept of each backend.
pub const PROBES_KEPT: usize = 24;

/// The last probes of a backend, oldest first; at most [`PROBES_KEPT`]. Clones share them.
/// Probes without evidence are not among them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LastProbes(Arc<VecDeque<EndedProbe>>);

/// The result of a probe in short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndedProbe {
    /// When its result arrived.
    pub ended: Instant,
    /// From connect to result.
    pub took: Duration,
    /// Why it failed; `None`: it succeeded.
    pub failure: Option<Arc<str>>,
}

// === impl LastProbes ===

impl LastProbes {
    /// Adds a probe. Copies the list if a clone shares it.
    pub fn note(&mut self, outcome: &ProbeOutcome, now: Instant) {
        let (took, failure) = match outcome {
            ProbeOutcome::Success { took, .. } => (*took, None),
            ProbeOutcome::Failure { took, reason } => (*took, Some(self.text(reason))),
            ProbeOutcome::Undecided { .. } | ProbeOutcome::Local { .. } => return,
        };
        let kept = Arc::make_mut(&mut self.0);
        if kept.len() == PROBES_KEPT {
            kept.pop_front();
        }
        kept.push_back(EndedProbe { ended: now, took, failure });
    }

    /// Returns the probes, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &EndedProbe> {
        self.0.iter()
    }

    /// Returns the reason. A backend that stays down fails for one reason, which is kept once.
    fn text(&self, reason: &str) -> Arc<str> {
        let last = self.0.back().and_then(|probe| probe.failure.as_ref());
        last.filter(|text| &***text == reason).cloned().unwrap_or_else(|| reason.into())
    }
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
            ProbeOutcome::Undecided { reason, .. } => write!(f, "no evidence: {reason}"),
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
            | ProbeAnswer::Agent(_)
            | ProbeAnswer::Command(_) => None,
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
            ProbeAnswer::Command(said) => f.write_str(said),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_probes_are_bounded_and_equal_reasons_are_kept_once() {
        let (mut probes, now) = (LastProbes::default(), tidegate_net::clock::now());
        for _ in 0..PROBES_KEPT {
            probes.note(&ProbeOutcome::success(Duration::from_millis(1)), now);
        }
        let earlier = probes.clone();
        probes.note(&ProbeOutcome::failure("connection refused"), now);
        probes.note(&ProbeOutcome::Local { reason: "no descriptors".to_owned() }, now);
        probes.note(&ProbeOutcome::failure("connection refused"), now);
        assert_eq!(probes.iter().count(), PROBES_KEPT);
        assert!(earlier.iter().all(|probe| probe.failure.is_none()), "clones do not change");
        let failures: Vec<_> = probes.iter().filter_map(|probe| probe.failure.clone()).collect();
        assert!(failures.len() == 2 && Arc::ptr_eq(&failures[0], &failures[1]));
    }
}
