//! Events of watches, collected for the source that asked for them.
//!
//! The session's task puts events in. A source takes all of them at once, so a node that
//! changes 1,000 times costs one entry. Nothing here sends a request.

use super::wire::{EVENT_CHILDREN, ZkEvent};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use tokio::sync::Notify;

/// Most nodes with events that are kept. Beyond it, everything counts as changed.
const NODES_MAX: usize = 20_000;

/// The watches of a session.
#[derive(Debug, Default)]
pub(crate) struct ZkWatches(Mutex<Vec<Weak<ZkWatch>>>);

/// The events of one node and of its children.
#[derive(Debug)]
pub(crate) struct ZkWatch {
    path: String,
    changed: Mutex<ZkChanges>,
    arrived: Notify,
}

/// What changed since the last [`ZkWatch::take`].
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct ZkChanges {
    /// The watches are lost: everything can have changed.
    pub(crate) lost: bool,
    /// The node was created or deleted, or has other children.
    pub(crate) children: bool,
    /// Names of the children whose content changed, or that were deleted.
    pub(crate) nodes: BTreeSet<String>,
}

// === impl ZkWatches ===

impl ZkWatches {
    pub(crate) fn watch(&self, path: &str) -> Arc<ZkWatch> {
        let watch = Arc::new(ZkWatch {
            path: path.to_owned(),
            changed: Mutex::default(),
            arrived: Notify::new(),
        });
        let mut all = locked(&self.0);
        all.retain(|watch| watch.strong_count() > 0);
        all.push(Arc::downgrade(&watch));
        watch
    }

    pub(crate) fn event(&self, event: &ZkEvent) {
        self.each(|watch| watch.event(event));
    }

    /// The connection is lost, and with it all watches.
    pub(crate) fn lost(&self) {
        self.each(|watch| {
            locked(&watch.changed).lost = true;
            watch.arrived.notify_one();
        });
    }

    fn each(&self, act: impl Fn(&ZkWatch)) {
        locked(&self.0).iter().filter_map(Weak::upgrade).for_each(|watch| act(&watch));
    }
}

// === impl ZkWatch ===

impl ZkWatch {
    /// Waits for an event. Dropping the future loses none.
    pub(crate) async fn arrived(&self) {
        self.arrived.notified().await;
    }

    /// Waits for an event of the node itself: it was created, or its children changed.
    pub(crate) async fn node_changed(&self) {
        while !locked(&self.changed).children {
            self.arrived().await;
        }
    }

    /// Takes all changes.
    pub(crate) fn take(&self) -> ZkChanges {
        std::mem::take(&mut *locked(&self.changed))
    }

    fn event(&self, event: &ZkEvent) {
        let mut changed = locked(&self.changed);
        if event.path == self.path {
            changed.children = true;
        } else if event.kind != EVENT_CHILDREN
            && let Some(name) = child_of(&self.path, &event.path)
        {
            if changed.nodes.len() < NODES_MAX {
                changed.nodes.insert(name.to_owned());
            } else {
                changed.lost = true;
            }
        } else {
            return;
        }
        drop(changed);
        self.arrived.notify_one();
    }
}

/// Returns the name of a child of `parent`.
fn child_of<'a>(parent: &str, path: &'a str) -> Option<&'a str> {
    let parent = parent.strip_suffix('/').unwrap_or(parent);
    let name = path.strip_prefix(parent)?.strip_prefix('/')?;
    (!name.is_empty() && !name.contains('/')).then_some(name)
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_reach_the_watch_of_their_node_and_of_its_parent() {
        let watches = ZkWatches::default();
        let (web, root) = (watches.watch("/web"), watches.watch("/"));
        for (kind, path) in [(3, "/web/a"), (2, "/web/b"), (3, "/webb/c"), (4, "/web/a")] {
            watches.event(&ZkEvent { kind, path: path.into() });
        }
        let changes = web.take();
        assert_eq!(Vec::from_iter(changes.nodes), ["a", "b"]);
        assert!(!changes.children && !changes.lost && root.take() == ZkChanges::default());
        watches.event(&ZkEvent { kind: EVENT_CHILDREN, path: "/web".into() });
        assert!(web.take().children);
        watches.lost();
        assert!(web.take().lost && root.take().lost);
    }

    #[test]
    fn events_of_more_nodes_than_there_can_be_cost_no_memory() {
        let watches = ZkWatches::default();
        let watch = watches.watch("/web");
        for number in 0..NODES_MAX + 5 {
            watches.event(&ZkEvent { kind: 3, path: format!("/web/{number}") });
        }
        let changes = watch.take();
        assert!(changes.lost && changes.nodes.len() == NODES_MAX);
    }
}
