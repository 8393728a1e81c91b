//! Sessions of backups that no longer serve, because a lower tier does again (`on_recover`).
//!
//! Called by the controller at the end of each event and for its timer. It closes sessions. It
//! never decides which tiers serve: `table::tiers` does.
//!
//! - A backup is *released* while a lower tier serves without it. With `backups = "one"`, so is a
//!   backup behind the one that serves.
//! - A lower tier whose eligible backends are all on trial releases none: its return is not
//!   certain yet.
//! - A session that is connecting gets its backend after the sessions were closed. So Tidegate
//!   closes them repeatedly, until every connect that began before has ended.

use super::backends::BackendEntry;
use super::on_down::REPEAT;
use super::pools::PoolId;
use super::publish::BackendTableState;
use super::schedule::{TimerKind, after};
use super::state::ControlState;
use crate::model::OnRecover;
use crate::outcome::Cause;
use crate::table::state::BackendId;
use crate::table::tiers::{TierMember, TierRules};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A backup that a lower tier has replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ReleasedBackup {
    /// Since when it no longer serves.
    since: Instant,
    /// When its sessions were first closed.
    closed: Option<Instant>,
}

// === impl BackendEntry ===

impl BackendEntry {
    /// Returns the time until its sessions are closed; `None` if they stay, or were closed.
    pub(super) fn released_for(&self, rule: OnRecover, now: Instant) -> Option<Duration> {
        let released = self.released.filter(|released| released.closed.is_none())?;
        Some(after(released.since, rule.grace()?).saturating_duration_since(now))
    }

    /// Returns since when it is released, for the next process.
    pub(super) fn released_since(&self) -> Option<Instant> {
        self.released.map(|released| released.since)
    }

    /// Takes over the state of another process.
    pub(super) fn adopt_released(&mut self, since: Option<Instant>) {
        self.released = since.map(|since| ReleasedBackup { since, closed: None });
    }
}

// === impl ControlState ===

impl ControlState {
    /// Applies `on_recover` to the pools that have changed; to all after a reload.
    pub(super) fn settle_released(&mut self, now: Instant) {
        let reloaded = self.pending.rebuild.is_some();
        if !self.pools.any_recovers() && !reloaded {
            return;
        }
        let pools: BTreeSet<PoolId> = match reloaded {
            true => self.pools.iter().map(|pool| pool.id).collect(),
            false => {
                let of_backend = |id: BackendId| Some(self.backends.get(id)?.pool);
                let touched = self.changed_backends().into_iter().filter_map(of_backend);
                touched.chain(self.pools.changed().iter().copied()).collect()
            }
        };
        for pool in pools {
            for (id, released) in self.released_of(pool) {
                self.settle_released_backend(id, released, now);
            }
        }
    }

    /// Returns the members of the pool, each with whether a lower tier has replaced it and the
    /// pool acts on it.
    fn released_of(&self, pool: PoolId) -> Vec<(BackendId, bool)> {
        let Some(pool) = self.pool(pool) else { return Vec::new() };
        let entries = || pool.members().iter().filter_map(|id| self.backends.get(*id));
        if pool.spec.on_recover == OnRecover::Keep {
            let before = entries().filter(|entry| entry.released.is_some());
            return before.map(|entry| (entry.state.id, false)).collect();
        }
        let members: Vec<TierMember> =
            entries().map(|entry| BackendTableState::of(entry, pool).tier_member()).collect();
        let released = TierRules::of(&pool.spec).released(&members);
        entries().map(|entry| entry.state.id).zip(released).collect()
    }

    fn settle_released_backend(&mut self, id: BackendId, released: bool, now: Instant) {
        let Some(grace) = self.on_recover_of(id) else { return };
        let Some(entry) = self.backends.observe(id) else { return };
        let before = entry.released;
        let Some(grace) = grace.filter(|_| released) else {
            entry.released = None;
            if before.is_some() {
                self.schedule.cancel(TimerKind::CloseReleased(id));
            }
            return;
        };
        let released = before.unwrap_or(ReleasedBackup { since: now, closed: None });
        entry.released = Some(released);
        if released.closed.is_some() {
            return;
        }
        let due = after(released.since, grace);
        self.schedule.set(TimerKind::CloseReleased(id), due);
        if due <= now {
            self.schedule.cancel(TimerKind::CloseReleased(id));
            self.close_released(id, now);
        }
    }

    fn on_recover_of(&self, id: BackendId) -> Option<Option<Duration>> {
        let entry = self.backends.get(id)?;
        Some(self.pool(entry.pool)?.spec.on_recover.grace())
    }

    /// Requests the end of the sessions, when the time of `on_recover` has passed.
    pub(super) fn close_released(&mut self, id: BackendId, now: Instant) {
        let Some(entry) = self.backends.observe(id) else { return };
        let Some(released) = &mut entry.released else { return };
        let first = released.closed.is_none();
        let since = *released.closed.get_or_insert(now);
        let state = Arc::clone(&entry.state);
        let Some(pool) = self.pools.get(entry.pool) else { return };
        let repeats = now < after(since, pool.spec.connect_timeout) + REPEAT;
        let message = first.then_some("sessions closed because of on_recover");
        self.request_end(&state, Cause::BackupReleased, message);
        if repeats {
            self.schedule.set(TimerKind::CloseReleased(id), now + REPEAT);
        }
    }
}
