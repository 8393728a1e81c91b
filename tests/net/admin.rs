//! Access to the admin API from other hosts: none by default, and only with the token if it
//! listens on a reachable address.
//!
//! On a Unix socket or loopback the API must not answer on any address that other hosts can
//! reach. On a reachable address it must reject invalid requests of curl and continue to
//! serve authorised requests.

use crate::common::ports::free_port;
use crate::common::proxy::PROGRAM;
use crate::common::servers::Running;
use crate::common::{Engine, client, eventually, have, http, measured, ms, on_every_engine, proc};
use crate::common::{patience, secs};
use crate::hosts::{FRONTEND, Hosts};
use crate::netns::{Namespace, networks_run};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::Instant;

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

/// Every IPv4 and IPv6 address with a listener on `host`, sorted and without duplicates.
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

/// Parses `0100007F:1F90` as 127.0.0.1:8080. The address is a word in the host's byte order.
fn address(text: &str) -> SocketAddr {
    let (ip, port) = text.split_once(':').unwrap();
    let port = u16::from_str_radix(port, 16).unwrap();
    match ip.len() {
        8 => {
            let word = u32::from_str_radix(ip, 16).unwrap();
            SocketAddr::from((Ipv4Addr::from(word.to_ne_bytes()), port))
        }
        // No IPv6 listener is expected on this host.
        _ => panic!("a listener on IPv6: {text}"),
    }
}

#[test]
fn loopback_admin_is_unreachable_from_other_hosts() {
    let _share = crate::common::exclusive::shared();
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
    eventually(secs(10), "the API answers on its own host", || {
        hosts
            .balancer
            .run(|| http::over_tcp(loopback, "/live"))
            .is_ok_and(|answer| answer.status == 200)
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

/// A Tidegate process with an admin API that other hosts can reach.
struct Open {
    hosts: Hosts,
    balancer: Running,
    admin: SocketAddr,
    frontend: SocketAddr,
    _dir: tempfile::TempDir,
}

const TOKEN: &str = "0123456789-the-right-token";

impl Open {
    #[track_caller]
    fn start(seed: u64) -> Open {
        let hosts = Hosts::new(1, seed);
        let admin = SocketAddr::from((FRONTEND, free_port()));
        let dir = tempfile::Builder::new().prefix("tg-").tempdir_in("/tmp").unwrap();
        let [token, config] = ["token", "tidegate.toml"].map(|name| dir.path().join(name));
        std::fs::write(&token, TOKEN).unwrap();
        std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o600)).unwrap();
        let conf = hosts.conf(Engine::Epoll, hosts.pool());
        let frontend = conf.address("web");
        let listen = format!("{admin}\"\ntoken_file = \"{}", token.display());
        std::fs::write(&config, conf.render(&listen, "off")).unwrap();
        let mut command = Command::new(PROGRAM);
        command.args(["run", "--config"]).arg(&config).stdout(Stdio::null()).stderr(Stdio::null());
        let balancer = hosts.balancer.run(|| Running::start(&mut command));
        let open = Open { hosts, balancer, admin, frontend, _dir: dir };
        eventually(secs(20), "a request with the token succeeds", || {
            open.curl("/ready", &["-H", RIGHT]) == "200"
        });
        open
    }

    /// Returns the status that curl gets on the client's host, or 000 for none.
    fn curl(&self, path: &str, arguments: &[&str]) -> String {
        let mut command = Command::new("curl");
        command.args(["-s", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "30"]);
        command.args(arguments).arg(format!("http://{}{path}", self.admin));
        let output = self.hosts.client.run(|| command.output()).expect("curl");
        String::from_utf8(output.stdout).unwrap()
    }
}

const RIGHT: &str = "Authorization: Bearer 0123456789-the-right-token";
const WRONG: &str = "Authorization: Bearer 0123456789-the-wrong-token";

#[test]
fn invalid_requests_from_another_host_are_rejected() {
    let _share = crate::common::exclusive::shared();
    if !networks_run() || !have(&["curl"]) {
        return;
    }
    let open = Open::start(72);
    let large = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(large.path(), vec![b'x'; 10_000_000]).unwrap();
    let large = format!("@{}", large.path().display());
    let long = format!("X: {}", "x".repeat(100_000));
    let many: Vec<String> = (0..100).map(|number| format!("-HX-{number}: x")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).chain(["-H", RIGHT]).collect();
    let shutdown = "/v1/shutdown";
    #[rustfmt::skip]
    let table: &[(&str, &str, &[&str], &str)] = &[
        ("reading without a token", "/v1/status", &[], "401"),
        ("metrics without a token", "/metrics", &[], "401"),
        ("changing without a token", shutdown, &["-XPOST"], "401"),
        ("a wrong token", shutdown, &["-XPOST", "-H", WRONG], "401"),
        ("a token that is a part", shutdown, &["-XPOST", "-H", "Authorization: Bearer 0123456789"], "401"),
        ("an empty token", shutdown, &["-XPOST", "-H", "Authorization: Bearer "], "401"),
        ("a password", shutdown, &["-XPOST", "-u", "admin:0123456789-the-right-token"], "401"),
        ("the token in the query", "/v1/shutdown?token=0123456789-the-right-token", &["-XPOST"], "401"),
        ("a foreign host", shutdown, &["-XPOST", "-H", RIGHT, "-H", "Host: evil.example"], "403"),
        ("a foreign origin", shutdown, &["-XPOST", "-H", RIGHT, "-H", "Origin: http://evil.example"], "403"),
        ("a foreign origin that reads", "/v1/status", &["-H", RIGHT, "-H", "Origin: http://evil.example"], "403"),
        ("a foreign program", "/v1/upgrade?binary=/bin/sh", &["-XPOST", "-H", RIGHT], "403"),
        ("a huge body", "/v1/reload", &["-H", RIGHT, "-H", "Expect:", "--data-binary", &large], "413"),
        ("a huge body in chunks", "/v1/reload", &["-H", RIGHT, "-H", "Expect:", "-H", "Transfer-Encoding: chunked", "--data-binary", &large], "413"),
        ("a huge head", "/v1/status", &["-H", RIGHT, "-H", &long, "-H", &long], "431"),
        ("a hundred headers", "/v1/status", &many, "431"),
        ("a path upwards", "/../../etc/passwd", &["--path-as-is", "-H", RIGHT], "404"),
        ("a name upwards", "/v1/pools/..%2f..%2fetc/backends/passwd/explain", &["-H", RIGHT], "404"),
        ("another method", shutdown, &["-XDELETE", "-H", RIGHT], "405"),
        ("a valid request", "/v1/status", &["-H", RIGHT], "200"),
    ];
    for (what, path, arguments, wanted) in table {
        assert_eq!(open.curl(path, arguments), *wanted, "{what}");
    }
}

#[test]
fn slow_head_from_another_host_is_closed() {
    let _share = crate::common::exclusive::shared();
    if !networks_run() || !have(&["curl"]) {
        return;
    }
    let open = Open::start(73);
    let mut slow = open.hosts.client.run(|| TcpStream::connect(open.admin)).unwrap();
    slow.set_read_timeout(Some(patience(secs(20)))).unwrap();
    slow.write_all(format!("GET /v1/status HTTP/1.1\r\n{RIGHT}\r\nHost:").as_bytes()).unwrap();
    let mut answer = String::new();
    slow.read_to_string(&mut answer).expect("the connection is closed");
    assert!(!answer.contains("200 OK"), "{answer}");
    assert_eq!(open.curl("/v1/status", &["-H", RIGHT]), "200");
}

mod quiet {
    use super::*;

    /// With 1,000 silent admin connections, requests are answered and sessions are served.
    #[test]
    fn thousand_admin_connections_block_no_request() {
        let _share = crate::common::exclusive::shared();
        if !networks_run() || !have(&["curl"]) {
            return;
        }
        const COUNT: usize = 1_000;
        tidegate_net::limits::raise_descriptor_limit();
        let open = Open::start(74);
        let _service = open.hosts.backends[0].start_echo();
        let session = open.hosts.client.run(|| client::connect(open.frontend));
        client::exchange(&session, b"before").unwrap();
        let before = proc::fd_count(open.balancer.pid());
        let crowd: Vec<TcpStream> = open.hosts.client.run(|| {
            (0..COUNT)
                .filter_map(|_| TcpStream::connect_timeout(&open.admin, ms(3000)).ok())
                .collect()
        });
        let mut slowest = ms(0);
        for _ in 0..5 {
            let asked = Instant::now();
            assert_eq!(open.curl("/v1/status", &["-H", RIGHT]), "200");
            slowest = slowest.max(asked.elapsed());
            client::exchange(&session, b"during it").unwrap();
            let another = open.hosts.client.run(|| client::connect(open.frontend));
            client::exchange(&another, b"a new one").unwrap();
        }
        let held = proc::fd_count(open.balancer.pid()).saturating_sub(before);
        measured(&format!(
            "{} of {COUNT} admin connections established; slowest request {slowest:?}; \
             {held} descriptors more",
            crowd.len()
        ));
        // 64 connection slots, one accepted connection, and connections with a pending answer.
        assert!(held < 160, "{held} more descriptors");
        // At most 128 connections are queued before a request, and 64 are handled per 100 ms.
        assert!(slowest < patience(secs(10)), "{slowest:?}");
    }
}
