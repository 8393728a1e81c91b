//! The command line: exit codes, help with examples, and what goes to which stream.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client;
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::{PROGRAM, TestProxy};
use crate::common::{Engine, exclusive, on_every_engine};
use std::process::{Command, Output};

on_every_engine!(
    status_prints_text_and_json,
    address_in_use_exits_with_3,
    live_admin_socket_exits_with_3_and_stale_socket_is_replaced,
    admin_socket_is_private,
);

fn tidegate(arguments: &[&str]) -> Output {
    Command::new(PROGRAM).args(arguments).output().expect("run the program")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn help_of_every_command_has_an_example() {
    let _share = exclusive::shared();
    for command in ["run", "check", "demo", "reload", "status", "drain", "undrain", "shutdown"] {
        let output = tidegate(&[command, "--help"]);
        assert_eq!(output.status.code(), Some(0), "{command}: {output:?}");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains(&format!("tidegate {command}")), "{command}: {text}");
        assert!(text.to_lowercase().contains("example"), "{command}: {text}");
    }
    assert_eq!(tidegate(&["--help"]).status.code(), Some(0));
    assert_eq!(tidegate(&["--version"]).status.code(), Some(0));
}

#[test]
fn usage_errors_exit_with_2() {
    let _share = exclusive::shared();
    for arguments in [&["run"][..], &["nonsense"], &["drain"], &["check", "--nonsense"], &[]] {
        let output = tidegate(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
    }
}

#[test]
fn check_prints_one_line_for_a_valid_file() {
    let _share = exclusive::shared();
    let conf = Conf::simple(Engine::Epoll, Pool::new("web").backend("a", "127.0.0.1:9"));
    let file = tempfile::NamedTempFile::new_in("/tmp").unwrap();
    std::fs::write(file.path(), conf.render("unix:/tmp/never-bound.sock", "off")).unwrap();
    let output = tidegate(&["check", "--config", &file.path().to_string_lossy()]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), 1, "{output:?}");
    assert_eq!(stderr(&output), "");
}

#[test]
fn check_and_run_reject_an_invalid_file_with_places() {
    let _share = exclusive::shared();
    let file = tempfile::NamedTempFile::new_in("/tmp").unwrap();
    let path = file.path().to_string_lossy().into_owned();
    let text = "[frontend.web]\nbind = [\"127.0.0.1:80801\"]\npool = \"wep\"\n\n\
                [pool.web]\nbalanse = \"random\"\n[[pool.web.backend]]\naddress = \"127.0.0.1:1\"\n";
    std::fs::write(file.path(), text).unwrap();
    for command in ["check", "run"] {
        let output = tidegate(&[command, "--config", &path]);
        assert_eq!(output.status.code(), Some(1), "{command}: {output:?}");
        let said = stderr(&output);
        for place in ["2:9: error:", "3:8: error:", "6:1: error:"] {
            assert!(said.contains(&format!("{path}:{place}")), "{command} {place}: {said}");
        }
        assert!(said.contains('^') && said.contains("balance"), "caret and suggestion: {said}");
    }
    let output = tidegate(&["check", "--config", "/nonexistent/tidegate.toml"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(stderr(&output).contains("/nonexistent/tidegate.toml"), "{output:?}");
}

#[test]
fn check_and_run_reject_an_unusable_state_directory() {
    let _share = exclusive::shared();
    let file = tempfile::NamedTempFile::new_in("/tmp").unwrap();
    let path = file.path().to_string_lossy().into_owned();
    for (directory, why) in [("/nowhere/at/all", "No such file"), (&*path, "Not a directory")] {
        let conf = Conf::simple(Engine::Epoll, Pool::new("web").backend("a", "127.0.0.1:9"));
        let conf = conf.process(&format!("state = \"{directory}\""));
        let text = conf.render("unix:/tmp/never-bound.sock", "off");
        std::fs::write(file.path(), &text).unwrap();
        let line = 1 + text.lines().position(|line| line.starts_with("state")).unwrap();
        for command in ["check", "run"] {
            let output = tidegate(&[command, "--config", &path]);
            assert_eq!(output.status.code(), Some(1), "{command}: {output:?}");
            let said = stderr(&output);
            let reason = format!("cannot use the state directory {directory}: {why}");
            assert!(
                said.contains(&format!("{path}:{line}:9: error: {reason}")),
                "{command}: {said}"
            );
        }
    }
}

#[test]
fn commands_without_a_running_process_exit_with_3() {
    let _share = exclusive::shared();
    for command in [&["status"][..], &["reload"], &["drain", "web/a"], &["shutdown"]] {
        let admin = ["--admin", "unix:/tmp/no-listener.sock"];
        let output = tidegate(&[command, &admin].concat());
        assert_eq!(output.status.code(), Some(3), "{command:?}: {output:?}");
        assert!(stderr(&output).contains("no-listener.sock"), "{output:?}");
    }
}

#[test]
fn demo_runs_and_shows_the_split() {
    let _share = exclusive::shared();
    let output = tidegate(&["demo", "--backends", "3", "--for", "3s"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(!output.stdout.is_empty(), "{output:?}");
}

fn status_prints_text_and_json(engine: Engine) {
    let a = ScriptedBackend::start(backend::name("a"));
    let proxy = TestProxy::start(Conf::simple(engine, Pool::new("web").backend("a", a.address())));
    let people = proxy.cli_ok(&["status"]);
    for word in ["web", "a", a.address(), engine.name()] {
        assert!(people.contains(word), "{word:?} in {people}");
    }
    let machines: serde_json::Value =
        serde_json::from_str(&proxy.cli_ok(&["status", "--json"])).expect("--json prints JSON");
    for field in ["version", "generation", "engine", "engine_reason", "workers", "state"] {
        assert_eq!(machines[field], proxy.status()[field], "{field}");
    }
    assert_eq!((&machines["workers"], &machines["state"]), (&2.into(), &"serving".into()));
}

/// Checks that `check` and `run` reject a file with the same first line and exit code 1.
#[track_caller]
fn assert_rejected_by_check_and_run(
    name: &str,
    text: &str,
    directory: &std::path::Path,
    why: &str,
) {
    let file = directory.join("t.toml");
    std::fs::write(&file, text).unwrap();
    let file = file.to_string_lossy();
    let mut said = Vec::new();
    for arguments in [&["check", &file][..], &["run", "--config", &file][..]] {
        let output = tidegate(arguments);
        assert_eq!(output.status.code(), Some(1), "{name}: {output:?}");
        let text = stderr(&output);
        assert!(text.contains(why) && text.contains('^'), "{name}: {text}");
        said.push(text.lines().find(|line| line.contains("error:")).unwrap_or_default().to_owned());
    }
    assert_eq!(said[0], said[1], "{name}");
}

#[test]
fn check_rejects_what_run_rejects() {
    use std::os::unix::fs::PermissionsExt;
    let _share = exclusive::shared();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let token = |name: &str, text: &str, mode: u32| {
        let file = path.join(name);
        std::fs::write(&file, text).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    token("short", "abc", 0o600);
    token("open", "0123456789abcdef0123", 0o644);
    let conf = || Conf::simple(Engine::Epoll, Pool::new("web").backend("a", "127.0.0.1:9"));
    let admin = format!("127.0.0.1:{}", crate::common::ports::free_port());
    let text = |conf: &Conf| conf.render(&admin, "off");
    for (name, why) in [
        ("missing", "missing"),
        ("short", "must hold 16 to 1024 visible ASCII characters"),
        ("open", "is accessible to others than its owner"),
    ] {
        let line = format!("[admin]\ntoken_file = \"{}\"\n", path.join(name).display());
        assert_rejected_by_check_and_run(
            name,
            &text(&conf()).replace("[admin]\n", &line),
            path,
            why,
        );
    }
    let unknown = conf().process("user = \"no-such-user\"");
    assert_rejected_by_check_and_run("user", &text(&unknown), path, "no-such-user");
    let mut logs = conf();
    logs.access = Some("/nonexistent/access.log".into());
    assert_rejected_by_check_and_run(
        "access log",
        &text(&logs),
        path,
        "cannot open the access log: No such file",
    );
    let mut source = conf();
    source.pools[0].keys = "source = \"203.0.113.7\"".into();
    let file = path.join("source.toml");
    std::fs::write(&file, source.render("unix:/tmp/tg-none.sock", "off")).unwrap();
    let output = tidegate(&["check", &file.to_string_lossy()]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(stderr(&output).contains("cannot connect from source 203.0.113.7"));
    // A valid file gives no output on standard error.
    let file = path.join("good.toml");
    std::fs::write(&file, conf().render("unix:/tmp/tg-none.sock", "off")).unwrap();
    let output = tidegate(&["check", "--config", &file.to_string_lossy()]);
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), String::new()), "{output:?}");
}

fn address_in_use_exits_with_3(engine: Engine) {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut conf = Conf::simple(engine, Pool::new("web").backend("a", "127.0.0.1:9"));
    conf.frontends[0].binds = vec![taken.local_addr().unwrap()];
    let Err(said) = TestProxy::try_start(conf, &[]) else { panic!("it started") };
    assert!(said.starts_with("exit status: 3"), "{said}");
    assert!(said.contains(&taken.local_addr().unwrap().to_string()), "{said}");
}

fn live_admin_socket_exits_with_3_and_stale_socket_is_replaced(engine: Engine) {
    let a = ScriptedBackend::start(backend::name("a"));
    let mut proxy =
        TestProxy::start(Conf::simple(engine, Pool::new("web").backend("a", a.address())));
    let mut other = Conf::simple(engine, Pool::new("web").backend("a", a.address()));
    other.workers = 1;
    let file = proxy.dir().join("other.toml");
    std::fs::write(&file, other.render(&proxy.admin(), "off")).unwrap();
    let output = tidegate(&["run", "--config", &file.to_string_lossy()]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(stderr(&output).contains("admin.sock"), "{output:?}");
    assert_eq!(proxy.status()["state"], "serving", "the running process continues");
    // A killed process leaves its socket behind.
    let conf = proxy.conf();
    proxy.kill();
    assert!(proxy.dir().join("admin.sock").exists());
    proxy.start_again();
    assert_eq!(client::ask(conf.address("web")).unwrap(), "a");
}

fn admin_socket_is_private(engine: Engine) {
    use std::os::unix::fs::PermissionsExt;
    let a = ScriptedBackend::start(backend::name("a"));
    let proxy = TestProxy::start(Conf::simple(engine, Pool::new("web").backend("a", a.address())));
    let mode = std::fs::metadata(proxy.dir().join("admin.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}
