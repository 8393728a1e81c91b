//! Exhausted local ports: 20 per pair of addresses, on a separate host.
//!
//! Open sessions continue, and the next source address is used. Without a free port clients
//! are reset at once, and no backend failure is counted.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client;
use crate::common::conf::Pool;
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, exclusive, measured, on_every_engine, secs};
use crate::hosts::Hosts;
use crate::netns::networks_run;
use std::net::TcpStream;
use std::time::Instant;

on_every_engine!(
    exhausted_ports_fall_back_to_the_next_source_address,
    exhausted_ports_are_a_local_error_and_reset_clients_at_once,
);

/// Number of local ports.
const PORTS: usize = 20;

const SOURCES: [&str; 2] = ["127.0.0.5", "127.0.0.6"];

/// A host with few ports, a backend, and a Tidegate process that connects to the backend from
/// `sources`.
struct Site {
    proxy: TestProxy,
    // Keeps the backend running.
    _backend: ScriptedBackend,
    hosts: Hosts,
}

impl Site {
    fn new(engine: Engine, sources: &[&str]) -> Site {
        let hosts = Hosts::new(0, 80);
        let backend = hosts.balancer.run(|| ScriptedBackend::start(backend::echo()));
        let pool = Pool::new("web").key(&format!("source = {sources:?}"));
        let pool = pool.backend("a", backend.address());
        let proxy = hosts.start(hosts.conf(engine, pool));
        let range = format!("50000 {}", 50_000 + PORTS - 1);
        hosts.balancer.sysctl("ipv4/ip_local_port_range", &range);
        Site { proxy, _backend: backend, hosts }
    }

    /// Opens a session and checks that it echoes.
    fn session(&self) -> Option<TcpStream> {
        self.hosts.client.run(|| {
            let stream = client::try_connect(self.proxy.addr("web")).ok()?;
            let answer = client::exchange(&stream, b"hello").ok()?;
            (answer == b"hello").then_some(stream)
        })
    }

    fn sessions(&self, count: usize) -> Vec<TcpStream> {
        let sessions: Vec<TcpStream> = (0..count).filter_map(|_| self.session()).collect();
        assert_eq!(sessions.len(), count, "{}", self.proxy.log());
        sessions
    }

    fn used(&self, source: &str) -> usize {
        self.proxy.metric("tidegate_source_ports_used", &[("source", source)]) as usize
    }

    fn assert_no_backend_failure(&self) {
        let state = self.proxy.backend("web", "a");
        assert_eq!(state["connect_failures_total"], 0, "{state:#}");
        assert_eq!(state["eligible"], true, "{state:#}");
    }
}

fn exhausted_ports_fall_back_to_the_next_source_address(engine: Engine) {
    if !networks_run() {
        return;
    }
    let site = Site::new(engine, &SOURCES[..1]);
    let first = site.sessions(PORTS);
    assert!(site.session().is_none(), "no port is free");
    let text = std::fs::read_to_string(site.proxy.config_path()).unwrap();
    let both = text.replace("[\"127.0.0.5\"]", &format!("{SOURCES:?}"));
    site.proxy.rewrite_in_place(&both);
    assert_eq!(site.proxy.admin_request("POST", "/v1/reload").status, 200);
    let more = site.sessions(PORTS / 2);
    assert_eq!((site.used(SOURCES[0]), site.used(SOURCES[1])), (PORTS, PORTS / 2));
    assert_eq!(client::exchange(&first[7], b"still here").unwrap(), b"still here");
    site.assert_no_backend_failure();
    first.into_iter().for_each(client::reset);
    eventually(secs(3), "the first address serves again", || {
        // Every second session uses that address. The session ends with its client.
        site.session().is_some_and(|_held| site.used(SOURCES[0]) > 0)
    });
    drop(more);
}

fn exhausted_ports_are_a_local_error_and_reset_clients_at_once(engine: Engine) {
    if !networks_run() {
        return;
    }
    let site = Site::new(engine, &SOURCES);
    let sessions = site.sessions(2 * PORTS);
    assert_eq!((site.used(SOURCES[0]), site.used(SOURCES[1])), (PORTS, PORTS));
    assert!(site.session().is_none(), "no port is free");
    let line = site.proxy.wait_access_log(1).pop().unwrap();
    assert_eq!((&line["cause"], &line["errno"]), (&"local-resource".into(), &99.into()));
    let labels = [("reason", "ports"), ("at", "connect")];
    assert!(site.proxy.metric("tidegate_local_errors_total", &labels) >= 1.0);
    site.assert_no_backend_failure();
    assert_eq!(client::exchange(&sessions[7], b"still here").unwrap(), b"still here");
    eventually(secs(10), "the exhaustion is reported", || {
        let warned = site.proxy.status()["warnings"].to_string();
        warned.contains("are nearly exhausted: 20 of 20")
            && site.proxy.log().contains("nearly exhausted")
    });
    // A reset leaves no port in TIME_WAIT.
    let over = Instant::now();
    sessions.into_iter().take(PORTS).for_each(client::reset);
    eventually(secs(3), "clients are served again", || site.session().is_some());
    measured(&format!("served {:?} after ports were free", over.elapsed()));
}

/// A source address that no interface has is rejected at a reload, with its place.
#[test]
fn source_address_of_another_host_is_rejected() {
    let _share = exclusive::shared();
    if !networks_run() {
        return;
    }
    let site = Site::new(Engine::Epoll, &SOURCES);
    let text = site.proxy.render(&site.proxy.conf()).replace(SOURCES[1], "203.0.113.7");
    site.proxy.rewrite_in_place(&text);
    let answer = site.proxy.admin_request("POST", "/v1/reload");
    assert_eq!(answer.status, 422, "{}", answer.body);
    assert!(answer.body.contains("no interface of this host has that address"), "{}", answer.body);
    assert!(site.session().is_some());
}
