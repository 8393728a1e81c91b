//! Shortages of descriptors, memory, ports, log readers and inotify instances.
//!
//! Each fault is real or injected by strace(1). Sessions continue, the fault is reported and
//! counted, no backend failure is counted, no thread loops, and service is normal within 1 s
//! of the end of the fault.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::servers::Running;
use crate::common::{
    Engine, client, eventually, have, measured, ms, on_every_engine, proc, secs, skip,
};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

on_every_engine!(
    every_resource_error_is_a_temporary_local_error,
    reload_is_retried_after_exhausted_descriptors,
    unread_log_blocks_nothing_and_reports_dropped_lines,
    log_on_a_full_disk_blocks_nothing_and_is_counted,
    pid_file_is_written_after_a_failure,
    file_is_polled_without_inotify_instances,
);

/// How long a fault lasts: several retry intervals and probes.
const FAULT: Duration = ms(600);

const PROBE: &str = "kind = \"tcp\"\ninterval = \"100ms\"\ntimeout = \"100ms\"\n\
                     fast_interval = \"100ms\"\nrise = 1\nfall = 2";

/// A system call that fails for a while, and its visible effects.
struct Fault {
    call: &'static str,
    errno: &'static str,
    /// Labels of the counter of the fault.
    reason: &'static str,
    at: &'static str,
    /// The effect on clients that connect during the fault.
    clients: Clients,
    /// True if open sessions relay bytes during the fault.
    flows: bool,
}

#[derive(PartialEq)]
enum Clients {
    /// They wait in the listen queue and are served after the fault.
    Wait,
    /// They are reset or wait in the listen queue.
    Refused,
    /// They are served as usual.
    Served,
}

const fn fault(
    call: &'static str,
    errno: &'static str,
    (reason, at): (&'static str, &'static str),
    clients: Clients,
    flows: bool,
) -> Fault {
    Fault { call, errno, reason, at, clients, flows }
}

/// Faults on both engines.
const FAULTS: [Fault; 9] = [
    fault("accept4", "ENFILE", ("descriptors", "accept"), Clients::Wait, true),
    fault("accept4", "ENOBUFS", ("memory", "accept"), Clients::Wait, true),
    fault("socket", "EMFILE", ("descriptors", "connect"), Clients::Refused, true),
    fault("socket", "ENOMEM", ("memory", "probe"), Clients::Refused, true),
    fault("setsockopt", "ENOBUFS", ("memory", "connect"), Clients::Refused, true),
    fault("connect", "ENOMEM", ("memory", "connect"), Clients::Refused, true),
    fault("connect", "EADDRNOTAVAIL", ("ports", "connect"), Clients::Refused, true),
    fault("pipe2", "EMFILE", ("descriptors", "relay"), Clients::Served, true),
    fault("splice", "ENOMEM", ("", ""), Clients::Served, true),
];

/// Faults of system calls that only the epoll engine makes.
const FAULTS_OF_EPOLL: [Fault; 3] = [
    fault("epoll_ctl", "ENOSPC", ("memory", "connect"), Clients::Refused, true),
    fault("sendto", "ENOMEM", ("memory", "relay"), Clients::Refused, false),
    fault("recvfrom", "ENOBUFS", ("memory", "relay"), Clients::Refused, false),
];

/// Makes a system call of a process fail until it is stopped.
struct Injected(Running);

impl Injected {
    /// Returns `None` if this machine does not allow tracing.
    fn start(pid: u32, call: &str, errno: &str) -> Option<Injected> {
        let inject = format!("inject={call}:error={errno}");
        let running = Running::start(
            Command::new("strace")
                .args(["-f", "-qq", "-o", "/dev/null", "-e"])
                .args([&format!("trace={call}"), "-e", &inject, "-p", &pid.to_string()])
                .stderr(Stdio::null()),
        );
        let deadline = Instant::now() + secs(10);
        while !is_traced(pid) {
            if Instant::now() > deadline {
                skip("strace cannot attach here");
                return None;
            }
            std::thread::sleep(ms(5));
        }
        Some(Injected(running))
    }

    /// Detaches strace with SIGTERM. A killed tracer would leave threads stopped for a moment.
    fn stop(self) {
        proc::signal(self.0.pid(), rustix::process::Signal::TERM);
        let pid = self.0.pid();
        eventually(secs(10), "strace has ended", || proc::is_dead(pid));
    }
}

/// Returns true if every thread of the process is traced.
fn is_traced(pid: u32) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("the process is running");
    tasks.flatten().all(|task| {
        let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
        status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
    })
}

/// A Tidegate process with one backend and two open sessions.
struct Scene {
    // Dropped first, because the leak check of `proxy` allows no open session.
    session: TcpStream,
    /// A session that never has enough bytes for a pipe.
    quiet: TcpStream,
    proxy: TestProxy,
    backend: ScriptedBackend,
    /// Pipes inherited from the parent process.
    pipes: usize,
}

fn pipes_of(proxy: &TestProxy) -> usize {
    proc::fds(proxy.pid()).iter().filter(|fd| fd.starts_with("pipe:")).count()
}

impl Scene {
    fn new(engine: Engine) -> Scene {
        let backend = ScriptedBackend::start(backend::echo());
        let pool = Pool::new("web").probe(PROBE).backend("a", backend.address());
        let proxy = TestProxy::start(Conf::simple(engine, pool));
        proxy.wait_backend("web", "a", "observation", "up");
        let session = client::connect(proxy.addr("web"));
        let quiet = client::connect(proxy.addr("web"));
        assert_eq!(client::exchange(&quiet, b"hush").unwrap(), b"hush");
        let pipes = pipes_of(&proxy);
        let scene = Scene { session, quiet, proxy, backend, pipes };
        scene.bulk();
        scene
    }

    /// Relays 4 MB through the open session, which needs a pipe.
    fn bulk(&self) {
        let bytes: Vec<u8> = (0..4_000_000u32).map(|n| (n % 251) as u8).collect();
        let echoed = std::thread::scope(|scope| {
            scope.spawn(|| (&self.session).write_all(&bytes).unwrap());
            let mut echoed = vec![0; bytes.len()];
            (&self.session).read_exact(&mut echoed).unwrap();
            echoed
        });
        assert!(echoed == bytes, "the echo differs");
    }

    fn has_no_pipe(&self) -> bool {
        pipes_of(&self.proxy) == self.pipes
    }

    fn check_during(&self, fault: &Fault) -> Option<TcpStream> {
        let begun = Instant::now();
        let cpu = self.proxy.cpu_time();
        let client = client::try_connect(self.proxy.addr("web")).ok();
        if fault.flows {
            self.bulk();
        } else {
            (&self.quiet).write_all(b"late").unwrap();
        }
        if fault.clients == Clients::Served {
            let answer = client::exchange(client.as_ref().expect("connected"), b"hello");
            assert_eq!(answer.unwrap(), b"hello");
        }
        let busy = self.proxy.cpu_time() - cpu;
        std::thread::sleep(FAULT.saturating_sub(begun.elapsed()));
        let (before, idle) = (self.proxy.cpu_time(), Instant::now());
        std::thread::sleep(FAULT / 2);
        let spent = self.proxy.cpu_time() - before;
        assert!(spent < FAULT / 4, "busy loop: {spent:?} in {:?} ({busy:?})", idle.elapsed());
        client
    }

    fn check_after(&self, fault: &Fault, waiting: Option<TcpStream>) {
        let over = Instant::now();
        if fault.clients == Clients::Wait {
            let waiting = waiting.expect("in the queue");
            assert_eq!(client::exchange(&waiting, b"patience").unwrap(), b"patience");
        }
        // 1 s on an idle machine.
        eventually(secs(3), "new clients are served", || {
            let Ok(client) = client::try_connect(self.proxy.addr("web")) else { return false };
            client.set_read_timeout(Some(ms(500))).unwrap();
            client::exchange(&client, b"new").is_ok_and(|answer| answer == b"new")
        });
        let took = over.elapsed();
        measured(&format!("{}: {}: normal after {took:?}", fault.call, fault.errno));
        if !fault.flows {
            let mut late = [0; 4];
            (&self.quiet).read_exact(&mut late).unwrap();
            assert_eq!(&late, b"late");
        }
        self.bulk();
        let state = self.proxy.backend("web", "a");
        assert_eq!(state["observation"], "up", "{state:#}");
        for counter in ["connect_failures_total", "ejections_total"] {
            assert_eq!(state[counter], 0, "a backend failure is counted: {state:#}");
        }
    }
}

fn every_resource_error_is_a_temporary_local_error(engine: Engine) {
    if !have(&["strace"]) {
        return;
    }
    let scene = Scene::new(engine);
    let of_epoll = (engine == Engine::Epoll).then_some(FAULTS_OF_EPOLL);
    for fault in FAULTS.iter().chain(of_epoll.as_ref().into_iter().flatten()) {
        let count = || {
            let labels = [("reason", fault.reason), ("at", fault.at)];
            scene.proxy.metric("tidegate_local_errors_total", &labels)
        };
        let before = count();
        if fault.call == "pipe2" {
            eventually(secs(10), "no spare pipe exists", || scene.has_no_pipe());
        }
        let Some(injected) = Injected::start(scene.proxy.pid(), fault.call, fault.errno) else {
            return;
        };
        let waiting = scene.check_during(fault);
        injected.stop();
        scene.check_after(fault, waiting);
        if !fault.reason.is_empty() {
            let (call, errno) = (fault.call, fault.errno);
            assert!(
                count() > before,
                "{call}: {errno} no local error counted\n{}",
                scene.proxy.log()
            );
        }
    }
    // The session of the last client can still be closing.
    eventually(secs(5), "only the two sessions are left", || scene.backend.active() == 2);
}

fn reload_is_retried_after_exhausted_descriptors(engine: Engine) {
    if !have(&["strace"]) {
        return;
    }
    let scene = Scene::new(engine);
    let generation = scene.proxy.generation();
    let mut conf = scene.proxy.conf();
    *conf.pool_mut("web") = conf.pool_mut("web").clone().key("connect_attempts = 2");
    let text = scene.proxy.render(&conf);
    let Some(injected) = Injected::start(scene.proxy.pid(), "openat", "EMFILE") else { return };
    scene.proxy.rewrite_by_rename(&text);
    eventually(secs(5), "the error is logged", || {
        scene.proxy.log().contains("reload postponed because of a local error")
    });
    scene.bulk();
    assert_eq!(scene.proxy.generation(), generation);
    injected.stop();
    eventually(secs(3), "the file is applied", || scene.proxy.generation() > generation);
    let labels = [("reason", "descriptors"), ("at", "reload")];
    assert!(scene.proxy.metric("tidegate_local_errors_total", &labels) >= 1.0);
}

/// A shell that starts Tidegate with its standard error redirected to `path`.
fn with_errors_to(path: &Path) -> [String; 4] {
    let script = format!("exec \"$@\" 2>{}", path.display());
    ["sh".into(), "-c".into(), script, "sh".into()]
}

fn start_under(engine: Engine, backend: &ScriptedBackend, wrapper: &[String]) -> TestProxy {
    let pool = Pool::new("web").backend("a", backend.address());
    let words: Vec<&str> = wrapper.iter().map(String::as_str).collect();
    TestProxy::start_under(Conf::simple(engine, pool), &words)
}

fn unread_log_blocks_nothing_and_reports_dropped_lines(engine: Engine) {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("log");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    // Opened for both directions, so that opening does not wait for a reader.
    let mut flags = std::fs::File::options();
    let mut reader =
        flags.read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&fifo).unwrap();
    let backend = ScriptedBackend::start(backend::echo());
    let proxy = start_under(engine, &backend, &with_errors_to(&fifo));
    let good = std::fs::read_to_string(proxy.config_path()).unwrap();
    let bad: String = (0..90).map(|n| format!("[nonsense{n}]\n")).collect();
    proxy.rewrite_in_place(&(good.clone() + &bad));
    // Each rejection writes one line per problem.
    eventually(secs(30), "lines are dropped", || {
        assert_eq!(proxy.admin_request("POST", "/v1/reload").status, 422);
        proxy.metric("tidegate_log_dropped_total", &[]) > 0.0
    });
    let session = client::connect(proxy.addr("web"));
    assert_eq!(client::exchange(&session, b"well").unwrap(), b"well");
    proxy.rewrite_in_place(&good);
    let mut text = Vec::new();
    eventually(secs(10), "the number of dropped lines is logged", || {
        let _ = reader.read_to_end(&mut text);
        String::from_utf8_lossy(&text).contains("log lines dropped")
    });
}

fn log_on_a_full_disk_blocks_nothing_and_is_counted(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let proxy = start_under(engine, &backend, &with_errors_to(Path::new("/dev/full")));
    let session = client::connect(proxy.addr("web"));
    assert_eq!(client::exchange(&session, b"well").unwrap(), b"well");
    assert!(proxy.metric("tidegate_log_dropped_total", &[]) >= 1.0);
}

fn pid_file_is_written_after_a_failure(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    // Arguments: the program, "run", "--config" and the file. A directory in place of the pid
    // file prevents the rename.
    let script = "mkdir \"$(dirname \"$4\")/pid\"; exec \"$@\"";
    let wrapper = ["sh", "-c", script, "sh"].map(str::to_owned);
    let proxy = start_under(engine, &backend, &wrapper);
    let path = proxy.dir().join("pid");
    eventually(secs(5), "the failure is logged", || proxy.log().contains("PID file; retrying"));
    std::fs::remove_dir(&path).unwrap();
    eventually(secs(4), "the pid is written", || {
        std::fs::read_to_string(&path).is_ok_and(|text| text.trim() == proxy.service().to_string())
    });
}

fn file_is_polled_without_inotify_instances(engine: Engine) {
    const LIMIT: &str = "/proc/sys/user/max_inotify_instances";
    if !have(&["unshare", "nsenter"]) {
        return;
    }
    let mut shell = Command::new("unshare");
    shell.args(["-Ur", "sh", "-c", &format!("echo 0 >{LIMIT}")]);
    let allowed = shell.stderr(Stdio::null()).status();
    if !allowed.is_ok_and(|status| status.success()) {
        return skip("no user namespace with separate limits here");
    }
    let backend = ScriptedBackend::start(backend::echo());
    let script = format!("echo 0 >{LIMIT}; exec \"$@\"");
    let wrapper = ["unshare", "-Ur", "sh", "-c", &script, "sh"].map(str::to_owned);
    let mut proxy = start_under(engine, &backend, &wrapper);
    eventually(secs(5), "the polling is logged", || {
        proxy.log().contains("checking it every second")
    });
    let (generation, mut conf) = (proxy.generation(), proxy.conf());
    *conf.pool_mut("web") = conf.pool_mut("web").clone().key("connect_attempts = 2");
    proxy.rewrite_by_rename(&proxy.render(&conf));
    eventually(secs(5), "the change is applied", || proxy.generation() > generation);
    let pid = proxy.pid().to_string();
    let raised = Command::new("nsenter")
        .args([
            "-U",
            "--preserve-credentials",
            "-t",
            &pid,
            "sh",
            "-c",
            &format!("echo 128 >{LIMIT}"),
        ])
        .status();
    assert!(raised.unwrap().success());
    eventually(secs(5), "the watch is restored", || {
        proxy.log().contains("watching the file again")
    });
    proxy.rebaseline();
}
