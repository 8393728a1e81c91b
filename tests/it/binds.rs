//! Bind addresses in use by another Tidegate process or by another program.
//!
//! Tidegate rejects each of them, names the process that holds it and its place in the
//! configuration file. No address is shared unnoticed.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client;
use crate::common::conf::{Conf, Pool};
use crate::common::ports::free_port;
use crate::common::proxy::TestProxy;
use crate::common::{Engine, on_every_engine};
use std::net::{SocketAddr, TcpListener};

on_every_engine!(
    reload_rejects_an_address_of_another_tidegate,
    start_rejects_an_address_of_another_tidegate,
    address_in_use_is_reported_with_its_holder_and_place,
    star_bind_listens_on_both_families,
    abstract_unix_socket_can_be_a_backend,
);

fn named(name: &str) -> ScriptedBackend {
    ScriptedBackend::start(backend::name(name))
}

/// A configuration with these bind addresses and one backend.
fn conf(engine: Engine, backend: &ScriptedBackend, binds: &[SocketAddr]) -> Conf {
    let pool = Pool::new("web").backend("a", backend.address());
    let mut conf = Conf::simple(engine, pool);
    conf.frontend_mut("web").binds = binds.to_vec();
    conf
}

/// The same port on three addresses of this host.
fn neighbours() -> [SocketAddr; 3] {
    let port = free_port();
    [[127, 0, 0, 1], [127, 0, 0, 2], [0, 0, 0, 0]].map(|ip| SocketAddr::from((ip, port)))
}

fn reload_rejects_an_address_of_another_tidegate(engine: Engine) {
    let (a, b) = (named("a"), named("b"));
    let [own, foreign, everywhere] = neighbours();
    let mut proxy = TestProxy::start(conf(engine, &a, &[own]));
    let other = TestProxy::start(conf(engine, &b, &[foreign]));
    for binds in [&[own, foreign][..], &[everywhere][..]] {
        proxy.rewrite_by_rename(&proxy.render(&conf(engine, &a, binds)));
        let answer = proxy.admin_request("POST", "/v1/reload");
        assert_eq!(answer.status, 422, "{binds:?}: {}", answer.body);
        // The sandbox denies access to other processes, so the holder's name is missing.
        assert!(answer.body.contains(&format!("listens on {foreign}")), "{}", answer.body);
        assert!(answer.body.contains("`ss -ltnp`"), "{}", answer.body);
        assert_eq!(client::ask(own).unwrap(), "a");
        assert_eq!(client::ask(foreign).unwrap(), "b");
    }
    // Its own addresses never conflict.
    drop(other);
    for binds in [&[everywhere][..], &[own, foreign][..], &[own][..]] {
        proxy.reload(conf(engine, &a, binds));
        assert_eq!(client::ask(own).unwrap(), "a", "{binds:?}");
    }
    proxy.rebaseline();
}

fn start_rejects_an_address_of_another_tidegate(engine: Engine) {
    let (a, b) = (named("a"), named("b"));
    let [own, foreign, everywhere] = neighbours();
    let other = TestProxy::start(conf(engine, &b, &[foreign]));
    for binds in [&[own, foreign][..], &[everywhere][..]] {
        let started = TestProxy::try_start(conf(engine, &a, binds), &[]);
        let Err(log) = started else { panic!("it started on {binds:?}") };
        assert!(log.starts_with("exit status: 3"), "{log}");
        assert!(log.contains(&format!("(tidegate) listens on {foreign}")), "{log}");
    }
    assert_eq!(client::ask(foreign).unwrap(), "b");
    drop(other);
}

fn address_in_use_is_reported_with_its_holder_and_place(engine: Engine) {
    let a = named("a");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let conf = conf(engine, &a, &[address]);
    let Err(log) = TestProxy::try_start(conf, &[]) else { panic!("it started") };
    // The test process holds the address. Its name is that of its main thread.
    let holder = format!("process {} (", std::process::id());
    assert!(log.contains(&holder), "{log}");
    assert!(log.contains(&format!("listens on {address}")), "{log}");
    let place = log.lines().find(|line| line.contains("tidegate.toml:")).unwrap_or_default();
    assert!(place.contains(": error: cannot listen on"), "{log}");
    assert!(log.contains(&format!("bind = [\"{address}\"]")) && log.contains('^'), "{log}");
}

/// Replaces `from` by `to` in the file and reloads it.
#[track_caller]
fn reload_with(proxy: &TestProxy, from: &str, to: &str) {
    let text = std::fs::read_to_string(proxy.config_path()).unwrap();
    assert!(text.contains(from), "{text}");
    proxy.rewrite_by_rename(&text.replace(from, to));
    let answer = proxy.admin_request("POST", "/v1/reload");
    assert_eq!(answer.status, 200, "{}", answer.body);
}

fn star_bind_listens_on_both_families(engine: Engine) {
    let a = named("a");
    let mut proxy = TestProxy::start(conf(engine, &a, &[neighbours()[0]]));
    let port = free_port();
    let old = proxy.addr("web");
    reload_with(&proxy, &format!("\"{old}\""), &format!("{{ address = \"*:{port}\" }}"));
    assert_eq!(client::ask(SocketAddr::from(([127, 0, 0, 1], port))).unwrap(), "a");
    if TcpListener::bind("[::1]:0").is_ok() {
        let v6 = format!("[::1]:{port}").parse().unwrap();
        assert_eq!(client::ask(v6).unwrap(), "a");
    }
    proxy.rebaseline();
}

fn abstract_unix_socket_can_be_a_backend(engine: Engine) {
    use std::io::{Read, Write};
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener};
    let name = format!("tidegate-test-{}", free_port());
    let listener = UnixListener::bind_addr(&UnixAddr::from_abstract_name(&name).unwrap()).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.write_all(b"abstract").and_then(|()| stream.read(&mut [0; 16]));
        }
    });
    let pool = Pool::new("web").backend("a", format!("unix:@{name}")).probe("interval = \"100ms\"");
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    proxy.wait_backend("web", "a", "observation", "up");
    assert_eq!(proxy.backend("web", "a")["address"], format!("unix:@{name}"));
    assert_eq!(client::ask(proxy.addr("web")).unwrap(), "abstract");
}
