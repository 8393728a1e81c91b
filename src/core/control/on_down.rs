//! Sessions of backends that are down, or have lost the role that their pool needs (`on_down`).
//!
//! Called by the controller at the end of each event and for its timer. It resets sessions. It
//! never decides which backends are down.
//!
//! - Probes, heartbeats and roles count. An ejected or drained backend keeps its sessions.
//! - A session that is connecting gets its backend after the reset. So the reset is repeated
//!   until every connect that began before it has ended. Pools with `try-all` give sessions to
//!   backends that are down, so their sessions are reset once.

use super::backends::BackendEntry;
use super::schedule::{TimerKind, after};
use super::state::ControlState;
use super::{ControlEffect, Notice, NoticeFields, NoticeLevel};
use crate::health::Observation;
use crate::model::{OnDown, WhenNoneEligible};
use crate::outcome::Cause;
use crate::table::state::{BackendId, BackendState};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time between two orders to end the sessions of one backend.
pub(super) const REPEAT: Duration = Duration::from_secs(1);

/// A backend that its sessions leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SessionsLeave {
    /// When the backend went down or lost its role.
    since: Instant,
    /// When its sessions were first reset.
    cut: Option<Instant>,
}

// === impl BackendEntry ===

impl BackendEntry {
    /// Returns since when its sessions must leave; `None`: they can stay.
    fn leaves_since(&self, now: Instant) -> Option<Instant> {
        let health = &self.health;
        if health.observation() == Observation::Down {
            return Some(self.observed_since);
        }
        let seen = health.seen_role()?;
        // An outranked primary has kept its role, and another one is in force from now on.
        let since = if health.role.outranked { now } else { seen.since };
        (!health.has_role()).then_some(since)
    }
}

// === impl ControlState ===

impl ControlState {
    /// Applies `on_down` to the backends that have changed; to all after a reload.
    pub(super) fn settle_sessions(&mut self, now: Instant) {
        let reloaded = self.pending.rebuild.is_some();
        if !self.pools.any_leaves() && !reloaded {
            return;
        }
        let ids: Vec<BackendId> = match reloaded {
            true => self.backends.iter().map(|entry| entry.state.id).collect(),
            false => self.changed_backends().into_iter().collect(),
        };
        ids.into_iter().for_each(|id| self.settle_sessions_of(id, now));
    }

    fn settle_sessions_of(&mut self, id: BackendId, now: Instant) {
        let Some((rule, since)) = self.on_down_of(id, now) else { return };
        let Some(entry) = self.backends.observe(id) else { return };
        let before = entry.sessions_leave;
        let (Some(since), Some(grace)) = (since, rule.grace()) else {
            entry.sessions_leave = None;
            if before.is_some() {
                self.schedule.cancel(TimerKind::CutSessions(id));
            }
            return;
        };
        let leave = before.unwrap_or(SessionsLeave { since, cut: None });
        entry.sessions_leave = Some(leave);
        if leave.cut.is_some() {
            return;
        }
        let due = after(leave.since, grace);
        self.schedule.set(TimerKind::CutSessions(id), due);
        if due <= now {
            self.schedule.cancel(TimerKind::CutSessions(id));
            self.cut_sessions(id, now);
        }
    }

    fn on_down_of(&self, id: BackendId, now: Instant) -> Option<(OnDown, Option<Instant>)> {
        let entry = self.backends.get(id)?;
        Some((self.pool(entry.pool)?.spec.on_down, entry.leaves_since(now)))
    }

    /// Requests a reset of the sessions, at the end of the time of `on_down`.
    pub(super) fn cut_sessions(&mut self, id: BackendId, now: Instant) {
        let Some(entry) = self.backends.observe(id) else { return };
        let Some(leave) = &mut entry.sessions_leave else { return };
        let first = leave.cut.is_none();
        let since = *leave.cut.get_or_insert(now);
        let state = Arc::clone(&entry.state);
        let Some(pool) = self.pools.get(entry.pool) else { return };
        let until = after(since, pool.spec.connect_timeout) + REPEAT;
        let repeats = now < until && pool.spec.when_none_eligible != WhenNoneEligible::TryAll;
        let message = first.then_some("sessions reset because of on_down");
        self.request_end(&state, Cause::BackendDown, message);
        if repeats {
            self.schedule.set(TimerKind::CutSessions(id), now + REPEAT);
        }
    }

    /// Requests the end of the open sessions of a backend, if it has any. `message` is logged with
    /// their number.
    pub(super) fn request_end(
        &mut self,
        state: &BackendState,
        cause: Cause,
        message: Option<&'static str>,
    ) {
        let open = state.in_flight.get();
        if open == 0 {
            return;
        }
        self.pending.effects.push(ControlEffect::ResetSessions(state.id, cause));
        if let Some(message) = message {
            let reason = Some(format!("open sessions: {open}"));
            let fields = NoticeFields { reason, ..NoticeFields::default() };
            let (pool, backend) = (Arc::clone(&state.pool), Some(Arc::clone(&state.name)));
            let notice = Notice { level: NoticeLevel::Info, pool, backend, message, fields };
            self.pending.effects.push(ControlEffect::Notice(Box::new(notice)));
        }
    }
}
