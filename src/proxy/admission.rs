//! Whether one more connection may be taken off a listen queue.
//!
//! Asked by the listener before every accept: at a cap no worker accepts, and
//! clients wait in the kernel's queue. Pure but for the shared counts, which it
//! raises by compare-and-swap, so that no cap is ever overshot.

use super::gate::Gate;
use crate::balance::in_flight::InFlight;
use crate::table::state::FrontendState;
use crate::table::{FrontendRoute, Table};
use std::sync::Arc;

/// The process's and the frontend's slot of one session; dropping it gives
/// both back and opens the gate.
#[derive(Debug)]
pub struct Slots {
    process: Arc<InFlight>,
    frontend: Arc<FrontendState>,
    gate: Arc<Gate>,
}

/// Which cap is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// `process.connections_max`.
    Process,
    /// The frontend's `connections_max`.
    Frontend,
    /// Every backend in service is at its `connections_max`.
    Pool,
}

/// Takes a slot everywhere, or nowhere.
pub fn admit(
    process: &Arc<InFlight>,
    gate: &Arc<Gate>,
    table: &Table,
    route: &FrontendRoute,
) -> Result<Slots, Held> {
    if !route.pool.has_room() {
        return Err(Held::Pool);
    }
    if !process.try_enter(table.connections_max) {
        return Err(Held::Process);
    }
    if !route.state.in_flight.try_enter(route.spec.connections_max) {
        process.leave();
        gate.opened();
        return Err(Held::Frontend);
    }
    Ok(Slots {
        process: Arc::clone(process),
        frontend: Arc::clone(&route.state),
        gate: Arc::clone(gate),
    })
}

/// Whether [`admit`] would succeed now; takes nothing.
pub fn room(process: &InFlight, table: &Table, route: &FrontendRoute) -> bool {
    let below = |count: &InFlight, max: u32| max == 0 || count.get() < max;
    below(process, table.connections_max)
        && below(&route.state.in_flight, route.spec.connections_max)
        && route.pool.has_room()
}

impl Drop for Slots {
    fn drop(&mut self) {
        self.frontend.in_flight.leave();
        self.process.leave();
        self.gate.opened();
    }
}
