//! Effects of a panic on an engine and its sessions.
//!
//! Part of `engine`.
//!
//! - A panic outside the engine leaves the engine valid. The dropped session is removed.
//! - A panic inside marks the engine broken. Its sessions are removed, and the worker starts a
//!   new thread with a new engine.

use super::engine::{EngineCore, EngineIo, EngineSession};
use super::stages::{EngineState, SessionEntry, SessionStage};
use crate::relay::delivery;
use std::cell::RefMut;
use std::ops::{Deref, DerefMut};
use tidegate_core::outcome::SessionSide;
use tidegate_net::stream;
use tokio::sync::Notify;

/// Exclusive access to the state. A panic while it is held marks the engine broken.
pub(super) struct StateGuard<'a, M: EngineIo> {
    state: RefMut<'a, EngineState<M>>,
    broken: &'a Notify,
    /// A panic was in progress when the guard was created, so it began outside the guard.
    unwinding: bool,
}

// === impl StateGuard ===

impl<M: EngineIo> Deref for StateGuard<'_, M> {
    type Target = EngineState<M>;

    #[inline]
    fn deref(&self) -> &EngineState<M> {
        &self.state
    }
}

impl<M: EngineIo> DerefMut for StateGuard<'_, M> {
    #[inline]
    fn deref_mut(&mut self) -> &mut EngineState<M> {
        &mut self.state
    }
}

impl<M: EngineIo> Drop for StateGuard<'_, M> {
    #[inline]
    fn drop(&mut self) {
        if !self.unwinding && std::thread::panicking() {
            self.broken.notify_one();
        }
    }
}

// === impl EngineCore ===

impl<M: EngineIo> EngineCore<M> {
    /// Borrows the state for one step.
    #[inline]
    pub(super) fn hold(&self) -> StateGuard<'_, M> {
        let unwinding = std::thread::panicking();
        StateGuard { state: self.state.borrow_mut(), broken: &self.broken, unwinding }
    }
}

// === impl SessionEntry ===

impl<F: EngineSession> SessionEntry<F> {
    /// Sets the remaining sockets to reset on close: to a peer, an interrupted stream must not
    /// look complete.
    pub(super) fn reset_remaining(&self) {
        if let SessionStage::Ended(ending, _) = &self.stage
            && let undelivered = delivery::bytes(&self.session, *ending).undelivered
            && ending.cause.closes_in_order(undelivered)
        {
            return;
        }
        for socket in SessionSide::BOTH.into_iter().filter_map(|side| self.session.socket(side)) {
            stream::reset_on_close(socket);
        }
    }
}
