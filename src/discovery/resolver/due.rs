//! The questions that servers must be asked: collected for one turn of the runtime, asked
//! together, and their answers put into the cache.
//!
//! The resolver starts them. Nothing here knows servers or messages: `lookup` and `exchange` do.

use super::Resolver;
use super::cache::{AnswerSlot, RecordOutcome};
use super::lookup::{FirstEnd, ServerPlan, TOGETHER_MAX, TogetherEnd};
use super::wire::RecordQuestion;
use crate::tasks::{self, TaskKind};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Instant;
use tidegate_core::model::DnsConfig;
use tidegate_net::clock;

/// A question that a server must be asked.
#[derive(Debug)]
pub(super) struct DueQuestion {
    pub(super) question: RecordQuestion,
    pub(super) slot: AnswerSlot,
}

/// The settings that questions are asked with, and the time.
#[derive(Clone)]
struct LookupBasis {
    config: Arc<DnsConfig>,
    plan: Arc<ServerPlan>,
    asked: Instant,
}

// === impl Resolver ===

impl Resolver {
    /// Asks the questions of one lookup, together with those of all lookups that start in the
    /// same turn of the runtime: most of the cost of a question is that of its socket.
    pub(super) fn start(&self, to_ask: Vec<DueQuestion>) {
        if to_ask.is_empty() {
            return;
        }
        self.counters().add(&self.counters().lookups);
        let mut due = self.due();
        let is_first = due.is_empty();
        due.extend(to_ask);
        drop(due);
        if is_first {
            let resolver = self.clone();
            // A panic here would keep the list full and stop all lookups, so this task only takes it.
            tokio::spawn(async move { resolver.start_due() });
        }
    }

    fn start_due(&self) {
        let mut due = std::mem::take(&mut *self.due()).into_iter();
        loop {
            let together: Vec<DueQuestion> = due.by_ref().take(TOGETHER_MAX).collect();
            if together.is_empty() {
                return;
            }
            tokio::spawn(tasks::caught(TaskKind::Lookup, self.clone().ask_together(together)));
        }
    }

    /// Puts each answer into its slot as soon as it is known. A question without a usable
    /// answer leaves the others.
    async fn ask_together(self, together: Vec<DueQuestion>) {
        let basis = self.basis();
        let questions: Vec<RecordQuestion> =
            together.iter().map(|due| due.question.clone()).collect();
        let questions: Vec<&RecordQuestion> = questions.iter().collect();
        let mut together: Vec<Option<DueQuestion>> = together.into_iter().map(Some).collect();
        let ended = |at: usize, end: TogetherEnd| {
            let Some(due) = together[at].take() else { return };
            let (due, first) = match end {
                TogetherEnd::Known(outcome) => match self.put(due, outcome, &basis) {
                    Some(due) => (due, None),
                    None => return,
                },
                TogetherEnd::Alone(first) => (due, first),
            };
            let alone = self.clone().ask_alone(due, first, basis.clone());
            tokio::spawn(tasks::caught(TaskKind::Lookup, alone));
        };
        self.0.servers.ask_together(&questions, &basis.plan, self.counters(), ended).await;
    }

    async fn ask_alone(
        self,
        mut due: DueQuestion,
        mut first: Option<FirstEnd>,
        mut basis: LookupBasis,
    ) {
        loop {
            let (plan, counters) = (&basis.plan, self.counters());
            let outcome = self.0.servers.ask(&due.question, plan, first.take(), counters).await;
            match self.put(due, outcome, &basis) {
                None => return,
                Some(again) => (due, basis) = (again, self.basis()),
            }
        }
    }

    /// Gives an answer to its receivers. An answer to older settings does not count:
    /// the question is returned.
    fn put(
        &self,
        due: DueQuestion,
        outcome: RecordOutcome,
        basis: &LookupBasis,
    ) -> Option<DueQuestion> {
        if !Arc::ptr_eq(&basis.config, &self.0.config.borrow()) {
            return Some(due);
        }
        let (asked, now) = (basis.asked, clock::now());
        let answer = self.cache().put(&due.question, outcome, asked, now, &basis.config);
        let _ = due.slot.send(Some(answer));
        None
    }

    fn basis(&self) -> LookupBasis {
        let asked = clock::now();
        let config = Arc::clone(&self.0.config.borrow());
        let conf = self.settings(asked).resolv_conf;
        let servers = config.servers.as_ref().unwrap_or(&conf.servers).clone();
        let plan = ServerPlan { servers, timeout: conf.timeout, rounds: conf.attempts };
        LookupBasis { config, plan: Arc::new(plan), asked }
    }

    fn due(&self) -> MutexGuard<'_, Vec<DueQuestion>> {
        self.0.due.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
