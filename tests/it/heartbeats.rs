//! Heartbeats end to end: signed datagrams over real sockets, the sidecar, and the effect
//! on traffic.
//!
//! Tests with sessions run on both engines. The other tests concern only the control
//! thread and run on one engine.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client;
use crate::common::conf::{Conf, Pool};
use crate::common::ports::free_port;
use crate::common::proxy::{PROGRAM, TestProxy};
use crate::common::stable::{Steady, failures_since};
use crate::common::{Engine, eventually, exclusive, http, measured, ms, on_every_engine, secs};
use serde_json::Value;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, UNIX_EPOCH};
use tidegate_heartbeat::SenderState;
use tidegate_heartbeat::keys::Secret;
use tidegate_heartbeat::sender::{Sender, SenderSettings};
use tidegate_heartbeat::wire::{HeartbeatFields, SenderIdentity, encode};

on_every_engine!(
    signed_sender_registers_serves_and_leaves_without_lost_sessions,
    killed_backend_is_down_within_a_second_and_returns_in_slow_start,
    draining_sender_keeps_sessions_and_gets_no_new_sessions,
);

/// Short enough for a test and long enough for a busy machine.
const QUICK: &str = "register = true\ninterval = \"50ms\"\nttl = \"1s\"\nforget_after = \"1s\"";

/// Key files, and the port that receives heartbeats.
pub struct Keys {
    dir: tempfile::TempDir,
    port: u16,
}

/// A sidecar process. Dropping it kills the process.
pub struct Sidecar(Child);

impl Keys {
    pub fn new() -> Keys {
        Keys { dir: tempfile::tempdir().unwrap(), port: free_port() }
    }

    pub fn to(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// The path of a key file with 32 times the value `byte`.
    pub fn file(&self, byte: u8) -> String {
        let path = self.dir.path().join(format!("{byte}.key"));
        // Written only once, because a sidecar can be reading the file.
        if !path.exists() {
            std::fs::write(&path, [byte; 32]).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        }
        path.display().to_string()
    }

    /// `[heartbeat]` with keys whose id is the byte of their secret.
    pub fn section(&self, ids: &[u8]) -> String {
        let key = |id: &u8| {
            let file = self.file(*id);
            format!(
                "[[heartbeat.key]]\nid = {id}\nfile = \"{file}\"\npools = [\"web\"]\n\
                 addresses = [\"127.0.0.0/8\"]\n"
            )
        };
        let keys: String = ids.iter().map(key).collect();
        format!("[heartbeat]\nlisten = \"{}\"\n{keys}", self.to())
    }

    pub fn start(&self, pool: Pool) -> TestProxy {
        self.start_on(Engine::Epoll, pool)
    }

    fn start_on(&self, engine: Engine, pool: Pool) -> TestProxy {
        let conf = Conf::simple(engine, pool);
        TestProxy::start(Conf { heartbeat: self.section(&[1]), ..conf })
    }

    /// Starts a sender for the backend. It sends `starting` until the test sets another state.
    fn sender(&self, name: &str, backend: &ScriptedBackend, key: u8) -> Sender {
        self.sender_with(name, backend, u32::from(key), key)
    }

    fn sender_with(&self, name: &str, backend: &ScriptedBackend, key_id: u32, byte: u8) -> Sender {
        self.sender_every(name, backend, (key_id, byte), ms(50))
    }

    fn sender_every(
        &self,
        name: &str,
        backend: &ScriptedBackend,
        (key_id, byte): (u32, u8),
        interval: Duration,
    ) -> Sender {
        let settings = SenderSettings {
            to: vec![self.to()],
            identity: SenderIdentity::new("web", name, backend.socket_address()).unwrap(),
            key_id,
            secret: Secret::new(&[byte; 32]).unwrap(),
            interval,
        };
        Sender::start(settings).unwrap()
    }

    fn ready(&self, name: &str, backend: &ScriptedBackend) -> Sender {
        let sender = self.sender(name, backend, 1);
        sender.set_state(SenderState::Ready);
        sender
    }

    pub fn sidecar(&self, name: &str, backend: &ScriptedBackend) -> Sidecar {
        let (to, address) = (self.to().to_string(), backend.socket_address().to_string());
        let child = Command::new(PROGRAM)
            .args(["heartbeat", "--to", &to, "--pool", "web", "--name", name])
            .args(["--address", &address, "--key-id", "1", "--key-file", &self.file(1)])
            .args(["--interval", "50ms", "--check", "none"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Sidecar(child)
    }
}

impl Sidecar {
    /// Kills the process, so that it sends no final heartbeat.
    pub fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        self.kill();
    }
}

fn named(name: &str) -> ScriptedBackend {
    ScriptedBackend::start(backend::http(name, 200))
}

fn names(proxy: &TestProxy) -> Vec<String> {
    let status = proxy.status();
    let backends = status["pools"][0]["backends"].as_array().expect("backends").clone();
    backends.iter().map(|backend| backend["name"].as_str().unwrap_or("").to_owned()).collect()
}

/// Waits until the backend exists and its field has the value.
#[track_caller]
pub fn wait(proxy: &TestProxy, pool: &str, name: &str, field: &str, value: impl Into<Value>) {
    let value = value.into();
    eventually(secs(10), &format!("{pool}/{name} has {field} = {value}"), || {
        let path = format!("/v1/pools/{pool}/backends/{name}/explain");
        let exists = proxy.admin_request("GET", &path).status == 200;
        exists
            && names(proxy).contains(&name.to_owned())
            && proxy.backend(pool, name)[field] == value
    });
}

fn signed_sender_registers_serves_and_leaves_without_lost_sessions(engine: Engine) {
    let keys = Keys::new();
    let proxy = keys.start_on(engine, Pool::new("web").heartbeat("register = true"));
    let echo = ScriptedBackend::start(backend::echo());
    let sender = keys.sender("a", &echo, 1);
    eventually(secs(5), "the backend is registered", || names(&proxy) == ["a"]);
    assert_eq!(proxy.backend("web", "a")["eligible"], false, "the sender has not sent ready");
    sender.set_state(SenderState::Ready);
    wait(&proxy, "web", "a", "eligible", true);
    assert_eq!(proxy.backend("web", "a")["registered"], true);
    let session = client::connect(proxy.addr("web"));
    assert_eq!(client::exchange(&session, b"hello").unwrap(), b"hello");
    let said = proxy.cli_ok(&["explain", "web/a"]);
    assert!(said.contains("\nIN ROTATION: ") && said.contains("on time (required)"), "{said}");
    let left = Instant::now();
    sender.close();
    eventually(secs(2), "the backend is removed", || names(&proxy).is_empty());
    measured(&format!("removed {:?} after its final heartbeat", left.elapsed()));
    assert_eq!(client::exchange(&session, b"still here").unwrap(), b"still here");
    assert_eq!(proxy.cli(&["explain", "web/a"]).status.code(), Some(1));
}

#[test]
fn forged_heartbeats_change_nothing_and_are_counted() {
    let _share = exclusive::shared();
    let keys = Keys::new();
    let proxy = keys.start(Pool::new("web").heartbeat("register = true"));
    let (real, forged) = (named("a"), named("x"));
    let honest = keys.ready("a", &real);
    wait(&proxy, "web", "a", "eligible", true);
    let serial = proxy.status()["table_serial"].clone();
    let forger = keys.sender_with("x", &forged, 1, 9);
    forger.set_state(SenderState::Ready);
    let stranger = keys.sender_with("a", &forged, 77, 9);
    stranger.set_state(SenderState::Stopping);
    let rejected =
        |reason: &str| proxy.metric("tidegate_heartbeats_rejected_total", &[("reason", reason)]);
    eventually(secs(5), "the rejected heartbeats are counted", || {
        rejected("signature") > 3.0 && rejected("unknown-key") > 3.0
    });
    assert_eq!((names(&proxy), &proxy.status()["table_serial"]), (vec!["a".into()], &serial));
    drop((honest, forger, stranger));
}

#[test]
fn missing_heartbeats_lead_to_suspect_down_and_forgotten() {
    let _share = exclusive::shared();
    let keys = Keys::new();
    let proxy = keys.start(Pool::new("web").heartbeat(QUICK));
    let backends = ["a", "b", "c"].map(named);
    let [mut a, _b, _c] = [0, 1, 2].map(|i| keys.sidecar(["a", "b", "c"][i], &backends[i]));
    for name in ["a", "b", "c"] {
        wait(&proxy, "web", name, "eligible", true);
    }
    a.kill();
    wait(&proxy, "web", "a", "observation", "suspect");
    let suspect = proxy.backend("web", "a");
    assert_eq!(suspect["eligible"], true, "its service still answers: {suspect:#}");
    assert_eq!(suspect["effective_weight"], 0.1);
    wait(&proxy, "web", "a", "observation", "down");
    let said = proxy.cli_ok(&["explain", "web/a"]);
    assert!(said.contains("\nNOT IN ROTATION: ") && said.contains("(ttl)"), "{said}");
    eventually(secs(5), "the backend is forgotten", || !names(&proxy).contains(&"a".to_owned()));
    assert_eq!(names(&proxy).len(), 2);
}

fn killed_backend_is_down_within_a_second_and_returns_in_slow_start(engine: Engine) {
    let keys = Keys::new();
    let pool = Pool::new("web").key("slow_start = \"1s\"").heartbeat("register = true");
    let proxy = keys.start_on(engine, pool);
    let (mut failing, other) = (named("a"), named("b"));
    let address = failing.socket_address();
    let (mut sidecar, _other) = (keys.sidecar("a", &failing), keys.sidecar("b", &other));
    wait(&proxy, "web", "a", "eligible", true);
    wait(&proxy, "web", "b", "eligible", true);
    let up_for = || proxy.sender("web", "b")["detector_seconds"].as_f64().unwrap_or(0.0);
    eventually(secs(10), "the slow start of b has passed", || up_for() > 1.0);
    let steady = Steady::start(proxy.addr("web"), 2);
    sidecar.kill();
    failing.stop();
    let killed = Instant::now();
    wait(&proxy, "web", "a", "observation", "down");
    let (out_after, out) = (killed.elapsed(), Instant::now());
    measured(&format!("out after {out_after:?}"));
    assert!(out_after < secs(2), "{out_after:?}");
    let restarted = ScriptedBackend::start_on(address, backend::http("a", 200));
    let _sidecars = keys.sidecar("a", &restarted);
    wait(&proxy, "web", "a", "eligible", true);
    let ramping = proxy.backend("web", "a");
    assert!(ramping["ramp_percent"].as_u64().unwrap() < 100, "{ramping:#}");
    wait(&proxy, "web", "a", "ramp_percent", 100);
    assert!(proxy.sender("web", "a")["downs_total"].as_u64() >= Some(1));
    let failed = failures_since(&steady.stop(), out).len();
    assert_eq!(failed, 0, "new sessions fail after the removal");
}

#[test]
fn keys_and_addresses_can_change_while_senders_run() {
    let _share = exclusive::shared();
    let keys = Keys::new();
    let mut proxy = keys.start(Pool::new("web").heartbeat("register = true"));
    let (one, two) = (named("a"), named("b"));
    let old = keys.ready("a", &one);
    wait(&proxy, "web", "a", "eligible", true);
    let both = Conf { heartbeat: keys.section(&[1, 2]), ..proxy.conf() };
    proxy.reload(both);
    let new = keys.sender("b", &two, 2);
    new.set_state(SenderState::Ready);
    wait(&proxy, "web", "b", "eligible", true);
    let eligible = |proxy: &TestProxy| proxy.backend("web", "a")["eligible"].clone();
    assert_eq!(eligible(&proxy), true);
    let only_new = Conf { heartbeat: keys.section(&[2]), ..proxy.conf() };
    proxy.reload(only_new);
    eventually(secs(5), "the old key is rejected", || {
        proxy.metric("tidegate_heartbeats_rejected_total", &[("reason", "unknown-key")]) > 0.0
    });
    assert_eq!(proxy.backend("web", "b")["observation"], "up");
    let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
    let elsewhere = keys.section(&[1, 2]).replace(
        &format!("listen = \"{}\"", keys.to()),
        &format!("listen = [\"{}\", \"{}\"]", keys.to(), taken.local_addr().unwrap()),
    );
    let generation = proxy.generation();
    let refused = proxy.render(&Conf { heartbeat: elsewhere, ..proxy.conf() });
    proxy.rewrite_by_rename(&refused);
    let answer = proxy.admin_request("POST", "/v1/reload");
    assert_eq!(answer.status, 422, "{}", answer.body);
    assert!(answer.body.contains("cannot listen for heartbeats"), "{}", answer.body);
    assert_eq!(proxy.generation(), generation);
    assert_eq!(proxy.backend("web", "b")["observation"], "up");
    drop((old, new));
}

#[test]
fn registrations_stop_at_backends_max() {
    let _share = exclusive::shared();
    let keys = Keys::new();
    let proxy = keys.start(Pool::new("web").heartbeat("register = true\nbackends_max = 2"));
    let backends = ["a", "b", "c", "d"].map(named);
    let _senders: Vec<Sender> =
        backends.iter().zip(["a", "b", "c", "d"]).map(|(b, name)| keys.ready(name, b)).collect();
    let full = || proxy.metric("tidegate_heartbeats_rejected_total", &[("reason", "pool-full")]);
    eventually(secs(5), "other senders are rejected", || full() > 3.0);
    assert_eq!(names(&proxy).len(), 2);
}

fn draining_sender_keeps_sessions_and_gets_no_new_sessions(engine: Engine) {
    let keys = Keys::new();
    let proxy = keys.start_on(engine, Pool::new("web").heartbeat("register = true"));
    let [one, two] = ["a", "b"].map(|name| ScriptedBackend::start(backend::greet(name)));
    let draining = keys.ready("a", &one);
    wait(&proxy, "web", "a", "eligible", true);
    let (session, name) = greeted(&proxy);
    assert_eq!(name, b'a');
    let _other = keys.ready("b", &two);
    wait(&proxy, "web", "b", "eligible", true);
    draining.set_state(SenderState::Draining);
    wait(&proxy, "web", "a", "eligible", false);
    // The drain takes effect with the next table.
    let all_elsewhere = || (0..10).all(|_| greeted(&proxy).1 == b'b');
    eventually(secs(2), "new sessions go to b", all_elsewhere);
    assert_eq!(client::exchange(&session, b"still here").unwrap(), b"still here");
    draining.set_state(SenderState::Ready);
    wait(&proxy, "web", "a", "eligible", true);
    eventually(secs(5), "a serves again", || greeted(&proxy).1 == b'a');
}

/// Opens a session. Returns it with the first byte of the backend's greeting.
fn greeted(proxy: &TestProxy) -> (TcpStream, u8) {
    let (mut session, mut name) = (client::connect(proxy.addr("web")), [0]);
    session.read_exact(&mut name).unwrap();
    (session, name[0])
}

#[test]
fn required_heartbeat_decides_for_backends_of_the_file() {
    let _share = exclusive::shared();
    let keys = Keys::new();
    let (one, two) = (named("a"), named("b"));
    let pool = Pool::new("web")
        .heartbeat("require = true")
        .backend("a", one.address())
        .backend("b", two.address());
    let proxy = keys.start(pool);
    assert_eq!(proxy.backend("web", "a")["eligible"], false);
    let sender = keys.ready("a", &one);
    wait(&proxy, "web", "a", "eligible", true);
    assert_eq!(http::over_tcp(proxy.addr("web"), "/").unwrap().body, "a");
    sender.set_state(SenderState::Draining);
    wait(&proxy, "web", "a", "eligible", false);
    assert!(names(&proxy).contains(&"b".into()));
}

/// Sends the heartbeats of a thousand senders from one socket.
struct ManySenders {
    socket: UdpSocket,
    to: SocketAddr,
    secret: Secret,
    port: u16,
}

impl ManySenders {
    fn send(&self, number: u16, sequence: u64, state: SenderState) {
        let [high, low] = number.to_be_bytes();
        let address = SocketAddr::from((Ipv4Addr::new(127, 2, high, low), self.port));
        let identity = SenderIdentity::new("web", &format!("s{number}"), address).unwrap();
        let sent = std::time::SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let sent = sent.as_millis() as u64;
        let draft = HeartbeatFields {
            identity: &identity,
            key_id: 1,
            incarnation: 1,
            sequence,
            sent,
            interval: secs(1),
            state,
            weight: 1,
            in_flight: 0,
            load: 0,
        };
        self.socket.send_to(&encode(&draft, &self.secret), self.to).unwrap();
    }
}

mod alone {
    use super::*;

    /// Each sender lives for a second, which is ten times the pause between two tables. The pool
    /// always has backends in rotation, even if their first probes are late.
    const ALIVE: u16 = 1000;

    #[test]
    fn a_thousand_registrations_per_second_lose_no_sessions() {
        let _share = exclusive::alone();
        let keys = Keys::new();
        let proxy = keys.start(Pool::new("web").heartbeat("register = true\nbackends_max = 3000"));
        let everywhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, free_port()));
        let server = ScriptedBackend::start_on(everywhere, backend::http("s", 200));
        let senders = ManySenders {
            socket: UdpSocket::bind("127.0.0.1:0").unwrap(),
            to: keys.to(),
            secret: Secret::new(&[1; 32]).unwrap(),
            port: everywhere.port(),
        };
        eventually(secs(5), "the first backends are registered", || {
            // A busy host can drop some; a repeated one is ignored.
            (0..ALIVE).for_each(|number| senders.send(number, 1, SenderState::Ready));
            proxy.status()["pools"][0]["registered"] == ALIVE
        });
        eventually(secs(5), "the pool serves", || http::over_tcp(proxy.addr("web"), "/").is_ok());
        let steady = Steady::start(proxy.addr("web"), 2);
        let published =
            || proxy.metric("tidegate_tables_published_total", &[("reason", "heartbeat")]);
        let (before, start) = (published(), Instant::now());
        let unlogged = || proxy.metric("tidegate_transitions_unlogged_total", &[]);
        let sessions = || proxy.metric("tidegate_sessions_total", &[]);
        // At least 3 s, and on a busy host until enough has happened.
        let is_enough = |number: u16| {
            number >= ALIVE + 3000
                && number.is_multiple_of(500)
                && published() - before >= 5.0
                && sessions() > 50.0
                && unlogged() > 1000.0
                && server.accepted() > 1000
        };
        let mut number = ALIVE;
        while !is_enough(number) && number < 30_000 {
            // 1,000 per second, independent of the scheduler.
            while start.elapsed() < Duration::from_millis(u64::from(number - ALIVE)) {
                std::thread::sleep(ms(1));
            }
            senders.send(number, 1, SenderState::Ready);
            senders.send(number - ALIVE, 2, SenderState::Stopping);
            number += 1;
        }
        let (tables, took) = (published() - before, start.elapsed());
        let attempts = steady.stop();
        let failed = failures_since(&attempts, start);
        measured(&format!("{tables} tables in {took:?}, {} sessions", attempts.len()));
        assert!(tables <= took.as_secs_f64() * 10.0 + 2.0, "{tables} tables in {took:?}");
        assert!(tables >= 5.0, "too few tables for new backends: {tables}");
        assert!(failed.is_empty(), "{} failed, first: {:?}", failed.len(), failed.first());
        let lines = proxy.log().lines().filter(|line| line.contains("pool=web")).count() as f64;
        assert!(lines < (took.as_secs_f64() + 5.0) * 60.0, "{lines} lines in {took:?}");
        assert!(unlogged() > 1000.0 && proxy.log().contains("backend state changes not logged"));
        assert!(attempts.len() > 50 && server.accepted() > 1000, "{}", server.accepted());
    }
}
