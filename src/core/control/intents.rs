//! Operators' intents for backends that are no longer configured.
//!
//! `removal` stores the intent of a removed backend. `configure` and `members` restore it
//! when a backend with the same pool, name and address joins. So a file that lacks a
//! drained backend for a short time does not return it to rotation. This module also saves
//! and restores all intents for handovers. It reads no clock.

use super::PublishReason;
use super::backends::BackendEntry;
use super::handover::{Saved, SavedBackend, SavedPool, ago, every_backend, millis};
use super::state::ControlState;
use super::{ControlEffect, Controller};
use crate::health::Intent;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the intent of a removed backend is kept.
pub const REMOVED_INTENTS_FOR: Duration = Duration::from_secs(600);

/// Most intents of removed backends. Beyond it the oldest is dropped.
pub const REMOVED_INTENTS_MAX: usize = 10_000;

/// Pool, name, address as text.
type Identity = (Arc<str>, Arc<str>, Arc<str>);

/// See the module documentation.
#[derive(Debug, Default)]
pub(super) struct RemovedIntents {
    by_identity: HashMap<Identity, RemovedIntent>,
    /// In order of removal; includes backends that have returned.
    order: VecDeque<(Instant, Identity)>,
    forgotten: u64,
}

#[derive(Debug, Clone, Copy)]
struct RemovedIntent {
    intent: Intent,
    since: Instant,
    at: Instant,
}

/// An intent of a removed backend in a handover.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SavedIntent {
    /// Name of the pool.
    pub pool: String,
    /// Name of the backend.
    pub name: String,
    /// Address as spelled in the file.
    pub address: String,
    /// Name of the intent.
    pub intent: String,
    /// Age of the intent, in milliseconds.
    pub intent_ms: u64,
    /// Time since the removal, in milliseconds.
    pub left_ms: u64,
}

// === impl RemovedIntents ===

impl RemovedIntents {
    /// Stores the intent of a removed backend. `ready` is not stored.
    pub(super) fn keep(&mut self, key: Identity, (intent, since): (Intent, Instant), at: Instant) {
        self.expire(at);
        if intent == Intent::Ready {
            self.by_identity.remove(&key);
            return;
        }
        self.by_identity.insert(key.clone(), RemovedIntent { intent, since, at });
        self.order.push_back((at, key));
        while self.order.len() > REMOVED_INTENTS_MAX {
            let Some((at, key)) = self.order.pop_front() else { break };
            if self.drop_left_at(at, &key) {
                self.forgotten += 1;
            }
        }
    }

    /// Removes and returns the intent of a backend that joins again.
    pub(super) fn take(&mut self, key: &Identity, now: Instant) -> Option<(Intent, Instant)> {
        self.expire(now);
        let left = self.by_identity.remove(key)?;
        let in_time = now.saturating_duration_since(left.at) < REMOVED_INTENTS_FOR;
        in_time.then_some((left.intent, left.since))
    }

    /// Returns the number of intents dropped at [`REMOVED_INTENTS_MAX`].
    #[cfg(test)]
    pub(super) fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// Returns all intents for a handover.
    pub(super) fn save(&self, now: Instant) -> Vec<SavedIntent> {
        let ms = |then: Instant| {
            u64::try_from(now.saturating_duration_since(then).as_millis()).unwrap_or(u64::MAX)
        };
        let current = self.order.iter().filter_map(|(at, key)| {
            let left = self.by_identity.get(key).filter(|left| left.at == *at)?;
            let (pool, name, address) = key;
            Some(SavedIntent {
                pool: pool.to_string(),
                name: name.to_string(),
                address: address.to_string(),
                intent: left.intent.name().to_owned(),
                intent_ms: ms(left.since),
                left_ms: ms(left.at),
            })
        });
        current.collect()
    }

    /// Drops the intents of the members of a backend whose address is a name.
    pub(super) fn forget_members(&mut self, pool: &str, backend: &str) {
        let is_member =
            |name: &str| name.strip_prefix(backend).is_some_and(|rest| rest.starts_with('@'));
        self.by_identity.retain(|(of, name, _), _| **of != *pool || !is_member(name));
    }

    fn expire(&mut self, now: Instant) {
        while let Some((at, _)) = self.order.front()
            && now.saturating_duration_since(*at) >= REMOVED_INTENTS_FOR
        {
            let Some((at, key)) = self.order.pop_front() else { return };
            self.drop_left_at(at, &key);
        }
    }

    /// Drops the intent unless the backend has returned and been removed again since `at`.
    fn drop_left_at(&mut self, at: Instant, key: &Identity) -> bool {
        let is_it = self.by_identity.get(key).is_some_and(|left| left.at == at);
        if is_it {
            self.by_identity.remove(key);
        }
        is_it
    }
}

// === impl Controller ===

impl Controller {
    /// Returns only the operators' intents, of backends that are not ready.
    pub fn save_intents(&self, now: Instant) -> Saved {
        self.state.save_intents(now)
    }

    /// Applies operators' intents that another process saved with
    /// [`Controller::save_intents`]. Backends not listed become ready.
    pub fn adopt_intents(&mut self, newer: &Saved, now: Instant) -> Vec<ControlEffect> {
        self.run_due(now);
        let left = newer.removed_intents.iter().map(|one| [&*one.pool, &*one.name, &*one.address]);
        let wanted: HashSet<[&str; 3]> = every_backend(newer).map(identity).chain(left).collect();
        let own = self.state.save_intents(now);
        let back = every_backend(&own).filter(|one| !wanted.contains(&identity(*one)));
        let back = back.map(|one| (one, Some(Intent::Ready)));
        let saved = every_backend(newer).map(|one| (one, Intent::named(&one.1.intent)));
        for ((pool, backend), intent) in saved.chain(back) {
            if self.state.adopt_saved_group(&pool.name, backend, intent, now) {
                continue;
            }
            let Some(id) = self.state.find_saved(&pool.name, &backend.name, &backend.address)
            else {
                self.state.keep_intent(pool, backend, now);
                continue;
            };
            let known = self.state.backends.get(id).map(|entry| entry.health.intent);
            if let Some(intent) = intent.filter(|wanted| known != Some(*wanted)) {
                self.state.change_intent(id, intent, now);
                let entry = self.state.backends.touch(id);
                if let Some(entry) = entry.filter(|_| intent != Intent::Ready) {
                    entry.health.intent_since = ago(now, backend.intent_ms);
                }
                self.state.pending.cause = Some(PublishReason::Operator);
            }
        }
        for left in &newer.removed_intents {
            self.state.adopt_intent(left, now);
        }
        self.finish(now)
    }
}

// === impl ControlState ===

impl ControlState {
    /// Returns the intents of backends that are not ready.
    fn save_intents(&self, now: Instant) -> Saved {
        let save = |entry: &BackendEntry| SavedBackend {
            name: entry.state.name.to_string(),
            address: entry.state.address_text.to_string(),
            intent: entry.health.intent.name().to_owned(),
            intent_ms: millis(now.saturating_duration_since(entry.health.intent_since)),
            ..SavedBackend::default()
        };
        let not_ready = self.backends.iter().filter(|it| it.health.intent != Intent::Ready);
        let mut pools: BTreeMap<usize, Vec<SavedBackend>> = BTreeMap::new();
        for entry in not_ready {
            if let Some(place) = self.pools.place(entry.pool) {
                pools.entry(place).or_default().push(save(entry));
            }
        }
        for (place, pool) in (0..).zip(&self.pools) {
            let mut groups = self.save_groups(&pool.spec.name, now);
            groups.retain(|group| group.intent != Intent::Ready.name());
            if !groups.is_empty() {
                pools.entry(place).or_default().extend(groups);
            }
        }
        let named = |(place, backends): (usize, _)| {
            let name =
                self.pools.at(place).map(|pool| pool.spec.name.to_string()).unwrap_or_default();
            SavedPool { name, backends, ..SavedPool::default() }
        };
        Saved {
            pools: pools.into_iter().map(named).collect(),
            removed_intents: self.removed.intents.save(now),
            ..Saved::default()
        }
    }

    /// Stores the intent of a backend that this configuration lacks.
    pub(super) fn keep_intent(&mut self, pool: &SavedPool, backend: &SavedBackend, now: Instant) {
        let Some(intent) = Intent::named(&backend.intent) else { return };
        let key = (pool.name.as_str().into(), backend.name.as_str().into());
        let wanted = (intent, ago(now, backend.intent_ms));
        self.removed.intents.keep((key.0, key.1, backend.address.as_str().into()), wanted, now);
    }

    /// Applies the intent of a backend that was removed in the other process.
    pub(super) fn adopt_intent(&mut self, left: &SavedIntent, now: Instant) {
        let Some(intent) = Intent::named(&left.intent) else { return };
        let since = ago(now, left.intent_ms);
        let names = (&*left.name, &*left.address);
        if self.adopt_group(&left.pool, names, (intent, left.intent_ms), now) {
            return;
        }
        match self.find_saved(&left.pool, &left.name, &left.address) {
            Some(id) => {
                // The backend joined again during the upgrade.
                if let Some(entry) = self.backends.touch(id)
                    && entry.health.intent == Intent::Ready
                {
                    (entry.health.intent, entry.health.intent_since) = (intent, since);
                }
            }
            None => {
                let [pool, name, address] =
                    [&left.pool, &left.name, &left.address].map(|text| text.as_str().into());
                let at = ago(now, left.left_ms);
                self.removed.intents.keep((pool, name, address), (intent, since), at);
            }
        }
    }
}

fn identity<'s>((pool, backend): (&'s SavedPool, &'s SavedBackend)) -> [&'s str; 3] {
    [&pool.name, &backend.name, &backend.address]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Identity {
        ("web".into(), name.into(), "10.0.0.1:80".into())
    }

    #[test]
    fn intent_is_kept_for_ten_minutes_and_restored_once() {
        let start = tidegate_net::clock::now();
        let mut intents = RemovedIntents::default();
        let drained = (Intent::Draining, start);
        intents.keep(key("a"), drained, start);
        intents.keep(key("b"), drained, start);
        intents.keep(key("c"), (Intent::Ready, start), start);
        let soon = start + REMOVED_INTENTS_FOR - Duration::from_millis(1);
        assert_eq!(intents.take(&key("a"), soon), Some(drained));
        assert_eq!(intents.take(&key("a"), soon), None);
        assert_eq!(intents.take(&key("c"), soon), None);
        assert_eq!(intents.save(soon).len(), 1);
        assert_eq!(intents.take(&key("b"), start + REMOVED_INTENTS_FOR), None);
    }

    #[test]
    fn oldest_intents_are_dropped_at_the_bound() {
        let start = tidegate_net::clock::now();
        let mut intents = RemovedIntents::default();
        for number in 0..REMOVED_INTENTS_MAX + 3 {
            intents.keep(key(&number.to_string()), (Intent::Draining, start), start);
        }
        assert_eq!((intents.by_identity.len(), intents.forgotten()), (REMOVED_INTENTS_MAX, 3));
        assert!(
            intents.take(&key("2"), start).is_none() && intents.take(&key("3"), start).is_some()
        );
    }
}
