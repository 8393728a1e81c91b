//! Answers of the agents of backends.
//!
//! Called by `probe_results` for each probe that has ended, and by the handover. It applies
//! the words of an answer to the backend, and says whether they fail the probe. It changes no
//! intent of an operator.

use super::handover::{ago, millis};
use super::state::ControlState;
use crate::health::agent::{AgentReport, AgentState, AgentVerdict, AgentWish};
use crate::health::probe_detector::ProbeDetector;
use crate::health::{ProbeAnswer, ProbeOutcome};
use crate::model::{ProbeKind, Words};
use crate::table::state::BackendId;
use serde::{Deserialize, Serialize};
use std::time::Instant;

/// What an agent has said, in a handover.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SavedAgent {
    /// Share of the weight, in percent.
    pub share: u32,
    /// Cap on the sessions; 0: none.
    pub connections_max: u32,
    /// Name of the wish.
    pub wish: String,
    /// Name of the verdict; empty: none.
    pub verdict: String,
    /// Time since the agent changed whether it wants new sessions.
    pub ms: u64,
}

// === impl SavedAgent ===

impl SavedAgent {
    /// Returns `None` if the agent has said nothing that changes the backend.
    pub(super) fn of(detector: &ProbeDetector, now: Instant) -> Option<SavedAgent> {
        let agent = detector.agent();
        let since = now.saturating_duration_since(detector.agent_since());
        (agent != AgentState::default()).then(|| SavedAgent {
            share: agent.share,
            connections_max: agent.connections_max,
            wish: agent.wish.word().to_owned(),
            verdict: agent.verdict.map_or_else(String::new, |verdict| verdict.word().to_owned()),
            ms: millis(since),
        })
    }

    /// Words that this program does not know count as not said.
    pub(super) fn restore(&self, detector: &mut ProbeDetector, now: Instant) {
        let agent = AgentState {
            share: self.share.min(100),
            connections_max: self.connections_max,
            wish: AgentWish::all().find(|wish| wish.word() == self.wish).unwrap_or_default(),
            verdict: AgentVerdict::all().find(|verdict| verdict.word() == self.verdict),
        };
        detector.set_agent(agent, ago(now, self.ms));
    }
}

// === impl ControlState ===

impl ControlState {
    /// Whether the probe of a backend asks an agent.
    pub(super) fn has_agent(&self, id: BackendId) -> bool {
        let pool = self.backends.get(id).and_then(|entry| self.pool(entry.pool));
        let spec = pool.and_then(|pool| pool.spec.probe.as_ref());
        spec.is_some_and(|spec| matches!(spec.kind, ProbeKind::Agent { .. }))
    }

    /// Applies the answer of an agent. Returns the outcome that counts, and whether a verdict
    /// of the agent decided it. An outcome of another probe stays as it is.
    pub(super) fn hear_agent(
        &mut self,
        id: BackendId,
        outcome: ProbeOutcome,
        now: Instant,
    ) -> (ProbeOutcome, bool) {
        let ProbeOutcome::Success { took, answer: ProbeAnswer::Agent(report) } = &outcome else {
            return (outcome, false);
        };
        let Some(entry) = self.backends.touch(id) else { return (outcome, false) };
        let Some(detector) = &mut entry.health.detector else { return (outcome, false) };
        let since = detector.agent_since();
        let before = detector.hear_agent(report, now);
        let after = detector.agent();
        if before.serves() != after.serves() {
            let sessions = entry.state.in_flight.get();
            let lasted = now.saturating_duration_since(since);
            let (names, reason) = change(after, report, sessions);
            self.record(id, names, reason, lasted, now);
        }
        let verdict = report.verdict.is_some();
        match report.failure(after) {
            None => (outcome, verdict),
            Some(reason) => (ProbeOutcome::Failure { took: *took, reason }, verdict),
        }
    }
}

/// Returns the names of the states before and after, and the reason.
fn change(
    after: AgentState,
    report: &AgentReport,
    sessions: u32,
) -> ((&'static str, &'static str), String) {
    if after.serves() {
        return (("draining", "ready"), report.to_string());
    }
    (("ready", "draining"), format!("{report}; open sessions: {sessions}"))
}
