//! What the store has below one prefix, as far as it was read.
//!
//! The follower replaces the contents with each list and applies the events of the watch.
//! Each returns whether the set of members changed. Nothing here does I/O.

use super::codec::{KeyValue, StoreEventKind, WatchEvent};
use crate::listing::decode_member;
use std::collections::BTreeMap;
use std::sync::Arc;
use tidegate_core::control::MEMBERS_MAX;
use tidegate_core::discovery::{Announced, Unreadable, WholeSet};

/// The entries below a prefix.
#[derive(Debug)]
pub(super) struct PrefixContents {
    prefix: Arc<str>,
    /// By the whole key.
    entries: BTreeMap<Box<[u8]>, PrefixEntry>,
    /// Entries at the server. More than in `entries` if there are too many.
    count: i64,
    /// Everything up to this revision is in `entries`.
    revision: i64,
}

/// An entry and what it announces.
#[derive(Debug, PartialEq, Eq)]
struct PrefixEntry {
    /// An unreadable value keeps the announcement of the value before.
    announced: Option<Announced>,
    readable: bool,
}

// === impl PrefixContents ===

impl PrefixContents {
    /// Nothing was read yet.
    pub(super) fn new(prefix: Arc<str>) -> PrefixContents {
        PrefixContents { prefix, entries: BTreeMap::new(), count: 0, revision: 0 }
    }

    /// The prefix.
    pub(super) fn prefix(&self) -> &Arc<str> {
        &self.prefix
    }

    /// Everything up to this revision is known.
    pub(super) fn revision(&self) -> i64 {
        self.revision
    }

    /// Entries at the server, also those without a member.
    pub(super) fn count(&self) -> i64 {
        self.count
    }

    /// Whether the server has more entries than a set can have. Events cannot be applied
    /// then: the entries after the last known one are not known.
    pub(super) fn is_cut(&self) -> bool {
        self.count > self.entries.len() as i64
    }

    /// Takes a list of all entries at `revision`. `count` is the number at the server.
    /// Returns whether the members changed.
    pub(super) fn replace(&mut self, listed: Vec<KeyValue>, count: i64, revision: i64) -> bool {
        let mut former = std::mem::take(&mut self.entries);
        let mut changed = false;
        let mut entries = Vec::with_capacity(listed.len().min(MEMBERS_MAX));
        for entry in listed.into_iter().take(MEMBERS_MAX) {
            let key = entry.key.0.into_boxed_slice();
            let before = former.remove(&key);
            let (now, differs) = self.read(&key, &entry.value.0, before);
            changed |= differs;
            entries.push((key, now));
        }
        // A map that is built at once has full nodes.
        self.entries = entries.into_iter().collect();
        changed |= former.values().any(|gone| gone.announced.is_some() || !gone.readable);
        self.count = count.max(self.entries.len() as i64);
        self.revision = revision;
        changed
    }

    /// Applies the events of a message in their order. Returns whether the members changed.
    /// Entries beyond [`MEMBERS_MAX`] are counted and not kept.
    pub(super) fn apply(&mut self, events: Vec<WatchEvent>) -> bool {
        let (mut changed, mut beyond) = (false, 0);
        for WatchEvent { kind, kv } in events {
            let key = kv.key.0.into_boxed_slice();
            if !key.starts_with(self.prefix.as_bytes()) {
                continue;
            }
            self.advance(kv.mod_revision);
            let before = self.entries.remove(&key);
            match kind {
                // The next message finds the contents cut, and the prefix is listed again.
                StoreEventKind::Put if before.is_none() && self.entries.len() >= MEMBERS_MAX => {
                    (changed, beyond) = (true, beyond + 1);
                }
                StoreEventKind::Put => {
                    let (now, differs) = self.read(&key, &kv.value.0, before);
                    changed |= differs;
                    self.entries.insert(key, now);
                }
                StoreEventKind::Delete => {
                    changed |=
                        before.is_some_and(|gone| gone.announced.is_some() || !gone.readable);
                }
            }
        }
        self.count = self.entries.len() as i64 + beyond;
        changed
    }

    /// Notes that the server reported no other change up to `revision`.
    pub(super) fn advance(&mut self, revision: i64) {
        self.revision = self.revision.max(revision);
    }

    /// Returns all members.
    pub(super) fn whole(&self, trusted: bool) -> WholeSet {
        let members = self.entries.values().filter_map(|entry| entry.announced.clone());
        let beyond = self.count.saturating_sub(self.entries.len() as i64).max(0);
        let mut unreadable = Unreadable::unnamed(u32::try_from(beyond).unwrap_or(u32::MAX));
        let mut keys = Vec::new();
        for (key, entry) in &self.entries {
            let key = std::str::from_utf8(self.rest(key)).ok();
            match (entry.readable, key) {
                (true, _) => {}
                (false, Some(key)) => unreadable.add(key),
                (false, None) => unreadable.add_unnamed(1),
            }
            let other =
                entry.announced.as_ref().zip(key).filter(|(member, key)| *member.name != **key);
            keys.extend(other.map(|(member, key)| (member.address, key.into())));
        }
        WholeSet {
            members: members.take(MEMBERS_MAX).collect(),
            version: format!("revision {}", self.revision),
            trusted,
            unreadable,
            keys: keys.into(),
        }
    }

    /// Returns the key without the prefix.
    fn rest<'k>(&self, key: &'k [u8]) -> &'k [u8] {
        &key[self.prefix.len().min(key.len())..]
    }

    /// Reads a value. Returns the entry and whether it differs from the one before.
    fn read(&self, key: &[u8], value: &[u8], before: Option<PrefixEntry>) -> (PrefixEntry, bool) {
        let rest = self.rest(key);
        // Some tools put an empty entry at the prefix itself, as a directory.
        if rest.is_empty() {
            return (PrefixEntry { announced: None, readable: true }, false);
        }
        let now = match member(rest, value) {
            Some(announced) => PrefixEntry { announced: Some(announced), readable: true },
            None => PrefixEntry {
                announced: before.as_ref().and_then(|before| before.announced.clone()),
                readable: false,
            },
        };
        let differs = before.is_none_or(|before| before != now);
        (now, differs)
    }
}

/// Reads an entry. Its name is the key without the prefix, or `name` in the value.
fn member(name: &[u8], value: &[u8]) -> Option<Announced> {
    decode_member(value, std::str::from_utf8(name).ok()?).ok()
}
