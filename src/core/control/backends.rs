//! Every configured or registered backend, and which of them the next table has to be
//! asked about.
//!
//! Filled by `configure` and `heartbeats`, used by the whole controller. Whoever changes
//! a backend gets it by [`BackendSet::touch`], which notes it: a change cannot be
//! forgotten. It decides nothing and builds no table.

use super::ProbeToken;
use super::heartbeats::confirmation::ConfirmationInFlight;
use super::heartbeats::reported::BackendHeartbeats;
use super::history::TransitionHistory;
use super::members::{MemberSource, Origins};
use super::pools::{PoolEntry, PoolId};
use super::publish::BackendTableState;
use crate::health::{BackendHealth, Intent};
use crate::model;
use crate::suspicion::Ramp;
use crate::table::build::BackendInput;
use crate::table::state::{BackendId, BackendState};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Instant;

/// See the module's documentation. Ordered by number, so by age.
#[derive(Debug, Default)]
pub(super) struct BackendSet {
    entries: BTreeMap<BackendId, BackendEntry>,
    /// Their standing may have changed since the end of the last event.
    touched: BTreeSet<BackendId>,
    /// Their standing may have changed since the last table, for the better or a
    /// little: the next table may wait for its turn.
    waiting: BTreeSet<BackendId>,
    /// Those of `waiting` that came since the last look.
    fresh: Vec<BackendId>,
}

/// A configured or registered backend.
#[derive(Debug)]
pub(super) struct BackendEntry {
    pub(super) state: Arc<BackendState>,
    pub(super) pool: PoolId,
    pub(super) spec: model::BackendConfig,
    pub(super) health: BackendHealth,
    /// The member sources that name it.
    pub(super) origins: Origins,
    pub(super) in_flight: Option<ProbeInFlight>,
    /// What its heartbeats have said, where any were heard.
    pub(super) heartbeats: Option<Box<BackendHeartbeats>>,
    /// The confirming probe under way.
    pub(super) confirmation: Option<ConfirmationInFlight>,
    /// Until then it serves without the heartbeats it needs: they were not
    /// required when it came.
    pub(super) heartbeats_from: Option<Instant>,
    pub(super) requested_since: Instant,
    /// Since when its observation stands.
    pub(super) observed_since: Instant,
    /// Its slow start, and the share it has reached, in percent.
    pub(super) ramp: Option<Ramp>,
    pub(super) ramp_share: u32,
    /// Whether it was eligible when last looked at.
    pub(super) served: bool,
    /// What the newest table says of it, to tell whether a new one is due.
    pub(super) published: BackendTableState,
    pub(super) history: TransitionHistory,
}

/// A probe the shell was asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct ProbeInFlight {
    pub(super) token: ProbeToken,
    pub(super) started: Instant,
    /// No result is expected any more from then on.
    pub(super) lost_at: Instant,
    /// Its result means nothing any more; it only keeps the next one waiting.
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

    /// Oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &BackendEntry> {
        self.entries.values()
    }

    /// Those that came after `last`, oldest first.
    pub(super) fn after(&self, last: Option<BackendId>) -> impl Iterator<Item = &BackendEntry> {
        let from = last.map_or(Bound::Unbounded, Bound::Excluded);
        self.entries.range((from, Bound::Unbounded)).map(|(_, entry)| entry)
    }

    /// The backend, to be changed: at the end of the event it is asked whether the table
    /// is wrong about it, and if so a new one is made at once.
    pub(super) fn touch(&mut self, id: BackendId) -> Option<&mut BackendEntry> {
        let entry = self.entries.get_mut(&id)?;
        self.touched.insert(id);
        Some(entry)
    }

    /// As [`BackendSet::touch`], where the table may wait for its turn: a share or a
    /// newcomer, never a backend that is broken.
    pub(super) fn touch_later(&mut self, id: BackendId) -> Option<&mut BackendEntry> {
        let entry = self.entries.get_mut(&id)?;
        self.waiting.insert(id);
        self.fresh.push(id);
        Some(entry)
    }

    /// The backend, for evidence that changes no table by itself: heartbeats, probes
    /// under way, rows of failures. It notes nothing, since heartbeats come 100,000 times
    /// a second and a comparison with the table after each would cost a tenth of their
    /// handling. What follows from the evidence is done by [`BackendSet::touch`];
    /// `Controller::check_noted` checks it in builds with debug assertions.
    pub(super) fn observe(&mut self, id: BackendId) -> Option<&mut BackendEntry> {
        self.entries.get_mut(&id)
    }

    /// What its heartbeats have said, where any were heard; as [`BackendSet::observe`].
    pub(super) fn heard(&mut self, id: BackendId) -> Option<&mut BackendHeartbeats> {
        self.observe(id)?.heartbeats.as_deref_mut()
    }

    /// Adds a backend, which the next table may wait for.
    pub(super) fn insert(&mut self, entry: BackendEntry) {
        let id = entry.state.id;
        self.entries.insert(id, entry);
        self.waiting.insert(id);
        self.fresh.push(id);
    }

    pub(super) fn remove(&mut self, id: BackendId) -> Option<BackendEntry> {
        self.entries.remove(&id)
    }

    /// Takes all of them out.
    pub(super) fn take(&mut self) -> BTreeMap<BackendId, BackendEntry> {
        std::mem::take(&mut self.entries)
    }

    /// What a table is to say of the backend from now on.
    pub(super) fn publish(&mut self, id: BackendId, pool: &PoolEntry) -> Option<BackendInput> {
        let entry = self.entries.get_mut(&id)?;
        entry.published = BackendTableState::of(entry, pool);
        Some(entry.published.input(entry))
    }

    /// Those that were touched in this event.
    pub(super) fn touched(&self) -> &BTreeSet<BackendId> {
        &self.touched
    }

    /// The same, for the last time.
    pub(super) fn take_touched(&mut self) -> BTreeSet<BackendId> {
        std::mem::take(&mut self.touched)
    }

    /// Those that the table may wait for.
    pub(super) fn waiting(&self) -> &BTreeSet<BackendId> {
        &self.waiting
    }

    /// Those of them that came since the last call.
    pub(super) fn take_fresh(&mut self) -> Vec<BackendId> {
        std::mem::take(&mut self.fresh)
    }

    /// The same, once the table is asked about them.
    pub(super) fn take_waiting(&mut self) -> BTreeSet<BackendId> {
        std::mem::take(&mut self.waiting)
    }

    /// Those of them that the table is wrong about wait on.
    pub(super) fn wait_on(&mut self, waiting: BTreeSet<BackendId>) {
        self.waiting = waiting;
    }
}

// === impl BackendEntry ===

impl BackendEntry {
    /// A backend that nothing is known of.
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
            confirmation: None,
            heartbeats_from: None,
            requested_since: now,
            observed_since: now,
            ramp: None,
            ramp_share: 100,
            served: false,
            published: BackendTableState::default(),
            history: TransitionHistory::default(),
        }
    }
}
