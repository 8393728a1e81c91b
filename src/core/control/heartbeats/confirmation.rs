//! Confirmation probes: the new connects that a heartbeat detector requests.
//!
//! Called by `silence` for requests of a detector, and by the controller for results. A
//! confirmation probe replaces a running regular probe. The detector evaluates the result.

use super::HeartbeatWatch;
use crate::control::probing::PROBE_LOST_MARGIN;
use crate::control::schedule::TimerKind;
use crate::control::state::ControlState;
use crate::control::{ControlEffect, ProbeLane, ProbeToken};
use crate::health::{ProbeOutcome, REFUSED};
use crate::model;
use crate::model::{ProbeKind, ProbeSpec, ProbeTarget};
use crate::suspicion::{ConfirmationTry, TRY_TIMEOUT_MAX, TRY_TIMEOUT_MIN, TryId, TryResult};
use crate::table::state::BackendId;
use std::sync::Arc;
use std::time::Instant;

/// A running try.
#[derive(Debug, Clone, Copy)]
pub(in crate::control) struct ConfirmationInFlight {
    pub(in crate::control) token: ProbeToken,
    id: TryId,
    /// From this time on, the controller expects no result.
    pub(in crate::control) lost_at: Instant,
}

/// Returns the confirmation probe of a pool: the kind of the pool's probe, else a TCP
/// connect. Its timeout is the longest one of a try: the pool's own timeout, within the
/// bounds of the detector.
pub(in crate::control) fn confirming(pool: &model::PoolConfig) -> Arc<ProbeSpec> {
    let (kind, target, allowed) = match &pool.probe {
        Some(spec) => (spec.kind.clone(), spec.target.clone(), spec.timeout),
        None => (ProbeKind::Tcp, ProbeTarget::of_pool(pool), pool.connect_timeout),
    };
    let timeout = allowed.clamp(TRY_TIMEOUT_MIN, TRY_TIMEOUT_MAX);
    Arc::new(ProbeSpec::single(kind, target, timeout))
}

// === impl HeartbeatWatch ===

impl HeartbeatWatch {
    /// Applies the result of a try. Returns false if the token belongs to no try.
    pub(in crate::control) fn confirmation_result(
        &mut self,
        state: &mut ControlState,
        id: BackendId,
        token: ProbeToken,
        outcome: &ProbeOutcome,
        now: Instant,
    ) -> bool {
        let Some(entry) = state.backends.observe(id) else { return false };
        let Some(confirmation) =
            entry.confirmation.take_if(|confirmation| confirmation.token == token)
        else {
            return false;
        };
        entry.note_probe(outcome, true, now);
        if let ProbeOutcome::Local { reason } = outcome {
            state.note_local_error(id, reason, now);
        }
        let Some(entry) = state.backends.observe(id) else { return true };
        let Some(heartbeats) = &mut entry.heartbeats else { return true };
        let reason = match outcome {
            ProbeOutcome::Success { .. } => "confirmation probe succeeded",
            ProbeOutcome::Failure { .. } => "confirmation probe failed",
            ProbeOutcome::Undecided { .. } => "confirmation probe said nothing",
            ProbeOutcome::Local { .. } => "confirmation probe had a local error",
        };
        let answer = match outcome {
            ProbeOutcome::Success { .. } => TryResult::Answered,
            ProbeOutcome::Failure { reason, .. } if reason == REFUSED => TryResult::Refused,
            ProbeOutcome::Failure { reason, .. } => TryResult::Failed(reason.clone()),
            ProbeOutcome::Undecided { .. } | ProbeOutcome::Local { .. } => TryResult::Local,
        };
        let step = heartbeats.detector.probed(confirmation.id, answer, now);
        let quiet = step.change.is_none();
        self.apply_step(state, id, step, now);
        if quiet {
            // Without a transition, `answers` can have changed.
            state.heartbeat_health_changed(id, reason, None, now);
        }
        state.rearm(id);
        true
    }
}

// === impl ControlState ===

impl ControlState {
    /// Requests one new connect. Replaces a running regular probe.
    pub(super) fn start_try(&mut self, id: BackendId, next: ConfirmationTry, now: Instant) {
        let Some(entry) = self.backends.observe(id) else { return };
        let Some(pool) = self.pools.get(entry.pool) else { return };
        if entry.in_flight.take().is_some()
            && let Some(spec) = &pool.spec.probe
        {
            self.schedule.cancel(TimerKind::ProbeLost(id));
            self.schedule.set(TimerKind::Probe(id), now + spec.fast_interval);
        }
        let token = self.probes.next_token();
        let timeout = next.timeout.min(pool.confirming.timeout);
        let spec = if timeout == pool.confirming.timeout {
            Arc::clone(&pool.confirming)
        } else {
            Arc::new(ProbeSpec { timeout, ..(*pool.confirming).clone() })
        };
        let lost_at = now + timeout + PROBE_LOST_MARGIN;
        entry.confirmation = Some(ConfirmationInFlight { token, id: next.id, lost_at });
        self.pending.effects.push(ControlEffect::Probe {
            lane: ProbeLane { pool: pool.id.0, urgent: true },
            backend: id,
            token,
            names: entry.state.names(),
            address: entry.state.address.clone(),
            spec,
        });
    }
}
