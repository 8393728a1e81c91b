//! The supervisor executes the program of an upgrade in its own process. Its pid, the sockets,
//! the child processes and pending signals stay. A program that cannot take over changes
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
    upgrade_to_another_file_replaces_the_supervisor,
    upgrade_to_the_same_file_keeps_the_supervisor,
    supervisor_as_process_1_is_replaced,
    signals_sent_during_the_execution_are_handled,
    processes_that_exit_during_the_execution_are_reaped_and_restarted,
    shutdown_at_any_moment_of_the_execution_exits_with_0,
    constant_reloads_do_not_prevent_the_execution,
    program_that_fails_the_trial_changes_nothing,
    program_that_cannot_be_executed_changes_nothing,
    trial_is_repeated_after_a_change_of_state,
    service_manager_gets_no_message_about_the_execution,
);

/// A Tidegate process started from its own copy of the program, which can be replaced.
struct Setup {
    _backend: ScriptedBackend,
    proxy: TestProxy,
    programs: tempfile::TempDir,
}

/// The last line of a script: executes the real program.
const EXECUTE_REAL: &str = "exec 'REAL' \"$@\"";

impl Setup {
    fn new(engine: Engine) -> Setup {
        Setup::under(engine, &[])
    }

    fn under(engine: Engine, wrapper: &[&str]) -> Setup {
        let backend = ScriptedBackend::start(backend::echo());
        let conf = Conf::simple(engine, Pool::new("web").backend("a", backend.address()));
        let conf = conf.process("drain_timeout = \"20s\"");
        // Next to the program, because the sandbox allows Tidegate to execute files only there.
        let programs = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = programs.path().join("tidegate");
        copy(&path);
        let script = format!("shift; exec '{}' \"$@\"", path.display());
        let wrapper = [wrapper, &["sh", "-c", &script, "sh"]].concat();
        let proxy = TestProxy::start_under(conf, &wrapper);
        Setup { _backend: backend, proxy, programs }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.programs.path().join(name)
    }

    /// Replaces the program file by another copy.
    fn replace(&self) {
        copy(&self.path("new"));
        std::fs::rename(self.path("new"), self.path("tidegate")).unwrap();
    }

    /// Replaces the program file by a script. `REAL` is a copy of the program and `HERE` this
    /// directory.
    fn replace_by(&self, script: &str) {
        if !self.path("real").exists() {
            copy(&self.path("real"));
        }
        let real = self.path("real");
        let text = script.replace("REAL", real.to_str().unwrap());
        let text = text.replace("HERE", self.programs.path().to_str().unwrap());
        // Another process writes it, because a file that is open for writing cannot be executed.
        std::fs::write(self.path("text"), text).unwrap();
        let (from, to) = (self.path("text"), self.path("new"));
        let script = format!("cp '{0}' '{1}' && chmod 755 '{1}'", from.display(), to.display());
        assert!(Command::new("sh").args(["-c", &script]).status().unwrap().success());
        std::fs::rename(self.path("new"), self.path("tidegate")).unwrap();
    }

    /// Replaces the program file by a script that runs `trial` (sh(1)) in the trial.
    fn replace_by_trial(&self, trial: &str) {
        let case = format!("case \"$*\" in *--supervisor-check*) {trial};; esac");
        self.replace_by(&format!("#!/bin/sh\n{case}\n{EXECUTE_REAL}\n"));
    }

    /// Upgrades to the current program file. Returns the old process.
    fn upgrade(&mut self) -> u32 {
        self.proxy.upgrade()
    }

    /// The inode of the file that the supervisor runs.
    fn runs(&self) -> u64 {
        inode(&PathBuf::from(format!("/proc/{}/exe", self.proxy.service())))
    }

    /// Waits until the supervisor runs the file `name`.
    #[track_caller]
    fn wait_replaced_by(&self, name: &str) {
        let wanted = inode(&self.path(name));
        eventually(secs(10), "the supervisor runs the new binary", || self.runs() == wanted);
        eventually(secs(5), "the new binary is logged", || {
            self.proxy.log().contains("the supervisor runs the new binary")
        });
    }

    /// The supervisor's descriptors without O_CLOEXEC (fcntl(2)), which an executed program
    /// inherits.
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

    /// Kills the serving process and waits for the next process.
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

    /// Checks that the serving process is the only child, without zombies.
    #[track_caller]
    fn assert_single_child(&self) {
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

/// The names of a process in process lists.
fn names(pid: u32) -> [String; 2] {
    ["cmdline", "comm"].map(|name| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap())
}

/// Connects until `stop` is set. Every client must be served. Returns their number.
fn all_served(address: SocketAddr, stop: &AtomicBool) -> u64 {
    let mut served = 0;
    while !stop.load(Ordering::Relaxed) {
        let stream = try_connect(address).expect("a connection");
        assert_eq!(client::exchange(&stream, b"hello").expect("served"), b"hello");
        served += 1;
    }
    served
}

fn upgrade_to_another_file_replaces_the_supervisor(engine: Engine) {
    let mut setup = Setup::new(engine);
    let pid_before = setup.proxy.service();
    let names = names(pid_before);
    let pid_file = setup.proxy.dir().join("pid");
    let session = connect(setup.proxy.addr("web"));
    client::exchange(&session, b"hello").unwrap();
    let (address, stop) = (setup.proxy.addr("web"), AtomicBool::new(false));
    let mut olds = Vec::new();
    let served = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..2).map(|_| scope.spawn(|| all_served(address, &stop))).collect();
        for _ in 0..2 {
            let before = setup.runs();
            setup.replace();
            olds.push(setup.upgrade());
            setup.wait_replaced_by("tidegate");
            assert_ne!(setup.runs(), before);
            client::exchange(&session, b"still here").unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        clients.into_iter().map(|thread| thread.join().expect("no client refused")).sum::<u64>()
    });
    assert!(served > 0);
    assert_eq!(self::names(pid_before), names);
    assert_eq!(std::fs::read_to_string(&pid_file).unwrap(), format!("{pid_before}\n"));
    drop(session);
    for old in olds {
        setup.proxy.wait_gone(old, secs(10));
    }
    setup.assert_single_child();
    setup.crash();
    setup.assert_single_child();
    let reloads = setup.proxy.metric("tidegate_reloads_total", &[]);
    setup.proxy.sighup();
    eventually(secs(5), "the process reloads", || {
        setup.proxy.metric("tidegate_reloads_total", &[]) > reloads
    });
    let old = setup.upgrade();
    setup.proxy.wait_gone(old, secs(10));
    setup.serves();
    assert_eq!(setup.proxy.service(), pid_before);
    setup.proxy.rebaseline();
    setup.proxy.check_for_leaks();
    assert!(!pid_file.exists(), "the pid file is removed");
}

fn upgrade_to_the_same_file_keeps_the_supervisor(engine: Engine) {
    let mut setup = Setup::new(engine);
    let old = setup.upgrade();
    setup.proxy.wait_gone(old, secs(10));
    std::thread::sleep(ms(500));
    assert!(!setup.proxy.log().contains("tidegate_supervisor"), "{}", setup.proxy.log());
    setup.proxy.rebaseline();
}

fn supervisor_as_process_1_is_replaced(engine: Engine) {
    if !have(&["unshare"]) {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        return crate::common::skip("only root can create a pid namespace");
    }
    let mut setup = Setup::under(engine, &["unshare", "--pid", "--fork", "--mount-proc"]);
    for _ in 0..2 {
        setup.replace();
        let answer = setup.proxy.try_upgrade("");
        assert_eq!(answer.status, 200, "{}", answer.body);
        // Its pid in the namespace of the test.
        let mut new = setup.proxy.others();
        new.retain(|pid| !setup.proxy.pids_before().contains(pid));
        assert_eq!(new.len(), 1, "{new:?}");
        setup.proxy.serve_by(new[0]);
        setup.wait_replaced_by("tidegate");
        setup.assert_single_child();
    }
    setup.crash();
    setup.assert_single_child();
    setup.serves();
    setup.proxy.rebaseline();
}

/// If the supervisor executes this program, it creates a file, and runs the real program once
/// the test creates another one, after 10 s at the latest.
const SLOW_TO_BEGIN: &str = "#!/usr/bin/env python3
import os, sys, time
if 'TIDEGATE_SUPERVISOR_STATE' in os.environ:
    open('HERE/begun', 'w').close()
    end = time.monotonic() + 10
    while not os.path.exists('HERE/go') and time.monotonic() < end:
        time.sleep(0.01)
os.execv('REAL', sys.argv)
";

impl Setup {
    /// Waits until the supervisor has executed [`SLOW_TO_BEGIN`].
    #[track_caller]
    fn wait_between(&self) {
        let begun = self.path("begun");
        eventually(secs(10), "the supervisor has executed the program", || begun.exists());
        std::fs::remove_file(begun).unwrap();
    }

    /// Lets [`SLOW_TO_BEGIN`] run the real program.
    fn go(&self) {
        std::fs::write(self.path("go"), "").unwrap();
    }
}

fn signals_sent_during_the_execution_are_handled(engine: Engine) {
    if !have(&["python3"]) {
        return;
    }
    let mut setup = Setup::new(engine);
    setup.replace_by(SLOW_TO_BEGIN);
    setup.upgrade();
    setup.wait_between();
    let reloads = || setup.proxy.metric("tidegate_reloads_total", &[]);
    let before = reloads();
    setup.proxy.sighup();
    setup.serves();
    assert_eq!(reloads(), before, "no reload during the execution");
    setup.go();
    setup.wait_replaced_by("real");
    eventually(secs(5), "the process reloads", || reloads() > before);
    // The next upgrade is stopped at the same moment.
    std::fs::remove_file(setup.path("go")).unwrap();
    setup.upgrade();
    setup.wait_between();
    for number in 0..50 {
        setup.proxy.sigterm();
        std::thread::sleep(ms(2));
        if number == 25 {
            setup.go();
        }
    }
    assert_eq!(setup.proxy.wait_exit(secs(10)), Some(0), "{}", setup.proxy.log());
}

fn processes_that_exit_during_the_execution_are_reaped_and_restarted(engine: Engine) {
    if !have(&["python3"]) {
        return;
    }
    let mut setup = Setup::new(engine);
    let session = connect(setup.proxy.addr("web"));
    client::exchange(&session, b"hello").unwrap();
    setup.replace_by(SLOW_TO_BEGIN);
    let old = setup.upgrade();
    setup.wait_between();
    // Both processes end: the draining process normally, the serving process by a crash.
    drop(session);
    let before = setup.proxy.pid();
    proc::signal(before, Signal::KILL);
    // The client waits in the listen queue.
    let waits = connect(setup.proxy.addr("web"));
    eventually(secs(5), "both processes have ended", || {
        proc::is_dead(old) && proc::is_dead(before)
    });
    setup.go();
    assert_eq!(client::exchange(&waits, b"hello").expect("served"), b"hello");
    setup.wait_replaced(before);
    drop(waits);
    setup.assert_single_child();
    setup.proxy.rebaseline();
}

fn shutdown_at_any_moment_of_the_execution_exits_with_0(engine: Engine) {
    for _ in 0..if long() { 100 } else { 3 } {
        let mut setup = Setup::new(engine);
        setup.replace();
        setup.upgrade();
        // The trial begins about 1 s after the upgrade.
        std::thread::sleep(ms(fastrand::u64(950..1250)));
        for _ in 0..5 {
            setup.proxy.sigterm();
            std::thread::sleep(ms(fastrand::u64(0..15)));
        }
        assert_eq!(setup.proxy.wait_exit(secs(10)), Some(0), "{}", setup.proxy.log());
    }
}

fn constant_reloads_do_not_prevent_the_execution(engine: Engine) {
    let mut setup = Setup::new(engine);
    let (service, stop) = (setup.proxy.service(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                proc::signal(service, Signal::HUP);
                std::thread::sleep(ms(3));
            }
        });
        let renewed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..2 {
                setup.replace();
                setup.upgrade();
                setup.wait_replaced_by("tidegate");
                setup.serves();
            }
        }));
        stop.store(true, Ordering::Relaxed);
        renewed.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    setup.assert_single_child();
    eventually(secs(5), "the process is ready", || {
        setup.proxy.admin_request("GET", "/ready").status == 200
    });
    setup.proxy.rebaseline();
}

fn program_that_fails_the_trial_changes_nothing(engine: Engine) {
    let mut setup = Setup::new(engine);
    let own = setup.runs();
    let trials = [
        // A program that does not know the option.
        ("exit 2", "exit code 2"),
        ("kill -9 $$", "killed by signal 9"),
        ("sleep 60 & echo $! >'HERE/pid'; wait; exit 0", "no answer within 2s"),
        ("exit 0", "not the digest of the state"),
        ("echo supervisor state 1 0123456789abcdef; exit 0", "not the digest of the state"),
        ("yes; exit 0", "no answer within 2s"),
    ];
    for (trial, reason) in trials {
        let said = setup.proxy.log().matches("the supervisor keeps running the old binary").count();
        setup.replace_by_trial(trial);
        setup.upgrade();
        eventually(secs(15), "the rejected trial is logged", || {
            let log = setup.proxy.log();
            log.matches("the supervisor keeps running the old binary").count() > said
        });
        let log = setup.proxy.log();
        let line = log.lines().rfind(|line| line.contains("the supervisor keeps running")).unwrap();
        assert!(line.contains(reason) && line.contains("WARN"), "{trial}: {line}");
        assert_eq!(setup.runs(), own);
        setup.serves();
        setup.assert_single_child();
    }
    let pid = std::fs::read_to_string(setup.path("pid")).unwrap().trim().parse().unwrap();
    assert!(proc::is_dead(pid), "a child of the trial still runs");
    setup.crash();
    // A program that passes the trial is executed afterwards.
    setup.replace();
    setup.upgrade();
    setup.wait_replaced_by("tidegate");
    setup.assert_single_child();
    setup.proxy.rebaseline();
}

fn program_that_cannot_be_executed_changes_nothing(engine: Engine) {
    let mut setup = Setup::new(engine);
    let (own, before) = (setup.runs(), setup.passed_on());
    setup.replace_by_trial("chmod 0 \"$0\"; exec 'REAL' \"$@\"");
    setup.upgrade();
    eventually(secs(10), "the failure is logged", || {
        setup.proxy.log().contains("Permission denied")
    });
    assert_eq!(setup.runs(), own);
    assert_eq!(setup.passed_on(), before);
    setup.serves();
    setup.replace();
    setup.crash();
    setup.proxy.rebaseline();
}

fn trial_is_repeated_after_a_change_of_state(engine: Engine) {
    let mut setup = Setup::new(engine);
    // The trial answers immediately and exits later.
    setup.replace_by_trial("'REAL' \"$@\"; echo >>'HERE/trials'; sleep 0.7; exit 0");
    setup.upgrade();
    let trials = setup.path("trials");
    eventually(secs(10), "a trial has read the state", || trials.exists());
    // The supervisor must hold one more socket.
    let more = setup.proxy.conf().frontend("more", "web", "");
    setup.proxy.reload(more);
    setup.wait_replaced_by("real");
    assert_eq!(std::fs::read_to_string(&trials).unwrap().lines().count(), 2);
    setup.crash();
    echoes(setup.proxy.addr("more"));
    setup.proxy.rebaseline();
}

fn service_manager_gets_no_message_about_the_execution(engine: Engine) {
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
    let mut setup = Setup::under(engine, &["env", &socket, "WATCHDOG_USEC=300000"]);
    assert_eq!(next(), format!("READY=1\nMAINPID={}", setup.proxy.service()));
    setup.replace();
    setup.upgrade();
    setup.wait_replaced_by("tidegate");
    manager.set_nonblocking(true).unwrap();
    let mut bytes = [0; 200];
    while let Ok(n) = manager.recv(&mut bytes) {
        assert_eq!(&bytes[..n], b"WATCHDOG=1");
    }
    manager.set_nonblocking(false).unwrap();
    for _ in 0..3 {
        assert_eq!(next(), "WATCHDOG=1");
    }
    setup.assert_single_child();
    setup.proxy.rebaseline();
    setup.proxy.sigterm();
    let said = (0..20).map(|_| next()).find(|said| said != "WATCHDOG=1");
    assert_eq!(said.as_deref(), Some("STOPPING=1"));
    assert_eq!(setup.proxy.wait_exit(secs(5)), Some(0));
}
