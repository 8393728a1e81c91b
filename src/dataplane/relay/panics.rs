//! What a panic does to an engine and its sessions.
//!
//! Part of `engine`. A panic outside the engine leaves it whole, and the session that is
//! dropped is removed like any other; one inside marks the engine broken, and its worker
//! starts a new thread. A broken engine is only emptied.

use super::engine::{EngineCore, EngineFlow, EngineIo};
use super::stages::{EngineState, SessionEntry, SessionStage};
use crate::relay::delivery;
use std::cell::RefMut;
use std::ops::{Deref, DerefMut};
use tidegate_core::outcome::SessionSide;
use tidegate_net::stream;
use tokio::sync::Notify;

/// Exclusive use of the state; where a panic ends it, the engine is broken.
pub(super) struct StateGuard<'a, M: EngineIo> {
    state: RefMut<'a, EngineState<M>>,
    broken: &'a Notify,
    /// Taken while a panic was under way, which is then not this one's.
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
    /// The state, for the time of one step.
    #[inline]
    pub(super) fn hold(&self) -> StateGuard<'_, M> {
        let unwinding = std::thread::panicking();
        StateGuard { state: self.state.borrow_mut(), broken: &self.broken, unwinding }
    }
}

// === impl SessionEntry ===

impl<F: EngineFlow> SessionEntry<F> {
    /// Has the sockets that were not given away reset when they close: to a peer, the end
    /// of a stream that was broken off must not look like its end.
    pub(super) fn reset_remaining(&self) {
        if let SessionStage::Ended(ending, _) = &self.stage
            && let undelivered = delivery::bytes(&self.flow, *ending).undelivered
            && ending.cause.closes_in_order(undelivered)
        {
            return;
        }
        for socket in SessionSide::BOTH.into_iter().filter_map(|side| self.flow.socket(side)) {
            stream::reset_on_close(socket);
        }
    }
}
