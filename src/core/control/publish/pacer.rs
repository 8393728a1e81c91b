//! How often heartbeats may make new tables.
//!
//! The controller asks it at the end of each event. What heartbeats change
//! (who joins, who leaves, weights) may wait for its turn; what takes a broken
//! backend out, an operator's word or a reload never does, and takes along what
//! was waiting. It publishes nothing itself.

use super::Publisher;
use crate::control::pools::PoolId;
use crate::control::schedule::TimerKind;
use crate::control::state::ControlState;
use crate::table::state::BackendId;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// From one table made for heartbeats to the next: ten a second. A table costs
/// milliseconds where a pool has thousands of backends, and a newcomer or a
/// weight can wait that long.
pub(in crate::control) const PACE: Duration = Duration::from_millis(100);

/// Why a table was made; a closed set, the label of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublishReason {
    /// A configuration was taken.
    Configuration,
    /// An operator said so.
    Operator,
    /// Somebody was found to be well or not, or was ejected or put back.
    Health,
    /// Members joined, left or asked for another weight, or a slow start took its next
    /// step.
    Heartbeat,
}

/// What waits for the next table.
#[derive(Debug, Default)]
pub(in crate::control) struct PublishPacer {
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
    pub(in crate::control) fn published(&self, reason: PublishReason) -> u64 {
        self.published[reason as usize]
    }

    /// No table for heartbeats before then.
    pub(in crate::control) fn wait_until(&mut self, at: Instant) {
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

// === impl Publisher ===

impl Publisher {
    /// Why a table is due now, if one is. What has to wait is scheduled.
    pub(in crate::control) fn table_due(
        &mut self,
        state: &mut ControlState,
        now: Instant,
    ) -> Option<PublishReason> {
        let touched = state.backends.take_touched();
        let reason = state.pending.rebuild.take();
        let mut health = false;
        for id in touched {
            let Some(pool) = state.moved(id) else {
                state.came_back(id);
                continue;
            };
            if state.may_wait(id) {
                state.backends.touch_later(id);
            } else {
                self.pacer.moved.insert((pool, id));
                health = true;
            }
        }
        if reason.is_some() || health {
            return reason.or(state.pending.cause).or(Some(PublishReason::Health));
        }
        if state.backends.waiting().is_empty() && state.pools.changed().is_empty() {
            return None;
        }
        if let Some(at) = self.pacer.not_before
            && at > now
        {
            // Whether they have really moved is asked once, then.
            if !state.schedule.is_set(TimerKind::Publish) {
                state.schedule.set(TimerKind::Publish, at);
            }
            return None;
        }
        let mut waiting = state.backends.take_waiting();
        waiting.retain(|id| state.moved(*id).is_some());
        let due = !waiting.is_empty() || !state.pools.changed().is_empty();
        state.backends.wait_on(waiting);
        due.then_some(PublishReason::Heartbeat)
    }

    /// The pools of which the newest table is wrong, each with its backends that have
    /// moved.
    pub(in crate::control) fn wrong_pools(
        &self,
        state: &ControlState,
    ) -> BTreeMap<PoolId, BTreeSet<BackendId>> {
        let mut wrong: BTreeMap<PoolId, BTreeSet<BackendId>> =
            state.pools.changed().iter().map(|pool| (*pool, BTreeSet::new())).collect();
        let waiting =
            state.backends.waiting().iter().filter_map(|id| Some((state.moved(*id)?, *id)));
        for (pool, id) in self.pacer.moved.iter().copied().chain(waiting) {
            wrong.entry(pool).or_default().insert(id);
        }
        wrong
    }

    /// Notes that a table was `made`, or that its parts are being made.
    pub(in crate::control) fn table_made(
        &mut self,
        state: &mut ControlState,
        reason: PublishReason,
        made: bool,
        now: Instant,
    ) {
        state.schedule.cancel(TimerKind::Publish);
        self.pacer.done(reason, made, now);
        state.backends.take_waiting();
        state.pools.clear_changed();
    }
}
