//! Probes of a real MariaDB server: logins, TLS, the role, and what a probe leaves behind.

use super::rigs::mariadb::{Mariadb, PROGRAMS};
use super::rigs::private_file;
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, exclusive, have, secs};
use std::io::Read;
use std::net::{SocketAddr, TcpStream};

fn pool(name: &str, address: SocketAddr, keys: &str) -> Pool {
    let probe = format!("kind = \"mysql\"\ninterval = \"200ms\"\ntimeout = \"200ms\"\n{keys}");
    Pool::new(name).probe(&probe).backend("a", address)
}

fn start(server: &Mariadb, probes: &[(&str, String)]) -> TestProxy {
    let conf = probes.iter().fold(Conf::new(Engine::Epoll), |conf, (name, keys)| {
        conf.frontend(name, name, "").pool(pool(name, server.address, keys))
    });
    TestProxy::start(conf)
}

#[track_caller]
fn wait_for(proxy: &TestProxy, pool: &str, detail: &str) {
    eventually(secs(10), &format!("{pool}: {detail}"), || {
        proxy.explained(pool, "a")["last_probe"]["detail"] == detail
    });
}

#[test]
fn login_over_mysql_finds_the_role_and_leaves_no_aborted_connection() {
    if !have(&PROGRAMS) {
        return;
    }
    let _share = exclusive::shared();
    let files = tempfile::tempdir().expect("directory");
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).expect("certificate");
    let trusted = private_file(files.path(), "trusted.pem", &made.cert.pem());
    let key = private_file(files.path(), "key.pem", &made.signing_key.serialize_pem());
    super::rigs::give("mysql", files.path());
    let server = Mariadb::start(&[&format!("--ssl-cert={trusted}"), &format!("--ssl-key={key}")]);
    server
        .sql(
            "INSTALL SONAME 'auth_ed25519';
             CREATE USER open@'%';
             CREATE USER native@'%' IDENTIFIED VIA mysql_native_password USING PASSWORD('secret');
             CREATE USER encrypted@'%' IDENTIFIED BY 'secret' REQUIRE SSL;
             CREATE USER edwards@'%' IDENTIFIED VIA ed25519 USING PASSWORD('secret')",
        )
        .expect("create users");
    let password = |name: &str, text: &str| {
        format!("password_file = \"{}\"\n", private_file(files.path(), name, text))
    };
    let (right, wrong) = (password("right", "secret"), password("wrong", "no"));
    let tls = format!("tls = {{ verify = \"{trusted}\" }}\n");
    let good = [
        ("open", "user = \"open\"".to_owned()),
        ("native", format!("user = \"native\"\n{right}")),
        ("encrypted", format!("user = \"encrypted\"\n{right}{tls}")),
    ];
    let before = server.counter("Aborted_connects");
    let proxy = start(&server, &good);
    for (name, _) in &good {
        wait_for(&proxy, name, "role primary");
    }
    server.sql("SET GLOBAL read_only = 1").expect("set read_only");
    for (name, _) in &good {
        wait_for(&proxy, name, "role replica");
    }
    drop(proxy);
    assert_eq!(server.counter("Aborted_connects"), before);
    assert_eq!(server.counter("Aborted_clients"), 0);
    assert!(!server.log().contains("Aborted"), "{}", server.log());

    let bad = [
        ("wrong", format!("user = \"native\"\n{wrong}")),
        ("plain", format!("user = \"encrypted\"\n{right}")),
        ("edwards", format!("user = \"edwards\"\n{right}")),
    ];
    let proxy = start(&server, &bad);
    let denied = |user: &str| {
        format!(
            "the server answers \"Access denied for user \\'{user}\\'@\\'localhost\\' (using \
             password: YES)\" (1045)"
        )
    };
    wait_for(&proxy, "wrong", &denied("native"));
    wait_for(&proxy, "plain", &denied("encrypted"));
    let detail = "the server asks for \"client_ed25519\", the probe logs in by \
                  mysql_native_password and caching_sha2_password";
    wait_for(&proxy, "edwards", detail);
}

/// Connects from 127.0.0.2 and leaves during the handshake. Returns the greeting.
fn leave(to: SocketAddr) -> String {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
    let socket = socket.expect("socket");
    socket.bind(&SocketAddr::from(([127, 0, 0, 2], 0)).into()).expect("bind");
    socket.connect(&to.into()).expect("connect");
    let mut stream = TcpStream::from(socket);
    let mut greeting = [0; 256];
    let count = stream.read(&mut greeting).expect("read the greeting");
    String::from_utf8_lossy(&greeting[..count]).into_owned()
}

#[test]
fn probes_without_a_user_do_not_make_mysql_block_this_host() {
    if !have(&PROGRAMS) {
        return;
    }
    let _share = exclusive::shared();
    let server = Mariadb::start(&["--max-connect-errors=3"]);
    // Without a user that this host may use, the server sends no greeting.
    server.sql("CREATE USER application@'%' IDENTIFIED BY 'secret'").expect("create a user");
    let proxy = start(&server, &[("db", "source = \"127.0.0.2\"".to_owned())]);
    let before = server.counter("Connections");
    eventually(secs(10), "ten probes are done", || server.counter("Connections") > before + 20);
    assert_eq!(proxy.backend("db", "a")["observation"], "up");
    let detail = proxy.explained("db", "a")["last_probe"]["detail"].clone();
    assert_eq!(detail, "expected answer received");
    drop(proxy);

    // The control: connections that end during the handshake do.
    let blocked = (0..8).any(|_| leave(server.address).contains("is blocked"));
    assert!(blocked, "the server blocks hosts");
    let proxy = start(&server, &[("db", "source = \"127.0.0.2\"".to_owned())]);
    eventually(secs(10), "the probe names the block", || {
        let detail = proxy.explained("db", "a")["last_probe"]["detail"].to_string();
        detail.contains("is blocked because of many connection errors") && detail.contains("1129")
    });
}
