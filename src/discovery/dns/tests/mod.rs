//! The DNS source against a scripted server and against dnsmasq.

mod dnsmasq;
mod liar;
mod load;
mod services;

use super::*;
use crate::resolver::tests::TestResolver;
use crate::tell::Answers;
use std::collections::VecDeque;
use tidegate_core::model::{NameFamily, SourceKey};
use tokio::task::JoinHandle;
use tokio::time::sleep;

/// A running source and what it told.
struct RunningSource {
    answers: Answers,
    told: VecDeque<Told>,
    task: JoinHandle<()>,
}

impl Drop for RunningSource {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl RunningSource {
    fn start(question: NameQuestion, resolver: &Resolver) -> RunningSource {
        let answers = Answers::default();
        let key = SourceKey { pool: "web".into(), backend: None };
        let teller = answers.teller(key, Arc::default());
        let task = tokio::spawn(run(question, resolver.clone(), teller));
        RunningSource { answers, told: VecDeque::new(), task }
    }

    /// The next answer. A set that nothing took in time is replaced by a newer one.
    async fn next(&mut self) -> Told {
        let waiting = async {
            loop {
                self.told.extend(self.answers.take().into_iter().map(|answer| answer.told));
                if let Some(told) = self.told.pop_front() {
                    return told;
                }
                self.answers.arrived().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), waiting).await.expect("an answer within 20 s")
    }

    async fn whole(&mut self) -> WholeSet {
        match self.next().await {
            Told::Whole(set) => set,
            other => panic!("{other:?}"),
        }
    }

    async fn failed(&mut self) -> (SourceFailure, String) {
        match self.next().await {
            Told::Failed { why, detail } => (why, detail),
            other => panic!("{other:?}"),
        }
    }

    /// Waits for a set that is trusted and has these members.
    async fn until(&mut self, members: &[&str]) {
        loop {
            match self.next().await {
                Told::Whole(set) if set.trusted && names(&set) == members => return,
                _ => {}
            }
        }
    }
}

fn names(set: &WholeSet) -> Vec<String> {
    let member = |member: &Announced| {
        assert_eq!(*member.name, *member.address.to_string());
        member.name.to_string()
    };
    set.members.iter().map(member).collect()
}

/// The addresses of web.example at port 80.
fn web() -> NameQuestion {
    question("web.example", NameRecord::Address, NameFamily::Both)
}

fn question(name: &str, record: NameRecord, family: NameFamily) -> NameQuestion {
    let port = (record == NameRecord::Address).then_some(80);
    NameQuestion { name: name.into(), record, port, family }
}
