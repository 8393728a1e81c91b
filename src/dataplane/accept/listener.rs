//! One bind address on one worker: accepts connections while the caps allow and starts a
//! session for each.
//!
//! Started and retired by `worker`. It never accepts a connection that it cannot serve:
//!
//! - At a cap, clients wait in the listen queue.
//! - Out of descriptors or memory, it pauses for 10 ms to 100 ms.

use super::permit::{self, SessionPermit};
use crate::local_errors;
use crate::session::{self, TableNumbers};
use crate::worker::context::WorkerContext;
use socket2::Socket;
use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::metrics::counters::LocalErrorPlace;
use tidegate_core::metrics::progress::WorkerStage;
use tidegate_core::model::{BindKey, LocalPeer, PeerAddr};
use tidegate_core::table::{FrontendRoute, Table};
use tidegate_net::clock;
use tidegate_net::listen::AcceptedPeer;
use tidegate_net::{datagram, listen, reactor};
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

/// Connections accepted per wake-up before other tasks run.
const ACCEPTS_PER_WAKE: u32 = 64;

/// Shortest and longest pause when accept fails because descriptors or memory are short.
const BACK_OFF_MIN: Duration = Duration::from_millis(10);
const BACK_OFF_MAX: Duration = Duration::from_millis(100);

/// How long a retired listener continues to accept clients that were in its listen queue or
/// in a handshake.
const RETIRE_LINGER: Duration = Duration::from_millis(200);

/// Requests and times the retirement of a listener.
#[derive(Debug, Default)]
pub(crate) struct ListenerRetirement {
    deadline: Cell<Option<Instant>>,
    /// Another process serves the listen queue.
    released: Cell<bool>,
    asked: Notify,
}

/// A bind address on this worker.
#[derive(Debug)]
pub(crate) struct Listener {
    bind: BindKey,
    socket: AsyncFd<Arc<Socket>>,
    retirement: Rc<ListenerRetirement>,
    /// Generation and route of the last accept. Serves clients that are still queued after
    /// the frontend has left the table.
    last_route: Option<LastRoute>,
}

/// A frontend as of the last accept.
#[derive(Debug, Clone)]
struct LastRoute {
    generation: u64,
    route: Arc<FrontendRoute>,
    /// Known peers of this bind send PROXY headers.
    expects_header: bool,
}

/// Result of an accept.
enum AcceptResult {
    Accepted,
    QueueEmpty,
    AtCap,
    LocalShortage,
    /// The connection failed before it was accepted.
    Aborted,
}

impl Listener {
    fn new(
        bind: BindKey,
        socket: Arc<Socket>,
        retirement: Rc<ListenerRetirement>,
    ) -> io::Result<Listener> {
        let socket = reactor::watch_readable(socket)?;
        Ok(Listener { bind, socket, retirement, last_route: None })
    }

    /// Listens until retired. Retries if the socket cannot be watched yet: clients are in its
    /// queue already.
    pub(crate) async fn serve(
        ctx: Rc<WorkerContext>,
        bind: BindKey,
        socket: Arc<Socket>,
        retirement: Rc<ListenerRetirement>,
    ) {
        loop {
            match Listener::new(bind.clone(), Arc::clone(&socket), Rc::clone(&retirement)) {
                Ok(listener) => {
                    drop(socket);
                    return listener.run(ctx).await;
                }
                Err(error) => ctx.local_error(
                    local_errors::local_kind(&error),
                    LocalErrorPlace::Accept,
                    &error,
                ),
            }
            if retirement.is_released() || retirement.is_over() {
                return;
            }
            tokio::time::sleep(BACK_OFF_MAX).await;
        }
    }

    /// Accepts until the listener is retired and its queue is empty, or until it is released.
    /// Dropping the listener drops this worker's reference to the socket.
    pub(crate) async fn run(mut self, ctx: Rc<WorkerContext>) {
        let mut back_off = BACK_OFF_MIN;
        // Clients held in the listen queue by a cap extend the retirement.
        while !self.retirement.is_released()
            && (!self.retirement.is_over() || self.has_queued_clients())
        {
            match self.accept_batch(&ctx) {
                AcceptResult::QueueEmpty if self.retirement.is_over() => {}
                AcceptResult::Accepted | AcceptResult::Aborted => {
                    back_off = BACK_OFF_MIN;
                    tokio::task::yield_now().await;
                }
                AcceptResult::QueueEmpty => self.more_queued().await,
                AcceptResult::AtCap => self.wait_for_slot(&ctx).await,
                AcceptResult::LocalShortage => {
                    tokio::time::sleep(back_off).await;
                    back_off = (back_off * 2).min(BACK_OFF_MAX);
                }
            }
        }
    }

    /// Whether the listen queue holds clients and this listener has a route for them.
    fn has_queued_clients(&self) -> bool {
        self.last_route.is_some() && listen::has_queued(self.socket.get_ref())
    }

    /// Accepts up to [`ACCEPTS_PER_WAKE`] connections. Returns why it stopped.
    fn accept_batch(&mut self, ctx: &Rc<WorkerContext>) -> AcceptResult {
        let table = ctx.table();
        if let Some(route) = table.frontend_at(&self.bind)
            && self.last_route.as_ref().is_none_or(|last| !Arc::ptr_eq(&last.route, route))
        {
            let expects_header = route.expects_header(&self.bind);
            let (generation, route) = (table.generation, Arc::clone(route));
            self.last_route = Some(LastRoute { generation, route, expects_header });
        }
        let Some(last) = self.last_route.clone() else {
            return AcceptResult::QueueEmpty;
        };
        ctx.counters.pulse.at(WorkerStage::Accepting);
        let result = self.accept_several(ctx, &table, &last);
        ctx.counters.pulse.at(WorkerStage::Waiting);
        result
    }

    fn accept_several(
        &mut self,
        ctx: &Rc<WorkerContext>,
        table: &Table,
        last: &LastRoute,
    ) -> AcceptResult {
        // If every accept of a batch fails, the cause is this host, not the connections.
        let mut all_aborted = true;
        for _ in 0..ACCEPTS_PER_WAKE {
            match self.accept_one(ctx, table, last) {
                AcceptResult::Accepted => all_aborted = false,
                AcceptResult::Aborted => {}
                stopped => return stopped,
            }
        }
        if all_aborted { AcceptResult::LocalShortage } else { AcceptResult::Accepted }
    }

    fn accept_one(&self, ctx: &Rc<WorkerContext>, table: &Table, last: &LastRoute) -> AcceptResult {
        let LastRoute { generation, route, expects_header } = last;
        if ctx.is_accept_paused() {
            return AcceptResult::LocalShortage;
        }
        let Ok(permit) = SessionPermit::take(ctx, table, route) else {
            ctx.counters.accept_held_at_cap.add(1);
            return AcceptResult::AtCap;
        };
        match listen::accept(self.socket.get_ref()) {
            Ok((socket, peer)) => {
                let local = self.local_address(route, &socket);
                let numbers = TableNumbers { generation: *generation, serial: table.serial };
                let peer = match peer {
                    AcceptedPeer::Ip(address) => PeerAddr::Ip(address),
                    AcceptedPeer::Local { user, process } => {
                        PeerAddr::Local(LocalPeer { user, process })
                    }
                };
                session::start(permit, route, numbers, socket, peer, local, *expects_header);
                AcceptResult::Accepted
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => AcceptResult::QueueEmpty,
            Err(error) if local_errors::accept_can_continue(&error) => AcceptResult::Aborted,
            Err(error) => {
                ctx.local_error(local_errors::local_kind(&error), LocalErrorPlace::Accept, &error);
                AcceptResult::LocalShortage
            }
        }
    }

    /// Returns the address the client has connected to. This costs a system call only if a
    /// route needs the address and the bind is a wildcard.
    /// `None`: a Unix socket.
    fn local_address(&self, route: &FrontendRoute, socket: &OwnedFd) -> Option<SocketAddr> {
        let bind = self.bind.socket_addr()?;
        Some(match bind.ip().is_unspecified() && route.needs_local_address() {
            true => datagram::local_address(socket).unwrap_or(bind),
            false => bind,
        })
    }

    /// Waits until the listen queue can hold a client or the retirement takes a step.
    async fn more_queued(&self) {
        // All futures only wait for readiness or time, so the loser can be dropped.
        tokio::select! {
            ready = self.socket.readable() => {
                // Edge-triggered: a client that arrived after the last accept raises
                // readiness again, so the flag can be cleared before accepting.
                if let Ok(mut ready) = ready {
                    ready.clear_ready();
                }
            }
            () = self.retirement.next_step() => {}
        }
    }

    /// Waits until every cap has a free slot.
    async fn wait_for_slot(&self, ctx: &WorkerContext) {
        let shared = &ctx.shared;
        let admitted = shared.waiters.wait_until(|| {
            let table = ctx.table();
            let route = table
                .frontend_at(&self.bind)
                .or(self.last_route.as_ref().map(|last| &last.route))?;
            // Only a check: the next accept takes its own permit.
            let queued = |pool: &str| shared.waiters.queued(pool);
            permit::has_free_slots(&shared.in_flight, &table, route, queued).then_some(())
        });
        tokio::select! {
            () = admitted => {}
            () = self.retirement.next_step() => {}
        }
    }
}

// === impl ListenerRetirement ===

impl ListenerRetirement {
    /// Continues the retirement of a panicked thread's listener, if it had begun.
    pub(crate) fn due(deadline: Option<Instant>) -> ListenerRetirement {
        ListenerRetirement { deadline: Cell::new(deadline), ..ListenerRetirement::default() }
    }

    /// When the retirement ends; `None` if it has not begun.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadline.get()
    }

    /// Starts the retirement, which lasts [`RETIRE_LINGER`].
    pub(crate) fn begin(&self) {
        if self.deadline.get().is_none() {
            self.deadline.set(Some(clock::now() + RETIRE_LINGER));
            self.asked.notify_one();
        }
    }

    /// Ends the listener at once and leaves its listen queue to another process.
    pub(crate) fn release(&self) {
        self.released.set(true);
        self.begin();
    }

    pub(crate) fn is_released(&self) -> bool {
        self.released.get()
    }

    fn is_over(&self) -> bool {
        self.deadline.get().is_some_and(|deadline| clock::now() >= deadline)
    }

    /// Resolves when the retirement begins; if it has begun, when it ends; after that, never.
    async fn next_step(&self) {
        match self.deadline.get() {
            Some(_) if self.is_over() => std::future::pending().await,
            Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
            None => self.asked.notified().await,
        }
    }
}
