//! Service managers: passed sockets and notifications.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, connect};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::{PROGRAM, TestProxy};
use crate::common::{Engine, eventually, have, http, on_every_engine, secs};
use std::fs::Permissions;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

on_every_engine!(
    service_manager_is_notified_of_every_step,
    failed_notification_is_logged_once,
    passed_socket_is_used_and_outlives_the_process,
    passed_socket_without_bind_is_an_error,
    passed_unix_sockets_serve_over_upgrades_and_stay_with_the_manager,
    passed_unix_socket_without_bind_is_an_error,
);

/// Runs `systemd-analyze verify` if it is installed.
#[test]
fn unit_file_is_valid_for_systemd() {
    let unit = include_str!("../../config/tidegate.service");
    assert!(unit.contains("\nType=notify\n") && unit.contains("\nNotifyAccess=main\n"));
    assert!(unit.contains("\nExecStart=/usr/bin/tidegate run "));
    let Some(analyze) = crate::common::servers::find("systemd-analyze") else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tidegate.service");
    // A program that exists.
    std::fs::write(&path, unit.replace("/usr/bin/tidegate ", "/bin/true ")).unwrap();
    let output = std::process::Command::new(analyze).arg("verify").arg(&path).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !said.contains("tidegate.service"), "{said}");
}

/// The receiving end of the notifications.
struct Manager(UnixDatagram);

impl Manager {
    fn at(path: &Path) -> Manager {
        let socket = UnixDatagram::bind(path).unwrap();
        socket.set_read_timeout(Some(crate::common::patience(secs(10)))).unwrap();
        Manager(socket)
    }

    /// Returns the next message other than the watchdog's.
    fn next(&self) -> String {
        loop {
            let message = self.any();
            if message != "WATCHDOG=1" {
                return message;
            }
        }
    }

    fn any(&self) -> String {
        let mut bytes = [0; 4096];
        let n = self.0.recv(&mut bytes).expect("a message in time");
        String::from_utf8(bytes[..n].to_vec()).unwrap()
    }
}

fn service_manager_is_notified_of_every_step(engine: Engine) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let manager = Manager::at(&path);
    let backend = ScriptedBackend::start(backend::echo());
    let conf = Conf::simple(engine, Pool::new("web").backend("a", backend.address()));
    let socket = format!("NOTIFY_SOCKET={}", path.display());
    let wrapper = ["env", &socket, "WATCHDOG_USEC=200000"];
    let mut proxy = TestProxy::start_under(conf, &wrapper);
    let first = proxy.service();
    assert_eq!(manager.next(), format!("READY=1\nMAINPID={first}"));
    assert_eq!(manager.any(), "WATCHDOG=1");
    assert_eq!(manager.any(), "WATCHDOG=1");

    let mut conf = proxy.conf();
    conf.pool_mut("web").backends[0].keys = "weight = 2".into();
    proxy.reload(conf);
    let said = manager.next();
    let micros = said.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").expect(&said);
    assert!(micros.parse::<u64>().unwrap() > 1_000_000);
    assert_eq!(manager.next(), format!("READY=1\nMAINPID={first}"));

    // The manager gets no message about an upgrade: the main process stays and is alive.
    proxy.upgrade();
    assert_eq!(proxy.service(), first);
    for _ in 0..3 {
        assert_eq!(manager.any(), "WATCHDOG=1");
    }
    proxy.rebaseline();
    proxy.sigterm();
    assert_eq!(manager.next(), "STOPPING=1");
    assert_eq!(proxy.wait_exit(secs(3)), Some(0));
}

/// The supervisor writes its own log lines, in the same format as all others.
fn failed_notification_is_logged_once(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let long = format!("/{}", "n".repeat(200));
    for (path, error) in [("/nowhere/notify", "No such file"), (&long, "SUN_LEN")] {
        for single in [false, true] {
            let conf = Conf::simple(engine, Pool::new("web").backend("a", backend.address()));
            let socket = format!("NOTIFY_SOCKET={path}");
            let wrapper = ["env", &socket, "WATCHDOG_USEC=100000"];
            let mut proxy = match single {
                true => TestProxy::start_single_under(conf, &wrapper),
                false => TestProxy::start_under(conf, &wrapper),
            };
            // Long enough for several watchdog notifications.
            std::thread::sleep(Duration::from_millis(300));
            proxy.check_for_leaks();
            let log = proxy.log();
            let mut lines = log.lines().filter(|line| line.contains("cannot notify"));
            let line = lines.next().expect("a line");
            assert_eq!(lines.next(), None);
            let (head, rest) = line.split_at(line.find(" WARN ").expect("a level"));
            let time = head.trim_end().strip_suffix('Z').expect("a time");
            assert!(time.len() == 26 && time.as_bytes()[10] == b'T', "{line}");
            let wanted = " WARN tidegate_supervisor::manager: cannot notify the service manager";
            assert!(rest.starts_with(wanted), "{line}");
            assert!(rest.contains(" error=\"") && rest.contains(error), "{line}");
            assert!(rest.contains(" notification=\"READY=1\\nMAINPID="), "{line}");
        }
    }
}

/// Passes fd 3 (and 4) on as systemd does. LISTEN_PID is the pid of the process.
const ACTIVATE: &str = "exec 3<&0; exec 0</dev/null; export LISTEN_PID=$$; exec \"$@\"";

/// Starts Tidegate with this listener passed.
fn run_with(listener: &TcpListener, config: &Path) -> std::process::Child {
    std::process::Command::new("sh")
        .args(["-c", ACTIVATE, "sh", PROGRAM, "run", "--config"])
        .arg(config)
        .env("LISTEN_FDS", "1")
        .env("LISTEN_FDNAMES", "front")
        .stdin(std::os::fd::OwnedFd::from(listener.try_clone().unwrap()))
        .stdout(std::process::Stdio::null())
        .stderr(std::fs::File::create(config.with_extension("log")).unwrap())
        .spawn()
        .unwrap()
}

fn passed_socket_is_used_and_outlives_the_process(engine: Engine) {
    if !have(&["sh"]) {
        return;
    }
    let dir = tempfile::Builder::new().prefix("tg-").tempdir_in("/tmp").unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let backend = ScriptedBackend::start(backend::echo());
    let mut conf = Conf::simple(engine, Pool::new("web").backend("a", backend.address()));
    conf.frontends[0].binds = vec![address];
    let config = dir.path().join("tidegate.toml");
    let admin = format!("unix:{}", dir.path().join("admin.sock").display());
    std::fs::write(&config, conf.render(&admin, "off")).unwrap();
    for _ in 0..2 {
        // Connected before any process serves, which socket activation allows.
        let early = connect(address);
        let mut child = run_with(&listener, &config);
        client::exchange(&early, b"worth the wait").unwrap();
        for _ in 0..20 {
            client::exchange(&connect(address), b"and many more").unwrap();
        }
        drop(early);
        let pid = child.id();
        crate::common::proc::signal(pid, rustix::process::Signal::TERM);
        let status = child.wait().unwrap();
        assert!(status.success(), "{status}");
    }
    // Without a process, clients wait in the manager's socket.
    let waiting = connect(address);
    waiting.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert!(matches!(client::read_to_end(&waiting), client::End::Silence(0)));
}

fn passed_socket_without_bind_is_an_error(engine: Engine) {
    if !have(&["sh"]) {
        return;
    }
    let dir = tempfile::Builder::new().prefix("tg-").tempdir_in("/tmp").unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let pool = Pool::new("web").backend("a", "127.0.0.1:9");
    let config = dir.path().join("tidegate.toml");
    let admin = format!("unix:{}", dir.path().join("admin.sock").display());
    std::fs::write(&config, Conf::simple(engine, pool).render(&admin, "off")).unwrap();
    let status = run_with(&listener, &config).wait().unwrap();
    assert_eq!(status.code(), Some(3));
    let said = std::fs::read_to_string(config.with_extension("log")).unwrap();
    let named = format!("no bind in the configuration matches {}", listener.local_addr().unwrap());
    assert!(said.contains(&named) && said.contains("front"), "{said}");
}

/// Passes standard input and standard output on as fd 3 and 4.
const ACTIVATE_TWO: &str = "exec 3<&0 4<&1; exec 0</dev/null 1>/dev/null; \
                            export LISTEN_PID=$$; exec \"$@\"";

/// A service manager with a socket file and an abstract socket.
struct UnixManager {
    file: UnixListener,
    path: PathBuf,
    abstract_socket: UnixListener,
    name: UnixAddr,
    config: PathBuf,
    dir: tempfile::TempDir,
}

impl UnixManager {
    fn new() -> UnixManager {
        let dir = tempfile::Builder::new().prefix("tg-").tempdir_in("/tmp").unwrap();
        let path = dir.path().join("web.sock");
        let file = UnixListener::bind(&path).unwrap();
        // `SocketMode=` of a unit. Tidegate's default is another one.
        std::fs::set_permissions(&path, Permissions::from_mode(0o620)).unwrap();
        let name = UnixAddr::from_abstract_name(dir.path().as_os_str().as_bytes()).unwrap();
        let abstract_socket = UnixListener::bind_addr(&name).unwrap();
        let config = dir.path().join("tidegate.toml");
        UnixManager { file, path, abstract_socket, name, config, dir }
    }

    fn configure(&self, conf: &Conf) {
        let admin = format!("unix:{}", self.dir.path().join("admin.sock").display());
        let text = conf.render(&admin, "off");
        let tcp = format!("bind = [\"{}\"]", conf.address("web"));
        let (path, name) = (self.path.display(), self.dir.path().display());
        let binds = format!("bind = [\"unix:{path}\", \"unix:@{name}\"]");
        assert!(text.contains(&tcp), "{text}");
        std::fs::write(&self.config, text.replace(&tcp, &binds)).unwrap();
    }

    fn start(&self, single: bool) -> std::process::Child {
        std::process::Command::new("sh")
            .args(["-c", ACTIVATE_TWO, "sh", PROGRAM, "run", "--config"])
            .arg(&self.config)
            .args(single.then_some("--single"))
            .env("LISTEN_FDS", "2")
            .env("LISTEN_FDNAMES", "file:abstract")
            .stdin(OwnedFd::from(self.file.try_clone().unwrap()))
            .stdout(OwnedFd::from(self.abstract_socket.try_clone().unwrap()))
            .stderr(std::fs::File::create(self.config.with_extension("log")).unwrap())
            .spawn()
            .unwrap()
    }

    fn connect_both(&self) -> [UnixStream; 2] {
        [UnixStream::connect(&self.path).unwrap(), UnixStream::connect_addr(&self.name).unwrap()]
    }

    /// The file, as `SocketMode=` has made it.
    fn assert_file(&self, inode: u64) {
        let file = std::fs::metadata(&self.path).expect("the file belongs to the manager");
        assert_eq!((file.ino(), file.permissions().mode() & 0o7777), (inode, 0o620));
    }
}

#[track_caller]
fn unix_echoes(mut stream: &UnixStream, text: &[u8]) {
    stream.set_read_timeout(Some(crate::common::patience(secs(20)))).unwrap();
    stream.write_all(text).unwrap();
    let mut answer = vec![0; text.len()];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer, text);
}

fn passed_unix_sockets_serve_over_upgrades_and_stay_with_the_manager(engine: Engine) {
    if !have(&["sh"]) {
        return;
    }
    let backend = ScriptedBackend::start(backend::echo());
    let manager = UnixManager::new();
    let inode = std::fs::metadata(&manager.path).unwrap().ino();
    manager.configure(&Conf::simple(engine, Pool::new("web").backend("a", backend.address())));
    let admin = manager.dir.path().join("admin.sock");
    for single in [false, true] {
        // Connected before any process serves, which socket activation allows.
        let early = manager.connect_both();
        let mut child = manager.start(single);
        early.iter().for_each(|stream| unix_echoes(stream, b"worth the wait"));
        eventually(secs(20), "the admin API answers", || {
            http::over_unix(&admin, "GET", "/ready").is_ok_and(|answer| answer.status == 200)
        });
        manager.assert_file(inode);
        crate::common::upgrade::adopt_orphans();
        let answer = http::over_unix(&admin, "POST", "/v1/upgrade").unwrap();
        assert_eq!(answer.status, 200, "{}", answer.body);
        let new = answer.json()["pid"].as_u64().unwrap() as u32;
        early.iter().for_each(|stream| unix_echoes(stream, b"old process"));
        manager.connect_both().iter().for_each(|stream| unix_echoes(stream, b"new process"));
        drop(early);
        let service = if single { new } else { child.id() };
        crate::common::proc::signal(service, rustix::process::Signal::TERM);
        let status = child.wait().unwrap();
        assert!(status.success(), "{status}");
        eventually(secs(20), "every process has ended", || crate::common::proc::is_dead(new));
        // Without a process, clients wait in the manager's sockets.
        manager.assert_file(inode);
        for waiting in manager.connect_both() {
            waiting.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
            let kind = (&waiting).read(&mut [0]).unwrap_err().kind();
            assert!(matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut), "{kind:?}");
        }
    }
}

fn passed_unix_socket_without_bind_is_an_error(engine: Engine) {
    if !have(&["sh"]) {
        return;
    }
    let manager = UnixManager::new();
    let conf = Conf::simple(engine, Pool::new("web").backend("a", "127.0.0.1:9"));
    let admin = format!("unix:{}", manager.dir.path().join("admin.sock").display());
    std::fs::write(&manager.config, conf.render(&admin, "off")).unwrap();
    for single in [false, true] {
        assert_eq!(manager.start(single).wait().unwrap().code(), Some(3));
        let said = std::fs::read_to_string(manager.config.with_extension("log")).unwrap();
        let (path, name) = (manager.path.display(), manager.dir.path().display());
        let named = format!("no bind in the configuration matches unix:{path} (file)");
        assert!(said.contains(&named), "{said}");
        assert!(said.contains(&format!("unix:@{name} (abstract)")), "{said}");
        assert!(manager.path.exists());
    }
}
