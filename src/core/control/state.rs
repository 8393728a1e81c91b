//! State shared by all parts of the controller: frontends, pools, backends, timers, and
//! the work that the current event leaves pending.
//!
//! Owned by the controller, which lends it to each part for a call. The rules for health,
//! probes and ejections are methods of [`ControlState`] in the sibling modules. This
//! module builds no table and returns no effect.

use super::backends::BackendSet;
use super::ejections::EjectionIndex;
use super::frontends::FrontendSet;
use super::groups::GroupIntents;
use super::members::MembersIgnored;
use super::names::RemovedNames;
use super::pools::{PoolEntry, PoolId, PoolSet};
use super::probing::ProbeLog;
use super::removal::RemovedBackends;
use super::schedule::Schedule;
use super::views::MemberViews;
use super::{ControlEffect, DetectorVerdict, Notice, NoticeFields, NoticeLevel, PublishReason};
use crate::balance::in_flight::{Counted, Counts, Unshared};
use crate::health::Transition;
use crate::model;
use crate::outcome::RefusedReason;
use crate::table::state::{BackendId, BackendState, FrontendId, FrontendState};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// See the module documentation.
#[derive(Debug)]
pub(super) struct ControlState {
    pub(super) allocator: StateAllocator,
    pub(super) frontends: FrontendSet,
    pub(super) pools: PoolSet,
    /// The configured or registered backends of all pools.
    pub(super) backends: BackendSet,
    pub(super) ejections: EjectionIndex,
    /// Removed backends.
    pub(super) removed: RemovedBackends,
    pub(super) removed_names: RemovedNames,
    /// The views of member sources.
    pub(super) views: MemberViews,
    /// Operators' intents for backends whose address is a name.
    pub(super) groups: GroupIntents,
    pub(super) schedule: Schedule,
    pub(super) probes: ProbeLog,
    /// Ignored tellings of sources and members, by [`MembersIgnored`].
    pub(super) ignored_members: [u64; MembersIgnored::ALL.len()],
    /// Pending work of the current event; empty between events.
    pub(super) pending: PendingEffects,
}

/// Creates the long-lived state of backends and frontends. No id is used twice.
#[derive(Debug)]
pub(super) struct StateAllocator {
    pub(super) workers: usize,
    /// Source of the session counters.
    pub(super) counts: Arc<dyn Counts>,
    backend: u32,
    frontend: u32,
}

/// Work that is performed once after a batch of events.
#[derive(Debug, Default)]
pub(super) struct PendingEffects {
    pub(super) effects: Vec<ControlEffect>,
    /// A new table is due even if no backend changed.
    pub(super) rebuild: Option<PublishReason>,
    /// The cause of a change, if it is not health.
    pub(super) cause: Option<PublishReason>,
    /// Pools whose ejections must be rechecked.
    pub(super) unsettled: BTreeSet<PoolId>,
    /// Pools whose members have changed: those that follow them take the same members.
    pub(super) refit: BTreeSet<PoolId>,
    /// The table parts of large pools are built at once, not on another thread.
    pub(super) at_once: bool,
}

// === impl ControlState ===

impl ControlState {
    /// Returns a state without a configuration. `workers` is the number of shards of each
    /// counter; `seed` is the seed of the probe jitter.
    pub(super) fn new(workers: usize, seed: u64) -> ControlState {
        let counts = Arc::new(Unshared);
        ControlState {
            allocator: StateAllocator { workers, counts, backend: 0, frontend: 0 },
            frontends: FrontendSet::default(),
            pools: PoolSet::default(),
            backends: BackendSet::default(),
            ejections: EjectionIndex::default(),
            removed: RemovedBackends::default(),
            removed_names: RemovedNames::default(),
            views: MemberViews::default(),
            groups: GroupIntents::default(),
            schedule: Schedule::default(),
            probes: ProbeLog::new(seed),
            ignored_members: [0; MembersIgnored::ALL.len()],
            pending: PendingEffects::default(),
        }
    }

    /// Returns the pool with this id.
    pub(super) fn pool(&self, id: PoolId) -> Option<&PoolEntry> {
        self.pools.get(id)
    }

    /// Records a change of a configured backend's state.
    pub(super) fn record(
        &mut self,
        id: BackendId,
        names: (&'static str, &'static str),
        reason: String,
        lasted: Duration,
        now: Instant,
    ) {
        self.backends.touch(id);
        self.record_lazily(id, names, reason, lasted, now);
    }

    /// As [`ControlState::record`], for a change that the table may delay.
    pub(super) fn record_lazily(
        &mut self,
        id: BackendId,
        (from, to): (&'static str, &'static str),
        reason: String,
        lasted: Duration,
        now: Instant,
    ) {
        let Some(entry) = self.backends.touch_later(id) else { return };
        let transition = Transition {
            pool: Arc::clone(&entry.state.pool),
            backend: Arc::clone(&entry.state.name),
            from,
            to,
            reason,
            at: now,
            lasted,
        };
        entry.history.add(transition.clone());
        self.pending.effects.push(ControlEffect::Log(transition));
        self.pending.unsettled.insert(entry.pool);
    }

    /// Reports a verdict of a detector.
    pub(super) fn verdict(
        &mut self,
        backend: BackendId,
        detector: &'static str,
        verdict: &'static str,
        reason: &str,
    ) {
        let verdict = DetectorVerdict { backend, detector, verdict, reason: reason.to_owned() };
        self.pending.effects.push(ControlEffect::Verdict(verdict));
    }

    /// Logs a notice about one backend, configured or not.
    pub(super) fn warn_of(
        &mut self,
        backend: &BackendState,
        message: &'static str,
        fields: NoticeFields,
    ) {
        let (pool, backend) = (Arc::clone(&backend.pool), Some(Arc::clone(&backend.name)));
        let level = NoticeLevel::Warn;
        let notice = Notice { level, pool, backend, message, fields };
        self.pending.effects.push(ControlEffect::Notice(Box::new(notice)));
    }

    /// Logs a notice about one pool; an empty name: about all pools.
    pub(super) fn warn(&mut self, pool: Arc<str>, message: &'static str, fields: NoticeFields) {
        let notice = Notice { level: NoticeLevel::Warn, pool, backend: None, message, fields };
        self.pending.effects.push(ControlEffect::Notice(Box::new(notice)));
    }
}

// === impl StateAllocator ===

impl StateAllocator {
    pub(super) fn backend(&mut self, pool: Arc<str>, spec: &model::BackendConfig) -> BackendState {
        self.backend += 1;
        let (name, address) = (Arc::clone(&spec.name), spec.address.clone());
        let state = BackendState::new(BackendId(self.backend), pool, name, address, self.workers);
        let (pool, name, address) = (&state.pool, &state.name, &state.address_text);
        let in_flight = self.counts.count(Counted::Backend { pool, name, address });
        state.counted_by(in_flight)
    }

    pub(super) fn frontend(&mut self, name: &Arc<str>) -> FrontendState {
        self.frontend += 1;
        let in_flight = self.counts.count(Counted::Frontend(name));
        let (id, reasons) = (FrontendId(self.frontend), RefusedReason::COUNT);
        FrontendState::new(id, Arc::clone(name), self.workers, reasons).counted_by(in_flight)
    }

    /// Returns the number of backends created so far; wraps at 2^32.
    pub(super) fn backends_seen(&self) -> u32 {
        self.backend
    }
}
