//! Limits: silent clients, queues of pools at their caps, and buffered bytes. Clients beyond a
//! limit wait, are reset or stay in the listen queue, and are counted.

use crate::common::backend::{self, ScriptedBackend, script};
use crate::common::client::{self, End, connect};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, measured, ms, on_every_engine, patience, secs};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

on_every_engine!(
    silent_client_is_closed_after_first_byte_timeout,
    first_byte_of_either_side_stops_first_byte_timeout,
    queue_serves_clients_in_order_of_arrival,
    client_leaving_the_queue_frees_its_slot,
    queue_timeout_resets_the_client_without_a_backend_failure,
    raised_caps_and_new_backends_serve_queued_clients,
    stalled_readers_stay_within_buffers_max_and_lose_no_bytes,
);

fn to(backend: &ScriptedBackend) -> Pool {
    Pool::new("web").backend("a", backend.address())
}

fn with_deadline(engine: Engine, backend: &ScriptedBackend) -> TestProxy {
    let keys = "first_byte_timeout = \"400ms\"";
    TestProxy::start(Conf::new(engine).frontend("web", "web", keys).pool(to(backend)))
}

fn silent_client_is_closed_after_first_byte_timeout(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let proxy = with_deadline(engine, &backend);
    let (silent, start) = (connect(proxy.addr("web")), Instant::now());
    assert_eq!(client::read_to_end(&silent), End::Fin(0));
    let waited = start.elapsed();
    assert!(waited > ms(300) && waited < patience(secs(3)), "closed after {waited:?}");
    let log = proxy.wait_access_log(1);
    let line = &log[0];
    assert_eq!(line["cause"], "first-byte-timeout", "{line:#}");
    assert_eq!((&line["timer"], &line["code"]), (&"first_byte_timeout".into(), &"cD".into()));
    let labels = [("cause", "first-byte-timeout"), ("phase", "data")];
    assert_eq!(proxy.metric("tidegate_session_end_total", &labels), 1.0);
    eventually(secs(5), "the backend connection closes", || backend.active() == 0);
}

fn first_byte_of_either_side_stops_first_byte_timeout(engine: Engine) {
    let speaks_first = ScriptedBackend::start(backend::greet("hello"));
    let answers_late = ScriptedBackend::start(script(|conn| {
        conn.read_exactly(1);
        std::thread::sleep(ms(1200));
        let _ = conn.write_all(b"late");
    }));
    let greeted = with_deadline(engine, &speaks_first);
    let asked = with_deadline(engine, &answers_late);
    let listener = connect(greeted.addr("web"));
    (&listener).read_exact(&mut [0; 5]).unwrap();
    let mut asker = connect(asked.addr("web"));
    asker.write_all(b"?").unwrap();
    let mut answer = [0; 4];
    asker.read_exact(&mut answer).expect("a late answer");
    assert_eq!(client::exchange(&listener, b"still there").unwrap(), b"still there");
}

/// Starts a backend with a cap of one session, which the returned stream occupies.
fn full_backend(engine: Engine, keys: &str) -> (TestProxy, ScriptedBackend, TcpStream) {
    let backend = ScriptedBackend::start(backend::greet("x"));
    let pool =
        Pool::new("web").key(keys).backend_with("a", backend.address(), "connections_max = 1");
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    let holder = connect(proxy.addr("web"));
    greeted(&holder);
    (proxy, backend, holder)
}

#[track_caller]
fn greeted(mut stream: &TcpStream) {
    stream.read_exact(&mut [0]).expect("a greeting");
}

fn queued(proxy: &TestProxy) -> f64 {
    proxy.metric("tidegate_pool_queued", &[("pool", "web")])
}

#[track_caller]
fn wait_queued(proxy: &TestProxy, count: usize) {
    eventually(secs(10), &format!("{count} queued clients"), || queued(proxy) == count as f64);
}

fn queue_serves_clients_in_order_of_arrival(engine: Engine) {
    const CLIENTS: usize = 12;
    let (proxy, _backend, holder) =
        full_backend(engine, "queue_max = 100\nqueue_timeout = \"60s\"");
    let line: Vec<TcpStream> = (1..=CLIENTS)
        .map(|place| {
            let client = connect(proxy.addr("web"));
            wait_queued(&proxy, place);
            client
        })
        .collect();
    assert_eq!(proxy.status()["pools"][0]["queued"], CLIENTS);
    drop(holder);
    // One slot: a client served out of order would keep it from the first client.
    for (place, client) in line.into_iter().enumerate() {
        greeted(&client);
        assert_eq!(queued(&proxy), (CLIENTS - 1 - place) as f64);
    }
    assert_eq!(proxy.metric("tidegate_queued_total", &[]), CLIENTS as f64);
}

fn client_leaving_the_queue_frees_its_slot(engine: Engine) {
    let (proxy, backend, holder) = full_backend(engine, "queue_max = 2\nqueue_timeout = \"60s\"");
    let address = proxy.addr("web");
    let [resets, leaves] = [1, 2].map(|place| {
        let client = connect(address);
        wait_queued(&proxy, place);
        client
    });
    // The queue is full, so these clients wait in the listen queue. One client has sent a
    // request and closed its sending side. It still waits for an answer.
    let asks = connect(address);
    (&asks).write_all(b"all I say").unwrap();
    asks.shutdown(std::net::Shutdown::Write).unwrap();
    std::thread::sleep(ms(100));
    assert_eq!(queued(&proxy), 2.0);
    client::reset(resets);
    drop(leaves);
    let log = proxy.wait_access_log(2);
    for cause in ["client-reset", "client-left"] {
        let line = log.iter().find(|line| line["cause"] == cause).expect(cause);
        assert_eq!((&line["phase"], &line["code"]), (&"queue".into(), &"CQ".into()), "{line:#}");
    }
    wait_queued(&proxy, 1);
    assert_eq!(backend.accepted(), 1, "only the holder's session");
    drop(holder);
    assert_eq!(client::read_text(&asks).unwrap(), "xall I say");
}

fn queue_timeout_resets_the_client_without_a_backend_failure(engine: Engine) {
    let (proxy, backend, _holder) =
        full_backend(engine, "queue_max = 5\nqueue_timeout = \"300ms\"");
    let start = Instant::now();
    let client = connect(proxy.addr("web"));
    assert_eq!(client::read_to_end(&client), End::Reset(0));
    let waited = start.elapsed();
    assert!(waited > ms(250) && waited < patience(secs(3)), "reset after {waited:?}");
    let log = proxy.wait_access_log(1);
    assert_eq!(log[0]["cause"], "queue-timeout", "{:#}", log[0]);
    assert_eq!(proxy.metric("tidegate_refused_total", &[("reason", "queue-timeout")]), 1.0);
    assert_eq!((backend.accepted(), queued(&proxy)), (1, 0.0));
}

fn raised_caps_and_new_backends_serve_queued_clients(engine: Engine) {
    let (mut proxy, _a, _holder) = full_backend(engine, "queue_max = 5\nqueue_timeout = \"60s\"");
    let b = ScriptedBackend::start(backend::greet("b"));
    let [first, second] = [1, 2].map(|place| {
        let client = connect(proxy.addr("web"));
        wait_queued(&proxy, place);
        client
    });
    let mut conf = proxy.conf();
    conf.pool_mut("web").backends[0].keys = "connections_max = 2".into();
    proxy.reload(conf);
    greeted(&first);
    wait_queued(&proxy, 1);
    let mut conf = proxy.conf();
    let pool = conf.pool_mut("web").clone().backend_with("b", b.address(), "connections_max = 1");
    *conf.pool_mut("web") = pool;
    proxy.reload(conf);
    greeted(&second);
    assert_eq!((b.accepted(), queued(&proxy)), (1, 0.0));
}

/// The repeating content of every stream below.
fn pattern() -> Vec<u8> {
    (0..251 * 256_u32).map(|n| (n % 251) as u8).collect()
}

fn stalled_readers_stay_within_buffers_max_and_lose_no_bytes(engine: Engine) {
    const STALLED: usize = 24;
    const BYTES: usize = 251 * 256 * 128;
    const MAX: f64 = 1_048_576.0;
    let backend = ScriptedBackend::start(script(|conn| {
        let block = pattern();
        let _ = (0..128).try_for_each(|_| conn.write_all(&block));
    }));
    let echo = ScriptedBackend::start(backend::echo());
    let conf = Conf::new(engine).process("buffers_max = \"1MiB\"").frontend("web", "web", "");
    let others = Pool::new("others").backend("echo", echo.address());
    let conf = conf.frontend("others", "others", "").pool(to(&backend)).pool(others);
    let proxy = TestProxy::start(conf);
    let (buffered, refused) = ("tidegate_buffered_bytes", "tidegate_buffers_refused_total");
    let before = proxy.rss_kib();
    let stalled: Vec<TcpStream> = (0..STALLED).map(|_| connect(proxy.addr("web"))).collect();
    eventually(secs(20), "the buffer limit is reached", || proxy.metric(refused, &[]) > 0.0);
    let mut last = 0.0;
    eventually(secs(20), "no more bytes are relayed", || {
        std::thread::sleep(ms(300));
        let now = proxy.metric("tidegate_bytes_total", &[("direction", "out")]);
        std::mem::replace(&mut last, now) == now
    });
    let (held, grown) = (proxy.metric(buffered, &[]), proxy.rss_kib().saturating_sub(before));
    measured(&format!("{STALLED} stalled readers: {held} B held, {grown} KiB of memory grown"));
    // Each worker can exceed the limit by one read. io_uring also has its fixed buffer pool.
    let pools = if engine == Engine::IoUring { 2.0 * 16.0 * MAX } else { 0.0 };
    assert!(held <= MAX + 2.0 * 262_144.0 + pools, "{held}");
    let other = connect(proxy.addr("others"));
    assert_eq!(
        client::exchange(&other, &[7; 100_000]).unwrap(),
        [7; 100_000],
        "other clients are not served"
    );
    std::thread::scope(|scope| {
        for mut stream in stalled {
            scope.spawn(move || {
                let (expected, mut block) = (pattern(), pattern());
                for _ in 0..BYTES / expected.len() {
                    stream.read_exact(&mut block).expect("the whole stream");
                    assert!(block == expected, "bytes changed or out of order");
                }
                assert_eq!(client::read_to_end(&stream), End::Fin(0));
            });
        }
    });
    eventually(secs(5), "every buffer is released", || proxy.metric(buffered, &[]) == 0.0);
}
