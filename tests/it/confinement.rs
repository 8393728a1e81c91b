//! The sandbox: user, capabilities, files and system calls that Tidegate gives up.
//!
//! Tests that need root are skipped with a report if the user is not root. All other
//! tests also run in the sandbox, because it is on by default.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, connect};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::{PROGRAM, TestProxy};
use crate::common::servers::Running;
use crate::common::{Engine, eventually, http, on_every_engine, proc, secs, skip};
use serde_json::Value;
use std::fs::{self, Permissions};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tidegate_discovery::testing::kubernetes::{EndpointDocument, KubernetesDouble, SliceDocument};

on_every_engine!(unprivileged_user_binds_low_ports_reloads_and_upgrades);

/// Uids that no user database contains.
const USER: u32 = 54_321;
const OTHER: u32 = 54_322;

/// A directory that belongs to `USER`, with a copy of the program that this user can
/// execute.
struct Place {
    dir: tempfile::TempDir,
    backend: ScriptedBackend,
    low: [u16; 2],
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        skip("only root can switch to another user");
    }
    root
}

impl Place {
    fn new() -> Place {
        let dir = tempfile::Builder::new().prefix("tg-").tempdir_in("/tmp").unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(dir.path().join("own")).unwrap();
        chown(dir.path().join("own"), Some(USER), Some(USER)).unwrap();
        fs::copy(PROGRAM, dir.path().join("tidegate")).unwrap();
        Place { dir, backend: ScriptedBackend::start(backend::echo()), low: low_ports() }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join("own").join(name)
    }

    /// Writes a file with an owner and a mode.
    fn write(&self, name: &str, text: &str, owner: u32, mode: u32) -> PathBuf {
        let path = self.file(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        chown(&path, Some(owner), Some(owner)).unwrap();
        path
    }

    fn configure(&self, engine: Engine, ports: &[u16], more: &str) {
        let binds: Vec<String> = ports.iter().map(|port| format!("\"127.0.0.1:{port}\"")).collect();
        let text = format!(
            "[process]\nworkers = 2\nengine = \"{}\"\nuser = \"{USER}\"\ngroup = \"{USER}\"\n\
             sandbox = \"on\"\n[admin]\nlisten = \"unix:{}\"\n[log]\naccess = \"{}\"\n\
             [frontend.web]\nbind = [{}]\npool = \"web\"\n\
             [[pool.web.backend]]\naddress = \"{}\"\n{more}",
            engine.name(),
            self.file("admin.sock").display(),
            self.file("access.log").display(),
            binds.join(", "),
            self.backend.address(),
        );
        self.write("tidegate.toml", &text, USER, 0o600);
    }

    fn command(&self) -> Command {
        let mut command = Command::new(self.dir.path().join("tidegate"));
        command.args(["run", "--config"]).arg(self.file("tidegate.toml"));
        command.arg("--pid-file").arg(self.file("pid"));
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    fn ask(&self, method: &str, target: &str) -> http::Answer {
        http::over_unix(&self.file("admin.sock"), method, target).unwrap()
    }

    fn wait_ready(&self) {
        let ready = || http::over_unix(&self.file("admin.sock"), "GET", "/ready");
        eventually(secs(20), "the process is ready", || {
            ready().is_ok_and(|answer| answer.status == 200)
        });
    }

    fn serves(&self, port: u16) {
        let client = connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        client::exchange(&client, b"hello").unwrap();
    }

    /// The supervisor, which runs as root and writes the pid file.
    fn service(&self) -> u32 {
        fs::read_to_string(self.file("pid")).unwrap().trim().parse().unwrap()
    }
}

/// Two free ports below 1024.
fn low_ports() -> [u16; 2] {
    let free = |port: &u16| TcpListener::bind((Ipv4Addr::UNSPECIFIED, *port)).is_ok();
    let mut all: Vec<u16> = (600..1000).collect();
    fastrand::shuffle(&mut all);
    let found: Vec<u16> = all.into_iter().filter(free).take(2).collect();
    found.try_into().unwrap()
}

/// Returns the values of one field of `/proc/PID/task/TID/status` over all threads, without
/// duplicates.
fn of_every_thread(pid: u32, field: &str) -> Vec<String> {
    let mut found: Vec<String> = fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .filter_map(|task| fs::read_to_string(task.unwrap().path().join("status")).ok())
        .map(|text| {
            let line = text.lines().find_map(|line| line.strip_prefix(&format!("{field}:")));
            line.unwrap_or("").split_whitespace().collect::<Vec<_>>().join(" ")
        })
        .collect();
    found.sort();
    found.dedup();
    found
}

/// Checks that every thread has given up its privileges.
#[track_caller]
fn is_confined(pid: u32, status: &Value) {
    let own = [(); 4].map(|()| USER.to_string()).join(" ");
    let one = |field| of_every_thread(pid, field);
    assert_eq!((one("Uid"), one("Gid")), (vec![own.clone()], vec![own]));
    assert_eq!(one("Groups"), [USER.to_string()]);
    // CAP_NET_BIND_SERVICE is the 11th.
    for set in ["CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(one(set), ["0000000000000400"], "{set}");
    }
    assert_eq!((one("NoNewPrivs"), one("Seccomp")), (vec!["1".into()], vec!["2".into()]));
    assert_eq!(one("Seccomp_filters"), ["1"], "an upgrade adds no filter");
    let layers = status["confinement"].as_array().unwrap();
    assert_eq!(layers.len(), 5);
    assert!(layers.iter().all(|layer| layer["in_force"] == true), "{layers:#?}");
}

fn unprivileged_user_binds_low_ports_reloads_and_upgrades(engine: Engine) {
    if !is_root() {
        return;
    }
    let place = Place::new();
    place.configure(engine, &place.low[..1], "");
    let _first = Running::start(&mut place.command());
    place.wait_ready();
    place.serves(place.low[0]);
    let service = place.service();
    assert_eq!(of_every_thread(service, "Uid"), ["0 0 0 0"]);
    let mut serving = proc::children(service)[0];
    is_confined(serving, &place.ask("GET", "/v1/status").json());
    for name in ["admin.sock", "access.log"] {
        assert_eq!(fs::metadata(place.file(name)).unwrap().uid(), USER, "{name}");
    }

    place.configure(engine, &place.low, "");
    assert_eq!(place.ask("POST", "/v1/reload").status, 200);
    place.serves(place.low[1]);

    for _ in 0..2 {
        let upgraded = place.ask("POST", "/v1/upgrade");
        assert_eq!(upgraded.status, 200, "{}", upgraded.body);
        serving = upgraded.json()["pid"].as_u64().unwrap() as u32;
        is_confined(serving, &place.ask("GET", "/v1/status").json());
        place.low.iter().for_each(|port| place.serves(*port));
    }
    assert_eq!(place.service(), service);
    let last = serving;
    assert_eq!(place.ask("POST", "/v1/shutdown").status, 200);
    eventually(secs(10), "the last process has ended", || {
        proc::is_dead(last) || !Path::new(&format!("/proc/{last}")).exists()
    });
}

#[test]
fn commands_of_probes_run_as_the_user_without_capabilities_outside_of_the_sandbox() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let command = "while read name value; do case $name in \
                   Uid:|Groups:|CapPrm:|CapAmb:|NoNewPrivs:|Seccomp:) all=\"$all $value\";; \
                   esac; done < /proc/self/status; echo $all";
    let probe = format!(
        "[pool.web.probe]\nkind = \"exec\"\ntimeout = \"2s\"\n\
         command = ['/bin/sh', '-c', '{command}']\n"
    );
    place.configure(Engine::Epoll, &place.low[..1], &probe);
    let text = fs::read_to_string(place.file("tidegate.toml")).unwrap();
    let text = text.replace("[process]\n", "[process]\nprobe_helper = true\n");
    place.write("tidegate.toml", &text, USER, 0o600);
    let _first = Running::start(&mut place.command());
    place.wait_ready();
    place.serves(place.low[0]);
    let seccomp = of_every_thread(std::process::id(), "Seccomp")[0].clone();
    let none = "0000000000000000";
    let wanted =
        format!("exit code 0: \"{USER} {USER} {USER} {USER} {USER} {none} {none} 1 {seccomp}\"");
    let detail = || {
        let path = format!("/v1/pools/web/backends/{}/explain", place.backend.address());
        let answer = place.ask("GET", &path).json();
        answer["last_probe"]["detail"].as_str().map(str::to_owned)
    };
    eventually(secs(10), "a probe result", || detail().is_some());
    assert_eq!(detail(), Some(wanted));
    let serving = proc::children(place.service())[0];
    is_confined(serving, &place.ask("GET", "/v1/status").json());
    for helper in proc::probe_helpers(serving) {
        let one = |field| of_every_thread(helper, field);
        let own = [(); 4].map(|()| USER.to_string()).join(" ");
        assert_eq!(
            (one("Uid"), one("CapPrm"), one("CapAmb")),
            (vec![own], vec![none.to_owned()], vec![none.to_owned()])
        );
    }
    assert_eq!(place.ask("POST", "/v1/shutdown").status, 200);
    eventually(secs(10), "the process has ended", || proc::is_dead(serving));
}

#[test]
fn key_readable_only_by_root_is_rejected_at_start_and_reload() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let key = place.write("hb.key", &"k".repeat(32), 0, 0o600);
    let keys = format!(
        "[heartbeat]\nlisten = \"127.0.0.1:{}\"\n[[heartbeat.key]]\nid = 1\nfile = \"{}\"\n\
         pools = \"web\"\naddresses = \"127.0.0.0/8\"\n[pool.web.heartbeat]\n",
        crate::common::ports::free_port(),
        key.display()
    );
    let words = "hb.key\" cannot be read: permission denied";
    place.configure(Engine::Epoll, &place.low, &keys);
    let refused = place.command().output().unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(refused.status.code() == Some(1) && said.contains(words), "{said}");

    place.configure(Engine::Epoll, &place.low, "");
    let _balancer = Running::start(place.command().stderr(Stdio::null()));
    place.wait_ready();
    place.configure(Engine::Epoll, &place.low, &keys);
    let refused = place.ask("POST", "/v1/reload");
    let message = refused.json()["problems"][0]["message"].as_str().unwrap().to_owned();
    assert!(refused.status == 422 && message.contains("cannot be read"), "{message}");
    place.write("hb.key", &"k".repeat(32), USER, 0o600);
    assert_eq!(place.ask("POST", "/v1/reload").status, 200);
}

#[test]
fn process_that_cannot_switch_its_user_does_not_start() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    place.configure(Engine::Epoll, &place.low, "");
    let tries = |command: &mut Command| {
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    place.write(
        "tidegate.toml",
        &fs::read_to_string(place.file("tidegate.toml")).unwrap(),
        OTHER,
        0o644,
    );
    let (code, said) = tries(place.command().uid(OTHER).gid(OTHER));
    assert_eq!(code, Some(3), "{said}");
    assert!(
        said.contains(":4:8: error: [process] user: 54322:54322 cannot switch to 54321"),
        "{said}"
    );
    let text = fs::read_to_string(place.file("tidegate.toml")).unwrap();
    let text = text.replace(&format!("user = \"{USER}\""), "user = \"no-such-user\"");
    place.write("tidegate.toml", &text.replace(&format!("group = \"{USER}\"\n"), ""), OTHER, 0o644);
    let (code, said) = tries(&mut place.command());
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("[process] user: user \"no-such-user\" does not exist"), "{said}");
}

fn simple(line: &str) -> (ScriptedBackend, TestProxy) {
    let backend = ScriptedBackend::start(backend::echo());
    let pool = Pool::new("web").backend("a", backend.address());
    let proxy = TestProxy::start(Conf::simple(Engine::Epoll, pool).process(line));
    (backend, proxy)
}

fn has_landlock(proxy: &TestProxy) -> bool {
    let status = proxy.status();
    let layers = status["confinement"].as_array().unwrap();
    let landlock = layers.iter().find(|layer| layer["layer"] == "landlock").unwrap();
    if landlock["in_force"] == false {
        skip(&format!("no landlock: {landlock}"));
    }
    landlock["in_force"] == true
}

/// Reloads a configuration with a list of denied sources in a directory that no earlier
/// configuration named.
fn reload_with_a_list_elsewhere(proxy: &TestProxy) -> http::Answer {
    let elsewhere = tempfile::tempdir().unwrap();
    let list = elsewhere.path().join("denied");
    fs::write(&list, "192.0.2.0/24\n").unwrap();
    let mut conf = proxy.conf();
    conf.frontends[0].keys = format!("sources.deny_file = \"{}\"", list.display());
    proxy.rewrite_in_place(&proxy.render(&conf));
    proxy.admin_request("POST", "/v1/reload")
}

#[test]
fn default_sandbox_lets_a_reload_read_any_directory() {
    let (_backend, proxy) = simple("");
    let answer = reload_with_a_list_elsewhere(&proxy);
    assert_eq!(answer.status, 200, "{}", answer.body);
    client::exchange(&connect(proxy.addr("web")), b"another session").unwrap();
    proxy.rewrite_in_place(&proxy.render(&proxy.conf()));
}

#[test]
fn strict_sandbox_rejects_files_in_other_directories_with_the_reason() {
    // sandbox = "on" requires a user that can give up capabilities.
    if !is_root() {
        return;
    }
    let (_backend, proxy) = simple("sandbox = \"on\"");
    if !has_landlock(&proxy) {
        return;
    }
    let refused = reload_with_a_list_elsewhere(&proxy);
    assert_eq!(refused.status, 422, "{}", refused.body);
    assert!(
        refused.body.contains("the sandbox allows access only to the directories"),
        "{}",
        refused.body
    );
    client::exchange(&connect(proxy.addr("web")), b"another session").unwrap();
    proxy.rewrite_in_place(&proxy.render(&proxy.conf()));
}

/// A Kubernetes API server on a thread of its own, with one pod of the service `shop`.
fn kubernetes() -> KubernetesDouble {
    let (sent, started) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            sent.send(KubernetesDouble::start(None).await.unwrap()).unwrap();
            std::future::pending::<()>().await;
        });
    });
    let double = started.recv().unwrap();
    let pods = vec![EndpointDocument::ready(1)];
    double.put(SliceDocument::new("default", "shop", "a", pods));
    double
}

#[test]
fn strict_sandbox_reads_the_files_of_a_kubeconfig_also_after_a_link_was_replaced() {
    if !is_root() {
        return;
    }
    // Below /var: /tmp would be a directory of `/`, and its own children are not included.
    let directory = |name| tempfile::Builder::new().prefix(name).tempdir_in("/var/tmp").unwrap();
    let (own, secrets) = (directory("kubeconfig-"), directory("secrets-"));
    let version = |name: &str, token: &str| {
        let dir = secrets.path().join("versions").join(name);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("token"), token).unwrap();
        fs::set_permissions(dir.join("token"), Permissions::from_mode(0o600)).unwrap();
        let (new, current) = (secrets.path().join("new"), secrets.path().join("current"));
        std::os::unix::fs::symlink(dir, &new).unwrap();
        fs::rename(new, current).unwrap();
    };
    let double = kubernetes();
    double.script(|faults| faults.token = "first".into());
    version("1", "first");
    let kubeconfig = own.path().join("config");
    let text = format!(
        "current-context: c\ncontexts: [{{name: c, context: {{cluster: k, user: u}}}}]\n\
         clusters: [{{name: k, cluster: {{server: 'http://{}'}}}}]\n\
         users: [{{name: u, user: {{tokenFile: {}/current/token}}}}]\n",
        double.address(),
        secrets.path().display(),
    );
    fs::write(&kubeconfig, text).unwrap();
    fs::set_permissions(&kubeconfig, Permissions::from_mode(0o600)).unwrap();
    let pool = Pool::new("web").discover("from = \"k\"\nservice = \"shop\"");
    let table = format!(
        "[registry.k]\nkind = \"kubernetes\"\nkubeconfig = \"{}\"\ntimeout = \"1s\"\n",
        kubeconfig.display()
    );
    let conf = Conf::simple(Engine::Epoll, pool).registry(&table).process("sandbox = \"on\"");
    let proxy = TestProxy::start(conf);
    if !has_landlock(&proxy) {
        return;
    }
    let source = || proxy.status()["pools"][0]["sources"][0].clone();
    let answers = |members: u64| {
        let source = source();
        source["last_word"]["failure"].is_null() && source["members"] == members
    };
    eventually(secs(10), "the first token is read", || answers(1));
    double.script(|faults| faults.token = "second".into());
    double.close_watches();
    eventually(secs(10), "the first token is refused", || {
        source()["last_word"]["failure"] == "auth"
    });
    version("2", "second");
    double.put(SliceDocument::new("default", "shop", "b", vec![EndpointDocument::ready(2)]));
    eventually(secs(10), "the second token is read", || answers(2));
}

#[test]
fn default_sandbox_rejects_logs_in_other_directories_with_the_reason() {
    let (_backend, proxy) = simple("");
    if !has_landlock(&proxy) {
        return;
    }
    assert_eq!(proxy.metric("tidegate_confinement", &[("layer", "seccomp")]), 1.0);
    let elsewhere = tempfile::tempdir().unwrap();
    let mut conf = proxy.conf();
    conf.access = Some(elsewhere.path().join("a.log").display().to_string());
    proxy.rewrite_in_place(&proxy.render(&conf));
    let refused = proxy.admin_request("POST", "/v1/reload");
    assert_eq!(refused.status, 422, "{}", refused.body);
    assert!(refused.body.contains("the sandbox allows writing only to"), "{}", refused.body);
    client::exchange(&connect(proxy.addr("web")), b"another session").unwrap();
    assert!(proxy.cli_ok(&["status"]).contains("sandbox: "));
    proxy.rewrite_in_place(&proxy.render(&proxy.conf()));
}

#[test]
fn disabled_sandbox_sets_no_filter_and_a_change_needs_a_restart() {
    let (_backend, mut proxy) = simple("sandbox = \"off\"");
    let inherited = of_every_thread(std::process::id(), "NoNewPrivs");
    assert_eq!(of_every_thread(proxy.pid(), "NoNewPrivs"), inherited);
    for layer in ["landlock", "seccomp"] {
        assert_eq!(proxy.metric("tidegate_confinement", &[("layer", layer)]), 0.0, "{layer}");
    }
    let mut conf = proxy.conf();
    conf.process = conf.process.replace("off", "on");
    let warned = proxy.reload(conf);
    assert!(warned["warnings"][0].as_str().unwrap().starts_with("[process] sandbox changed"));
}

#[test]
fn output_and_logs_contain_no_secrets() {
    const TOKEN: &str = "token-that-must-not-appear";
    const KEY: &str = "key-that-must-not-appear-32-bytes";
    let backend = ScriptedBackend::start(backend::echo());
    let dir = tempfile::Builder::new().prefix("tg-").tempdir_in("/tmp").unwrap();
    let file = |name: &str| dir.path().join(name);
    for (name, text) in [("token", TOKEN), ("key", KEY)] {
        fs::write(file(name), text).unwrap();
        fs::set_permissions(file(name), Permissions::from_mode(0o600)).unwrap();
    }
    let admin = format!("127.0.0.1:{}", crate::common::ports::free_port());
    let text = format!(
        "[process]\nworkers = 1\n[admin]\nlisten = \"{admin}\"\ntoken_file = \"{}\"\n\
         [log]\nlevel = \"trace\"\naccess = \"{}\"\n\
         [frontend.web]\nbind = \"127.0.0.1:{}\"\npool = \"web\"\n\
         [heartbeat]\nlisten = \"127.0.0.1:{}\"\n[[heartbeat.key]]\nid = 1\nfile = \"{}\"\n\
         pools = \"web\"\naddresses = \"127.0.0.0/8\"\n[pool.web.heartbeat]\n\
         [[pool.web.backend]]\nname = \"a\"\naddress = \"{}\"\n",
        file("token").display(),
        file("access.log").display(),
        crate::common::ports::free_port(),
        crate::common::ports::free_port(),
        file("key").display(),
        backend.address(),
    );
    fs::write(file("t.toml"), text).unwrap();
    let log = fs::File::create(file("log")).unwrap();
    let mut command = Command::new(PROGRAM);
    command.args(["run", "--config"]).arg(file("t.toml"));
    command.env("RUST_LOG", "trace").stdout(log.try_clone().unwrap()).stderr(log);
    let _balancer = Running::start(&mut command);
    let to: SocketAddr = admin.parse().unwrap();
    eventually(secs(20), "the process is ready", || {
        http::over_tcp(to, "/ready").is_ok_and(|answer| answer.status == 200)
    });
    let mut said: Vec<String> =
        ["/v1/status", "/metrics", "/v1/pools/web/backends/a/explain", "/x"]
            .map(|path| http::over_tcp(to, path).unwrap().body)
            .into();
    let cli = |arguments: &[&str]| {
        let token = file("token").display().to_string();
        let output = Command::new(PROGRAM)
            .args(arguments)
            .args(["--admin", &admin, "--token-file", &token])
            .output()
            .unwrap();
        format!("{output:?}")
    };
    said.extend(
        [&["status"][..], &["reload"], &["explain", "web/a"], &["drain", "web/a"]].map(cli),
    );
    let config = file("t.toml").display().to_string();
    let check = Command::new(PROGRAM).args(["check", "--config", &config]).output().unwrap();
    said.push(format!("{check:?}"));
    said.push(format!("{:?}", tidegate_config::load(&file("t.toml")).unwrap()));
    // The error about a wrong key file must not contain the file's content.
    fs::write(file("key"), "short-key").unwrap();
    said.push(cli(&["reload"]));
    eventually(secs(5), "the rejection is in the log", || {
        fs::read_to_string(file("log")).unwrap().contains("configuration rejected")
    });
    said.push(fs::read_to_string(file("log")).unwrap());
    assert!(said.iter().any(|text| text.contains("holds 9 bytes")), "the reload was rejected");
    for text in &said {
        for secret in [TOKEN, KEY, "short-key", "must-not-appear"] {
            assert!(!text.contains(secret), "{secret} in {text}");
        }
    }
}
