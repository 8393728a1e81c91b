//! Signals from the start of a process on. Every signal is handled, and none kills a process
//! that must handle it.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, connect, try_connect};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::{PROGRAM, TestProxy};
use crate::common::{
    Engine, eventually, eventually_some, have, long, ms, on_every_engine, patience, proc, secs,
};
use rustix::process::{Pid, Signal, kill_process_group};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

on_every_engine!(
    signals_from_the_first_moment_are_handled,
    signal_is_handled_as_soon_as_the_service_is_ready,
    shutdown_while_the_process_starts_loses_no_client,
    group_signals_during_upgrades_kill_no_process,
    group_signals_during_upgrades_kill_no_process_without_a_supervisor,
    stop_signal_repeated_within_5_ms_counts_once,
    second_stop_signal_ends_every_process,
    upgrade_request_to_a_new_process_is_answered,
);

fn conf(engine: Engine, backend: &ScriptedBackend) -> Conf {
    let conf = Conf::simple(engine, Pool::new("web").backend("a", backend.address()));
    conf.process("drain_timeout = \"20s\"")
}

/// Number of starts per test.
fn starts() -> usize {
    if long() { 250 } else { 6 }
}

/// Starts processes in their own directory and process group, one after another.
struct Setup {
    _backend: ScriptedBackend,
    conf: Conf,
    dir: tempfile::TempDir,
}

struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        proc::kill_with_all_below(self.0.id());
        let _ = self.0.wait();
    }
}

impl Setup {
    fn new(engine: Engine) -> Setup {
        let backend = ScriptedBackend::start(backend::echo());
        let conf = conf(engine, &backend);
        let dir = tempfile::Builder::new().prefix("tg-").tempdir_in("/tmp").unwrap();
        let admin = format!("unix:{}", dir.path().join("admin.sock").display());
        std::fs::write(dir.path().join("t.toml"), conf.render(&admin, "off")).unwrap();
        Setup { _backend: backend, conf, dir }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn start(&self, more: &[&str], notify: Option<&Path>) -> Started {
        let log = std::fs::File::create(self.path("log")).unwrap();
        let mut command = Command::new(PROGRAM);
        command.args(["run", "--config"]).arg(self.path("t.toml")).args(more);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).process_group(0);
        command.envs(notify.map(|path| ("NOTIFY_SOCKET", path)));
        Started(command.spawn().unwrap())
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    fn ask(&self, method: &str, target: &str) -> Option<crate::common::http::Answer> {
        crate::common::http::over_unix(&self.path("admin.sock"), method, target).ok()
    }

    fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let answer = self.ask("GET", "/metrics");
        answer.map_or(0.0, |found| crate::common::proxy::sum_samples(&found.body, name, labels))
    }

    fn is_ready(&self) -> bool {
        self.ask("GET", "/ready").is_some_and(|answer| answer.status == 200)
    }
}

/// Waits until the program runs. Its first action blocks SIGHUP.
fn begun(child: &Child) {
    eventually(secs(10), "the program has begun", || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id()));
        let status = status.unwrap_or_default();
        let held = status.lines().find_map(|line| line.strip_prefix("SigBlk:"));
        let held = held.and_then(|held| u64::from_str_radix(held.trim(), 16).ok());
        held.is_some_and(|held| held & 1 == 1)
    });
}

fn signals_from_the_first_moment_are_handled(engine: Engine) {
    let setup = Setup::new(engine);
    for round in 0..starts() {
        for more in [&[][..], &["--single"]] {
            let mut started = setup.start(more, None);
            begun(&started.0);
            std::thread::sleep(ms(fastrand::u64(0..60)));
            let pid = started.0.id();
            proc::signal(pid, Signal::HUP);
            let upgrade = more.is_empty() && round % 3 == 0;
            if upgrade {
                proc::signal(pid, Signal::USR2);
            }
            eventually(secs(20), "the process serves", || {
                assert!(!proc::is_dead(pid), "{}", setup.log());
                setup.is_ready()
            });
            let reloads = || setup.metric("tidegate_reloads_total", &[]);
            let upgrades = || setup.metric("tidegate_upgrades_total", &[("result", "done")]);
            eventually(secs(10), "the signal is handled", || {
                if upgrade { upgrades() == 1.0 } else { reloads() >= 1.0 }
            });
            client::exchange(&connect(setup.conf.address("web")), b"hello").unwrap();
            proc::signal(pid, Signal::TERM);
            assert_eq!(started.0.wait().unwrap().code(), Some(0), "{}", setup.log());
        }
    }
}

fn signal_is_handled_as_soon_as_the_service_is_ready(engine: Engine) {
    let setup = Setup::new(engine);
    let path = setup.path("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(patience(secs(20)))).unwrap();
    for round in 0..starts() {
        let more: &[&str] = if round % 2 == 0 { &[] } else { &["--single"] };
        let mut started = setup.start(more, Some(&path));
        let mut said = [0; 100];
        let n = eventually_some(secs(20), "the process is ready", || manager.recv(&mut said).ok());
        proc::signal(started.0.id(), Signal::HUP);
        assert!(said[..n].starts_with(b"READY=1"));
        let reloads = || setup.metric("tidegate_reloads_total", &[]);
        eventually(secs(10), "the process has reloaded", || {
            assert!(!proc::is_dead(started.0.id()), "{}", setup.log());
            reloads() >= 1.0
        });
        proc::signal(started.0.id(), Signal::TERM);
        assert_eq!(started.0.wait().unwrap().code(), Some(0), "{}", setup.log());
        // Drops the other notifications.
        manager.set_nonblocking(true).unwrap();
        while manager.recv(&mut said).is_ok() {}
        manager.set_nonblocking(false).unwrap();
    }
}

fn shutdown_while_the_process_starts_loses_no_client(engine: Engine) {
    let setup = Setup::new(engine);
    let address = setup.conf.address("web");
    let mut served = 0;
    for round in 0..starts() {
        let more: &[&str] = if round % 2 == 0 { &[] } else { &["--single"] };
        let mut started = setup.start(more, None);
        begun(&started.0);
        let pid = started.0.id();
        std::thread::scope(|scope| {
            let clients = scope.spawn(move || {
                let mut served = 0;
                while !proc::is_dead(pid) {
                    // The connect fails before and after the process listens. A connected
                    // client is served.
                    if let Ok(stream) = try_connect(address) {
                        let answer = client::exchange(&stream, b"hello");
                        assert_eq!(answer.expect("a connected client is served"), b"hello");
                        served += 1;
                    }
                }
                served
            });
            std::thread::sleep(ms(fastrand::u64(0..100)));
            proc::signal(pid, Signal::TERM);
            let ended = started.0.wait().unwrap();
            assert_eq!(ended.code(), Some(0), "{}", setup.log());
            served += clients.join().expect("no client lost");
        });
    }
    crate::common::measured(&format!("{served} clients while it started and stopped"));
}

fn group_signals_during_upgrades_kill_no_process(engine: Engine) {
    group_signals(engine, false);
}

fn group_signals_during_upgrades_kill_no_process_without_a_supervisor(engine: Engine) {
    group_signals(engine, true);
}

/// Sends SIGHUP to the process group all the time during upgrades.
fn group_signals(engine: Engine, single: bool) {
    if !have(&["setsid"]) {
        return;
    }
    let backend = ScriptedBackend::start(backend::echo());
    let conf = conf(engine, &backend);
    // setsid makes the process the leader of a new group with the same pid.
    let wrapper = ["setsid"];
    let mut proxy = match single {
        true => TestProxy::start_single_under(conf, &wrapper),
        false => TestProxy::start_under(conf, &wrapper),
    };
    let group = Pid::from_raw(proxy.service() as i32).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let _ = kill_process_group(group, Signal::HUP);
                std::thread::sleep(ms(1));
            }
        });
        for _ in 0..if long() { 100 } else { 6 } {
            let answer = proxy.try_upgrade("");
            let pid = (answer.status == 200).then(|| answer.json()["pid"].as_u64());
            if let Some(Some(pid)) = pid {
                proxy.serve_by(pid as u32);
            }
            let served = try_connect(proxy.addr("web"))
                .and_then(|stream| client::exchange(&stream, b"hello"));
            if pid.is_none() || served.is_err() {
                stop.store(true, std::sync::atomic::Ordering::Relaxed);
                panic!("{} {}: {served:?}", answer.status, answer.body);
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    for old in proxy.pids_before() {
        proxy.wait_gone(old, secs(10));
    }
    eventually(secs(5), "the process answers", || {
        proxy.admin_request("GET", "/ready").status == 200
    });
    proxy.rebaseline();
}

fn stop_signal_repeated_within_5_ms_counts_once(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    for single in [false, true] {
        let mut proxy = match single {
            true => TestProxy::start_single(conf(engine, &backend)),
            false => TestProxy::start(conf(engine, &backend)),
        };
        let session = connect(proxy.addr("web"));
        client::exchange(&session, b"hello").unwrap();
        // timeout(1) sends the signal to the process and to its group.
        proxy.sigterm();
        std::thread::sleep(ms(5));
        proxy.sigterm();
        std::thread::sleep(ms(300));
        client::exchange(&session, b"still here").unwrap();
        drop(session);
        assert_eq!(proxy.wait_exit(secs(5)), Some(0), "{}", proxy.log());
    }
}

fn second_stop_signal_ends_every_process(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let mut proxy = TestProxy::start(conf(engine, &backend));
    let old_session = connect(proxy.addr("web"));
    client::exchange(&old_session, b"hello").unwrap();
    let old = proxy.upgrade();
    let session = connect(proxy.addr("web"));
    client::exchange(&session, b"hello").unwrap();
    proxy.sigterm();
    eventually_some(secs(5), "the process drains", || {
        (proxy.admin_request("GET", "/ready").status == 503).then_some(())
    });
    std::thread::sleep(ms(300));
    proxy.sigterm();
    assert_eq!(proxy.wait_exit(secs(5)), Some(3));
    assert!(proc::is_dead(old));
}

/// Returns true if the process runs the program. Before that the supervisor waits for it.
fn is_program(pid: u32) -> bool {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environment
        .split(|byte| *byte == 0)
        .any(|variable| variable.starts_with(b"TIDEGATE_SUPERVISOR="))
}

/// The supervisor reads two messages: from the old process, that the new process serves, and
/// from the new process, that it requests an upgrade. The supervisor reads the latter first.
fn upgrade_request_to_a_new_process_is_answered(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let mut proxy = TestProxy::start(conf(engine, &backend));
    let session = connect(proxy.addr("web"));
    client::exchange(&session, b"hello").unwrap();
    let first = proxy.upgrade();
    let (supervisor, second) = (proxy.service(), proxy.pid());
    std::thread::scope(|scope| {
        let upgrading = scope.spawn(|| proxy.try_upgrade(""));
        let third = eventually_some(secs(10), "a third process starts", || {
            let all = proc::children(supervisor);
            all.into_iter().find(|pid| ![first, second].contains(pid) && is_program(*pid))
        });
        proc::signal(third, Signal::STOP);
        // The third process gets the slot of the first process, before the slot of the second.
        drop(session);
        eventually(secs(10), "the first process is reaped", || {
            !proc::children(supervisor).contains(&first)
        });
        proc::signal(supervisor, Signal::STOP);
        eventually(secs(5), "the supervisor has stopped", || proc::is_stopped(supervisor));
        proc::signal(third, Signal::CONT);
        let answer = upgrading.join().unwrap();
        assert_eq!(answer.status, 200, "{}", answer.body);
        let next = scope.spawn(|| proxy.try_upgrade(""));
        // The request arrives by then, or a little later, which is also valid.
        std::thread::sleep(ms(300));
        proc::signal(supervisor, Signal::CONT);
        let answer = next.join().unwrap();
        assert_eq!(answer.status, 200, "{}", answer.body);
    });
    eventually(secs(10), "one process is left", || proc::children(supervisor).len() == 1);
    proxy.find_serving();
    proxy.rebaseline();
}
