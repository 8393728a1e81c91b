//! Views in a handover and in the state directory.
//!
//! Called by `handover` in both processes of an upgrade, and by the daemon for the state
//! directory. It does no I/O. Sources ask again after a start; until they have answered,
//! the saved members serve.

use super::{SourceView, ViewId, question_text};
use crate::control::pools::PoolId;
use crate::control::{ControlEffect, Controller, PublishReason};
use crate::discovery::view::{SavedView, View};
use crate::model::SourceKey;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// The views of all member sources.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SavedViews {
    /// In order of pool and backend.
    pub sources: Vec<SavedSource>,
}

/// The view of one member source.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SavedSource {
    /// Name of the pool.
    pub pool: String,
    /// The backend whose address is a name; `None`: the pool's `discover` table.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    /// Identifies what was asked. The members of another question leave with the first
    /// answer.
    pub question: String,
    /// The members are from another question.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub moved: bool,
    /// Its members.
    pub view: SavedView,
}

/// Where saved views come from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum SavedBy {
    /// Another process, which hands over everything.
    Process,
    /// An earlier start, in the state directory.
    Directory,
}

// === impl SavedViews ===

impl SavedViews {
    /// Whether no view is saved.
    pub fn is_empty(&self) -> bool {
        self.sources.is_empty()
    }

    /// Makes all ages relative to a moment that is `time` later.
    pub fn add_age(&mut self, time: Duration) {
        self.sources.iter_mut().for_each(|source| source.view.add_age(time));
    }
}

// === impl Controller ===

impl Controller {
    /// Whether views have changed since the last [`Controller::save_views`].
    pub fn views_changed(&self) -> bool {
        self.state.views.unsaved
    }

    /// Returns all views that have members or an answer, for the state directory.
    pub fn save_views(&mut self, now: Instant) -> SavedViews {
        self.state.views.unsaved = false;
        self.saved_views(now)
    }

    /// As [`Controller::save_views`], without noting that they are saved.
    pub(in crate::control) fn saved_views(&self, now: Instant) -> SavedViews {
        let mut sources: Vec<SavedSource> = self
            .state
            .views
            .views
            .values()
            .filter(|view| view.view.has_answer())
            .map(|view| view.save(now))
            .collect();
        sources.sort_by(|a, b| (&a.pool, &a.backend).cmp(&(&b.pool, &b.backend)));
        SavedViews { sources }
    }

    /// Restores the views of an earlier start from the state directory. Call it after the
    /// first configuration. Ignores views of other sources than the configuration's, and
    /// views for which a source of this process has answered. An answer of the earlier start
    /// confirms no removal, because no process followed the source in between. If a pool without
    /// probes has no other eligible backend, the restored members serve at once.
    pub fn adopt_views(&mut self, saved: &SavedViews, now: Instant) -> Vec<ControlEffect> {
        self.run_due(now);
        self.restore_views(saved, SavedBy::Directory, now);
        self.state.pending.rebuild.get_or_insert(PublishReason::Discovery);
        self.finish(now)
    }

    /// Restores the views of the other process of an upgrade.
    pub(in crate::control) fn take_over_views(&mut self, saved: &SavedViews, now: Instant) {
        self.restore_views(saved, SavedBy::Process, now);
    }

    fn restore_views(&mut self, saved: &SavedViews, by: SavedBy, now: Instant) {
        for source in &saved.sources {
            let key = SourceKey {
                pool: source.pool.as_str().into(),
                backend: source.backend.as_deref().map(Into::into),
            };
            let state = &mut self.state;
            let Some(id) = state.views.ids.get(&key).copied() else { continue };
            let Some(pool) = state.pools.named(&key.pool).map(|pool| pool.id) else { continue };
            let Some(view) = state.views.views.get_mut(&id) else { continue };
            if view.heard {
                continue;
            }
            view.restore(source, by, now);
            self.restored(id, pool, by, now);
        }
    }

    fn restored(&mut self, id: ViewId, pool: PoolId, by: SavedBy, now: Instant) {
        let state = &mut self.state;
        let alone = state.pool(pool).is_some_and(|pool| pool.in_service_since.is_none());
        state.view_changed(&mut self.heartbeats, (id, pool), (true, true), now);
        if alone && by == SavedBy::Directory {
            state.fail_open(pool);
        }
    }
}

// === impl SourceView ===

impl SourceView {
    fn save(&self, now: Instant) -> SavedSource {
        SavedSource {
            pool: self.key.pool.to_string(),
            backend: self.key.backend.as_deref().map(str::to_owned),
            question: question_text(&self.question),
            moved: self.moved,
            view: self.view.save(now),
        }
    }

    fn restore(&mut self, saved: &SavedSource, by: SavedBy, now: Instant) {
        let is_other = saved.question != question_text(&self.question);
        self.moved = saved.moved || is_other;
        self.view = View::restore(self.guards_in_force(), &saved.view, now);
        if is_other || by == SavedBy::Directory {
            self.view.forget_answers();
        }
    }
}
