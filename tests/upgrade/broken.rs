//! Upgrades that cannot be: the process before goes on, untouched, and says why.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, connect};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, have, ms, on_every_engine, patience, secs};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Instant;

on_every_engine!(
    a_program_that_exits_changes_nothing,
    a_program_that_hangs_is_killed_at_the_deadline,
    a_program_that_talks_nonsense_is_killed,
    a_program_that_dies_at_the_last_step_changes_nothing,
    a_configuration_that_is_refused_is_told_with_its_problems,
    a_missing_program_is_told,
    a_draining_process_is_not_upgraded,
    two_upgrades_at_once_are_one_too_many,
    stopping_ends_an_upgrade_under_way,
    another_program_is_for_root_and_the_supervisors_user_alone,
);

struct Bench {
    _backend: ScriptedBackend,
    proxy: TestProxy,
    session: TcpStream,
    programs: tempfile::TempDir,
}

impl Bench {
    fn new(engine: Engine) -> Bench {
        let backend = ScriptedBackend::start(backend::echo());
        let conf = Conf::simple(engine, Pool::new("web").backend("a", backend.address()))
            .process("upgrade_timeout = \"2s\"\ndrain_timeout = \"20s\"");
        let proxy = TestProxy::start(conf);
        let session = connect(proxy.addr("web"));
        client::exchange(&session, b"hello").unwrap();
        let programs = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        Bench { _backend: backend, proxy, session, programs }
    }

    /// A program made of those lines, beside the one that runs: the balancer may
    /// start nothing from where its configuration lies.
    fn program(&self, lines: &str) -> PathBuf {
        let path = self.programs.path().join("program");
        // Written by another process: one that is being written cannot be run.
        let script = format!("cat > '{0}'; chmod 755 '{0}'", path.display());
        let mut shell = std::process::Command::new("sh")
            .args(["-c", &script])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = shell.stdin.take().unwrap();
        std::io::Write::write_all(&mut stdin, lines.as_bytes()).unwrap();
        drop(stdin);
        assert!(shell.wait().unwrap().success());
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o111, 0o111);
        path
    }

    /// Asks for an upgrade to that program, which must fail for that reason.
    #[track_caller]
    fn fails(&self, lines: &str, reason: &str) {
        let path = self.program(lines);
        let answer = self.proxy.try_upgrade(&format!("?binary={}", path.display()));
        assert_eq!(answer.status, 422, "{}", answer.body);
        let said = answer.json()["detail"].as_str().unwrap().to_owned();
        assert!(said.contains(reason), "{said:?} does not say {reason:?}");
        self.goes_on("failed", 1.0);
    }

    #[track_caller]
    fn goes_on(&self, result: &str, count: f64) {
        client::exchange(&self.session, b"still here").unwrap();
        client::exchange(&connect(self.proxy.addr("web")), b"and for others").unwrap();
        assert_eq!(self.proxy.admin_request("GET", "/ready").status, 200);
        assert_eq!(self.proxy.status()["state"], "serving");
        let metric = self.proxy.metric("tidegate_upgrades_total", &[("result", result)]);
        assert_eq!(metric, count, "{result}");
        assert!(self.proxy.log().contains("upgrade"), "{}", self.proxy.log());
        eventually(secs(5), "no other process is left", || self.proxy.others().is_empty());
    }

    /// An upgrade to the real thing works after all that.
    fn and_can_be_upgraded(mut self) {
        self.proxy.upgrade();
        client::exchange(&self.session, b"in the old process").unwrap();
        client::exchange(&connect(self.proxy.addr("web")), b"in the new one").unwrap();
        drop(self.session);
        self.proxy.rebaseline();
    }
}

fn a_program_that_exits_changes_nothing(engine: Engine) {
    let bench = Bench::new(engine);
    bench.fails(
        "#!/bin/sh\necho 'no such luck' >&2\nexit 7\n",
        "exit status: 7; its last log lines:\nno such",
    );
    bench.and_can_be_upgraded();
}

fn a_program_that_hangs_is_killed_at_the_deadline(engine: Engine) {
    let bench = Bench::new(engine);
    let start = Instant::now();
    bench.fails(
        "#!/bin/sh\necho 'a minute, please' >&2\nexec sleep 60\n",
        "not ready within upgrade_timeout",
    );
    let took = start.elapsed();
    assert!(took > ms(1900) && took < patience(secs(5)), "{took:?}");
    bench.and_can_be_upgraded();
}

fn a_program_that_talks_nonsense_is_killed(engine: Engine) {
    let bench = Bench::new(engine);
    let talk = "#!/bin/sh\necho 'What is this, an upgrade protocol?' >&0\nexec sleep 60\n";
    bench.fails(talk, "not a handover frame");
    bench.and_can_be_upgraded();
}

/// It takes the sockets, says it is ready, and then dies instead of serving.
fn a_program_that_dies_at_the_last_step_changes_nothing(engine: Engine) {
    let bench = Bench::new(engine);
    // The frames of `net::handover`: magic, version, kind, descriptors, length.
    let python = r#"#!/usr/bin/env python3
import json, os, socket, struct
channel = socket.socket(fileno=0)
def send(kind, message):
    body = json.dumps(message).encode()
    channel.sendall(struct.pack("<4sHHII", b"TGUP", 1, kind, 0, len(body)) + body)
def receive():
    head = channel.recv(16, socket.MSG_WAITALL)
    _, _, kind, fds, length = struct.unpack("<4sHHII", head)
    body = channel.recv(length, socket.MSG_WAITALL)
    while fds:
        _, got, _, _ = socket.recv_fds(channel, 1, 64)
        fds -= len(got)
    return kind, json.loads(body)
send(1, {"protocols": [1, 1], "version": "x", "pid": os.getpid(), "level": 1})
assert receive()[0] == 2
send(3, {"not_taken": [], "admin_taken": True, "generation": 1})
assert receive()[0] == 4
raise SystemExit("changed my mind")
"#;
    bench.fails(python, "changed my mind");
    bench.and_can_be_upgraded();
}

fn a_configuration_that_is_refused_is_told_with_its_problems(engine: Engine) {
    let bench = Bench::new(engine);
    let path = bench.proxy.dir().join("bad.toml");
    std::fs::write(&path, "[frontend.web]\nbind = [\"127.0.0.1:1\"]\npool = \"nowhere\"\n")
        .unwrap();
    let path = path.display().to_string();
    let output = bench.proxy.cli(&["upgrade", "--config", &path]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("bad.toml:3:8: error:"), "{said}");
    bench.goes_on("failed", 1.0);
    bench.and_can_be_upgraded();
}

fn a_missing_program_is_told(engine: Engine) {
    let bench = Bench::new(engine);
    let config = bench.proxy.config_path().display().to_string();
    for binary in ["/no/such/program", &config, "/"] {
        let output = bench.proxy.cli(&["upgrade", "--binary", binary]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(String::from_utf8(output.stderr).unwrap().contains(binary));
    }
    bench.goes_on("refused", 3.0);
    bench.and_can_be_upgraded();
}

fn a_draining_process_is_not_upgraded(engine: Engine) {
    let mut bench = Bench::new(engine);
    bench.proxy.sigterm();
    eventually(secs(2), "it drains", || bench.proxy.admin_request("GET", "/ready").status == 503);
    let answer = bench.proxy.try_upgrade("");
    assert_eq!(answer.status, 409, "{}", answer.body);
    assert!(answer.body.contains("draining"), "{}", answer.body);
    drop(bench.session);
    assert_eq!(bench.proxy.wait_exit(secs(3)), Some(0));
}

fn two_upgrades_at_once_are_one_too_many(engine: Engine) {
    let bench = Bench::new(engine);
    let slow = bench.program("#!/bin/sh\nexec sleep 60\n");
    std::thread::scope(|scope| {
        let first = scope.spawn(|| bench.proxy.try_upgrade(&format!("?binary={}", slow.display())));
        eventually(secs(2), "the first is under way", || !bench.proxy.others().is_empty());
        let second = bench.proxy.try_upgrade("");
        assert_eq!(second.status, 409, "{}", second.body);
        assert!(second.body.contains("already in progress"), "{}", second.body);
        let reload = bench.proxy.admin_request("POST", "/v1/reload");
        assert_eq!(reload.status, 422, "{}", reload.body);
        assert_eq!(first.join().unwrap().status, 422);
    });
    bench.goes_on("refused", 1.0);
    bench.and_can_be_upgraded();
}

fn stopping_ends_an_upgrade_under_way(engine: Engine) {
    let mut bench = Bench::new(engine);
    let slow = bench.program("#!/bin/sh\nexec sleep 60\n");
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| bench.proxy.try_upgrade(&format!("?binary={}", slow.display())));
        eventually(secs(2), "it is under way", || !bench.proxy.others().is_empty());
        let child = bench.proxy.others()[0];
        bench.proxy.sigterm();
        bench.proxy.wait_gone(child, secs(2));
        let answer = asked.join().unwrap();
        assert_eq!(answer.status, 422, "{}", answer.body);
        assert!(answer.body.contains("a shutdown was requested"), "{}", answer.body);
    });
    drop(bench.session);
    assert_eq!(bench.proxy.wait_exit(secs(3)), Some(0));
}

/// The admin socket may be open to others; to name a program they are not let.
fn another_program_is_for_root_and_the_supervisors_user_alone(engine: Engine) {
    use std::process::{Command, Stdio};
    if !rustix::process::geteuid().is_root() || !have(&["setpriv", "curl"]) {
        return crate::common::skip("only root can become another user");
    }
    let bench = Bench::new(engine);
    let socket = bench.proxy.dir().join("admin.sock");
    for (path, mode) in [(bench.proxy.dir(), 0o755), (&*socket, 0o666)] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let ask = |query: &str| {
        let output = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .args(["curl", "-s", "-X", "POST", "-w", " %{http_code} ", "--unix-socket"])
            .arg(&socket)
            .arg(format!("http://localhost/v1/upgrade{query}"))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    for query in ["?binary=/bin/true", "?config=/etc/other.toml"] {
        let said = ask(query);
        assert!(
            said.contains(" 409 ") && said.contains("the request is from user 65534"),
            "{said}"
        );
    }
    bench.goes_on("refused", 2.0);
    // The usual program is started for whoever may use the socket.
    assert!(ask("").contains(" 200 "));
    drop(bench.session);
}
