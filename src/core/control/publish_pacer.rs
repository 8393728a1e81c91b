//! How often heartbeats may make new tables.
//!
//! The controller asks it at the end of each event. What heartbeats change
//! (who joins, who leaves, weights) may wait for its turn; what takes a broken
//! backend out, an operator's word or a reload never does, and takes along what
//! was waiting. It publishes nothing itself.

use super::schedule::TimerKind;
use super::{Controller, PoolId};
use crate::table::state::BackendId;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// From one table made for heartbeats to the next: ten a second. A table costs
/// milliseconds where a pool has thousands of backends, and a newcomer or a
/// weight can wait that long.
pub(super) const PACE: Duration = Duration::from_millis(100);

/// Why a table was made; a closed set, the label of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublishReason {
    /// A configuration was taken.
    Configuration,
    /// An operator said so.
    Operator,
    /// Somebody was found to be well or not, or was ejected or put back.
    Health,
    /// Somebody registered, left, or asked for another weight; or one that
    /// comes back takes its next step.
    Heartbeat,
}

/// What waits for the next table.
#[derive(Debug, Default)]
pub(super) struct PublishPacer {
    /// These have moved, and the table that is due says so.
    moved: BTreeSet<(PoolId, BackendId)>,
    /// No table for heartbeats before then.
    not_before: Option<Instant>,
    /// Tables so far, by [`PublishReason`].
    published: [u64; PublishReason::ALL.len()],
}

// === impl PublishReason ===

impl PublishReason {
    /// Every reason there is.
    pub const ALL: [PublishReason; 4] = [
        PublishReason::Configuration,
        PublishReason::Operator,
        PublishReason::Health,
        PublishReason::Heartbeat,
    ];

    /// As in metrics.
    pub fn name(self) -> &'static str {
        match self {
            PublishReason::Configuration => "configuration",
            PublishReason::Operator => "operator",
            PublishReason::Health => "health",
            PublishReason::Heartbeat => "heartbeat",
        }
    }
}

// === impl PublishPacer ===

impl PublishPacer {
    /// Tables so far for that reason.
    pub(super) fn published(&self, reason: PublishReason) -> u64 {
        self.published[reason as usize]
    }

    /// No table for heartbeats before then.
    pub(super) fn wait_until(&mut self, at: Instant) {
        self.not_before = Some(self.not_before.map_or(at, |before| before.max(at)));
    }

    /// A table was made of everything known, or is being made.
    fn done(&mut self, reason: PublishReason, made: bool, now: Instant) {
        self.published[reason as usize] += u64::from(made);
        self.moved.clear();
        if reason == PublishReason::Heartbeat {
            self.wait_until(now + PACE);
        }
    }
}

// === impl Controller ===

impl Controller {
    /// Why a table is due now, if one is. What has to wait is scheduled.
    pub(super) fn table_due(&mut self, now: Instant) -> Option<PublishReason> {
        let touched = self.backends.take_touched();
        let reason = self.work.rebuild.take();
        let mut health = false;
        for id in touched {
            let Some(pool) = self.moved(id) else {
                self.came_back(id);
                continue;
            };
            if self.may_wait(id) {
                self.backends.touch_later(id);
            } else {
                self.pace.moved.insert((pool, id));
                health = true;
            }
        }
        if reason.is_some() || health {
            return reason.or(self.work.cause).or(Some(PublishReason::Health));
        }
        if self.backends.waiting().is_empty() && self.pools.changed().is_empty() {
            return None;
        }
        if let Some(at) = self.pace.not_before
            && at > now
        {
            // Whether they have really moved is asked once, then.
            if !self.schedule.is_set(TimerKind::Publish) {
                self.schedule.set(TimerKind::Publish, at);
            }
            return None;
        }
        let mut waiting = self.backends.take_waiting();
        waiting.retain(|id| self.moved(*id).is_some());
        let due = !waiting.is_empty() || !self.pools.changed().is_empty();
        self.backends.wait_on(waiting);
        due.then_some(PublishReason::Heartbeat)
    }

    /// The pools of which the newest table is wrong, each with its backends that have
    /// moved.
    pub(super) fn wrong_pools(&self) -> BTreeMap<PoolId, BTreeSet<BackendId>> {
        let mut wrong: BTreeMap<PoolId, BTreeSet<BackendId>> =
            self.pools.changed().iter().map(|pool| (*pool, BTreeSet::new())).collect();
        let waiting = self.backends.waiting().iter().filter_map(|id| Some((self.moved(*id)?, *id)));
        for (pool, id) in self.pace.moved.iter().copied().chain(waiting) {
            wrong.entry(pool).or_default().insert(id);
        }
        wrong
    }

    /// Notes that a table was `made`, or that its parts are being made.
    pub(super) fn table_made(&mut self, reason: PublishReason, made: bool, now: Instant) {
        self.schedule.cancel(TimerKind::Publish);
        self.pace.done(reason, made, now);
        self.backends.take_waiting();
        self.pools.clear_changed();
    }
}
