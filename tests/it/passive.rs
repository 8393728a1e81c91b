//! Passive health checks: early resets, backends that accept and do not answer, and trial
//! sessions. Also cases that must not count as failures.

use crate::common::backend::{self, Refusing, ScriptedBackend, script};
use crate::common::client::{self, End};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::servers::Nginx;
use crate::common::stable::{Steady, answered_by};
use crate::common::{
    Engine, eventually, have, http, measured, ms, on_every_engine, patience, secs,
};
use std::io::Write;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

on_every_engine!(
    backend_that_accepts_and_hangs_is_suspect_within_2_s,
    resets_before_the_first_byte_eject,
    fin_without_bytes_is_no_failure,
    ejection_ends_with_one_trial_session,
    failed_trial_session_ejects_again,
    long_poll_pool_suspects_no_backend,
);

/// Answers HTTP after `delay`.
fn late(name: &str, delay: Duration) -> backend::Script {
    let answer = format!(
        "HTTP/1.1 200 X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{name}",
        name.len()
    );
    script(move |conn| {
        if matches!(conn.read(&mut [0; 4096]), Ok(1..)) {
            std::thread::sleep(delay);
            let _ = conn.write_all(answer.as_bytes());
        }
    })
}

fn reason(proxy: &TestProxy, name: &str) -> String {
    proxy.backend("web", name)["last_transition"]["reason"].to_string()
}

/// Sends a byte and returns how the stream ends.
fn speak(address: SocketAddr) -> End {
    let Ok(mut stream) = client::try_connect(address) else { return End::Reset(0) };
    let _ = stream.write_all(b"x");
    client::read_to_end(&stream)
}

fn backend_that_accepts_and_hangs_is_suspect_within_2_s(engine: Engine) {
    if !have(&["nginx"]) {
        return;
    }
    let servers = ["a", "b", "c"].map(Nginx::start);
    let pool = servers
        .iter()
        .fold(Pool::new("web"), |pool, server| pool.backend(&server.name, server.address));
    let proxy = TestProxy::start(Conf::simple(engine, pool).workers(2));
    let steady = Steady::start(proxy.addr("web"), 8);
    std::thread::sleep(secs(1));
    // The kernel continues to accept connections for the stopped server.
    servers[2].pause();
    let paused = Instant::now();
    let weight = || proxy.backend("web", "c")["effective_weight"].as_f64().expect("a weight");
    eventually(secs(10), "c is suspect", || weight() < 1.0);
    let took = paused.elapsed();
    measured(&format!("suspect {took:.2?} after it hung: {}", reason(&proxy, "c")));
    assert!(took <= patience(secs(2)), "suspect only after {took:?}");
    let c = proxy.backend("web", "c");
    assert_eq!((&c["observation"], weight()), (&"suspect".into(), 0.1), "{c:#}");
    assert_eq!(c["eligible"], true);
    let before = c["sessions_total"].as_u64().expect("a count");
    let more = Steady::start(proxy.addr("web"), 1);
    std::thread::sleep(ms(500));
    let stuck = proxy.backend("web", "c")["sessions_total"].as_u64().expect("a count") - before;
    assert!(stuck <= 3, "{stuck} more sessions");
    servers[2].resume();
    let resumed = Instant::now();
    eventually(secs(10), "c has its full weight", || weight() == 1.0);
    measured(&format!(
        "full weight {:.2?} after it continued: {}",
        resumed.elapsed(),
        reason(&proxy, "c")
    ));
    let attempts: Vec<_> = steady.stop().into_iter().chain(more.stop()).collect();
    assert!(attempts.iter().all(|attempt| attempt.result.is_ok()), "every session succeeds");
    assert!(answered_by(&attempts, "c") > 0);
    assert_eq!(proxy.backend("web", "a")["effective_weight"], 1);
}

fn resets_before_the_first_byte_eject(engine: Engine) {
    let bad = ScriptedBackend::start(backend::reset_after(1));
    let good = ScriptedBackend::start(late("good", Duration::ZERO));
    let pool = Pool::new("web")
        .ejection("failures = 3\ntime = \"60s\"")
        .backend("bad", bad.address())
        .backend("good", good.address());
    let mut proxy = TestProxy::start(Conf::simple(engine, pool.clone()));
    eventually(secs(5), "bad is ejected", || {
        speak(proxy.addr("web"));
        proxy.backend("web", "bad")["ejected"] == true
    });
    let reset = bad.accepted();
    assert!((3..=4).contains(&reset), "{reset} resets until the ejection");
    assert!(reason(&proxy, "bad").contains("connection reset before the first byte"));
    assert_eq!(proxy.backend("web", "bad")["connect_failures_total"], 0, "the connect succeeds");
    assert!((0..10).all(|_| speak(proxy.addr("web")) != End::Reset(0)));
    // Early resets have no effect if they are switched off.
    let mut conf = proxy.conf();
    *conf.pool_mut("web") = pool.ejection("failures = 3\nearly_resets = false");
    proxy.reload(conf);
    proxy.restart();
    for _ in 0..20 {
        speak(proxy.addr("web"));
    }
    assert!(bad.accepted() >= reset + 10);
    assert_eq!(proxy.backend("web", "bad")["ejected"], false);
}

fn fin_without_bytes_is_no_failure(engine: Engine) {
    let mute = ScriptedBackend::start(script(|conn| {
        let _ = conn.read(&mut [0; 4096]);
        conn.fin();
        conn.drain();
    }));
    let good = ScriptedBackend::start(late("good", Duration::ZERO));
    let pool = Pool::new("web")
        .ejection("failures = 2")
        .backend("mute", mute.address())
        .backend("good", good.address());
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    for _ in 0..20 {
        speak(proxy.addr("web"));
    }
    assert_eq!(mute.accepted(), 10);
    let status = proxy.backend("web", "mute");
    assert_eq!((&status["ejected"], &status["ejections_total"]), (&false.into(), &0.into()));
}

/// A pool with backend `a`, which refuses until it is ejected. Returns the address of `a`.
fn ejected(engine: Engine, good: &ScriptedBackend) -> (TestProxy, SocketAddr) {
    let refusing = Refusing::new();
    let address = refusing.address;
    let pool = Pool::new("web")
        .ejection("failures = 2\ntime = \"600ms\"")
        .backend("a", address)
        .backend("b", good.address());
    let proxy = TestProxy::start(Conf::simple(engine, pool).workers(2));
    eventually(secs(5), "a is ejected", || {
        assert_eq!(http::over_tcp(proxy.addr("web"), "/").expect("a retry on b").body, "b");
        proxy.backend("web", "a")["ejected"] == true
    });
    (proxy, address)
}

fn ejection_ends_with_one_trial_session(engine: Engine) {
    let good = ScriptedBackend::start(late("b", Duration::ZERO));
    let (proxy, address) = ejected(engine, &good);
    let gate = backend::Gate::default();
    let answer = late("a", Duration::ZERO);
    let a = ScriptedBackend::start_on(
        address,
        script({
            let gate = gate.clone();
            move |conn| {
                gate.wait();
                answer(conn);
            }
        }),
    );
    let steady = Steady::start(proxy.addr("web"), 16);
    eventually(secs(10), "the trial session starts", || a.accepted() > 0);
    let others = good.accepted();
    std::thread::sleep(ms(500));
    assert_eq!(a.accepted(), 1, "more than one session during the trial");
    assert!(good.accepted() > others + 20, "b served too few sessions");
    gate.open();
    eventually(secs(5), "a gets its share", || a.accepted() > 20);
    let attempts = steady.stop();
    assert!(attempts.iter().all(|attempt| attempt.result.is_ok()), "{attempts:?}");
    assert!(reason(&proxy, "a").contains("trial session succeeded"), "{}", reason(&proxy, "a"));
}

fn failed_trial_session_ejects_again(engine: Engine) {
    let good = ScriptedBackend::start(late("b", Duration::ZERO));
    let (proxy, address) = ejected(engine, &good);
    let a = ScriptedBackend::start_on(address, backend::reset_after(1));
    let started = Instant::now();
    eventually(secs(10), "the trial fails", || {
        let _ = http::over_tcp(proxy.addr("web"), "/");
        reason(&proxy, "a").contains("(ejection 2 in a row)")
    });
    assert_eq!(a.accepted(), 1, "after {:?}", started.elapsed());
    for _ in 0..50 {
        assert_eq!(http::over_tcp(proxy.addr("web"), "/").unwrap().body, "b");
    }
    assert_eq!(a.accepted(), 1);
}

fn long_poll_pool_suspects_no_backend(engine: Engine) {
    let names = ["a", "b", "c"];
    let backends = [900, 1000, 1500].map(|delay| ScriptedBackend::start(late("x", ms(delay))));
    let pool = names
        .iter()
        .zip(&backends)
        .fold(Pool::new("web"), |pool, (name, backend)| pool.backend(name, backend.address()))
        .ejection("slow_first_byte = \"200ms\"");
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    let steady = Steady::start(proxy.addr("web"), 30);
    let started = Instant::now();
    while started.elapsed() < secs(5) {
        for name in names {
            assert_ne!(
                proxy.backend("web", name)["observation"],
                "suspect",
                "{}",
                reason(&proxy, name)
            );
        }
        std::thread::sleep(ms(50));
    }
    assert!(backends.iter().all(|backend| backend.accepted() > 10));
    let attempts = steady.stop();
    assert!(attempts.iter().all(|attempt| attempt.result.is_ok()), "{attempts:?}");
}
