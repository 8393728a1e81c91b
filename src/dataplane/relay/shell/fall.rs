//! What becomes of the engine and its sessions when something panics.
//!
//! Part of the shell. A panic outside the engine leaves it whole, and the flow
//! that is dropped is taken out like any other; one inside marks the engine
//! broken, and the worker falls. It never mends: a broken engine is only emptied.

use super::super::flow::PartialResult;
use super::super::mover::EngineIo;
use super::{EngineCore, EngineState, SessionEntry, SessionStage, delivery};
use crate::relay::session_timers::FirstByteState;
use std::cell::RefMut;
use std::ops::{Deref, DerefMut};
use tidegate_core::outcome::Cause;
use tidegate_net::stream;
use tokio::sync::Notify;

/// Exclusive use of the state; where it is given up by a panic, the engine is
/// broken.
pub(super) struct StateGuard<'a, M: EngineIo> {
    state: RefMut<'a, EngineState<M>>,
    broken: &'a Notify,
    /// Taken while a panic was under way: not this one's doing.
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

    /// What a relayed flow has come to if `cause` ends it now; `None` where the
    /// engine is in no state to say.
    pub(in crate::relay) fn so_far(&self, key: u32, cause: Cause) -> Option<PartialResult> {
        let state = self.state.try_borrow().ok()?;
        let entry = state.flows.get(key as usize)?;
        let (ending, answer) = match &entry.stage {
            SessionStage::Ended(ending, relaying) | SessionStage::Delivering(ending, relaying) => {
                (*ending, relaying.answer)
            }
            SessionStage::Relaying(relaying) => {
                (M::verdict(&entry.flow).cut(cause), relaying.answer)
            }
            SessionStage::Setup(_) => (M::verdict(&entry.flow).cut(cause), FirstByteState::Idle),
        };
        Some(PartialResult {
            ending,
            bytes: delivery::bytes::<M>(&entry.flow, ending),
            first_byte: match answer {
                FirstByteState::Answered(at) => Some(at),
                _ => None,
            },
        })
    }

    /// The worker has fallen: from now on dropped flows stay where they are, so
    /// that accounting for thousands of sessions waits for no system call.
    pub(in crate::relay) fn mark_broken(&self) {
        self.fallen.set(true);
    }

    /// Has the sockets of a fallen worker's sessions reset when the engine is
    /// dropped.
    pub(in crate::relay) fn close_all(&self) {
        if let Ok(mut state) = self.state.try_borrow_mut() {
            for (_, entry) in &mut state.flows {
                entry.reset_remaining::<M>();
            }
        }
    }
}

// === impl SessionEntry ===

impl<F> SessionEntry<F> {
    /// Has the sockets that nobody has taken reset when they close: to a peer,
    /// the end of a stream that was broken off must not look like its end.
    pub(super) fn reset_remaining<M: EngineIo<Flow = F>>(&self) {
        let in_order = match &self.stage {
            SessionStage::Ended(ending, _) => {
                let bytes = delivery::bytes::<M>(&self.flow, *ending);
                ending.cause.closes_in_order(bytes.undelivered)
            }
            _ => self.refused,
        };
        if in_order {
            return;
        }
        for socket in [M::client(&self.flow), M::backend(&self.flow)].into_iter().flatten() {
            stream::reset_on_close(socket);
        }
    }
}
