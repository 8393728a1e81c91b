//! `on_down` over an upgrade: open sessions of old processes when their backend goes down.
//!
//! Only the new process knows the state of backends, and orders the reset.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, End, connect, echoes};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, on_every_engine, patience, secs};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Instant;

on_every_engine!(
    backend_that_goes_down_after_upgrades_loses_the_sessions_of_every_process,
    time_of_on_down_continues_over_an_upgrade,
    backend_that_is_down_before_an_upgrade_loses_no_session_twice,
);

/// A backend whose probes go to a port of their own, so that it can be down with open sessions.
struct DownBackend {
    backend: ScriptedBackend,
    probes: Option<TcpListener>,
    port: SocketAddr,
    pool: &'static str,
}

impl DownBackend {
    fn start(pool: &'static str) -> DownBackend {
        let probes = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = probes.local_addr().unwrap();
        let backend = ScriptedBackend::start(backend::echo());
        DownBackend { backend, probes: Some(probes), port, pool }
    }

    fn pool(&self, keys: &str) -> Pool {
        let port = self.port.port();
        let probe = "kind = \"tcp\"\ninterval = \"100ms\"\ntimeout = \"100ms\"\nfall = 2\nrise = 1";
        Pool::new(self.pool)
            .key(keys)
            .probe(&format!("{probe}\nport = {port}"))
            .backend("a", self.backend.address())
    }

    fn await_up(&self, proxy: &TestProxy) {
        proxy.wait_backend(self.pool, "a", "observation", "up");
    }

    fn down(&mut self, proxy: &TestProxy) {
        self.probes = None;
        proxy.wait_backend(self.pool, "a", "observation", "down");
    }

    fn up(&mut self, proxy: &TestProxy) {
        self.probes = Some(TcpListener::bind(self.port).unwrap());
        self.await_up(proxy);
    }
}

fn session(proxy: &TestProxy, frontend: &str) -> TcpStream {
    let client = connect(proxy.addr(frontend));
    echoes(&client);
    client
}

#[track_caller]
fn is_reset(client: &TcpStream) {
    let end = client::read_to_end(client);
    assert!(matches!(end, End::Reset(_)), "{end:?}");
}

/// The causes in the access log, once it has `count` lines.
fn causes(proxy: &TestProxy, count: usize) -> Vec<String> {
    let lines = proxy.wait_access_log(count);
    let cause = |line: &serde_json::Value| line["cause"].as_str().unwrap().to_owned();
    lines.iter().map(cause).collect()
}

fn backend_that_goes_down_after_upgrades_loses_the_sessions_of_every_process(engine: Engine) {
    for single in [false, true] {
        let mut a = DownBackend::start("web");
        let conf = Conf::simple(engine, a.pool("on_down = \"reset\""));
        let conf = conf.process("drain_timeout = \"60s\"");
        let mut proxy = if single { TestProxy::start_single(conf) } else { TestProxy::start(conf) };
        a.await_up(&proxy);
        let oldest = session(&proxy, "web");
        let first = proxy.upgrade();
        let old = session(&proxy, "web");
        let second = proxy.upgrade();
        let new = session(&proxy, "web");
        for client in [&oldest, &old, &new] {
            echoes(client);
        }
        a.down(&proxy);
        for client in [&oldest, &old, &new] {
            is_reset(client);
        }
        assert_eq!(causes(&proxy, 3), ["backend-down"; 3]);
        for process in [first, second] {
            proxy.wait_gone(process, secs(20));
        }
        a.up(&proxy);
        echoes(&session(&proxy, "web"));
        proxy.rebaseline();
    }
}

fn time_of_on_down_continues_over_an_upgrade(engine: Engine) {
    const TIME: u64 = 8;
    let (mut stays, mut returns) = (DownBackend::start("stays"), DownBackend::start("returns"));
    let keys = format!("on_down = \"close-after {TIME}s\"");
    let conf = Conf::new(engine)
        .frontend("stays", "stays", "")
        .frontend("returns", "returns", "")
        .pool(stays.pool(&keys))
        .pool(returns.pool(&keys))
        .process("drain_timeout = \"60s\"");
    let mut proxy = TestProxy::start(conf);
    stays.await_up(&proxy);
    returns.await_up(&proxy);
    let (lost, kept) = (session(&proxy, "stays"), session(&proxy, "returns"));
    let began = Instant::now();
    stays.down(&proxy);
    returns.down(&proxy);
    proxy.upgrade();
    let in_time = began.elapsed() < secs(TIME);
    if in_time {
        echoes(&lost);
    }
    returns.up(&proxy);
    let returned_in_time = began.elapsed() < secs(TIME);
    is_reset(&lost);
    let took = began.elapsed();
    assert!(took >= secs(TIME), "reset after {took:?}, before the time has passed");
    // A time that began again with the upgrade would end later.
    assert!(took < patience(secs(TIME + 4)), "reset after {took:?}");
    assert_eq!(causes(&proxy, 1), ["backend-down"]);
    if returned_in_time {
        std::thread::sleep(secs(2));
        echoes(&kept);
    }
    drop(kept);
    proxy.rebaseline();
}

/// A pool whose backends get sessions although they are down. The old process has applied
/// `on_down`, and the new process must not apply it again to sessions that began later.
fn backend_that_is_down_before_an_upgrade_loses_no_session_twice(engine: Engine) {
    let mut a = DownBackend::start("web");
    let keys = "on_down = \"reset\"\nwhen_none_eligible = \"try-all\"";
    let conf = Conf::simple(engine, a.pool(keys)).process("drain_timeout = \"60s\"");
    let mut proxy = TestProxy::start(conf);
    a.await_up(&proxy);
    let before = session(&proxy, "web");
    a.down(&proxy);
    is_reset(&before);
    let later = session(&proxy, "web");
    let old = proxy.upgrade();
    let newest = session(&proxy, "web");
    std::thread::sleep(secs(3));
    echoes(&later);
    echoes(&newest);
    drop((later, newest));
    proxy.wait_gone(old, secs(20));
    proxy.rebaseline();
}
