//! The etcd source: the members below prefixes of the store.
//!
//! The discovery thread calls [`run`] for each question. All questions to one registry share
//! one follower: it lists each prefix with a linearizable read, follows all of them in one
//! stream of watches, and compares both with an independent read every 8 s to 15 s. A follower
//! ends with its registry's last question. Nothing here decides what an answer changes.
//!
//! | event | what the follower does |
//! |---|---|
//! | the stream ends, the member has no leader, it does not answer | another member; list |
//! | the history was compacted | list; unchanged members stay as they are |
//! | revision, cluster or term went back: a backup was restored | list; the sets are not trusted for 30 s |
//! | two checks in a row differ from the watch | another member; list |
//! | the token is refused | log in again with the file's password |
//! | the follower panics | the questions fail; another follower begins after a pause |
//! | a prefix is forbidden | fail that prefix; retry it every 1 s to 3 s |

pub mod codec;
mod contents;
mod follow;
mod followed;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod gateway;
mod watch;

#[cfg(test)]
mod tests;

use crate::backoff::Pause;
use crate::resolver::Resolver;
use crate::tasks::{self, TaskKind};
use crate::tell::Teller;
use follow::Follower;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tidegate_core::discovery::{SourceFailure, Told};
use tidegate_core::model::RegistryConfig;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

pub use watch::WatchStream;

/// What all questions to one registry share: a follower. It ends with the last clone.
#[derive(Debug, Clone)]
pub struct EtcdShare(Arc<RunningFollower>);

#[derive(Debug)]
struct RunningFollower {
    asked: Arc<AskedPrefixes>,
    task: AbortHandle,
}

/// The questions, shared with the follower.
#[derive(Debug, Default)]
struct AskedPrefixes {
    by_number: Mutex<BTreeMap<u64, (Arc<str>, Teller)>>,
    changed: Notify,
}

/// A question. It ends when the value is dropped.
struct AskedPrefix {
    number: u64,
    asked: Arc<AskedPrefixes>,
}

/// Tells the members below a prefix until the future is dropped.
pub async fn run(prefix: Arc<str>, share: EtcdShare, teller: Teller) -> Infallible {
    let _asked = share.ask(prefix, teller);
    std::future::pending().await
}

// === impl EtcdShare ===

impl EtcdShare {
    /// Starts a follower on the runtime of the caller. It sends nothing before the first
    /// question.
    pub fn start(registry: &RegistryConfig, resolver: Resolver) -> EtcdShare {
        let asked = Arc::new(AskedPrefixes::default());
        let follow = supervise(registry.clone(), resolver, Arc::clone(&asked));
        let task = tokio::spawn(follow).abort_handle();
        EtcdShare(Arc::new(RunningFollower { asked, task }))
    }

    fn ask(&self, prefix: Arc<str>, teller: Teller) -> AskedPrefix {
        let asked = Arc::clone(&self.0.asked);
        AskedPrefix { number: asked.add(prefix, teller), asked }
    }
}

/// Runs a follower, and another one after a panic. The new one reads everything again.
async fn supervise(registry: RegistryConfig, resolver: Resolver, asked: Arc<AskedPrefixes>) {
    let mut pause = Pause::new();
    loop {
        pause.begin();
        let follower = Follower::new(&registry, resolver.clone(), Arc::clone(&asked));
        if tasks::caught(TaskKind::Follower, follower.run()).await.is_err() {
            let registry = &registry.name;
            tracing::error!(%registry, "follower of an etcd registry panicked; restarting it");
            asked.tell_panic();
        }
        pause.failed().await;
    }
}

// === impl RunningFollower ===

impl Drop for RunningFollower {
    fn drop(&mut self) {
        self.task.abort();
    }
}

// === impl AskedPrefixes ===

impl AskedPrefixes {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, (Arc<str>, Teller)>> {
        self.by_number.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell_panic(&self) {
        let (why, detail) = (SourceFailure::Local, tasks::PANICKED.to_owned());
        let told = Told::Failed { why, detail };
        self.lock().values().for_each(|(_, teller)| teller.tell(told.clone()));
    }

    fn add(&self, prefix: Arc<str>, teller: Teller) -> u64 {
        let mut asked = self.lock();
        let number = asked.last_key_value().map_or(0, |(last, _)| last + 1);
        asked.insert(number, (prefix, teller));
        self.changed.notify_one();
        number
    }
}

// === impl AskedPrefix ===

impl Drop for AskedPrefix {
    fn drop(&mut self) {
        self.asked.lock().remove(&self.number);
        self.asked.changed.notify_one();
    }
}
