//! Backends that are known only by heartbeats. The new process knows them before it serves.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, connect};
use crate::common::conf::{Conf, Pool};
use crate::common::ports::free_port;
use crate::common::proxy::TestProxy;
use crate::common::stable::Steady;
use crate::common::{Engine, eventually, exclusive, long, measured, ms, proc, secs};
use rustix::process::Signal;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tidegate_heartbeat::SenderState;
use tidegate_heartbeat::keys::Secret;
use tidegate_heartbeat::sender::{Sender, SenderSettings};
use tidegate_heartbeat::wire::{HeartbeatFields, SenderIdentity, encode};

/// Only the control thread is involved, so the test runs on one engine.
#[test]
fn registered_backends_serve_without_a_gap() {
    serve_without_a_gap(ms(50), "5s");
}

/// The new process cannot wait for a heartbeat of each sender with this interval.
#[test]
fn registered_backends_with_a_long_interval_serve_without_a_gap() {
    serve_without_a_gap(secs(5), "30s");
}

/// The test waits for no heartbeat before it connects. The sockets stay open across the crash.
#[test]
fn crash_keeps_registered_backends_and_queued_heartbeats() {
    let _share = exclusive::shared();
    let mut site = Site::start(secs(5), "30s");
    // Longer than the interval at which the supervisor receives the state.
    std::thread::sleep(ms(1500));
    let before = site.proxy.pid();
    proc::signal(before, Signal::STOP);
    eventually(secs(5), "every thread has stopped", || proc::is_stopped(before));
    // Each change of state is sent immediately.
    let leaving = site.senders.remove(0);
    leaving.set_state(SenderState::Draining);
    std::thread::sleep(ms(100));
    // The sender sends `stopping` and nothing after that.
    drop(leaving);
    proc::signal(before, Signal::KILL);
    let answer = client::exchange(&connect(site.proxy.addr("web")), b"GET / HTTP/1.0\r\n\r\n");
    assert!(answer.expect("served").starts_with(b"HTTP/1."));
    let socket = site.proxy.dir().join("admin.sock");
    eventually(secs(10), "another process serves", || {
        proc::is_dead(before)
            && crate::common::http::over_unix(&socket, "GET", "/ready")
                .is_ok_and(|answer| answer.status == 200)
    });
    site.proxy.find_serving();
    eventually(secs(10), "heartbeats sent during the crash are accepted", || site.known() == 1);
    // The same for an address added by a reload.
    let mut moved = site.proxy.conf();
    let to: SocketAddr = (Ipv4Addr::LOCALHOST, free_port()).into();
    moved.heartbeat = moved.heartbeat.replace(&site.to.to_string(), &to.to_string());
    site.proxy.reload(moved);
    let before = site.proxy.pid();
    proc::signal(before, Signal::KILL);
    assert!(UdpSocket::bind(to).is_err(), "the address is free for a moment");
    // The supervisor closes its copy of the removed socket.
    eventually(secs(5), "the removed address is free", || UdpSocket::bind(site.to).is_ok());
    eventually(secs(10), "another process serves", || {
        proc::is_dead(before)
            && crate::common::http::over_unix(&socket, "GET", "/ready")
                .is_ok_and(|answer| answer.status == 200)
    });
    site.proxy.find_serving();
    site.proxy.rebaseline();
}

/// A Tidegate process with two backends registered by heartbeats.
struct Site {
    proxy: TestProxy,
    to: SocketAddr,
    senders: Vec<Sender>,
    _servers: [ScriptedBackend; 2],
    _dir: tempfile::TempDir,
}

/// A configuration with one pool in which senders can register. Returns the heartbeat address.
fn conf(dir: &Path, interval: Duration, ttl: &str) -> (Conf, SocketAddr) {
    let key = dir.join("key");
    std::fs::write(&key, [7; 32]).unwrap();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    let to: SocketAddr = (Ipv4Addr::LOCALHOST, free_port()).into();
    let section = format!(
        "[heartbeat]\nlisten = \"{to}\"\n[[heartbeat.key]]\nid = 1\nfile = \"{}\"\n\
         pools = [\"web\"]\naddresses = [\"127.0.0.0/8\"]\n",
        key.display()
    );
    let heartbeat = format!(
        "register = true\ninterval = \"{}\"\nttl = \"{ttl}\"\nforget_after = \"30s\"",
        humantime::format_duration(interval)
    );
    let pool = Pool { heartbeat, ..Pool::new("web") };
    (Conf { heartbeat: section, ..Conf::simple(Engine::Epoll, pool) }, to)
}

impl Site {
    fn start(interval: Duration, ttl: &str) -> Site {
        let dir = tempfile::tempdir().unwrap();
        let (conf, to) = conf(dir.path(), interval, ttl);
        let proxy = TestProxy::start(conf);
        let servers =
            ["a", "b"].map(|name| (name, ScriptedBackend::start(backend::http(name, 200))));
        let senders = servers.each_ref().map(|(name, server)| {
            let identity = SenderIdentity::new("web", name, server.socket_address()).unwrap();
            let secret = Secret::new(&[7; 32]).unwrap();
            let settings = SenderSettings { to: vec![to], identity, key_id: 1, secret, interval };
            let sender = Sender::start(settings).unwrap();
            sender.set_state(SenderState::Ready);
            sender
        });
        let servers = servers.map(|(_, server)| server);
        let senders = senders.into();
        let site = Site { proxy, to, senders, _servers: servers, _dir: dir };
        eventually(secs(10), "both backends are registered", || site.known() == 2);
        site
    }

    fn known(&self) -> usize {
        let backends = self.proxy.status()["pools"][0]["backends"].as_array().unwrap().clone();
        backends.iter().filter(|backend| backend["eligible"] == true).count()
    }
}

fn serve_without_a_gap(interval: Duration, ttl: &str) {
    let _share = exclusive::shared();
    let mut site = Site::start(interval, ttl);
    let steady = Steady::start(site.proxy.addr("web"), 2);
    for _ in 0..4 {
        let began = std::time::Instant::now();
        let old = site.proxy.upgrade();
        let took = began.elapsed();
        assert_eq!(site.known(), 2, "known before the new process serves, after {took:?}");
        site.proxy.wait_gone(old, secs(5));
    }
    let attempts = steady.stop();
    let failed: Vec<_> = attempts.iter().filter(|attempt| attempt.result.is_err()).collect();
    assert!(failed.is_empty(), "{} of {}: {:?}", failed.len(), attempts.len(), failed[0]);
    assert!(attempts.len() > 50);
    site.proxy.rebaseline();
}

/// Sends the heartbeats of `count` senders from one socket.
struct ManySenders {
    socket: UdpSocket,
    to: SocketAddr,
    secret: Secret,
    port: u16,
    count: u16,
    interval: Duration,
}

impl ManySenders {
    fn send(&self, number: u16, sequence: u64) {
        let [high, low] = number.to_be_bytes();
        let address = SocketAddr::from((Ipv4Addr::new(127, 2, high, low), self.port));
        let identity = SenderIdentity::new("web", &format!("s{number}"), address).unwrap();
        let sent = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
        let draft = HeartbeatFields {
            identity: &identity,
            key_id: 1,
            incarnation: 1,
            sequence,
            sent,
            interval: self.interval,
            state: SenderState::Ready,
            weight: 1,
            in_flight: 0,
            load: 0,
        };
        // A full receive queue can drop the datagram. The next interval sends another.
        let _ = self.socket.send_to(&encode(&draft, &self.secret), self.to);
    }

    /// Sends one heartbeat per sender and interval, spread over the interval, until `over` is
    /// set.
    fn run(&self, over: &AtomicBool) {
        for sequence in 1.. {
            let began = Instant::now();
            for number in 0..self.count {
                let due = self.interval * u32::from(number) / u32::from(self.count);
                std::thread::sleep(due.saturating_sub(began.elapsed()));
                if over.load(Ordering::Relaxed) {
                    return;
                }
                self.send(number, sequence);
            }
        }
    }
}

mod alone {
    use super::*;

    #[test]
    fn thousands_of_senders_serve_without_a_gap() {
        let _share = exclusive::alone();
        let (count, interval) = if long() { (10_000, secs(5)) } else { (1_000, secs(1)) };
        let dir = tempfile::tempdir().unwrap();
        let (mut conf, to) = conf(dir.path(), interval, "30s");
        conf.pool_mut("web").heartbeat += &format!("\nbackends_max = {count}");
        let mut proxy = TestProxy::start(conf);
        let everywhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, free_port()));
        let _server = ScriptedBackend::start_on(everywhere, backend::http("s", 200));
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let secret = Secret::new(&[7; 32]).unwrap();
        let many = ManySenders { socket, to, secret, port: everywhere.port(), count, interval };
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| many.run(&over));
            let _ends = Ends(&over);
            let pool = |proxy: &TestProxy| proxy.status()["pools"][0].clone();
            let eligible = |proxy: &TestProxy| {
                let all = pool(proxy)["backends"].as_array().unwrap().clone();
                all.iter().filter(|backend| backend["eligible"] == true).count()
            };
            eventually(secs(120), "all backends are registered", || {
                eligible(&proxy) == usize::from(count)
            });
            let steady = Steady::start(proxy.addr("web"), 2);
            for _ in 0..2 {
                let began = Instant::now();
                let old = proxy.upgrade();
                let took = began.elapsed();
                measured(&format!(
                    "{count} senders with an interval of {interval:?}: upgraded in {took:?}"
                ));
                assert_eq!(
                    eligible(&proxy),
                    usize::from(count),
                    "known before the new process serves"
                );
                proxy.wait_gone(old, secs(10));
            }
            // Every sender has sent another heartbeat, and no backend is down.
            std::thread::sleep(interval + secs(1));
            assert_eq!(eligible(&proxy), usize::from(count));
            let attempts = steady.stop();
            let failed: Vec<_> =
                attempts.iter().filter(|attempt| attempt.result.is_err()).collect();
            assert!(failed.is_empty(), "{} of {}: {:?}", failed.len(), attempts.len(), failed[0]);
        });
        proxy.rebaseline();
    }

    /// Ends the senders even after a panic. Otherwise the thread scope would wait forever.
    struct Ends<'a>(&'a AtomicBool);

    impl Drop for Ends<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}
