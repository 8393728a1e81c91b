//! What the viewers of one selection have, and what they need to have the next picture.
//!
//! Pure. Called by `groups` on a blocking thread.

use super::picture::{BackendFacts, Picture, PictureIdentity};
use super::selection::StreamSelection;
use std::collections::BTreeSet;
use std::sync::Arc;
use tidegate_api::stream::{
    PoolDeltaDoc, StreamDeltaDoc, StreamFrontendDoc, StreamRowDoc, StreamSnapshotDoc,
    StreamTransitionDoc,
};

/// Changed backends of one moment beyond which a snapshot is sent instead.
const TRANSITIONS_MAX: usize = 256;

/// What the viewers of a selection have.
#[derive(Debug)]
pub(super) struct ShownToViewers {
    identity: Arc<PictureIdentity>,
    pools: Vec<ShownPool>,
}

/// What they have of a pool.
#[derive(Debug)]
struct ShownPool {
    rows: Vec<StreamRowDoc>,
    keys: Vec<BackendFacts>,
    map: String,
    /// Rows that have changed without a delta.
    unsent: BTreeSet<usize>,
    /// Places of the backends that they have; `None`: all.
    places: Option<Vec<usize>>,
}

/// A text for the viewers.
#[derive(Debug)]
pub(super) enum Change {
    Transition(Box<StreamTransitionDoc>),
    Delta(StreamDeltaDoc),
}

// === impl ShownToViewers ===

impl ShownToViewers {
    /// Returns a snapshot, and what its viewers have then.
    pub(super) fn begin(
        picture: &Picture,
        selection: &StreamSelection,
    ) -> (StreamSnapshotDoc, ShownToViewers) {
        let pools = (0..picture.pools.len()).map(|pool| ShownPool::of(picture, pool, selection));
        let shown =
            ShownToViewers { identity: Arc::clone(&picture.identity), pools: pools.collect() };
        (shown.snapshot(picture), shown)
    }

    /// Returns a snapshot of the same backends.
    pub(super) fn snapshot(&self, picture: &Picture) -> StreamSnapshotDoc {
        let pool = |(pool, shown): (usize, &ShownPool)| {
            let all = shown.places.is_none();
            let places: Vec<usize> = match &shown.places {
                Some(places) => places.clone(),
                None => (0..picture.pools[pool].rows.len()).collect(),
            };
            let backends = picture.backends(pool, places.into_iter(), !all);
            let mut document = picture.pool(pool, backends);
            document.map = (!all).then(|| picture.pools[pool].map.clone());
            document
        };
        StreamSnapshotDoc {
            head: picture.head.clone(),
            frontends: picture.frontends.clone(),
            pools: self.pools.iter().enumerate().map(pool).collect(),
        }
    }

    /// Returns whether the places of the picture are those that the viewers know.
    pub(super) fn is_of(&self, picture: &Picture) -> bool {
        self.identity == picture.identity
    }

    /// Returns what the viewers need now: transitions, and a delta if `regular`. `None` if they
    /// need a snapshot.
    pub(super) fn advance(
        &mut self,
        picture: &Picture,
        selection: &StreamSelection,
        regular: bool,
    ) -> Option<Vec<Change>> {
        if !self.is_of(picture) {
            return None;
        }
        let mut changes = Vec::new();
        for (pool, shown) in self.pools.iter_mut().enumerate() {
            for place in shown.note(picture, pool) {
                let row = picture.backends(pool, [place].into_iter(), shown.places.is_some());
                changes.extend(row.into_iter().map(|row| {
                    Change::Transition(Box::new(StreamTransitionDoc {
                        pool: picture.pool_name(pool).to_owned(),
                        backend: row.backend.name.clone(),
                        row,
                    }))
                }));
                if changes.len() > TRANSITIONS_MAX {
                    return None;
                }
            }
        }
        if regular {
            changes.push(Change::Delta(self.delta(picture, selection)));
        }
        Some(changes)
    }

    fn delta(&mut self, picture: &Picture, selection: &StreamSelection) -> StreamDeltaDoc {
        let pools = self.pools.iter_mut().enumerate();
        let frontend =
            |one: &StreamFrontendDoc| StreamFrontendDoc { new_minute: None, ..one.clone() };
        StreamDeltaDoc {
            head: picture.head.clone(),
            frontends: picture.frontends.iter().map(frontend).collect(),
            pools: pools.map(|(pool, shown)| shown.delta(picture, pool, selection)).collect(),
        }
    }
}

// === impl ShownPool ===

impl ShownPool {
    fn of(picture: &Picture, pool: usize, selection: &StreamSelection) -> ShownPool {
        let now = &picture.pools[pool];
        ShownPool {
            rows: now.rows.clone(),
            keys: now.keys.clone(),
            map: now.map.clone(),
            unsent: BTreeSet::new(),
            places: places(picture, pool, selection),
        }
    }

    fn has(&self, place: usize) -> bool {
        self.places.as_ref().is_none_or(|places| places.binary_search(&place).is_ok())
    }

    /// Notes changed rows. Returns the places of the backends that viewers need whole.
    fn note(&mut self, picture: &Picture, pool: usize) -> Vec<usize> {
        let now = &picture.pools[pool];
        for (place, (row, newer)) in self.rows.iter_mut().zip(&now.rows).enumerate() {
            if row != newer {
                *row = *newer;
                self.unsent.insert(place);
            }
        }
        let mut changed = Vec::new();
        for (place, (key, newer)) in self.keys.iter_mut().zip(&now.keys).enumerate() {
            if key != newer {
                *key = newer.clone();
                changed.push(place);
            }
        }
        changed.retain(|place| self.has(*place));
        changed
    }

    fn delta(
        &mut self,
        picture: &Picture,
        pool: usize,
        selection: &StreamSelection,
    ) -> PoolDeltaDoc {
        let now = &picture.pools[pool];
        let before = self.places.take();
        self.places = places(picture, pool, selection);
        let (enter, leave) = match (&before, &self.places) {
            (Some(before), Some(after)) => (missing(after, before), missing(before, after)),
            _ => (Vec::new(), Vec::new()),
        };
        let unsent = std::mem::take(&mut self.unsent);
        let known = |place: &usize| self.has(*place) && enter.binary_search(place).is_err();
        let rows = unsent.into_iter().filter(known).map(|place| now.rows[place]).collect();
        let changed = self.places.is_some() && self.map != now.map;
        self.map.clone_from(&now.map);
        PoolDeltaDoc {
            queued: now.queued,
            frozen: now.frozen.clone(),
            none_eligible: now.none_eligible.clone(),
            counts: now.counts.clone(),
            rows,
            map: changed.then(|| now.map.clone()),
            enter: picture.backends(pool, enter.into_iter(), true),
            leave: leave.into_iter().map(|place| place as u64).collect(),
        }
    }
}

/// Returns the places that the selection has, ascending; `None`: all.
fn places(picture: &Picture, pool: usize, selection: &StreamSelection) -> Option<Vec<usize>> {
    match selection.top {
        _ if !selection.has_pool(picture.pool_name(pool)) => Some(Vec::new()),
        Some(top) => Some(picture.pools[pool].worst(top)),
        None => None,
    }
}

/// Returns the places of `some` that `others` lacks. Both are ascending.
fn missing(some: &[usize], others: &[usize]) -> Vec<usize> {
    some.iter().copied().filter(|place| others.binary_search(place).is_err()).collect()
}
