//! The way from a source to the control loop: one newest-only slot per question.
//!
//! Sources call [`Teller::tell`]; the control loop awaits [`Answers::arrived`] and calls
//! [`Answers::take`]. A set that was not taken is replaced by a newer one, so a source with
//! 1,000 changes per second costs one slot. Nothing here waits for the control loop.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tidegate_core::discovery::{SourceFailure, Told};
use tidegate_core::model::SourceKey;
use tidegate_net::clock;
use tokio::sync::Notify;

/// Receives the answers of all sources.
#[derive(Debug, Clone, Default)]
pub struct Answers(Arc<AnswerSlots>);

/// Where one source puts its answers.
#[derive(Debug, Clone)]
pub struct Teller {
    key: SourceKey,
    /// Answers to an older question with the same key are dropped.
    question: u64,
    slots: Arc<AnswerSlots>,
    counters: Arc<SourceCounters>,
}

/// Counters of one source; they continue over reloads that keep its question.
#[derive(Debug, Default)]
pub struct SourceCounters {
    /// Watches that began again.
    pub watch_restarts: AtomicU64,
    /// Complete lists after the first.
    pub relists: AtomicU64,
    /// Panics of the source. It restarts after each.
    pub panics: AtomicU64,
    failures: [AtomicU64; SourceFailure::ALL.len()],
}

/// An answer, and when it arrived.
#[derive(Debug)]
pub struct SourceAnswer {
    /// The source.
    pub key: SourceKey,
    /// What it told.
    pub told: Told,
    /// Arrival.
    pub at: Instant,
}

#[derive(Debug, Default)]
struct AnswerSlots {
    waiting: Mutex<BTreeMap<SourceKey, WaitingAnswer>>,
    /// Tellers so far. Each has a number of its own.
    questions: AtomicU64,
    arrived: Notify,
}

#[derive(Debug)]
struct WaitingAnswer {
    question: u64,
    /// The newest set that was not taken.
    whole: Option<(Told, Instant)>,
    /// The newest failure or sign of life after it.
    other: Option<(Told, Instant)>,
}

// === impl Answers ===

impl Answers {
    /// Returns the teller for a question. Answers of older tellers with the same key are
    /// dropped from now on, also those of a thread that has not ended yet.
    pub fn teller(&self, key: SourceKey, counters: Arc<SourceCounters>) -> Teller {
        let question = self.0.questions.fetch_add(1, Ordering::Relaxed);
        let empty = WaitingAnswer { question, whole: None, other: None };
        self.0.lock().insert(key.clone(), empty);
        Teller { key, question, slots: Arc::clone(&self.0), counters }
    }

    /// Drops the slot of a source that is no longer asked.
    pub fn forget(&self, key: &SourceKey) {
        self.0.lock().remove(key);
    }

    /// Waits for an answer. Dropping the future loses none.
    pub async fn arrived(&self) {
        self.0.arrived.notified().await;
    }

    /// Takes all answers. A set precedes a later failure of the same source.
    pub fn take(&self) -> Vec<SourceAnswer> {
        let mut answers = Vec::new();
        for (key, waiting) in self.0.lock().iter_mut() {
            for (told, at) in waiting.whole.take().into_iter().chain(waiting.other.take()) {
                answers.push(SourceAnswer { key: key.clone(), told, at });
            }
        }
        answers
    }
}

// === impl Teller ===

impl Teller {
    /// Puts an answer into the slot. A complete set replaces everything that waits; a
    /// failure or a sign of life replaces only its like.
    pub fn tell(&self, told: Told) {
        if let Told::Failed { why, .. } = &told {
            self.counters.failures[*why as usize].fetch_add(1, Ordering::Relaxed);
        }
        let now = clock::now();
        let mut slots = self.slots.lock();
        let Some(waiting) = slots.get_mut(&self.key) else { return };
        if waiting.question != self.question {
            return;
        }
        match told {
            Told::Whole(_) => {
                (waiting.whole, waiting.other) = (Some((told, now)), None);
            }
            Told::Failed { .. } | Told::Alive => waiting.other = Some((told, now)),
        }
        drop(slots);
        self.slots.arrived.notify_one();
    }

    /// The source's counters.
    pub fn counters(&self) -> &SourceCounters {
        &self.counters
    }

    /// The source.
    pub fn key(&self) -> &SourceKey {
        &self.key
    }
}

// === impl SourceCounters ===

impl SourceCounters {
    /// Returns the failures for this reason.
    pub fn failures(&self, why: SourceFailure) -> u64 {
        self.failures[why as usize].load(Ordering::Relaxed)
    }
}

// === impl AnswerSlots ===

impl AnswerSlots {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<SourceKey, WaitingAnswer>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_core::discovery::{Unreadable, WholeSet};

    fn key() -> SourceKey {
        SourceKey { pool: "web".into(), backend: None }
    }

    fn whole(version: &str) -> Told {
        let version = version.to_owned();
        Told::Whole(WholeSet {
            members: [].into(),
            version,
            trusted: true,
            unreadable: Unreadable::default(),
            keys: [].into(),
        })
    }

    fn versions(answers: &Answers) -> Vec<String> {
        let of = |answer: SourceAnswer| match answer.told {
            Told::Whole(set) => set.version,
            Told::Failed { why, .. } => why.to_string(),
            Told::Alive => "alive".to_owned(),
        };
        answers.take().into_iter().map(of).collect()
    }

    #[test]
    fn a_slot_keeps_the_newest_set_and_the_newest_failure_after_it() {
        let answers = Answers::default();
        let teller = answers.teller(key(), Arc::default());
        let failed = Told::Failed { why: SourceFailure::Timeout, detail: String::new() };
        teller.tell(whole("1"));
        teller.tell(failed.clone());
        teller.tell(whole("2"));
        teller.tell(failed);
        teller.tell(Told::Alive);
        assert_eq!(versions(&answers), ["2", "alive"]);
        assert!(versions(&answers).is_empty());
        assert_eq!(teller.counters().failures(SourceFailure::Timeout), 2);
    }

    #[test]
    fn answers_to_an_older_question_are_dropped() {
        let answers = Answers::default();
        let old = answers.teller(key(), Arc::default());
        let new = answers.teller(key(), Arc::default());
        old.tell(whole("old"));
        assert!(versions(&answers).is_empty());
        new.tell(whole("new"));
        assert_eq!(versions(&answers), ["new"]);
        answers.forget(&key());
        new.tell(whole("late"));
        assert!(versions(&answers).is_empty());
    }
}
