//! Faults that tests order: a panic at a named place, or a stall.
//!
//! Passed by the data path at each place. A release build has neither the faults
//! nor a way to order them: everything but the empty [`FaultPlan::pass`] is compiled
//! with debug assertions only, and then the admin API takes orders only where
//! the environment says `TIDEGATE_FAULTS=1`.

#[cfg(debug_assertions)]
use std::cell::Cell;

/// Where it goes wrong, once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultPoint {
    /// The next session before it connects, in its task.
    Setup,
    /// The next end of a relay, in the session's task.
    Session,
    /// The next start of a relay: in the session's task, inside the engine.
    Relay,
    /// The engine's task, in the middle of its next turn.
    Engine,
    /// The next accepted connection, in the listener's task.
    Listener,
    /// The worker's own loop, at once.
    Worker,
}

/// The fault to come at one place or another.
#[derive(Debug, Default)]
pub(super) struct FaultPlan {
    #[cfg(debug_assertions)]
    ordered: Cell<Option<FaultPoint>>,
}

// === impl FaultPoint ===

#[cfg(debug_assertions)]
impl FaultPoint {
    /// As in an order.
    pub fn from_name(name: &str) -> Option<FaultPoint> {
        Some(match name {
            "setup" => FaultPoint::Setup,
            "session" => FaultPoint::Session,
            "relay" => FaultPoint::Relay,
            "engine" => FaultPoint::Engine,
            "listener" => FaultPoint::Listener,
            "worker" => FaultPoint::Worker,
            _ => return None,
        })
    }
}

// === impl FaultPlan ===

impl FaultPlan {
    /// The next pass of that place panics.
    #[cfg(debug_assertions)]
    pub(super) fn order(&self, fault: FaultPoint) {
        self.ordered.set(Some(fault));
    }

    /// Panics if that was ordered; in a release build, nothing.
    #[inline]
    pub(super) fn pass(&self, place: FaultPoint) {
        #[cfg(debug_assertions)]
        if self.ordered.get() == Some(place) {
            self.ordered.set(None);
            panic!("a fault that was ordered: {place:?}");
        }
        #[cfg(not(debug_assertions))]
        let _ = place;
    }
}
