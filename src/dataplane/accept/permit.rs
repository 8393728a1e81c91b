//! Admission of new connections, in two steps.
//!
//! 1. Before each accept, for the listener: is a slot free below the caps of process, frontend
//!    and pool? If not, no worker accepts, and clients wait in the listen queue.
//! 2. After accept, for `session`: is the client address allowed, and is its client source
//!    below its limits? If not, the client is reset before a backend is picked.
//!
//! Each counter is checked and raised in one atomic step, so caps are never exceeded.

use crate::worker::context::WorkerContext;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;
use tidegate_core::balance::in_flight::InFlight;
use tidegate_core::limits::access_list::Access;
use tidegate_core::limits::client_sources::{
    Client, SourceAdmission, SourcePermit, SourceRefused, SourceTable,
};
use tidegate_core::model::{ClientAddr, FrontendConfig, PeerAddr, SourceRules};
use tidegate_core::outcome::Cause;
use tidegate_core::table::state::FrontendState;
use tidegate_core::table::{FrontendRoute, PoolTable, Table};
use tidegate_net::clock;

/// Queued clients of a pool that has no probe result yet. More wait in the listen queue.
pub const UNDECIDED_QUEUE_MAX: usize = 4096;

/// The cap that is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CapReached {
    /// `process.connections_max`.
    Process,
    /// The frontend's `connections_max`.
    Frontend,
    /// Every eligible backend is at its `connections_max`, or clients wait for an eligible
    /// one, and `queue_max` clients are queued;
    /// or the pool has no probe result yet, and [`UNDECIDED_QUEUE_MAX`] clients are queued.
    Pool,
}

/// Raises the process count and the frontend count, or neither. `queued` returns the number
/// of queued clients of a pool, by its name.
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

/// Whether any pool of the frontend has a free slot or a free place in its queue.
///
/// The client's own pool is known only after accept, or after its first bytes. If that pool is
/// full, the client waits in its queue.
fn below_caps(route: &FrontendRoute, queued: impl Fn(&str) -> usize) -> bool {
    route.preread.is_some() || route.pools().any(|pool| can_admit(pool, queued(&pool.spec.name)))
}

/// Returns whether the pool has a free slot or a free place in its queue. Queued clients come
/// first: a free slot counts only if the queue is empty.
pub fn can_admit(pool: &PoolTable, queued: usize) -> bool {
    if pool.undecided {
        return queued < UNDECIDED_QUEUE_MAX.max(pool.spec.queue_max as usize);
    }
    (queued == 0 && pool.has_room()) || queued < pool.spec.queue_max as usize
}

/// Whether [`admit`] would succeed now. Raises no count.
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

/// A session's slots below the process, frontend and client-source caps. Dropping it frees
/// them and wakes waiting listeners and clients.
#[derive(Debug)]
pub(crate) struct SessionPermit {
    pub(crate) ctx: Rc<WorkerContext>,
    frontend: Arc<FrontendState>,
    /// Set if the frontend limits client sources.
    source: Option<SourcePermit>,
}

impl SessionPermit {
    /// Takes a slot below the process cap and the frontend cap, or none.
    pub(crate) fn take(
        ctx: &Rc<WorkerContext>,
        table: &Table,
        route: &FrontendRoute,
    ) -> Result<SessionPermit, CapReached> {
        let shared = &ctx.shared;
        let admitted = admit(&shared.in_flight, table, route, |pool| shared.waiters.queued(pool));
        if admitted == Err(CapReached::Frontend) {
            // The process count was raised for a moment. A listener of another worker may
            // have found it at its cap and be waiting.
            shared.waiters.slot_freed();
        }
        admitted.map(|()| {
            shared.sessions.fetch_add(1, Ordering::Relaxed);
            let frontend = Arc::clone(&route.state);
            SessionPermit { ctx: Rc::clone(ctx), frontend, source: None }
        })
    }

    /// Checks the client address, and takes a slot of its client source for the life of the
    /// session. The error is the cause of the rejection.
    pub(crate) fn admit_source(
        &mut self,
        spec: &FrontendConfig,
        client: ClientAddr,
    ) -> Result<(), Cause> {
        let Some(rules) = &spec.sources else { return Ok(()) };
        let ctx = &self.ctx;
        let (seed, now) = (|| ctx.draw(), clock::now());
        match admit_source(rules, &self.frontend, client, seed, now)? {
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

/// Checks `client` against the frontend's access list and client-source limits. `seed` is
/// called once per frontend, for the hash of its source table. `None`: no limits apply.
fn admit_source(
    rules: &SourceRules,
    frontend: &FrontendState,
    client: ClientAddr,
    seed: impl FnOnce() -> u64,
    now: Instant,
) -> Result<Option<SourceAdmission>, Cause> {
    let source = match client.socket() {
        PeerAddr::Ip(address) => Client::Ip(address.ip()),
        PeerAddr::Local(peer) => Client::User(peer.user),
    };
    // The ranges do not apply to clients of Unix sockets. The mode of the file does.
    if client.ip().is_some_and(|ip| rules.access.of(ip) == Access::Denied) {
        return Err(Cause::Denied);
    }
    if !rules.limits.are_any() {
        return Ok(None);
    }
    let sources = frontend.sources.get_or_init(|| Arc::new(SourceTable::new(seed(), now)));
    match sources.admit(source, &rules.limits, now) {
        Ok(admitted) => Ok(Some(admitted)),
        Err(SourceRefused::TooMany) => Err(Cause::SourceConnections),
        Err(SourceRefused::TooFast) => Err(Cause::SourceRate),
    }
}
