//! What results mean: probes, failed sessions, and no result at all.
//!
//! Called by the controller for its events. It changes observations and hands
//! rows of failed connects on to `ejections`; it never schedules anything but
//! the next probe.

use super::ProbeToken;
use super::pools::{PoolId, StartupGrace};
use super::schedule::TimerKind;
use super::state::ControlState;
use crate::health::probe_detector::ProbeTransition;
use crate::health::{ConnectFailure, Observation, ProbeOutcome};
use crate::table::state::BackendId;
use std::sync::Arc;
use std::time::Instant;

// === impl ControlState ===

impl ControlState {
    /// A probe ended. A result that nobody waits for any more (of a removed
    /// backend, a replaced spec, a probe given up as lost) is ignored.
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
        match outcome {
            ProbeOutcome::Success { took } => {
                if let Some(heartbeats) = &mut entry.heartbeats {
                    heartbeats.detector.note_connect_success(took);
                }
                self.apply_probe_result(id, None, now);
            }
            ProbeOutcome::Failure { reason } => self.apply_probe_result(id, Some(reason), now),
            ProbeOutcome::Local { reason } => self.note_local_error(id, &reason, now),
        }
        self.schedule_next_probe(id, probe.started, now);
    }

    /// A session could not connect: counts as a failed probe where there are
    /// probes, and towards ejection. An early reset counts towards ejection
    /// alone: what a probe asks may well be answered, and the backend would be
    /// up again at once.
    ///
    /// During an ejection only stragglers report, and they say nothing new; a
    /// trial is decided by its own session. True if the failure counts.
    pub(super) fn connect_failed(
        &mut self,
        id: BackendId,
        failure: ConnectFailure,
        (in_a_row, begun): (u32, Instant),
        now: Instant,
    ) -> bool {
        let Some(entry) = self.backends.observe(id) else {
            if failure != ConnectFailure::EarlyReset {
                self.stands_in_no_more(id);
            }
            return false;
        };
        entry.health.recent.note(failure, now);
        // A connect whose SYN was lost before the backend came back fails late.
        if !entry.health.outlier.counts_failures() || begun < entry.health.settled_since() {
            return false;
        }
        let before = entry.health.observation();
        if let Some(detector) = &mut entry.health.detector {
            if failure != ConnectFailure::EarlyReset
                && let Some(change) = detector.connect_failed(in_a_row, now)
            {
                self.observed(id, before, change, &failure.to_string(), now);
            }
            self.bring_probe_forward(id, now);
        }
        true
    }

    /// `startup_grace` is over: unless there was a result, the pool does
    /// without.
    pub(super) fn grace_over(&mut self, pool: PoolId) {
        let Some(pool) = self.pools.observe(pool) else { return };
        if !matches!(pool.startup, StartupGrace::Waiting { .. }) {
            return;
        }
        pool.startup = StartupGrace::FailingOpen;
        let grace = humantime::format_duration(pool.spec.startup_grace);
        let message = format!(
            "no probe result within startup_grace ({grace}); failing open: \
             each backend stays in rotation until its own first result"
        );
        let name = Arc::clone(&pool.spec.name);
        let members = pool.members().to_vec();
        for id in members {
            if let Some(entry) = self.backends.touch(id) {
                entry.health.fails_open = true;
            }
        }
        self.warn(name, message);
    }

    /// One probe's result; `failure` is `None` for a success.
    fn apply_probe_result(&mut self, id: BackendId, failure: Option<String>, now: Instant) {
        let Some(entry) = self.backends.touch(id) else { return };
        let before = entry.health.observation();
        let Some(detector) = &mut entry.health.detector else { return };
        let change = detector.observe(failure.is_none(), now);
        entry.health.fails_open = false;
        if let Some(pool) = self.pools.observe(entry.pool) {
            pool.startup = StartupGrace::Decided;
            self.schedule.cancel(TimerKind::GraceEnds(pool.id));
        }
        if let Some(change) = change {
            self.observed(id, before, change, &failure.unwrap_or_default(), now);
        }
    }

    /// The probes' verdict on a backend changed; `before` is what it counted as
    /// by then, `last` the newest failure. Heartbeats may make the same of it
    /// all the while: then nothing is recorded.
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
            let names = (before.name(), after.name());
            self.record(id, names, evidence(change, last), lasted, now);
        }
    }

    pub(super) fn note_local_error(&mut self, id: BackendId, reason: &str, now: Instant) {
        let Some(state) = self.backends.get(id).map(|entry| Arc::clone(&entry.state)) else {
            return;
        };
        if self.probes.mentions_local_error(now) {
            self.warn_of(&state, format!("probe not run: local error: {reason}"));
        }
    }
}

/// The evidence in words, such as `3 probes failed in a row, last: connection
/// refused`.
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
