//! Whether one more connection may be taken off a listen queue.
//!
//! Asked through `slots` before every accept: at a cap no worker accepts, and
//! clients wait in the kernel's queue. Pure but for the shared counts, which it
//! raises by compare-and-swap, so that no cap is ever overshot.

pub mod access;
pub mod sources;

use crate::balance::in_flight::InFlight;
use crate::table::{FrontendRoute, Table};

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

/// Raises the process's and the frontend's count, or neither.
pub fn admit(process: &InFlight, table: &Table, route: &FrontendRoute) -> Result<(), Held> {
    if !route.pool.has_room() {
        return Err(Held::Pool);
    }
    if !process.try_enter(table.connections_max) {
        return Err(Held::Process);
    }
    if !route.state.in_flight.try_enter(route.spec.connections_max) {
        process.leave();
        return Err(Held::Frontend);
    }
    Ok(())
}

/// Whether [`admit`] would succeed now; raises nothing.
pub fn room(process: &InFlight, table: &Table, route: &FrontendRoute) -> bool {
    let below = |count: &InFlight, max: u32| max == 0 || count.get() < max;
    below(process, table.connections_max)
        && below(&route.state.in_flight, route.spec.connections_max)
        && route.pool.has_room()
}
