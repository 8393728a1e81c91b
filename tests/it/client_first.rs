//! `client_first`: a backend is picked when the client has sent its first byte.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, End, connect};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, ms, on_every_engine, patience, secs};
use std::io::Write;
use std::net::TcpStream;
use std::time::Instant;

on_every_engine!(
    backend_is_connected_at_the_first_byte_which_it_receives,
    silent_client_is_reset_and_reaches_no_backend,
    client_that_leaves_without_a_byte_reaches_no_backend,
    drained_backend_gets_no_client_that_was_silent_before,
);

fn proxy(engine: Engine, wait: &str, pool: Pool) -> TestProxy {
    let keys = format!("client_first = \"{wait}\"");
    TestProxy::start(Conf::new(engine).frontend("web", "web", &keys).pool(pool))
}

/// Waits until the client's session exists, so that its silence is that of a session.
fn silent(proxy: &TestProxy) -> TcpStream {
    let before = proxy.metric("tidegate_sessions_active", &[("frontend", "web")]);
    let stream = connect(proxy.addr("web"));
    eventually(secs(5), "the session exists", || {
        proxy.metric("tidegate_sessions_active", &[("frontend", "web")]) > before
    });
    stream
}

fn backend_is_connected_at_the_first_byte_which_it_receives(engine: Engine) {
    let echo = ScriptedBackend::start(backend::echo());
    let proxy = proxy(engine, "30s", Pool::new("web").backend("a", echo.address()));
    let silent = silent(&proxy);
    let other = connect(proxy.addr("web"));
    assert_eq!(client::exchange(&other, b"other").unwrap(), b"other");
    assert_eq!(echo.accepted(), 1, "the silent client has no backend");
    assert_eq!(client::exchange(&silent, b"first").unwrap(), b"first");
    assert_eq!(client::exchange(&silent, b"second").unwrap(), b"second");
    assert_eq!(echo.accepted(), 2);
}

fn silent_client_is_reset_and_reaches_no_backend(engine: Engine) {
    let echo = ScriptedBackend::start(backend::echo());
    let proxy = proxy(engine, "400ms", Pool::new("web").backend("a", echo.address()));
    let (silent, start) = (connect(proxy.addr("web")), Instant::now());
    assert_eq!(client::read_to_end(&silent), End::Reset(0));
    let waited = start.elapsed();
    assert!(waited > ms(300) && waited < patience(secs(3)), "closed after {waited:?}");
    let log = proxy.wait_access_log(1);
    let line = &log[0];
    assert_eq!((&line["cause"], &line["phase"]), (&"first-byte-timeout".into(), &"preread".into()));
    assert_eq!(line["timer"], "client_first", "{line:#}");
    assert_eq!(echo.accepted(), 0);
}

fn client_that_leaves_without_a_byte_reaches_no_backend(engine: Engine) {
    let echo = ScriptedBackend::start(backend::echo());
    let proxy = proxy(engine, "30s", Pool::new("web").backend("a", echo.address()));
    drop(connect(proxy.addr("web")));
    let log = proxy.wait_access_log(1);
    let line = &log[0];
    assert_eq!((&line["cause"], &line["phase"]), (&"client-left".into(), &"preread".into()));
    assert_eq!(echo.accepted(), 0);
}

fn drained_backend_gets_no_client_that_was_silent_before(engine: Engine) {
    let (a, b) =
        (ScriptedBackend::start(backend::greet("a")), ScriptedBackend::start(backend::greet("b")));
    let pool = Pool::new("web").backend("a", a.address()).backend("b", b.address());
    let proxy = proxy(engine, "30s", pool);
    let clients: Vec<TcpStream> = (0..4).map(|_| silent(&proxy)).collect();
    assert_eq!(proxy.admin_request("POST", "/v1/pools/web/backends/a/drain").status, 200);
    eventually(secs(5), "a is drained", || proxy.backend("web", "a")["eligible"] == false);
    for mut client in clients {
        client.write_all(b"?").unwrap();
        let mut greeting = [0];
        std::io::Read::read_exact(&mut client, &mut greeting).unwrap();
        assert_eq!(&greeting, b"b");
    }
    assert_eq!(a.accepted(), 0);
}
