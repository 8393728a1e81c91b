//! Open sessions move to backends that have joined (`tidegate rebalance`).

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{connect, exchange};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, exclusive, long, measured, ms, on_every_engine, patience, secs};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

on_every_engine!(
    sessions_are_even_after_two_backends_join_four,
    dry_run_and_even_pools_close_nothing,
);

/// One of these many clients sends a byte at least every 100 ms.
const TALKER: usize = 10;

const IDLE: Duration = Duration::from_millis(500);

/// A client with a long session. It connects again when its session ends.
struct Client {
    stream: TcpStream,
    talks: bool,
    spoke: Instant,
}

/// What the clients have seen.
#[derive(Debug, Default)]
struct Seen {
    closed: u64,
    /// Sessions that were closed although a byte had moved within half of [`IDLE`].
    closed_in_use: u64,
    reset: u64,
}

// === impl Client ===

impl Client {
    fn open(address: SocketAddr, talks: bool) -> Client {
        let stream = connect(address);
        exchange(&stream, b"hello").expect("an echo");
        stream.set_nonblocking(true).expect("nonblocking");
        Client { stream, talks, spoke: Instant::now() }
    }

    /// Sends a byte, and reads what has arrived. Returns false if the session has ended.
    fn turn(&mut self, seen: &mut Seen) -> bool {
        if self.talks && self.stream.write(b"x").is_ok() {
            self.spoke = Instant::now();
        }
        match self.stream.read(&mut [0; 64]) {
            Ok(0) => {
                seen.closed += 1;
                seen.closed_in_use += u64::from(self.talks && self.spoke.elapsed() < IDLE / 2);
                false
            }
            Err(error) if error.kind() != ErrorKind::WouldBlock => {
                seen.reset += 1;
                false
            }
            _ => true,
        }
    }
}

/// Keeps the sessions open until told to stop.
fn run(mut clients: Vec<Client>, address: SocketAddr, stop: &AtomicBool) -> Seen {
    let mut seen = Seen::default();
    while !stop.load(Ordering::Relaxed) {
        for client in &mut clients {
            if !client.turn(&mut seen) {
                *client = Client::open(address, client.talks);
            }
        }
        thread::sleep(ms(50));
    }
    seen
}

fn pool(backends: &[ScriptedBackend]) -> Pool {
    let names = ["a", "b", "c", "d", "e", "f"];
    let all = names.iter().zip(backends);
    all.fold(Pool::new("web"), |pool, (name, backend)| pool.backend(name, backend.address()))
}

fn grow(proxy: &mut TestProxy, backends: &[ScriptedBackend]) {
    let mut conf = proxy.conf();
    *conf.pool_mut("web") = pool(backends);
    proxy.reload(conf);
}

fn sessions(proxy: &TestProxy) -> Vec<u64> {
    let status = proxy.status();
    let backends = status["pools"][0]["backends"].as_array().expect("a list").clone();
    backends.iter().map(|one| one["sessions_active"].as_u64().expect("a count")).collect()
}

fn sessions_are_even_after_two_backends_join_four(engine: Engine) {
    let _share = exclusive::shared();
    let clients = if long() { 2_000 } else { 400 };
    let backends: Vec<_> = (0..6).map(|_| ScriptedBackend::start(backend::echo())).collect();
    let mut proxy = TestProxy::start(Conf::simple(engine, pool(&backends[..4])));
    let address = proxy.addr("web");
    let open = |at| Client::open(address, at % TALKER == 0);
    let all: Vec<Client> = (0..clients).map(open).collect();
    let (stop, ms_idle) = (AtomicBool::new(false), IDLE.as_millis());
    let seen = thread::scope(|scope| {
        let running = scope.spawn(|| run(all, address, &stop));
        grow(&mut proxy, &backends);
        let before = sessions(&proxy);
        assert_eq!(before[4..], [0, 0], "{before:?}");
        let began = Instant::now();
        let (rate, idle) = (format!("{}/s", clients / 8), format!("{ms_idle}ms"));
        let done = proxy.cli(&["rebalance", "web", "--rate", &rate, "--idle", &idle]);
        let took = began.elapsed();
        stop.store(true, Ordering::Relaxed);
        let text = String::from_utf8_lossy(&done.stdout).into_owned();
        assert_eq!(done.status.code(), Some(0), "{text} {done:?}");
        assert!(text.contains("pool web is even"), "{text}");
        assert!(took < patience(secs(40)), "{took:?}");
        let seen = running.join().expect("the clients");
        let last = text.lines().last().unwrap_or_default().to_owned();
        measured(&format!("{clients} sessions: {before:?} before; {last}"));
        let after = sessions(&proxy);
        let most = (clients as f64 / 6.0 * 1.1).ceil() as u64;
        assert!(after.iter().all(|sessions| *sessions <= most), "{after:?}");
        seen
    });
    measured(&format!("{seen:?}"));
    assert_eq!((seen.closed_in_use, seen.reset), (0, 0), "{seen:?}");
    let log = proxy.wait_access_log(seen.closed as usize);
    let rebalanced: Vec<_> = log.iter().filter(|line| line["cause"] == "rebalanced").collect();
    assert_eq!(rebalanced.len() as u64, seen.closed);
    assert!(rebalanced.iter().all(|line| line["bytes_undelivered"] == 0));
}

fn dry_run_and_even_pools_close_nothing(engine: Engine) {
    let backends: Vec<_> = (0..2).map(|_| ScriptedBackend::start(backend::echo())).collect();
    let mut proxy = TestProxy::start(Conf::simple(engine, pool(&backends[..1])));
    let clients: Vec<_> = (0..10).map(|_| Client::open(proxy.addr("web"), false)).collect();
    let even = proxy.cli_ok(&["rebalance", "web", "--idle", "1ms"]);
    assert!(even.starts_with("pool web is even: 10 sessions"), "{even}");
    grow(&mut proxy, &backends);
    let shown = proxy.cli_ok(&["rebalance", "web", "--dry-run", "--idle", "1ms"]);
    assert!(shown.starts_with("pool web: 10 sessions, 4 above"), "{shown}");
    assert!(shown.contains("about 8 sessions in"), "{shown}");
    assert_eq!(sessions(&proxy), [10, 0]);
    assert_eq!(proxy.cli(&["rebalance", "nothing"]).status.code(), Some(1));

    let mut hashed = proxy.conf();
    hashed.pool_mut("web").keys = "balance = \"source-hash\"\n".into();
    proxy.reload(hashed);
    let refused = proxy.cli(&["rebalance", "web"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("same backend"), "{refused:?}");
    drop(clients);
}
