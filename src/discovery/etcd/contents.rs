//! What the store has below one prefix, as far as it was read.
//!
//! The follower replaces the contents with each list and applies the events of the watch.
//! Each returns whether the set of members changed. Nothing here does I/O.

use super::codec::{KeyValue, StoreEventKind, WatchEvent};
use crate::listing::{LISTED_NAME_BYTES_MAX, ListedAddress, ListedLabels, ListedState};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::num::NonZeroU16;
use std::sync::Arc;
use tidegate_core::control::MEMBERS_MAX;
use tidegate_core::discovery::{Announced, WholeSet};

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
        let mut changed = false;
        for WatchEvent { kind, kv } in events {
            let key = kv.key.0.into_boxed_slice();
            if !key.starts_with(self.prefix.as_bytes()) {
                continue;
            }
            self.advance(kv.mod_revision);
            let before = self.entries.remove(&key);
            match kind {
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
        self.count = self.entries.len() as i64;
        while self.entries.len() > MEMBERS_MAX {
            self.entries.pop_last();
        }
        changed
    }

    /// Notes that the server reported no other change up to `revision`.
    pub(super) fn advance(&mut self, revision: i64) {
        self.revision = self.revision.max(revision);
    }

    /// Returns all members.
    pub(super) fn whole(&self, trusted: bool) -> WholeSet {
        let members = self.entries.values().filter_map(|entry| entry.announced.clone());
        let unread = self.entries.values().filter(|entry| !entry.readable).count();
        let beyond = (self.count - self.entries.len() as i64).max(0);
        WholeSet {
            members: members.take(MEMBERS_MAX).collect(),
            version: format!("revision {}", self.revision),
            trusted,
            unreadable: u32::try_from(unread as i64 + beyond).unwrap_or(u32::MAX),
        }
    }

    /// Reads a value. Returns the entry and whether it differs from the one before.
    fn read(&self, key: &[u8], value: &[u8], before: Option<PrefixEntry>) -> (PrefixEntry, bool) {
        let rest = &key[self.prefix.len().min(key.len())..];
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

/// An entry's value.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredMember {
    address: ListedAddress,
    weight: Option<NonZeroU16>,
    #[serde(default)]
    state: ListedState,
    #[serde(default)]
    backup: bool,
    /// For people and other programs.
    #[serde(default, rename = "labels")]
    _labels: ListedLabels,
}

/// Reads an entry. Its name is the key without the prefix.
fn member(name: &[u8], value: &[u8]) -> Option<Announced> {
    let name = std::str::from_utf8(name).ok()?;
    let unfit = |c: char| c.is_control() || c.is_whitespace() || c == '/';
    if name.len() > LISTED_NAME_BYTES_MAX || name.contains(unfit) {
        return None;
    }
    let value: StoredMember = serde_json::from_slice(value).ok()?;
    let (wish, raw) = value.state.wish();
    Some(Announced {
        name: name.into(),
        address: value.address.get(),
        weight: value.weight.map(NonZeroU16::get),
        backup: value.backup,
        wish,
        raw,
    })
}
