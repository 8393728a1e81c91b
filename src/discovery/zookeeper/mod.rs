//! Members from ZooKeeper: the children of a node and the content of each child.
//!
//! The discovery thread runs [`run`] for each question and shares one [`ZkSession`] per
//! registry. The source requests each watch together with the value that it watches, so no
//! change is between them. A child that vanishes between the list and its read is a change. A
//! child that cannot be read is a failure, never an absence. A node that does not exist is a
//! failure. A lost connection or session keeps the members; the source then reads everything
//! again.

mod codec;
mod frames;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
#[cfg(test)]
mod liar_tests;
mod link;
pub(crate) mod session;
#[cfg(test)]
mod tests;
mod watches;
pub(crate) mod wire;

pub use codec::CONTENT_BYTES_MAX;
pub use session::ZkSession;

use crate::backoff::{CHANGED_MIN, Pause};
use crate::client::HttpFailure;
use crate::tell::Teller;
use session::{CALLS_AT_ONCE, ZkAnswer, ZkProblem};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tidegate_core::control::MEMBERS_MAX;
use tidegate_core::discovery::{Announced, SourceFailure, Told, Unreadable, WholeSet};
use tidegate_core::model::ZookeeperFormat;
use tokio::time::{sleep, timeout};
use watches::{ZkChanges, ZkWatch};
use wire::{ZkReply, ZkRequest};

/// Bounds of the time between two checks of the watches. A check is one request.
const CHECK_MIN: Duration = Duration::from_secs(20);
const CHECK_MAX: Duration = Duration::from_secs(30);

/// Checks after which everything is read again: after 2 to 3 minutes.
const CHECKS_PER_RELIST: u32 = 6;

/// Asks for the members below `path` and tells every change.
pub async fn run(
    session: ZkSession,
    path: Arc<str>,
    format: ZookeeperFormat,
    teller: Teller,
) -> Infallible {
    let watch = session.watch(&path);
    let mut source = ZkSource {
        session,
        path,
        format,
        watch,
        teller,
        children: BTreeMap::new(),
        beyond: 0,
        zxid: 0,
        children_changed: 0,
        last: None,
    };
    let mut pause = Pause::new();
    let mut changes = ZkChanges { lost: true, ..ZkChanges::default() };
    let mut had_changed = false;
    loop {
        pause.begin();
        match source.read(&changes).await {
            Ok(()) => {
                // A deleted child has two events: its own and that of the list. The second
                // one can change nothing, and must not delay the next change.
                let changed = source.tell();
                if changed || had_changed {
                    pause.changed().await;
                } else {
                    pause.unchanged().await;
                }
                had_changed = changed;
                changes = source.next_changes().await;
            }
            Err(failure) => {
                source.teller.tell(failure.told());
                // A node that was created ends the wait.
                tokio::select! {
                    () = pause.failed() => {}
                    () = source.node_changed() => {}
                }
                changes = ZkChanges { lost: true, ..ZkChanges::default() };
            }
        }
    }
}

/// One question.
struct ZkSource {
    session: ZkSession,
    path: Arc<str>,
    format: ZookeeperFormat,
    watch: Arc<ZkWatch>,
    teller: Teller,
    /// The children that exist, and what they announce; `None`: unreadable.
    children: BTreeMap<String, Option<Announced>>,
    /// Children beyond the bound.
    beyond: u32,
    /// The newest transaction that a server showed.
    zxid: i64,
    /// The transaction that last added or removed a child.
    children_changed: i64,
    /// The last answer.
    last: Option<WholeSet>,
}

// === impl ZkSource ===

impl ZkSource {
    /// Reads what changed.
    async fn read(&mut self, changes: &ZkChanges) -> Result<(), HttpFailure> {
        if changes.lost {
            self.synchronize().await?;
            // A failure now is a failure, and the former content does not hide it.
            self.children.clear();
        }
        let mut unread: Vec<String> = Vec::new();
        if changes.lost || changes.children {
            unread = self.list().await?;
        }
        let known = changes.nodes.iter().filter(|name| self.children.contains_key(*name));
        unread.extend(known.cloned());
        unread.sort_unstable();
        unread.dedup();
        for names in unread.chunks(CALLS_AT_ONCE) {
            self.read_children(names).await?;
        }
        Ok(())
    }

    /// Makes the server catch up with its leader, and compares its history with the one that
    /// was seen.
    async fn synchronize(&mut self) -> Result<(), HttpFailure> {
        let answer = self.session.call(ZkRequest::Sync { path: self.path.to_string() }).await;
        let zxid = answer.map_err(|problem| self.failure(problem))?.zxid;
        let before = std::mem::replace(&mut self.zxid, zxid);
        if zxid < before {
            // The next list counts: the servers were restored from a backup.
            let text = format_args!("transactions went back from 0x{before:x} to 0x{zxid:x}");
            return Err(HttpFailure::new(SourceFailure::Stale, text));
        }
        Ok(())
    }

    /// Lists the children, with a watch, and returns those that must be read.
    async fn list(&mut self) -> Result<Vec<String>, HttpFailure> {
        let request = ZkRequest::Children { path: self.path.to_string(), watch: true };
        let (mut names, stat) = match self.session.call(request).await {
            Ok(ZkAnswer { reply: ZkReply::Children(names, stat), .. }) => (names, stat),
            Ok(_) => return Err(HttpFailure::protocol("the answer is not a list")),
            Err(problem) => {
                if problem == ZkProblem::NoNode {
                    self.watch.take();
                    let _ = self.node_state(true).await;
                }
                return Err(self.failure(problem));
            }
        };
        if names.iter().any(|name| name.is_empty() || name.contains('/')) {
            return Err(HttpFailure::protocol("the name of a child has a slash or no character"));
        }
        names.sort_unstable();
        names.dedup();
        self.beyond = names.len().saturating_sub(MEMBERS_MAX) as u32;
        names.truncate(MEMBERS_MAX);
        self.children_changed = stat.children_changed;
        self.children.retain(|name, _| names.binary_search(name).is_ok());
        names.retain(|name| !self.children.contains_key(name));
        Ok(names)
    }

    /// Returns the transaction that last added or removed a child.
    async fn node_state(&self, watch: bool) -> Result<i64, ZkProblem> {
        let request = ZkRequest::Exists { path: self.path.to_string(), watch };
        match self.session.call(request).await?.reply {
            ZkReply::Exists(stat) => Ok(stat.children_changed),
            _ => Err(ZkProblem::Failed(HttpFailure::protocol("the answer is not a state"))),
        }
    }

    /// Reads children at once, each with a watch.
    async fn read_children(&mut self, names: &[String]) -> Result<(), HttpFailure> {
        let root = self.path.strip_suffix('/').unwrap_or(&self.path);
        let data = |name| ZkRequest::Data { path: format!("{root}/{name}"), watch: true };
        let answers = self.session.call_all(names.iter().map(data)).await;
        for (name, answer) in names.iter().zip(answers) {
            match answer {
                Ok(ZkAnswer { zxid, reply: ZkReply::Data(content), .. }) => {
                    self.zxid = self.zxid.max(zxid);
                    self.children.insert(name.clone(), self.member(name, &content));
                }
                Ok(_) => return Err(HttpFailure::protocol("the answer is not content")),
                // The watch of the list reports it, should it exist again.
                Err(ZkProblem::NoNode) => {
                    self.children.remove(name);
                }
                Err(problem) => return Err(self.failure(problem)),
            }
        }
        Ok(())
    }

    fn member(&self, name: &str, content: &[u8]) -> Option<Announced> {
        let member = codec::member(self.format, name, content);
        member
            .inspect_err(|problem| {
                let path = &self.path;
                tracing::debug!(%path, child = name, problem, "child of ZooKeeper is not readable");
            })
            .ok()
    }

    /// Tells the set, and returns whether it changed.
    fn tell(&mut self) -> bool {
        let mut unreadable = Unreadable::unnamed(self.beyond);
        let mut members: BTreeMap<&str, &Announced> = BTreeMap::new();
        let mut keys: Vec<(SocketAddr, Arc<str>)> = Vec::new();
        for (child, member) in &self.children {
            match member {
                // Two children with one name: the first in order of the nodes counts.
                Some(member) if !members.contains_key(&*member.name) => {
                    members.insert(&member.name, member);
                    let differs = **child != *member.name;
                    keys.extend(differs.then(|| (member.address, child.as_str().into())));
                }
                _ => unreadable.add(child),
            }
        }
        if let Some(last) = &self.last
            && (&last.unreadable, &*last.keys) == (&unreadable, &*keys)
            && last.members.iter().eq(members.values().copied())
        {
            self.teller.tell(Told::Alive);
            return false;
        }
        let members: Arc<[Announced]> = members.into_values().cloned().collect();
        let version = format!("zxid 0x{:x}", self.zxid);
        let set = WholeSet { members, version, trusted: true, unreadable, keys: keys.into() };
        self.last = Some(set.clone());
        self.teller.tell(Told::Whole(set));
        true
    }

    /// Waits for an event of the node, if it does not exist.
    async fn node_changed(&self) {
        sleep(CHANGED_MIN).await;
        self.watch.node_changed().await;
    }

    /// Waits for an event. Checks the watches while there is none.
    async fn next_changes(&mut self) -> ZkChanges {
        for _ in 0..CHECKS_PER_RELIST {
            let changes = if timeout(check_time(), self.watch.arrived()).await.is_ok() {
                self.watch.take()
            } else {
                self.check().await
            };
            if changes.lost {
                self.teller.counters().watch_restarts.fetch_add(1, Ordering::Relaxed);
            }
            if changes != ZkChanges::default() {
                return changes;
            }
        }
        self.teller.counters().relists.fetch_add(1, Ordering::Relaxed);
        // Events that arrive now are part of the list.
        ZkChanges { lost: true, ..self.watch.take() }
    }

    /// Asks for the last change of the list. A server sends the event of a change before an
    /// answer that shows the change, so a change without an event is a lost watch.
    async fn check(&mut self) -> ZkChanges {
        let seen = self.node_state(false).await;
        let mut changes = self.watch.take();
        if changes == ZkChanges::default() {
            if seen == Ok(self.children_changed) {
                self.teller.tell(Told::Alive);
            } else {
                changes.lost = true;
            }
        }
        changes
    }

    fn failure(&self, problem: ZkProblem) -> HttpFailure {
        let text = format_args!("node {} does not exist", self.path);
        match problem {
            ZkProblem::NoNode => HttpFailure::new(SourceFailure::NotFound, text),
            ZkProblem::NodeExists => HttpFailure::protocol("unexpected answer: the node exists"),
            ZkProblem::Failed(failure) => failure,
        }
    }
}

/// Returns the time until the next check.
fn check_time() -> Duration {
    CHECK_MIN + (CHECK_MAX - CHECK_MIN).mul_f64(fastrand::f64())
}
