//! Senders with rejected heartbeats. The log, `status` and `explain` name the sender and the
//! reason.
//!
//! Only the control thread is involved, so the tests run on one engine.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::conf::{Conf, Pool};
use crate::common::ports::free_port;
use crate::common::proxy::{PROGRAM, TestProxy};
use crate::common::{Engine, eventually, exclusive, ms, secs};
use crate::heartbeats::{Keys, wait};
use rustix::process::{Pid, Signal, kill_process};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::UNIX_EPOCH;
use tidegate_heartbeat::SenderState;
use tidegate_heartbeat::keys::Secret;
use tidegate_heartbeat::wire::{HeartbeatFields, SenderIdentity, encode};

/// A sender with its own clock and secret, both of which can be wrong.
struct ManualSender {
    socket: UdpSocket,
    to: SocketAddr,
    secret: Secret,
    name: &'static str,
    address: SocketAddr,
    /// Its clock minus the clock of this host, in milliseconds.
    skew: i64,
    sequence: u64,
}

/// A process that is killed with its test, even if it is stopped.
struct Process(Child);

impl ManualSender {
    fn new(keys: &Keys, name: &'static str, address: SocketAddr) -> ManualSender {
        ManualSender {
            socket: UdpSocket::bind("127.0.0.1:0").unwrap(),
            to: keys.to(),
            secret: Secret::new(&[1; 32]).unwrap(),
            name,
            address,
            skew: 0,
            sequence: 0,
        }
    }

    fn send(&mut self, state: SenderState) {
        self.sequence += 1;
        let identity = SenderIdentity::new("web", self.name, self.address).unwrap();
        let now = std::time::SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
        let draft = HeartbeatFields {
            identity: &identity,
            key_id: 1,
            incarnation: 1,
            sequence: self.sequence,
            sent: (now as i64 + self.skew) as u64,
            interval: ms(100),
            state,
            weight: 1,
            in_flight: 0,
            load: 0,
        };
        self.socket.send_to(&encode(&draft, &self.secret), self.to).unwrap();
    }
}

impl Process {
    fn start(arguments: &[&str]) -> Process {
        let mut command = Command::new(PROGRAM);
        command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null());
        Process(command.spawn().unwrap())
    }

    fn stop(&self) {
        kill_process(Pid::from_child(&self.0), Signal::STOP).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn warnings(proxy: &TestProxy, of: &str) -> usize {
    let log = proxy.log();
    log.lines().filter(|line| line.contains("heartbeats rejected") && line.contains(of)).count()
}

#[test]
fn sender_with_a_slow_clock_is_reported_with_its_skew() {
    let _share = exclusive::shared();
    let keys = Keys::new();
    let one = ScriptedBackend::start(backend::echo());
    let pool = Pool::new("web").heartbeat("require = true").backend("a", one.address());
    let proxy = keys.start(pool);
    let mut slow = ManualSender::new(&keys, "a", one.socket_address());
    slow.skew = -300_400;
    eventually(secs(10), "a warning", || {
        slow.send(SenderState::Ready);
        warnings(&proxy, "backend=\"a\"") + warnings(&proxy, "backend=a") > 0
    });
    for _ in 0..20 {
        slow.send(SenderState::Ready);
    }
    let rejected = |proxy: &TestProxy| proxy.backend("web", "a")["heartbeat"]["rejected"].clone();
    eventually(secs(10), "all heartbeats are counted", || {
        rejected(&proxy)["total"] == slow.sequence
    });
    let last = rejected(&proxy);
    assert_eq!((&last["reason"], &last["signed"]), (&"stale".into(), &true.into()));
    let skew = last["skew_seconds"].as_f64().unwrap();
    assert!((-305.0..=-300.0).contains(&skew), "{last:#}");
    let listed = proxy.status()["heartbeat"]["rejections"].clone();
    assert_eq!((&listed[0]["backend"], &listed[1]), (&"a".into(), &serde_json::Value::Null));
    let explained = proxy.cli_ok(&["explain", "web/a"]);
    assert!(explained.contains("rejected: stale, its clock is 5m behind"), "{explained}");
    assert!(explained.contains("synchronise the clocks"), "{explained}");
    assert!(proxy.cli_ok(&["status"]).contains("rejected: web/a"));
    let log = proxy.log();
    assert_eq!(warnings(&proxy, "5m behind"), 1, "one per minute: {log}");

    // The clock is correct again, and the series of rejections ends.
    slow.skew = 0;
    eventually(secs(10), "the heartbeat is accepted", || {
        slow.send(SenderState::Ready);
        proxy.backend("web", "a")["eligible"] == true
    });
    assert_eq!(rejected(&proxy)["in_a_row"], 0);
    let explained = proxy.explained("web", "a");
    assert!(!explained["why"].as_str().unwrap().contains("rejected"), "{explained:#}");
}

#[test]
fn sender_with_a_wrong_secret_is_reported_as_unsigned() {
    let _share = exclusive::shared();
    let keys = Keys::new();
    let one = ScriptedBackend::start(backend::echo());
    let pool = Pool::new("web").heartbeat("require = true").backend("a", one.address());
    let proxy = keys.start(pool);
    let mut wrong = ManualSender::new(&keys, "a", one.socket_address());
    wrong.secret = Secret::new(&[2; 32]).unwrap();
    eventually(secs(10), "a warning", || {
        wrong.send(SenderState::Ready);
        warnings(&proxy, "signature") == 1
    });
    let last = proxy.backend("web", "a")["heartbeat"]["rejected"].clone();
    assert_eq!((&last["reason"], &last["signed"]), (&"signature".into(), &false.into()));
    let explained = proxy.cli_ok(&["explain", "web/a"]);
    assert!(explained.contains("unverified heartbeats are rejected: signature"), "{explained}");
    assert!(explained.contains("compare the key files"), "{explained}");
}

#[test]
fn sender_without_a_matching_backend_is_reported() {
    let _share = exclusive::shared();
    let keys = Keys::new();
    let one = ScriptedBackend::start(backend::echo());
    let pool = Pool::new("web").heartbeat("require = true").backend("a", one.address());
    let proxy = keys.start(pool);
    let mut stranger = ManualSender::new(&keys, "b", ([127, 0, 0, 9], 80).into());
    eventually(secs(10), "a warning", || {
        stranger.send(SenderState::Ready);
        warnings(&proxy, "unknown-backend") == 1
    });
    let listed = proxy.status()["heartbeat"]["rejections"].clone();
    assert_eq!((&listed[0]["backend"], &listed[0]["signed"]), (&"b".into(), &true.into()));
    assert_eq!(listed[0]["reason"], "unknown-backend");
}

/// Writes a key file.
fn key_file(path: &Path, content: &[u8]) -> String {
    std::fs::write(path, content).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
    path.display().to_string()
}

#[test]
fn key_file_with_crlf_contains_the_same_secret() {
    let _share = exclusive::shared();
    let dir = tempfile::tempdir().unwrap();
    let text = "0123456789abcdef0123456789abcdef";
    let lf_file = key_file(&dir.path().join("unix"), format!("{text}\n").as_bytes());
    let crlf_file = key_file(&dir.path().join("dos"), format!("{text}\r\n").as_bytes());
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port())).to_string();
    let heartbeat = format!(
        "[heartbeat]\nlisten = \"{to}\"\n[[heartbeat.key]]\nid = 1\nfile = \"{lf_file}\"\n\
         pools = [\"web\"]\naddresses = [\"127.0.0.0/8\"]\n"
    );
    let conf = Conf::simple(Engine::Epoll, Pool::new("web").heartbeat("register = true"));
    let proxy = TestProxy::start(Conf { heartbeat, ..conf });
    let one = ScriptedBackend::start(backend::echo());
    let address = format!("[::ffff:127.0.0.1]:{}", one.socket_address().port());
    let arguments = ["--pool", "web", "--name", "a", "--address", &address, "--check", "none"];
    let _sidecar = Process::start(
        &[&["heartbeat", "--to", &to, "--key-id", "1", "--key-file", &crlf_file], &arguments[..]]
            .concat(),
    );
    // The address was also written as an IPv4 address mapped into IPv6.
    wait(&proxy, "web", "a", "address", one.address().to_string());
    wait(&proxy, "web", "a", "eligible", true);
}

#[test]
fn confirmation_probe_detects_a_stopped_service_and_sender() {
    let _share = exclusive::shared();
    let keys = Keys::new();
    // The regular probes and the ttl would take much longer.
    let pool = Pool::new("web")
        .heartbeat("register = true\ninterval = \"50ms\"\nttl = \"10m\"")
        .probe("kind = \"send-expect\"\nsend = \"PING\"\nexpect = \"PING\"\ninterval = \"1h\"\ntimeout = \"500ms\"");
    let proxy = keys.start(pool);
    let others = ["b", "c"].map(|_| ScriptedBackend::start(backend::echo()));
    let _sidecars = [keys.sidecar("b", &others[0]), keys.sidecar("c", &others[1])];
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port())).to_string();
    let service = Process::start(&["backend", "echo", "--listen", &address]);
    let (to, key) = (keys.to().to_string(), keys.file(1));
    let sender = Process::start(&[
        "heartbeat",
        "--to",
        &to,
        "--pool",
        "web",
        "--name",
        "a",
        "--address",
        &address,
        "--key-id",
        "1",
        "--key-file",
        &key,
        "--interval",
        "50ms",
        "--check",
        "none",
    ]);
    for name in ["a", "b", "c"] {
        wait(&proxy, "web", name, "observation", "up");
    }
    sender.stop();
    service.stop();
    assert!(std::net::TcpStream::connect(&address).is_ok(), "the kernel still accepts");
    wait(&proxy, "web", "a", "observation", "down");
    let why = proxy.explained("web", "a")["why"].to_string();
    assert!(why.contains("timed out after"), "{why}");
}
