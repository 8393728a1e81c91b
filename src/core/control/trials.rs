//! Trials: an ejected backend returns with a single trial session.
//!
//! Called by the controller at the end of an ejection, and every [`TRIAL_CHECK_INTERVAL`]
//! until the trial ends. The backend's `InFlight` admits only one session, over all workers
//! and tables. This module begins, checks and ends trials. In a pool without another
//! eligible backend, an ejection ends without a trial.

use super::ControlEffect;
use super::backends::BackendEntry;
use super::pools::PoolId;
use super::schedule::TimerKind;
use super::state::ControlState;
use crate::health::ejection::{TRIAL_CHECK_INTERVAL, TrialEnd};
use crate::table::state::BackendId;
use std::time::Instant;

// === impl ControlState ===

impl ControlState {
    /// Ends the ejection and begins a trial.
    pub(super) fn begin_trial(&mut self, id: BackendId, now: Instant) {
        let Some(entry) = self.backends.touch(id) else { return };
        let Some(lasted) = entry.health.begin_trial(now) else { return };
        // Before a table makes the backend eligible.
        entry.state.in_flight.begin_trial();
        self.schedule.set(TimerKind::CheckTrial(id), now + TRIAL_CHECK_INTERVAL);
        let reason = "ejection ended after its time; admitting one trial session".to_owned();
        self.record(id, ("ejected", "trial"), reason, lasted, now);
    }

    /// Checks the trial, and ends it if it has a result.
    pub(super) fn check_trial(&mut self, id: BackendId, now: Instant) {
        let Some(entry) = self.backends.observe(id) else { return };
        let spec = self.pools.get(entry.pool);
        let spec = spec.and_then(|pool| pool.spec.ejection);
        let answer_expected = spec.is_some_and(|spec| spec.slow_first_byte.is_some());
        let phase = entry.state.in_flight.trial();
        match entry.health.outlier.check_trial(phase, answer_expected, now) {
            None if entry.health.outlier.is_on_trial() => {
                self.schedule.set(TimerKind::CheckTrial(id), now + TRIAL_CHECK_INTERVAL);
            }
            None => {}
            Some(TrialEnd::Passed(reason)) => {
                self.verdict(id, "trial", "passed", reason);
                self.end_trial(id, reason, now);
            }
            Some(TrialEnd::Failed(reason)) => {
                self.verdict(id, "trial", "failed", reason);
                self.fail_trial(id, reason, now);
            }
        }
    }

    /// Ends the trials of a pool without another eligible backend, or without ejection
    /// settings.
    pub(super) fn end_unneeded_trials(&mut self, pool: PoolId, now: Instant) {
        let Some(pool) = self.pool(pool) else { return };
        let entries = || pool.members().iter().filter_map(|id| self.backends.get(*id));
        let off = pool.spec.ejection.is_none();
        let all_in =
            self.out_of_service(pool.id).all(|entry| entry.health.outlier.counts_failures());
        if all_in || (!off && self.guard_view(pool).has_others()) {
            return;
        }
        let on_trial = entries().filter(|entry| entry.health.outlier.is_on_trial());
        let members: Vec<BackendId> = on_trial.map(|entry| entry.state.id).collect();
        // `try-all` can also pick backends whose last trial has failed.
        entries().for_each(|entry| entry.state.in_flight.end_trial());
        let why = match off {
            true => "ejection was disabled in the configuration",
            false => "no other backend in the pool is eligible",
        };
        for id in members {
            self.end_trial(id, why, now);
        }
    }

    /// Cancels the trial of a removed backend.
    pub(super) fn forget_trial(&mut self, entry: &mut BackendEntry, now: Instant) {
        self.schedule.cancel(TimerKind::CheckTrial(entry.state.id));
        entry.health.outlier.end_trial(now);
        entry.state.in_flight.end_trial();
    }

    fn end_trial(&mut self, id: BackendId, reason: &str, now: Instant) {
        self.schedule.cancel(TimerKind::CheckTrial(id));
        let Some(entry) = self.backends.touch(id) else { return };
        let Some(lasted) = entry.health.outlier.end_trial(now) else { return };
        entry.state.in_flight.end_trial();
        let to = entry.health.observation().name();
        self.record(id, ("trial", to), format!("back in rotation: {reason}"), lasted, now);
        self.pending.effects.push(ControlEffect::SlotsFreed);
    }

    fn fail_trial(&mut self, id: BackendId, reason: &str, now: Instant) {
        let Some(entry) = self.backends.get(id) else { return };
        let Some(pool) = self.pool(entry.pool) else { return };
        let view = self.guard_view(pool);
        let lasted = entry.health.outlier.trial_duration(now).unwrap_or_default();
        match pool.spec.ejection {
            // `InFlight` keeps the failed trial, so no session gets in before the next
            // table, or with an older one. The backend itself counts as on trial in `view`.
            Some(spec) if view.allows_again() => {
                self.eject(id, &spec, ("trial", reason), lasted, now);
            }
            _ => {
                let reason = format!("{reason}, but the pool cannot spare another backend");
                self.end_trial(id, &reason, now);
            }
        }
    }
}
