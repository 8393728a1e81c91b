//! Upgrades without an effect on clients.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, End, connect};
use crate::common::conf::{Conf, Pool};
use crate::common::ledger::{Ledger, StreamSizes};
use crate::common::proxy::{PROGRAM, TestProxy};
use crate::common::stable::{Attempt, Steady};
use crate::common::{
    Engine, eventually, long, measured, ms, on_every_engine, on_every_engine_alone, patience, proc,
    secs,
};
use rustix::process::Signal;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

on_every_engine!(
    open_sessions_stay_in_the_old_process_and_new_sessions_use_the_new,
    old_process_exits_at_drain_timeout,
    queued_clients_are_accepted_by_the_new_process,
    sigusr2_upgrades,
    sigusr2_upgrades_without_a_supervisor,
    several_upgrades_keep_all_open_sessions,
    number_of_workers_can_change,
    removed_bind_is_closed_and_new_bind_is_opened,
    admin_api_answers_without_a_gap,
    old_process_continues_to_drain_after_sigterm,
);
on_every_engine_alone!(upgrades_and_reloads_under_load_lose_nothing);

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

fn open_sessions_stay_in_the_old_process_and_new_sessions_use_the_new(engine: Engine) {
    let (_backend, mut proxy) = echo_proxy(engine, "60s");
    let old_session = open_session(&proxy);
    let old = proxy.upgrade();
    let new_session = open_session(&proxy);
    for (session, text) in [(&old_session, b"still here"), (&new_session, b"newly here")] {
        assert_eq!(client::exchange(session, text).unwrap(), text);
    }
    eventually(secs(5), "both sessions are shown", || proxy.status()["connections_active"] == 2);
    assert!(!proc::is_dead(old));
    drop(old_session);
    proxy.wait_gone(old, secs(5));
    assert_eq!(client::exchange(&new_session, b"more data").unwrap(), b"more data");
    drop(new_session);
    proxy.rebaseline();
}

fn old_process_exits_at_drain_timeout(engine: Engine) {
    let (_backend, mut proxy) = echo_proxy(engine, "1s");
    let session = open_session(&proxy);
    let start = Instant::now();
    let old = proxy.upgrade();
    assert_eq!(client::read_to_end(&session), End::Reset(0));
    let after = start.elapsed();
    assert!(after > ms(800) && after < patience(secs(3)), "reset after {after:?}");
    proxy.wait_gone(old, secs(2));
    client::exchange(&open_session(&proxy), b"fine").unwrap();
    proxy.rebaseline();
}

/// While the process is at its cap, clients wait in the listen queue. The new process accepts
/// them from there.
fn queued_clients_are_accepted_by_the_new_process(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let conf = Conf::simple(engine, Pool::new("web").backend("a", backend.address()))
        .process("connections_max = 2\ndrain_timeout = \"60s\"");
    let mut proxy = TestProxy::start(conf);
    let held = [open_session(&proxy), open_session(&proxy)];
    let queued: Vec<TcpStream> = (0..40).map(|_| connect(proxy.addr("web"))).collect();
    let old = proxy.upgrade();
    // The cap applies to both processes together, and the sessions of the old process fill it.
    let first = &queued[0];
    first.set_read_timeout(Some(ms(500))).unwrap();
    client::exchange(first, b"ping").expect_err("served beyond the cap");
    first.set_read_timeout(Some(secs(20))).unwrap();
    drop(held);
    let mut answer = [0; 4];
    // All clients in parallel, because the oldest client is not necessarily served first.
    std::thread::scope(|scope| {
        let mut queued = queued.into_iter();
        let first = queued.next().unwrap();
        for stream in queued {
            scope.spawn(move || {
                let answer = client::exchange(&stream, b"ping").expect("served by the new process");
                assert_eq!(answer, b"ping");
            });
        }
        std::io::Read::read_exact(&mut &first, &mut answer).expect("served by the new process");
        assert_eq!(&answer, b"ping");
    });
    assert!(backend.active_peak() <= 2);
    proxy.wait_gone(old, secs(5));
    proxy.rebaseline();
}

fn sigusr2_upgrades(engine: Engine) {
    let (_backend, mut proxy) = echo_proxy(engine, "60s");
    let session = open_session(&proxy);
    let (service, old) = (proxy.service(), proxy.pid());
    let pid_file = || std::fs::read_to_string(proxy.dir().join("pid")).unwrap();
    assert_eq!(pid_file().trim(), service.to_string());
    proxy.signal(Signal::USR2);
    let done = || proxy.metric("tidegate_upgrades_total", &[("result", "done")]);
    eventually(secs(10), "another process serves", || done() == 1.0);
    let new = proxy.others()[0];
    assert_ne!(new, old);
    assert_eq!(pid_file().trim(), service.to_string(), "the process to signal");
    proxy.serve_by(new);
    client::exchange(&session, b"still here").unwrap();
    drop(session);
    proxy.wait_gone(old, secs(5));
    assert_eq!(proxy.service(), service);
    proxy.rebaseline();
}

/// Without a supervisor the pid of the service changes.
fn sigusr2_upgrades_without_a_supervisor(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let conf = Conf::simple(engine, Pool::new("web").backend("a", backend.address()));
    let mut proxy = TestProxy::start_single(conf.process("drain_timeout = \"60s\""));
    crate::common::upgrade::adopt_orphans();
    let session = open_session(&proxy);
    for _ in 0..2 {
        let old = proxy.pid();
        proxy.signal(Signal::USR2);
        let pid_file = proxy.dir().join("pid");
        let read = || std::fs::read_to_string(&pid_file).unwrap_or_default();
        eventually(secs(10), "another process serves", || {
            read().trim().parse().is_ok_and(|pid: u32| pid != old)
        });
        let new = read().trim().parse().unwrap();
        proxy.serve_by(new);
        eventually(secs(5), "the new process is ready", || {
            proxy.admin_request("GET", "/ready").status == 200
        });
        client::exchange(&session, b"still here").unwrap();
        assert_eq!(read().trim(), new.to_string(), "the old process does not change the file");
    }
    drop(session);
    for old in proxy.pids_before() {
        proxy.wait_gone(old, secs(5));
    }
    proxy.rebaseline();
}

fn several_upgrades_keep_all_open_sessions(engine: Engine) {
    let (_backend, mut proxy) = echo_proxy(engine, "60s");
    let mut sessions = vec![open_session(&proxy)];
    let mut processes = Vec::new();
    for _ in 0..4 {
        processes.push(proxy.upgrade());
        sessions.push(open_session(&proxy));
    }
    for session in &sessions {
        client::exchange(session, b"each in its own process").unwrap();
    }
    assert!(processes.iter().all(|pid| !proc::is_dead(*pid)));
    assert_eq!(proxy.metric("tidegate_upgrades_total", &[("result", "done")]), 4.0);
    drop(sessions);
    for pid in processes {
        proxy.wait_gone(pid, secs(5));
    }
    proxy.rebaseline();
}

fn number_of_workers_can_change(engine: Engine) {
    let (_backend, mut proxy) = echo_proxy(engine, "10s");
    for workers in [4, 1, 3] {
        let mut conf = proxy.conf();
        conf.workers = workers;
        proxy.rewrite_by_rename(&proxy.render(&conf));
        proxy.adopt(conf);
        proxy.upgrade();
        assert_eq!(proxy.status()["workers"], workers);
        for _ in 0..60 {
            client::exchange(&open_session(&proxy), b"every socket is served").unwrap();
        }
    }
    proxy.rebaseline();
}

fn removed_bind_is_closed_and_new_bind_is_opened(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let conf = Conf::simple(engine, Pool::new("web").backend("a", backend.address()))
        .frontend("gone", "web", "")
        .process("drain_timeout = \"20s\"");
    let mut proxy = TestProxy::start(conf);
    let gone = proxy.addr("gone");
    let session = connect(gone);
    client::exchange(&session, b"old").unwrap();
    let mut conf = proxy.conf();
    conf.frontends.pop();
    let conf = conf.frontend("new", "web", "");
    // A separate file, because the old process watches its own file.
    let path = proxy.dir().join("other.toml");
    std::fs::write(&path, proxy.render(&conf)).unwrap();
    let answer = proxy.try_upgrade(&format!("?config={}", path.display()));
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(answer.json()["generation"], 2, "another configuration");
    proxy.serve_by(answer.json()["pid"].as_u64().unwrap() as u32);
    proxy.adopt(conf);
    client::exchange(&connect(proxy.addr("new")), b"new").unwrap();
    client::exchange(&session, b"old").unwrap();
    eventually(secs(5), "the old address refuses", || {
        TcpStream::connect_timeout(&gone, ms(50))
            .is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
    });
    client::exchange(&open_session(&proxy), b"the kept address").unwrap();
    drop(session);
    proxy.rebaseline();
}

fn admin_api_answers_without_a_gap(engine: Engine) {
    let (_backend, mut proxy) = echo_proxy(engine, "10s");
    let socket = proxy.dir().join("admin.sock");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut asked = 0;
            while !stop.load(Ordering::Relaxed) {
                let answer = crate::common::http::over_unix(&socket, "GET", "/live");
                assert_eq!(answer.expect("an answer").status, 200);
                asked += 1;
            }
            asked
        });
        for _ in 0..5 {
            proxy.upgrade();
        }
        stop.store(true, Ordering::Relaxed);
        let asked: u32 = asking.join().expect("no request failed");
        assert!(asked > 20, "{asked}");
    });
    proxy.rebaseline();
}

/// A service manager that stops the service signals all its processes.
fn old_process_continues_to_drain_after_sigterm(engine: Engine) {
    let (_backend, mut proxy) = echo_proxy(engine, "60s");
    let session = open_session(&proxy);
    let old = proxy.upgrade();
    proc::signal(old, Signal::TERM);
    // Longer than the time in which signals count as one.
    std::thread::sleep(ms(300));
    client::exchange(&session, b"still served").unwrap();
    proc::signal(old, Signal::TERM);
    proxy.wait_gone(old, secs(2));
    proxy.rebaseline();
}

/// The load during the upgrades, as a share of the capacity of this machine.
const LOAD: f64 = 0.7;

/// How long sessions can continue in an old process.
const DRAIN: Duration = secs(30);

/// Upgrades and reloads change backends, weights, frontends and processes. Every byte of every
/// stream is checked.
fn upgrades_and_reloads_under_load_lose_nothing(engine: Engine) {
    let (upgrades, reloads) = if long() { (100, 1000) } else { (5, 50) };
    let ledger = Ledger::without_aborts(StreamSizes { most: 64 * 1024, large_one_in: 0 });
    let streams = [(); 3].map(|()| ScriptedBackend::start(ledger.script()));
    let short = ["a", "b"].map(|name| ScriptedBackend::start(backend::http(name, 200)));
    let web = Pool::new("web").backend("a", short[0].address()).backend("b", short[1].address());
    let led = Pool::new("led").backend("s0", streams[0].address());
    let conf = Conf::new(engine).frontend("web", "web", "").frontend("led", "led", "");
    let mut proxy = TestProxy::start(conf.pool(web).pool(led).process("drain_timeout = \"30s\""));
    let (web, led) = (proxy.addr("web"), proxy.addr("led"));
    let (mut attempts, capacity) = measure_capacity(&ledger, web, led);
    let load = capacity.map(|rate| LOAD * rate);
    let (other, _beside) = proxy.other_build();
    let builds = [other, PROGRAM.into()];
    let steady = Steady::paced(web, 4, load[0]);
    let stop = AtomicBool::new(false);
    let mut processes = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| ledger.run_paced(1 << 32, &[led], &stop, 8, load[1]));
        let _stop_even_on_panic = StopOnDrop(&stop);
        for round in 1..=reloads {
            let mut conf = proxy.conf();
            conf.pool_mut("web").backends[0].keys = format!("weight = {}", round % 900 + 1);
            let pool = conf.pool_mut("led");
            pool.backends.clear();
            for n in [round % 3, (round + 1) % 3] {
                *pool = pool.clone().backend(&format!("s{n}"), streams[n].address());
            }
            conf.frontends.truncate(2);
            let conf = if round % 3 == 1 { conf.frontend("extra", "web", "") } else { conf };
            proxy.reload(conf);
            if round % (reloads / upgrades) == 0 {
                let build = &builds[processes.len() % 2];
                processes.push((proxy.upgrade_to(build), Instant::now()));
            }
            // Every old process ends at its deadline.
            let is_due = |since: &Instant| since.elapsed() > DRAIN + patience(secs(2));
            for (old, _) in processes.iter().filter(|(_, since)| is_due(since)) {
                assert!(proc::is_dead(*old), "{old} still runs after its deadline");
            }
            std::thread::sleep(ms(50));
        }
    });
    attempts.extend(steady.stop());
    let failed: Vec<_> = attempts.iter().filter(|attempt| attempt.result.is_err()).collect();
    assert!(failed.is_empty(), "{} of {}: {:?}", failed.len(), attempts.len(), failed[0]);
    ledger.settle();
    ledger.assert_clean();
    assert_eq!(processes.len(), upgrades);
    for (pid, _) in processes {
        proxy.wait_gone(pid, DRAIN);
    }
    let done = proxy.metric("tidegate_upgrades_total", &[("result", "done")]);
    assert_eq!(done, upgrades as f64);
    let reloaded = proxy.metric("tidegate_reloads_total", &[("result", "changed")]);
    assert_eq!(reloaded, reloads as f64);
    // The counters of the last process contain every session of every process.
    let sessions = proxy.metric("tidegate_sessions_total", &[]);
    assert_eq!(sessions, (attempts.len() as u64 + ledger.streams()) as f64);
    let ended = proxy.metric("tidegate_session_end_total", &[]);
    assert_eq!(ended, sessions);
    measured(&format!(
        "{upgrades} upgrades and {reloads} reloads under {} sessions and {} streams \
         ({:.0} and {:.0} per second, {LOAD} of the capacity), 0 failed",
        attempts.len(),
        ledger.streams(),
        load[0],
        load[1],
    ));
    proxy.rebaseline();
}

/// Runs sessions and streams without a rate limit for 1 s. Returns the sessions and the rates
/// per second of both.
fn measure_capacity(ledger: &Ledger, web: SocketAddr, led: SocketAddr) -> (Vec<Attempt>, [f64; 2]) {
    let (steady, stop, start) = (Steady::start(web, 4), AtomicBool::new(false), Instant::now());
    std::thread::scope(|scope| {
        scope.spawn(|| ledger.run_until(&[led], &stop, 4));
        std::thread::sleep(secs(1));
        stop.store(true, Ordering::Relaxed);
    });
    let attempts = steady.stop();
    let seconds = start.elapsed().as_secs_f64();
    let rates = [attempts.len() as f64, ledger.streams() as f64].map(|count| count / seconds);
    (attempts, rates)
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
