//! One client's session, from accept to its account.
//!
//! Started by `accept::listener`, then a task of the worker. One file a stage, in order:
//! `preread`, `route` (choose a backend), `connect`, the relay (`start_relay` here, then
//! `crate::relay`), `close`, `account`. A session whose task or worker panics is accounted
//! for all the same: to drop a [`Session`] is to account for it.

mod account;
mod close;
mod connect;
pub(crate) mod numbers;
mod preread;
mod route;
#[cfg(test)]
mod tests;

use crate::accept::permit::SessionPermit;
use crate::fault_points::FaultPoint;
use crate::relay::{Bytes, RelayHandle, SessionMeter, SessionTimeouts};
use crate::worker::context::WorkerContext;
use connect::{BackendSlot, FailedTries};
use route::BackendChoice;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;
use tidegate_core::model::{ClientAddr, PeerAddr, Policy};
use tidegate_core::outcome::{Cause, Phase, SessionEnd};
use tidegate_core::table::routes::{ConnectionFacts, RouteNumber};
use tidegate_core::table::state::BackendState;
use tidegate_core::table::{FrontendRoute, PoolTable};
use tidegate_net::clock;

/// A client's session. Fields are dropped in order: the backend's slot, the permit, and
/// last the sockets, which are reset where they were not given away. An idle session is
/// made of little else than this.
#[derive(Debug)]
pub(crate) struct Session {
    started: Instant,
    number: u64,
    client: ClientAddr,
    /// Generation of the table it is routed by.
    generation: u64,
    route: Arc<FrontendRoute>,
    /// Which backend the newest connect attempt went to.
    backend: Option<Arc<BackendState>>,
    /// `None` while none failed: most sessions keep no room for it.
    failed: Option<Box<FailedTries>>,
    /// How long the connect took, in microseconds; idle sessions save the room.
    connect_micros: Option<NonZeroU32>,
    /// Which of the frontend's routes it takes.
    taken: RouteNumber,
    /// Connect attempts.
    attempts: u8,
    /// What it waits for before it connects: `Preread` or `Queue`.
    waits: Option<Phase>,
    accounted: bool,
    /// Once it is connected.
    slot: Option<BackendSlot>,
    permit: SessionPermit,
    relay: RelayHandle,
}

/// Starts the session of an accepted connection, or resets a client that admission turns
/// away. The backend is picked before anything else can run, so that the slot the listener
/// saw is still free.
pub(crate) fn start(
    permit: SessionPermit,
    route: &Arc<FrontendRoute>,
    generation: u64,
    socket: OwnedFd,
    peer: PeerAddr,
    local: SocketAddr,
) {
    let ctx = Rc::clone(&permit.ctx);
    ctx.admitting.set(true);
    let facts = ConnectionFacts { client: ClientAddr::of_peer(peer), local };
    let mut session = Session::new(permit, route, generation, socket, facts.client);
    ctx.faults.pass(FaultPoint::Listener);
    let admitted = session.permit.admit_source(&route.spec, session.client);
    let choice = admitted.and_then(|()| match route.preread {
        Some(_) => Ok(Err(facts)),
        None => session.choose(facts).map(Ok),
    });
    match choice {
        Ok(choice) => drop(tokio::task::spawn_local(run(session, choice))),
        // No task is made for it.
        Err(cause) => session.refuse(ended(Phase::Admit, cause)),
    }
    ctx.admitting.set(false);
}

/// What the choice will be made by, where the client's first bytes are missing yet.
type Choice = Result<BackendChoice, ConnectionFacts>;

/// Serves one client to the end.
fn run(session: Session, choice: Choice) -> impl Future<Output = ()> {
    // Boxed: it is over soon, and an idle session need not keep its room.
    let mut setup = Box::pin(session.set_up(choice));
    async move {
        loop {
            let session = setup.await;
            if session.accounted {
                return;
            }
            session.ctx().faults.pass(FaultPoint::Session);
            let relayed = session.relay.relayed().await;
            let Some((session, choice)) = session.end(relayed) else { return };
            setup = Box::pin(session.set_up(Ok(choice)));
        }
    }
}

/// An end that neither side caused.
fn ended(phase: Phase, cause: Cause) -> SessionEnd {
    SessionEnd { cause, phase, errno: 0, closed_first: None }
}

// === impl Session ===

impl Session {
    /// Counts the connection. From now on the session can be aborted.
    fn new(
        permit: SessionPermit,
        route: &Arc<FrontendRoute>,
        generation: u64,
        socket: OwnedFd,
        client: ClientAddr,
    ) -> Session {
        let ctx = &permit.ctx;
        ctx.counters.accepted.add(1);
        route.state.counters.of(ctx.id).sessions.add(1);
        Session {
            started: clock::now(),
            number: ctx.next_session(),
            client,
            generation,
            route: Arc::clone(route),
            backend: None,
            failed: None,
            connect_micros: None,
            taken: RouteNumber::default(),
            attempts: 0,
            waits: None,
            accounted: false,
            slot: None,
            relay: RelayHandle::open(&ctx.engine, socket),
            permit,
        }
    }

    fn ctx(&self) -> &Rc<WorkerContext> {
        &self.permit.ctx
    }

    /// Where its route leads. A session that its route refuses picks no backend.
    fn pool(&self) -> &PoolTable {
        self.route.pool_of(self.taken).unwrap_or(&self.route.pool)
    }

    /// To the relay; where no backend can be reached, the session is accounted for.
    async fn set_up(mut self, choice: Choice) -> Session {
        self.ctx().faults.pass(FaultPoint::Setup);
        match self.reach_backend(choice).await {
            Ok(slot) => self.start_relay(slot),
            Err(ending) => self.refuse(ending),
        }
        self
    }

    async fn reach_backend(&mut self, choice: Choice) -> Result<BackendSlot, SessionEnd> {
        // Waits are boxed, as rare: the room would be every session's otherwise.
        let choice = match choice {
            Ok(choice) => choice,
            Err(facts) => {
                Box::pin(self.preread()).await?;
                self.choose(facts).map_err(|cause| ended(Phase::Preread, cause))?
            }
        };
        let mut why = ended(Phase::Admit, Cause::NoBackend);
        let pick = match choice {
            BackendChoice::Picked(pick) => pick,
            BackendChoice::Queued(ticket, facts) => {
                Box::pin(self.wait_in_queue(ticket, facts)).await?
            }
            BackendChoice::Retry(ending) => {
                why = ending;
                self.pick_untried()
            }
        };
        self.connect(pick, why).await
    }

    fn start_relay(&mut self, slot: BackendSlot) {
        let spec = &self.route.spec;
        let limits = SessionTimeouts {
            first_byte: spec.first_byte_timeout,
            idle: spec.idle_timeout,
            half_closed: spec.half_closed_timeout,
            stalled: spec.stalled_timeout,
            keepalive: spec.keepalive,
            user_timeout: spec.user_timeout,
        };
        let meter = SessionMeter {
            worker: self.ctx().id as u16,
            frontend: Arc::clone(&self.route.state),
            backend: Arc::clone(slot.backend()),
            trial: slot.trial(),
            timed: self.pool().spec.balance == Policy::PeakEwma,
        };
        self.slot = Some(slot);
        self.relay.start_relay(limits, meter);
    }

    /// Accounts for a session that is not relayed. Its client is reset when it is dropped, so
    /// that silence is not taken for an answer.
    fn refuse(&mut self, ending: SessionEnd) {
        let undelivered = self.relay.unread();
        self.account(ending, Bytes { undelivered, ..Bytes::default() }, None);
    }
}
