//! Removed backends that can still have sessions, and their operators' intents.
//!
//! The controller moves a backend here on a reload or when its heartbeats end. It restores
//! the backend if it is configured or heard again, and drops it after its last session.
//! Removed backends are not probed. They are in no table, except for stand-ins
//! (`settling`). `status` shows those with sessions.

use super::ControlEffect;
use super::ProbeToken;
use super::backends::BackendEntry;
use super::intents::RemovedIntents;
use super::schedule::{TimerKind, after};
use super::state::ControlState;
use crate::health::slow_detector::SlowDetector;
use crate::health::{Intent, Transition};
use crate::model;
use crate::model::{BackendAddr, OnRemoval};
use crate::outcome::Cause;
use crate::table::state::BackendId;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often the sessions of removed backends are counted. Also the shortest time that a
/// removed backend is kept, because a session with an older table can still pick it.
pub(super) const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Identity of a backend: pool, name, address.
pub(super) type BackendKey = (Arc<str>, Arc<str>, BackendAddr);

/// See the module documentation.
#[derive(Debug, Default)]
pub(super) struct RemovedBackends {
    entries: BTreeMap<BackendId, RemovedBackend>,
    by_key: HashMap<BackendKey, BackendId>,
    pub(super) intents: RemovedIntents,
}

/// A backend that is no longer configured.
#[derive(Debug)]
struct RemovedBackend {
    entry: BackendEntry,
    /// From this time on, its sessions are reset.
    reset_at: Option<Instant>,
}

// === impl RemovedBackends ===

impl RemovedBackends {
    pub(super) fn get(&self, id: BackendId) -> Option<&BackendEntry> {
        self.entries.get(&id).map(|removed| &removed.entry)
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Returns all removed backends, oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &BackendEntry> {
        self.entries.values().map(|removed| &removed.entry)
    }

    /// Returns the removed backend with this identity.
    pub(super) fn find(&self, key: &BackendKey) -> Option<BackendId> {
        self.by_key.get(key).copied()
    }

    /// Records that the probe of a removed backend has ended.
    pub(super) fn probed(&mut self, id: BackendId, token: ProbeToken) {
        if let Some(removed) = self.entries.get_mut(&id) {
            removed.entry.in_flight.take_if(|probe| probe.token == token);
        }
    }

    fn insert(&mut self, entry: BackendEntry, reset_at: Option<Instant>) {
        let id = entry.state.id;
        self.by_key.insert(key_of(&entry), id);
        self.entries.insert(id, RemovedBackend { entry, reset_at });
    }

    fn take(&mut self, id: BackendId) -> Option<BackendEntry> {
        let entry = self.entries.remove(&id)?.entry;
        self.by_key.remove(&key_of(&entry));
        Some(entry)
    }
}

// === impl ControlState ===

impl ControlState {
    /// Removes a backend and records the transition with `reason`.
    pub(super) fn remove_backend(
        &mut self,
        mut entry: BackendEntry,
        reason: &str,
        on_removal: OnRemoval,
        now: Instant,
    ) {
        let id = entry.state.id;
        self.schedule.cancel(TimerKind::Heartbeat(id));
        self.schedule.cancel(TimerKind::HeartbeatTtl(id));
        self.schedule.cancel(TimerKind::Forget(id));
        self.schedule.cancel(TimerKind::Ramp(id));
        self.schedule.cancel(TimerKind::CutSessions(id));
        self.schedule.cancel(TimerKind::CloseReleased(id));
        (entry.sessions_leave, entry.released) = (None, None);
        entry.confirmation = None;
        self.end_verification(&mut entry);
        (entry.ramp, entry.ramp_share, entry.served) = (None, 100, false);
        self.schedule.cancel(TimerKind::Probe(id));
        self.schedule.cancel(TimerKind::ProbeLost(id));
        self.schedule.cancel(TimerKind::EjectionEnds(id));
        self.forget_trial(&mut entry, now);
        entry.health.slow = SlowDetector::default();
        self.ejections.clear_suspect(&entry);
        if let Some(probe) = &mut entry.in_flight {
            probe.stale = true;
        }
        let transition = removal(&entry, reason, on_removal, now);
        entry.history.add(transition.clone());
        self.pending.effects.push(ControlEffect::Log(transition));
        let wanted = (entry.health.intent, entry.health.intent_since);
        self.removed.intents.keep(entry.state.identity(), wanted, now);
        self.keep_removed(entry, on_removal, now);
    }

    /// Keeps an unconfigured backend until its last session has ended.
    pub(super) fn keep_removed(
        &mut self,
        entry: BackendEntry,
        on_removal: OnRemoval,
        now: Instant,
    ) {
        let reset_at = match on_removal {
            OnRemoval::Keep => None,
            OnRemoval::CloseAfter(grace) => Some(after(now, grace)),
        };
        if let Some(at) = reset_at {
            self.schedule.set(TimerKind::ResetSessions(entry.state.id), at);
        }
        if !self.schedule.is_set(TimerKind::CheckRemoved) {
            self.schedule.set(TimerKind::CheckRemoved, now + CHECK_INTERVAL);
        }
        self.removed.insert(entry, reset_at);
    }

    /// Returns the removed backend with this pool, name and address.
    pub(super) fn removed_as(
        &self,
        pool: &Arc<str>,
        spec: &model::BackendConfig,
    ) -> Option<BackendId> {
        self.removed.find(&(Arc::clone(pool), Arc::clone(&spec.name), spec.address.clone()))
    }

    /// Restores the operator's intent for a backend that joins again. It is kept for
    /// [`REMOVED_INTENTS_FOR`](super::REMOVED_INTENTS_FOR) after the removal.
    pub(super) fn take_intent(&mut self, entry: &mut BackendEntry, now: Instant) {
        if let Some((intent, since)) = self.removed.intents.take(&entry.state.identity(), now)
            && entry.health.intent == Intent::Ready
        {
            entry.health.intent = intent;
            entry.health.intent_since = since;
        }
        self.take_group_intent(entry);
    }

    /// Restores a removed backend with its state.
    pub(super) fn restore_backend(&mut self, id: BackendId, now: Instant) -> Option<BackendEntry> {
        let mut entry = self.removed.take(id)?;
        self.schedule.cancel(TimerKind::ResetSessions(id));
        match entry.health.outlier.until() {
            Some(until) if until > now => self.schedule.set(TimerKind::EjectionEnds(id), until),
            _ => {
                entry.health.end_ejection(now);
            }
        }
        // Connect failures were not recorded while the backend was removed.
        entry.health.outlier.restart_row();
        Some(entry)
    }

    /// Requests a reset of the sessions, at the end of the removal grace.
    pub(super) fn reset_sessions(&mut self, id: BackendId) {
        self.drop_stand_in(id);
        if self.removed.get(id).is_some_and(|entry| entry.state.in_flight.get() > 0) {
            self.pending.effects.push(ControlEffect::ResetSessions(id, Cause::BackendRemoved));
        }
    }

    /// Drops removed backends without sessions. Requests another reset if sessions were
    /// opened after the first.
    pub(super) fn check_removed(&mut self, now: Instant) {
        let stand_ins = self.stand_ins();
        let mut over = Vec::new();
        for (id, removed) in &self.removed.entries {
            let reset = TimerKind::ResetSessions(*id);
            if removed.entry.state.in_flight.get() == 0 && !stand_ins.contains(id) {
                over.push(*id);
                self.schedule.cancel(reset);
            } else if removed.reset_at.is_some_and(|at| at < now) && !self.schedule.is_set(reset) {
                let cause = Cause::BackendRemoved;
                self.pending.effects.push(ControlEffect::ResetSessions(*id, cause));
            }
        }
        for id in over {
            if let Some(entry) = self.removed.take(id) {
                self.removed_names.keep_backend(&entry);
            }
        }
        if self.removed.len() > 0 {
            self.schedule.set(TimerKind::CheckRemoved, now + CHECK_INTERVAL);
        }
    }

    /// Returns the former backends in rotation.
    fn stand_ins(&self) -> BTreeSet<BackendId> {
        let settling = self.pools.iter().filter_map(|pool| pool.settling());
        settling.flat_map(|settling| settling.stand_ins.iter().copied()).collect()
    }
}

fn key_of(entry: &BackendEntry) -> BackendKey {
    let state = &entry.state;
    (Arc::clone(&state.pool), Arc::clone(&state.name), state.address.clone())
}

fn removal(entry: &BackendEntry, reason: &str, on_removal: OnRemoval, now: Instant) -> Transition {
    let sessions = entry.state.in_flight.get();
    let fate = match on_removal {
        OnRemoval::Keep => "finish normally".to_owned(),
        OnRemoval::CloseAfter(grace) => {
            format!("reset after {}", humantime::format_duration(grace))
        }
    };
    let from = if entry.health.outlier.is_ejected() {
        "ejected"
    } else {
        entry.health.observation().name()
    };
    Transition {
        pool: Arc::clone(&entry.state.pool),
        backend: Arc::clone(&entry.state.name),
        from,
        to: "removed",
        reason: format!("{reason}; open sessions: {sessions} ({fate})"),
        at: now,
        lasted: now.saturating_duration_since(entry.health.settled_since()),
    }
}
