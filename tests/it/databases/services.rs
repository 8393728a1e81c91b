//! Probes of other services, with real servers: OpenLDAP, aiosmtpd and dnsmasq.

use super::rigs::services::Service;
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, exclusive, have, secs};
use std::net::SocketAddr;

fn start(pools: &[(&str, SocketAddr, &str)]) -> TestProxy {
    let conf = pools.iter().fold(Conf::new(Engine::Epoll), |conf, (name, address, keys)| {
        let probe = format!("interval = \"200ms\"\ntimeout = \"200ms\"\nfall = 2\n{keys}");
        let pool = Pool::new(name).probe(&probe).backend("a", *address);
        conf.frontend(name, name, "").pool(pool)
    });
    TestProxy::start(conf)
}

#[track_caller]
fn wait_for(proxy: &TestProxy, pool: &str, observation: &str, detail: &str) {
    eventually(secs(10), &format!("{pool}: {detail}"), || {
        proxy.backend(pool, "a")["observation"] == observation
            && proxy.explained(pool, "a")["last_probe"]["detail"] == detail
    });
}

const GOOD: &str = "expected answer received";

#[test]
fn directory_server_is_up_while_it_takes_anonymous_binds() {
    if !have(&["slapd"]) {
        return;
    }
    let _share = exclusive::shared();
    let (mut open, closed) = (Service::ldap(""), Service::ldap("disallow bind_anon"));
    let ldap = "kind = \"ldap\"";
    let proxy = start(&[("open", open.address, ldap), ("closed", closed.address, ldap)]);
    wait_for(&proxy, "open", "up", GOOD);
    let rejected = "the result of the bind is 48: \"anonymous bind disallowed\"";
    wait_for(&proxy, "closed", "down", rejected);
    open.kill();
    wait_for(&proxy, "open", "down", "connection refused");
    open.start();
    wait_for(&proxy, "open", "up", GOOD);
}

#[test]
fn mail_server_is_up_while_it_answers_hello() {
    if !have(&["aiosmtpd"]) {
        return;
    }
    let _share = exclusive::shared();
    let mut mail = Service::smtp();
    let proxy = start(&[("mail", mail.address, "kind = \"smtp\"")]);
    wait_for(&proxy, "mail", "up", GOOD);
    mail.kill();
    wait_for(&proxy, "mail", "down", "connection refused");
}

#[test]
fn dns_server_is_up_while_it_answers_with_the_expected_code() {
    if !have(&["dnsmasq"]) {
        return;
    }
    let _share = exclusive::shared();
    let mut server = Service::dns();
    let (at, known) = (server.address, "kind = \"dns\"\nname = \"www.example.com.\"");
    let udp = format!("{known}\ntransport = \"udp\"");
    let unknown = "kind = \"dns\"\nname = \"no.example.com\"\ntransport = \"udp\"";
    let expected = format!("{unknown}\nrcode = \"nxdomain\"");
    let pools = [
        ("tcp", at, known),
        ("udp", at, &*udp),
        ("unknown", at, unknown),
        ("expected", at, &*expected),
    ];
    let proxy = start(&pools);
    for pool in ["tcp", "udp", "expected"] {
        wait_for(&proxy, pool, "up", GOOD);
    }
    let other = "the code of the answer is NXDOMAIN, expected NOERROR";
    wait_for(&proxy, "unknown", "down", other);
    server.kill();
    wait_for(&proxy, "tcp", "down", "connection refused");
    wait_for(&proxy, "udp", "down", "connection refused");
}
