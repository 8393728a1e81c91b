//! Backends that left the configuration and may still hold sessions.
//!
//! The controller moves them here on a reload, takes them back when they are
//! configured again, and forgets them once their last session has ended. They
//! are in no table and are not probed; status shows those with sessions.

use super::schedule::{Job, after};
use super::{BackendEntry, Controller, Effect, Leaving};
use crate::config::OnRemoval;
use crate::health::Transition;
use crate::table::state::BackendId;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often sessions of removed backends are counted. Also the least time one
/// is remembered: a session that was routed by the table before may still be
/// about to choose it.
pub(super) const LEAVING_CHECK_INTERVAL: Duration = Duration::from_secs(1);

// === impl Controller ===

impl Controller {
    /// Takes a backend out of service for good.
    pub(super) fn leave(&mut self, mut entry: BackendEntry, on_removal: OnRemoval, now: Instant) {
        let id = entry.state.id;
        self.schedule.cancel(Job::Probe(id));
        self.schedule.cancel(Job::ProbeLost(id));
        self.schedule.cancel(Job::EjectionEnds(id));
        if let Some(probe) = &mut entry.in_flight {
            probe.stale = true;
        }
        let cut_at = match on_removal {
            OnRemoval::Keep => None,
            OnRemoval::CloseAfter(grace) => Some(after(now, grace)),
        };
        if let Some(at) = cut_at {
            self.schedule.set(Job::CutSessions(id), at);
        }
        if !self.schedule.is_set(Job::LeavingCheck) {
            self.schedule.set(Job::LeavingCheck, now + LEAVING_CHECK_INTERVAL);
        }
        let transition = removal(&entry, on_removal, now);
        entry.last_transition = Some(transition.clone());
        self.work.effects.push(Effect::Log(transition));
        self.leaving.insert(id, Leaving { entry, cut_at });
    }

    /// Takes a removed backend back, with all that was known of it.
    pub(super) fn come_back(&mut self, id: BackendId, now: Instant) -> Option<BackendEntry> {
        let mut entry = self.leaving.remove(&id)?.entry;
        self.schedule.cancel(Job::CutSessions(id));
        match entry.health.outlier.until() {
            Some(until) if until > now => self.schedule.set(Job::EjectionEnds(id), until),
            _ => {
                entry.health.end_ejection(now);
            }
        }
        // Nobody listened to connect failures while it was away.
        entry.health.outlier.restart_row();
        Some(entry)
    }

    /// Its removal grace is over.
    pub(super) fn cut_sessions(&mut self, id: BackendId) {
        if let Some(leaving) = self.leaving.get(&id)
            && leaving.entry.state.in_flight.get() > 0
        {
            self.work.effects.push(Effect::CutSessions(id));
        }
    }

    /// Forgets removed backends without sessions; asks again for the cut of
    /// sessions that came in past it.
    pub(super) fn check_leaving(&mut self, now: Instant) {
        self.leaving.retain(|id, leaving| {
            let empty = leaving.entry.state.in_flight.get() == 0;
            if empty {
                self.schedule.cancel(Job::CutSessions(*id));
            } else if leaving.cut_at.is_some_and(|at| at < now)
                && !self.schedule.is_set(Job::CutSessions(*id))
            {
                self.work.effects.push(Effect::CutSessions(*id));
            }
            !empty
        });
        if !self.leaving.is_empty() {
            self.schedule.set(Job::LeavingCheck, now + LEAVING_CHECK_INTERVAL);
        }
    }
}

fn removal(entry: &BackendEntry, on_removal: OnRemoval, now: Instant) -> Transition {
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
        reason: format!("no longer configured; its {sessions} sessions {fate}"),
        at: now,
        lasted: now.saturating_duration_since(entry.health.settled_since()),
    }
}
