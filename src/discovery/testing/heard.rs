//! A running source in a test, and what it told.

use crate::tell::{Answers, SourceCounters, Teller};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tidegate_core::discovery::{Announced, SourceFailure, Told};
use tidegate_core::model::SourceKey;
use tidegate_net::clock;

/// Longest wait for a condition.
const WAIT_MAX: Duration = Duration::from_secs(20);

/// The source ends when this is dropped.
pub(crate) struct HeardSource {
    answers: Answers,
    pub(crate) counters: Arc<SourceCounters>,
    /// The last set.
    pub(crate) members: Vec<Announced>,
    pub(crate) unreadable: u32,
    pub(crate) unread_keys: Vec<String>,
    pub(crate) failures: Vec<(SourceFailure, String)>,
    /// Number of sets.
    pub(crate) sets: u32,
    task: tokio::task::JoinHandle<Infallible>,
}

// === impl HeardSource ===

impl HeardSource {
    pub(crate) fn start<F>(source: impl FnOnce(Teller) -> F) -> HeardSource
    where
        F: Future<Output = Infallible> + Send + 'static,
    {
        let answers = Answers::default();
        let counters = Arc::<SourceCounters>::default();
        let key = SourceKey { pool: "web".into(), backend: None };
        let teller = answers.teller(key, Arc::clone(&counters));
        let task = tokio::spawn(source(teller));
        let (members, failures) = (Vec::new(), Vec::new());
        HeardSource {
            answers,
            counters,
            members,
            unreadable: 0,
            unread_keys: Vec::new(),
            failures,
            sets: 0,
            task,
        }
    }

    pub(crate) fn take(&mut self) {
        for answer in self.answers.take() {
            match answer.told {
                Told::Whole(set) => {
                    assert!(set.trusted);
                    self.members = set.members.to_vec();
                    self.unreadable = set.unreadable.count();
                    self.unread_keys =
                        set.unreadable.keys().iter().map(ToString::to_string).collect();
                    self.sets += 1;
                }
                Told::Failed { why, detail } => self.failures.push((why, detail)),
                Told::Alive => {}
            }
        }
    }

    /// Waits until a condition holds, and returns the time.
    pub(crate) async fn until(
        &mut self,
        what: &str,
        holds: impl Fn(&HeardSource) -> bool,
    ) -> Duration {
        let start = clock::now();
        loop {
            self.take();
            if holds(self) {
                return clock::now() - start;
            }
            let names: Vec<_> = self.members.iter().take(9).map(|member| &member.name).collect();
            let late = clock::now() - start > WAIT_MAX;
            assert!(!late, "{what}: {names:?} {:?}", self.failures);
            let _ = tokio::time::timeout(Duration::from_millis(20), self.answers.arrived()).await;
        }
    }

    /// Waits until these are the members, in order of their names.
    pub(crate) async fn names(&mut self, expected: &[&str]) -> Duration {
        self.until("the members", |heard| {
            heard.members.iter().map(|member| &*member.name).eq(expected.iter().copied())
        })
        .await
    }

    /// Waits until one more failure was told, and returns the first of them.
    pub(crate) async fn next_failure(&mut self) -> (SourceFailure, String) {
        self.take();
        let before = self.failures.len();
        self.until("a failure", |heard| heard.failures.len() > before).await;
        self.failures[before].clone()
    }
}

impl Drop for HeardSource {
    fn drop(&mut self) {
        self.task.abort();
    }
}
