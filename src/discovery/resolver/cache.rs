//! The answers of the resolver by question: kept for their TTL, and asked once at a time.
//!
//! The resolver calls it with its lock held. Nothing here asks a server.

use super::ResolveFailure;
use super::wire::{RecordQuestion, RecordSet};
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::discovery::SourceFailure;
use tidegate_core::model::DnsConfig;
use tidegate_net::clock;
use tokio::sync::watch;

/// Most questions in the cache. A further one fails until others are forgotten.
const QUESTIONS_MAX: usize = 65_536;
/// A question that nothing asked for this time, plus twice `ttl_max`, is forgotten.
const FORGET_AFTER: Duration = Duration::from_secs(60);
/// Pauses after a first, second, ... answer without records, or failure, in a row.
const PAUSES: [Duration; 4] = [
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
    Duration::from_secs(5),
];
/// Most that is added to a TTL, so that names with one TTL are not all asked at one time.
const SPREAD_MAX: Duration = Duration::from_millis(500);
/// Answers become due at multiples of a step: 1/20 of the TTL within these bounds. Names that
/// are due together cost one wake-up of the thread and one socket.
const DUE_STEP_MIN: Duration = Duration::from_millis(50);
const DUE_STEP_MAX: Duration = Duration::from_millis(250);

/// What is known about one question.
#[derive(Debug, Clone)]
pub(super) struct RecordAnswer {
    pub(super) outcome: RecordOutcome,
    /// Start of the exchange.
    pub(super) asked: Instant,
    /// The question is not repeated before.
    pub(super) until: Instant,
    /// The last records: those of `outcome`, and with a failure those before it. `None`: not
    /// known since the start, or a first answer without records has come.
    pub(super) known: Option<Arc<RecordSet>>,
}

/// How a question ended.
#[derive(Debug, Clone)]
pub(super) enum RecordOutcome {
    /// At least one record.
    Records(Arc<RecordSet>),
    /// The name exists without such records (NODATA).
    Nothing,
    /// The name does not exist (NXDOMAIN).
    NoName,
    /// No server knows.
    Failed(ResolveFailure),
}

/// An answer now or later. Dropping it does not end the question.
#[derive(Debug)]
pub(super) enum PendingAnswer {
    Known(Arc<RecordAnswer>),
    Asked(AnswerWatch),
}

pub(super) type AnswerWatch = watch::Receiver<Option<Arc<RecordAnswer>>>;
pub(super) type AnswerSlot = watch::Sender<Option<Arc<RecordAnswer>>>;

#[derive(Debug, Default)]
pub(super) struct AnswerCache {
    entries: HashMap<RecordQuestion, CachedAnswer>,
    pruned: Option<Instant>,
    /// The time of the oldest answer; the steps count from it.
    origin: Option<Instant>,
}

#[derive(Debug)]
struct CachedAnswer {
    answer: Option<Arc<RecordAnswer>>,
    /// The exchange that is on its way.
    asked: Option<AnswerWatch>,
    /// Answers without records, and failures, in a row.
    vain: usize,
    used: Instant,
}

// === impl AnswerCache ===

impl AnswerCache {
    /// Returns the answer to a question. With a slot the caller must ask and then call
    /// [`AnswerCache::put`]. An answer from before `newer_than` does not count.
    pub(super) fn find(
        &mut self,
        question: &RecordQuestion,
        newer_than: Option<Instant>,
        now: Instant,
        ttl_max: Duration,
    ) -> (PendingAnswer, Option<AnswerSlot>) {
        if !self.entries.contains_key(question) && !self.make_space(now, ttl_max) {
            let detail = format!("cannot resolve {question}: {QUESTIONS_MAX} names are in use");
            let failed = RecordAnswer::failed(SourceFailure::Local, detail, now);
            return (PendingAnswer::Known(failed), None);
        }
        let entry = self.entries.entry(question.clone()).or_insert_with(|| CachedAnswer::new(now));
        entry.used = now;
        if let Some(answer) = &entry.answer {
            let is_new = newer_than.is_none_or(|time| answer.asked > time);
            if now < answer.until && is_new {
                return (PendingAnswer::Known(Arc::clone(answer)), None);
            }
        }
        // A sender that is gone means that its task panicked.
        let asked = entry.asked.as_ref().filter(|asked| asked.has_changed().is_ok());
        if let Some(asked) = asked {
            return (PendingAnswer::Asked(asked.clone()), None);
        }
        let (slot, asked) = watch::channel(None);
        entry.asked = Some(asked.clone());
        (PendingAnswer::Asked(asked), Some(slot))
    }

    /// Stores how a question ended, and returns the answer for those that wait.
    pub(super) fn put(
        &mut self,
        question: &RecordQuestion,
        outcome: RecordOutcome,
        asked: Instant,
        now: Instant,
        config: &DnsConfig,
    ) -> Arc<RecordAnswer> {
        let origin = *self.origin.get_or_insert(now);
        let entry = self.entries.entry(question.clone()).or_insert_with(|| CachedAnswer::new(now));
        entry.asked = None;
        let before = entry.answer.take().and_then(|answer| answer.known.clone());
        let known = match &outcome {
            RecordOutcome::Records(set) => Some(Arc::clone(set)),
            RecordOutcome::Failed(_) => before,
            // Records are forgotten by the second answer without them: the first can be an
            // error of the server, and its records must not count as removed.
            _ if before.is_some_and(|set| !set.addresses.is_empty()) => None,
            _ => Some(Arc::default()),
        };
        let until = match &outcome {
            RecordOutcome::Records(set) => {
                entry.vain = 0;
                let ttl = set.ttl.clamp(config.ttl_min, config.ttl_max.max(config.ttl_min));
                let spread = (ttl / 20).min(SPREAD_MAX).mul_f64(fastrand::f64());
                next_step(origin, now + ttl + spread, ttl / 20)
            }
            _ => {
                entry.vain += 1;
                // The pause includes the time that the servers did not answer.
                (asked + PAUSES[(entry.vain - 1).min(PAUSES.len() - 1)]).max(now + PAUSES[0])
            }
        };
        let answer = Arc::new(RecordAnswer { outcome, asked, until, known });
        entry.answer = Some(Arc::clone(&answer));
        answer
    }

    /// Returns the number of questions.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Returns the last known addresses.
    pub(super) fn known(&self, question: &RecordQuestion) -> Vec<IpAddr> {
        let answer = self.entries.get(question).and_then(|entry| entry.answer.as_ref());
        let known = answer.and_then(|answer| answer.known.as_ref());
        known.map_or_else(Vec::new, |set| set.addresses.clone())
    }

    /// Makes every answer due.
    pub(super) fn expire(&mut self, now: Instant) {
        for entry in self.entries.values_mut() {
            if let Some(answer) = &mut entry.answer {
                let until = answer.until.min(now);
                Arc::make_mut(answer).until = until;
            }
        }
    }

    /// Forgets questions that are no longer asked. Returns whether one more fits.
    fn make_space(&mut self, now: Instant, ttl_max: Duration) -> bool {
        let rested = self.pruned.is_none_or(|at| now.saturating_duration_since(at) > FORGET_AFTER);
        if rested {
            self.pruned = Some(now);
            let unused = 2 * ttl_max + FORGET_AFTER;
            self.entries.retain(|_, entry| now.saturating_duration_since(entry.used) < unused);
        }
        self.entries.len() < QUESTIONS_MAX
    }
}

/// Returns the first multiple of `step` since `origin` at or after `at`.
fn next_step(origin: Instant, at: Instant, step: Duration) -> Instant {
    let step = step.clamp(DUE_STEP_MIN, DUE_STEP_MAX);
    let since = at.saturating_duration_since(origin);
    let steps = since.as_nanos().div_ceil(step.as_nanos());
    origin + step.saturating_mul(u32::try_from(steps).unwrap_or(u32::MAX))
}

// === impl CachedAnswer ===

impl CachedAnswer {
    fn new(now: Instant) -> CachedAnswer {
        CachedAnswer { answer: None, asked: None, vain: 0, used: now }
    }
}

// === impl RecordAnswer ===

impl RecordAnswer {
    fn failed(why: SourceFailure, detail: String, now: Instant) -> Arc<RecordAnswer> {
        let outcome = RecordOutcome::Failed(ResolveFailure { why, detail });
        Arc::new(RecordAnswer { outcome, asked: now, until: now + PAUSES[0], known: None })
    }
}

// === impl PendingAnswer ===

impl PendingAnswer {
    /// Waits for the answer.
    pub(super) async fn answer(self) -> Arc<RecordAnswer> {
        let mut asked = match self {
            PendingAnswer::Known(answer) => return answer,
            PendingAnswer::Asked(asked) => asked,
        };
        let answer = asked.wait_for(Option::is_some).await.ok().and_then(|answer| answer.clone());
        if let Some(answer) = answer {
            return answer;
        }
        let detail = "the task that asks the server panicked".to_owned();
        RecordAnswer::failed(SourceFailure::Local, detail, clock::now())
    }
}
