//! Commands as probes (`kind = "exec"`), and the helper that runs them outside of the sandbox.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, connect};
use crate::common::conf::{Conf, Pool};
use crate::common::ports::free_port;
use crate::common::proxy::TestProxy;
use crate::common::servers::{Running, find};
use crate::common::{Engine, eventually, eventually_some, have, on_every_engine, proc, secs};
use rustix::process::Signal;
use std::collections::BTreeSet;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use tempfile::TempDir;

on_every_engine!(
    script_takes_its_backend_down_and_up_with_its_first_line_as_the_reason,
    upgrade_keeps_commands_running,
);

const FAST: &str = "kind = \"exec\"\ninterval = \"200ms\"\ntimeout = \"200ms\"\nfall = 2\nrise = 1";

/// A script that exits with the code in a file and prints a text.
struct Script {
    dir: TempDir,
    backend: ScriptedBackend,
}

impl Script {
    fn new() -> Script {
        let dir = tempfile::Builder::new().prefix("tg-exec-").tempdir_in("/tmp").unwrap();
        let script = Script { dir, backend: ScriptedBackend::start(backend::echo()) };
        script.says(0, "fine");
        // The sandbox allows writing to directories of the configuration only, and this is none.
        let text = "read code text < \"$1\"\necho $$ > \"$1.ran\"\necho \"$text\"\nexit $code\n";
        std::fs::write(script.path("check.sh"), text).unwrap();
        script
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn says(&self, code: u8, text: &str) {
        let new = self.path("state.new");
        std::fs::write(&new, format!("{code} {text}\n")).unwrap();
        std::fs::rename(new, self.path("state")).unwrap();
    }

    fn pool(&self, keys: &str) -> Pool {
        let (script, state) = (self.path("check.sh"), self.path("state"));
        let (script, state) = (script.display(), state.display());
        let command = format!("command = [\"/bin/sh\", \"{script}\", \"{state}\"]");
        let address = self.backend.address();
        Pool::new("web").probe(&format!("{FAST}\n{command}\n{keys}")).backend("a", address)
    }

    fn conf(&self, engine: Engine) -> Conf {
        Conf::simple(engine, self.pool("")).process("probe_helper = true")
    }
}

fn reason(proxy: &TestProxy) -> String {
    let reason = proxy.backend("web", "a")["last_transition"]["reason"].clone();
    reason.as_str().unwrap_or_default().to_owned()
}

fn wait_up(proxy: &TestProxy) {
    proxy.wait_backend("web", "a", "observation", "up");
}

fn wait_down(proxy: &TestProxy) {
    proxy.wait_backend("web", "a", "observation", "down");
}

fn status_field(pid: u32, name: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_default().trim().to_owned()
}

/// Keeper and runner of the process that serves.
fn helpers(proxy: &TestProxy) -> [u32; 2] {
    eventually_some(secs(10), "keeper and runner run", || {
        <[u32; 2]>::try_from(proc::probe_helpers(proxy.pid())).ok()
    })
}

fn script_takes_its_backend_down_and_up_with_its_first_line_as_the_reason(engine: Engine) {
    let script = Script::new();
    let proxy = TestProxy::start(script.conf(engine));
    wait_up(&proxy);
    assert_eq!(client::exchange(&connect(proxy.addr("web")), b"hello").unwrap(), b"hello");
    let explained = proxy.explained("web", "a");
    assert_eq!(explained["probe"]["kind"], "exec", "{explained:#}");
    assert_eq!(explained["last_probe"]["detail"], "exit code 0: \"fine\"");
    script.says(1, "disk \u{1b}[2J full");
    wait_down(&proxy);
    let last = "2 probes failed in a row, last: exit code 1: \"disk \\x1b[2J full\"";
    assert_eq!(reason(&proxy), last);
    assert!(proxy.cli_ok(&["status"]).contains("exit code 1: "));
    let text = proxy.cli_ok(&["explain", "web/a"]);
    assert!(text.contains("exit code 1: "), "{text}");
    script.says(0, "fine again");
    wait_up(&proxy);
    // Codes without a meaning and signals keep the state.
    for code in [2, 3, 126] {
        script.says(code, "unsure");
        let detail = format!("exit code {code}: \"unsure\"");
        eventually(secs(10), &detail, || {
            let last = &proxy.explained("web", "a")["last_probe"];
            last["detail"] == detail && last["result"] == "undecided"
        });
    }
    std::thread::sleep(secs(1));
    assert_eq!(proxy.backend("web", "a")["observation"], "up");
    let text = proxy.cli_ok(&["explain", "web/a"]);
    assert!(text.contains("said nothing about the backend"), "{text}");
    assert_eq!(proxy.metric("tidegate_probe_helper_failed", &[]), 0.0);
    assert_eq!(proxy.metric("tidegate_local_errors_total", &[("at", "probe")]), 0.0);
    assert_sandboxed(&proxy, &script);
}

fn in_force(proxy: &TestProxy, layer: &str) -> bool {
    let status = proxy.status();
    let layers = status["confinement"].as_array().unwrap();
    layers.iter().any(|one| one["layer"] == layer && one["in_force"] == true)
}

/// The process that serves is in its sandbox, and the helpers are not.
fn assert_sandboxed(proxy: &TestProxy, script: &Script) {
    if in_force(proxy, "seccomp") {
        assert_eq!(status_field(proxy.pid(), "Seccomp:"), "2");
    }
    for helper in helpers(proxy) {
        assert_eq!(status_field(helper, "Seccomp:"), status_field(std::process::id(), "Seccomp:"));
        assert_eq!(status_field(helper, "NoNewPrivs:"), "1");
        assert_eq!(status_field(helper, "CapEff:"), "0000000000000000");
    }
    assert!(script.path("state.ran").exists(), "the command has written outside of the sandbox");
}

fn upgrade_keeps_commands_running(engine: Engine) {
    for single in [false, true] {
        let script = Script::new();
        let conf = script.conf(engine).process("drain_timeout = \"60s\"");
        let start = if single { TestProxy::start_single } else { TestProxy::start };
        let mut proxy = start(conf);
        wait_up(&proxy);
        let first = helpers(&proxy);
        let held = connect(proxy.addr("web"));
        client::exchange(&held, b"hello").unwrap();
        let old = proxy.upgrade();
        script.says(1, "down after the upgrade");
        wait_down(&proxy);
        assert!(reason(&proxy).ends_with("exit code 1: \"down after the upgrade\""));
        script.says(0, "fine");
        wait_up(&proxy);
        assert_eq!(proxy.metric("tidegate_local_errors_total", &[("at", "probe")]), 0.0);
        // Without a supervisor, the new process is in the sandbox of the old one and cannot start
        // a helper of its own.
        assert_eq!(proc::probe_helpers(proxy.pid()).is_empty(), single);
        drop(held);
        proxy.wait_gone(old, secs(20));
        for helper in first {
            let lives = !proc::is_dead(helper);
            match single {
                true => assert!(lives, "the new process uses the helper of the old one"),
                false => proxy.wait_gone(helper, secs(10)),
            }
        }
        script.says(1, "down without the old process");
        wait_down(&proxy);
        let last = if single { first } else { helpers(&proxy) };
        proxy.rebaseline();
        proxy.sigterm();
        assert_eq!(proxy.wait_exit(secs(10)), Some(0));
        for helper in last {
            proxy.wait_gone(helper, secs(10));
        }
    }
}

#[test]
fn reload_changes_commands_and_a_missing_helper_is_a_local_error() {
    let script = Script::new();
    let tcp = Pool::new("web").probe("kind = \"tcp\"").backend("a", script.backend.address());
    let mut proxy = TestProxy::start(Conf::simple(Engine::Epoll, tcp));
    wait_up(&proxy);
    // Without the helper, commands do not run, and the state stays.
    let answer = proxy.reload(script.conf(Engine::Epoll));
    let text = answer.to_string();
    assert!(text.contains("[process] probe_helper changed in the file"), "{text}");
    eventually(secs(10), "a local error", || {
        let last = &proxy.explained("web", "a")["last_probe"];
        last["detail"].as_str().is_some_and(|why| why.starts_with("no probe helper runs"))
    });
    let a = proxy.backend("web", "a");
    assert_ne!(a["observation"], "down", "{a:#}");
    proxy.upgrade();
    script.says(1, "from the script");
    wait_down(&proxy);
    // A reload brings other commands into force, and only those.
    let mut conf = proxy.conf();
    let probe = format!("{FAST}\ncommand = [\"/bin/echo\", \"{{pool}} {{backend}} {{address}}\"]");
    conf.pools[0] = Pool::new("web").probe(&probe).backend("a", script.backend.address());
    proxy.reload(conf);
    wait_up(&proxy);
    assert_eq!(
        proxy.explained("web", "a")["last_probe"]["detail"],
        "exit code 0: \"web a 127.0.0.1\""
    );
    proxy.rebaseline();
}

#[test]
fn upgrade_without_a_supervisor_cannot_switch_the_helper_on() {
    let script = Script::new();
    let tcp = Pool::new("web").probe("kind = \"tcp\"").backend("a", script.backend.address());
    let proxy = TestProxy::start_single(Conf::simple(Engine::Epoll, tcp));
    if !["landlock", "seccomp"].iter().any(|layer| in_force(&proxy, layer)) {
        return;
    }
    let mut conf = script.conf(Engine::Epoll);
    conf.frontends.clone_from(&proxy.conf().frontends);
    proxy.rewrite_by_rename(&proxy.render(&conf));
    let answer = proxy.try_upgrade("");
    assert_ne!(answer.status, 200, "{}", answer.body);
    let why = "cannot start the probe helper outside of the sandbox; restart instead";
    assert!(answer.body.contains(why), "{}", answer.body);
    wait_up(&proxy);
}

#[test]
fn helper_that_is_killed_never_counts_against_a_backend() {
    let script = Script::new();
    let mut proxy = TestProxy::start(script.conf(Engine::Epoll));
    wait_up(&proxy);
    let [keeper, runner] = helpers(&proxy);
    proc::signal(runner, Signal::KILL);
    eventually(secs(20), "another runner", || helpers(&proxy)[1] != runner);
    script.says(1, "from the next runner");
    wait_down(&proxy);
    script.says(0, "fine");
    wait_up(&proxy);
    let [_, runner] = helpers(&proxy);
    for helper in [keeper, runner] {
        proc::signal(helper, Signal::KILL);
    }
    script.says(1, "not run");
    eventually(secs(20), "the helper is gone", || {
        let last = &proxy.explained("web", "a")["last_probe"];
        last["detail"].as_str().is_some_and(|why| why.starts_with("the probe helper has ended"))
    });
    std::thread::sleep(secs(1));
    assert_eq!(proxy.backend("web", "a")["observation"], "up");
    assert_eq!(proxy.metric("tidegate_probe_helper_failed", &[]), 1.0);
    assert!(proxy.metric("tidegate_probe_helper_failures_total", &[]) >= 1.0);
    assert!(proxy.metric("tidegate_local_errors_total", &[("at", "probe")]) >= 1.0);
    assert!(
        proxy.log().contains("probe helper has ended; exec probes do not run"),
        "{}",
        proxy.log()
    );
    let events = proxy.cli_ok(&["events"]);
    assert!(events.contains("run `tidegate upgrade`"), "{events}");
    proxy.upgrade();
    wait_down(&proxy);
    assert_eq!(proxy.metric("tidegate_probe_helper_failed", &[]), 0.0);
    proxy.rebaseline();
}

#[test]
fn script_of_haproxy_gets_the_same_words_and_variables_from_tidegate() {
    if !have(&["haproxy"]) {
        return;
    }
    let script = Script::new();
    let program = script.path("external.sh");
    let text = "#!/bin/sh\necho \"$#: $*; $HAPROXY_PROXY_NAME $HAPROXY_SERVER_NAME \
                $HAPROXY_SERVER_ADDR $HAPROXY_SERVER_PORT\" > \"$0.new\"\n/bin/mv \"$0.new\" \"$0.said\"\n";
    std::fs::write(&program, text).unwrap();
    std::fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    let said = script.path("external.sh.said");
    let heard = || {
        let text =
            eventually_some(secs(10), "the script has run", || std::fs::read_to_string(&said).ok());
        std::fs::remove_file(&said).unwrap();
        text
    };
    let (address, anchor) = (script.backend.address(), free_port());
    let command = program.display();
    let text = format!(
        "global\n  external-check\n  insecure-fork-wanted\ndefaults\n  mode tcp\n\
         timeout connect 2s\n  timeout client 2s\n  timeout server 2s\n\
         frontend f\n  bind 127.0.0.1:{anchor}\n  default_backend web\n\
         backend web\n  option external-check\n  external-check command {command}\n\
         server a {address} check inter 200ms\n"
    );
    let file = script.path("haproxy.cfg");
    std::fs::write(&file, text).unwrap();
    let mut haproxy = Command::new(find("haproxy").unwrap());
    haproxy.args(["-db", "-f"]).arg(&file).stdout(Stdio::null()).stderr(Stdio::null());
    let running = Running::start(&mut haproxy);
    let of_haproxy = heard();
    drop(running);
    let _ = std::fs::remove_file(&said);
    // What `tidegate import` writes.
    let words = "\"NOT_USED\", \"NOT_USED\", \"{address}\", \"{port}\"";
    let probe = format!("{FAST}\nexit_codes = \"haproxy\"\ncommand = [\"{command}\", {words}]");
    let pool = Pool::new("web").probe(&probe).backend("a", address);
    let conf = Conf::simple(Engine::Epoll, pool).process("probe_helper = true");
    let proxy = TestProxy::start(conf);
    wait_up(&proxy);
    assert_eq!(heard(), of_haproxy);
}

#[test]
fn helper_and_commands_inherit_no_descriptor() {
    let script = Script::new();
    // The shell starts no other process, which would open descriptors of its own.
    let list = "command = [\"/bin/sh\", \"-c\", \"for n in 0 1 2 3 4 5 6 7 8 9 10 11 12; do \
                [ -e /proc/$$/fd/$n ] && open=\\\"$open $n\\\"; done; echo open:$open\"]";
    let pool =
        Pool::new("web").probe(&format!("{FAST}\n{list}")).backend("a", script.backend.address());
    let conf = Conf::simple(Engine::Epoll, pool).process("probe_helper = true");
    // Descriptor 7 is open in every process that the wrapper starts.
    let wrapper = ["/bin/sh", "-c", "exec 7< /etc/passwd; exec \"$@\"", "sh"];
    let proxy = TestProxy::start_under(conf, &wrapper);
    wait_up(&proxy);
    let detail = proxy.explained("web", "a")["last_probe"]["detail"].clone();
    assert_eq!(detail, "exit code 0: \"open: 0 1 2\"");
    for helper in helpers(&proxy) {
        let fds = proc::fds(helper);
        let sockets: BTreeSet<_> = fds.iter().filter(|fd| fd.contains("socket:")).collect();
        assert_eq!(sockets.len(), 1, "{fds:#?}");
        assert!(!fds.iter().any(|fd| fd.contains("passwd")), "{fds:#?}");
    }
}
