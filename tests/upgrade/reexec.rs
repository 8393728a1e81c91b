//! The supervisor executes the program of an upgrade in its own place: its number, the
//! sockets, the processes and the signals stay; a program that cannot take over changes
//! nothing.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, connect, try_connect};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::{PROGRAM, TestProxy};
use crate::common::{Engine, eventually, have, long, ms, on_every_engine, patience, proc, secs};
use rustix::process::Signal;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

on_every_engine!(
    upgrade_to_another_file_renews_the_supervisor_unnoticed,
    an_upgrade_to_the_same_file_executes_nothing,
    as_process_1_the_supervisor_is_renewed_too,
    signals_sent_while_the_program_is_executed_are_obeyed,
    processes_that_end_while_the_program_is_executed_are_reaped_and_replaced,
    stopping_at_any_moment_of_it_ends_in_order,
    reloading_all_the_time_does_not_keep_it_from_happening,
    a_program_that_does_not_pass_the_trial_changes_nothing,
    a_program_that_cannot_be_executed_changes_nothing,
    a_state_that_changes_during_the_trial_is_tried_again,
    a_service_manager_hears_nothing_of_it,
);

/// A balancer that was started from a file of its own, which can be replaced.
struct Bench {
    _backend: ScriptedBackend,
    proxy: TestProxy,
    programs: tempfile::TempDir,
}

/// What it answers where it is asked to, is executed or serves.
const HANDS_ON: &str = "exec 'REAL' \"$@\"";

impl Bench {
    fn new(engine: Engine) -> Bench {
        Bench::under(engine, &[])
    }

    fn under(engine: Engine, wrapper: &[&str]) -> Bench {
        let backend = ScriptedBackend::start(backend::echo());
        let conf = Conf::simple(engine, Pool::new("web").backend("a", backend.address()));
        let conf = conf.process("drain_timeout = \"20s\"");
        // Beside the program: the balancer may start nothing from elsewhere.
        let programs = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = programs.path().join("tidegate");
        copy(&path);
        let script = format!("shift; exec '{}' \"$@\"", path.display());
        let wrapper = [wrapper, &["sh", "-c", &script, "sh"]].concat();
        let proxy = TestProxy::start_under(conf, &wrapper);
        Bench { _backend: backend, proxy, programs }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.programs.path().join(name)
    }

    /// Puts another copy of the program where the one it was started from was.
    fn replace(&self) {
        copy(&self.path("new"));
        std::fs::rename(self.path("new"), self.path("tidegate")).unwrap();
    }

    /// Puts a script there; `REAL` is a copy of the program, `HERE` this directory.
    fn replace_by(&self, script: &str) {
        if !self.path("real").exists() {
            copy(&self.path("real"));
        }
        let real = self.path("real");
        let text = script.replace("REAL", real.to_str().unwrap());
        let text = text.replace("HERE", self.programs.path().to_str().unwrap());
        // Written by another process: a file that is open for writing cannot be run.
        std::fs::write(self.path("text"), text).unwrap();
        let (from, to) = (self.path("text"), self.path("new"));
        let script = format!("cp '{0}' '{1}' && chmod 755 '{1}'", from.display(), to.display());
        assert!(Command::new("sh").args(["-c", &script]).status().unwrap().success());
        std::fs::rename(self.path("new"), self.path("tidegate")).unwrap();
    }

    /// A script whose trial is `trial`, in the language of sh(1).
    fn replace_by_trial(&self, trial: &str) {
        let case = format!("case \"$*\" in *--supervisor-check*) {trial};; esac");
        self.replace_by(&format!("#!/bin/sh\n{case}\n{HANDS_ON}\n"));
    }

    /// Upgrades to what lies there; gives the process before.
    fn upgrade(&mut self) -> u32 {
        self.proxy.upgrade()
    }

    /// The file that the supervisor runs.
    fn runs(&self) -> u64 {
        inode(&PathBuf::from(format!("/proc/{}/exe", self.proxy.service())))
    }

    /// Waits until the supervisor runs that file.
    #[track_caller]
    fn wait_renewed(&self, name: &str) {
        let wanted = inode(&self.path(name));
        eventually(secs(10), "the supervisor runs the new binary", || self.runs() == wanted);
        eventually(secs(5), "it says so", || {
            self.proxy.log().contains("the supervisor runs the new binary")
        });
    }

    /// The supervisor's descriptors that are open to what it executes: those that it was
    /// started with (fcntl(2), O_CLOEXEC).
    fn passed_on(&self) -> Vec<String> {
        let entries = std::fs::read_dir(format!("/proc/{}/fdinfo", self.proxy.service())).unwrap();
        let passed = entries.filter_map(|entry| {
            let path = entry.unwrap().path();
            let facts = std::fs::read_to_string(&path).unwrap();
            let flags = facts.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
            let flags = u32::from_str_radix(flags.trim(), 8).unwrap();
            let open = flags & 0o2_000_000 == 0;
            open.then(|| path.file_name().unwrap().to_string_lossy().into_owned())
        });
        let mut passed: Vec<String> = passed.collect();
        passed.sort();
        passed
    }

    #[track_caller]
    fn serves(&self) {
        echoes(self.proxy.addr("web"));
    }

    /// Kills the process that serves and waits for the next one.
    #[track_caller]
    fn crash(&mut self) {
        let before = self.proxy.pid();
        proc::signal(before, Signal::KILL);
        let began = std::time::Instant::now();
        self.serves();
        let took = began.elapsed();
        assert!(took < patience(secs(5)), "{took:?}");
        self.wait_replaced(before);
    }

    #[track_caller]
    fn wait_replaced(&mut self, before: u32) {
        let socket = self.proxy.dir().join("admin.sock");
        eventually(secs(10), "another process serves alone", || {
            let all = proc::children(self.proxy.service());
            all.len() == 1
                && all[0] != before
                && crate::common::http::over_unix(&socket, "GET", "/ready")
                    .is_ok_and(|answer| answer.status == 200)
        });
        self.proxy.find_serving();
    }

    /// The processes below it are the one that serves, and no zombie.
    #[track_caller]
    fn nothing_is_left(&self) {
        eventually(secs(10), "one process is left", || {
            proc::children(self.proxy.service()) == [self.proxy.pid()]
        });
    }
}

fn copy(to: &Path) {
    let status = Command::new("cp").arg("--reflink=auto").arg(PROGRAM).arg(to).status();
    assert!(status.expect("cp").success());
}

fn inode(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |facts| facts.ino())
}

fn echoes(address: SocketAddr) {
    assert_eq!(client::exchange(&connect(address), b"hello").expect("an echo"), b"hello");
}

/// By what people know a process.
fn names(pid: u32) -> [String; 2] {
    ["cmdline", "comm"].map(|name| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap())
}

/// Clients that come all the time until `stop`; each is taken and served.
fn all_served(address: SocketAddr, stop: &AtomicBool) -> u64 {
    let mut served = 0;
    while !stop.load(Ordering::Relaxed) {
        let stream = try_connect(address).expect("taken");
        assert_eq!(client::exchange(&stream, b"hello").expect("served"), b"hello");
        served += 1;
    }
    served
}

fn upgrade_to_another_file_renews_the_supervisor_unnoticed(engine: Engine) {
    let mut bench = Bench::new(engine);
    let pid_before = bench.proxy.service();
    let names = names(pid_before);
    let pid_file = bench.proxy.dir().join("pid");
    let session = connect(bench.proxy.addr("web"));
    client::exchange(&session, b"hello").unwrap();
    let (address, stop) = (bench.proxy.addr("web"), AtomicBool::new(false));
    let mut olds = Vec::new();
    let served = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..2).map(|_| scope.spawn(|| all_served(address, &stop))).collect();
        for _ in 0..2 {
            let before = bench.runs();
            bench.replace();
            olds.push(bench.upgrade());
            bench.wait_renewed("tidegate");
            assert_ne!(bench.runs(), before);
            client::exchange(&session, b"still here").unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        clients.into_iter().map(|one| one.join().expect("nobody refused")).sum::<u64>()
    });
    assert!(served > 0);
    assert_eq!(self::names(pid_before), names);
    assert_eq!(std::fs::read_to_string(&pid_file).unwrap(), format!("{pid_before}\n"));
    drop(session);
    for old in olds {
        bench.proxy.wait_gone(old, secs(10));
    }
    bench.nothing_is_left();
    bench.crash();
    bench.nothing_is_left();
    let reloads = bench.proxy.metric("tidegate_reloads_total", &[]);
    bench.proxy.sighup();
    eventually(secs(5), "it reloads", || {
        bench.proxy.metric("tidegate_reloads_total", &[]) > reloads
    });
    let old = bench.upgrade();
    bench.proxy.wait_gone(old, secs(10));
    bench.serves();
    assert_eq!(bench.proxy.service(), pid_before);
    bench.proxy.rebaseline();
    bench.proxy.check_for_leaks();
    assert!(!pid_file.exists(), "it goes with the service");
}

fn an_upgrade_to_the_same_file_executes_nothing(engine: Engine) {
    let mut bench = Bench::new(engine);
    let old = bench.upgrade();
    bench.proxy.wait_gone(old, secs(10));
    std::thread::sleep(ms(500));
    assert!(!bench.proxy.log().contains("tidegate_supervisor"), "{}", bench.proxy.log());
    bench.proxy.rebaseline();
}

fn as_process_1_the_supervisor_is_renewed_too(engine: Engine) {
    if !have(&["unshare"]) {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        return crate::common::skip("only root makes a namespace of processes");
    }
    let mut bench = Bench::under(engine, &["unshare", "--pid", "--fork", "--mount-proc"]);
    for _ in 0..2 {
        bench.replace();
        let answer = bench.proxy.try_upgrade("");
        assert_eq!(answer.status, 200, "{}", answer.body);
        // Its number in here.
        let mut new = bench.proxy.others();
        new.retain(|pid| !bench.proxy.pids_before().contains(pid));
        assert_eq!(new.len(), 1, "{new:?}");
        bench.proxy.serve_by(new[0]);
        bench.wait_renewed("tidegate");
        bench.nothing_is_left();
    }
    bench.crash();
    bench.nothing_is_left();
    bench.serves();
    bench.proxy.rebaseline();
}

/// It takes its time when it is executed by the supervisor, and says in a file that it
/// has begun.
const SLOW_TO_BEGIN: &str = "#!/usr/bin/env python3
import os, sys, time
if 'TIDEGATE_SUPERVISOR_STATE' in os.environ:
    open('HERE/begun', 'w').close()
    time.sleep(0.7)
os.execv('REAL', sys.argv)
";

impl Bench {
    /// Waits for the moment between two programs.
    #[track_caller]
    fn wait_between(&self) {
        let begun = self.path("begun");
        eventually(secs(10), "the supervisor has executed it", || begun.exists());
        std::fs::remove_file(begun).unwrap();
    }
}

fn signals_sent_while_the_program_is_executed_are_obeyed(engine: Engine) {
    if !have(&["python3"]) {
        return;
    }
    let mut bench = Bench::new(engine);
    bench.replace_by(SLOW_TO_BEGIN);
    bench.upgrade();
    bench.wait_between();
    let reloads = || bench.proxy.metric("tidegate_reloads_total", &[]);
    let before = reloads();
    bench.proxy.sighup();
    bench.serves();
    assert_eq!(reloads(), before, "nobody takes it at the moment");
    bench.wait_renewed("real");
    eventually(secs(5), "it reloads", || reloads() > before);
    // The next one is stopped at that moment.
    bench.upgrade();
    bench.wait_between();
    for _ in 0..50 {
        bench.proxy.sigterm();
        std::thread::sleep(ms(2));
    }
    assert_eq!(bench.proxy.wait_exit(secs(10)), Some(0), "{}", bench.proxy.log());
}

fn processes_that_end_while_the_program_is_executed_are_reaped_and_replaced(engine: Engine) {
    if !have(&["python3"]) {
        return;
    }
    let mut bench = Bench::new(engine);
    let session = connect(bench.proxy.addr("web"));
    client::exchange(&session, b"hello").unwrap();
    bench.replace_by(SLOW_TO_BEGIN);
    let old = bench.upgrade();
    bench.wait_between();
    // Both end: the one that drains in order, the one that serves by a crash.
    drop(session);
    let before = bench.proxy.pid();
    proc::signal(before, Signal::KILL);
    // It waits in the listen queue.
    let waits = connect(bench.proxy.addr("web"));
    eventually(secs(5), "the old one has ended", || proc::is_dead(old));
    assert_eq!(client::exchange(&waits, b"hello").expect("served"), b"hello");
    bench.wait_replaced(before);
    drop(waits);
    bench.nothing_is_left();
    bench.proxy.rebaseline();
}

fn stopping_at_any_moment_of_it_ends_in_order(engine: Engine) {
    for _ in 0..if long() { 100 } else { 3 } {
        let mut bench = Bench::new(engine);
        bench.replace();
        bench.upgrade();
        // The trial begins after a second.
        std::thread::sleep(ms(fastrand::u64(950..1250)));
        for _ in 0..5 {
            bench.proxy.sigterm();
            std::thread::sleep(ms(fastrand::u64(0..15)));
        }
        assert_eq!(bench.proxy.wait_exit(secs(10)), Some(0), "{}", bench.proxy.log());
    }
}

fn reloading_all_the_time_does_not_keep_it_from_happening(engine: Engine) {
    let mut bench = Bench::new(engine);
    let (service, stop) = (bench.proxy.service(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                proc::signal(service, Signal::HUP);
                std::thread::sleep(ms(3));
            }
        });
        let renewed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..2 {
                bench.replace();
                bench.upgrade();
                bench.wait_renewed("tidegate");
                bench.serves();
            }
        }));
        stop.store(true, Ordering::Relaxed);
        renewed.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    bench.nothing_is_left();
    eventually(secs(5), "it is ready", || bench.proxy.admin_request("GET", "/ready").status == 200);
    bench.proxy.rebaseline();
}

fn a_program_that_does_not_pass_the_trial_changes_nothing(engine: Engine) {
    let mut bench = Bench::new(engine);
    let own = bench.runs();
    let trials = [
        // As programs do that do not know the question.
        ("exit 2", "exit code 2"),
        ("kill -9 $$", "killed by signal 9"),
        ("sleep 60 & echo $! >'HERE/pid'; wait; exit 0", "no answer within 2s"),
        ("exit 0", "not the digest of the state"),
        ("echo supervisor state 1 0123456789abcdef; exit 0", "not the digest of the state"),
        ("yes; exit 0", "no answer within 2s"),
    ];
    for (trial, reason) in trials {
        let said = bench.proxy.log().matches("the supervisor keeps running the old binary").count();
        bench.replace_by_trial(trial);
        bench.upgrade();
        eventually(secs(15), "the supervisor says that it stays", || {
            let log = bench.proxy.log();
            log.matches("the supervisor keeps running the old binary").count() > said
        });
        let log = bench.proxy.log();
        let line = log.lines().rfind(|line| line.contains("the supervisor keeps running")).unwrap();
        assert!(line.contains(reason) && line.contains("WARN"), "{trial}: {line}");
        assert_eq!(bench.runs(), own);
        bench.serves();
        bench.nothing_is_left();
    }
    let pid = std::fs::read_to_string(bench.path("pid")).unwrap().trim().parse().unwrap();
    assert!(proc::is_dead(pid), "what a trial has started ends with it");
    bench.crash();
    // One that passes is executed after all that.
    bench.replace();
    bench.upgrade();
    bench.wait_renewed("tidegate");
    bench.nothing_is_left();
    bench.proxy.rebaseline();
}

fn a_program_that_cannot_be_executed_changes_nothing(engine: Engine) {
    let mut bench = Bench::new(engine);
    let (own, before) = (bench.runs(), bench.passed_on());
    bench.replace_by_trial("chmod 0 \"$0\"; exec 'REAL' \"$@\"");
    bench.upgrade();
    eventually(secs(10), "the supervisor says that it stays", || {
        bench.proxy.log().contains("Permission denied")
    });
    assert_eq!(bench.runs(), own);
    assert_eq!(bench.passed_on(), before);
    bench.serves();
    bench.replace();
    bench.crash();
    bench.proxy.rebaseline();
}

fn a_state_that_changes_during_the_trial_is_tried_again(engine: Engine) {
    let mut bench = Bench::new(engine);
    // It answers at once, and ends only later.
    bench.replace_by_trial("'REAL' \"$@\"; echo >>'HERE/trials'; sleep 0.7; exit 0");
    bench.upgrade();
    let trials = bench.path("trials");
    eventually(secs(10), "a trial has read the state", || trials.exists());
    // One more socket to hold.
    let more = bench.proxy.conf().frontend("more", "web", "");
    bench.proxy.reload(more);
    bench.wait_renewed("real");
    assert_eq!(std::fs::read_to_string(&trials).unwrap().lines().count(), 2);
    bench.crash();
    echoes(bench.proxy.addr("more"));
    bench.proxy.rebaseline();
}

fn a_service_manager_hears_nothing_of_it(engine: Engine) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(patience(secs(10)))).unwrap();
    let next = || {
        let mut bytes = [0; 200];
        let n = manager.recv(&mut bytes).expect("a message in time");
        String::from_utf8(bytes[..n].to_vec()).unwrap()
    };
    let socket = format!("NOTIFY_SOCKET={}", path.display());
    let mut bench = Bench::under(engine, &["env", &socket, "WATCHDOG_USEC=300000"]);
    assert_eq!(next(), format!("READY=1\nMAINPID={}", bench.proxy.service()));
    bench.replace();
    bench.upgrade();
    bench.wait_renewed("tidegate");
    manager.set_nonblocking(true).unwrap();
    let mut bytes = [0; 200];
    while let Ok(n) = manager.recv(&mut bytes) {
        assert_eq!(&bytes[..n], b"WATCHDOG=1");
    }
    manager.set_nonblocking(false).unwrap();
    for _ in 0..3 {
        assert_eq!(next(), "WATCHDOG=1");
    }
    bench.nothing_is_left();
    bench.proxy.rebaseline();
    bench.proxy.sigterm();
    let said = (0..20).map(|_| next()).find(|said| said != "WATCHDOG=1");
    assert_eq!(said.as_deref(), Some("STOPPING=1"));
    assert_eq!(bench.proxy.wait_exit(secs(5)), Some(0));
}
