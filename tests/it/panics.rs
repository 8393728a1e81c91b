//! Panics and stalls that the tests inject: which sessions end, which continue, and what an
//! operator sees.
//!
//! Only builds with debug assertions contain the faults. In other builds the tests skip
//! them.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, End, connect, exchange, try_connect};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{
    Engine, eventually, http, measured, ms, on_every_engine, on_every_engine_quiet, patience, secs,
};
use rustix::process::Signal;
use std::net::TcpStream;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

on_every_engine!(
    panic_in_a_session_ends_only_that_session,
    panicked_worker_loses_only_its_own_sessions,
    client_queued_at_a_panicked_worker_is_served,
    process_exits_after_too_many_worker_panics,
    reload_and_upgrade_work_after_a_worker_panic,
    process_exits_if_its_control_thread_panics,
    fault_injection_needs_the_environment_variable,
    supervisor_replaces_a_process_after_a_control_thread_panic,
);

on_every_engine_quiet!(
    panicked_worker_restarts_within_100_ms,
    stalled_worker_is_reported,
    stopped_process_reports_no_stalled_worker,
);

/// Starts Tidegate with fault injection, and its echoing backend.
fn start(engine: Engine, workers: usize) -> Option<(TestProxy, ScriptedBackend)> {
    start_with(engine, workers, &[])
}

fn start_with(
    engine: Engine,
    workers: usize,
    environment: &[&str],
) -> Option<(TestProxy, ScriptedBackend)> {
    if !cfg!(debug_assertions) {
        return None;
    }
    let backend = ScriptedBackend::start(backend::echo());
    let conf = Conf::simple(engine, Pool::new("web").backend("a", backend.address()));
    let wrapper = [&["env", "TIDEGATE_FAULTS=1"], environment].concat();
    let proxy = TestProxy::start_under(conf.workers(workers), &wrapper);
    assert_eq!(proxy.status()["engine"], engine.name());
    Some((proxy, backend))
}

/// Starts without a supervisor, which would start another process.
fn start_single(engine: Engine, workers: usize) -> Option<(TestProxy, ScriptedBackend)> {
    if !cfg!(debug_assertions) {
        return None;
    }
    let backend = ScriptedBackend::start(backend::echo());
    let conf = Conf::simple(engine, Pool::new("web").backend("a", backend.address()));
    let wrapper = ["env", "TIDEGATE_FAULTS=1"];
    Some((TestProxy::start_single_under(conf.workers(workers), &wrapper), backend))
}

#[track_caller]
fn order(proxy: &TestProxy, place: &str, worker: usize, millis: u64) {
    let answer = proxy.admin_request("POST", &format!("/debug/fault/{place}/{worker}/{millis}"));
    assert_eq!(answer.status, 200, "{}", answer.body);
}

fn of_worker(proxy: &TestProxy, metric: &str, worker: usize) -> f64 {
    proxy.metric(metric, &[("worker", &worker.to_string())])
}

/// Number of panics of the worker.
fn worker_panics(proxy: &TestProxy, worker: usize) -> f64 {
    let labels = [("worker", &*worker.to_string()), ("reason", "worker")];
    proxy.metric("tidegate_worker_panics_total", &labels)
}

fn internal_errors(proxy: &TestProxy) -> f64 {
    proxy.metric("tidegate_session_end_total", &[("cause", "internal-error")])
}

#[track_caller]
fn wait_for_restarts(proxy: &TestProxy, worker: usize, count: f64) {
    eventually(secs(10), "the worker serves again", || {
        of_worker(proxy, "tidegate_worker_restarts_total", worker) == count
    });
}

/// Opens sessions until one is on the given worker.
#[track_caller]
fn client_of(proxy: &TestProxy, worker: usize) -> TcpStream {
    for _ in 0..200 {
        let before = of_worker(proxy, "tidegate_worker_accepted_total", worker);
        let client = connect(proxy.addr("web"));
        exchange(&client, b"which worker ").expect("an echo");
        if of_worker(proxy, "tidegate_worker_accepted_total", worker) > before {
            return client;
        }
    }
    panic!("worker {worker} has accepted none of 200 connections");
}

#[track_caller]
fn echoes(client: &TcpStream) {
    let block: Vec<u8> = (0..50_000).map(|_| fastrand::u8(..)).collect();
    assert!(exchange(client, &block).expect("an echo") == block, "other bytes came back");
}

#[track_caller]
fn assert_counts_match(proxy: &TestProxy) {
    eventually(secs(10), "every accepted session has an end", || {
        let ended = proxy.metric("tidegate_session_end_total", &[]);
        proxy.metric("tidegate_worker_accepted_total", &[]) == ended
            && proxy.metric("tidegate_worker_active", &[]) == 0.0
            && proxy.metric("tidegate_connections_active", &[]) == 0.0
            && proxy.metric("tidegate_backend_in_flight", &[]) == 0.0
    });
}

fn panic_in_a_session_ends_only_that_session(engine: Engine) {
    let Some((proxy, _backend)) = start(engine, 1) else { return };
    let other = connect(proxy.addr("web"));
    echoes(&other);
    for (place, phase) in [("setup", "admit"), ("session", "data")] {
        order(&proxy, place, 0, 0);
        let end = client::connect_and_read_to_end(proxy.addr("web"));
        assert_eq!(end, End::Reset(0), "{place}");
        let labels = [("cause", "internal-error"), ("phase", phase)];
        eventually(secs(5), "the session is counted", || {
            proxy.metric("tidegate_session_end_total", &labels) == 1.0
        });
    }
    echoes(&other);
    let panics = |reason| proxy.metric("tidegate_worker_panics_total", &[("reason", reason)]);
    assert_eq!((panics("session"), panics("worker")), (2.0, 0.0));
    let log = proxy.log();
    assert!(log.contains("thread panicked") && log.contains("injected fault: Setup"), "{log}");
    assert!(log.contains("worker-0") && log.contains("src/dataplane/fault_points.rs:"), "{log}");
    let events = proxy.admin_request("GET", "/v1/events?kind=process&level=bad").body;
    assert!(events.contains("thread worker-0 panicked at "), "{events}");
    let lines = proxy.wait_access_log(2);
    assert!(lines.iter().all(|line| line["cause"] == "internal-error"), "{lines:?}");
    assert_eq!(proxy.frontend("web")["sessions_active"], 1);
    drop(other);
    assert_counts_match(&proxy);
}

fn panicked_worker_loses_only_its_own_sessions(engine: Engine) {
    let Some((proxy, _backend)) = start(engine, 2) else { return };
    let survivor = client_of(&proxy, 0);
    for (n, place) in (1..).zip(["worker", "engine", "listener", "relay"]) {
        let busy = client_of(&proxy, 1);
        let lost: Vec<TcpStream> = (0..3).map(|_| client_of(&proxy, 1)).collect();
        let errors = internal_errors(&proxy);
        order(&proxy, place, 1, 0);
        eventually(secs(10), "the worker has panicked", || {
            // Some fault points are reached only by a new connection or new bytes.
            if let Ok(client) = try_connect(proxy.addr("web")) {
                let _ = exchange(&client, b"x");
            }
            let _ = exchange(&busy, b"x");
            worker_panics(&proxy, 1) == f64::from(n)
        });
        for client in &lost {
            assert_eq!(client::read_to_end(client), End::Reset(0), "{place}");
        }
        echoes(&survivor);
        wait_for_restarts(&proxy, 1, f64::from(n));
        assert!(internal_errors(&proxy) >= errors + 4.0, "{place}");
        echoes(&client_of(&proxy, 1));
    }
    assert_eq!(worker_panics(&proxy, 0), 0.0);
    drop(survivor);
    assert_counts_match(&proxy);
    let lines = proxy.access_log();
    let broken_off: Vec<_> =
        lines.iter().filter(|line| line["cause"] == "internal-error").collect();
    assert!(broken_off.iter().all(|line| line["worker"] == 1), "{broken_off:?}");
    let relayed = broken_off.iter().filter(|line| {
        line["phase"] == "data" && line["code"] == "ID" && line["bytes_in"].as_u64() >= Some(13)
    });
    assert!(relayed.count() >= 16, "byte counts are missing: {broken_off:?}");
    let mut numbers: Vec<u64> =
        lines.iter().map(|line| line["session"].as_u64().unwrap()).collect();
    numbers.sort_unstable();
    assert!(numbers.windows(2).all(|pair| pair[0] != pair[1]), "session numbers are unique");
}

fn client_queued_at_a_panicked_worker_is_served(engine: Engine) {
    let Some((proxy, _backend)) = start(engine, 2) else { return };
    for worker in [0, 1] {
        // The worker stalls, and then panics with the clients in its listen queue.
        order(&proxy, "stall", worker, 500);
        order(&proxy, "worker", worker, 0);
    }
    let queued: Vec<TcpStream> = (0..40).map(|_| connect(proxy.addr("web"))).collect();
    for client in &queued {
        echoes(client);
    }
    for worker in [0, 1] {
        wait_for_restarts(&proxy, worker, 1.0);
    }
    drop(queued);
    assert_counts_match(&proxy);
    assert_eq!(internal_errors(&proxy), 0.0, "a queued client was counted");
}

fn process_exits_after_too_many_worker_panics(engine: Engine) {
    let Some((mut proxy, _backend)) = start_single(engine, 1) else { return };
    for n in 1..=5_u32 {
        order(&proxy, "worker", 0, 0);
        wait_for_restarts(&proxy, 0, f64::from(n));
        echoes(&connect(proxy.addr("web")));
    }
    // The process can exit before it answers.
    let socket = proxy.dir().join("admin.sock");
    let _ = http::over_unix(&socket, "POST", "/debug/fault/worker/0/0");
    assert_eq!(proxy.wait_exit(secs(10)), Some(3));
    let log = proxy.log();
    assert!(log.contains("worker panicked too often"), "{log}");
}

fn reload_and_upgrade_work_after_a_worker_panic(engine: Engine) {
    let Some((mut proxy, _backend)) = start(engine, 2) else { return };
    order(&proxy, "worker", 1, 0);
    wait_for_restarts(&proxy, 1, 1.0);
    // A new address: the new thread listens on it and later stops listening on it.
    let conf = proxy.conf();
    let mut both = conf.clone().frontend("two", "web", "");
    both.pool_mut("web").backends[0].keys = "weight = 2".into();
    let reloaded = proxy.reload(both);
    assert_eq!(reloaded["generation"], 2);
    for _ in 0..20 {
        echoes(&connect(proxy.addr("two")));
    }
    let gone = proxy.addr("two");
    proxy.reload(conf);
    eventually(secs(5), "the address is closed", || try_connect(gone).is_err());
    let survivor = client_of(&proxy, 1);
    proxy.upgrade();
    echoes(&survivor);
    echoes(&client_of(&proxy, 1));
    assert_eq!(worker_panics(&proxy, 1), 1.0, "the count survives the upgrade");
    drop(survivor);
    let before = proxy.pids_before()[0];
    eventually(secs(10), "the old process ends", || crate::common::proc::is_dead(before));
    proxy.rebaseline();
}

fn process_exits_if_its_control_thread_panics(engine: Engine) {
    let Some((mut proxy, _backend)) = start_single(engine, 1) else { return };
    let client = connect(proxy.addr("web"));
    echoes(&client);
    // The process exits without an answer.
    let socket = proxy.dir().join("admin.sock");
    let _ = http::over_unix(&socket, "POST", "/debug/fault/control/0/0");
    assert_eq!(proxy.wait_exit(secs(10)), Some(3));
    let log = proxy.log();
    assert!(log.contains("injected fault: control"), "{log}");
    assert!(log.contains("control thread panicked; exiting"), "{log}");
}

fn supervisor_replaces_a_process_after_a_control_thread_panic(engine: Engine) {
    let Some((mut proxy, _backend)) = start(engine, 1) else { return };
    let before = proxy.pid();
    let socket = proxy.dir().join("admin.sock");
    let _ = http::over_unix(&socket, "POST", "/debug/fault/control/0/0");
    proxy.wait_gone(before, secs(5));
    echoes(&connect(proxy.addr("web")));
    eventually(secs(10), "another process answers", || {
        http::over_unix(&socket, "GET", "/ready").is_ok_and(|answer| answer.status == 200)
    });
    proxy.find_serving();
    assert_ne!(proxy.pid(), before);
    let log = proxy.log();
    let replaces = |line: &str| line.contains("this process replaces it");
    let line = log.lines().find(|line| replaces(line)).expect("a line in the log");
    assert!(line.contains("exited with code 3"), "{line}");
    proxy.rebaseline();
}

fn fault_injection_needs_the_environment_variable(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let conf = Conf::simple(engine, Pool::new("web").backend("a", backend.address()));
    let proxy = TestProxy::start(conf);
    assert_eq!(proxy.admin_request("POST", "/debug/fault/worker/0/0").status, 404);
}

// === alone ===

/// Restart times of the worker from the log.
fn restarts_took(proxy: &TestProxy) -> Vec<Duration> {
    let log = proxy.log();
    let lines = log.lines().filter(|line| line.contains("worker restarted"));
    lines
        .map(|line| {
            let (_, rest) = line.split_once("took_us=").expect("a duration");
            let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
            Duration::from_micros(digits.parse().expect("a number"))
        })
        .collect()
}

fn panicked_worker_restarts_within_100_ms(engine: Engine) {
    let Some((proxy, backend)) = start(engine, 1) else { return };
    for n in 1..=3_u32 {
        let clients: Vec<TcpStream> = (0..300).map(|_| connect(proxy.addr("web"))).collect();
        clients.iter().for_each(|client| drop(exchange(client, b"x").expect("an echo")));
        order(&proxy, "worker", 0, 0);
        wait_for_restarts(&proxy, 0, f64::from(n));
        for client in &clients {
            assert_eq!(client::read_to_end(client), End::Reset(0));
        }
        eventually(secs(10), "the backend connections have closed", || backend.active() == 0);
    }
    assert_eq!(internal_errors(&proxy), 900.0);
    let took = restarts_took(&proxy);
    measured(&format!("a worker with 300 sessions, serving again after {took:?}"));
    let best = took.iter().min().expect("three restarts");
    assert!(took.len() == 3 && *best < patience(ms(100)), "{took:?}");
    assert_counts_match(&proxy);
}

fn stalled_worker_is_reported(engine: Engine) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_nonblocking(true).unwrap();
    let socket = format!("NOTIFY_SOCKET={}", path.display());
    let environment = [&*socket, "WATCHDOG_USEC=1200000"];
    let Some((proxy, _backend)) = start_with(engine, 2, &environment) else { return };
    let beats = || {
        let mut bytes = [0; 200];
        std::iter::from_fn(|| manager.recv(&mut bytes).ok().map(|n| bytes[..n] == *b"WATCHDOG=1"))
            .filter(|beat| *beat)
            .count()
    };
    let survivor = client_of(&proxy, 0);
    let stalled = |worker| of_worker(&proxy, "tidegate_worker_stalled", worker);
    assert_eq!(stalled(1), 0.0);
    order(&proxy, "stall", 1, 4_500);
    eventually(secs(4), "the stall is reported", || stalled(1) == 1.0);
    echoes(&survivor);
    let ready = proxy.admin_request("GET", "/ready");
    assert_eq!((ready.status, ready.body.contains("worker 1 is stalled")), (503, true));
    assert!(proxy.cli_ok(&["status"]).contains("WORKER 1 STALLED for"));
    let line = proxy.log().lines().find(|line| line.contains("worker stalled")).map(String::from);
    let line = line.expect("a line in the log");
    assert!(line.contains("worker=1") && line.contains("stage=\"running a command\""), "{line}");
    assert!(line.contains("thread_state=\"sleeping\""), "{line}");
    // After 1.2 s the service manager receives no more watchdog messages.
    eventually(secs(4), "the watchdog messages stop", || {
        beats();
        let since = Instant::now();
        std::thread::sleep(ms(1_000));
        beats() == 0 && stalled(1) == 1.0 && since.elapsed() >= ms(1_000)
    });
    eventually(secs(10), "the stall ends", || stalled(1) == 0.0);
    assert_eq!(proxy.admin_request("GET", "/ready").status, 200);
    assert!(proxy.log().contains("worker responsive again"));
    eventually(secs(5), "the watchdog messages continue", || beats() > 0);
    let stalls = |worker| of_worker(&proxy, "tidegate_worker_stalls_total", worker);
    assert_eq!((stalls(0), stalls(1)), (0.0, 1.0));
    echoes(&client_of(&proxy, 1));
    drop(survivor);
}

fn stopped_process_reports_no_stalled_worker(engine: Engine) {
    let Some((proxy, _backend)) = start(engine, 2) else { return };
    proxy.signal(Signal::STOP);
    std::thread::sleep(ms(2_500));
    proxy.signal(Signal::CONT);
    // Long enough for two checks of the watchdog thread.
    std::thread::sleep(ms(800));
    assert_eq!(proxy.metric("tidegate_worker_stalls_total", &[]), 0.0, "{}", proxy.log());
    assert_eq!(proxy.admin_request("GET", "/ready").status, 200);
}
