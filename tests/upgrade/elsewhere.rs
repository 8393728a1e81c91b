//! The old process's sessions after an upgrade: the new one shows them, counts
//! them towards caps and can end them.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, End, connect};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, ms, on_every_engine, proc, secs};
use std::net::TcpStream;
use std::time::{Duration, Instant};

on_every_engine!(
    status_and_metrics_show_the_old_ones_sessions_once_over_any_number_of_upgrades,
    a_backends_cap_counts_the_old_ones_sessions,
    removing_a_backend_ends_the_old_ones_sessions_at_its_grace,
    a_backend_only_the_old_process_knows_is_shown_as_leaving,
    drain_waits_for_the_old_ones_sessions_as_well,
    a_new_process_that_stops_waits_for_the_old_ones_sessions_until_its_deadline,
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

/// Everything that says how many sessions there are.
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

fn status_and_metrics_show_the_old_ones_sessions_once_over_any_number_of_upgrades(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let pool = Pool::new("web").backend("a", backend.address());
    let mut proxy = proxy_of(engine, pool, "60s");
    let (mut held, mut olds) = (Vec::new(), Vec::new());
    for round in 1..=3 {
        held.push(open_session(&proxy));
        olds.push(proxy.upgrade());
        wait_shown(&proxy, round);
    }
    // Nothing is counted twice, and nothing falls while nothing ends.
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
    eventually(secs(5), "all are counted", || ended() == 3.0);
    proxy.rebaseline();
}

fn a_backends_cap_counts_the_old_ones_sessions(engine: Engine) {
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
    assert!(read.is_err(), "it got in beyond the cap: {read:?}");
    assert_eq!(backend.active(), 2);
    held.pop();
    waits.set_read_timeout(Some(secs(10))).unwrap();
    std::io::Read::read_exact(&mut &waits, &mut answer).expect("it is let in now");
    assert_eq!(&answer, b"hello");
    drop(held);
    proxy.wait_gone(old, secs(10));
    drop(waits);
    proxy.rebaseline();
}

fn removing_a_backend_ends_the_old_ones_sessions_at_its_grace(engine: Engine) {
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
    eventually(secs(5), "they are shown", || proxy.status()["connections_active"] == 4);
    let mut conf = proxy.conf();
    *conf.pool_mut("web") = pool(&["b"]);
    let began = Instant::now();
    proxy.reload(conf);
    let status = proxy.status();
    assert_eq!(status["leaving"][0]["sessions_active"], 2, "{:#}", status["leaving"]);
    eventually(secs(10), "those on a are reset", || backends[0].active() == 0);
    assert!(began.elapsed() > ms(800), "after {:?}", began.elapsed());
    assert_eq!(backends[1].active(), 2, "those on b go on");
    eventually(secs(10), "none is leaving", || proxy.status()["leaving"][0].is_null());
    assert!(!proc::is_dead(old));
    drop(held);
    proxy.wait_gone(old, secs(10));
    proxy.rebaseline();
}

fn a_backend_only_the_old_process_knows_is_shown_as_leaving(engine: Engine) {
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
    eventually(secs(5), "it is shown", || leaving(&proxy) == ("a".into(), 1.into()));
    assert_eq!(proxy.metric("tidegate_leaving_sessions", &[]), 1.0);
    drop(session);
    eventually(secs(5), "it is gone", || proxy.status()["leaving"][0].is_null());
    proxy.wait_gone(old, secs(10));
    proxy.rebaseline();
}

fn drain_waits_for_the_old_ones_sessions_as_well(engine: Engine) {
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

/// A service manager ends the old process together with the new one.
fn a_new_process_that_stops_waits_for_the_old_ones_sessions_until_its_deadline(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let conf = Conf::simple(engine, Pool::new("web").backend("a", backend.address()));
    let mut proxy = TestProxy::start(conf.process("drain_timeout = \"60s\""));
    let [finishes, stays] = [open_session(&proxy), open_session(&proxy)];
    // The new process has less patience.
    let text = proxy.render(&proxy.conf()).replace("60s", "2s");
    let other = proxy.dir().join("other.toml");
    std::fs::write(&other, text).unwrap();
    let old = proxy.upgrade_with(&format!("?config={}", other.display()));
    wait_shown(&proxy, 2);
    let began = Instant::now();
    proxy.sigterm();
    std::thread::sleep(ms(300));
    client::exchange(&finishes, b"still served").expect("it goes on");
    drop(finishes);
    assert_eq!(client::read_to_end(&stays), End::Reset(0));
    assert!(began.elapsed() > Duration::from_millis(1500), "{:?}", began.elapsed());
    assert_eq!(proxy.wait_exit(secs(10)), Some(0), "{}", proxy.log());
    proxy.wait_gone(old, secs(10));
}
