//! Sessions of the old process after an upgrade: the new process shows them, counts them
//! towards caps and can end them.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, End, connect};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, ms, on_every_engine, proc, secs};
use std::net::TcpStream;
use std::time::{Duration, Instant};

on_every_engine!(
    status_and_metrics_count_sessions_of_old_processes_once,
    backend_cap_counts_sessions_of_the_old_process,
    removed_backend_ends_sessions_of_the_old_process,
    backend_known_only_to_the_old_process_is_shown_as_leaving,
    drain_wait_includes_sessions_of_the_old_process,
    shutdown_waits_for_sessions_of_the_old_process,
);

fn proxy_of(engine: Engine, pool: Pool, drain_timeout: &str) -> TestProxy {
    let keys = format!("drain_timeout = \"{drain_timeout}\"");
    TestProxy::start(Conf::simple(engine, pool).process(&keys))
}

fn open_session(proxy: &TestProxy) -> TcpStream {
    let stream = connect(proxy.addr("web"));
    client::exchange(&stream, b"hello").expect("an echo");
    stream
}

/// Every value that shows the number of sessions.
fn shown(proxy: &TestProxy) -> [u64; 5] {
    let status = proxy.status();
    [
        status["connections_active"].as_u64().unwrap(),
        proxy.frontend("web")["sessions_active"].as_u64().unwrap(),
        proxy.backend("web", "a")["sessions_active"].as_u64().unwrap(),
        proxy.metric("tidegate_sessions_active", &[]) as u64,
        proxy.metric("tidegate_backend_in_flight", &[("backend", "a")]) as u64,
    ]
}

#[track_caller]
fn wait_shown(proxy: &TestProxy, count: u64) {
    eventually(secs(5), &format!("{count} sessions are shown"), || shown(proxy) == [count; 5]);
}

fn status_and_metrics_count_sessions_of_old_processes_once(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let pool = Pool::new("web").backend("a", backend.address());
    let mut proxy = proxy_of(engine, pool, "60s");
    let (mut held, mut olds) = (Vec::new(), Vec::new());
    for round in 1..=3 {
        held.push(open_session(&proxy));
        olds.push(proxy.upgrade());
        wait_shown(&proxy, round);
    }
    // No session is counted twice, and no count decreases while all sessions are open.
    for _ in 0..10 {
        assert_eq!(shown(&proxy), [3; 5]);
        std::thread::sleep(ms(30));
    }
    assert_eq!(proxy.explained("web", "a")["sessions_active"], 3);
    for (left, session) in (0..3).rev().zip(held) {
        client::exchange(&session, b"still here").unwrap();
        drop(session);
        wait_shown(&proxy, left);
    }
    for old in olds {
        proxy.wait_gone(old, secs(10));
    }
    let ended = || proxy.metric("tidegate_session_end_total", &[]);
    eventually(secs(5), "all sessions are counted", || ended() == 3.0);
    proxy.rebaseline();
}

fn backend_cap_counts_sessions_of_the_old_process(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let mut pool = Pool::new("web").backend("a", backend.address());
    pool.backends[0].keys = "connections_max = 2".into();
    let mut proxy = proxy_of(engine, pool, "60s");
    let mut held = vec![open_session(&proxy), open_session(&proxy)];
    let old = proxy.upgrade();
    wait_shown(&proxy, 2);
    let waits = connect(proxy.addr("web"));
    waits.set_read_timeout(Some(ms(500))).unwrap();
    std::io::Write::write_all(&mut &waits, b"hello").unwrap();
    let mut answer = [0; 5];
    let read = std::io::Read::read(&mut &waits, &mut answer);
    assert!(read.is_err(), "served beyond the cap: {read:?}");
    assert_eq!(backend.active(), 2);
    held.pop();
    waits.set_read_timeout(Some(secs(10))).unwrap();
    std::io::Read::read_exact(&mut &waits, &mut answer).expect("served after a free slot");
    assert_eq!(&answer, b"hello");
    drop(held);
    proxy.wait_gone(old, secs(10));
    drop(waits);
    proxy.rebaseline();
}

fn removed_backend_ends_sessions_of_the_old_process(engine: Engine) {
    let backends = ["a", "b"].map(|_| ScriptedBackend::start(backend::echo()));
    let pool = |names: &[&str]| {
        let all = [("a", &backends[0]), ("b", &backends[1])];
        all.into_iter()
            .filter(|(name, _)| names.contains(name))
            .fold(Pool::new("web").key("on_removal = \"close-after 1s\""), |pool, (name, to)| {
                pool.backend(name, to.address())
            })
    };
    let mut proxy = proxy_of(engine, pool(&["a", "b"]), "60s");
    let held: Vec<TcpStream> = (0..4).map(|_| open_session(&proxy)).collect();
    let old = proxy.upgrade();
    eventually(secs(5), "all sessions are shown", || proxy.status()["connections_active"] == 4);
    let mut conf = proxy.conf();
    *conf.pool_mut("web") = pool(&["b"]);
    let began = Instant::now();
    proxy.reload(conf);
    let status = proxy.status();
    assert_eq!(status["leaving"][0]["sessions_active"], 2, "{:#}", status["leaving"]);
    eventually(secs(10), "the sessions on a are reset", || backends[0].active() == 0);
    assert!(began.elapsed() > ms(800), "after {:?}", began.elapsed());
    assert_eq!(backends[1].active(), 2, "the sessions on b continue");
    eventually(secs(10), "no backend is leaving", || proxy.status()["leaving"][0].is_null());
    assert!(!proc::is_dead(old));
    drop(held);
    proxy.wait_gone(old, secs(10));
    proxy.rebaseline();
}

fn backend_known_only_to_the_old_process_is_shown_as_leaving(engine: Engine) {
    let backends = ["a", "b"].map(|_| ScriptedBackend::start(backend::echo()));
    let pool = Pool::new("web").backend("a", backends[0].address());
    let mut proxy = proxy_of(engine, pool, "60s");
    let session = open_session(&proxy);
    let mut conf = proxy.conf();
    *conf.pool_mut("web") = Pool::new("web").backend("b", backends[1].address());
    proxy.reload(conf);
    let leaving = |proxy: &TestProxy| {
        let status = proxy.status();
        (status["leaving"][0]["name"].clone(), status["leaving"][0]["sessions_active"].clone())
    };
    assert_eq!(leaving(&proxy), ("a".into(), 1.into()));
    let old = proxy.upgrade();
    eventually(secs(5), "the removed backend is shown", || {
        leaving(&proxy) == ("a".into(), 1.into())
    });
    assert_eq!(proxy.metric("tidegate_leaving_sessions", &[]), 1.0);
    drop(session);
    eventually(secs(5), "the removed backend is no longer shown", || {
        proxy.status()["leaving"][0].is_null()
    });
    proxy.wait_gone(old, secs(10));
    proxy.rebaseline();
}

fn drain_wait_includes_sessions_of_the_old_process(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let pool = Pool::new("web").backend("a", backend.address());
    let mut proxy = proxy_of(engine, pool, "60s");
    let session = open_session(&proxy);
    let old = proxy.upgrade();
    wait_shown(&proxy, 1);
    let output = proxy.cli(&["drain", "web/a", "--wait=500ms"]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    drop(session);
    proxy.cli_ok(&["drain", "web/a", "--wait=20s"]);
    proxy.wait_gone(old, secs(10));
    proxy.rebaseline();
}

/// A service manager stops the old process together with the new process.
fn shutdown_waits_for_sessions_of_the_old_process(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let conf = Conf::simple(engine, Pool::new("web").backend("a", backend.address()));
    let mut proxy = TestProxy::start(conf.process("drain_timeout = \"60s\""));
    let [finishes, stays] = [open_session(&proxy), open_session(&proxy)];
    // The new process has a shorter drain_timeout.
    let text = proxy.render(&proxy.conf()).replace("60s", "2s");
    let other = proxy.dir().join("other.toml");
    std::fs::write(&other, text).unwrap();
    let old = proxy.upgrade_with(&format!("?config={}", other.display()));
    wait_shown(&proxy, 2);
    let began = Instant::now();
    proxy.sigterm();
    std::thread::sleep(ms(300));
    client::exchange(&finishes, b"still served").expect("the session continues");
    drop(finishes);
    assert_eq!(client::read_to_end(&stays), End::Reset(0));
    assert!(began.elapsed() > Duration::from_millis(1500), "{:?}", began.elapsed());
    assert_eq!(proxy.wait_exit(secs(10)), Some(0), "{}", proxy.log());
    proxy.wait_gone(old, secs(10));
}
