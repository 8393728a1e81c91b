//! One client connection's life, in order: pick (done at accept), connect,
//! relay, close, account.
//!
//! Started by `listener` as a task of the worker. A paragraph to read: each
//! step knows nothing of the next.

use super::close::{self, Cause, Ending, Phase, RefusedReason, Side};
use super::connect::{self, Attempts, Held, Upstream};
use super::context::Context;
use super::relay::{Flow, Limits, Meter, Relay, Relayed};
use super::slots::Slots;
use crate::clock;
use crate::config::Policy;
use crate::net::{errno, stream};
use crate::table::state::BackendState;
use crate::table::{FrontendRoute, NoBackend, Reserved};
use crate::telemetry::access_log::{Client, SessionRecord};
use crate::telemetry::counters::LocalError;
use crate::telemetry::histograms::Series;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a reset is held back so that what was sent before it can still
/// arrive. It is looked at every [`FLUSH_STEP`].
const FLUSH_MAX: Duration = Duration::from_secs(1);
const FLUSH_STEP: Duration = Duration::from_millis(5);

/// A reset that comes later after the client's first byte is not early: clients
/// that only send, such as those of a log server, are reset one day by a
/// restart, and that says nothing of how the backend takes new sessions.
const EARLY_MAX: Duration = Duration::from_secs(10);

/// An accepted and admitted connection.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) socket: OwnedFd,
    pub(super) client: SocketAddr,
    pub(super) route: Arc<FrontendRoute>,
    /// Generation of the table it is routed by.
    pub(super) generation: u64,
    /// Made before the session could wait for anything, so that a pool's room
    /// is what the listener saw.
    pub(super) pick: Result<Reserved, NoBackend>,
    pub(super) slots: Slots,
}

/// A connection whose source may not have it.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) socket: OwnedFd,
    pub(super) client: SocketAddr,
    pub(super) route: Arc<FrontendRoute>,
    pub(super) generation: u64,
    pub(super) cause: Cause,
}

/// What is known of a session when it ends, beside what was relayed.
struct Story {
    started: Instant,
    client: SocketAddr,
    generation: u64,
    route: Arc<FrontendRoute>,
    attempts: Attempts,
    connect_time: Option<Duration>,
}

/// An established session. An idle one is made of little else than this.
struct Session {
    ctx: Rc<Context>,
    story: Story,
    slots: Slots,
    held: Held,
    /// When it was established.
    since: Instant,
    relay: Relay,
}

/// What a relay came to, for the account.
#[derive(Default)]
struct Totals {
    bytes_in: u64,
    bytes_out: u64,
    first_byte: Option<Duration>,
}

/// Resets a client that admission has turned away: no backend has been thought
/// of, and no task is made for it.
pub(super) fn turn_away(ctx: &Context, refusal: Refusal) {
    let Refusal { socket, client, route, generation, cause } = refusal;
    stream::reset(socket);
    let ending = Ending { cause, phase: Phase::Admit, errno: 0, closed_first: None };
    Story::new(client, route, generation).account(ctx, ending, Totals::default());
}

/// Serves one client to the end.
pub(super) fn run(ctx: Rc<Context>, arrival: Arrival) -> impl Future<Output = ()> {
    let Arrival { socket, client, route, generation, pick, slots } = arrival;
    // At once: a session can be cut from here on.
    let opened = ctx.engine.open(socket);
    let story = Story::new(client, route, generation);
    // Boxed: it is over soon, and an idle session need not keep its room.
    let setup = Box::pin(set_up(ctx, story, slots, opened, pick));
    async move {
        let mut session = match setup.await {
            Some(session) => session,
            None => return,
        };
        let relayed = (&mut session.relay).await;
        if let Some(last_words) = session.end(relayed) {
            last_words.await;
        }
    }
}

/// From accept to the relay; where it does not come to that, the session is
/// over and accounted for.
async fn set_up(
    ctx: Rc<Context>,
    mut story: Story,
    slots: Slots,
    opened: io::Result<Flow>,
    pick: Result<Reserved, NoBackend>,
) -> Option<Session> {
    match story.establish(&ctx, opened, pick).await {
        Ok((flow, upstream)) => Some(Session::begin(ctx, story, slots, flow, upstream)),
        Err(ending) => {
            story.account(&ctx, ending, Totals::default());
            drop(slots);
            None
        }
    }
}

/// What a session that is over says of its backend.
fn judge(ctx: &Context, held: &mut Held, relayed: &Relayed) {
    let Ending { cause, .. } = relayed.ending;
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
fn is_early_reset(ending: Ending, waited: Duration) -> bool {
    ending.cause == Cause::BackendReset
        && ending.phase == Phase::Data
        && ending.errno == libc::ECONNRESET
        && ending.closed_first == Some(Side::Backend)
        && waited <= EARLY_MAX
}

/// Closes both sockets the way the session ended: FIN for an end in order and
/// for idle time-outs, RST for a reset or a cut. What one side had sent before
/// its reset is given time to reach the other: that socket is given back, to be
/// reset when everything is sent.
fn finish(relayed: Relayed) -> Option<OwnedFd> {
    let [client, backend] = relayed.sockets;
    match relayed.ending.cause {
        Cause::ClientReset | Cause::ClientLost => {
            drop(client);
            Some(backend)
        }
        Cause::BackendReset | Cause::BackendLost => {
            drop(backend);
            Some(client)
        }
        Cause::Finished | Cause::IdleTimeout | Cause::HalfClosedTimeout => None,
        _ => {
            stream::reset(client);
            stream::reset(backend);
            None
        }
    }
}

/// Resets `socket` once the peer has acknowledged everything, or after
/// [`FLUSH_MAX`]: a reset throws the send queue away.
async fn reset_when_sent(socket: OwnedFd) {
    let mut left = FLUSH_MAX;
    while stream::unacknowledged(&socket) > 0 && !left.is_zero() {
        tokio::time::sleep(FLUSH_STEP).await;
        left = left.saturating_sub(FLUSH_STEP);
    }
    stream::reset(socket);
}

// === impl Session ===

impl Session {
    /// Starts the relay.
    fn begin(
        ctx: Rc<Context>,
        mut story: Story,
        slots: Slots,
        flow: Flow,
        upstream: Upstream,
    ) -> Session {
        let Upstream { held, connect_time, since } = upstream;
        story.connected(&ctx, held.backend(), connect_time);
        let relay = story.relay(&ctx, flow, &held);
        Session { ctx, story, slots, held, since, relay }
    }

    /// Closes and accounts for a session whose relay is over; at once, but for
    /// the rare one whose last words still have to arrive.
    fn end(self, relayed: Relayed) -> Option<Pin<Box<impl Future<Output = ()>>>> {
        let Session { ctx, story, slots, mut held, since, relay } = self;
        drop(relay);
        let totals = story.relayed(&ctx, held.backend(), since, &relayed);
        let ending = relayed.ending;
        if ending.cause == Cause::LocalResource {
            let error = io::Error::from_raw_os_error(ending.errno);
            let kind = errno::local_trouble(&error).unwrap_or(LocalError::Other);
            ctx.counters.local_errors.cell(kind as usize, 0).add(1);
        }
        judge(&ctx, &mut held, &relayed);
        let Some(last_words) = finish(relayed) else {
            drop(held);
            story.account(&ctx, ending, totals);
            drop(slots);
            return None;
        };
        Some(Box::pin(async move {
            reset_when_sent(last_words).await;
            drop(held);
            story.account(&ctx, ending, totals);
            drop(slots);
        }))
    }
}

// === impl Story ===

impl Story {
    fn new(client: SocketAddr, route: Arc<FrontendRoute>, generation: u64) -> Story {
        Story {
            started: clock::now(),
            client,
            generation,
            route,
            attempts: Attempts::default(),
            connect_time: None,
        }
    }

    /// Connects the client's flow.
    async fn establish(
        &mut self,
        ctx: &Context,
        opened: io::Result<Flow>,
        pick: Result<Reserved, NoBackend>,
    ) -> Result<(Flow, Upstream), Ending> {
        let flow = opened.map_err(|error| connect::local_ending(Phase::Admit, &error))?;
        let (pool, ip) = (&self.route.pool, self.client.ip());
        match connect::dial(ctx, &flow, pool, ip, pick, &mut self.attempts).await {
            Ok(upstream) => Ok((flow, upstream)),
            Err(ending) => {
                // At once and with RST, so that silence is not taken for an answer.
                flow.refuse();
                Err(ending)
            }
        }
    }

    fn relay(&self, ctx: &Context, flow: Flow, held: &Held) -> Relay {
        let spec = &self.route.spec;
        let limits = Limits {
            idle: spec.idle_timeout,
            half_closed: spec.half_closed_timeout,
            keepalive: spec.keepalive,
            user_timeout: spec.user_timeout,
        };
        let meter = Meter {
            worker: ctx.id,
            frontend: Arc::clone(&self.route.state),
            backend: Arc::clone(held.backend()),
            trial: held.trial(),
            timed: self.route.pool.spec.balance == Policy::PeakEwma,
        };
        flow.relay(limits, meter)
    }

    fn connected(&mut self, ctx: &Context, backend: &BackendState, connect_time: Duration) {
        self.connect_time = Some(connect_time);
        backend.counters.of(ctx.id).sessions.add(1);
        ctx.recorder.borrow_mut().record(backend.id.0, Series::Connect, connect_time);
    }

    fn relayed(
        &self,
        ctx: &Context,
        backend: &BackendState,
        since: Instant,
        end: &Relayed,
    ) -> Totals {
        let mut recorder = ctx.recorder.borrow_mut();
        let first_byte = end.first_byte.map(|at| at.saturating_duration_since(since));
        if let Some(took) = first_byte {
            recorder.record(backend.id.0, Series::FirstByte, took);
        }
        let lasted = clock::now() - self.started;
        recorder.record(backend.id.0, Series::Session, lasted);
        Totals { bytes_in: end.bytes_in, bytes_out: end.bytes_out, first_byte }
    }

    fn account(self, ctx: &Context, ending: Ending, totals: Totals) {
        let Ending { cause, phase, .. } = ending;
        ctx.counters.session_end.cell(cause as usize, phase as usize).add(1);
        ctx.counters.ended.add(1);
        if let Some(reason) = RefusedReason::of(ending) {
            let frontend = self.route.state.counters.of(ctx.id);
            frontend.refused.cell(reason as usize, 0).add(1);
        }
        if ctx.access_log.enabled() && !ctx.access_log.push(self.into_record(ctx, ending, totals)) {
            ctx.counters.access_log_dropped.add(1);
        }
    }

    fn into_record(self, ctx: &Context, ending: Ending, totals: Totals) -> SessionRecord {
        let backend = self.attempts.last;
        SessionRecord {
            time: clock::wall(),
            session: ctx.next_session(),
            worker: ctx.id as u32,
            generation: self.generation,
            frontend: Some(Arc::clone(&self.route.state.name)),
            client: Client::Socket(self.client),
            pool: Some(Arc::clone(&self.route.pool.spec.name)),
            backend: backend.as_ref().map(|b| Arc::clone(&b.name)),
            backend_address: backend.as_ref().map(|b| Arc::clone(&b.address_text)),
            cause: ending.cause.name(),
            phase: ending.phase.name(),
            code: close::code(ending.cause, ending.phase),
            timer: ending.cause.timer(),
            errno: (ending.errno != 0).then_some(ending.errno),
            closed_first: ending.closed_first.map(Side::name),
            attempts: u32::from(self.attempts.count),
            bytes_in: totals.bytes_in,
            bytes_out: totals.bytes_out,
            connect: self.connect_time,
            first_byte: totals.first_byte,
            duration: clock::now() - self.started,
        }
    }
}

// === impl RefusedReason ===

impl RefusedReason {
    /// Why a session that never had a backend was turned away; `None` for one
    /// that ended otherwise.
    fn of(ending: Ending) -> Option<RefusedReason> {
        if !matches!(ending.phase, Phase::Admit | Phase::Queue | Phase::Connect) {
            return None;
        }
        match ending.cause {
            Cause::NoBackend => Some(RefusedReason::NoBackend),
            Cause::LocalResource => Some(RefusedReason::LocalResource),
            Cause::QueueTimeout => Some(RefusedReason::QueueTimeout),
            Cause::ConnectRefused | Cause::ConnectTimeout | Cause::ConnectFailed => {
                Some(RefusedReason::ConnectFailed)
            }
            Cause::Denied => Some(RefusedReason::Denied),
            Cause::SourceConnections => Some(RefusedReason::SourceConnections),
            Cause::SourceRate => Some(RefusedReason::SourceRate),
            _ => None,
        }
    }
}
