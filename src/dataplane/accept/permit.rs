//! Admission: the caps of process, frontend and pool before accept, the limits of a
//! client's source after it, and the permit that an admitted session holds.
//!
//! Asked by the listener before every accept: at a cap no worker accepts, and clients wait
//! in the kernel's queue. Asked by `session` once the client is known: a client that
//! connects from where it must not, or too often, is reset before a backend is chosen.
//! Counts are raised in one step, so that no cap is ever exceeded.

use crate::worker::context::WorkerContext;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;
use tidegate_core::balance::in_flight::InFlight;
use tidegate_core::limits::access_list::Access;
use tidegate_core::limits::client_sources::{
    SourceAdmission, SourcePermit, SourceRefused, SourceTable,
};
use tidegate_core::model::{ClientAddr, FrontendConfig, SourceRules};
use tidegate_core::outcome::Cause;
use tidegate_core::table::state::FrontendState;
use tidegate_core::table::{FrontendRoute, PoolTable, Table};
use tidegate_net::clock;

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

/// Raises the process's and the frontend's count, or neither. `queued` says how many
/// clients wait for a backend of the pool of that name.
pub fn admit(
    process: &InFlight,
    table: &Table,
    route: &FrontendRoute,
    queued: impl Fn(&str) -> usize,
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

/// Whether a pool has a slot for one more, or a place to wait for one. Of several pools
/// one is enough: which one the client is for is known after accept, and where that one
/// is full, the client waits in its queue. So does a client whose first bytes name it.
fn below_caps(route: &FrontendRoute, queued: impl Fn(&str) -> usize) -> bool {
    route.preread.is_some() || route.pools().any(|pool| can_take(pool, queued(&pool.spec.name)))
}

/// Clients that wait come first: where there is a queue, a new one joins its end.
fn can_take(pool: &PoolTable, queued: usize) -> bool {
    if pool.undecided {
        return queued < UNDECIDED_QUEUE_MAX.max(pool.spec.queue_max as usize);
    }
    (queued == 0 && pool.has_room()) || queued < pool.spec.queue_max as usize
}

/// Whether [`admit`] would succeed now; raises nothing.
pub(crate) fn has_free_slots(
    process: &InFlight,
    table: &Table,
    route: &FrontendRoute,
    queued: impl Fn(&str) -> usize,
) -> bool {
    let below = |count: &InFlight, max: u32| max == 0 || count.get() < max;
    below(process, table.connections_max)
        && below(&route.state.in_flight, route.spec.connections_max)
        && below_caps(route, queued)
}

/// One session's places below the caps; dropping it gives them back and wakes those that
/// wait for one.
#[derive(Debug)]
pub(crate) struct SessionPermit {
    pub(crate) ctx: Rc<WorkerContext>,
    frontend: Arc<FrontendState>,
    /// Where the frontend limits what one source may ask for.
    source: Option<SourcePermit>,
}

impl SessionPermit {
    /// Takes a place below every cap, or below none.
    pub(crate) fn take(
        ctx: &Rc<WorkerContext>,
        table: &Table,
        route: &FrontendRoute,
    ) -> Result<SessionPermit, CapReached> {
        let shared = &ctx.shared;
        let admitted = admit(&shared.in_flight, table, route, |pool| shared.waiters.queued(pool));
        if admitted == Err(CapReached::Frontend) {
            // The process's count was up for a moment, in which another worker may have
            // found it full.
            shared.waiters.slot_freed();
        }
        admitted.map(|()| {
            shared.sessions.fetch_add(1, Ordering::Relaxed);
            let frontend = Arc::clone(&route.state);
            SessionPermit { ctx: Rc::clone(ctx), frontend, source: None }
        })
    }

    /// Whether the client may have this connection, by its address; if so, its source's
    /// place is held to the same end.
    pub(crate) fn admit_source(
        &mut self,
        spec: &FrontendConfig,
        client: ClientAddr,
    ) -> Result<(), Cause> {
        let Some(rules) = &spec.sources else { return Ok(()) };
        let ctx = &self.ctx;
        let (seed, now) = (|| ctx.draw(), clock::now());
        match admit_source(rules, &self.frontend, client.ip(), seed, now)? {
            Some(SourceAdmission::Counted(permit)) => self.source = Some(permit),
            Some(SourceAdmission::Untracked) => {
                self.frontend.counters.of(ctx.id).untracked.add(1);
            }
            None => {}
        }
        Ok(())
    }
}

impl Drop for SessionPermit {
    fn drop(&mut self) {
        let shared = &self.ctx.shared;
        self.frontend.in_flight.leave();
        shared.in_flight.leave();
        shared.sessions.fetch_sub(1, Ordering::Relaxed);
        shared.waiters.slot_freed();
    }
}

/// Whether `client` may have this connection; what it gives is held as long as
/// the session lives. `seed` is for the first question of all, which makes the
/// frontend's table of sources.
fn admit_source(
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
