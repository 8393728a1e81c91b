//! Draining the process by signal or command, and draining one backend by an operator.
//!
//! Open sessions continue. New sessions go to other backends or are refused. The exit
//! code reports the result.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, End, connect, try_connect};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{
    Engine, eventually, long, ms, on_every_engine, on_every_engine_quiet, patience, secs,
};
use rustix::process::Signal;
use std::net::{SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

on_every_engine!(
    sigterm_lets_open_sessions_finish,
    sigint_drains,
    shutdown_command_drains,
    drain_timeout_resets_open_sessions_and_reports_their_number,
    second_signal_exits_at_once,
    exit_without_sessions_is_prompt,
    drain_ends_on_time_during_many_probes,
    drained_backend_gets_no_new_sessions_and_keeps_open_sessions,
    drain_over_the_api_equals_the_command,
    drain_survives_a_reload,
    drain_of_an_unknown_backend_is_rejected,
    reload_while_draining_is_rejected_from_every_origin,
    leave_delay_serves_new_clients_while_not_ready,
    second_signal_ends_the_leave_delay_and_third_the_process,
    ready_command_reports_readiness_by_exit_code,
    drain_wait_waits_for_the_last_session_and_reports_the_rest,
    drain_stays_with_the_address_across_removal_from_the_file,
);
on_every_engine_quiet!(clients_behind_a_router_see_no_failure_while_a_process_leaves);

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

/// Checks what every drain of the process looks like from outside, for any origin.
fn assert_drains(proxy: &mut TestProxy, end: impl FnOnce(&TestProxy)) {
    let open = open_session(proxy);
    end(proxy);
    eventually(secs(2), "/ready returns 503", || {
        proxy.admin_request("GET", "/ready").status == 503
    });
    assert_eq!(proxy.status()["state"], "draining");
    assert_eq!(proxy.admin_request("GET", "/live").status, 200);
    let address = proxy.addr("web");
    eventually(secs(2), "new connections are refused", || try_connect(address).is_err());
    let forecast = proxy.cli(&["explain", "--client", "127.0.0.1", "--frontend", "web"]);
    let error = String::from_utf8_lossy(&forecast.stderr).into_owned();
    assert!(error.contains("this process drains and accepts no clients"), "{error}");
    client::exchange(&open, b"still served").expect("the open session continues");
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

fn sigint_drains(engine: Engine) {
    let (_backend, mut proxy) = echo_proxy(engine, "20s");
    assert_drains(&mut proxy, |proxy| proxy.signal(Signal::INT));
}

fn shutdown_command_drains(engine: Engine) {
    let (_backend, mut proxy) = echo_proxy(engine, "20s");
    assert_drains(&mut proxy, |proxy| {
        proxy.cli_ok(&["shutdown"]);
    });
}

fn drain_timeout_resets_open_sessions_and_reports_their_number(engine: Engine) {
    let (backend, mut proxy) = echo_proxy(engine, "1s");
    let open: Vec<TcpStream> = (0..3).map(|_| open_session(&proxy)).collect();
    let start = Instant::now();
    proxy.sigterm();
    for stream in &open {
        assert_eq!(client::read_to_end(stream), End::Reset(0));
    }
    let after = start.elapsed();
    assert!(after > ms(800) && after < patience(secs(3)), "reset after {after:?}");
    assert_eq!(proxy.wait_exit(secs(2)), Some(0));
    let said = proxy.log().lines().any(|line| line.contains('3') && line.contains("session"));
    assert!(said, "no count of sessions: {}", proxy.log());
    eventually(secs(2), "the backend connections are closed", || backend.active() == 0);
    let log = proxy.access_log();
    assert_eq!(log.len(), 3);
    assert!(log.iter().all(|line| line["cause"] == "drain-deadline"), "{log:#?}");
}

fn second_signal_exits_at_once(engine: Engine) {
    let (_backend, mut proxy) = echo_proxy(engine, "60s");
    let _open = open_session(&proxy);
    proxy.sigterm();
    eventually(secs(2), "the process drains", || {
        proxy.admin_request("GET", "/ready").status == 503
    });
    // Longer than the time in which signals count as one.
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

/// A probe result every 0.5 ms must not delay the drain timeout.
fn drain_ends_on_time_during_many_probes(engine: Engine) {
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

/// Starts backends `a` and `b` in one pool. Each greets with its name.
fn two_greeting(engine: Engine) -> ([ScriptedBackend; 2], TestProxy) {
    let backends = ["a", "b"].map(|name| ScriptedBackend::start(backend::greet(name)));
    let pool =
        Pool::new("web").backend("a", backends[0].address()).backend("b", backends[1].address());
    (backends, TestProxy::start(Conf::simple(engine, pool)))
}

/// Opens a session and reads the name in its greeting.
fn greeted(proxy: &TestProxy) -> (TcpStream, u8) {
    let stream = connect(proxy.addr("web"));
    let mut name = [0];
    std::io::Read::read_exact(&mut &stream, &mut name).expect("a greeting");
    (stream, name[0])
}

fn drained_backend_gets_no_new_sessions_and_keeps_open_sessions(engine: Engine) {
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
    assert_eq!(post("drain").status, 200, "a repeated drain succeeds");
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
    assert_eq!(proxy.backend("web", "a")["weight"], 100, "the reload took effect");
    assert_eq!(proxy.backend("web", "a")["intent"], "draining");
    assert!((0..20).all(|_| greeted(&proxy).1 == b'b'));
}

fn drain_of_an_unknown_backend_is_rejected(engine: Engine) {
    let (_backends, proxy) = two_greeting(engine);
    for target in ["web/unknown", "nowhere/a"] {
        let output = proxy.cli(&["drain", target]);
        assert_eq!(output.status.code(), Some(1), "{target}: {output:?}");
    }
    let answer = proxy.admin_request("POST", "/v1/pools/web/backends/unknown/drain");
    assert_eq!(answer.status, 404, "{}", answer.body);
    assert!(answer.json()["error"].is_string());
    assert_eq!(proxy.cli(&["drain", "no-slash"]).status.code(), Some(2), "a usage error");
}

/// A reload during the drain would reopen the listeners, and their clients would be reset at
/// the deadline.
fn reload_while_draining_is_rejected_from_every_origin(engine: Engine) {
    let (_backend, mut proxy) = echo_proxy(engine, "20s");
    let open = open_session(&proxy);
    proxy.sigterm();
    let address = proxy.addr("web");
    eventually(secs(5), "new connections are refused", || try_connect(address).is_err());

    let answer = proxy.admin_request("POST", "/v1/reload");
    assert_eq!(answer.status, 409, "{}", answer.body);
    let detail = answer.json()["detail"].as_str().unwrap_or_default().to_owned();
    assert!(detail.contains("draining"), "{detail}");
    proxy.sighup();
    let text = proxy.render(&proxy.conf());
    proxy.rewrite_by_rename(&format!("# another comment\n{text}"));
    for asked in ["admin request", "SIGHUP", "file change"] {
        eventually(secs(5), &format!("{asked} is rejected in the log"), || {
            proxy.log().lines().any(|l| l.contains("reload rejected") && l.contains(asked))
        });
    }
    assert!(try_connect(address).is_err(), "no new client is accepted");
    assert_eq!(proxy.cli(&["reload"]).status.code(), Some(1));
    client::exchange(&open, b"still served").expect("the open session continues");
    drop(open);
    assert_eq!(proxy.wait_exit(secs(5)), Some(0), "{}", proxy.log());
}

fn leaving_proxy(engine: Engine, delay: &str) -> (ScriptedBackend, TestProxy) {
    let backend = ScriptedBackend::start(backend::echo());
    let conf = Conf::simple(engine, Pool::new("web").backend("a", backend.address()));
    let keys = format!("leave_delay = \"{delay}\"\ndrain_timeout = \"20s\"");
    (backend, TestProxy::start(conf.process(&keys)))
}

fn is_ready(proxy: &TestProxy) -> bool {
    proxy.admin_request("GET", "/ready").status == 200
}

fn leave_delay_serves_new_clients_while_not_ready(engine: Engine) {
    let (_backend, mut proxy) = leaving_proxy(engine, "2s");
    let began = Instant::now();
    proxy.sigterm();
    eventually(secs(2), "/ready returns 503", || !is_ready(&proxy));
    let open = open_session(&proxy);
    assert_eq!(proxy.status()["state"], "draining");
    let address = proxy.addr("web");
    eventually(secs(10), "the drain begins after the delay", || try_connect(address).is_err());
    assert!(began.elapsed() > ms(1800), "after {:?}", began.elapsed());
    client::exchange(&open, b"still served").expect("the accepted session continues");
    drop(open);
    assert_eq!(proxy.wait_exit(secs(5)), Some(0), "{}", proxy.log());
}

fn second_signal_ends_the_leave_delay_and_third_the_process(engine: Engine) {
    let (_backend, mut proxy) = leaving_proxy(engine, "60s");
    let _open = open_session(&proxy);
    proxy.sigterm();
    eventually(secs(2), "/ready returns 503", || !is_ready(&proxy));
    let address = proxy.addr("web");
    assert!(try_connect(address).is_ok());
    std::thread::sleep(ms(150));
    proxy.sigterm();
    eventually(secs(5), "the drain begins", || try_connect(address).is_err());
    std::thread::sleep(ms(150));
    proxy.sigterm();
    assert_eq!(proxy.wait_exit(secs(5)), Some(3), "{}", proxy.log());
}

fn ready_command_reports_readiness_by_exit_code(engine: Engine) {
    let (_backend, mut proxy) = leaving_proxy(engine, "60s");
    let ready = |proxy: &TestProxy| proxy.cli(&["ready"]);
    assert_eq!(ready(&proxy).status.code(), Some(0));
    assert!(ready(&proxy).stdout.is_empty());
    assert_eq!(proxy.cli_ok(&["ready", "--json"]).trim(), r#"{"state":"serving"}"#);
    proxy.sigterm();
    eventually(secs(2), "/ready returns 503", || !is_ready(&proxy));
    let output = ready(&proxy);
    assert_eq!(output.status.code(), Some(3));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("not ready: draining"), "{said}");
    std::thread::sleep(ms(150));
    proxy.sigterm();
    assert_eq!(proxy.wait_exit(secs(5)), Some(0));
    let output = ready(&proxy);
    assert_eq!(output.status.code(), Some(3), "no process: {output:?}");
}

fn drain_wait_waits_for_the_last_session_and_reports_the_rest(engine: Engine) {
    let (_backend, proxy) = echo_proxy(engine, "20s");
    let held = [open_session(&proxy), open_session(&proxy)];
    let output = proxy.cli(&["drain", "--wait=300ms", "web/a"]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("web/a has 2 sessions left"), "{said}");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| proxy.cli(&["drain", "web/a", "--wait"]));
        std::thread::sleep(ms(500));
        assert!(!waiting.is_finished());
        drop(held);
        let output = waiting.join().unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(said.contains("web/a has no sessions"), "{said}");
    });
    assert_eq!(proxy.cli(&["drain", "web/unknown", "--wait"]).status.code(), Some(1));
}

fn drain_stays_with_the_address_across_removal_from_the_file(engine: Engine) {
    let ([a, b], mut proxy) = two_greeting(engine);
    let third = ScriptedBackend::start(backend::greet("c"));
    proxy.cli_ok(&["drain", "web/a"]);
    let both = proxy.conf();
    let pool = |first: &ScriptedBackend| {
        Pool::new("web").backend("a", first.address()).backend("b", b.address())
    };
    let mut without = proxy.conf();
    *without.pool_mut("web") = Pool::new("web").backend("b", b.address());
    proxy.reload(without);
    std::thread::sleep(ms(1500));
    proxy.reload(both);
    assert_eq!(proxy.backend("web", "a")["intent"], "draining");
    assert!((0..10).all(|_| greeted(&proxy).1 == b'b'));
    let mut moved = proxy.conf();
    *moved.pool_mut("web") = pool(&third);
    proxy.reload(moved);
    assert_eq!(proxy.backend("web", "a")["intent"], "ready");
    assert!((0..10).any(|_| greeted(&proxy).1 == b'c'));
    let mut back = proxy.conf();
    *back.pool_mut("web") = pool(&a);
    proxy.reload(back);
    assert_eq!(proxy.backend("web", "a")["intent"], "draining");
}

/// A router sends clients to every process whose `/ready` returns 200. It checks every 100 ms.
fn clients_behind_a_router_see_no_failure_while_a_process_leaves(engine: Engine) {
    let attempts = if long() { 5_000 } else { 600 };
    let (_one, mut leaves) = leaving_proxy(engine, "1s");
    let (_two, stays) = leaving_proxy(engine, "1s");
    let all = [&leaves, &stays].map(|proxy| (proxy.addr("web"), proxy.dir().join("admin.sock")));
    let routed: Mutex<Vec<SocketAddr>> = Mutex::new(all.iter().map(|(to, _)| *to).collect());
    let (made, failed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let ready = |socket: &std::path::Path| {
                    crate::common::http::over_unix(socket, "GET", "/ready")
                        .is_ok_and(|answer| answer.status == 200)
                };
                let now = all.iter().filter(|(_, socket)| ready(socket)).map(|(to, _)| *to);
                *routed.lock().unwrap() = now.collect();
                std::thread::sleep(ms(100));
            }
        });
        for client in 0..8 {
            let (routed, made, failed, over) = (&routed, &made, &failed, &over);
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    let nth = made.fetch_add(1, Ordering::Relaxed);
                    let to = {
                        let routed = routed.lock().unwrap();
                        routed[(nth + client) % routed.len()]
                    };
                    let served = try_connect(to)
                        .is_ok_and(|stream| client::exchange(&stream, b"hello").is_ok());
                    failed.fetch_add(usize::from(!served), Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
        }
        let reached = |share: usize| {
            eventually(secs(120), "attempts are made", || {
                made.load(Ordering::Relaxed) >= attempts * share / 100
            });
        };
        reached(20);
        leaves.sigterm();
        assert_eq!(leaves.wait_exit(secs(20)), Some(0), "{}", leaves.log());
        reached(100);
        over.store(true, Ordering::Relaxed);
    });
    assert_eq!(failed.load(Ordering::Relaxed), 0, "of {}", made.load(Ordering::Relaxed));
}
