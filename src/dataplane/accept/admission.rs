//! Whether one more connection may be taken off a listen queue, and, once it is
//! and its source is known, whether it may stay.
//!
//! The first is asked through `slots` before every accept: at a cap no worker
//! accepts, and clients wait in the kernel's queue. The second is asked by the
//! listener: who connects from where it must not, or too much, is reset before
//! any backend is thought of. Pure but for the shared counts, which it raises
//! in one step, so that no cap is ever overshot.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;
use tidegate_core::balance::in_flight::InFlight;
use tidegate_core::limits::access_list::Access;
use tidegate_core::limits::client_sources::{SourceAdmission, SourceRefused, SourceTable};
use tidegate_core::model::SourceRules;
use tidegate_core::outcome::Cause;
use tidegate_core::table::state::FrontendState;
use tidegate_core::table::{FrontendRoute, Table};

/// Clients of a pool that may wait for its first verdict; more wait in the kernel's
/// queue.
pub const UNDECIDED_QUEUE_MAX: usize = 4096;

/// Which cap is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CapReached {
    /// `process.connections_max`.
    Process,
    /// The frontend's `connections_max`.
    Frontend,
    /// Every backend in service is at its `connections_max`, and `queue_max`
    /// clients wait already; or [`UNDECIDED_QUEUE_MAX`] wait for a first verdict.
    Pool,
}

/// Raises the process's and the frontend's count, or neither. `queued` clients
/// wait for a backend of the pool already.
pub fn admit(
    process: &InFlight,
    table: &Table,
    route: &FrontendRoute,
    queued: usize,
) -> Result<(), CapReached> {
    if !below_caps(route, queued) {
        return Err(CapReached::Pool);
    }
    if !process.try_enter(table.connections_max) {
        return Err(CapReached::Process);
    }
    if !route.state.in_flight.try_enter(route.spec.connections_max) {
        process.leave();
        return Err(CapReached::Frontend);
    }
    Ok(())
}

/// Whether the pool has a slot for one more, or a place to wait for one. Who waits
/// comes first: where there is a line, its end is where to go.
fn below_caps(route: &FrontendRoute, queued: usize) -> bool {
    if route.pool.undecided {
        return queued < UNDECIDED_QUEUE_MAX.max(route.pool.spec.queue_max as usize);
    }
    if queued == 0 && route.pool.has_room() {
        return true;
    }
    queued < route.pool.spec.queue_max as usize
}

/// Whether [`admit`] would succeed now; raises nothing.
pub fn free_slots(process: &InFlight, table: &Table, route: &FrontendRoute, queued: usize) -> bool {
    let below = |count: &InFlight, max: u32| max == 0 || count.get() < max;
    below(process, table.connections_max)
        && below(&route.state.in_flight, route.spec.connections_max)
        && below_caps(route, queued)
}

/// Whether `client` may have this connection; what it gives is held as long as
/// the session lives. `seed` is for the first question of all, which makes the
/// frontend's table of sources.
pub fn source(
    rules: &SourceRules,
    frontend: &FrontendState,
    client: IpAddr,
    seed: impl FnOnce() -> u64,
    now: Instant,
) -> Result<Option<SourceAdmission>, Cause> {
    if rules.access.of(client) == Access::Denied {
        return Err(Cause::Denied);
    }
    if !rules.limits.are_any() {
        return Ok(None);
    }
    let sources = frontend.sources.get_or_init(|| Arc::new(SourceTable::new(seed(), now)));
    match sources.admit(client, &rules.limits, now) {
        Ok(admitted) => Ok(Some(admitted)),
        Err(SourceRefused::TooMany) => Err(Cause::SourceConnections),
        Err(SourceRefused::TooFast) => Err(Cause::SourceRate),
    }
}
