//! Passive ejection, and the guard of each pool over it.
//!
//! Called by the controller for rows of failures, and after every change that can leave a
//! pool with too few backends. Only failed connects and early resets cause an ejection.
//!
//! Guard: at most `max_ejected` percent of a pool's backends, rounded down, are ejected or
//! on trial at a time. An ejection never removes the last eligible backend of a pool.

use super::NoticeFields;
use super::backends::BackendEntry;
use super::pools::{PoolEntry, PoolId};
use super::schedule::TimerKind;
use super::state::ControlState;
use crate::health::ConnectFailure;
use crate::model::EjectionSpec;
use crate::table::state::BackendId;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Ejected and suspect backends by pool. Without the index, counting them would need a scan
/// of all backends of a pool, which costs milliseconds.
#[derive(Debug, Default)]
pub(super) struct EjectionIndex {
    /// All backends that are ejected or on trial. Can contain backends that no longer are.
    ejected: BTreeSet<(PoolId, BackendId)>,
    /// All suspect backends. Can contain backends that no longer are.
    suspects: BTreeSet<(PoolId, BackendId)>,
}

/// The counts of a pool that its guard needs.
pub(super) struct EjectionGuard {
    /// Ejected backends.
    ejected: Vec<BackendId>,
    /// Number of backends on trial.
    on_trial: usize,
    /// Number of eligible backends that are slow or hang.
    suspect: usize,
    /// Number of backends that may be ejected at a time.
    ejected_max: usize,
    /// Number of eligible backends that are not on trial; counted up to 2.
    eligible: usize,
    /// Number of backends in the pool.
    backends: usize,
}

/// Returns how many of `backends` may be ejected at a time.
pub(super) fn ejected_max(percent: u8, backends: usize) -> usize {
    backends.saturating_mul(usize::from(percent.min(100))) / 100
}

// === impl EjectionGuard ===

impl EjectionGuard {
    /// Returns why no backend may be ejected now, as a clause for the log and `explain`; `None`
    /// if one may.
    pub(super) fn reason(&self, percent: u8) -> Option<String> {
        if self.eligible <= 1 {
            return Some("it is the last eligible backend of the pool".to_owned());
        }
        let (max, all) = (self.ejected_max, self.backends);
        if max == 0 {
            let none = format!("max_ejected = {percent}% allows none of {all} backends");
            return Some(none + " to be removed");
        }
        let out = self.ejected.len() + self.on_trial;
        (out >= max).then(|| {
            let are = if out == 1 { "is" } else { "are" };
            format!(
                "max_ejected = {percent}% allows {max} of {all} backends to be removed, and \
                 {out} already {are}"
            )
        })
    }

    /// Whether at least one eligible backend is not on trial.
    pub(super) fn has_others(&self) -> bool {
        self.eligible > 0
    }

    /// Whether a backend on trial may be ejected again.
    pub(super) fn allows_again(&self) -> bool {
        self.has_others() && self.ejected.len() + self.on_trial <= self.ejected_max
    }

    /// Whether another backend may become suspect. The other backends take over its
    /// sessions, as after an ejection.
    pub(super) fn allows_suspect(&self) -> bool {
        let out = self.ejected.len() + self.on_trial + self.suspect;
        self.eligible > 1 && out < self.ejected_max.max(1)
    }
}

// === impl ControlState ===

impl ControlState {
    /// Ejects the backend if its row of failures is long enough and the guard allows it.
    pub(super) fn consider_ejection(
        &mut self,
        id: BackendId,
        failure: ConnectFailure,
        in_a_row: u32,
        now: Instant,
    ) {
        let Some(entry) = self.backends.observe(id) else { return };
        let Some(pool) = self.pools.get(entry.pool) else { return };
        let Some(spec) = pool.spec.ejection else { return };
        let Some(row) = entry.health.outlier.failed(in_a_row, &spec) else { return };
        if !entry.health.eligible() {
            return;
        }
        let objection = self.guard_view(pool).reason(spec.max_ejected_percent);
        let Some(entry) = self.backends.observe(id) else { return };
        let what = if failure == ConnectFailure::EarlyReset { "session" } else { "connect" };
        let evidence = match row {
            1 => format!("1 {what} failed: {failure}"),
            _ => format!("{row} {what}s failed in a row, last: {failure}"),
        };
        if let Some(objection) = objection {
            if entry.health.outlier.hold_back() {
                let state = Arc::clone(&entry.state);
                let fields = NoticeFields {
                    reason: Some(objection),
                    evidence: Some(evidence),
                    help: "repair the backend; to let the pool eject more, add backends or raise \
                           max_ejected",
                    ..NoticeFields::default()
                };
                self.warn_of(&state, "ejection prevented; backend stays in rotation", fields);
            }
            return;
        }
        let from = entry.health.observation().name();
        let lasted = now.saturating_duration_since(entry.health.settled_since());
        self.eject(id, &spec, (from, &evidence), lasted, now);
    }

    /// Ejects the backend without asking the guard. `from` is its state before, which has
    /// `lasted` that long.
    pub(super) fn eject(
        &mut self,
        id: BackendId,
        spec: &EjectionSpec,
        (from, evidence): (&'static str, &str),
        lasted: Duration,
        now: Instant,
    ) {
        let Some(entry) = self.backends.touch(id) else { return };
        let until = entry.health.outlier.eject(spec, now);
        let reason = format!(
            "{evidence}; ejected for {} (ejection {} in a row)",
            humantime::format_duration(until - now),
            entry.health.outlier.repeats()
        );
        self.ejections.note(entry);
        self.schedule.set(TimerKind::EjectionEnds(id), until);
        self.record(id, (from, "ejected"), reason, lasted, now);
    }

    /// Ends an ejection without a trial.
    pub(super) fn end_ejection(&mut self, id: BackendId, reason: &str, now: Instant) {
        self.schedule.cancel(TimerKind::EjectionEnds(id));
        let Some(entry) = self.backends.touch(id) else { return };
        let Some(lasted) = entry.health.end_ejection(now) else { return };
        entry.state.in_flight.end_trial();
        let to = entry.health.observation().name();
        self.record(id, ("ejected", to), format!("ejection ended: {reason}"), lasted, now);
    }

    /// Ends ejections that the guard would not allow now, because the pool has fewer
    /// backends, other settings, or no other eligible backend. Begins with the ejections
    /// that are due first.
    pub(super) fn recheck_ejections(&mut self, pool: PoolId, now: Instant) {
        if !self.has_out(pool) {
            return;
        }
        self.end_unneeded_trials(pool, now);
        let Some(pool) = self.pool(pool) else { return };
        let mut view = self.guard_view(pool);
        if view.ejected.is_empty() {
            return;
        }
        view.ejected.sort_by_key(|id| {
            (self.backends.get(*id).and_then(|entry| entry.health.outlier.until()), *id)
        });
        let off = pool.spec.ejection.is_none();
        let surplus = view.ejected.len().saturating_sub(view.ejected_max);
        let last_resort = (view.eligible == 0)
            .then(|| {
                let useful = |id: &&BackendId| {
                    self.backends
                        .get(**id)
                        .is_some_and(|entry| entry.health.eligible_but_for_ejection())
                };
                view.ejected.iter().find(useful).copied()
            })
            .flatten();
        for (index, id) in view.ejected.into_iter().enumerate() {
            if off {
                self.end_ejection(id, "ejection was disabled in the configuration", now);
            } else if index < surplus {
                self.end_ejection(id, "more backends are ejected than max_ejected allows", now);
            } else if last_resort == Some(id) {
                self.end_ejection(id, "no other backend in the pool is eligible", now);
            }
        }
    }

    /// Whether a backend of the pool is ejected or on trial. Removes outdated entries from
    /// the index.
    fn has_out(&mut self, pool: PoolId) -> bool {
        let noted: Vec<BackendId> = noted(&self.ejections.ejected, pool).collect();
        let mut any = false;
        for id in noted {
            let entry = self.backends.get(id).filter(|entry| entry.pool == pool);
            if entry.is_some_and(|entry| !entry.health.outlier.counts_failures()) {
                any = true;
            } else {
                self.ejections.ejected.remove(&(pool, id));
            }
        }
        any
    }

    pub(super) fn guard_view(&self, pool: &PoolEntry) -> EjectionGuard {
        let members = pool.members().iter().filter_map(|id| self.backends.get(*id));
        let percent = pool.spec.ejection.map_or(0, |spec| spec.max_ejected_percent);
        let out = || self.out_of_service(pool.id).map(|entry| (entry, &entry.health.outlier));
        let ejected = out().filter(|(_, outlier)| outlier.is_ejected());
        let suspect = self.of_pool(&self.ejections.suspects, pool.id).map(|entry| &entry.health);
        EjectionGuard {
            ejected: ejected.map(|(entry, _)| entry.state.id).collect(),
            on_trial: out().filter(|(_, outlier)| outlier.is_on_trial()).count(),
            suspect: suspect.filter(|it| it.slow.is_suspect() && it.is_fully_eligible()).count(),
            ejected_max: ejected_max(percent, pool.members().len()),
            // Up to 2, because counting all would cost milliseconds.
            eligible: members.filter(|entry| entry.health.is_fully_eligible()).take(2).count(),
            backends: pool.members().len(),
        }
    }

    /// Returns the pool's backends that are or were ejected or on trial.
    pub(super) fn out_of_service(&self, pool: PoolId) -> impl Iterator<Item = &BackendEntry> {
        self.of_pool(&self.ejections.ejected, pool)
    }

    /// Returns the indexed backends of a pool.
    fn of_pool<'a>(
        &'a self,
        of: &'a BTreeSet<(PoolId, BackendId)>,
        pool: PoolId,
    ) -> impl Iterator<Item = &'a BackendEntry> {
        let entries = noted(of, pool).filter_map(|id| self.backends.get(id));
        entries.filter(move |entry| entry.pool == pool)
    }
}

// === impl EjectionIndex ===

impl EjectionIndex {
    /// Indexes the backend if it is ejected, on trial or suspect.
    pub(super) fn note(&mut self, entry: &BackendEntry) {
        let key = (entry.pool, entry.state.id);
        if !entry.health.outlier.counts_failures() {
            self.ejected.insert(key);
        }
        if entry.health.slow.is_suspect() {
            self.suspects.insert(key);
        }
    }

    /// Removes the backend from the suspects.
    pub(super) fn clear_suspect(&mut self, entry: &BackendEntry) {
        self.suspects.remove(&(entry.pool, entry.state.id));
    }

    /// Returns the ejected backends of all pools.
    pub(super) fn ejected(&self) -> impl Iterator<Item = (PoolId, BackendId)> {
        self.ejected.iter().copied()
    }
}

fn noted(
    of: &BTreeSet<(PoolId, BackendId)>,
    pool: PoolId,
) -> impl Iterator<Item = BackendId> + use<'_> {
    of.range((pool, BackendId(0))..=(pool, BackendId(u32::MAX))).map(|(_, id)| *id)
}
