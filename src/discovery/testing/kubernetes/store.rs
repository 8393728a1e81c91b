//! The objects of the Kubernetes double with their history.
//!
//! Each write has its own version, as in etcd. A list is a snapshot of one version, and a
//! watch replays the history after a version, as long as the history was not compacted.

use super::objects::SliceDocument;
use std::collections::BTreeMap;

/// A write.
#[derive(Debug, Clone)]
pub(super) struct SliceWrite {
    pub(super) version: u64,
    /// `ADDED`, `MODIFIED` or `DELETED`.
    pub(super) kind: &'static str,
    /// The new state; for a removal the last one, with the version of the removal.
    pub(super) slice: SliceDocument,
}

/// All writes.
#[derive(Debug)]
pub(super) struct SliceStore {
    writes: Vec<SliceWrite>,
    version: u64,
    /// Watches from before this version are refused.
    oldest: u64,
}

type SliceKey = (String, String);

// === impl SliceStore ===

impl SliceStore {
    pub(super) fn new() -> SliceStore {
        SliceStore { writes: Vec::new(), version: 100, oldest: 0 }
    }

    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// Continues at an older version with no history, as after a restored backup.
    pub(super) fn restore(&mut self, version: u64) {
        self.writes.clear();
        (self.version, self.oldest) = (version, version);
    }

    /// Forgets the history up to now.
    pub(super) fn compact(&mut self) {
        // Versions are shared by all objects of a cluster.
        self.version += 1;
        self.oldest = self.version;
    }

    pub(super) fn is_compacted(&self, version: u64) -> bool {
        version < self.oldest
    }

    pub(super) fn oldest(&self) -> u64 {
        self.oldest
    }

    pub(super) fn put(&mut self, slice: SliceDocument) {
        let exists = self.snapshot(self.version).contains_key(&key(&slice));
        self.write(if exists { "MODIFIED" } else { "ADDED" }, slice);
    }

    pub(super) fn delete(&mut self, namespace: &str, name: &str) {
        let key = (namespace.to_owned(), name.to_owned());
        if let Some(slice) = self.snapshot(self.version).remove(&key) {
            self.write("DELETED", slice);
        }
    }

    fn write(&mut self, kind: &'static str, mut slice: SliceDocument) {
        self.version += 1;
        slice.metadata.resource_version = self.version.to_string();
        self.writes.push(SliceWrite { version: self.version, kind, slice });
    }

    /// Returns the objects of a version.
    pub(super) fn snapshot(&self, version: u64) -> BTreeMap<SliceKey, SliceDocument> {
        let mut objects = BTreeMap::new();
        for write in self.writes.iter().take_while(|write| write.version <= version) {
            if write.kind == "DELETED" {
                objects.remove(&key(&write.slice));
            } else {
                objects.insert(key(&write.slice), write.slice.clone());
            }
        }
        objects
    }

    /// Returns the writes after a version.
    pub(super) fn after(&self, version: u64) -> Vec<SliceWrite> {
        let from = self.writes.partition_point(|write| write.version <= version);
        self.writes[from..].to_vec()
    }
}

fn key(slice: &SliceDocument) -> SliceKey {
    (slice.metadata.namespace.clone(), slice.metadata.name.clone())
}
