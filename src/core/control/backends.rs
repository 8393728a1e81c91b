//! All configured or registered backends, and the set of changed ones.
//!
//! Filled by `configure` and `heartbeats`, used by the whole controller. Code that changes
//! a backend gets it from [`BackendSet::touch`], which marks it as changed, so no change
//! is missed in the next table. This module decides nothing and builds no table.

use super::ProbeToken;
use super::heartbeats::confirmation::ConfirmationInFlight;
use super::heartbeats::reported::BackendHeartbeats;
use super::history::TransitionHistory;
use super::members::{MemberSource, Origins};
use super::on_down::SessionsLeave;
use super::on_recover::ReleasedBackup;
use super::pools::{PoolEntry, PoolId};
use super::publish::BackendTableState;
use super::views::verification::Verification;
use crate::health::{BackendHealth, Intent, LastProbe, LastProbes, ProbeOutcome};
use crate::model;
use crate::suspicion::Ramp;
use crate::table::build::BackendInput;
use crate::table::state::{BackendId, BackendState};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Instant;

/// See the module documentation. Ordered by id, hence by age.
#[derive(Debug, Default)]
pub(super) struct BackendSet {
    entries: BTreeMap<BackendId, BackendEntry>,
    /// Possibly changed since the last event. A change is published at once.
    touched: BTreeSet<BackendId>,
    /// Possibly changed since the last table, for the better or slightly. The table may be
    /// delayed.
    waiting: BTreeSet<BackendId>,
    /// Of `waiting`, those added since the last [`BackendSet::take_fresh`].
    fresh: Vec<BackendId>,
    /// Number of additions and removals.
    membership: u64,
}

/// A configured or registered backend.
#[derive(Debug)]
pub(super) struct BackendEntry {
    pub(super) state: Arc<BackendState>,
    pub(super) pool: PoolId,
    pub(super) spec: model::BackendConfig,
    pub(super) health: BackendHealth,
    /// The member sources that list the backend.
    pub(super) origins: Origins,
    pub(super) in_flight: Option<ProbeInFlight>,
    /// Its heartbeats, once one has been received.
    pub(super) heartbeats: Option<Box<BackendHeartbeats>>,
    /// The newest probe that ended in this process. For `explain` only.
    pub(super) last_probe: Option<Box<LastProbe>>,
    /// The last probes that ended in this process. For the history only.
    pub(super) probes: LastProbes,
    /// The running confirmation probe.
    pub(super) confirmation: Option<ConfirmationInFlight>,
    /// Until this time the backend is eligible without its required heartbeats, because
    /// they were not required when it joined.
    pub(super) heartbeats_from: Option<Instant>,
    pub(super) requested_since: Instant,
    /// When the wish of its member sources last changed.
    pub(super) wish_since: Instant,
    /// The member source whose wish restricts it.
    pub(super) wished_by: Option<Arc<str>>,
    /// The backend of the file whose name has its address.
    pub(super) group: Option<Arc<str>>,
    /// The connects that verify it, until one has succeeded.
    pub(super) verification: Option<Verification>,
    /// When the observation last changed.
    pub(super) observed_since: Instant,
    /// Its sessions leave it, by `on_down`.
    pub(super) sessions_leave: Option<SessionsLeave>,
    /// A lower tier has replaced it, in a pool with `on_recover`.
    pub(super) released: Option<ReleasedBackup>,
    /// The slow start.
    pub(super) ramp: Option<Ramp>,
    /// Share that the slow start has reached, in percent.
    pub(super) ramp_share: u32,
    /// Whether the backend was eligible at the last check.
    pub(super) served: bool,
    /// The backend in the newest table; a new table is due if it differs.
    pub(super) published: BackendTableState,
    pub(super) history: TransitionHistory,
}

/// A requested probe.
#[derive(Debug, Clone, Copy)]
pub(super) struct ProbeInFlight {
    pub(super) token: ProbeToken,
    pub(super) started: Instant,
    /// From this time on, the controller expects no result.
    pub(super) lost_at: Instant,
    /// The result no longer counts; the next probe still waits for it.
    pub(super) stale: bool,
}

// === impl BackendSet ===

impl BackendSet {
    pub(super) fn get(&self, id: BackendId) -> Option<&BackendEntry> {
        self.entries.get(&id)
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Returns all backends, oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &BackendEntry> {
        self.entries.values()
    }

    /// Returns the backends added after `last`, oldest first.
    pub(super) fn after(&self, last: Option<BackendId>) -> impl Iterator<Item = &BackendEntry> {
        let from = last.map_or(Bound::Unbounded, Bound::Excluded);
        self.entries.range((from, Bound::Unbounded)).map(|(_, entry)| entry)
    }

    /// Returns the backend for a change. After the event the controller compares it with
    /// the table, and publishes a new table at once if they differ.
    pub(super) fn touch(&mut self, id: BackendId) -> Option<&mut BackendEntry> {
        let entry = self.entries.get_mut(&id)?;
        self.touched.insert(id);
        Some(entry)
    }

    /// As [`BackendSet::touch`], for a change that the table may delay: a new backend or a
    /// changed share, never a failed backend.
    pub(super) fn touch_later(&mut self, id: BackendId) -> Option<&mut BackendEntry> {
        let entry = self.entries.get_mut(&id)?;
        self.waiting.insert(id);
        self.fresh.push(id);
        Some(entry)
    }

    /// Returns the backend for evidence that changes no table by itself: heartbeats,
    /// running probes, rows of failures. Marks nothing: at 100,000 heartbeats per second,
    /// comparing each backend with the table would cost a tenth of their handling. Code that
    /// acts on the evidence calls [`BackendSet::touch`]. With debug assertions,
    /// `Publisher::check_noted` verifies it.
    pub(super) fn observe(&mut self, id: BackendId) -> Option<&mut BackendEntry> {
        self.entries.get_mut(&id)
    }

    /// Returns its heartbeats, if one has been received; as [`BackendSet::observe`].
    pub(super) fn heard(&mut self, id: BackendId) -> Option<&mut BackendHeartbeats> {
        self.observe(id)?.heartbeats.as_deref_mut()
    }

    /// Adds a backend; the table may be delayed.
    pub(super) fn insert(&mut self, entry: BackendEntry) {
        let id = entry.state.id;
        self.membership += 1;
        self.entries.insert(id, entry);
        self.waiting.insert(id);
        self.fresh.push(id);
    }

    pub(super) fn remove(&mut self, id: BackendId) -> Option<BackendEntry> {
        self.membership += 1;
        self.entries.remove(&id)
    }

    /// Returns a number that changes whenever a backend is added or removed.
    pub(super) fn membership(&self) -> u64 {
        self.membership
    }

    /// Removes and returns all backends.
    pub(super) fn take(&mut self) -> BTreeMap<BackendId, BackendEntry> {
        self.membership += 1;
        std::mem::take(&mut self.entries)
    }

    /// Returns the backend's input for a new table, and records it as published.
    pub(super) fn publish(&mut self, id: BackendId, pool: &PoolEntry) -> Option<BackendInput> {
        let entry = self.entries.get_mut(&id)?;
        entry.note_left_out();
        entry.published = BackendTableState::of(entry, pool);
        Some(entry.published.input(entry))
    }

    /// Tells picks why the backend is not eligible.
    pub(super) fn note_left_out(&self, id: BackendId) {
        if let Some(entry) = self.get(id) {
            entry.note_left_out();
        }
    }

    /// Returns the backends touched in this event.
    pub(super) fn touched(&self) -> &BTreeSet<BackendId> {
        &self.touched
    }

    /// Removes and returns the touched backends.
    pub(super) fn take_touched(&mut self) -> BTreeSet<BackendId> {
        std::mem::take(&mut self.touched)
    }

    /// Returns the changed backends whose table may be delayed.
    pub(super) fn waiting(&self) -> &BTreeSet<BackendId> {
        &self.waiting
    }

    /// Returns the waiting backends added since the last call.
    pub(super) fn take_fresh(&mut self) -> Vec<BackendId> {
        std::mem::take(&mut self.fresh)
    }

    /// Removes and returns the waiting backends.
    pub(super) fn take_waiting(&mut self) -> BTreeSet<BackendId> {
        std::mem::take(&mut self.waiting)
    }

    /// Puts back the waiting backends that still differ from the table.
    pub(super) fn wait_on(&mut self, waiting: BTreeSet<BackendId>) {
        self.waiting = waiting;
    }
}

// === impl BackendEntry ===

impl BackendEntry {
    /// Returns a backend without any result.
    pub(super) fn new(
        state: BackendState,
        pool: PoolId,
        spec: model::BackendConfig,
        now: Instant,
    ) -> BackendEntry {
        BackendEntry {
            state: Arc::new(state),
            pool,
            spec,
            health: BackendHealth::new(Intent::Ready, None, now),
            origins: Origins::of(MemberSource::File),
            in_flight: None,
            heartbeats: None,
            last_probe: None,
            probes: LastProbes::default(),
            confirmation: None,
            heartbeats_from: None,
            requested_since: now,
            wish_since: now,
            wished_by: None,
            group: None,
            verification: None,
            observed_since: now,
            sessions_leave: None,
            released: None,
            ramp: None,
            ramp_share: 100,
            served: false,
            published: BackendTableState::default(),
            history: TransitionHistory::default(),
        }
    }

    /// Keeps the result of a probe for `explain`.
    pub(super) fn note_probe(&mut self, outcome: &ProbeOutcome, confirmation: bool, now: Instant) {
        self.probes.note(outcome, now);
        let probe = LastProbe { ended: now, outcome: outcome.clone(), confirmation };
        match &mut self.last_probe {
            Some(last) => **last = probe,
            None => self.last_probe = Some(Box::new(probe)),
        }
    }
}
