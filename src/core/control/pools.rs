//! The configured pools, in file order, found by number and by name.
//!
//! Filled by `configure`, used by the whole controller. Every look-up costs the
//! same however many pools there are, and so does what heartbeats ask of all of
//! them: that is kept up to date as pools are added. It knows nothing of health.

use super::{PoolEntry, PoolId};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// See the module's documentation. A pool's name and number never change.
#[derive(Debug, Default)]
pub(super) struct Pools {
    list: Vec<PoolEntry>,
    by_id: HashMap<PoolId, usize>,
    by_name: HashMap<Arc<str>, usize>,
    /// Pools that take heartbeats.
    listening: usize,
    /// The shortest interval among them.
    fastest: Option<Duration>,
}

// === impl Pools ===

impl Pools {
    /// Adds a pool whose name and number are new.
    pub(super) fn push(&mut self, pool: PoolEntry) {
        self.by_id.insert(pool.id, self.list.len());
        self.by_name.insert(Arc::clone(&pool.spec.name), self.list.len());
        if let Some(spec) = &pool.spec.heartbeat {
            self.listening += 1;
            self.fastest = Some(self.fastest.map_or(spec.interval, |so| so.min(spec.interval)));
        }
        self.list.push(pool);
    }

    pub(super) fn get(&self, id: PoolId) -> Option<&PoolEntry> {
        self.list.get(*self.by_id.get(&id)?)
    }

    pub(super) fn get_mut(&mut self, id: PoolId) -> Option<&mut PoolEntry> {
        self.list.get_mut(*self.by_id.get(&id)?)
    }

    /// Its place in file order.
    pub(super) fn place(&self, id: PoolId) -> Option<usize> {
        self.by_id.get(&id).copied()
    }

    pub(super) fn named(&self, name: &str) -> Option<&PoolEntry> {
        self.list.get(*self.by_name.get(name)?)
    }

    pub(super) fn named_mut(&mut self, name: &str) -> Option<&mut PoolEntry> {
        self.list.get_mut(*self.by_name.get(name)?)
    }

    /// In file order.
    pub(super) fn iter(&self) -> std::slice::Iter<'_, PoolEntry> {
        self.list.iter()
    }

    /// In file order.
    pub(super) fn iter_mut(&mut self) -> std::slice::IterMut<'_, PoolEntry> {
        self.list.iter_mut()
    }

    /// How many of them take heartbeats.
    pub(super) fn listening(&self) -> usize {
        self.listening
    }

    /// The shortest interval at which one of them expects heartbeats.
    pub(super) fn fastest(&self) -> Option<Duration> {
        self.fastest
    }

    /// Takes all of them out.
    pub(super) fn take(&mut self) -> Vec<PoolEntry> {
        std::mem::take(self).list
    }
}

impl<'a> IntoIterator for &'a Pools {
    type Item = &'a PoolEntry;
    type IntoIter = std::slice::Iter<'a, PoolEntry>;

    fn into_iter(self) -> Self::IntoIter {
        self.list.iter()
    }
}
