//! Open sessions of a backend that goes down (`on_down`).

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, End, connect, echoes};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, ms, on_every_engine, patience, secs};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Instant;

on_every_engine!(
    reset_ends_the_sessions_of_a_backend_that_is_down,
    sessions_stay_unless_the_time_of_on_down_has_passed,
    drained_backend_keeps_its_sessions,
);

/// A backend whose probes go to a port of their own, so that it can be down with open sessions.
struct Probed {
    backend: ScriptedBackend,
    probes: Option<TcpListener>,
    port: SocketAddr,
}

impl Probed {
    fn start() -> Probed {
        let probes = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = probes.local_addr().unwrap();
        Probed { backend: ScriptedBackend::start(backend::echo()), probes: Some(probes), port }
    }

    fn proxy(&self, engine: Engine, keys: &str) -> TestProxy {
        let port = self.port.port();
        let probe = "kind = \"tcp\"\ninterval = \"100ms\"\ntimeout = \"100ms\"\nfall = 2\nrise = 1";
        let pool = Pool::new("web")
            .key(keys)
            .probe(&format!("{probe}\nport = {port}"))
            .backend("a", self.backend.address());
        let proxy = TestProxy::start(Conf::simple(engine, pool));
        proxy.wait_backend("web", "a", "observation", "up");
        proxy
    }

    fn down(&mut self, proxy: &TestProxy) {
        self.probes = None;
        proxy.wait_backend("web", "a", "observation", "down");
    }

    fn up(&mut self, proxy: &TestProxy) {
        self.probes = Some(TcpListener::bind(self.port).unwrap());
        proxy.wait_backend("web", "a", "observation", "up");
    }
}

/// A session that has a backend.
fn session(proxy: &TestProxy) -> TcpStream {
    let client = connect(proxy.addr("web"));
    echoes(&client);
    client
}

fn reset_ends_the_sessions_of_a_backend_that_is_down(engine: Engine) {
    const SESSIONS: usize = 20;
    let mut a = Probed::start();
    let proxy = a.proxy(engine, "on_down = \"reset\"");
    let clients: Vec<TcpStream> = (0..SESSIONS).map(|_| session(&proxy)).collect();
    a.down(&proxy);
    let began = Instant::now();
    for client in &clients {
        assert!(matches!(client::read_to_end(client), End::Reset(_)));
    }
    let took = began.elapsed();
    assert!(took < patience(secs(1)), "reset after {took:?}");
    let log = proxy.wait_access_log(SESSIONS);
    for line in &log {
        let found = (&line["cause"], &line["phase"], &line["code"], &line["timer"]);
        assert_eq!(
            found,
            (&"backend-down".into(), &"data".into(), &"DD".into(), &"on_down".into()),
            "{line:#}"
        );
    }
    eventually(secs(5), "no session of the backend", || a.backend.active() == 0);
    a.up(&proxy);
    let later = session(&proxy);
    std::thread::sleep(ms(1200));
    echoes(&later);
}

fn sessions_stay_unless_the_time_of_on_down_has_passed(engine: Engine) {
    let mut a = Probed::start();
    let mut proxy = a.proxy(engine, "on_down = \"keep\"");
    let client = session(&proxy);
    a.down(&proxy);
    std::thread::sleep(ms(500));
    echoes(&client);
    a.up(&proxy);
    let mut conf = proxy.conf();
    conf.pool_mut("web").keys = "on_down = \"close-after 1500ms\"\n".into();
    proxy.reload(conf);
    a.down(&proxy);
    echoes(&client);
    a.up(&proxy);
    std::thread::sleep(ms(1700));
    echoes(&client);
    a.down(&proxy);
    let began = Instant::now();
    echoes(&client);
    assert!(matches!(client::read_to_end(&client), End::Reset(_)));
    let took = began.elapsed();
    assert!(took > ms(1000) && took < patience(secs(3)), "reset after {took:?}");
    assert_eq!(proxy.wait_access_log(1)[0]["cause"], "backend-down");
}

fn drained_backend_keeps_its_sessions(engine: Engine) {
    let a = Probed::start();
    let proxy = a.proxy(engine, "on_down = \"reset\"");
    let client = session(&proxy);
    proxy.cli_ok(&["drain", "web/a"]);
    std::thread::sleep(ms(500));
    echoes(&client);
    proxy.cli_ok(&["undrain", "web/a"]);
    echoes(&client);
}
