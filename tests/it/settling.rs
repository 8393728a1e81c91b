//! Reloads and starts with no probe result yet: no client is rejected because of it.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, End};
use crate::common::conf::{Conf, Pool};
use crate::common::http;
use crate::common::proxy::TestProxy;
use crate::common::stable::{Attempt, Steady, answered_by};
use crate::common::{Engine, eventually, measured, ms, on_every_engine, secs};
use std::net::TcpStream;
use std::time::Instant;

on_every_engine!(
    blue_green_reload_rejects_no_client,
    renaming_backends_and_a_pool_rejects_no_client,
    swapping_two_backend_names_rejects_no_client,
    removed_backends_get_no_sessions_once_a_new_backend_is_up,
    client_waits_for_the_first_probe_result,
    waiting_client_is_reset_once_every_backend_is_down,
    readiness_waits_for_the_first_probe_result,
);

/// How long the backends take to answer a probe.
const PROBE_TAKES: u64 = 400;

/// Starts a backend that answers requests at once with its name, and probes (of `/health`)
/// after [`PROBE_TAKES`] with the status `health`.
fn slowly_probed(name: &str, health: u16) -> ScriptedBackend {
    let answer = |status: u16| {
        let length = name.len();
        format!(
            "HTTP/1.1 {status} X\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{name}"
        )
    };
    let (works, probe_answer) = (answer(200), answer(health));
    ScriptedBackend::start(backend::script(move |conn| {
        let (mut head, mut buffer) = (Vec::new(), [0; 1024]);
        while !head.ends_with(b"\r\n\r\n") {
            match conn.read(&mut buffer) {
                Ok(n @ 1..) => head.extend_from_slice(&buffer[..n]),
                _ => return,
            }
        }
        let probed = head.starts_with(b"GET /health");
        if probed {
            // A check of a database takes as long.
            std::thread::sleep(ms(PROBE_TAKES));
        }
        let _ = conn.write_all(if probed { probe_answer.as_bytes() } else { works.as_bytes() });
    }))
}

/// A probed pool of `backends` with these names.
fn probed(pool: &str, backends: &[(&str, &ScriptedBackend)]) -> Pool {
    let keys = "kind = \"http\"\npath = \"/health\"\ninterval = \"2s\"\ntimeout = \"2s\"";
    let pool = Pool::new(pool).key("startup_grace = \"20s\"").probe(keys);
    backends.iter().fold(pool, |pool, (name, backend)| pool.backend(name, backend.address()))
}

/// Reloads to `conf` under load and waits until its backends serve.
fn reload_under_load(proxy: &mut TestProxy, conf: Conf) -> Vec<Attempt> {
    let steady = Steady::paced(proxy.addr("web"), 3, 300.0);
    let pool = conf.pools[0].name.clone();
    let names: Vec<String> =
        conf.pools[0].backends.iter().map(|backend| backend.name.clone()).collect();
    // Some sessions before and after the reload.
    std::thread::sleep(ms(100));
    proxy.reload(conf);
    assert_eq!(proxy.admin_request("GET", "/ready").status, 200, "the process stays ready");
    names.iter().for_each(|name| proxy.wait_backend(&pool, name, "observation", "up"));
    std::thread::sleep(ms(100));
    let attempts = steady.stop();
    let failed: Vec<_> = attempts.iter().filter(|attempt| attempt.result.is_err()).collect();
    assert!(failed.is_empty(), "{} of {}: {:?}", failed.len(), attempts.len(), failed[0]);
    measured(&format!("{} sessions, none rejected", attempts.len()));
    attempts
}

fn blue_green_reload_rejects_no_client(engine: Engine) {
    let [blue, green] = ["blue", "green"].map(|name| [(); 2].map(|()| slowly_probed(name, 200)));
    let first = probed("web", &[("a", &blue[0]), ("b", &blue[1])]);
    let mut proxy = TestProxy::start(Conf::simple(engine, first));
    let mut conf = proxy.conf();
    conf.pools = vec![probed("web", &[("a", &green[0]), ("b", &green[1])])];
    let attempts = reload_under_load(&mut proxy, conf);
    let [blue, green] = ["blue", "green"].map(|name| answered_by(&attempts, name));
    assert!(blue > 20 && green > 0, "{blue} sessions on removed backends, {green} on new backends");
}

fn renaming_backends_and_a_pool_rejects_no_client(engine: Engine) {
    let [a, b] = ["a", "b"].map(|name| slowly_probed(name, 200));
    let mut proxy = TestProxy::start(Conf::simple(engine, probed("web", &[("a", &a), ("b", &b)])));
    let mut conf = proxy.conf();
    conf.pools = vec![probed("web", &[("x", &a), ("y", &b)])];
    reload_under_load(&mut proxy, conf);
    let mut conf = proxy.conf();
    conf.pools = vec![probed("other", &[("x", &a), ("y", &b)])];
    conf.frontend_mut("web").pool = "other".into();
    reload_under_load(&mut proxy, conf);
    // A new name and new addresses in the same reload.
    let [c, d] = ["c", "d"].map(|name| slowly_probed(name, 200));
    let mut conf = proxy.conf();
    conf.pools = vec![probed("third", &[("x", &c), ("y", &d)])];
    conf.frontend_mut("web").pool = "third".into();
    reload_under_load(&mut proxy, conf);
}

fn swapping_two_backend_names_rejects_no_client(engine: Engine) {
    let [a, b] = ["a", "b"].map(|name| slowly_probed(name, 200));
    let mut proxy = TestProxy::start(Conf::simple(engine, probed("web", &[("a", &a), ("b", &b)])));
    let mut conf = proxy.conf();
    conf.pools = vec![probed("web", &[("a", &b), ("b", &a)])];
    reload_under_load(&mut proxy, conf);
}

fn removed_backends_get_no_sessions_once_a_new_backend_is_up(engine: Engine) {
    let [blue, green] = ["blue", "green"].map(|name| slowly_probed(name, 200));
    let mut proxy = TestProxy::start(Conf::simple(engine, probed("web", &[("a", &blue)])));
    let mut conf = proxy.conf();
    conf.pools = vec![probed("web", &[("b", &green)])];
    proxy.reload(conf);
    let ask = || http::over_tcp(proxy.addr("web"), "/").unwrap().body;
    assert_eq!(ask(), "blue");
    assert_eq!(proxy.status()["pools"][0]["none_eligible"], "former");
    proxy.wait_backend("web", "b", "observation", "up");
    // Each worker uses the new table from its next session.
    eventually(secs(2), "the new backend serves", || ask() == "green");
    assert!((0..20).all(|_| ask() == "green"));
}

/// Starts Tidegate and connects before it is ready. Returns the result of the first client and
/// how long it waited.
fn first_client_of<T: Send>(
    conf: Conf,
    client: impl Fn(TcpStream) -> T + Sync,
) -> (TestProxy, T, std::time::Duration) {
    let address = conf.address("web");
    std::thread::scope(|scope| {
        let first = scope.spawn(|| {
            let stream = crate::common::eventually_some(secs(20), "a first connect", || {
                TcpStream::connect(address).ok()
            });
            let start = Instant::now();
            let got = client(stream);
            (got, start.elapsed())
        });
        let proxy = TestProxy::try_start(conf, &[]).expect("a start");
        let (got, waited) = first.join().expect("a client");
        (proxy, got, waited)
    })
}

fn client_waits_for_the_first_probe_result(engine: Engine) {
    let a = slowly_probed("a", 200);
    let conf = Conf::simple(engine, probed("web", &[("a", &a)]));
    let (proxy, answer, waited) = first_client_of(conf, |stream| {
        client::exchange(&stream, b"GET / HTTP/1.0\r\n\r\n").map(|answer| answer.len())
    });
    assert!(answer.is_ok_and(|length| length > 0));
    measured(&format!("the first client waited for {waited:?}"));
    assert!(proxy.metric("tidegate_undecided_waits_total", &[]) >= 1.0);
    assert_eq!(proxy.metric("tidegate_pool_undecided", &[]), 0.0);
}

fn waiting_client_is_reset_once_every_backend_is_down(engine: Engine) {
    let a = slowly_probed("a", 500);
    let conf = Conf::simple(engine, probed("web", &[("a", &a)]));
    let (proxy, end, waited) = first_client_of(conf, |stream| client::read_to_end(&stream));
    assert!(matches!(end, End::Reset(0)), "{end:?}");
    assert!(waited < secs(15), "reset after {waited:?}, not before the end of the grace time");
    assert_eq!(proxy.backend("web", "a")["observation"], "down");
}

fn readiness_waits_for_the_first_probe_result(engine: Engine) {
    let a = slowly_probed("a", 200);
    let proxy = TestProxy::start(Conf::simple(engine, probed("web", &[("a", &a)])));
    assert_eq!(proxy.backend("web", "a")["observation"], "up", "/ready returned 200 too early");
}
