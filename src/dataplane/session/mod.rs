//! One client connection's life, in order: pick (done at accept), connect,
//! relay, close, account.
//!
//! Started by `listener` as a task of the worker. A paragraph to read: each
//! step knows nothing of the next. A session that does not get to its end, as
//! its task or its worker has panicked, is accounted for all the same: whoever
//! holds its [`SessionRecord`] drops it, and that is an account.

pub(crate) mod connect;
pub(crate) mod numbers;

use super::relay::{Bytes, RelayHandle, RelayResult, SessionMeter, SessionTimeouts};
use crate::accept::gate::QueueTicket;
use crate::accept::queue;
use crate::accept::slots::SessionPermit;
use crate::access_log::{AccessLogRecord, LoggedClient};
use crate::fault_points::FaultPoint;
use crate::local_errors;
use crate::session::connect::{BackendSlot, ConnectAttempts, ConnectedBackend};
use crate::worker::context::WorkerContext;
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::metrics::counters::{LocalErrorPlace, PanicScope};
use tidegate_core::metrics::histograms::Series;
use tidegate_core::model::Policy;
use tidegate_core::outcome::{self, Cause, Phase, RefusedReason, SessionEnd, SessionSide};
use tidegate_core::table::state::BackendState;
use tidegate_core::table::{FrontendRoute, NoBackend, Reservation};
use tidegate_net::clock;
use tidegate_net::stream;

/// An accepted and admitted connection.
#[derive(Debug)]
pub(crate) struct AcceptedConnection {
    pub(crate) socket: OwnedFd,
    pub(crate) story: SessionRecord,
    pub(crate) start: SessionStart,
    pub(crate) slots: SessionPermit,
}

/// What a session begins with. Made before it could wait for anything, so that a
/// pool's room is what the listener saw, and its line the order of arrival.
#[derive(Debug)]
pub(crate) enum SessionStart {
    /// A choice of backend.
    Picked(Result<Reservation, NoBackend>),
    /// A place in the line for one.
    Queued(QueueTicket),
    /// Another try: the backend it had reset the connection before a word was said.
    /// How the session ends where there is no other.
    Again(SessionEnd),
}

/// What is known of a session when it ends, beside what was relayed. Dropping
/// it untold accounts for a session that was broken off.
#[derive(Debug)]
pub(crate) struct SessionRecord {
    /// `None` once it is accounted for.
    ctx: Option<Rc<WorkerContext>>,
    started: Instant,
    number: u64,
    client: SocketAddr,
    /// Generation of the table it is routed by.
    generation: u64,
    route: Arc<FrontendRoute>,
    attempts: ConnectAttempts,
    /// How long the connect took, in microseconds; idle sessions save the room.
    connect_micros: Option<NonZeroU32>,
}

/// An established session, until it ends; dropped before that, it is broken off.
struct Session(Option<EstablishedSession>);

/// An idle session is made of little else than this.
struct EstablishedSession {
    story: SessionRecord,
    slots: SessionPermit,
    held: BackendSlot,
    /// When it was established.
    since: Instant,
    relay: RelayHandle,
}

/// What a relay came to, for the account.
#[derive(Default)]
struct RelayTotals {
    bytes: Bytes,
    first_byte: Option<Duration>,
}

/// Resets a client that admission has turned away: no backend has been thought
/// of, and no task is made for it.
pub(crate) fn reject(socket: OwnedFd, mut story: SessionRecord, cause: Cause) {
    let unread = stream::unread(&socket);
    stream::reset(socket);
    let ending = SessionEnd { cause, phase: Phase::Admit, errno: 0, closed_first: None };
    story.account(ending, &RelayTotals::unread(unread));
}

/// Serves one client to the end.
pub(crate) fn run(arrival: AcceptedConnection) -> impl Future<Output = ()> {
    let AcceptedConnection { socket, story, start, slots } = arrival;
    // At once: a session can be cut from here on.
    let flow = RelayHandle::open(&story.ctx().engine, socket);
    // Boxed: it is over soon, and an idle session need not keep its room.
    let mut setup = Box::pin(set_up(story, slots, flow, start));
    async move {
        while let Some(session) = setup.await {
            session.keep_account(FaultPoint::Session);
            let relayed = session.relay().relayed().await;
            let Some(Another { story, slots, flow, start }) = session.end(relayed) else {
                return;
            };
            setup = Box::pin(set_up(story, slots, flow, start));
        }
    }
}

/// A session that tries another backend.
struct Another {
    story: SessionRecord,
    slots: SessionPermit,
    flow: RelayHandle,
    start: SessionStart,
}

/// From accept to the relay; where it does not come to that, the session is
/// over and accounted for.
async fn set_up(
    mut story: SessionRecord,
    slots: SessionPermit,
    flow: RelayHandle,
    start: SessionStart,
) -> Option<Session> {
    let ctx = Rc::clone(story.ctx());
    ctx.faults.pass(FaultPoint::Setup);
    match story.reach_backend(&ctx, &flow, start).await {
        Ok(upstream) => Some(Session::begin(story, slots, flow, upstream)),
        Err(ending) => {
            // At once and with RST, so that silence is not taken for an answer.
            story.account(ending, &RelayTotals::unread(flow.refuse()));
            drop(slots);
            None
        }
    }
}

/// What a session that is over says of its backend.
fn classify_end(ctx: &WorkerContext, held: &mut BackendSlot, relayed: &RelayResult) {
    let SessionEnd { cause, .. } = relayed.ending;
    match relayed.unanswered_since {
        Some(since) if is_early_reset(relayed.ending, clock::now() - since) => {
            held.reset_early(ctx);
        }
        // Whoever was cut off while it waited proves nothing.
        Some(_) if cause != Cause::Finished => {}
        None if relayed.first_byte.is_none() && is_backends(cause) => held.failed_trial(),
        _ => held.succeeded(cause == Cause::Finished || relayed.first_byte.is_some()),
    }
}

/// Whether the backend's connection broke. Before the client has spoken that is
/// no failure for the row (whoever connects without a word is often a probe),
/// but a trial is not passed by it.
fn is_backends(cause: Cause) -> bool {
    matches!(cause, Cause::BackendReset | Cause::BackendLost)
}

/// Whether the backend reset the connection though the client had spoken and
/// was waiting. A backend that ends without a byte in order (FIN) is not meant,
/// nor is what comes after it: the reset of a connection whose peer has closed
/// reads as EPIPE (`tcp_reset` in Linux).
fn is_early_reset(ending: SessionEnd, waited: Duration) -> bool {
    ending.cause == Cause::BackendReset
        && ending.phase == Phase::Data
        && ending.errno == libc::ECONNRESET
        && ending.closed_first == Some(SessionSide::Backend)
        && waited <= connect::EARLY_MAX
}

/// Whether the upstream connection was closed by us first: the kernel then keeps
/// its port for a minute (RFC 9293 section 3.3.2, TIME-WAIT), from the moment the
/// backend's FIN comes, so that no later reset can free it.
fn leaves_time_wait(ending: SessionEnd, undelivered: u64) -> bool {
    match ending.cause {
        Cause::Finished => ending.closed_first == Some(SessionSide::Client),
        cause if !cause.closes_in_order(undelivered) => false,
        Cause::HalfClosedTimeout => ending.closed_first == Some(SessionSide::Client),
        _ => true,
    }
}

/// Closes both sockets the way the session ended: with FIN for an end in order, and
/// after time-outs where nothing is lost by it; with RST otherwise. What a side had
/// sent before it failed is with the other by now, or never will be.
fn close(ending: SessionEnd, undelivered: u64, sockets: Option<[OwnedFd; 2]>) {
    if !ending.cause.closes_in_order(undelivered) {
        sockets.into_iter().flatten().for_each(stream::reset);
    }
}

// === impl Session ===

impl Session {
    /// Starts the relay.
    fn begin(
        mut story: SessionRecord,
        slots: SessionPermit,
        flow: RelayHandle,
        upstream: ConnectedBackend,
    ) -> Session {
        let ConnectedBackend { held, connect_time, since } = upstream;
        story.connected(held.backend(), connect_time);
        story.start_relay(&flow, &held);
        Session(Some(EstablishedSession { story, slots, held, since, relay: flow }))
    }

    fn relay(&self) -> &RelayHandle {
        &self.0.as_ref().expect("a session is established until it ends").relay
    }

    /// Closes and accounts for a session whose relay is over, unless it may try
    /// another backend.
    fn end(mut self, relayed: RelayResult) -> Option<Another> {
        let EstablishedSession { mut story, slots, mut held, since, relay } = self.0.take()?;
        drop(relay);
        if relayed.untouched && story.has_another_try() {
            held.reset_unused(story.ctx(), since);
            story.attempts.note_reset(&held, relayed.ending.errno, since);
            return Some(story.try_another(slots, held, relayed));
        }
        let RelayResult { ending, bytes, .. } = relayed;
        let first_byte = relayed.first_byte.map(|at| at.saturating_duration_since(since));
        let totals = RelayTotals { bytes, first_byte };
        story.relayed(held.backend(), &totals);
        classify_end(story.ctx(), &mut held, &relayed);
        if leaves_time_wait(ending, bytes.undelivered) {
            held.note_time_wait();
        }
        close(ending, bytes.undelivered, relayed.sockets);
        drop(held);
        story.account(ending, &totals);
        drop(slots);
        None
    }

    #[inline]
    fn keep_account(&self, place: FaultPoint) {
        if let Some(established) = &self.0 {
            established.story.ctx().faults.pass(place);
        }
    }
}

impl Drop for Session {
    /// Broken off: what it has moved so far is what there is to say. The relay
    /// goes last and has both sockets reset, as neither side has had everything.
    fn drop(&mut self) {
        let Some(EstablishedSession { mut story, slots, held, since, relay }) = self.0.take()
        else {
            return;
        };
        let cause = story.ctx().broken_off_by.get();
        if let Some(so_far) = relay.so_far(cause) {
            let first_byte = so_far.first_byte.map(|at| at.saturating_duration_since(since));
            let totals = RelayTotals { bytes: so_far.bytes, first_byte };
            story.relayed(held.backend(), &totals);
            story.account(so_far.ending, &totals);
        }
        drop((held, story, slots));
    }
}

// === impl RelayTotals ===

impl RelayTotals {
    /// Of a session that was not relayed.
    fn unread(unread: u64) -> RelayTotals {
        let bytes = Bytes { undelivered: unread, ..Bytes::default() };
        RelayTotals { bytes, first_byte: None }
    }
}

// === impl SessionRecord ===

impl SessionRecord {
    /// Begins with a connection that was accepted, and counts it.
    pub(crate) fn new(
        ctx: &Rc<WorkerContext>,
        client: SocketAddr,
        route: &Arc<FrontendRoute>,
        generation: u64,
    ) -> SessionRecord {
        ctx.counters.accepted.add(1);
        route.state.counters.of(ctx.id).sessions.add(1);
        SessionRecord {
            ctx: Some(Rc::clone(ctx)),
            started: clock::now(),
            number: ctx.next_session(),
            client,
            generation,
            route: Arc::clone(route),
            attempts: ConnectAttempts::default(),
            connect_micros: None,
        }
    }

    fn ctx(&self) -> &Rc<WorkerContext> {
        self.ctx.as_ref().expect("a session has its worker until it is accounted for")
    }

    async fn reach_backend(
        &mut self,
        ctx: &WorkerContext,
        flow: &RelayHandle,
        start: SessionStart,
    ) -> Result<ConnectedBackend, SessionEnd> {
        let ip = self.client.ip();
        let mut why = connect::NOBODY;
        let pick = match start {
            SessionStart::Picked(pick) => pick,
            SessionStart::Again(ending) => {
                why = ending;
                self.route.pool.pick(ctx.pick_key(ip), self.attempts.tried())
            }
            SessionStart::Queued(place) => {
                // Boxed, as rare: the room would be every session's otherwise.
                self.attempts.queued = true;
                let served = Box::pin(queue::wait(ctx, flow, place, &self.route, ip)).await?;
                self.attempts.queued = false;
                self.generation = served.generation.unwrap_or(self.generation);
                self.route = served.route;
                served.pick
            }
        };
        connect::dial(ctx, flow, &self.route.pool, ip, pick, &mut self.attempts, why).await
    }

    /// Whether it may be made to go to another backend.
    fn has_another_try(&self) -> bool {
        self.attempts.count < self.route.pool.spec.connect_attempts
    }

    /// Leaves its backend, which has never heard of it, for another.
    fn try_another(self, slots: SessionPermit, held: BackendSlot, relayed: RelayResult) -> Another {
        let [client, _] = relayed.sockets.expect("a relay that is over gives its sockets");
        // Before the next pick: its slot may be what that needs.
        drop(held);
        let flow = RelayHandle::open(&self.ctx().engine, client);
        Another { story: self, slots, flow, start: SessionStart::Again(relayed.ending) }
    }

    fn start_relay(&self, flow: &RelayHandle, held: &BackendSlot) {
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
            backend: Arc::clone(held.backend()),
            trial: held.trial(),
            timed: self.route.pool.spec.balance == Policy::PeakEwma,
        };
        flow.start_relay(limits, meter);
    }

    fn connected(&mut self, backend: &BackendState, connect_time: Duration) {
        let micros = u32::try_from(connect_time.as_micros()).unwrap_or(u32::MAX);
        self.connect_micros = NonZeroU32::new(micros.max(1));
        let ctx = self.ctx();
        backend.counters.of(ctx.id).sessions.add(1);
        ctx.recorder.borrow_mut().record(backend.id.0, Series::Connect, connect_time);
    }

    fn relayed(&self, backend: &BackendState, totals: &RelayTotals) {
        // Never in use here, but for a panic in the middle of it.
        let Ok(mut recorder) = self.ctx().recorder.try_borrow_mut() else { return };
        if let Some(took) = totals.first_byte {
            recorder.record(backend.id.0, Series::FirstByte, took);
        }
        let lasted = clock::now() - self.started;
        recorder.record(backend.id.0, Series::Session, lasted);
    }

    /// Once; after that, nothing.
    fn account(&mut self, ending: SessionEnd, totals: &RelayTotals) {
        let Some(ctx) = self.ctx.take() else { return };
        let SessionEnd { cause, phase, .. } = ending;
        if std::thread::panicking() && !ctx.admitting.get() {
            ctx.counters.panics.cell(PanicScope::Session as usize, 0).add(1);
        }
        if cause == Cause::LocalResource && !matches!(phase, Phase::Admit | Phase::Connect) {
            let error = io::Error::from_raw_os_error(ending.errno);
            ctx.local_error(local_errors::local_kind(&error), LocalErrorPlace::Relay, &error);
        }
        ctx.counters.session_end.cell(cause as usize, phase as usize).add(1);
        ctx.counters.ended.add(1);
        if let Some(reason) = RefusedReason::of(ending) {
            let frontend = self.route.state.counters.of(ctx.id);
            frontend.refused.cell(reason as usize, 0).add(1);
        }
        if ctx.access_log.enabled() && !ctx.access_log.push(self.record(&ctx, ending, totals)) {
            ctx.counters.access_log_dropped.add(1);
        }
    }

    fn record(
        &self,
        ctx: &WorkerContext,
        ending: SessionEnd,
        totals: &RelayTotals,
    ) -> AccessLogRecord {
        let backend = &self.attempts.last;
        AccessLogRecord {
            time: clock::wall(),
            session: self.number,
            worker: ctx.id as u32,
            generation: self.generation,
            frontend: Some(Arc::clone(&self.route.state.name)),
            client: LoggedClient::Socket(self.client),
            pool: Some(Arc::clone(&self.route.pool.spec.name)),
            backend: backend.as_ref().map(|b| Arc::clone(&b.name)),
            backend_address: backend.as_ref().map(|b| Arc::clone(&b.address_text)),
            cause: ending.cause.name(),
            phase: ending.phase.name(),
            code: outcome::code(ending.cause, ending.phase),
            timer: ending.cause.timer(),
            errno: (ending.errno != 0).then_some(ending.errno),
            closed_first: ending.closed_first.map(SessionSide::name),
            attempts: u32::from(self.attempts.count),
            tries: self.attempts.failed(),
            bytes_in: totals.bytes.bytes_in,
            bytes_out: totals.bytes.bytes_out,
            bytes_undelivered: totals.bytes.undelivered,
            connect: self.connect_micros.map(|micros| Duration::from_micros(micros.get().into())),
            first_byte: totals.first_byte,
            duration: clock::now() - self.started,
        }
    }
}

impl Drop for SessionRecord {
    /// Broken off before it was established, unless it is accounted for.
    fn drop(&mut self) {
        if let Some(ctx) = &self.ctx {
            let (cause, phase) = (ctx.broken_off_by.get(), self.attempts.phase());
            let ending = SessionEnd { cause, phase, errno: 0, closed_first: None };
            self.account(ending, &RelayTotals::default());
        }
    }
}
