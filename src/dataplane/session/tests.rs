//! Tests of sessions whose frontend needs first bytes to route, over real sockets and on both
//! engines. No configuration key enables this yet, so the tests build the route themselves.

use super::*;
use crate::accept::wait_queue::SlotWaiters;
use crate::access_log::{AccessLogRecord, AccessLogSender};
use crate::worker::EngineKind;
use crate::worker::context::{CarryOver, ProcessContext, ReportQueue};
use socket2::SockRef;
use std::net::{TcpListener as StdTcpListener, TcpStream as StdTcpStream};
use std::time::Duration;
use tidegate_core::control::{ControlEvent, Controller};
use tidegate_core::decision::rings::Decisions;
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::table::publish::TablePublisher;
use tidegate_core::table::{Preread, Table};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Test timeout, long enough for a slow machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// First bytes that the route needs.
const NEEDED: u32 = 5;

/// A worker without a listener, and a backend.
struct Bench {
    ctx: Rc<WorkerContext>,
    table: Arc<Table>,
    route: Arc<FrontendRoute>,
    backend: TcpListener,
}

fn on_each<F: Future<Output = ()>>(timeout: Duration, test: impl Fn(Bench) -> F) {
    for kind in [EngineKind::Epoll, EngineKind::IoUring] {
        let run = async {
            let bench = Bench::new(kind, timeout);
            let ctx = Rc::clone(&bench.ctx);
            let engine = tokio::task::spawn_local(Rc::clone(&ctx.engine).run());
            test(bench).await;
            eventually(|| ctx.engine.open_sessions() == 0).await;
            engine.abort();
            assert_eq!((ctx.counters.accepted.get(), ctx.counters.ended.get()), (1, 1));
            assert_eq!(ctx.shared.in_flight.get(), 0, "permit is released");
        };
        let timed = async { tokio::time::timeout(2 * PATIENCE, run).await.expect("test hangs") };
        kind.block_on(timed).unwrap();
    }
}

async fn eventually(mut condition: impl FnMut() -> bool) {
    let deadline = clock::now() + PATIENCE;
    while !condition() {
        assert!(clock::now() < deadline, "condition does not hold in time");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

impl Bench {
    fn new(kind: EngineKind, timeout: Duration) -> Bench {
        let backend = StdTcpListener::bind("127.0.0.1:0").unwrap();
        backend.set_nonblocking(true).unwrap();
        let config = format!(
            "[frontend.web]\nbind = '127.0.0.1:80'\npool = 'web'\n[pool.web]\nqueue_max = 4\n\
             queue_timeout = '20s'\n[[pool.web.backend]]\nconnections_max = 1\naddress = '{}'\n",
            backend.local_addr().unwrap()
        );
        let mut controller = Controller::new(1, 7);
        let config = Arc::new(tidegate_config::parse(&config, "test").unwrap());
        controller.apply(ControlEvent::Configure(config), clock::now());
        let table = controller.current_table();
        let FrontendRoute { state, spec, pool, .. } = &*table.frontends[0];
        let route = FrontendRoute {
            state: Arc::clone(state),
            spec: spec.clone(),
            routes: Box::default(),
            pool: Arc::clone(pool),
            preread: Some(Preread { bytes: NEEDED, timeout }),
        };
        let counters = Arc::new(WorkerCounters::new(Cause::COUNT, Phase::COUNT));
        let shared = ProcessContext {
            in_flight: Arc::default(),
            sessions: Arc::default(),
            waiters: Arc::new(SlotWaiters::new()),
            numbers: Arc::default(),
            decisions: Arc::new(Decisions::new(1)),
            reports: Arc::new(ReportQueue::new()),
            ended: Arc::default(),
            buffers: Arc::default(),
        };
        let engine = kind.engine(0, None, &shared.buffers, &counters).unwrap();
        let tables = TablePublisher::new(Arc::clone(&table)).reader();
        let (log, rest) = (AccessLogSender::kept(), CarryOver::default());
        let ctx = WorkerContext::new(0, engine, shared, tables, counters, log, 7, rest);
        let backend = TcpListener::from_std(backend).unwrap();
        Bench { ctx: Rc::new(ctx), table, route: Arc::new(route), backend }
    }

    /// Connects a client and starts its session.
    fn client(&self) -> TcpStream {
        let listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
        let client = StdTcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, peer) = listener.accept().unwrap();
        let local = Some(accepted.local_addr().unwrap());
        for socket in [&client, &accepted] {
            socket.set_nonblocking(true).unwrap();
            socket.set_nodelay(true).unwrap();
        }
        let permit = SessionPermit::take(&self.ctx, &self.table, &self.route).unwrap();
        let table = TableNumbers { generation: 1, serial: self.table.serial };
        start(permit, &self.route, table, accepted.into(), PeerAddr::new(peer), local, false);
        TcpStream::from_std(client).unwrap()
    }

    fn backend_sessions(&self) -> u32 {
        self.route.pool.serving[0].in_flight.get()
    }

    /// Waits for the session's access-log record.
    async fn record(&self) -> AccessLogRecord {
        let mut record = None;
        eventually(|| {
            record = record.take().or_else(|| self.ctx.access_log.take());
            record.is_some()
        })
        .await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(self.ctx.access_log.take().is_none(), "session counted twice");
        record.unwrap()
    }

    async fn assert_ended(&self, cause: Cause, undelivered: u64) {
        let record = self.record().await;
        assert_eq!((record.cause, record.phase), (cause.name(), "preread"));
        assert_eq!((record.bytes_undelivered, record.attempts), (undelivered, 0));
        assert_eq!(self.backend_sessions(), 0);
    }
}

async fn assert_reset(mut client: TcpStream) {
    let end = client.read(&mut [0]).await.unwrap_err();
    assert_eq!(end.kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn session_takes_a_pool_slot_only_after_its_first_bytes() {
    on_each(PATIENCE, |bench| async move {
        let mut client = bench.client();
        client.write_all(b"few").await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!((bench.ctx.shared.in_flight.get(), bench.backend_sessions()), (1, 0));

        client.write_all(b" more").await.unwrap();
        let (mut backend, _) = bench.backend.accept().await.unwrap();
        let mut got = [0; 8];
        backend.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"few more", "preread consumes no byte");
        assert_eq!(bench.backend_sessions(), 1);
        client.write_all(b"!").await.unwrap();
        backend.read_exact(&mut got[..1]).await.unwrap();
        drop((client, backend));
        let record = bench.record().await;
        assert_eq!((record.cause, record.phase, record.bytes_in), ("finished", "closed", 9));
    });
}

#[test]
fn session_waits_in_the_queue_of_its_routed_pool() {
    on_each(PATIENCE, |bench| async move {
        let slot = &bench.route.pool.serving[0].in_flight;
        assert!(slot.try_enter(1));
        let mut client = bench.client();
        client.write_all(b"enough").await.unwrap();
        eventually(|| bench.ctx.shared.waiters.queued("web") == 1).await;
        slot.leave();
        bench.ctx.shared.waiters.slot_freed();
        let (mut backend, _) = bench.backend.accept().await.unwrap();
        backend.read_exact(&mut [0; 6]).await.unwrap();
        drop((client, backend));
        assert_eq!(bench.record().await.cause, "finished");
    });
}

#[test]
fn client_that_sends_too_few_bytes_is_reset_at_the_timeout() {
    on_each(Duration::from_millis(150), |bench| async move {
        let mut client = bench.client();
        client.write_all(b"few").await.unwrap();
        assert_reset(client).await;
        bench.assert_ended(Cause::FirstByteTimeout, 3).await;
    });
}

#[test]
fn fin_before_the_first_byte_ends_the_session_as_client_left() {
    on_each(PATIENCE, |bench| async move {
        let mut client = bench.client();
        client.shutdown().await.unwrap();
        bench.assert_ended(Cause::ClientLeft, 0).await;
    });
}

#[test]
fn client_that_sends_fin_after_fewer_bytes_is_served() {
    on_each(PATIENCE, |bench| async move {
        let mut client = bench.client();
        client.write_all(b"few").await.unwrap();
        client.shutdown().await.unwrap();
        let (mut backend, _) = bench.backend.accept().await.unwrap();
        let mut all = Vec::new();
        backend.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, b"few");
        drop(backend);
        assert_eq!(bench.record().await.cause, "finished");
    });
}

#[test]
fn client_reset_ends_the_session() {
    on_each(PATIENCE, |bench| async move {
        let client = bench.client();
        tokio::time::sleep(Duration::from_millis(20)).await;
        SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
        drop(client);
        bench.assert_ended(Cause::ClientReset, 0).await;
    });
}

#[test]
fn abort_all_reaches_sessions_that_wait_for_first_bytes() {
    on_each(PATIENCE, |bench| async move {
        let client = bench.client();
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(bench.ctx.engine.abort_all(Cause::DrainDeadline), 1);
        assert_reset(client).await;
        bench.assert_ended(Cause::DrainDeadline, 0).await;
    });
}

/// An idle session is a task that waits for the end of its relay. It must not keep the state
/// of its set-up.
#[test]
fn task_of_an_idle_session_is_at_most_32_bytes_larger_than_its_session() {
    fn output_size<A, B, F>(_: fn(A, B) -> F) -> usize {
        size_of::<F>()
    }
    assert!(output_size(run) <= size_of::<Session>() + 32, "{}", output_size(run));
}
