//! Backends that exit, stall, refuse or return, and a Tidegate process without file
//! descriptors.
//!
//! Only sessions that are open on a failed backend can fail. New sessions go to other
//! backends.

use crate::common::backend::{self, Refusing, ScriptedBackend, Unresponsive, script};
use crate::common::client::{self, End, connect};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::servers::{Nginx, Redis, Wrk};
use crate::common::stable::{Steady, answered_by, failures_since};
use crate::common::{
    Engine, eventually, have, http, measured, ms, on_every_engine, on_every_engine_alone,
    on_every_engine_quiet, patience, proc, secs,
};
use std::io::Read;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Instant;

on_every_engine!(
    new_sessions_succeed_while_a_backend_is_killed,
    pool_without_eligible_backends_resets_clients_at_once,
    client_is_reset_at_once_if_every_backend_refuses,
    try_all_serves_from_backends_that_are_down,
    startup_grace_fails_open,
    added_backend_gets_no_sessions_before_its_first_probe_success,
    connect_timeout_retries_on_another_backend,
    refusing_backend_is_ejected_and_returns,
    last_eligible_backend_is_never_ejected,
    restarted_backend_serves_again,
    http_probe_removes_a_backend_that_answers_503,
    send_expect_probe_speaks_redis,
    reset_before_the_first_byte_is_retried_on_another_backend,
    session_is_reset_if_every_backend_resets,
    fin_before_the_first_byte_is_not_retried,
);
on_every_engine_alone!(killed_backend_fails_only_its_own_sessions);
on_every_engine_quiet!(exhausted_descriptors_do_not_count_as_backend_failures);

const FAST_TCP: &str = "kind = \"tcp\"\ninterval = \"100ms\"\ntimeout = \"100ms\"";

fn three_nginx(engine: Engine) -> Option<(Vec<Nginx>, TestProxy)> {
    if !have(&["nginx", "wrk"]) {
        return None;
    }
    let servers = ["a", "b", "c"].map(Nginx::start);
    let pool = servers.iter().fold(Pool::new("web").probe(FAST_TCP), |pool, server| {
        pool.backend(&server.name, server.address)
    });
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    for server in &servers {
        proxy.wait_backend("web", &server.name, "observation", "up");
    }
    Some((servers.into(), proxy))
}

fn killed_backend_fails_only_its_own_sessions(engine: Engine) {
    let Some((mut servers, proxy)) = three_nginx(engine) else { return };
    let wrk = Wrk::start(proxy.addr("web"), 30, 5);
    eventually(secs(3), "wrk's connections are distributed", || {
        proxy.backend("web", "b")["sessions_active"] == 10
    });
    // Some traffic on all three backends before the kill.
    std::thread::sleep(ms(1000));
    servers[1].kill();
    let report = wrk.report();
    // Ten sessions were open on it. More can reconnect before its listening socket closes,
    // because the kernel closes the newest descriptors of an exiting process first.
    let on_the_killed = proxy.backend("web", "b")["sessions_total"].as_u64().expect("a count");
    let (requests, cut_off) = (report.requests, report.read_errors);
    measured(&format!("{requests} requests, {cut_off} cut off, {on_the_killed} were on it"));
    assert!(on_the_killed <= 20, "{on_the_killed} sessions reached a killed backend");
    assert!(report.read_errors + report.write_errors <= on_the_killed, "{}", report.text);
    let others = (report.connect_errors, report.timeouts, report.bad_status);
    assert_eq!(others, (0, 0, 0), "{}", report.text);
    assert!(report.requests > 1000, "{}", report.text);
    assert_eq!(proxy.backend("web", "b")["observation"], "down");
    // Its ten clients reconnected to the other two backends.
    let served = proxy.metric("tidegate_session_end_total", &[("cause", "backend-reset")])
        + proxy.metric("tidegate_session_end_total", &[("cause", "finished")]);
    assert!(served >= 10.0, "{served} sessions have ended");
}

fn new_sessions_succeed_while_a_backend_is_killed(engine: Engine) {
    let Some((mut servers, proxy)) = three_nginx(engine) else { return };
    let steady = Steady::start(proxy.addr("web"), 4);
    std::thread::sleep(ms(500));
    servers[1].kill();
    let killed = Instant::now();
    std::thread::sleep(ms(1500));
    let attempts = steady.stop();
    assert_eq!(format!("{:?}", failures_since(&attempts, killed)), "[]");
    let caught = attempts.iter().filter(|attempt| attempt.result.is_err()).count();
    assert!(caught <= 4, "{caught} failures with 4 sessions at a time");
    measured(&format!("{} sessions, {caught} failed at the kill", attempts.len()));
    assert!(answered_by(&attempts, "b") > 0 && attempts.len() > 100);
}

/// Connects and checks that the connection is reset within 1 s.
#[track_caller]
fn assert_reset_at_once(address: SocketAddr) {
    let start = Instant::now();
    // The reset can already fail the connect call (ECONNRESET).
    if let Ok(stream) = client::try_connect(address) {
        assert_eq!(client::read_to_end(&stream), End::Reset(0));
    }
    assert!(start.elapsed() < patience(secs(1)), "refused after {:?}", start.elapsed());
}

fn pool_without_eligible_backends_resets_clients_at_once(engine: Engine) {
    let mut a = ScriptedBackend::start(backend::name("a"));
    let pool = Pool::new("web").probe(FAST_TCP).backend("a", a.address());
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    proxy.wait_backend("web", "a", "observation", "up");
    a.stop();
    proxy.wait_backend("web", "a", "observation", "down");
    for _ in 0..10 {
        assert_reset_at_once(proxy.addr("web"));
    }
    let refused = proxy.metric("tidegate_refused_total", &[("reason", "no-backend")]);
    assert_eq!(refused, 10.0);
    let log = proxy.wait_access_log(10);
    assert!(log.iter().all(|line| line["cause"] == "no-backend"), "{log:#?}");
    // The process itself is ready.
    assert_eq!(proxy.admin_request("GET", "/ready").status, 200);
}

fn client_is_reset_at_once_if_every_backend_refuses(engine: Engine) {
    let refusing = [Refusing::new(), Refusing::new()];
    let pool = Pool::new("web").backend("a", refusing[0].address).backend("b", refusing[1].address);
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    assert_reset_at_once(proxy.addr("web"));
    let log = proxy.wait_access_log(1);
    assert_eq!(log[0]["cause"], "connect-refused", "{:#}", log[0]);
    // Two backends and two attempts: no backend is tried twice.
    assert_eq!(log[0]["attempts"], 2, "{:#}", log[0]);
}

fn try_all_serves_from_backends_that_are_down(engine: Engine) {
    let a = ScriptedBackend::start(backend::http("a", 503));
    let probe = "kind = \"http\"\ninterval = \"100ms\"\ntimeout = \"100ms\"\nstatus = \"200\"";
    let pool = Pool::new("web")
        .key("when_none_eligible = \"try-all\"")
        .probe(probe)
        .backend("a", a.address());
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    proxy.wait_backend("web", "a", "observation", "down");
    let answer = http::over_tcp(proxy.addr("web"), "/").unwrap();
    assert_eq!(answer.body, "a");
}

fn startup_grace_fails_open(engine: Engine) {
    // The backend sends "x?" and no more, so the probe has no result for 50 s.
    let a = ScriptedBackend::start(backend::greet("x"));
    let pool = Pool::new("web")
        .key("startup_grace = \"700ms\"")
        .probe(
            "kind = \"send-expect\"\nsend = \"?\"\nexpect = \"x?more\"\n\
             interval = \"60s\"\ntimeout = \"50s\"",
        )
        .backend("a", a.address());
    let start = Instant::now();
    let mut proxy = TestProxy::start(Conf::simple(engine, pool));
    // The process is ready after the grace time, and clients wait until then.
    assert_eq!(proxy.backend("web", "a")["eligible"], true, "the pool fails open");
    assert!(start.elapsed() >= ms(650), "open after {:?}", start.elapsed());
    assert_eq!(proxy.backend("web", "a")["observation"], "unknown");
    // The probe's connection stays open.
    proxy.rebaseline();
    assert_eq!(first_byte(proxy.addr("web")), b'x');
}

fn added_backend_gets_no_sessions_before_its_first_probe_success(engine: Engine) {
    let gate = backend::Gate::default();
    let a = ScriptedBackend::start(backend::http("a", 200));
    let b = ScriptedBackend::start(backend::script({
        let (gate, answer) = (gate.clone(), backend::http("b", 200));
        move |conn| {
            gate.wait();
            answer(conn);
        }
    }));
    let pool = Pool::new("web")
        .probe("kind = \"http\"\ninterval = \"20s\"\ntimeout = \"15s\"")
        .backend("a", a.address());
    let mut proxy = TestProxy::start(Conf::simple(engine, pool));
    proxy.wait_backend("web", "a", "observation", "up");
    let mut conf = proxy.conf();
    conf.pools[0] = conf.pools[0].clone().backend("b", b.address());
    proxy.reload(conf);
    let ask = || http::over_tcp(proxy.addr("web"), "/").unwrap().body;
    assert!((0..30).all(|_| ask() == "a"));
    assert_eq!(proxy.backend("web", "b")["observation"], "unknown");
    gate.open();
    proxy.wait_backend("web", "b", "observation", "up");
    eventually(secs(2), "b is eligible", || ask() == "b");
}

fn first_byte(address: SocketAddr) -> u8 {
    let mut byte = [0];
    connect(address).read_exact(&mut byte).expect("a first byte");
    byte[0]
}

fn connect_timeout_retries_on_another_backend(engine: Engine) {
    let dead = Unresponsive::new();
    let b = ScriptedBackend::start(backend::name("b"));
    let pool = Pool::new("web")
        .key("connect_timeout = \"300ms\"")
        .ejection("failures = 1000")
        .backend_with("dead", dead.address, "weight = 1000")
        .backend("b", b.address());
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    for _ in 0..3 {
        let start = Instant::now();
        assert_eq!(client::ask(proxy.addr("web")).unwrap(), "b");
        let took = start.elapsed();
        assert!(took >= ms(280) && took < patience(ms(1500)), "answered after {took:?}");
    }
    let log = proxy.wait_access_log(3);
    for line in log {
        let what = (&line["attempts"], &line["backend"], &line["cause"]);
        assert_eq!(what, (&2.into(), &"b".into(), &"finished".into()), "{line:#}");
    }
    assert_eq!(proxy.backend("web", "dead")["connect_failures_total"], 3);
}

fn refusing_backend_is_ejected_and_returns(engine: Engine) {
    let refusing = Refusing::new();
    let address = refusing.address;
    let b = ScriptedBackend::start(backend::name("b"));
    let pool = Pool::new("web")
        .ejection("failures = 3\ntime = \"700ms\"")
        .backend("a", address)
        .backend("b", b.address());
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    let ask = || client::ask(proxy.addr("web")).unwrap();
    eventually(secs(5), "a is ejected", || {
        assert_eq!(ask(), "b", "every session is retried on the other backend");
        proxy.backend("web", "a")["ejected"] == true
    });
    let failures = proxy.backend("web", "a")["connect_failures_total"].as_u64().unwrap();
    assert!((3..=4).contains(&failures), "{failures} failures until the ejection");
    drop(refusing);
    let _a = ScriptedBackend::start_on(address, backend::name("a"));
    eventually(secs(10), "a serves again", || ask() == "a");
    assert_eq!(proxy.backend("web", "a")["ejected"], false);
}

fn last_eligible_backend_is_never_ejected(engine: Engine) {
    let refusing = Refusing::new();
    let pool = Pool::new("web")
        .ejection("failures = 2\ntime = \"60s\"\nmax_ejected = \"100%\"")
        .backend("a", refusing.address);
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    for _ in 0..10 {
        assert_reset_at_once(proxy.addr("web"));
    }
    assert_eq!(proxy.backend("web", "a")["ejected"], false);
    let address = refusing.address;
    drop(refusing);
    let _a = ScriptedBackend::start_on(address, backend::name("a"));
    assert_eq!(client::ask(proxy.addr("web")).unwrap(), "a", "no ejection delays the session");
}

fn restarted_backend_serves_again(engine: Engine) {
    let mut a = ScriptedBackend::start(backend::name("a"));
    let address = a.socket_address();
    let b = ScriptedBackend::start(backend::name("b"));
    let pool = Pool::new("web").probe(FAST_TCP).backend("a", address).backend("b", b.address());
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    proxy.wait_backend("web", "a", "observation", "up");
    a.stop();
    proxy.wait_backend("web", "a", "observation", "down");
    assert!((0..10).all(|_| client::ask(proxy.addr("web")).unwrap() == "b"));
    let _a = ScriptedBackend::start_on(address, backend::name("a"));
    proxy.wait_backend("web", "a", "observation", "up");
    eventually(secs(2), "a serves again", || client::ask(proxy.addr("web")).unwrap() == "a");
}

fn http_probe_removes_a_backend_that_answers_503(engine: Engine) {
    let good = ScriptedBackend::start(backend::http("good", 204));
    let bad = ScriptedBackend::start(backend::http("bad", 503));
    let pool = Pool::new("web")
        .probe("kind = \"http\"\npath = \"/health\"\ninterval = \"100ms\"\ntimeout = \"100ms\"")
        .backend("good", good.address())
        .backend("bad", bad.address());
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    proxy.wait_backend("web", "good", "observation", "up");
    proxy.wait_backend("web", "bad", "observation", "down");
    assert_eq!(proxy.metric("tidegate_backend_up", &[("backend", "good")]), 1.0);
    assert_eq!(proxy.metric("tidegate_backend_up", &[("backend", "bad")]), 0.0);
    let reason = proxy.backend("web", "bad")["last_transition"].to_string();
    assert!(reason.contains("503"), "the status code is missing: {reason}");
}

fn send_expect_probe_speaks_redis(engine: Engine) {
    if !have(&["redis-server"]) {
        return;
    }
    let redis = Redis::start();
    let silent = ScriptedBackend::start(backend::stall());
    let pool = Pool::new("redis")
        .probe(
            "kind = \"send-expect\"\nsend = \"PING\\r\\n\"\nexpect = \"+PONG\"\n\
             interval = \"150ms\"\ntimeout = \"150ms\"",
        )
        .backend("redis", redis.address)
        .backend("silent", silent.address());
    let proxy = TestProxy::start(Conf::new(engine).frontend("redis", "redis", "").pool(pool));
    proxy.wait_backend("redis", "redis", "observation", "up");
    proxy.wait_backend("redis", "silent", "observation", "down");
}

fn exhausted_descriptors_do_not_count_as_backend_failures(engine: Engine) {
    let a = ScriptedBackend::start(backend::greet("x"));
    let pool = Pool::new("web").probe(FAST_TCP).backend("a", a.address());
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    proxy.wait_backend("web", "a", "observation", "up");
    let old = proc::set_fd_limit(proxy.pid(), proxy.fd_count() as u64 + 20);
    // Enough descriptors for a few sessions. Other clients wait or are reset, possibly
    // before the connect call returns (ECONNRESET).
    let try_one = |_| client::try_connect(proxy.addr("web")).ok();
    let clients: Vec<TcpStream> = (0..100).filter_map(try_one).collect();
    std::thread::sleep(ms(500));
    let cpu = proxy.cpu_time();
    std::thread::sleep(secs(2));
    let spent = proxy.cpu_time() - cpu;
    measured(&format!("{spent:?} of CPU in 2 s without descriptors"));
    assert!(spent < ms(500), "busy loop: {spent:?} of CPU in 2 s");
    proc::set_fd_limit(proxy.pid(), old);
    let start = Instant::now();
    eventually(secs(1), "new sessions are served", || {
        client::try_connect(proxy.addr("web")).is_ok_and(|stream| {
            stream.set_read_timeout(Some(ms(300))).is_ok()
                && (&stream).read(&mut [0]).is_ok_and(|n| n == 1)
        })
    });
    measured(&format!("recovered {:?} after the limit was raised", start.elapsed()));
    drop(clients);
    let state = proxy.backend("web", "a");
    assert_eq!(state["connect_failures_total"], 0, "{state:#}");
    let health = (&state["ejected"], &state["observation"], &state["eligible"]);
    assert_eq!(health, (&false.into(), &"up".into(), &true.into()), "{state:#}");
}

/// Resets the connection without sending a byte, after it is surely established.
fn reset_after_50_ms() -> backend::Script {
    script(|conn| {
        std::thread::sleep(ms(50));
        conn.reset();
    })
}

/// A pool whose first pick is a backend with the script `first` and whose second is an echo.
fn reset_then_echo(first: backend::Script) -> (ScriptedBackend, ScriptedBackend, Pool) {
    let (a, b) = (ScriptedBackend::start(first), ScriptedBackend::start(backend::echo()));
    let pool =
        Pool::new("web").backend_with("a", a.address(), "weight = 1000").backend("b", b.address());
    (a, b, pool)
}

fn reset_before_the_first_byte_is_retried_on_another_backend(engine: Engine) {
    let (_a, b, pool) = reset_then_echo(reset_after_50_ms());
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    let client = connect(proxy.addr("web"));
    // Neither end has sent a byte.
    eventually(secs(5), "the other backend has the session", || b.active() == 1);
    assert_eq!(client::exchange(&client, b"hello").unwrap(), b"hello");
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client::read_to_end(&client), End::Fin(0));
    let line = &proxy.wait_access_log(1)[0];
    assert_eq!((&line["cause"], &line["backend"]), (&"finished".into(), &"b".into()), "{line:#}");
    assert_eq!((&line["attempts"], &line["bytes_in"]), (&2.into(), &5.into()), "{line:#}");
    let tries = &line["tries"];
    assert_eq!((&tries[0]["backend"], &tries[0]["failure"]), (&"a".into(), &"early-reset".into()));
    assert_eq!(proxy.backend("web", "a")["connect_failures_total"], 1);
    assert_eq!(proxy.metric("tidegate_connect_retries_total", &[]), 1.0);
    assert_eq!(proxy.metric("tidegate_session_end_total", &[]), 1.0);
}

fn session_is_reset_if_every_backend_resets(engine: Engine) {
    let backends = [(); 2].map(|()| ScriptedBackend::start(reset_after_50_ms()));
    let pool =
        Pool::new("web").backend("a", backends[0].address()).backend("b", backends[1].address());
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    assert_eq!(client::connect_and_read_to_end(proxy.addr("web")), End::Reset(0));
    let line = &proxy.wait_access_log(1)[0];
    assert_eq!((&line["cause"], &line["attempts"]), (&"backend-reset".into(), &2.into()));
    eventually(secs(5), "every slot is released", || {
        ["a", "b"].iter().all(|name| proxy.backend("web", name)["sessions_active"] == 0)
    });
}

fn fin_before_the_first_byte_is_not_retried(engine: Engine) {
    let (_a, b, pool) = reset_then_echo(script(|conn| conn.fin()));
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    let client = connect(proxy.addr("web"));
    assert_eq!(client::read_to_end(&client), End::Fin(0));
    drop(client);
    let line = &proxy.wait_access_log(1)[0];
    assert_eq!((&line["cause"], &line["attempts"]), (&"finished".into(), &1.into()), "{line:#}");
    assert_eq!(b.accepted(), 0);
}
