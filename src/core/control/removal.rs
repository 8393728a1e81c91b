//! Backends that left the configuration and may still hold sessions.
//!
//! The controller moves them here on a reload or when their heartbeats end,
//! takes them back when they are configured or heard again, and forgets them once their last session has ended. They
//! are not probed, and in no table but for those that stand in (`settling`); status shows those with sessions.

use super::configure::BackendKey;
use super::schedule::{TimerKind, after};
use super::{BackendEntry, ControlEffect, Controller, RemovedBackend};
use crate::health::slow_detector::SlowDetector;
use crate::health::{Intent, Transition};
use crate::model;
use crate::model::OnRemoval;
use crate::table::state::BackendId;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often sessions of removed backends are counted. Also the least time one
/// is remembered: a session that was routed by the table before may still be
/// about to choose it.
pub(super) const LEAVING_CHECK_INTERVAL: Duration = Duration::from_secs(1);

// === impl Controller ===

impl Controller {
    /// Takes a backend out of service for good, for a reason in words.
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
        self.tallies.forget(id, entry.heart.take().as_deref_mut());
        entry.trying = None;
        (entry.ramp, entry.ramp_share, entry.served) = (None, 100, false);
        self.schedule.cancel(TimerKind::Probe(id));
        self.schedule.cancel(TimerKind::ProbeLost(id));
        self.schedule.cancel(TimerKind::EjectionEnds(id));
        self.forget_trial(&mut entry, now);
        entry.health.gray = SlowDetector::default();
        self.suspects.remove(&(entry.pool, id));
        if let Some(probe) = &mut entry.in_flight {
            probe.stale = true;
        }
        let cut_at = match on_removal {
            OnRemoval::Keep => None,
            OnRemoval::CloseAfter(grace) => Some(after(now, grace)),
        };
        if let Some(at) = cut_at {
            self.schedule.set(TimerKind::CutSessions(id), at);
        }
        self.watch_leaving(now);
        let transition = removal(&entry, reason, on_removal, now);
        entry.history.add(transition.clone());
        self.work.effects.push(ControlEffect::Log(transition));
        let wanted = (entry.health.intent, entry.health.intent_since);
        self.kept.keep(entry.state.identity(), wanted, now);
        self.left.insert(identity(&entry), id);
        self.leaving.insert(id, RemovedBackend { entry, cut_at });
    }

    /// Has those that left counted from now on.
    pub(super) fn watch_leaving(&mut self, now: Instant) {
        if !self.schedule.is_set(TimerKind::LeavingCheck) {
            self.schedule.set(TimerKind::LeavingCheck, now + LEAVING_CHECK_INTERVAL);
        }
    }

    /// Whether it is configured, or has left and sessions are on it yet.
    pub fn is_known(&self, id: BackendId) -> bool {
        self.backends.contains(id) || self.leaving.contains_key(&id)
    }

    /// Every backend that is known in that way.
    pub fn all_known(&self) -> impl Iterator<Item = BackendId> {
        self.backends.iter().map(|entry| entry.state.id).chain(self.leaving.keys().copied())
    }

    /// How many backends there have been so far; goes around at 2^32.
    pub fn backends_seen(&self) -> u32 {
        self.ids.backend
    }

    /// The removed backend that is the very one of that pool and spec.
    pub(super) fn leaving_as(
        &self,
        pool: &Arc<str>,
        spec: &model::BackendConfig,
    ) -> Option<BackendId> {
        self.left.get(&(Arc::clone(pool), Arc::clone(&spec.name), spec.address.clone())).copied()
    }

    /// Takes up what an operator wanted of the backend before it left, where its
    /// sessions or [`KEPT_FOR`](super::KEPT_FOR) have not ended since.
    pub(super) fn take_intent(&mut self, entry: &mut BackendEntry, now: Instant) {
        if let Some((intent, since)) = self.kept.take(&entry.state.identity(), now)
            && entry.health.intent == Intent::Ready
        {
            entry.health.intent = intent;
            entry.health.intent_since = since;
        }
    }

    /// Takes a removed backend back, with all that was known of it.
    pub(super) fn restore_backend(&mut self, id: BackendId, now: Instant) -> Option<BackendEntry> {
        let mut entry = self.leaving.remove(&id)?.entry;
        self.left.remove(&identity(&entry));
        self.schedule.cancel(TimerKind::CutSessions(id));
        match entry.health.outlier.until() {
            Some(until) if until > now => self.schedule.set(TimerKind::EjectionEnds(id), until),
            _ => {
                entry.health.end_ejection(now);
            }
        }
        // Nobody listened to connect failures while it was away.
        entry.health.outlier.restart_row();
        Some(entry)
    }

    /// Its removal grace is over.
    pub(super) fn reset_sessions(&mut self, id: BackendId) {
        self.stands_in_no_more(id);
        if let Some(leaving) = self.leaving.get(&id)
            && leaving.entry.state.in_flight.get() > 0
        {
            self.work.effects.push(ControlEffect::ResetSessions(id));
        }
    }

    /// Forgets removed backends without sessions; asks again for the cut of
    /// sessions that came in past it.
    pub(super) fn check_leaving(&mut self, now: Instant) {
        let stand_ins = self.stand_ins();
        self.leaving.retain(|id, leaving| {
            let empty = leaving.entry.state.in_flight.get() == 0 && !stand_ins.contains(id);
            if empty {
                self.schedule.cancel(TimerKind::CutSessions(*id));
                self.left.remove(&identity(&leaving.entry));
            } else if leaving.cut_at.is_some_and(|at| at < now)
                && !self.schedule.is_set(TimerKind::CutSessions(*id))
            {
                self.work.effects.push(ControlEffect::ResetSessions(*id));
            }
            !empty
        });
        if !self.leaving.is_empty() {
            self.schedule.set(TimerKind::LeavingCheck, now + LEAVING_CHECK_INTERVAL);
        }
    }
}

pub(super) fn identity(entry: &BackendEntry) -> BackendKey {
    let state = &entry.state;
    (Arc::clone(&state.pool), Arc::clone(&state.name), state.address.clone())
}

fn removal(entry: &BackendEntry, reason: &str, on_removal: OnRemoval, now: Instant) -> Transition {
    let sessions = entry.state.in_flight.get();
    let fate = match on_removal {
        OnRemoval::Keep => "run to their end".to_owned(),
        OnRemoval::CloseAfter(grace) => {
            format!("are reset after {}", humantime::format_duration(grace))
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
        reason: format!("{reason}; its {sessions} sessions {fate}"),
        at: now,
        lasted: now.saturating_duration_since(entry.health.settled_since()),
    }
}
