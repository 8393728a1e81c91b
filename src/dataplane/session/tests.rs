//! Sessions whose frontend needs bytes before it routes, over real sockets and on both
//! engines. No configuration asks for that yet, so the route is made here.

use super::*;
use crate::accept::wait_queue::SlotWaiters;
use crate::access_log::{AccessLogRecord, AccessLogSender};
use crate::worker::EngineKind;
use crate::worker::context::{CarryOver, ProcessContext, ReportQueue};
use socket2::SockRef;
use std::net::{TcpListener as StdTcpListener, TcpStream as StdTcpStream};
use std::time::Duration;
use tidegate_core::control::{ControlEvent, Controller};
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::table::publish::TablePublisher;
use tidegate_core::table::{Preread, Table};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Long enough for a slow machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// Bytes the route needs.
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
            eventually(|| ctx.engine.open_flows() == 0).await;
            engine.abort();
            assert_eq!((ctx.counters.accepted.get(), ctx.counters.ended.get()), (1, 1));
            assert_eq!(ctx.shared.in_flight.get(), 0, "the permit is back");
        };
        let timed = async { tokio::time::timeout(2 * PATIENCE, run).await.expect("it hangs") };
        kind.block_on(timed).unwrap();
    }
}

async fn eventually(mut is_so: impl FnMut() -> bool) {
    let until = clock::now() + PATIENCE;
    while !is_so() {
        assert!(clock::now() < until, "never");
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

    /// A client whose session has started.
    fn client(&self) -> TcpStream {
        let listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
        let client = StdTcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, peer) = listener.accept().unwrap();
        let local = accepted.local_addr().unwrap();
        for socket in [&client, &accepted] {
            socket.set_nonblocking(true).unwrap();
            socket.set_nodelay(true).unwrap();
        }
        let permit = SessionPermit::take(&self.ctx, &self.table, &self.route).unwrap();
        start(permit, &self.route, 1, accepted.into(), PeerAddr::new(peer), local);
        TcpStream::from_std(client).unwrap()
    }

    fn backends_sessions(&self) -> u32 {
        self.route.pool.serving[0].in_flight.get()
    }

    /// What the session was accounted as, once it was.
    async fn record(&self) -> AccessLogRecord {
        let mut record = None;
        eventually(|| {
            record = record.take().or_else(|| self.ctx.access_log.take());
            record.is_some()
        })
        .await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(self.ctx.access_log.take().is_none(), "counted twice");
        record.unwrap()
    }

    async fn assert_ended(&self, cause: Cause, undelivered: u64) {
        let record = self.record().await;
        assert_eq!((record.cause, record.phase), (cause.name(), "preread"));
        assert_eq!((record.bytes_undelivered, record.attempts), (undelivered, 0));
        assert_eq!(self.backends_sessions(), 0);
    }
}

async fn assert_reset(mut client: TcpStream) {
    let end = client.read(&mut [0]).await.unwrap_err();
    assert_eq!(end.kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn session_takes_a_slot_of_the_pool_only_when_its_first_bytes_are_there() {
    on_each(PATIENCE, |bench| async move {
        let mut client = bench.client();
        client.write_all(b"few").await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!((bench.ctx.shared.in_flight.get(), bench.backends_sessions()), (1, 0));

        client.write_all(b" more").await.unwrap();
        let (mut backend, _) = bench.backend.accept().await.unwrap();
        let mut got = [0; 8];
        backend.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"few more", "nothing was consumed");
        assert_eq!(bench.backends_sessions(), 1);
        client.write_all(b"!").await.unwrap();
        backend.read_exact(&mut got[..1]).await.unwrap();
        drop((client, backend));
        let record = bench.record().await;
        assert_eq!((record.cause, record.phase, record.bytes_in), ("finished", "closed", 9));
    });
}

#[test]
fn session_waits_in_the_queue_of_the_pool_it_was_routed_to() {
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
fn client_that_sends_too_little_in_time_is_reset() {
    on_each(Duration::from_millis(150), |bench| async move {
        let mut client = bench.client();
        client.write_all(b"few").await.unwrap();
        assert_reset(client).await;
        bench.assert_ended(Cause::FirstByteTimeout, 3).await;
    });
}

#[test]
fn client_that_ends_before_it_sends_has_left() {
    on_each(PATIENCE, |bench| async move {
        let mut client = bench.client();
        client.shutdown().await.unwrap();
        bench.assert_ended(Cause::ClientLeft, 0).await;
    });
}

#[test]
fn client_that_ends_after_fewer_bytes_is_served() {
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
fn reset_of_the_client_ends_its_session() {
    on_each(PATIENCE, |bench| async move {
        let client = bench.client();
        tokio::time::sleep(Duration::from_millis(20)).await;
        SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
        drop(client);
        bench.assert_ended(Cause::ClientReset, 0).await;
    });
}

#[test]
fn reset_of_all_sessions_reaches_those_that_wait_for_bytes() {
    on_each(PATIENCE, |bench| async move {
        let client = bench.client();
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(bench.ctx.engine.abort_all(Cause::DrainDeadline), 1);
        assert_reset(client).await;
        bench.assert_ended(Cause::DrainDeadline, 0).await;
    });
}

/// Idle sessions are tasks that wait for the end of their relay: what the setup needed must
/// not stay in them.
#[test]
fn idle_sessions_task_is_no_bigger_than_its_session() {
    fn output_size<A, B, F>(_: fn(A, B) -> F) -> usize {
        size_of::<F>()
    }
    assert!(output_size(run) <= size_of::<Session>() + 32, "{}", output_size(run));
}
