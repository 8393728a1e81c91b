//! What operators wanted of backends that are no longer configured.
//!
//! `leaving` notes an intent when a backend goes, `configure` and `heartbeats`
//! take it up when the same one (pool, name and address) comes back: a file that
//! is without a drained backend for a moment does not put it back into service.
//! It decides nothing and reads no clock.

use crate::health::Intent;
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the intent of a backend is kept after it left.
pub const KEPT_FOR: Duration = Duration::from_secs(600);

/// Most backends whose intents are kept after they left; beyond that the one
/// that left first is forgotten.
pub const KEPT_MAX: usize = 10_000;

/// Pool, name, address as text.
type Identity = (Arc<str>, Arc<str>, Arc<str>);

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Kept {
    by_identity: HashMap<Identity, Left>,
    /// In the order in which they left; those taken up again are still in it.
    order: VecDeque<(Instant, Identity)>,
    forgotten: u64,
}

#[derive(Debug, Clone, Copy)]
struct Left {
    intent: Intent,
    since: Instant,
    at: Instant,
}

/// What one process tells the next of one of them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SavedIntent {
    /// Of the backend.
    pub pool: String,
    /// Of the backend.
    pub name: String,
    /// As the file spelt it.
    pub address: String,
    /// Name of the intent.
    pub intent: String,
    /// Age of the intent, in milliseconds.
    pub intent_ms: u64,
    /// It left so long ago.
    pub left_ms: u64,
}

// === impl Kept ===

impl Kept {
    /// A backend leaves; `ready` needs no keeping.
    pub(super) fn keep(&mut self, who: Identity, (intent, since): (Intent, Instant), at: Instant) {
        self.expire(at);
        if intent == Intent::Ready {
            self.by_identity.remove(&who);
            return;
        }
        self.by_identity.insert(who.clone(), Left { intent, since, at });
        self.order.push_back((at, who));
        while self.order.len() > KEPT_MAX {
            let Some((at, who)) = self.order.pop_front() else { break };
            if self.drop_left_at(at, &who) {
                self.forgotten += 1;
            }
        }
    }

    /// It comes back.
    pub(super) fn take(&mut self, who: &Identity, now: Instant) -> Option<(Intent, Instant)> {
        self.expire(now);
        let left = self.by_identity.remove(who)?;
        let in_time = now.saturating_duration_since(left.at) < KEPT_FOR;
        in_time.then_some((left.intent, left.since))
    }

    /// Intents forgotten for want of room.
    #[cfg(test)]
    pub(super) fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// For another process.
    pub(super) fn save(&self, now: Instant) -> Vec<SavedIntent> {
        let ms = |then: Instant| {
            u64::try_from(now.saturating_duration_since(then).as_millis()).unwrap_or(u64::MAX)
        };
        let standing = self.order.iter().filter_map(|(at, who)| {
            let left = self.by_identity.get(who).filter(|left| left.at == *at)?;
            let (pool, name, address) = who;
            Some(SavedIntent {
                pool: pool.to_string(),
                name: name.to_string(),
                address: address.to_string(),
                intent: left.intent.name().to_owned(),
                intent_ms: ms(left.since),
                left_ms: ms(left.at),
            })
        });
        standing.collect()
    }

    fn expire(&mut self, now: Instant) {
        while let Some((at, _)) = self.order.front()
            && now.saturating_duration_since(*at) >= KEPT_FOR
        {
            let Some((at, who)) = self.order.pop_front() else { return };
            self.drop_left_at(at, &who);
        }
    }

    /// Forgets it unless it has come back and left again since.
    fn drop_left_at(&mut self, at: Instant, who: &Identity) -> bool {
        let is_it = self.by_identity.get(who).is_some_and(|left| left.at == at);
        if is_it {
            self.by_identity.remove(who);
        }
        is_it
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(name: &str) -> Identity {
        ("web".into(), name.into(), "10.0.0.1:80".into())
    }

    #[test]
    fn an_intent_is_kept_for_its_time_and_given_once() {
        let start = crate::clock::now();
        let mut kept = Kept::default();
        let drained = (Intent::Draining, start);
        kept.keep(who("a"), drained, start);
        kept.keep(who("b"), drained, start);
        kept.keep(who("c"), (Intent::Ready, start), start);
        let soon = start + KEPT_FOR - Duration::from_millis(1);
        assert_eq!(kept.take(&who("a"), soon), Some(drained));
        assert_eq!(kept.take(&who("a"), soon), None);
        assert_eq!(kept.take(&who("c"), soon), None);
        assert_eq!(kept.save(soon).len(), 1);
        assert_eq!(kept.take(&who("b"), start + KEPT_FOR), None);
    }

    #[test]
    fn no_more_intents_are_kept_than_the_bound_and_the_newest_stay() {
        let start = crate::clock::now();
        let mut kept = Kept::default();
        for number in 0..KEPT_MAX + 3 {
            kept.keep(who(&number.to_string()), (Intent::Draining, start), start);
        }
        assert_eq!((kept.by_identity.len(), kept.forgotten()), (KEPT_MAX, 3));
        assert!(kept.take(&who("2"), start).is_none() && kept.take(&who("3"), start).is_some());
    }
}
