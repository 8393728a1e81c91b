//! One bind address on one worker: takes connections off the listen queue as
//! long as the caps allow, and starts a session for each.
//!
//! Started and retired by `worker`. It never accepts what it cannot serve: at a
//! cap clients wait in the kernel's queue; at a lack of descriptors it backs
//! off, and never spins.

use super::permit::{self, SessionPermit};
use crate::local_errors;
use crate::session;
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
use tidegate_core::model::{BindKey, PeerAddr};
use tidegate_core::table::{FrontendRoute, Table};
use tidegate_net::clock;
use tidegate_net::{datagram, listen, reactor};
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

/// Connections taken in one go before sessions get their turn.
const ACCEPTS_A_WAKE: u32 = 64;

/// First and longest pause when accept fails for want of descriptors or memory.
const BACK_OFF_MIN: Duration = Duration::from_millis(10);
const BACK_OFF_MAX: Duration = Duration::from_millis(100);

/// How long a retired listener goes on accepting what was in its queue or in
/// the middle of a handshake. Nobody new gets in meanwhile.
const RETIRE_LINGER: Duration = Duration::from_millis(200);

/// Tells a listener to retire.
#[derive(Debug, Default)]
pub(crate) struct ListenerRetirement {
    deadline: Cell<Option<Instant>>,
    /// The queue is another process's from now on.
    released: Cell<bool>,
    asked: Notify,
}

/// A bind address on this worker.
#[derive(Debug)]
pub(crate) struct Listener {
    bind: BindKey,
    socket: AsyncFd<Arc<Socket>>,
    retirement: Rc<ListenerRetirement>,
    /// By which the last connection was routed: serves what is still queued
    /// once the frontend has left the table.
    last_route: Option<(u64, Arc<FrontendRoute>)>,
}

/// What one try to accept came to.
enum AcceptResult {
    One,
    QueueEmpty,
    AtCap,
    LocalShortage,
    /// A connection that broke before it was taken.
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

    /// Listens until retired; where the socket cannot be watched, as soon as it
    /// can: clients are in its queue already.
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

    /// Accepts until it is retired and its queue is empty. Dropping the
    /// listener closes this worker's hold on the socket.
    pub(crate) async fn run(mut self, ctx: Rc<WorkerContext>) {
        let mut back_off = BACK_OFF_MIN;
        // Clients that wait for a slot below a cap outwait the retirement.
        while !self.retirement.is_released()
            && (!self.retirement.is_over() || self.has_queued_clients())
        {
            match self.accept_batch(&ctx) {
                AcceptResult::QueueEmpty if self.retirement.is_over() => {}
                AcceptResult::One | AcceptResult::Aborted => {
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

    /// Whether somebody is in the queue whom this listener knows how to serve.
    fn has_queued_clients(&self) -> bool {
        self.last_route.is_some() && listen::has_queued(self.socket.get_ref())
    }

    /// Accepts up to [`ACCEPTS_A_WAKE`]; says what stopped it.
    fn accept_batch(&mut self, ctx: &Rc<WorkerContext>) -> AcceptResult {
        let table = ctx.table();
        if let Some(route) = table.frontend_at(&self.bind)
            && self.last_route.as_ref().is_none_or(|(_, last)| !Arc::ptr_eq(last, route))
        {
            self.last_route = Some((table.generation, Arc::clone(route)));
        }
        let Some((generation, route)) = self.last_route.clone() else {
            return AcceptResult::QueueEmpty;
        };
        ctx.counters.pulse.at(WorkerStage::Accepting);
        let taken = self.accept_several(ctx, &table, generation, &route);
        ctx.counters.pulse.at(WorkerStage::Waiting);
        taken
    }

    fn accept_several(
        &mut self,
        ctx: &Rc<WorkerContext>,
        table: &Table,
        generation: u64,
        route: &Arc<FrontendRoute>,
    ) -> AcceptResult {
        // An errno that comes for every connection is no single connection's.
        let mut all_spoilt = true;
        for _ in 0..ACCEPTS_A_WAKE {
            match self.accept_one(ctx, table, generation, route) {
                AcceptResult::One => all_spoilt = false,
                AcceptResult::Aborted => {}
                stopped => return stopped,
            }
        }
        if all_spoilt { AcceptResult::LocalShortage } else { AcceptResult::One }
    }

    fn accept_one(
        &self,
        ctx: &Rc<WorkerContext>,
        table: &Table,
        generation: u64,
        route: &Arc<FrontendRoute>,
    ) -> AcceptResult {
        if ctx.is_short() {
            return AcceptResult::LocalShortage;
        }
        let Ok(permit) = SessionPermit::take(ctx, table, route) else {
            ctx.counters.accept_held_at_cap.add(1);
            return AcceptResult::AtCap;
        };
        match listen::accept(self.socket.get_ref()) {
            Ok((socket, peer)) => {
                let local = self.local_address(route, &socket);
                session::start(permit, route, generation, socket, PeerAddr::new(peer), local);
                AcceptResult::One
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => AcceptResult::QueueEmpty,
            Err(error) if local_errors::accept_can_continue(&error) => AcceptResult::Aborted,
            Err(error) => {
                ctx.local_error(local_errors::local_kind(&error), LocalErrorPlace::Accept, &error);
                AcceptResult::LocalShortage
            }
        }
    }

    /// Where the client has connected to. The kernel is asked only where a route needs to
    /// know and the bind does not say.
    fn local_address(&self, route: &FrontendRoute, socket: &OwnedFd) -> SocketAddr {
        let bind = self.bind.socket_addr();
        match bind.ip().is_unspecified() && route.needs_local_address() {
            true => datagram::local_address(socket).unwrap_or(bind),
            false => bind,
        }
    }

    /// Waits until the queue may hold something, or it is time to look at the
    /// retirement again.
    async fn more_queued(&self) {
        // Readiness and timers only: nothing is lost by dropping the losers.
        tokio::select! {
            ready = self.socket.readable() => {
                // What the kernel queued between the last accept and now makes
                // a new edge, so the flag may be cleared before accepting.
                if let Ok(mut ready) = ready {
                    ready.clear_ready();
                }
            }
            () = self.retirement.next_step() => {}
        }
    }

    /// Waits until the cap that held the last accept leaves room again.
    async fn wait_for_slot(&self, ctx: &WorkerContext) {
        let shared = &ctx.shared;
        let admitted = shared.waiters.wait_until(|| {
            let table = ctx.table();
            let route =
                table.frontend_at(&self.bind).or(self.last_route.as_ref().map(|(_, r)| r))?;
            // Nothing is taken: the next accept takes its own permit.
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
    /// One that goes on from another thread's, if that had begun.
    pub(crate) fn due(deadline: Option<Instant>) -> ListenerRetirement {
        ListenerRetirement { deadline: Cell::new(deadline), ..ListenerRetirement::default() }
    }

    /// When it is over, where it has begun.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadline.get()
    }

    /// Starts the retirement: over in [`RETIRE_LINGER`].
    pub(crate) fn begin(&self) {
        if self.deadline.get().is_none() {
            self.deadline.set(Some(clock::now() + RETIRE_LINGER));
            self.asked.notify_one();
        }
    }

    /// Ends the listener at once, whatever is in its queue.
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

    /// Resolves when the retirement begins, and then when it is over; after
    /// that, never.
    async fn next_step(&self) {
        match self.deadline.get() {
            Some(_) if self.is_over() => std::future::pending().await,
            Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
            None => self.asked.notified().await,
        }
    }
}
