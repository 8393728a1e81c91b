//! Rate limit of tables that heartbeats and member sources cause.
//!
//! Called by `publish` at the end of each event. Changes by heartbeats and member sources
//! (members, weights, wishes) can be delayed. Failures, operators' requests and reloads are
//! published at once, together with all delayed changes. The pause after a table is [`PACE`],
//! and at least nine times what the table cost. The daemon measures that. This module publishes
//! nothing itself.

use super::Publisher;
use crate::control::pools::PoolId;
use crate::control::schedule::TimerKind;
use crate::control::state::ControlState;
use crate::table::state::BackendId;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// Shortest time between two tables for heartbeats and member sources. A table costs milliseconds in a pool
/// of thousands of backends, and a new backend or weight can wait for 100 ms.
pub(in crate::control) const PACE: Duration = Duration::from_millis(100);

/// Work for heartbeats and member sources uses at most 1/`SHARE` of a thread's time.
pub(in crate::control) const SHARE: u32 = 10;

/// Why a table was published; the label of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublishReason {
    /// A configuration was accepted.
    Configuration,
    /// An operator's request.
    Operator,
    /// The observation or the ejection of a backend changed.
    Health,
    /// Heartbeats added, removed or reweighted members, or a slow start reached its next
    /// step.
    Heartbeat,
    /// Names or registries added, removed or changed members.
    Discovery,
}

/// What the next table has.
#[derive(Debug, Clone, Copy)]
pub(in crate::control) enum TableDue {
    /// All changes, and the parts that another thread has built.
    Changes(PublishReason),
    /// Only these parts; changes wait for their time.
    Parts(PublishReason),
}

/// State of the rate limit.
#[derive(Debug, Default)]
pub(in crate::control) struct PublishPacer {
    /// Changed backends whose table is due now.
    moved: BTreeSet<(PoolId, BackendId)>,
    /// No table for heartbeats or member sources before this time.
    not_before: Option<Instant>,
    /// The last table was for heartbeats or member sources, and its cost is unknown.
    unmeasured: bool,
    /// Tables so far, by [`PublishReason`].
    published: [u64; PublishReason::ALL.len()],
}

// === impl PublishReason ===

impl PublishReason {
    /// All reasons.
    pub const ALL: [PublishReason; 5] = [
        PublishReason::Configuration,
        PublishReason::Operator,
        PublishReason::Health,
        PublishReason::Heartbeat,
        PublishReason::Discovery,
    ];

    /// Whether tables for this reason are paced.
    pub(in crate::control) fn is_paced(self) -> bool {
        matches!(self, PublishReason::Heartbeat | PublishReason::Discovery)
    }

    /// Returns the label value in metrics.
    pub fn name(self) -> &'static str {
        match self {
            PublishReason::Configuration => "configuration",
            PublishReason::Operator => "operator",
            PublishReason::Health => "health",
            PublishReason::Heartbeat => "heartbeat",
            PublishReason::Discovery => "discovery",
        }
    }
}

// === impl PublishPacer ===

impl PublishPacer {
    /// Returns the number of tables for this reason.
    pub(in crate::control) fn published(&self, reason: PublishReason) -> u64 {
        self.published[reason as usize]
    }

    /// Delays tables for heartbeats and member sources until `at`.
    pub(in crate::control) fn wait_until(&mut self, at: Instant) {
        self.not_before = Some(self.not_before.map_or(at, |before| before.max(at)));
    }

    /// Records that a table of all changes was built or is being built.
    fn done(&mut self, reason: PublishReason, made: bool, now: Instant) {
        self.published[reason as usize] += u64::from(made);
        self.moved.clear();
        if reason.is_paced() {
            self.unmeasured = true;
            self.wait_until(now + PACE);
        }
    }
}

// === impl Publisher ===

impl Publisher {
    /// Notes that the last events took this long, until `now`. If they include paced work,
    /// the next such work waits, so that all of it uses at most 1/[`SHARE`] of the time. After
    /// an answer of a member source, the next answer waits. The table of the answer does not,
    /// because its members would wait for it.
    pub(in crate::control) fn took(
        &mut self,
        state: &mut ControlState,
        took: Duration,
        now: Instant,
    ) {
        let at = now + took.saturating_mul(SHARE - 1);
        let has_table = std::mem::take(&mut self.pacer.unmeasured);
        let has_answer = state.views.take_applied();
        if has_table || has_answer {
            state.views.wait_until(at);
        }
        if has_table && !has_answer {
            self.pacer.wait_until(at);
        }
    }

    /// Returns which table is due now, and why; `None` if none is. Schedules delayed changes.
    pub(in crate::control) fn table_due(
        &mut self,
        state: &mut ControlState,
        now: Instant,
    ) -> Option<TableDue> {
        let touched = state.backends.take_touched();
        let reason = state.pending.rebuild.take();
        let mut health = false;
        for id in touched {
            state.backends.note_left_out(id);
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
            let reason = reason.or(state.pending.cause).unwrap_or(PublishReason::Health);
            return Some(TableDue::Changes(reason));
        }
        let delayed = self.delayed_due(state, now).map(TableDue::Changes);
        delayed.or_else(|| self.parts_due().map(TableDue::Parts))
    }

    /// Returns why a table of delayed changes is due now; `None` if none is.
    fn delayed_due(&mut self, state: &mut ControlState, now: Instant) -> Option<PublishReason> {
        if state.backends.waiting().is_empty() && state.pools.changed().is_empty() {
            return None;
        }
        if let Some(at) = self.pacer.not_before
            && at > now
        {
            // The timer compares the waiting backends with the table, once for all.
            if !state.schedule.is_set(TimerKind::Publish) {
                state.schedule.set(TimerKind::Publish, at);
            }
            return None;
        }
        let mut waiting = state.backends.take_waiting();
        waiting.retain(|id| state.moved(*id).is_some());
        let due = !waiting.is_empty() || !state.pools.changed().is_empty();
        state.backends.wait_on(waiting);
        due.then(|| state.delayed_reason())
    }

    /// Returns the outdated pools, each with its changed backends.
    pub(in crate::control) fn outdated_pools(
        &self,
        state: &ControlState,
    ) -> BTreeMap<PoolId, BTreeSet<BackendId>> {
        let mut outdated: BTreeMap<PoolId, BTreeSet<BackendId>> =
            state.pools.changed().iter().map(|pool| (*pool, BTreeSet::new())).collect();
        let waiting =
            state.backends.waiting().iter().filter_map(|id| Some((state.moved(*id)?, *id)));
        for (pool, id) in self.pacer.moved.iter().copied().chain(waiting) {
            outdated.entry(pool).or_default().insert(id);
        }
        outdated
    }

    /// Records that the parts which another thread has built were published, or that no part
    /// was new. Their build has set the time of the next changes.
    pub(in crate::control) fn parts_published(&mut self, reason: PublishReason, made: bool) {
        self.pacer.published[reason as usize] += u64::from(made);
        self.pacer.unmeasured |= reason.is_paced();
    }

    /// Records that a table was `made`, or that its parts are being built.
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
        state.views.take_unpublished();
    }
}

// === impl ControlState ===

impl ControlState {
    /// Returns the cause of the delayed changes.
    fn delayed_reason(&self) -> PublishReason {
        let discovered = |id: &BackendId| {
            self.backends.get(*id).is_some_and(|entry| entry.origins.is_discovered())
        };
        if self.views.is_unpublished() || self.backends.waiting().iter().any(discovered) {
            PublishReason::Discovery
        } else {
            PublishReason::Heartbeat
        }
    }
}
