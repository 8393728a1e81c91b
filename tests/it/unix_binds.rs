//! Binds that are Unix sockets: their files, their clients in the access log, limits and ranges,
//! PROXY headers, reloads and upgrades.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::wait::{eventually, secs};
use crate::common::{Engine, client, exclusive, on_every_engine};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

on_every_engine!(
    unix_sockets_serve_clients_across_reloads_and_upgrades,
    limits_count_users_and_ranges_do_not_concern_them,
);

/// A balancer on a TCP port, in front of an echo server.
fn start(engine: Engine, keys: &str) -> (ScriptedBackend, TestProxy) {
    let backend = ScriptedBackend::start(backend::echo());
    let mut conf = Conf::simple(engine, Pool::new("web").backend("a", backend.address()));
    conf.frontend_mut("web").keys = keys.to_owned();
    (backend, TestProxy::start(conf))
}

/// The file with these binds next to the TCP port.
fn with_binds(proxy: &TestProxy, more: &str) -> String {
    let text = proxy.render(&proxy.conf());
    let tcp = format!("bind = [\"{}\"", proxy.addr("web"));
    assert!(text.contains(&tcp), "{text}");
    text.replace(&tcp, &format!("{tcp}{more}"))
}

/// Reloads the file with these binds. Returns the answer.
fn reload(proxy: &TestProxy, more: &str) -> (u16, String) {
    proxy.rewrite_by_rename(&with_binds(proxy, more));
    let answer = proxy.admin_request("POST", "/v1/reload");
    (answer.status, answer.body)
}

/// Sends the text and FIN, and returns what comes back.
#[track_caller]
fn echoed(mut stream: &UnixStream, text: &str) -> String {
    stream.write_all(text.as_bytes()).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// The same for a text that fills every buffer on the way.
fn echoed_in_parallel(path: &Path, text: &str) -> String {
    let stream = UnixStream::connect(path).unwrap();
    let mut reader = stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            (&stream).write_all(text.as_bytes()).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
        let mut answer = String::new();
        reader.read_to_string(&mut answer).unwrap();
        answer
    })
}

fn is_refused(connected: std::io::Result<UnixStream>) -> bool {
    connected.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

/// This process, as the access log shows it.
fn own_credentials() -> String {
    let user = rustix::process::geteuid().as_raw();
    format!("unix:uid={user},pid={}", std::process::id())
}

fn unix_sockets_serve_clients_across_reloads_and_upgrades(engine: Engine) {
    let _share = exclusive::shared();
    let (_backend, mut proxy) = start(engine, "");
    let path = proxy.dir().join("web.sock");
    drop(UnixListener::bind(&path).unwrap());
    let name = format!("tidegate-bind-{}", proxy.pid());
    let abstract_name = UnixAddr::from_abstract_name(&name).unwrap();
    let binds = format!(
        ", {{ address = \"unix:{}\", mode = \"0600\" }}, \
         {{ address = \"unix:@{name}\", proxy_protocol = true }}",
        path.display()
    );
    assert_eq!(reload(&proxy, &binds).0, 200);
    let file = std::fs::metadata(&path).unwrap();
    assert_eq!(file.permissions().mode() & 0o7777, 0o600, "the stale file is replaced");
    let shown = proxy.frontend("web")["binds"].to_string();
    assert!(shown.contains(&format!("\"unix:{}\",\"unix:@{name}\"", path.display())), "{shown}");

    assert_eq!(echoed(&UnixStream::connect(&path).unwrap(), "one"), "one");
    // Each worker writes its own lines.
    proxy.wait_access_log(1);
    let announced = UnixStream::connect_addr(&abstract_name).unwrap();
    assert_eq!(echoed(&announced, "PROXY TCP4 192.0.2.9 192.0.2.1 4000 80\r\ntwo"), "two");
    let log = proxy.wait_access_log(2);
    let told = |at: usize| {
        let field = |name: &str| log[at][name].as_str().map(str::to_owned);
        (field("client"), field("peer"), field("cause"))
    };
    let finished = Some("finished".to_owned());
    assert_eq!(told(0), (Some(own_credentials()), None, finished.clone()));
    assert_eq!(told(1), (Some("192.0.2.9:4000".into()), Some(own_credentials()), finished));

    // An upgrade hands over the sockets. The file stays the same one.
    let open = UnixStream::connect(&path).unwrap();
    let sessions = || proxy.frontend("web")["sessions_active"] == 1;
    eventually(secs(10), "one open session", sessions);
    proxy.upgrade();
    assert_eq!(std::fs::metadata(&path).unwrap().ino(), file.ino());
    assert_eq!(echoed(&open, "old process"), "old process");
    assert_eq!(echoed(&UnixStream::connect(&path).unwrap(), "new process"), "new process");
    // The supervisor keeps the sockets of a process that crashes.
    crate::common::proc::signal(proxy.pid(), rustix::process::Signal::KILL);
    assert_eq!(echoed(&UnixStream::connect(&path).unwrap(), "restarted"), "restarted");
    proxy.find_serving();
    let text = "0123456789abcdef".repeat(200_000);
    assert!(echoed_in_parallel(&path, &text) == text, "3.2 MB come back unchanged");
    assert_eq!(reload(&proxy, "").0, 200);
    assert!(!path.exists());
    let gone = || is_refused(UnixStream::connect_addr(&abstract_name));
    eventually(secs(10), "the abstract socket is closed", gone);

    // A socket that a drain closes leaves no file.
    assert_eq!(reload(&proxy, &binds).0, 200);
    assert_eq!(echoed(&UnixStream::connect(&path).unwrap(), "three"), "three");
    proxy.sigterm();
    assert_eq!(proxy.wait_exit(secs(10)), Some(0));
    assert!(!path.exists());
}

fn limits_count_users_and_ranges_do_not_concern_them(engine: Engine) {
    let _share = exclusive::shared();
    let rules = "sources = { deny = [\"0.0.0.0/0\", \"::/0\"], connections_max = 1 }";
    let (_backend, mut proxy) = start(engine, rules);
    let path = proxy.dir().join("web.sock");
    assert_eq!(reload(&proxy, &format!(", \"unix:{}\"", path.display())).0, 200);
    assert!(client::ask(proxy.addr("web")).is_err(), "the range denies it");
    let mut first = UnixStream::connect(&path).unwrap();
    first.write_all(b"a").unwrap();
    first.read_exact(&mut [0]).unwrap();
    let mut second = UnixStream::connect(&path).unwrap();
    let closed = second.read(&mut [0]);
    assert!(matches!(&closed, Ok(0)) || closed.is_err(), "{closed:?}");
    drop((first, second));
    let log = proxy.wait_access_log(3);
    let mut causes: Vec<&str> = log.iter().filter_map(|line| line["cause"].as_str()).collect();
    causes.sort_unstable();
    assert_eq!(causes[..2], ["denied", "finished"], "{causes:?}");
    assert_eq!(causes[2], "source-connections");
    proxy.rebaseline();
}

/// Reloads with a bind at the path, which must fail with this text.
#[track_caller]
fn assert_refused(proxy: &TestProxy, path: &Path, why: &str) {
    let (status, body) = reload(proxy, &format!(", \"unix:{}\"", path.display()));
    assert_eq!(status, 422, "{body}");
    assert!(body.contains(&format!("cannot listen on unix:{}: {why}", path.display())), "{body}");
}

#[test]
fn reload_rejects_a_path_in_use_another_file_and_a_directory_outside_the_sandbox() {
    let _share = exclusive::shared();
    let (_backend, mut proxy) = start(Engine::Epoll, "");
    let [live, file]: [PathBuf; 2] = ["live", "file"].map(|name| proxy.dir().join(name));
    let _listener = UnixListener::bind(&live).unwrap();
    std::fs::write(&file, "precious").unwrap();
    assert_refused(&proxy, &live, "Address already in use");
    assert_refused(&proxy, &file, "the file there is not a socket");
    let other = tempfile::tempdir().unwrap();
    assert_refused(
        &proxy,
        &other.path().join("a.sock"),
        "Permission denied (os error 13) (the sandbox",
    );
    // All or none: the first of two binds leaves no file.
    let first = proxy.dir().join("first");
    let both = format!(", \"unix:{}\", \"unix:{}\"", first.display(), live.display());
    assert_eq!(reload(&proxy, &both).0, 422);
    assert!(!first.exists());
    let checked = std::process::Command::new(env!("CARGO_BIN_EXE_tidegate"))
        .arg("check")
        .arg(proxy.config_path())
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&checked.stderr).into_owned();
    assert_eq!(checked.status.code(), Some(0), "{told}");
    let holder = format!("in use (os error 98); process {} (", std::process::id());
    assert!(told.contains("warning: cannot listen on unix:") && told.contains(&holder), "{told}");
    UnixStream::connect(&live).unwrap();
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
    proxy.rebaseline();
}
