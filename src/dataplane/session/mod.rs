//! One client's session, from accept to its access-log record.
//!
//! Started by `accept::listener`, then a task of the worker. It never moves bytes: `relay`
//! does. The stages, one file each:
//!
//! 1. `proxy_header`: read the client's PROXY header, if the bind expects one; admit the client.
//! 2. `preread`: wait for first bytes, if the frontend needs them to route.
//! 3. `route`: pick a backend, or wait in the pool's queue.
//! 4. `connect`: connect, with retries; `proxy_header` sends the pool's header.
//! 5. [`Session::start_relay`], then `crate::relay`.
//! 6. `close`: close both sockets.
//! 7. `account`: count and log the end.
//!
//! Dropping a [`Session`] accounts for it, so a panic loses no count. `step_log` logs each
//! stage at `debug`.

mod account;
mod close;
mod connect;
mod decide;
pub(crate) mod numbers;
mod preread;
mod proxy_header;
mod route;
mod step_log;
#[cfg(test)]
mod tests;

use crate::accept::permit::SessionPermit;
use crate::fault_points::FaultPoint;
use crate::relay::{Bytes, RelayHandle, SessionIdentity, SessionMeter, SessionTimeouts};
use crate::worker::context::WorkerContext;
use connect::{BackendSlot, FailedTries};
use decide::LastDecision;
pub(crate) use proxy_header::HeaderBuffers;
use proxy_header::ReceivedHeader;
use route::BackendChoice;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::model::{ClientAddr, OtherPeers, PeerAddr, Policy};
use tidegate_core::outcome::{Cause, Phase, SessionEnd};
use tidegate_core::table::routes::{ConnectionFacts, RouteNumber};
use tidegate_core::table::state::BackendState;
use tidegate_core::table::{FrontendRoute, PoolTable};
use tidegate_net::clock;

/// A client's session. An idle session consists of little more than this.
///
/// The drop order matters: the backend's slot, the permit, then the sockets, which are reset
/// unless they were handed out in a [`RelayResult`](crate::relay::RelayResult).
#[derive(Debug)]
pub(crate) struct Session {
    started: Instant,
    number: u64,
    client: ClientAddr,
    /// The port that the client connected to; 0: a Unix socket.
    local_port: u16,
    /// The table that routed the session.
    table: TableNumbers,
    route: Arc<FrontendRoute>,
    /// Backend of the last connect attempt.
    backend: Option<Arc<BackendState>>,
    /// Boxed because it is rare: most sessions have none of these facts.
    rare: Option<Box<RareFacts>>,
    /// Duration of the connect in µs. 4 bytes, to keep idle sessions small.
    connect_micros: Option<NonZeroU32>,
    /// The frontend's route that matched.
    taken: RouteNumber,
    /// Connect attempts made.
    attempts: u8,
    /// The wait in progress before the connect: `Preread` or `Queue`.
    waits: Option<Phase>,
    accounted: bool,
    last: LastDecision,
    /// Set once connected.
    slot: Option<BackendSlot>,
    permit: SessionPermit,
    relay: RelayHandle,
}

/// What only some sessions have.
#[derive(Debug, Default)]
struct RareFacts {
    failed: FailedTries,
    /// The client's PROXY header.
    header: Option<ReceivedHeader>,
}

/// Numbers of a table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TableNumbers {
    /// Number of the configuration.
    pub(crate) generation: u64,
    pub(crate) serial: u64,
}

/// Starts the session of an accepted connection, or resets a client that admission rejects.
/// The pick is made before any other task runs, so that the slot the listener saw is still
/// free.
pub(crate) fn start(
    permit: SessionPermit,
    route: &Arc<FrontendRoute>,
    table: TableNumbers,
    socket: OwnedFd,
    peer: PeerAddr,
    local: Option<SocketAddr>,
    expects_header: bool,
) {
    let ctx = Rc::clone(&permit.ctx);
    ctx.admitting.set(true);
    let facts = ConnectionFacts { client: ClientAddr::of_peer(peer), local };
    let mut session = Session::new(permit, route, table, socket, &facts);
    session.log_accepted();
    ctx.faults.pass(FaultPoint::Listener);
    let choice = match expects_header {
        true => session.enter_expecting_header(facts),
        false => session.enter(facts),
    };
    match choice {
        Ok(choice) => drop(tokio::task::spawn_local(run(session, choice))),
        // A rejected client needs no task.
        Err(cause) => session.refuse(ended(Phase::Admit, cause)),
    }
    ctx.admitting.set(false);
}

/// The backend choice. `Err`: it must wait for the client's first bytes.
type Choice = Result<BackendChoice, FirstBytes>;

/// What a session waits for before it picks a backend.
#[derive(Debug, Clone, Copy)]
struct FirstBytes {
    facts: ConnectionFacts,
    /// A PROXY header, before all else.
    header: bool,
}

/// Serves one session until it is accounted for.
fn run(session: Session, choice: Choice) -> impl Future<Output = ()> {
    // Boxed because it is short: inline, it would enlarge the future of every idle session.
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

/// An end that neither peer caused.
fn ended(phase: Phase, cause: Cause) -> SessionEnd {
    SessionEnd { cause, phase, errno: 0, closed_first: None }
}

// === impl Session ===

impl Session {
    /// Counts the connection and registers it with the relay, which can abort it.
    fn new(
        permit: SessionPermit,
        route: &Arc<FrontendRoute>,
        table: TableNumbers,
        socket: OwnedFd,
        facts: &ConnectionFacts,
    ) -> Session {
        let ctx = &permit.ctx;
        ctx.counters.accepted.add(1);
        route.state.counters.of(ctx.id).sessions.add(1);
        let number = ctx.next_session();
        let (client, frontend) = (facts.client, route.state.id);
        let identity = SessionIdentity { number, client, frontend };
        let started = clock::now();
        Session {
            started,
            number,
            client,
            local_port: facts.local.map_or(0, |local| local.port()),
            table,
            route: Arc::clone(route),
            backend: None,
            rare: None,
            connect_micros: None,
            taken: RouteNumber::default(),
            attempts: 0,
            waits: None,
            accounted: false,
            last: LastDecision::NONE,
            slot: None,
            relay: RelayHandle::open(&ctx.engine, socket, identity, started),
            permit,
        }
    }

    fn identity(&self) -> SessionIdentity {
        let (client, frontend) = (self.client, self.route.state.id);
        SessionIdentity { number: self.number, client, frontend }
    }

    fn ctx(&self) -> &Rc<WorkerContext> {
        &self.permit.ctx
    }

    /// The pool of the session's route, or the frontend's pool if the route rejects. A
    /// rejected session picks no backend.
    fn pool(&self) -> &PoolTable {
        self.route.pool_of(self.taken).unwrap_or(&self.route.pool)
    }

    /// Connects and starts the relay. If no backend can be reached, accounts for the session.
    async fn set_up(mut self, choice: Choice) -> Session {
        self.ctx().faults.pass(FaultPoint::Setup);
        match self.reach_backend(choice).await {
            Ok(slot) => self.start_relay(slot),
            Err(ending) => self.refuse(ending),
        }
        self
    }

    async fn reach_backend(&mut self, choice: Choice) -> Result<BackendSlot, SessionEnd> {
        // Waits are boxed because they are rare: inline, they would enlarge every future.
        let choice = match choice {
            Ok(choice) => choice,
            Err(first) => Box::pin(self.choose_after(first)).await?,
        };
        let mut why = ended(Phase::Admit, Cause::NoBackend);
        let pick = match choice {
            BackendChoice::Picked(pick) => pick,
            BackendChoice::Queued(ticket, facts) => {
                Box::pin(self.wait_in_queue(ticket, facts)).await?
            }
            BackendChoice::Retry(ending) => {
                why = ending;
                self.pick_retry()
            }
        };
        self.connect(pick, why).await
    }

    /// Admits the client and picks a backend, unless routing needs first bytes.
    fn enter(&mut self, facts: ConnectionFacts) -> Result<Choice, Cause> {
        self.permit.admit_source(&self.route.spec, self.client)?;
        match self.route.preread {
            Some(_) => Ok(Err(FirstBytes { facts, header: false })),
            None => self.choose(facts).map(Ok),
        }
    }

    /// The same on a bind where known peers send PROXY headers.
    #[cold]
    fn enter_expecting_header(&mut self, facts: ConnectionFacts) -> Result<Choice, Cause> {
        match &self.route.spec.proxy_protocol {
            // The mode of the file decides which peers can connect to a Unix socket.
            Some(source) if facts.client.ip().is_none_or(|ip| source.expects(ip)) => {
                Ok(Err(FirstBytes { facts, header: true }))
            }
            Some(source) if source.others == OtherPeers::Refuse => Err(Cause::Denied),
            _ => self.enter(facts),
        }
    }

    /// Waits for the client's first bytes and picks a backend.
    async fn choose_after(&mut self, first: FirstBytes) -> Result<BackendChoice, SessionEnd> {
        let mut phase = Phase::Preread;
        if first.header {
            self.receive_header().await?;
            phase = Phase::Admit;
        }
        if self.route.preread.is_some() {
            self.preread().await?;
            phase = Phase::Preread;
        }
        let facts = ConnectionFacts { client: self.client, ..first.facts };
        self.choose(facts).map_err(|cause| ended(phase, cause))
    }

    fn start_relay(&mut self, slot: BackendSlot) {
        let spec = &self.route.spec;
        let limits = SessionTimeouts {
            first_byte: spec.first_byte_timeout,
            idle: spec.idle_timeout,
            half_closed: spec.half_closed_timeout,
            age: spec.session_max.map(|max| age_at_end(max, self.ctx().draw())),
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

    /// Accounts for a session that is not relayed. Dropping it resets the client: a FIN would
    /// look like an empty answer.
    fn refuse(&mut self, ending: SessionEnd) {
        let undelivered = self.relay.unread();
        self.account(ending, Bytes { undelivered, ..Bytes::default() }, None);
    }
}

/// Returns the age at which a session ends: `max`, or up to 10 % less. So sessions that began
/// together, after a restart of a backend, do not end together.
fn age_at_end(max: Duration, random: u64) -> Duration {
    // Per mille of a tenth.
    let less = (random % 1001) as u32;
    max - max / 10_000 * less
}
