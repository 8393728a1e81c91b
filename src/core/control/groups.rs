//! Operators' intents for backends whose address is a name: one intent for all members.
//!
//! Called by the controller for requests about such a backend, by `members` when a member
//! joins, by `configure`, and by `handover` and `intents` in both processes. While the
//! configuration has the backend, its intent is kept here; afterwards for a time with those
//! of removed backends. This module changes no member by itself except on a request.

use super::OperatorError;
use super::backends::BackendEntry;
use super::handover::{SavedBackend, ago, millis};
use super::state::ControlState;
use crate::health::Intent;
use crate::model::Config;
use crate::table::state::BackendId;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

/// Pool and name of the backend.
type GroupKey = (Arc<str>, Arc<str>);

/// See the module documentation.
#[derive(Debug, Default)]
pub(super) struct GroupIntents {
    groups: BTreeMap<GroupKey, GroupIntent>,
}

#[derive(Debug)]
struct GroupIntent {
    /// The name as the file spells it.
    address: Arc<str>,
    intent: Intent,
    since: Instant,
}

// === impl ControlState ===

impl ControlState {
    /// Follows the names of a configuration.
    pub(super) fn configure_groups(&mut self, config: &Config, now: Instant) {
        let mut before = std::mem::take(&mut self.groups.groups);
        for pool in &config.pools {
            for named in &pool.named {
                let key = (Arc::clone(&pool.name), Arc::clone(&named.name));
                let address: Arc<str> = named.question.to_string().into();
                let kept = before.remove(&key).filter(|group| group.address == address);
                let group = kept.unwrap_or_else(|| {
                    let identity = (Arc::clone(&key.0), Arc::clone(&key.1), Arc::clone(&address));
                    let left = self.removed.intents.take(&identity, now);
                    let (intent, since) = left.unwrap_or((Intent::Ready, now));
                    GroupIntent { address, intent, since }
                });
                self.groups.groups.insert(key, group);
            }
        }
        for ((pool, name), group) in before {
            let wanted = (group.intent, group.since);
            self.removed.intents.keep((pool, name, group.address), wanted, now);
        }
    }

    /// Returns the backend with this name, or all members of a backend whose address is a
    /// name.
    pub(super) fn find_backends(
        &self,
        pool: &str,
        backend: &str,
    ) -> Result<Vec<BackendId>, OperatorError> {
        match self.group_members(pool, backend) {
            Some(members) => Ok(members),
            None => self.find_backend(pool, backend).map(|id| vec![id]),
        }
    }

    /// Returns the members of a backend whose address is a name; `None` if there is no such
    /// backend.
    pub(super) fn group_members(&self, pool: &str, backend: &str) -> Option<Vec<BackendId>> {
        let entry = self.pools.named(pool)?;
        if !self.groups.groups.contains_key(&(pool.into(), backend.into())) {
            return None;
        }
        let members = entry.members().iter().copied();
        let of_group = |id: &BackendId| {
            let entry = self.backends.get(*id);
            entry.and_then(|entry| entry.group.as_deref()) == Some(backend)
        };
        Some(members.filter(of_group).collect())
    }

    /// Returns the names of these backends.
    pub(super) fn names_of_members(&self, ids: &[BackendId]) -> Vec<Arc<str>> {
        let entries = ids.iter().filter_map(|id| self.backends.get(*id));
        entries.map(|entry| Arc::clone(&entry.state.name)).collect()
    }

    /// Sets the intent of a backend whose address is a name. Returns whether there is such
    /// a backend.
    pub(super) fn change_group(
        &mut self,
        pool: &str,
        backend: &str,
        intent: Intent,
        since: Instant,
    ) -> bool {
        let Some(group) = self.groups.groups.get_mut(&(pool.into(), backend.into())) else {
            return false;
        };
        if group.intent != intent {
            (group.intent, group.since) = (intent, since);
        }
        if intent == Intent::Ready {
            // Members that return must not bring back what is revoked.
            self.removed.intents.forget_members(pool, backend);
        }
        true
    }

    /// Applies the intent of its group to a member that joins.
    pub(super) fn take_group_intent(&self, entry: &mut BackendEntry) {
        let Some(name) = &entry.group else { return };
        let key = (Arc::clone(&entry.state.pool), Arc::clone(name));
        if let Some(group) = self.groups.groups.get(&key)
            && entry.health.intent == Intent::Ready
            && group.intent != Intent::Ready
        {
            entry.health.intent = group.intent;
            entry.health.intent_since = group.since;
        }
    }

    /// Returns the intents of a pool's groups, for a handover.
    pub(super) fn save_groups(&self, pool: &str, now: Instant) -> Vec<SavedBackend> {
        let groups = self.groups.groups.iter().filter(|((of, _), _)| **of == *pool);
        let saved = groups.map(|((_, name), group)| SavedBackend {
            name: name.to_string(),
            address: group.address.to_string(),
            intent: group.intent.name().to_owned(),
            intent_ms: millis(now.saturating_duration_since(group.since)),
            ..SavedBackend::default()
        });
        saved.collect()
    }

    /// Applies the saved intent of a group. Returns false if the saved backend is no group
    /// of the configuration.
    pub(super) fn adopt_saved_group(
        &mut self,
        pool: &str,
        saved: &SavedBackend,
        intent: Option<Intent>,
        now: Instant,
    ) -> bool {
        let names = (&*saved.name, &*saved.address);
        let wanted = (intent.unwrap_or(Intent::Ready), saved.intent_ms);
        self.adopt_group(pool, names, wanted, now)
    }

    /// As [`ControlState::adopt_saved_group`], by the names and the age of the intent in
    /// milliseconds.
    pub(super) fn adopt_group(
        &mut self,
        pool: &str,
        (name, address): (&str, &str),
        (intent, age): (Intent, u64),
        now: Instant,
    ) -> bool {
        let found = self.groups.groups.get(&(pool.into(), name.into()));
        if found.is_none_or(|group| *group.address != *address) {
            return false;
        }
        self.change_group(pool, name, intent, ago(now, age))
    }
}
