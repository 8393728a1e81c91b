//! Binds on separate hosts: addresses that no interface has yet, hosts without IPv6, single
//! interfaces, socket options, and a backend on the port of a wildcard.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client;
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::{PROGRAM, TestProxy};
use crate::common::{Engine, on_every_engine};
use crate::netns::{Namespace, networks_run};
use std::net::SocketAddr;
use std::process::Command;

on_every_engine!(
    absent_address_is_bound_with_freebind,
    star_bind_is_ipv4_only_on_a_host_without_ipv6,
    bind_of_an_interface_gets_only_its_connections,
    options_of_a_bind_change_without_closing_it,
    range_of_ports_leads_to_the_same_ports_of_a_backend,
);

/// A host with one Tidegate process, whose configuration file can be rewritten.
struct Host {
    proxy: TestProxy,
    // Keeps the backend running.
    _backend: ScriptedBackend,
    namespace: Namespace,
}

impl Host {
    fn new(engine: Engine, prepare: impl FnOnce(&Namespace)) -> Host {
        let namespace = Namespace::new("balancer");
        prepare(&namespace);
        let backend = namespace.run(|| ScriptedBackend::start(backend::name("a")));
        let pool = Pool::new("web").backend("a", backend.address());
        let mut conf = Conf::simple(engine, pool);
        conf.frontend_mut("web").binds = vec![SocketAddr::from(([127, 0, 0, 1], 8080))];
        let proxy = namespace.run(|| TestProxy::start(conf));
        Host { proxy, _backend: backend, namespace }
    }

    fn ask(&self, address: &str) -> std::io::Result<String> {
        let address = address.parse().unwrap();
        self.namespace.run(|| client::ask(address))
    }

    /// Reloads the file with a different bind and returns the answer.
    fn rebind(&self, bind: &str) -> crate::common::http::Answer {
        let text = self.proxy.render(&self.proxy.conf());
        let old = "\"127.0.0.1:8080\"";
        assert!(text.contains(old), "{text}");
        self.proxy.rewrite_by_rename(&text.replace(old, bind));
        self.proxy.admin_request("POST", "/v1/reload")
    }

    /// Returns the exit code and the output of `check`.
    fn check(&self) -> String {
        let path = self.proxy.config_path();
        let output = self.namespace.run(|| Command::new(PROGRAM).arg("check").arg(path).output());
        let output = output.unwrap();
        format!("{:?}\n{}", output.status.code(), String::from_utf8_lossy(&output.stderr))
    }
}

fn absent_address_is_bound_with_freebind(engine: Engine) {
    if !networks_run() {
        return;
    }
    let mut host = Host::new(engine, |_| {});
    let absent = "{ address = \"192.0.2.9:8080\" }";
    let answer = host.rebind(absent);
    assert_eq!(answer.status, 422, "{}", answer.body);
    for word in ["no interface of this host has that address", "freebind = true", ".toml:"] {
        assert!(answer.body.contains(word), "{}", answer.body);
    }
    let said = host.check();
    assert!(said.starts_with("Some(1)") && said.contains("no interface of this host"), "{said}");

    for free in [
        "{ address = \"192.0.2.9:8080\", freebind = true }",
        "{ address = \"[2001:db8::9]:8080\", freebind = true }, \
         { address = \"192.0.2.9:8080\", freebind = true }",
    ] {
        let answer = host.rebind(free);
        assert_eq!(answer.status, 200, "{}", answer.body);
    }
    let said = host.check();
    assert!(said.starts_with("Some(0)"), "{said}");
    host.namespace.ip("address add 192.0.2.9/32 dev lo");
    assert_eq!(host.ask("192.0.2.9:8080").unwrap(), "a", "the address exists");
    host.proxy.rebaseline();
}

fn star_bind_is_ipv4_only_on_a_host_without_ipv6(engine: Engine) {
    if !networks_run() {
        return;
    }
    let mut host = Host::new(engine, |_| {});
    host.namespace.sysctl("ipv6/conf/all/disable_ipv6", "1");
    let answer = host.rebind("\"*:8081\"");
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(host.ask("127.0.0.1:8081").unwrap(), "a");
    host.proxy.rebaseline();
}

fn bind_of_an_interface_gets_only_its_connections(engine: Engine) {
    if !networks_run() {
        return;
    }
    let mut host = Host::new(engine, |namespace| {
        namespace.ip("link add eth1 type veth peer name eth2\nlink set eth1 up\nlink set eth2 up");
    });
    let answer = host.rebind("{ address = \"127.0.0.1:8081\", interface = \"eth9\" }");
    assert_eq!(answer.status, 422, "{}", answer.body);
    let problem = "cannot listen on 127.0.0.1:8081%eth9: there is no interface eth9";
    assert!(answer.body.contains(problem), "{}", answer.body);

    let both = "{ address = \"*:8081\", interface = \"eth1\" }, \
                { address = \"*:8082\", interface = \"eth1\" }, \
                { address = \"*:8082\", interface = \"lo\" }";
    let answer = host.rebind(both);
    assert_eq!(answer.status, 200, "{}", answer.body);
    host.ask("127.0.0.1:8081").expect_err("this connection arrives on lo");
    for _ in 0..10 {
        assert_eq!(host.ask("127.0.0.1:8082").unwrap(), "a");
        assert_eq!(host.ask("[::1]:8082").unwrap(), "a");
    }
    let binds = host.proxy.admin_request("GET", "/v1/status").body;
    assert!(binds.contains("0.0.0.0:8082%lo") && binds.contains("[::]:8082%eth1"), "{binds}");
    host.proxy.rebaseline();
}

fn options_of_a_bind_change_without_closing_it(engine: Engine) {
    if !networks_run() {
        return;
    }
    let mut host = Host::new(engine, |_| {});
    let open = host.namespace.run(|| client::connect(([127, 0, 0, 1], 8080).into()));
    let marked = "{ address = \"127.0.0.1:8080\", backlog = 7, mark = 9, dscp = 46 }";
    // The sandbox keeps the capability only if the file has a mark at the start.
    let answer = host.rebind(marked);
    assert_eq!(answer.status, 422, "{}", answer.body);
    let problem = "cannot listen on 127.0.0.1:8080: mark 9 needs the capability CAP_NET_ADMIN";
    assert!(answer.body.contains(problem), "{}", answer.body);
    let answer = host.rebind(&marked.replace("mark = 9, ", ""));
    assert_eq!(answer.status, 200, "{}", answer.body);
    let listeners = host.namespace.run(|| {
        let output = Command::new("ss").args(["-ltn", "sport = :8080"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    });
    let queues: Vec<_> =
        listeners.lines().skip(1).map(|line| line.split_whitespace().nth(2)).collect();
    assert!(!queues.is_empty() && queues.iter().all(|queue| *queue == Some("7")), "{listeners}");
    assert_eq!(host.ask("127.0.0.1:8080").unwrap(), "a");
    assert_eq!(client::read_text(&open).unwrap(), "a", "the open connection continues");
    host.proxy.rebaseline();
}

fn range_of_ports_leads_to_the_same_ports_of_a_backend(engine: Engine) {
    if !networks_run() {
        return;
    }
    let mut host = Host::new(engine, |_| {});
    let ports = 21_000..=21_010_u16;
    let _backends: Vec<ScriptedBackend> = host.namespace.run(|| {
        let at = |port: u16| SocketAddr::from(([127, 0, 0, 2], port));
        let start =
            |port: u16| ScriptedBackend::start_on(at(port), backend::name(&port.to_string()));
        ports.clone().map(start).collect()
    });
    let text = host.proxy.render(&host.proxy.conf());
    let old = host.proxy.conf().pools[0].backends[0].address.clone();
    let with = |binds: &str, backend: &str| {
        let text = text.replace("127.0.0.1:8080", binds).replace(&old, backend);
        host.proxy.rewrite_by_rename(&text);
        let answer = host.proxy.admin_request("POST", "/v1/reload");
        assert_eq!(answer.status, 200, "{}", answer.body);
    };
    with("127.0.0.1:21000-21010", "127.0.0.2");
    let open = host.namespace.run(|| client::connect(([127, 0, 0, 1], 21_003).into()));
    for port in ports.clone() {
        assert_eq!(host.ask(&format!("127.0.0.1:{port}")).unwrap(), port.to_string());
    }
    let shown = host.proxy.admin_request("GET", "/v1/status").body;
    assert!(shown.contains("\"address\":\"127.0.0.2\""), "{shown}");
    with("127.0.0.1:21001-21009", "127.0.0.2:+1");
    for port in 21_001..=21_009 {
        assert_eq!(host.ask(&format!("127.0.0.1:{port}")).unwrap(), (port + 1).to_string());
    }
    assert_eq!(client::read_text(&open).unwrap(), "21003", "the open connection continues");
    host.proxy.upgrade();
    for port in 21_001..=21_009 {
        assert_eq!(host.ask(&format!("127.0.0.1:{port}")).unwrap(), (port + 1).to_string());
    }
    host.proxy.rebaseline();
}

/// The engine does not matter here.
#[test]
fn wildcard_and_backend_on_its_port_are_both_reported() {
    let _share = crate::common::exclusive::shared();
    if !networks_run() {
        return;
    }
    let host =
        Host::new(Engine::Epoll, |namespace| namespace.ip("address add 192.0.2.1/32 dev lo"));
    let address = SocketAddr::from(([192, 0, 2, 1], 9000));
    let _backend =
        host.namespace.run(|| ScriptedBackend::start_on(address, backend::name("other")));
    let text = host.proxy.render(&host.proxy.conf());
    let old = host.proxy.conf().pools[0].backends[0].address.clone();
    let text = text.replace("127.0.0.1:8080", "0.0.0.0:9000").replace(&old, "192.0.2.1:9000");
    host.proxy.rewrite_by_rename(&text);
    let answer = host.proxy.admin_request("POST", "/v1/reload");
    assert_eq!(answer.status, 422, "{}", answer.body);
    for word in ["0.0.0.0:9000", "listens on 192.0.2.1:9000", "it is backend web/a of this file"] {
        assert!(answer.body.contains(word), "{word}: {}", answer.body);
    }
}
