//! Who can reach the admin API: nobody from another host, unless told.
//!
//! Listening on a Unix socket or on loopback, it must not answer on any address
//! that the client's or a backend's host can name. Requests themselves are
//! other suites' business.

use crate::common::ports::free_port;
use crate::common::proxy::PROGRAM;
use crate::common::servers::Running;
use crate::common::{Engine, eventually, http, ms, on_every_engine, secs};
use crate::hosts::{FRONTEND, Hosts};
use crate::netns::{Namespace, networks_run};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Command, Stdio};

on_every_engine!(unix_admin_socket_opens_no_port);

fn unix_admin_socket_opens_no_port(engine: Engine) {
    if !networks_run() {
        return;
    }
    let hosts = Hosts::new(1, 70);
    let proxy = hosts.start(hosts.conf(engine, hosts.pool()));
    assert_eq!(proxy.admin_request("GET", "/live").status, 200);
    assert_eq!(listening(&hosts.balancer), [proxy.addr("web")]);
}

/// Every IPv4 and IPv6 address that somebody listens on, each once.
fn listening(host: &Namespace) -> Vec<SocketAddr> {
    let tables = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"];
    let read = || tables.map(|path| std::fs::read_to_string(path).unwrap_or_default());
    let mut found = Vec::new();
    for line in host.run(read).iter().flat_map(|table| table.lines().skip(1)) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        // 0A is TCP_LISTEN (proc_net_tcp).
        if fields[3] == "0A" {
            found.push(address(fields[1]));
        }
    }
    found.sort();
    found.dedup();
    found
}

/// `0100007F:1F90` is 127.0.0.1:8080: words in the machine's byte order.
fn address(text: &str) -> SocketAddr {
    let (ip, port) = text.split_once(':').unwrap();
    let port = u16::from_str_radix(port, 16).unwrap();
    match ip.len() {
        8 => {
            let word = u32::from_str_radix(ip, 16).unwrap();
            SocketAddr::from((Ipv4Addr::from(word.to_ne_bytes()), port))
        }
        // The test only needs to tell it from the frontend's.
        _ => panic!("a listener on IPv6: {text}"),
    }
}

#[test]
fn loopback_admin_answers_its_own_host_alone() {
    let _turn = crate::common::turn::shared();
    if !networks_run() {
        return;
    }
    let hosts = Hosts::new(1, 71);
    let port = free_port();
    let dir = tempfile::Builder::new().prefix("tg-").tempdir_in("/tmp").unwrap();
    let config = dir.path().join("tidegate.toml");
    let text = hosts.conf(Engine::Epoll, hosts.pool()).render(&format!("127.0.0.1:{port}"), "off");
    std::fs::write(&config, text).unwrap();
    let mut command = Command::new(PROGRAM);
    command.args(["run", "--config"]).arg(&config).stdout(Stdio::null()).stderr(Stdio::null());
    let _balancer = hosts.balancer.run(|| Running::start(&mut command));
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    eventually(secs(10), "it answers on its own host", || {
        hosts.balancer.run(|| http::over_tcp(loopback, "/live")).is_ok_and(|it| it.status == 200)
    });
    let host = &hosts.backends[0];
    for (from, own) in [(&hosts.client, FRONTEND), (&host.namespace, host.link.a())] {
        for ip in [own, Ipv4Addr::LOCALHOST, Ipv4Addr::UNSPECIFIED] {
            let to = SocketAddr::from((ip, port));
            let error = from.run(|| TcpStream::connect_timeout(&to, ms(2000))).expect_err("no");
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{to}");
        }
    }
}
