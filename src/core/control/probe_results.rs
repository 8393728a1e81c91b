//! Results of probes and failed connects of sessions.
//!
//! Called by the controller for its events. It updates the probe detectors, records
//! changes of the observation, and schedules the next probe. It ejects no backend.

use super::pools::{PoolId, StartupGrace};
use super::schedule::TimerKind;
use super::state::ControlState;
use super::{NoticeFields, ProbeToken};
use crate::health::probe_detector::ProbeTransition;
use crate::health::{ConnectFailure, Observation, ProbeOutcome};
use crate::model::Words;
use crate::table::state::BackendId;
use std::sync::Arc;
use std::time::Instant;

// === impl ControlState ===

impl ControlState {
    /// Records the result of a probe. Ignores results of removed backends, of replaced
    /// settings, and of probes that were treated as lost.
    pub(super) fn probed(
        &mut self,
        id: BackendId,
        token: ProbeToken,
        outcome: ProbeOutcome,
        now: Instant,
    ) {
        self.removed.probed(id, token);
        let Some(entry) = self.backends.observe(id) else { return };
        let Some(probe) = entry.in_flight.take_if(|probe| probe.token == token) else { return };
        self.schedule.cancel(TimerKind::ProbeLost(id));
        if probe.stale {
            self.schedule.set(TimerKind::Probe(id), now);
            return;
        }
        let (outcome, verdict) = self.hear_agent(id, outcome, now);
        let Some(entry) = self.backends.observe(id) else { return };
        entry.note_probe(&outcome, false, now);
        match outcome {
            ProbeOutcome::Success { took, answer } => {
                if let Some(heartbeats) = &mut entry.heartbeats {
                    heartbeats.detector.note_connect_success(took);
                }
                self.see_role(id, answer.role(), now);
                self.apply_probe_result(id, None, verdict, now);
            }
            ProbeOutcome::Failure { reason, .. } => {
                self.apply_probe_result(id, Some(reason), verdict, now);
            }
            ProbeOutcome::Undecided { .. } => {}
            ProbeOutcome::Local { reason } => self.note_local_error(id, &reason, now),
        }
        self.schedule_next_probe(id, probe.started, now);
    }

    /// Records a failure of a session. Returns true if it counts towards an ejection.
    ///
    /// A failed connect also counts as a failed probe, if the pool has probes. An early
    /// reset does not, because probes may still succeed and would make the backend up
    /// again at once. During an ejection or a trial the failure does not count: the session
    /// was picked before it, and the trial session decides the trial.
    pub(super) fn connect_failed(
        &mut self,
        id: BackendId,
        failure: ConnectFailure,
        (in_a_row, begun): (u32, Instant),
        now: Instant,
    ) -> bool {
        let Some(entry) = self.backends.observe(id) else {
            if failure != ConnectFailure::EarlyReset {
                self.drop_stand_in(id);
            }
            return false;
        };
        entry.health.recent.note(failure, now);
        // A connect that began before the backend returned can fail late.
        if !entry.health.outlier.counts_failures() || begun < entry.health.settled_since() {
            return false;
        }
        let before = entry.health.observation();
        let follows = self.pools.get(entry.pool).is_some_and(|pool| pool.spec.of.is_some());
        if follows {
            // The probes of the other pool decide, and its own sessions.
            if let Some(probed) = self.probed_member(id) {
                self.hasten_probe(probed, now);
            }
        } else if let Some(detector) = &mut entry.health.detector {
            if failure != ConnectFailure::EarlyReset
                && let Some(change) = detector.connect_failed(in_a_row, now)
            {
                self.observed(id, before, change, &failure.to_string(), now);
            }
            self.bring_probe_forward(id, now);
        }
        true
    }

    /// Makes a pool without a result fail open, at the end of `startup_grace`.
    pub(super) fn end_startup_grace(&mut self, pool: PoolId) {
        let Some(pool) = self.pools.observe(pool) else { return };
        if !matches!(pool.startup, StartupGrace::Waiting { .. }) {
            return;
        }
        pool.startup = StartupGrace::FailingOpen;
        if pool.spec.of.is_some() {
            // The pool that it follows logs it and fails open.
            return;
        }
        let fields = NoticeFields {
            startup_grace: Some(humantime::format_duration(pool.spec.startup_grace).to_string()),
            help: "check the probe settings of the pool and the network",
            ..NoticeFields::default()
        };
        let name = Arc::clone(&pool.spec.name);
        let members = pool.members().to_vec();
        for id in members {
            if let Some(entry) = self.backends.touch(id) {
                entry.health.fails_open = true;
            }
        }
        let message = "no probe result within startup_grace; failing open: each backend is in \
                       rotation until its own first result";
        self.warn(name, message, fields);
    }

    /// Applies the result of a probe. `failure` is `None` for a success. A `verdict` decides
    /// alone.
    fn apply_probe_result(
        &mut self,
        id: BackendId,
        failure: Option<String>,
        verdict: bool,
        now: Instant,
    ) {
        let Some(entry) = self.backends.touch(id) else { return };
        let before = entry.health.observation();
        let Some(detector) = &mut entry.health.detector else { return };
        let change = match verdict {
            true => detector.decide(failure.is_none(), now),
            false => detector.observe(failure.is_none(), now),
        };
        entry.health.fails_open = false;
        let pool = entry.pool;
        self.decided(pool);
        if let Some(change) = change {
            self.observed(id, before, change, &failure.unwrap_or_default(), now);
        }
    }

    /// Applies a change of the probes' observation. `before` is the combined observation
    /// before it; `last` is the newest failure. Records a transition only if the combined
    /// observation has changed.
    fn observed(
        &mut self,
        id: BackendId,
        before: Observation,
        change: ProbeTransition,
        last: &str,
        now: Instant,
    ) {
        let Some(entry) = self.backends.touch(id) else { return };
        if change.to == Observation::Up {
            entry.health.outlier.restart_row();
        }
        let after = entry.health.observation();
        if before != after {
            let same = (before, after) == (change.from, change.to);
            let since = now.saturating_duration_since(entry.observed_since);
            let lasted = if same { change.lasted } else { since };
            entry.observed_since = now;
            let role = entry.health.seen_role().filter(|_| change.to == Observation::Up);
            let names = (before.name(), after.name());
            let mut evidence = evidence(change, last);
            if let Some(seen) = role {
                evidence.push_str(&format!(", role {}", seen.role.word()));
            }
            self.record(id, names, evidence, lasted, now);
        }
    }

    pub(super) fn note_local_error(&mut self, id: BackendId, reason: &str, now: Instant) {
        let Some(state) = self.backends.get(id).map(|entry| Arc::clone(&entry.state)) else {
            return;
        };
        if self.probes.local_error_is_due(now) {
            let fields = NoticeFields {
                reason: Some(reason.to_owned()),
                help: "correct what the reason names on this host",
                ..NoticeFields::default()
            };
            self.warn_of(&state, "probe not run because of a local error", fields);
        }
    }
}

/// Returns the evidence as text: `3 probes failed in a row, last: connection refused`.
fn evidence(change: ProbeTransition, last: &str) -> String {
    let many = |count: u32, what: &str| {
        if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
    };
    let probes = change.probes;
    match (change.from, change.to) {
        (Observation::Unknown, Observation::Up) => "first probe succeeded".to_owned(),
        (Observation::Unknown, _) => format!("first probe failed: {last}"),
        (_, Observation::Up) if probes == 1 => "1 probe succeeded".to_owned(),
        (_, Observation::Up) => format!("{probes} probes succeeded in a row"),
        _ => {
            let row = match (probes, change.connects) {
                (probes, 0) => many(probes, "probe"),
                (0, connects) => many(connects, "connect"),
                (probes, connects) => {
                    format!("{} and {}", many(probes, "probe"), many(connects, "connect"))
                }
            };
            if probes + change.connects == 1 {
                format!("{row} failed: {last}")
            } else {
                format!("{row} failed in a row, last: {last}")
            }
        }
    }
}
