//! Tests of both engines over real sockets. Each test function runs on both: the behaviour of a
//! session must not depend on the engine.

mod ends;
mod engine;
mod setup;
mod streams;

use super::*;
use crate::worker::EngineKind;
use socket2::{Domain, SockRef, Socket, Type};
use std::future::Future;
use std::net::{SocketAddr, TcpListener, TcpStream as StdTcpStream};
use tidegate_core::model::BackendAddr;
use tidegate_core::outcome::{Phase, SessionSide};
use tidegate_core::table::state::{BackendState, FrontendId, FrontendState};
use tidegate_net::clock;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

/// Test timeout, long enough for a slow machine.
const TIMEOUT: Duration = Duration::from_secs(20);

/// All timeouts off.
const NO_TIMEOUTS: SessionTimeouts = SessionTimeouts {
    first_byte: None,
    idle: None,
    half_closed: None,
    age: None,
    stalled: None,
    keepalive: None,
    user_timeout: None,
};

fn identity() -> SessionIdentity {
    let client = ClientAddr::announced(([192, 0, 2, 1], 4000).into());
    SessionIdentity { number: 7, client, frontend: FrontendId(1) }
}

/// A running engine, with the frontend and backend of its sessions.
#[derive(Clone)]
struct Rig {
    engine: Engine,
    frontend: Arc<FrontendState>,
    backend: Arc<BackendState>,
}

/// A relayed session and its two peers.
struct Session {
    client: TcpStream,
    backend: TcpStream,
    relayed: JoinHandle<RelayResult>,
}

/// A ring with too few buffers.
const TINY: RingSettings = RingSettings { buffers: 4, shown: 2 };

/// Runs `test` on epoll and on a tiny ring, with a budget of 0 and without a limit, and on a ring
/// of the default size.
fn on_each<F: Future<Output = ()>>(test: impl Fn(Rig) -> F) {
    on_each_within(0, &test);
    on_each_within(usize::MAX, &test);
    on(EngineKind::IoUring, || ring_engine(None, RING_SETTINGS, Arc::default(), counters()), &test);
}

/// Runs `test` on epoll and on a tiny ring, with a budget of `max` buffered bytes.
fn on_each_within<F: Future<Output = ()>>(max: usize, test: impl Fn(Rig) -> F) {
    let budget = || Arc::new(MemoryBudget::new(max));
    on(EngineKind::Epoll, || epoll_engine(None, budget(), counters()), &test);
    on(EngineKind::IoUring, || ring_engine(None, TINY, budget(), counters()), &test);
}

fn on<F: Future<Output = ()>>(
    runtime: EngineKind,
    engine: impl Fn() -> io::Result<Engine>,
    test: impl Fn(Rig) -> F,
) {
    let main = async {
        let engine = engine().unwrap();
        let task = tokio::task::spawn_local(Rc::clone(&engine).run());
        test(Rig::new(engine.clone())).await;
        eventually("all sessions are removed", || engine.open_sessions() == 0).await;
        assert!(!task.is_finished(), "engine task ended");
        task.abort();
    };
    runtime
        .block_on(async { tokio::time::timeout(4 * TIMEOUT, main).await.expect("test hangs") })
        .unwrap();
}

/// Starts the relay and returns a future of its result.
fn relay(
    handle: RelayHandle,
    limits: SessionTimeouts,
    meter: SessionMeter,
) -> impl Future<Output = RelayResult> {
    handle.start_relay(limits, meter);
    async move { handle.relayed().await }
}

fn counters() -> Arc<WorkerCounters> {
    Arc::new(WorkerCounters::new(Cause::COUNT, Phase::COUNT))
}

async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..TIMEOUT.as_millis() / 2 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    panic!("not in time: {what}");
}

/// Returns an address that refuses connects while the socket is open. The socket is bound, so
/// that no other test gets the port, and does not listen.
pub(super) fn refusing_address() -> (Socket, SocketAddr) {
    let bound = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    bound.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let address = bound.local_addr().unwrap().as_socket().unwrap();
    (bound, address)
}

/// Returns the connecting and the accepting end of a TCP connection.
fn tcp_pair() -> (StdTcpStream, StdTcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let left = StdTcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (right, _) = listener.accept().unwrap();
    for socket in [&left, &right] {
        socket.set_nonblocking(true).unwrap();
        socket.set_nodelay(true).unwrap();
    }
    (left, right)
}

fn reset(socket: TcpStream) {
    SockRef::from(&socket).set_linger(Some(Duration::ZERO)).unwrap();
    drop(socket);
}

impl Rig {
    fn new(engine: Engine) -> Rig {
        let address = BackendAddr::Tcp("127.0.0.1:1".parse().unwrap());
        let frontend = FrontendState::new(FrontendId(0), "f".into(), 1, 5);
        let backend = BackendState::new(BackendId(0), "p".into(), "b".into(), address, 1);
        Rig { engine, frontend: Arc::new(frontend), backend: Arc::new(backend) }
    }

    fn meter(&self) -> SessionMeter {
        let (frontend, backend) = (Arc::clone(&self.frontend), Arc::clone(&self.backend));
        SessionMeter { worker: 0, frontend, backend, trial: None, timed: false }
    }

    fn bytes_in(&self) -> u64 {
        self.frontend.counters.sum(|counters| counters.bytes_in.get())
    }

    /// Starts a relayed session.
    fn session(&self, limits: SessionTimeouts) -> Session {
        self.session_with(limits, |_| {})
    }

    /// Starts a relayed session; `tune` configures both ends of the backend connection.
    fn session_with(&self, limits: SessionTimeouts, tune: impl Fn(SockRef<'_>)) -> Session {
        let (client, downstream) = tcp_pair();
        let (upstream, backend) = tcp_pair();
        // `listen` and `connect` set this too.
        tidegate_net::stream::keep_urgent_inline(&downstream);
        tidegate_net::stream::keep_urgent_inline(&upstream);
        tune(SockRef::from(&upstream));
        tune(SockRef::from(&backend));
        let handle = RelayHandle::open(&self.engine, downstream.into(), identity(), clock::now());
        handle.attach(upstream.into()).unwrap();
        let relayed = tokio::task::spawn_local(relay(handle, limits, self.meter()));
        Session {
            client: TcpStream::from_std(client).unwrap(),
            backend: TcpStream::from_std(backend).unwrap(),
            relayed,
        }
    }
}
