//! Ending: of the process by signal or command, of one backend by an operator.
//!
//! Old sessions go on, new ones go elsewhere or are refused, and the exit code
//! tells what happened.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, End, connect, try_connect};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, ms, on_every_engine, patience, secs};
use rustix::process::Signal;
use std::net::TcpStream;
use std::time::Instant;

on_every_engine!(
    sigterm_lets_open_sessions_finish,
    sigint_drains_as_well,
    shutdown_command_drains_as_well,
    drain_deadline_cuts_what_is_left_and_says_how_many,
    second_signal_exits_at_once,
    exit_without_sessions_is_prompt,
    drain_ends_on_time_however_many_probes_come_in,
    drained_backend_gets_nothing_new_and_keeps_its_sessions,
    drain_over_the_api_equals_the_command,
    drain_survives_a_reload,
    unknown_backend_is_refused,
);

fn echo_proxy(engine: Engine, drain_timeout: &str) -> (ScriptedBackend, TestProxy) {
    let backend = ScriptedBackend::start(backend::echo());
    let conf = Conf::simple(engine, Pool::new("web").backend("a", backend.address()));
    let proxy = TestProxy::start(conf.process(&format!("drain_timeout = \"{drain_timeout}\"")));
    (backend, proxy)
}

fn open_session(proxy: &TestProxy) -> TcpStream {
    let stream = connect(proxy.addr("web"));
    client::exchange(&stream, b"hello").expect("an echo");
    stream
}

/// What every ordered ending looks like from outside, whoever asked for it.
fn assert_drains(proxy: &mut TestProxy, end: impl FnOnce(&TestProxy)) {
    let open = open_session(proxy);
    end(proxy);
    eventually(secs(2), "/ready says 503", || proxy.admin_request("GET", "/ready").status == 503);
    assert_eq!(proxy.status()["state"], "draining");
    assert_eq!(proxy.admin_request("GET", "/live").status, 200);
    let address = proxy.addr("web");
    eventually(secs(2), "new connections are refused", || try_connect(address).is_err());
    client::exchange(&open, b"still served").expect("the old session goes on");
    drop(open);
    assert_eq!(proxy.wait_exit(secs(3)), Some(0), "{}", proxy.log());
    let log = proxy.access_log();
    assert_eq!(log.len(), 1, "{log:#?}");
    assert_eq!(log[0]["cause"], "finished", "{:#}", log[0]);
}

fn sigterm_lets_open_sessions_finish(engine: Engine) {
    let (_backend, mut proxy) = echo_proxy(engine, "20s");
    assert_drains(&mut proxy, TestProxy::sigterm);
}

fn sigint_drains_as_well(engine: Engine) {
    let (_backend, mut proxy) = echo_proxy(engine, "20s");
    assert_drains(&mut proxy, |proxy| proxy.signal(Signal::INT));
}

fn shutdown_command_drains_as_well(engine: Engine) {
    let (_backend, mut proxy) = echo_proxy(engine, "20s");
    assert_drains(&mut proxy, |proxy| {
        proxy.cli_ok(&["shutdown"]);
    });
}

fn drain_deadline_cuts_what_is_left_and_says_how_many(engine: Engine) {
    let (backend, mut proxy) = echo_proxy(engine, "1s");
    let open: Vec<TcpStream> = (0..3).map(|_| open_session(&proxy)).collect();
    let start = Instant::now();
    proxy.sigterm();
    for stream in &open {
        assert_eq!(client::read_to_end(stream), End::Reset(0));
    }
    let after = start.elapsed();
    assert!(after > ms(800) && after < patience(secs(3)), "cut after {after:?}");
    assert_eq!(proxy.wait_exit(secs(2)), Some(0));
    let said = proxy.log().lines().any(|line| line.contains('3') && line.contains("session"));
    assert!(said, "says how many: {}", proxy.log());
    eventually(secs(2), "the backend's ends are closed", || backend.active() == 0);
    let log = proxy.access_log();
    assert_eq!(log.len(), 3);
    assert!(log.iter().all(|line| line["cause"] == "drain-deadline"), "{log:#?}");
}

fn second_signal_exits_at_once(engine: Engine) {
    let (_backend, mut proxy) = echo_proxy(engine, "60s");
    let _open = open_session(&proxy);
    proxy.sigterm();
    eventually(secs(2), "it drains", || proxy.admin_request("GET", "/ready").status == 503);
    // Longer than what counts as a repetition.
    std::thread::sleep(ms(200));
    let start = Instant::now();
    proxy.sigterm();
    assert_eq!(proxy.wait_exit(secs(2)), Some(3), "{}", proxy.log());
    assert!(start.elapsed() < patience(secs(1)), "took {:?}", start.elapsed());
}

fn exit_without_sessions_is_prompt(engine: Engine) {
    let (_backend, mut proxy) = echo_proxy(engine, "60s");
    drop(open_session(&proxy));
    eventually(secs(2), "no session is left", || proxy.backend("web", "a")["sessions_active"] == 0);
    let start = Instant::now();
    proxy.sigterm();
    assert_eq!(proxy.wait_exit(secs(2)), Some(0), "{}", proxy.log());
    assert!(start.elapsed() < patience(ms(1000)), "took {:?}", start.elapsed());
    assert!(!proxy.dir().join("admin.sock").exists(), "the admin socket is removed");
}

/// A result every half a millisecond once put off every look at the drain.
fn drain_ends_on_time_however_many_probes_come_in(engine: Engine) {
    let probe = "kind = \"tcp\"\ninterval = \"10ms\"\ntimeout = \"10ms\"\nfast_interval = \"10ms\"";
    let server = ScriptedBackend::start(backend::echo());
    let pool = Pool::new("web").probe(probe).backend("a", server.address());
    let pool = (2..22).fold(pool, |pool, n| {
        pool.backend(
            &format!("dead-{n}"),
            format!("127.0.0.{n}:{}", server.socket_address().port()),
        )
    });
    let conf = Conf::simple(engine, pool).process("drain_timeout = \"1s\"");
    let mut proxy = TestProxy::start(conf);
    let _open = open_session(&proxy);
    proxy.sigterm();
    assert_eq!(proxy.wait_exit(secs(3)), Some(0), "{}", proxy.log());
    assert_eq!(proxy.access_log()[0]["cause"], "drain-deadline");
}

/// Backends a and b in one pool, both greeting with their name.
fn two_greeting(engine: Engine) -> ([ScriptedBackend; 2], TestProxy) {
    let backends = ["a", "b"].map(|name| ScriptedBackend::start(backend::greet(name)));
    let pool =
        Pool::new("web").backend("a", backends[0].address()).backend("b", backends[1].address());
    (backends, TestProxy::start(Conf::simple(engine, pool)))
}

/// A session and the name it was greeted with.
fn greeted(proxy: &TestProxy) -> (TcpStream, u8) {
    let stream = connect(proxy.addr("web"));
    let mut name = [0];
    std::io::Read::read_exact(&mut &stream, &mut name).expect("a greeting");
    (stream, name[0])
}

fn drained_backend_gets_nothing_new_and_keeps_its_sessions(engine: Engine) {
    let (_backends, proxy) = two_greeting(engine);
    let held: Vec<(TcpStream, u8)> = (0..4).map(|_| greeted(&proxy)).collect();
    proxy.cli_ok(&["drain", "web/a"]);
    assert_eq!(proxy.backend("web", "a")["intent"], "draining");
    assert_eq!(proxy.backend("web", "a")["eligible"], false);
    assert!((0..20).all(|_| greeted(&proxy).1 == b'b'));
    for (stream, _) in &held {
        assert_eq!(client::exchange(stream, b"on").unwrap(), b"on");
    }
    assert_eq!(held.iter().filter(|(_, name)| *name == b'a').count(), 2);
    proxy.cli_ok(&["undrain", "web/a"]);
    assert_eq!(proxy.backend("web", "a")["intent"], "ready");
    assert!((0..4).any(|_| greeted(&proxy).1 == b'a'));
}

fn drain_over_the_api_equals_the_command(engine: Engine) {
    let (_backends, proxy) = two_greeting(engine);
    let post =
        |action: &str| proxy.admin_request("POST", &format!("/v1/pools/web/backends/b/{action}"));
    assert_eq!(post("drain").status, 200);
    assert_eq!(post("drain").status, 200, "twice is fine");
    assert!((0..20).all(|_| greeted(&proxy).1 == b'a'));
    assert_eq!(post("undrain").status, 200);
    assert!((0..4).any(|_| greeted(&proxy).1 == b'b'));
}

fn drain_survives_a_reload(engine: Engine) {
    let (_backends, mut proxy) = two_greeting(engine);
    proxy.cli_ok(&["drain", "web/a"]);
    let mut conf = proxy.conf();
    conf.pool_mut("web").backends[0].keys = "weight = 100".into();
    proxy.reload(conf);
    assert_eq!(proxy.backend("web", "a")["weight"], 100, "the reload took place");
    assert_eq!(proxy.backend("web", "a")["intent"], "draining");
    assert!((0..20).all(|_| greeted(&proxy).1 == b'b'));
}

fn unknown_backend_is_refused(engine: Engine) {
    let (_backends, proxy) = two_greeting(engine);
    for target in ["web/nobody", "nowhere/a"] {
        let output = proxy.cli(&["drain", target]);
        assert_eq!(output.status.code(), Some(1), "{target}: {output:?}");
    }
    let answer = proxy.admin_request("POST", "/v1/pools/web/backends/nobody/drain");
    assert_eq!(answer.status, 404, "{}", answer.body);
    assert!(answer.json()["error"].is_string());
    assert_eq!(proxy.cli(&["drain", "no-slash"]).status.code(), Some(2), "a usage error");
}
