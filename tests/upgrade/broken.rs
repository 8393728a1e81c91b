//! Failed upgrades: the old process continues without interruption and reports the reason.

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
    program_that_exits_changes_nothing,
    program_that_hangs_is_killed_at_the_timeout,
    program_with_an_invalid_handover_is_killed,
    program_that_exits_in_the_last_step_changes_nothing,
    rejected_configuration_is_reported_with_its_problems,
    missing_program_is_reported,
    draining_process_is_not_upgraded,
    second_concurrent_upgrade_is_rejected,
    shutdown_ends_an_upgrade_in_progress,
    only_root_and_the_supervisor_user_can_name_a_program,
);

struct Setup {
    _backend: ScriptedBackend,
    proxy: TestProxy,
    session: TcpStream,
    programs: tempfile::TempDir,
}

impl Setup {
    fn new(engine: Engine) -> Setup {
        let backend = ScriptedBackend::start(backend::echo());
        let conf = Conf::simple(engine, Pool::new("web").backend("a", backend.address()))
            .process("upgrade_timeout = \"2s\"\ndrain_timeout = \"20s\"");
        let proxy = TestProxy::start(conf);
        let session = connect(proxy.addr("web"));
        client::exchange(&session, b"hello").unwrap();
        let programs = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        Setup { _backend: backend, proxy, session, programs }
    }

    /// Writes a program with these lines next to the running program, because the sandbox allows
    /// Tidegate to execute files only there.
    fn program(&self, lines: &str) -> PathBuf {
        let path = self.programs.path().join("program");
        // Another process writes it, because a file that is open for writing cannot be executed.
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

    /// Requests an upgrade to this program and checks that it fails with `reason`.
    #[track_caller]
    fn assert_upgrade_fails(&self, lines: &str, reason: &str) {
        let path = self.program(lines);
        let answer = self.proxy.try_upgrade(&format!("?binary={}", path.display()));
        assert_eq!(answer.status, 422, "{}", answer.body);
        let said = answer.json()["detail"].as_str().unwrap().to_owned();
        assert!(said.contains(reason), "{said:?} does not contain {reason:?}");
        self.assert_unaffected("failed", 1.0);
    }

    #[track_caller]
    fn assert_unaffected(&self, result: &str, count: f64) {
        client::exchange(&self.session, b"still here").unwrap();
        client::exchange(&connect(self.proxy.addr("web")), b"another session").unwrap();
        assert_eq!(self.proxy.admin_request("GET", "/ready").status, 200);
        assert_eq!(self.proxy.status()["state"], "serving");
        let metric = self.proxy.metric("tidegate_upgrades_total", &[("result", result)]);
        assert_eq!(metric, count, "{result}");
        assert!(self.proxy.log().contains("upgrade"), "{}", self.proxy.log());
        eventually(secs(5), "no other process is left", || self.proxy.others().is_empty());
    }

    /// Checks that an upgrade to the real program still works.
    fn assert_can_be_upgraded(mut self) {
        self.proxy.upgrade();
        client::exchange(&self.session, b"in the old process").unwrap();
        client::exchange(&connect(self.proxy.addr("web")), b"in the new process").unwrap();
        drop(self.session);
        self.proxy.rebaseline();
    }
}

fn program_that_exits_changes_nothing(engine: Engine) {
    let setup = Setup::new(engine);
    setup.assert_upgrade_fails(
        "#!/bin/sh\necho 'no such luck' >&2\nexit 7\n",
        "exit status: 7; its last log lines:\nno such",
    );
    setup.assert_can_be_upgraded();
}

fn program_that_hangs_is_killed_at_the_timeout(engine: Engine) {
    let setup = Setup::new(engine);
    let start = Instant::now();
    setup.assert_upgrade_fails(
        "#!/bin/sh\necho 'a minute, please' >&2\nexec sleep 60\n",
        "not ready within upgrade_timeout",
    );
    let took = start.elapsed();
    assert!(took > ms(1900) && took < patience(secs(5)), "{took:?}");
    setup.assert_can_be_upgraded();
}

fn program_with_an_invalid_handover_is_killed(engine: Engine) {
    let setup = Setup::new(engine);
    let talk = "#!/bin/sh\necho 'What is this, an upgrade protocol?' >&0\nexec sleep 60\n";
    setup.assert_upgrade_fails(talk, "not a handover frame");
    setup.assert_can_be_upgraded();
}

/// This program takes the sockets, reports that it is ready, and exits instead of serving.
fn program_that_exits_in_the_last_step_changes_nothing(engine: Engine) {
    let setup = Setup::new(engine);
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
    setup.assert_upgrade_fails(python, "changed my mind");
    setup.assert_can_be_upgraded();
}

fn rejected_configuration_is_reported_with_its_problems(engine: Engine) {
    let setup = Setup::new(engine);
    let path = setup.proxy.dir().join("bad.toml");
    std::fs::write(&path, "[frontend.web]\nbind = [\"127.0.0.1:1\"]\npool = \"nowhere\"\n")
        .unwrap();
    let path = path.display().to_string();
    let output = setup.proxy.cli(&["upgrade", "--config", &path]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("bad.toml:3:8: error:"), "{said}");
    setup.assert_unaffected("failed", 1.0);
    setup.assert_can_be_upgraded();
}

fn missing_program_is_reported(engine: Engine) {
    let setup = Setup::new(engine);
    let config = setup.proxy.config_path().display().to_string();
    for binary in ["/no/such/program", &config, "/"] {
        let output = setup.proxy.cli(&["upgrade", "--binary", binary]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(String::from_utf8(output.stderr).unwrap().contains(binary));
    }
    setup.assert_unaffected("refused", 3.0);
    setup.assert_can_be_upgraded();
}

fn draining_process_is_not_upgraded(engine: Engine) {
    let mut setup = Setup::new(engine);
    setup.proxy.sigterm();
    eventually(secs(2), "the process drains", || {
        setup.proxy.admin_request("GET", "/ready").status == 503
    });
    let answer = setup.proxy.try_upgrade("");
    assert_eq!(answer.status, 409, "{}", answer.body);
    assert!(answer.body.contains("draining"), "{}", answer.body);
    drop(setup.session);
    assert_eq!(setup.proxy.wait_exit(secs(3)), Some(0));
}

fn second_concurrent_upgrade_is_rejected(engine: Engine) {
    let setup = Setup::new(engine);
    let slow = setup.program("#!/bin/sh\nexec sleep 60\n");
    std::thread::scope(|scope| {
        let first = scope.spawn(|| setup.proxy.try_upgrade(&format!("?binary={}", slow.display())));
        eventually(secs(2), "the first upgrade runs", || !setup.proxy.others().is_empty());
        let second = setup.proxy.try_upgrade("");
        assert_eq!(second.status, 409, "{}", second.body);
        assert!(second.body.contains("already in progress"), "{}", second.body);
        let reload = setup.proxy.admin_request("POST", "/v1/reload");
        assert_eq!(reload.status, 422, "{}", reload.body);
        assert_eq!(first.join().unwrap().status, 422);
    });
    setup.assert_unaffected("refused", 1.0);
    setup.assert_can_be_upgraded();
}

fn shutdown_ends_an_upgrade_in_progress(engine: Engine) {
    let mut setup = Setup::new(engine);
    let slow = setup.program("#!/bin/sh\nexec sleep 60\n");
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| setup.proxy.try_upgrade(&format!("?binary={}", slow.display())));
        eventually(secs(2), "the upgrade runs", || !setup.proxy.others().is_empty());
        let child = setup.proxy.others()[0];
        setup.proxy.sigterm();
        setup.proxy.wait_gone(child, secs(2));
        let answer = asked.join().unwrap();
        assert_eq!(answer.status, 422, "{}", answer.body);
        assert!(answer.body.contains("a shutdown was requested"), "{}", answer.body);
    });
    drop(setup.session);
    assert_eq!(setup.proxy.wait_exit(secs(3)), Some(0));
}

/// Other users can be allowed to use the admin socket, but not to name a program.
fn only_root_and_the_supervisor_user_can_name_a_program(engine: Engine) {
    use std::process::{Command, Stdio};
    if !rustix::process::geteuid().is_root() || !have(&["setpriv", "curl"]) {
        return crate::common::skip("only root can become another user");
    }
    let setup = Setup::new(engine);
    let socket = setup.proxy.dir().join("admin.sock");
    for (path, mode) in [(setup.proxy.dir(), 0o755), (&*socket, 0o666)] {
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
    setup.assert_unaffected("refused", 2.0);
    // Any user of the socket can upgrade to the usual program.
    assert!(ask("").contains(" 200 "));
    drop(setup.session);
}
