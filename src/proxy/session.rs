//! One client connection's life, in order: pick (done at accept), connect,
//! relay, close, account.
//!
//! Started by `listener` as a task of the worker. A paragraph to read: each
//! step knows nothing of the next.

use super::close::{self, Cause, Ending, Phase, RefusedReason, Side};
use super::connect::{self, Attempts, Upstream};
use super::context::Context;
use super::relay::{Flow, Limits, Meter, Relayed};
use super::slots::Slots;
use crate::clock;
use crate::net::stream;
use crate::table::state::BackendState;
use crate::table::{FrontendRoute, NoBackend, Reserved};
use crate::telemetry::access_log::{Client, SessionRecord};
use crate::telemetry::histograms::Series;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a reset is held back so that what was sent before it can still
/// arrive. It is looked at every [`FLUSH_STEP`].
const FLUSH_MAX: Duration = Duration::from_secs(1);
const FLUSH_STEP: Duration = Duration::from_millis(5);

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

/// What is known of a session when it ends.
struct Story {
    started: Instant,
    client: SocketAddr,
    generation: u64,
    route: Arc<FrontendRoute>,
    attempts: Attempts,
    connect_time: Option<Duration>,
    first_byte: Option<Duration>,
    bytes_in: u64,
    bytes_out: u64,
}

/// Resets a client that admission has turned away: no backend has been thought
/// of, and no task is made for it.
pub(super) fn turn_away(ctx: &Context, refusal: Refusal) {
    let Refusal { socket, client, route, generation, cause } = refusal;
    stream::reset(socket);
    let ending = Ending { cause, phase: Phase::Admit, errno: 0, closed_first: None };
    Story::new(client, route, generation).account(ctx, ending);
}

/// Serves one client to the end. What is not needed for long is unpacked before
/// the future begins: an idle session is made of little else than this future.
pub(super) fn run(ctx: Rc<Context>, arrival: Arrival) -> impl Future<Output = ()> {
    let Arrival { socket, client, route, generation, pick, slots } = arrival;
    let opened = ctx.engine.open(socket);
    let mut story = Story::new(client, route, generation);
    async move {
        let ending = match opened {
            Ok(flow) => serve(&ctx, flow, pick, &mut story).await,
            Err(error) => connect::local_ending(Phase::Admit, &error),
        };
        story.account(&ctx, ending);
        drop(slots);
    }
}

async fn serve(
    ctx: &Context,
    flow: Flow,
    pick: Result<Reserved, NoBackend>,
    story: &mut Story,
) -> Ending {
    let (route, ip) = (Arc::clone(&story.route), story.client.ip());
    // Boxed: it is over soon, and an idle session need not keep its room.
    let dialled =
        Box::pin(connect::dial(ctx, &flow, &route.pool, ip, pick, &mut story.attempts)).await;
    drop(route);
    let Upstream { held, connect_time, since } = match dialled {
        Ok(upstream) => upstream,
        Err(ending) => {
            // At once and with RST, so that silence is not taken for an answer.
            flow.refuse();
            return ending;
        }
    };
    story.connected(ctx, held.backend(), connect_time);
    let relayed = story.relay(ctx, flow, held.backend()).await;
    story.relayed(ctx, held.backend(), since, &relayed);
    let ending = relayed.ending;
    if let Some(last_words) = finish(relayed) {
        // Boxed, as rare: the room would be every session's otherwise.
        Box::pin(reset_when_sent(last_words)).await;
    }
    ending
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
            first_byte: None,
            bytes_in: 0,
            bytes_out: 0,
        }
    }

    /// Starts the relay; only what this returns waits for its end.
    fn relay(
        &self,
        ctx: &Context,
        flow: Flow,
        backend: &Arc<BackendState>,
    ) -> impl Future<Output = Relayed> + use<> {
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
            backend: Arc::clone(backend),
        };
        flow.relay(limits, meter)
    }

    fn connected(&mut self, ctx: &Context, backend: &BackendState, connect_time: Duration) {
        self.connect_time = Some(connect_time);
        backend.counters.of(ctx.id).sessions.add(1);
        ctx.recorder.borrow_mut().record(backend.id.0, Series::Connect, connect_time);
    }

    fn relayed(&mut self, ctx: &Context, backend: &BackendState, since: Instant, end: &Relayed) {
        self.bytes_in = end.bytes_in;
        self.bytes_out = end.bytes_out;
        let mut recorder = ctx.recorder.borrow_mut();
        if let Some(at) = end.first_byte {
            let took = at.saturating_duration_since(since);
            self.first_byte = Some(took);
            recorder.record(backend.id.0, Series::FirstByte, took);
        }
        let lasted = clock::now() - self.started;
        recorder.record(backend.id.0, Series::Session, lasted);
    }

    fn account(self, ctx: &Context, ending: Ending) {
        let Ending { cause, phase, .. } = ending;
        ctx.counters.session_end.cell(cause as usize, phase as usize).add(1);
        ctx.counters.ended.add(1);
        if let Some(reason) = RefusedReason::of(ending) {
            let frontend = self.route.state.counters.of(ctx.id);
            frontend.refused.cell(reason as usize, 0).add(1);
        }
        if ctx.access_log.enabled() && !ctx.access_log.push(self.into_record(ctx, ending)) {
            ctx.counters.access_log_dropped.add(1);
        }
    }

    fn into_record(self, ctx: &Context, ending: Ending) -> SessionRecord {
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
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out,
            connect: self.connect_time,
            first_byte: self.first_byte,
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
