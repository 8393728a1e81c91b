//! Crashes of a process under the supervisor: its sessions end, and other clients are not
//! affected.

use crate::common::backend::{self, Refusing, ScriptedBackend};
use crate::common::client::{self, connect, try_connect};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::{PROGRAM, TestProxy};
use crate::common::{
    Engine, eventually, have, long, measured, ms, on_every_engine, on_every_engine_alone, proc,
    secs,
};
use rustix::process::Signal;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

on_every_engine!(
    clients_in_the_listen_queue_are_served_by_the_next_process,
    address_removed_before_the_crash_refuses,
    intents_and_observations_survive_a_crash,
    sessions_of_a_draining_process_continue,
    old_process_serves_again_if_the_new_process_exits_early,
    old_process_serves_again_without_a_supervisor,
    process_drains_after_its_supervisor_exits,
    process_that_never_serves_is_started_five_times,
    supervisor_as_process_1_reaps_restarts_and_upgrades,
);
on_every_engine_alone!(
    crashes_under_load_refuse_no_client,
    crashes_under_load_as_process_1_refuse_no_client,
);

fn start(engine: Engine) -> (ScriptedBackend, TestProxy) {
    let backend = ScriptedBackend::start(backend::echo());
    let proxy = TestProxy::start(conf(engine, &backend));
    (backend, proxy)
}

fn conf(engine: Engine, backend: &ScriptedBackend) -> Conf {
    let conf = Conf::simple(engine, Pool::new("web").backend("a", backend.address()));
    conf.process("drain_timeout = \"20s\"")
}

fn echoes(address: SocketAddr) {
    assert_eq!(client::exchange(&connect(address), b"hello").expect("an echo"), b"hello");
}

/// Kills the serving process and waits until another process serves.
#[track_caller]
fn crash(proxy: &mut TestProxy) -> u32 {
    let before = proxy.pid();
    proc::signal(before, Signal::KILL);
    replaced(proxy, before);
    before
}

#[track_caller]
fn replaced(proxy: &mut TestProxy, before: u32) {
    let socket = proxy.dir().join("admin.sock");
    eventually(secs(10), "another process serves", || {
        proc::children(proxy.service()).iter().any(|pid| *pid != before)
            && proc::is_dead(before)
            && crate::common::http::over_unix(&socket, "GET", "/ready")
                .is_ok_and(|answer| answer.status == 200)
    });
    proxy.find_serving();
    assert_ne!(proxy.pid(), before);
}

fn clients_in_the_listen_queue_are_served_by_the_next_process(engine: Engine) {
    let (_backend, mut proxy) = start(engine);
    let open = connect(proxy.addr("web"));
    client::exchange(&open, b"hello").unwrap();
    // The stopped process accepts no client. Then it is killed.
    let before = proxy.pid();
    proc::signal(before, Signal::STOP);
    eventually(secs(5), "every thread has stopped", || proc::is_stopped(before));
    let queued: Vec<TcpStream> = (0..40).map(|_| connect(proxy.addr("web"))).collect();
    proc::signal(before, Signal::KILL);
    for stream in &queued {
        assert_eq!(client::exchange(stream, b"ping").expect("served"), b"ping");
    }
    assert!(client::exchange(&open, b"gone").is_err(), "a session of the killed process");
    replaced(&mut proxy, before);
    let log = proxy.log();
    let replaces = |line: &str| line.contains("this process replaces it");
    let line = log.lines().find(|line| replaces(line)).expect("a line in the log");
    assert!(line.contains("was killed by signal 9"), "{line}");
    drop(queued);
    proxy.rebaseline();
}

fn address_removed_before_the_crash_refuses(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let mut proxy = TestProxy::start(conf(engine, &backend).frontend("gone", "web", ""));
    let gone = proxy.addr("gone");
    let mut less = proxy.conf();
    less.frontends.pop();
    proxy.reload(less);
    // The listener can be open or closed at the crash.
    crash(&mut proxy);
    eventually(secs(5), "the removed address refuses", || {
        TcpStream::connect_timeout(&gone, ms(50))
            .is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
    });
    echoes(proxy.addr("web"));
    proxy.rebaseline();
}

fn intents_and_observations_survive_a_crash(engine: Engine) {
    let echo = ["a", "b", "c"].map(|_| ScriptedBackend::start(backend::echo()));
    let dead = Refusing::new();
    let pool = Pool::new("web")
        .probe("kind = \"tcp\"\ninterval = \"30s\"\ntimeout = \"1s\"")
        .backend("up", echo[0].address())
        .backend("drained", echo[1].address())
        .backend("back", echo[2].address())
        .backend("dead", dead.address);
    let mut proxy = TestProxy::start(Conf::simple(engine, pool));
    for (name, verdict) in [("up", "up"), ("drained", "up"), ("back", "up"), ("dead", "down")] {
        proxy.wait_backend("web", name, "observation", verdict);
    }
    proxy.cli_ok(&["drain", "web/back"]);
    // Longer than the interval at which the supervisor receives the state.
    std::thread::sleep(ms(1500));
    let crashes = if long() { 20 } else { 2 };
    for _ in 0..crashes {
        proxy.cli_ok(&["drain", "web/drained"]);
        proxy.cli_ok(&["undrain", "web/back"]);
        // The last change of intent is stored immediately.
        crash(&mut proxy);
        assert_eq!(proxy.backend("web", "drained")["intent"], "draining");
        assert_eq!(proxy.backend("web", "back")["intent"], "ready");
        assert_eq!(proxy.backend("web", "up")["observation"], "up");
        assert_eq!(proxy.backend("web", "dead")["observation"], "down");
        assert_eq!(proxy.generation(), 1);
        echoes(proxy.addr("web"));
    }
    proxy.rebaseline();
}

fn sessions_of_a_draining_process_continue(engine: Engine) {
    let (_backend, mut proxy) = start(engine);
    let old_session = connect(proxy.addr("web"));
    client::exchange(&old_session, b"hello").unwrap();
    let old = proxy.upgrade();
    // After this time the old process no longer takes the service back.
    std::thread::sleep(ms(1300));
    let new = proxy.pid();
    proc::signal(new, Signal::KILL);
    echoes(proxy.addr("web"));
    client::exchange(&old_session, b"old data").unwrap();
    eventually(secs(10), "another process serves", || proxy.others().iter().any(|pid| *pid != old));
    drop(old_session);
    proxy.wait_gone(old, secs(5));
    replaced(&mut proxy, new);
    proxy.rebaseline();
}

fn old_process_serves_again_if_the_new_process_exits_early(engine: Engine) {
    let (_backend, proxy) = start(engine);
    old_process_serves_again(proxy);
}

fn old_process_serves_again_without_a_supervisor(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    old_process_serves_again(TestProxy::start_single(conf(engine, &backend)));
}

fn old_process_serves_again(mut proxy: TestProxy) {
    let session = connect(proxy.addr("web"));
    client::exchange(&session, b"hello").unwrap();
    let first = proxy.pid();
    for _ in 0..2 {
        let answer = proxy.try_upgrade("");
        assert_eq!(answer.status, 200, "{}", answer.body);
        let new = answer.json()["pid"].as_u64().unwrap() as u32;
        proc::signal(new, Signal::KILL);
        echoes(proxy.addr("web"));
        client::exchange(&session, b"still here").unwrap();
        let socket = proxy.dir().join("admin.sock");
        eventually(secs(5), "the first process answers", || {
            crate::common::http::over_unix(&socket, "GET", "/ready")
                .is_ok_and(|answer| answer.status == 200)
        });
        proxy.wait_gone(new, secs(5));
        assert!(!proc::is_dead(first));
    }
    assert_eq!(proxy.metric("tidegate_upgrades_total", &[("result", "failed")]), 2.0);
    assert!(proxy.log().contains("new process exited; this process accepts connections again"));
    // The next new process takes over.
    let old = proxy.upgrade();
    assert_eq!(old, first);
    echoes(proxy.addr("web"));
    drop(session);
    proxy.wait_gone(first, secs(5));
    proxy.rebaseline();
}

fn process_drains_after_its_supervisor_exits(engine: Engine) {
    let (_backend, mut proxy) = start(engine);
    crate::common::upgrade::adopt_orphans();
    let session = connect(proxy.addr("web"));
    client::exchange(&session, b"hello").unwrap();
    let (service, serving) = (proxy.service(), proxy.pid());
    proc::signal(service, Signal::KILL);
    assert_eq!(proxy.wait_exit(secs(5)), None, "ended by a signal");
    eventually(secs(5), "new connections are refused", || try_connect(proxy.addr("web")).is_err());
    client::exchange(&session, b"still here").unwrap();
    assert!(proxy.log().contains("supervisor exited; draining and exiting"));
    drop(session);
    proxy.wait_gone(serving, secs(5));
}

fn process_that_never_serves_is_started_five_times(engine: Engine) {
    if !have(&["sh"]) {
        return;
    }
    // The program is started through a link, which later leads to another program.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let link = dir.path().join("tidegate");
    std::os::unix::fs::symlink(PROGRAM, &link).unwrap();
    let backend = ScriptedBackend::start(backend::echo());
    let script = format!("shift; exec '{}' \"$@\"", link.display());
    let mut proxy = TestProxy::start_under(conf(engine, &backend), &["sh", "-c", &script, "sh"]);
    let broken = dir.path().join("broken");
    std::fs::write(&broken, "#!/bin/sh\necho >>\"$0.count\"\nkill -9 $$\n").unwrap();
    std::fs::set_permissions(&broken, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::rename(&broken, &link).unwrap();
    proc::signal(proxy.pid(), Signal::KILL);
    assert_eq!(proxy.wait_exit(secs(20)), Some(3));
    assert!(
        proxy.log().contains("serving processes exited before they were ready; exiting starts=5")
    );
    let count = std::fs::read_to_string(dir.path().join("tidegate.count")).unwrap();
    assert_eq!(count.lines().count(), 5);
}

fn supervisor_as_process_1_reaps_restarts_and_upgrades(engine: Engine) {
    if !have(&["unshare", "nsenter"]) {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        return crate::common::skip("only root can create a pid namespace");
    }
    let backend = ScriptedBackend::start(backend::echo());
    let wrapper = ["unshare", "--pid", "--fork", "--mount-proc"];
    let mut proxy = TestProxy::start_under(conf(engine, &backend), &wrapper);
    let session = connect(proxy.addr("web"));
    client::exchange(&session, b"hello").unwrap();
    let init = proxy.service().to_string();
    for _ in 0..3 {
        // Each command leaves an orphan that exits soon after.
        let orphan = ["-t", &init, "-p", "sh", "-c", "sleep 0.05 & exit 0"];
        let status = std::process::Command::new("nsenter").args(orphan).status().unwrap();
        assert!(status.success());
    }
    eventually(secs(5), "the orphans are reaped", || proxy.others().is_empty());
    for _ in 0..2 {
        let before = proxy.pid();
        let answer = proxy.try_upgrade("");
        assert_eq!(answer.status, 200, "{}", answer.body);
        let mut new = proxy.others();
        new.retain(|pid| !proxy.pids_before().contains(pid));
        assert_eq!(new.len(), 1, "{new:?}");
        proxy.serve_by(new[0]);
        echoes(proxy.addr("web"));
        std::thread::sleep(ms(1100));
        assert_ne!(proxy.pid(), before);
    }
    client::exchange(&session, b"still here").unwrap();
    drop(session);
    for before in proxy.pids_before() {
        proxy.wait_gone(before, secs(5));
    }
    crash(&mut proxy);
    echoes(proxy.addr("web"));
    let zombies = || {
        let all = proc::children(proxy.service());
        all.into_iter().filter(|pid| proc::is_dead(*pid)).count()
    };
    eventually(secs(5), "every child is reaped", || zombies() == 0);
    assert_eq!(proc::children(proxy.service()), [proxy.pid()]);
    proxy.rebaseline();
}

fn crashes_under_load_refuse_no_client(engine: Engine) {
    let (_backend, proxy) = start(engine);
    crash_under_load(proxy);
}

fn crashes_under_load_as_process_1_refuse_no_client(engine: Engine) {
    if !have(&["unshare"]) {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        return crate::common::skip("only root can create a pid namespace");
    }
    let backend = ScriptedBackend::start(backend::echo());
    let wrapper = ["unshare", "--pid", "--fork", "--mount-proc"];
    crash_under_load(TestProxy::start_under(conf(engine, &backend), &wrapper));
}

/// Kills the serving process repeatedly while clients connect.
fn crash_under_load(mut proxy: TestProxy) {
    let address = proxy.addr("web");
    let stop = AtomicBool::new(false);
    let crashes = if long() { 50 } else { 5 };
    let mut gaps: Vec<Duration> = Vec::new();
    let served = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let mut served = 0_u64;
                    while !stop.load(Ordering::Relaxed) {
                        // A session can end with its process, but no connect is refused.
                        let stream = try_connect(address).expect("a connection");
                        served += u64::from(client::exchange(&stream, b"hello").is_ok());
                    }
                    served
                })
            })
            .collect();
        for _ in 0..crashes {
            std::thread::sleep(ms(200));
            let before = proxy.pid();
            proc::signal(before, Signal::KILL);
            let killed = Instant::now();
            while !try_connect(address)
                .is_ok_and(|stream| client::exchange(&stream, b"next").is_ok())
            {}
            gaps.push(killed.elapsed());
            replaced(&mut proxy, before);
        }
        stop.store(true, Ordering::Relaxed);
        clients.into_iter().map(|thread| thread.join().expect("no client refused")).sum::<u64>()
    });
    gaps.sort();
    let (median, longest) = (gaps[gaps.len() / 2], gaps[gaps.len() - 1]);
    measured(&format!(
        "{crashes} crashes under {served} sessions, no client refused; the next client was served \
         after {median:?}, {longest:?} at most"
    ));
    // A release build takes a fraction of this time.
    let limit = if cfg!(debug_assertions) { secs(2) } else { ms(100) };
    assert!(median < limit, "{median:?}");
    assert!(proxy.others().is_empty(), "another process is left");
    proxy.rebaseline();
}
