//! Feeds events to the controller and carries out its effects.
//!
//! Part of the control loop. It makes no decision about backends.

use super::control_loop::Control;
use super::evidence::EvidenceEvent;
use tidegate_core::control::{ControlEffect, ControlEvent, DetectorVerdict};
use tidegate_core::outcome::Cause;
use tidegate_core::table::state::BackendId;
use tidegate_dataplane::worker::WorkerCommand;
use tidegate_net::clock;

impl Control {
    /// Feeds new evidence to the controller.
    pub(super) fn take_evidence(&mut self, event: EvidenceEvent) {
        let events = self.evidence.take(event);
        self.feed(events);
    }

    /// Feeds events to the controller and carries out the effects. Also feeds waiting
    /// heartbeats, because a due decision may depend on them.
    pub(super) fn feed(&mut self, events: impl IntoIterator<Item = ControlEvent>) {
        let mut all = self.evidence.heartbeats.take();
        all.extend(events);
        if tracing::enabled!(tracing::Level::DEBUG) {
            all.iter().for_each(|event| self.log_evidence(event));
        }
        let start = clock::now();
        let effects = self.controller.apply_all(all, start);
        self.apply_effects(effects);
        let end = clock::now();
        self.controller.took(end.saturating_duration_since(start), end);
    }

    /// Logs evidence at level `debug`, except heartbeats (`heartbeats` logs them at `trace`).
    fn log_evidence(&self, event: &ControlEvent) {
        let name = |id| self.controller.name_of(id).unwrap_or_default();
        match event {
            ControlEvent::Probed { backend, outcome, .. } => {
                let (pool, backend) = name(*backend);
                tracing::debug!(%pool, %backend, result = %outcome, "probe ended");
            }
            ControlEvent::ConnectFailed { backend, failure, in_a_row, .. } => {
                let (pool, backend) = name(*backend);
                tracing::debug!(%pool, %backend, %failure, in_a_row, "session failed at backend");
            }
            ControlEvent::HeartbeatsLost(count) => {
                tracing::debug!(dropped = count, "heartbeats dropped on this host");
            }
            _ => {}
        }
    }

    /// Logs the result of one detector at level `debug`.
    fn log_verdict(&self, verdict: &DetectorVerdict) {
        if tracing::enabled!(tracing::Level::DEBUG) {
            let DetectorVerdict { backend, detector, verdict, reason } = verdict;
            let (pool, backend) = self.controller.name_of(*backend).unwrap_or_default();
            tracing::debug!(%pool, %backend, detector, verdict, reason, "detector verdict");
        }
    }

    /// Carries out effects of the controller.
    pub(super) fn apply_effects(&mut self, effects: Vec<ControlEffect>) {
        for effect in effects {
            self.apply_effect(effect);
        }
    }

    /// Resets the sessions of a backend in this process and in the old ones.
    pub(super) fn reset_sessions(&mut self, backend: BackendId, cause: Cause) {
        self.workers.send_all(|| WorkerCommand::ResetBackend(backend, cause));
        self.order_cut(backend, cause);
    }

    fn apply_effect(&mut self, effect: ControlEffect) {
        match effect {
            ControlEffect::Publish(table) => {
                self.planes.publish(&table);
                self.lifecycle.readiness().set_undecided(self.controller.undecided_pools());
                self.supervised.changed();
            }
            // The new process probes. This process only finishes its sessions, unless clients
            // wait for a backend.
            ControlEffect::Probe { .. }
                if self.upgrades.handed_over()
                    && !self.upgrades.is_stepping_down()
                    && !self.workers.context().waiters.any_waiting() => {}
            ControlEffect::SlotsFreed => self.workers.context().waiters.slot_freed(),
            ControlEffect::Probe { lane, backend, token, names, address, spec } => {
                tracing::trace!(%address, "probe started");
                self.evidence.probes.probe(lane, backend, token, names, address, spec);
            }
            ControlEffect::Build { token, build } => self.planes.build(token, build),
            ControlEffect::Log(transition) => {
                self.supervised.changed();
                self.telemetry.log_transition(&transition);
            }
            ControlEffect::Notice(notice) => self.telemetry.log_notice(&notice),
            ControlEffect::Verdict(verdict) => self.log_verdict(&verdict),
            // The new process knows the state of backends, and orders the end of sessions.
            ControlEffect::ResetSessions(_, Cause::BackendDown | Cause::BackupReleased)
                if self.upgrades.handed_over() && !self.upgrades.is_stepping_down() => {}
            ControlEffect::ResetSessions(backend, cause) => self.reset_sessions(backend, cause),
        }
    }
}
