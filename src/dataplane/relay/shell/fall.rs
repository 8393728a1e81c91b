//! What becomes of the engine and its sessions when something panics.
//!
//! Part of the shell. A panic outside the engine leaves it whole, and the flow
//! that is dropped is taken out like any other; one inside marks the engine
//! broken, and the worker falls. It never mends: a broken engine is only emptied.

use super::super::flow::SoFar;
use super::super::mover::Mover;
use super::{Entry, Shell, Stage, State, delivery};
use crate::relay::session_timers::Answer;
use std::cell::RefMut;
use std::ops::{Deref, DerefMut};
use tidegate_core::outcome::Cause;
use tidegate_net::stream;
use tokio::sync::Notify;

/// Exclusive use of the state; where it is given up by a panic, the engine is
/// broken.
pub(super) struct Hold<'a, M: Mover> {
    state: RefMut<'a, State<M>>,
    broken: &'a Notify,
    /// Taken while a panic was under way: not this one's doing.
    unwinding: bool,
}

// === impl Hold ===

impl<M: Mover> Deref for Hold<'_, M> {
    type Target = State<M>;

    #[inline]
    fn deref(&self) -> &State<M> {
        &self.state
    }
}

impl<M: Mover> DerefMut for Hold<'_, M> {
    #[inline]
    fn deref_mut(&mut self) -> &mut State<M> {
        &mut self.state
    }
}

impl<M: Mover> Drop for Hold<'_, M> {
    #[inline]
    fn drop(&mut self) {
        if !self.unwinding && std::thread::panicking() {
            self.broken.notify_one();
        }
    }
}

// === impl Shell ===

impl<M: Mover> Shell<M> {
    /// The state, for the time of one step.
    #[inline]
    pub(super) fn hold(&self) -> Hold<'_, M> {
        let unwinding = std::thread::panicking();
        Hold { state: self.state.borrow_mut(), broken: &self.broken, unwinding }
    }

    /// What a relayed flow has come to if `cause` ends it now; `None` where the
    /// engine is in no state to say.
    pub(in crate::relay) fn so_far(&self, key: u32, cause: Cause) -> Option<SoFar> {
        let state = self.state.try_borrow().ok()?;
        let entry = state.flows.get(key as usize)?;
        let (ending, answer) = match &entry.stage {
            Stage::Ended(ending, relaying) | Stage::Delivering(ending, relaying) => {
                (*ending, relaying.answer)
            }
            Stage::Relaying(relaying) => (M::verdict(&entry.flow).cut(cause), relaying.answer),
            Stage::Setup(_) => (M::verdict(&entry.flow).cut(cause), Answer::NobodySpoke),
        };
        Some(SoFar {
            ending,
            bytes: delivery::bytes::<M>(&entry.flow, ending),
            first_byte: match answer {
                Answer::Came(at) => Some(at),
                _ => None,
            },
        })
    }

    /// The worker has fallen: from now on dropped flows stay where they are, so
    /// that accounting for thousands of sessions waits for no system call.
    pub(in crate::relay) fn fall(&self) {
        self.fallen.set(true);
    }

    /// Has the sockets of a fallen worker's sessions reset when the engine is
    /// dropped.
    pub(in crate::relay) fn bury(&self) {
        if let Ok(mut state) = self.state.try_borrow_mut() {
            for (_, entry) in &mut state.flows {
                entry.reset_leftovers::<M>();
            }
        }
    }
}

// === impl Entry ===

impl<F> Entry<F> {
    /// Has the sockets that nobody has taken reset when they close: to a peer,
    /// the end of a stream that was broken off must not look like its end.
    pub(super) fn reset_leftovers<M: Mover<Flow = F>>(&self) {
        let in_order = match &self.stage {
            Stage::Ended(ending, _) => {
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
