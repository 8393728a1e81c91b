//! Both engines over real sockets, through the same test functions: what a
//! session owes its two ends must not depend on the engine.

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

/// Long enough for a slow machine, short enough to fail in one's lifetime.
const PATIENCE: Duration = Duration::from_secs(20);

/// No timers.
const FOREVER: SessionTimeouts = SessionTimeouts {
    first_byte: None,
    idle: None,
    half_closed: None,
    stalled: None,
    keepalive: None,
    user_timeout: None,
};

/// An engine that runs, and whom its flows are counted for.
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

/// A ring that starves all the time.
const TINY: RingSettings = RingSettings { buffers: 4, shown: 2 };

/// Runs `test` on each engine, also on a ring that has hardly any buffers, and
/// where the budget allows none.
fn on_each<F: Future<Output = ()>>(test: impl Fn(Rig) -> F) {
    on_each_within(0, &test);
    on_each_within(usize::MAX, &test);
    on(EngineKind::IoUring, || ring_engine(None, RING_SETTINGS, Arc::default(), counters()), &test);
}

/// On both engines, the ring a small one, with that much room for bytes that wait.
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
        eventually("every flow is gone", || engine.open_flows() == 0).await;
        assert!(!task.is_finished(), "the engine gave up");
        task.abort();
    };
    runtime
        .block_on(async { tokio::time::timeout(4 * PATIENCE, main).await.expect("the test hangs") })
        .unwrap();
}

/// Starts relaying at once.
fn relay(
    flow: RelayHandle,
    limits: SessionTimeouts,
    meter: SessionMeter,
) -> impl Future<Output = RelayResult> {
    flow.start_relay(limits, meter);
    async move { flow.relayed().await }
}

fn counters() -> Arc<WorkerCounters> {
    Arc::new(WorkerCounters::new(Cause::COUNT, Phase::COUNT))
}

async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..PATIENCE.as_millis() / 2 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    panic!("never: {what}");
}

/// An address that refuses connects, as long as the socket lives: the socket is bound, so
/// that no other test gets the port, and does not listen.
pub(super) fn refusing_address() -> (Socket, SocketAddr) {
    let bound = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    bound.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let address = bound.local_addr().unwrap().as_socket().unwrap();
    (bound, address)
}

/// Two ends of a TCP connection: who connected, and who accepted.
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

    /// A relayed session.
    fn session(&self, limits: SessionTimeouts) -> Session {
        self.session_with(limits, |_| {})
    }

    /// The same, with `tune` for the engine's upstream socket and its peer.
    fn session_with(&self, limits: SessionTimeouts, tune: impl Fn(SockRef<'_>)) -> Session {
        let (client, downstream) = tcp_pair();
        let (upstream, backend) = tcp_pair();
        // As `listen` and `connect` do.
        tidegate_net::stream::keep_urgent_inline(&downstream);
        tidegate_net::stream::keep_urgent_inline(&upstream);
        tune(SockRef::from(&upstream));
        tune(SockRef::from(&backend));
        let flow = RelayHandle::open(&self.engine, downstream.into());
        flow.attach(upstream.into()).unwrap();
        let relayed = tokio::task::spawn_local(relay(flow, limits, self.meter()));
        Session {
            client: TcpStream::from_std(client).unwrap(),
            backend: TcpStream::from_std(backend).unwrap(),
            relayed,
        }
    }
}
