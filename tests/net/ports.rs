//! Local ports run out: twenty of them for each pair of addresses, on a host of
//! its own.
//!
//! Sessions that are open go on, the next source address takes over, and where
//! there is none the clients learn it at once and no backend is blamed.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client;
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, on_every_engine, secs, turn};
use crate::netns::{Namespace, networks_run};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};

on_every_engine!(
    ports_used_up_at_one_address_are_had_at_the_next,
    no_port_left_is_ours_and_over_at_once,
);

/// Ports there are.
const PORTS: usize = 20;

const SOURCES: [&str; 2] = ["127.0.0.5", "127.0.0.6"];

/// A host with few ports, a backend and a balancer that reaches it from two
/// addresses.
struct Site {
    proxy: TestProxy,
    backend: ScriptedBackend,
    host: Namespace,
}

impl Site {
    fn new(engine: Engine) -> Site {
        let host = Namespace::new("ports");
        let backend = host.run(|| ScriptedBackend::start(backend::echo()));
        let pool =
            Pool::new("web").key(&format!("source = {SOURCES:?}")).backend("a", backend.address());
        let proxy = host.run(|| TestProxy::start(Conf::simple(engine, pool)));
        let range = format!("50000 {}", 50_000 + PORTS - 1);
        host.sysctl("ipv4/ip_local_port_range", &range);
        Site { proxy, backend, host }
    }

    /// A session that works, from a client address of its own: clients have no
    /// more ports than the balancer.
    fn session(&self, number: usize) -> Option<TcpStream> {
        let source = Ipv4Addr::new(127, 1, (number / 200) as u8, (number % 200) as u8 + 1);
        self.host.run(|| {
            let stream = client::connect_from(IpAddr::V4(source), self.proxy.addr("web")).ok()?;
            let answer = client::exchange(&stream, b"hello").ok()?;
            (answer == b"hello").then_some(stream)
        })
    }

    fn used(&self, source: &str) -> usize {
        self.proxy.metric("tidegate_source_ports_used", &[("source", source)]) as usize
    }

    fn assert_backend_is_not_blamed(&self) {
        let state = self.proxy.backend("web", "a");
        assert_eq!(state["connect_failures_total"], 0, "{state:#}");
        assert_eq!(state["eligible"], true, "{state:#}");
    }
}

fn ports_used_up_at_one_address_are_had_at_the_next(engine: Engine) {
    if !networks_run() {
        return;
    }
    let site = Site::new(engine);
    let to: SocketAddr = site.backend.socket_address();
    let first: IpAddr = SOURCES[0].parse().unwrap();
    let others: Vec<TcpStream> = site
        .host
        .run(|| (0..PORTS).map(|_| client::connect_from(first, to).expect("a port")).collect());
    let sessions: Vec<TcpStream> = (0..PORTS / 2).filter_map(|n| site.session(n)).collect();
    assert_eq!(sessions.len(), PORTS / 2, "{}", site.proxy.log());
    assert_eq!((site.used(SOURCES[0]), site.used(SOURCES[1])), (0, PORTS / 2));
    site.assert_backend_is_not_blamed();
    others.into_iter().for_each(client::reset);
    eventually(secs(3), "the first address serves again", || {
        site.session(500).is_some() && site.used(SOURCES[0]) > 0
    });
}

fn no_port_left_is_ours_and_over_at_once(engine: Engine) {
    if !networks_run() {
        return;
    }
    let site = Site::new(engine);
    let sessions: Vec<TcpStream> = (0..2 * PORTS).filter_map(|n| site.session(n)).collect();
    assert_eq!(sessions.len(), 2 * PORTS, "{}", site.proxy.log());
    assert_eq!((site.used(SOURCES[0]), site.used(SOURCES[1])), (PORTS, PORTS));
    assert!(site.session(900).is_none(), "there is no port for it");
    let line = site.proxy.wait_access_log(1).pop().unwrap();
    assert_eq!((&line["cause"], &line["errno"]), (&"local-resource".into(), &99.into()));
    let labels = [("reason", "ports"), ("at", "connect")];
    assert!(site.proxy.metric("tidegate_local_errors_total", &labels) >= 1.0);
    site.assert_backend_is_not_blamed();
    assert_eq!(client::exchange(&sessions[7], b"still here").unwrap(), b"still here");
    eventually(secs(10), "the shortage is told of", || {
        let status = site.proxy.status();
        let warned = status["warnings"].to_string().contains("are running out: 20 of 20");
        warned && site.proxy.log().contains("are running out")
    });
    // Resets leave no port behind.
    sessions.into_iter().take(PORTS).for_each(client::reset);
    eventually(secs(3), "clients are served again", || site.session(901).is_some());
}

/// One that no interface has: refused at a reload, with its place.
#[test]
fn source_that_is_not_ours_is_refused() {
    let _turn = turn::shared();
    if !networks_run() {
        return;
    }
    let site = Site::new(Engine::Epoll);
    let text = site.proxy.render(&site.proxy.conf()).replace(SOURCES[1], "203.0.113.7");
    site.proxy.rewrite_in_place(&text);
    let answer = site.proxy.admin_request("POST", "/v1/reload");
    assert_eq!(answer.status, 422, "{}", answer.body);
    assert!(answer.body.contains("no interface of this host has that address"), "{}", answer.body);
    assert!(site.session(1).is_some());
}
