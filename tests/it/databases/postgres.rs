//! Probes of a real PostgreSQL server: logins, TLS, and what a probe leaves in the log.

use super::rigs::postgres::{PASSWORD, PROGRAMS, Postgres};
use super::rigs::private_file;
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, exclusive, have, secs};
use std::net::SocketAddr;

fn pool(name: &str, address: SocketAddr, keys: &str) -> Pool {
    let probe = format!("kind = \"postgres\"\ninterval = \"200ms\"\ntimeout = \"200ms\"\n{keys}");
    Pool::new(name).probe(&probe).backend("a", address)
}

fn detail(proxy: &TestProxy, pool: &str) -> String {
    proxy.explained(pool, "a")["last_probe"]["detail"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn every_login_method_of_postgresql_finds_the_role() {
    if !have(&PROGRAMS) {
        return;
    }
    let _share = exclusive::shared();
    let (mut server, files) = (Postgres::start(), tempfile::tempdir().expect("directory"));
    let file = |name: &str, text: &str| private_file(files.path(), name, text);
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).expect("certificate");
    server.take_tls(&made.cert.pem(), &made.signing_key.serialize_pem());
    let trusted = file("trusted.pem", &made.cert.pem());
    let right = format!("password_file = \"{}\"\n", file("right", PASSWORD));
    let wrong = format!("password_file = \"{}\"\n", file("wrong", "no"));
    let tls = format!("tls = {{ verify = \"{trusted}\" }}\n");
    let probes = [
        ("nobody", String::new()),
        ("nobody-tls", tls.clone()),
        ("trust", "user = \"postgres\"".to_owned()),
        ("cleartext", format!("user = \"cleartext\"\n{right}")),
        ("md5", format!("user = \"md5\"\n{right}")),
        ("scram", format!("user = \"scram\"\ndatabase = \"postgres\"\n{right}")),
        ("overtls", format!("user = \"overtls\"\ndatabase = \"postgres\"\n{right}{tls}")),
        ("asked", "user = \"scram\"\ndatabase = \"postgres\"".to_owned()),
        ("wrong", format!("user = \"scram\"\ndatabase = \"postgres\"\n{wrong}")),
        ("plain", format!("user = \"overtls\"\n{right}")),
    ];
    let conf = Conf::new(Engine::Epoll);
    let conf = probes.iter().fold(conf, |conf, (name, keys)| {
        conf.frontend(name, name, "").pool(pool(name, server.address, keys))
    });
    server.sql("CREATE DATABASE cleartext").expect("create a database");
    server.sql("CREATE DATABASE md5").expect("create a database");
    let proxy = TestProxy::start(conf);
    let expected = [
        ("nobody", "expected answer received"),
        ("nobody-tls", "expected answer received"),
        ("trust", "role primary"),
        ("cleartext", "role primary"),
        ("md5", "role primary"),
        ("scram", "role primary"),
        ("overtls", "role primary"),
        ("asked", "expected answer received"),
        (
            "wrong",
            "the server answers \"password authentication failed for user \\\"scram\\\"\" (28P01)",
        ),
        (
            "plain",
            "the server answers \"no pg_hba.conf entry for host \\\"127.0.0.1\\\", user \\\"overtls\\\", database \\\"overtls\\\", no encryption\" (28000)",
        ),
    ];
    for (name, detail) in expected {
        eventually(secs(10), &format!("{name}: {detail}"), || self::detail(&proxy, name) == detail);
    }
    let log = server.log();
    for noise in ["could not", "unexpected EOF", "incomplete", "invalid", "SSL error"] {
        assert!(!log.contains(noise), "{noise}: {log}");
    }

    // A server that starts up rejects logins.
    server.kill();
    eventually(secs(5), "the server is down", || {
        proxy.backend("scram", "a")["observation"] == "down"
    });
    server.restart();
    eventually(secs(10), "the server is up", || proxy.backend("scram", "a")["observation"] == "up");
}
