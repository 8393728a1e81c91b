//! Pools that let clients wait while no backend is eligible (`when_none_eligible = "wait"`).

use crate::common::backend::{self, Refusing, ScriptedBackend};
use crate::common::client::{self, End, connect};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, measured, ms, on_every_engine, patience, secs};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

on_every_engine!(
    clients_wait_through_a_failover_and_are_served_in_order,
    clients_are_served_within_milliseconds_of_the_table,
    clients_beyond_queue_max_wait_in_the_listen_queue,
    client_that_leaves_while_no_backend_is_eligible_frees_its_place,
    client_is_reset_after_queue_timeout_without_an_eligible_backend,
    reload_to_refuse_resets_waiting_clients,
    drain_ends_waiting_clients_at_its_deadline,
    session_waits_if_its_only_backend_refuses_before_a_probe_fails,
    connect_attempts_bound_the_retries_of_a_waiting_session,
);

const FAST_TCP: &str = "kind = \"tcp\"\ninterval = \"100ms\"\ntimeout = \"100ms\"";
const WAIT: &str = "when_none_eligible = \"wait\"";

fn queued(proxy: &TestProxy) -> f64 {
    proxy.metric("tidegate_pool_queued", &[("pool", "web")])
}

#[track_caller]
fn wait_queued(proxy: &TestProxy, count: usize) {
    eventually(secs(10), &format!("{count} queued clients"), || queued(proxy) == count as f64);
}

/// A client that has sent a byte, so that its place in the queue is certain.
#[track_caller]
fn queue_client(proxy: &TestProxy, place: usize) -> TcpStream {
    let client = connect(proxy.addr("web"));
    (&client).write_all(b"?").unwrap();
    wait_queued(proxy, place);
    client
}

#[track_caller]
fn greeted(mut stream: &TcpStream) {
    stream.read_exact(&mut [0]).expect("a greeting");
}

/// A pool with one backend without a probe, which an operator has drained.
fn drained(engine: Engine, keys: &str) -> (TestProxy, ScriptedBackend) {
    let backend = ScriptedBackend::start(backend::greet("x"));
    let pool = Pool::new("web").key(WAIT).key(keys).backend("a", backend.address());
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    proxy.cli_ok(&["drain", "web/a"]);
    (proxy, backend)
}

fn clients_wait_through_a_failover_and_are_served_in_order(engine: Engine) {
    const CLIENTS: usize = 8;
    let mut a = ScriptedBackend::start(backend::greet("x"));
    let address: SocketAddr = a.socket_address();
    let pool = Pool::new("web")
        .key(WAIT)
        .key("queue_max = 100")
        .probe(FAST_TCP)
        // One session at a time shows the order.
        .backend_with("a", address, "connections_max = 1");
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    proxy.wait_backend("web", "a", "observation", "up");
    a.stop();
    proxy.wait_backend("web", "a", "observation", "down");
    let line: Vec<TcpStream> = (1..=CLIENTS).map(|place| queue_client(&proxy, place)).collect();
    let status = proxy.status();
    assert_eq!(status["pools"][0]["none_eligible"], "queue", "{:#}", status["pools"][0]);
    assert!(proxy.cli_ok(&["status"]).contains("NO BACKEND ELIGIBLE: clients are queued"));
    let explained = proxy.cli_ok(&["explain", "web/a"]);
    assert!(explained.contains("new sessions wait in its queue"), "{explained}");
    let forecast = proxy.cli_ok(&["explain", "--client", "127.0.0.1", "--frontend", "web"]);
    assert!(forecast.contains("waits for one, and is reset after 30"), "{forecast}");
    // A failover of more than a second.
    std::thread::sleep(ms(1200));
    let _a = ScriptedBackend::start_on(address, backend::greet("x"));
    for (place, client) in line.into_iter().enumerate() {
        greeted(&client);
        assert_eq!(queued(&proxy), (CLIENTS - 1 - place) as f64);
    }
    let log = proxy.wait_access_log(CLIENTS);
    assert!(log.iter().all(|line| line["why"] == "queue"), "{log:#?}");
    assert!(log.iter().all(|line| line["cause"] != "no-backend"), "{log:#?}");
    assert_eq!(proxy.metric("tidegate_queued_total", &[]), CLIENTS as f64);
    assert_eq!(proxy.metric("tidegate_refused_total", &[("reason", "no-backend")]), 0.0);
}

fn clients_are_served_within_milliseconds_of_the_table(engine: Engine) {
    const CLIENTS: usize = 50;
    let (proxy, _backend) = drained(engine, "queue_max = 100");
    let line: Vec<TcpStream> = (0..CLIENTS).map(|_| connect(proxy.addr("web"))).collect();
    wait_queued(&proxy, CLIENTS);
    let began = Instant::now();
    let answer = proxy.admin_request("POST", "/v1/pools/web/backends/a/undrain");
    let told = began.elapsed();
    assert_eq!(answer.status, 200, "{}", answer.body);
    greeted(&line[0]);
    let first = began.elapsed();
    line[1..].iter().for_each(greeted);
    let all = began.elapsed();
    measured(&format!("{CLIENTS} clients: told {told:?}, first {first:?}, all {all:?}"));
    assert!(all < patience(ms(500)), "served after {all:?}");
}

fn clients_beyond_queue_max_wait_in_the_listen_queue(engine: Engine) {
    let (proxy, backend) = drained(engine, "queue_max = 2");
    let line: Vec<TcpStream> = (0..6).map(|_| connect(proxy.addr("web"))).collect();
    // Each of two workers can exceed the bound by one client.
    eventually(secs(10), "2 queued clients", || queued(&proxy) >= 2.0);
    std::thread::sleep(ms(200));
    assert!(queued(&proxy) <= 4.0, "{} are queued", queued(&proxy));
    assert!(proxy.metric("tidegate_accept_held_at_cap_total", &[]) > 0.0);
    assert_eq!(backend.accepted(), 0);
    proxy.cli_ok(&["undrain", "web/a"]);
    line.iter().for_each(greeted);
}

fn client_that_leaves_while_no_backend_is_eligible_frees_its_place(engine: Engine) {
    let (proxy, backend) = drained(engine, "queue_max = 10");
    let resets = queue_client(&proxy, 1);
    let leaves = connect(proxy.addr("web"));
    wait_queued(&proxy, 2);
    let stays = queue_client(&proxy, 3);
    client::reset(resets);
    drop(leaves);
    let log = proxy.wait_access_log(2);
    for cause in ["client-reset", "client-left"] {
        let line = log.iter().find(|line| line["cause"] == cause).expect(cause);
        assert_eq!((&line["phase"], &line["code"]), (&"queue".into(), &"CQ".into()), "{line:#}");
    }
    wait_queued(&proxy, 1);
    proxy.cli_ok(&["undrain", "web/a"]);
    greeted(&stays);
    assert_eq!(backend.accepted(), 1);
}

fn client_is_reset_after_queue_timeout_without_an_eligible_backend(engine: Engine) {
    let (proxy, backend) = drained(engine, "queue_max = 10\nqueue_timeout = \"300ms\"");
    let began = Instant::now();
    let client = connect(proxy.addr("web"));
    assert_eq!(client::read_to_end(&client), End::Reset(0));
    let waited = began.elapsed();
    assert!(waited > ms(250) && waited < patience(secs(3)), "reset after {waited:?}");
    let log = proxy.wait_access_log(1);
    let line = &log[0];
    assert_eq!((&line["cause"], &line["phase"]), (&"queue-timeout".into(), &"queue".into()));
    assert_eq!(proxy.metric("tidegate_refused_total", &[("reason", "queue-timeout")]), 1.0);
    assert_eq!((backend.accepted(), queued(&proxy)), (0, 0.0));
}

fn reload_to_refuse_resets_waiting_clients(engine: Engine) {
    let (mut proxy, _backend) = drained(engine, "queue_max = 10");
    let line: Vec<TcpStream> = (1..=3).map(|place| queue_client(&proxy, place)).collect();
    let mut conf = proxy.conf();
    conf.pool_mut("web").keys = "queue_max = 10\n".into();
    proxy.reload(conf);
    for client in &line {
        assert_eq!(client::read_to_end(client), End::Reset(0));
    }
    let log = proxy.wait_access_log(3);
    assert!(log.iter().all(|line| line["cause"] == "no-backend"), "{log:#?}");
}

fn drain_ends_waiting_clients_at_its_deadline(engine: Engine) {
    let backend = ScriptedBackend::start(backend::greet("x"));
    let pool = Pool::new("web").key(WAIT).key("queue_max = 10").backend("a", backend.address());
    let conf = Conf::simple(engine, pool).process("drain_timeout = \"500ms\"");
    let mut proxy = TestProxy::start(conf);
    proxy.cli_ok(&["drain", "web/a"]);
    let client = queue_client(&proxy, 1);
    proxy.sigterm();
    assert_eq!(client::read_to_end(&client), End::Reset(0));
    assert_eq!(proxy.wait_exit(secs(10)), Some(0));
    let log = proxy.access_log();
    assert_eq!((&log[0]["cause"], &log[0]["phase"]), (&"drain-deadline".into(), &"queue".into()));
}

fn session_waits_if_its_only_backend_refuses_before_a_probe_fails(engine: Engine) {
    let mut a = ScriptedBackend::start(backend::greet("x"));
    let address = a.socket_address();
    let pool = Pool::new("web")
        .key(WAIT)
        .key("queue_max = 10")
        .probe("kind = \"tcp\"\ninterval = \"10s\"\nfast_interval = \"300ms\"\ntimeout = \"100ms\"")
        .backend("a", address);
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    proxy.wait_backend("web", "a", "observation", "up");
    a.stop();
    // The probes have not seen it yet.
    let client = connect(proxy.addr("web"));
    proxy.wait_backend("web", "a", "observation", "down");
    let _a = ScriptedBackend::start_on(address, backend::greet("x"));
    greeted(&client);
    drop(client);
    let log = proxy.wait_access_log(1);
    assert_eq!((&log[0]["cause"], &log[0]["why"]), (&"finished".into(), &"retry".into()));
    assert!(log[0]["attempts"].as_u64() >= Some(2), "{:#}", log[0]);
}

fn connect_attempts_bound_the_retries_of_a_waiting_session(engine: Engine) {
    let refusing = Refusing::new();
    let pool = Pool::new("web")
        .key(WAIT)
        .key("queue_max = 10\nconnect_attempts = 2")
        .backend("a", refusing.address);
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    let began = Instant::now();
    let client = connect(proxy.addr("web"));
    assert_eq!(client::read_to_end(&client), End::Reset(0));
    // The second attempt is a second after the first.
    let took = began.elapsed();
    assert!(took > ms(900) && took < patience(secs(5)), "reset after {took:?}");
    let log = proxy.wait_access_log(1);
    assert_eq!((&log[0]["cause"], &log[0]["attempts"]), (&"connect-refused".into(), &2.into()));
}
