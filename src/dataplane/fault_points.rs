//! Faults that tests inject into the data path: a panic at a named point.
//!
//! The data path calls [`FaultPlan::pass`] at each point. In a release build that function is
//! empty and nothing can arm a fault. In a debug build the admin API arms faults only if the
//! environment has `TIDEGATE_FAULTS=1`.

#[cfg(debug_assertions)]
use std::cell::Cell;

/// A point at which an armed fault panics, once.
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
    /// The worker's event loop, at once.
    Worker,
}

/// The armed fault, if any.
#[derive(Debug, Default)]
pub(super) struct FaultPlan {
    #[cfg(debug_assertions)]
    armed: Cell<Option<FaultPoint>>,
}

// === impl FaultPoint ===

#[cfg(debug_assertions)]
impl FaultPoint {
    /// Returns the point of this name in the admin API.
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
    /// Lets the next pass of this point panic.
    #[cfg(debug_assertions)]
    pub(super) fn arm(&self, fault: FaultPoint) {
        self.armed.set(Some(fault));
    }

    /// Panics if a fault is armed for this point. Empty in a release build.
    #[inline]
    pub(super) fn pass(&self, point: FaultPoint) {
        #[cfg(debug_assertions)]
        if self.armed.get() == Some(point) {
            self.armed.set(None);
            panic!("injected fault: {point:?}");
        }
        #[cfg(not(debug_assertions))]
        let _ = point;
    }
}
