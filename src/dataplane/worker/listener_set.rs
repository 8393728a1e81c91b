//! The sockets a worker listens on, whichever of its threads is running.
//!
//! Owned by `worker`; a listener's task has one post each. When a thread falls,
//! what it listened on goes to the next one, and nobody in a queue is lost.

use crate::accept::listener::ListenerRetirement;
use socket2::Socket;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;
use tidegate_core::model::BindKey;

/// One thread's posts.
#[derive(Debug, Default)]
pub(crate) struct ListenerSet(RefCell<Vec<ListenerEntry>>);

#[derive(Debug)]
struct ListenerEntry {
    bind: BindKey,
    socket: Arc<Socket>,
    retirement: Rc<ListenerRetirement>,
}

/// A post on its way to the next thread.
#[derive(Debug)]
pub(crate) struct InheritedListener {
    pub(crate) bind: BindKey,
    pub(crate) socket: Arc<Socket>,
    /// Where it was retiring: until then.
    pub(crate) retires: Option<Instant>,
}

impl ListenerSet {
    pub(crate) fn add(
        &self,
        bind: BindKey,
        socket: Arc<Socket>,
        retirement: Rc<ListenerRetirement>,
    ) {
        self.0.borrow_mut().push(ListenerEntry { bind, socket, retirement });
    }

    /// Its listener has ended.
    pub(crate) fn remove(&self, retirement: &Rc<ListenerRetirement>) {
        self.0.borrow_mut().retain(|post| !Rc::ptr_eq(&post.retirement, retirement));
    }

    /// Every post of that address that is not retiring yet.
    pub(crate) fn retire_after(&self, bind: &BindKey, tell: impl Fn(&ListenerRetirement)) {
        let posts = self.0.borrow();
        posts
            .iter()
            .filter(|post| post.bind == *bind && post.retirement.deadline().is_none())
            .for_each(|post| tell(&post.retirement));
    }

    /// What the next thread is to listen on.
    pub(crate) fn take_listeners(&self) -> Vec<InheritedListener> {
        let posts = std::mem::take(&mut *self.0.borrow_mut());
        let kept = posts.into_iter().filter(|post| !post.retirement.is_released());
        kept.map(|ListenerEntry { bind, socket, retirement }| InheritedListener {
            bind,
            socket,
            retires: retirement.deadline(),
        })
        .collect()
    }
}
