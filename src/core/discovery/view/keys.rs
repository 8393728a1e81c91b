//! Which members an unreadable announcement can be: those that its key announced before.
//!
//! [`View`](super::View) notes the keys of each complete answer, and `removal` asks for the
//! members that an answer lacks. Nothing here decides about a removal.

use super::member::Entry;
use super::offers::canonical;
use crate::discovery::{KEY_BYTES_MAX, Unreadable, WholeSet};
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;

/// The keys of members. The key of most members is their announced name.
#[derive(Debug, Default)]
pub(super) struct MemberKeys {
    /// Other keys, by the member's address. Members that left are dropped with the next
    /// answer.
    others: BTreeMap<SocketAddr, Arc<str>>,
    /// The view was saved without its keys, and no answer since then had all members.
    unknown: bool,
}

// === impl MemberKeys ===

impl MemberKeys {
    /// Returns the keys of a saved view. `known`: it was saved with its keys.
    pub(super) fn of(
        others: impl Iterator<Item = (SocketAddr, Arc<str>)>,
        known: bool,
    ) -> MemberKeys {
        let others = others.filter(|(_, key)| key.len() <= KEY_BYTES_MAX).collect();
        MemberKeys { others, unknown: !known }
    }

    /// Returns the key of the member with this address, if it is not its announced name.
    pub(super) fn other(&self, address: SocketAddr) -> Option<&Arc<str>> {
        self.others.get(&address)
    }

    /// Whether the keys of all members are known.
    pub(super) fn are_known(&self) -> bool {
        !self.unknown
    }

    /// Whether one of the announcements was this member before.
    pub(super) fn is_among(&self, entry: &Entry, unreadable: &Unreadable) -> bool {
        let other = self.others.get(&entry.member.address);
        unreadable.has(&entry.announced) || other.is_some_and(|key| unreadable.has(key))
    }

    /// Notes the keys of an answer. Members that it lacks keep theirs.
    pub(super) fn note(&mut self, set: &WholeSet, entries: &[Entry]) {
        self.unknown &= entries.iter().any(|entry| !entry.present);
        if set.keys.is_empty() && self.others.is_empty() {
            return;
        }
        let short = set.keys.iter().filter(|(_, key)| key.len() <= KEY_BYTES_MAX);
        let listed: HashMap<SocketAddr, &Arc<str>> =
            short.map(|(address, key)| (canonical(*address), key)).collect();
        let mut former = std::mem::take(&mut self.others);
        for entry in entries {
            let address = entry.member.address;
            let key = match entry.present {
                true => listed.get(&address).map(|key| Arc::clone(key)),
                false => former.remove(&address),
            };
            self.others.extend(key.map(|key| (address, key)));
        }
    }
}
