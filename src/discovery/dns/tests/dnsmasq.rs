//! The DNS source and a real dnsmasq.

use super::*;
use crate::resolver::tests::eventually;
use crate::testing::dnsmasq::Dnsmasq;
use std::fmt::Write;
use std::net::Ipv4Addr;
use std::sync::atomic::Ordering;

/// No further arguments.
pub(super) const NONE: &[&str] = &[];

pub(super) fn resolver(server: &Dnsmasq) -> TestResolver {
    TestResolver::with(&[server.address()], "", "", |_| {})
}

const HOSTS: &str = "192.0.2.1 web.example\n192.0.2.2 web.example\n2001:db8::1 web.example\n";
const MEMBERS: [&str; 3] = ["192.0.2.1:80", "192.0.2.2:80", "[2001:db8::1]:80"];

#[tokio::test]
async fn addresses_aliases_and_changes_are_followed() {
    let chain = ["--cname=a1.example,a2.example", "--cname=a2.example,web.example"];
    let Some(server) = Dnsmasq::start(HOSTS, 1, &chain) else { return };
    let test = resolver(&server);
    let mut source = RunningSource::start(web(), &test.resolver);
    source.until(&MEMBERS).await;
    let a1 = question("a1.example", NameRecord::Address, NameFamily::Ipv4);
    RunningSource::start(a1, &test.resolver).until(&MEMBERS[..2]).await;
    server.change("192.0.2.2 web.example\n192.0.2.3 web.example\n");
    let start = clock::now();
    source.until(&["192.0.2.2:80", "192.0.2.3:80"]).await;
    assert!(clock::now() - start < Duration::from_secs(2), "TTL 1 s and 1 s");
    server.change("");
    let start = clock::now();
    source.until(&[]).await;
    assert!(clock::now() - start < Duration::from_secs(2), "NXDOMAIN within TTL 1 s and 1 s");
    server.change(HOSTS);
    source.until(&MEMBERS).await;
}

#[tokio::test]
async fn services_come_with_their_addresses() {
    let services = [
        "--srv-host=_http._tcp.web.example,a.example,8080,10,30",
        "--srv-host=_http._tcp.web.example,b.example,8081,20,0",
    ];
    let hosts = "192.0.2.1 a.example\n2001:db8::1 a.example\n192.0.2.2 b.example\n";
    let Some(server) = Dnsmasq::start(hosts, 1, &services) else { return };
    let test = resolver(&server);
    let srv = question("_http._tcp.web.example", NameRecord::Srv, NameFamily::Both);
    let set = RunningSource::start(srv, &test.resolver).whole().await;
    let member = |m: &Announced| (m.name.to_string(), m.weight.unwrap(), m.tier);
    let expected =
        [("192.0.2.1:8080", 30, 0), ("192.0.2.2:8081", 1, 1), ("[2001:db8::1]:8080", 30, 0)];
    let expected = expected.map(|(name, weight, tier)| (name.to_owned(), weight, tier));
    assert_eq!(set.members.iter().map(member).collect::<Vec<_>>(), expected);
    assert!(set.trusted);
}

#[tokio::test]
async fn a_thousand_addresses_come_over_tcp() {
    let mut hosts = String::new();
    for host in 0..1000u32 {
        let _ = writeln!(hosts, "{} web.example", Ipv4Addr::from(0x0a01_0000 + host));
    }
    let Some(server) = Dnsmasq::start(&hosts, 1, NONE) else { return };
    let test = resolver(&server);
    let set = RunningSource::start(web(), &test.resolver).whole().await;
    assert_eq!((set.members.len(), set.trusted), (1000, true));
    assert_eq!(test.resolver.counters().over_tcp.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn killed_server_is_a_failure_and_recovers_within_five_seconds() {
    let Some(mut server) = Dnsmasq::start(HOSTS, 1, NONE) else { return };
    let test = resolver(&server);
    let mut source = RunningSource::start(web(), &test.resolver);
    source.until(&MEMBERS).await;
    server.kill();
    for _ in 0..3 {
        while !matches!(source.next().await, Told::Failed { why: SourceFailure::Connect, .. }) {}
    }
    server.start_again();
    let start = clock::now();
    source.until(&MEMBERS).await;
    let took = clock::now() - start;
    assert!(took < Duration::from_secs(6), "{took:?}");
}

#[tokio::test]
async fn stopped_server_is_a_failure_and_recovers_within_five_seconds() {
    let Some(server) = Dnsmasq::start(HOSTS, 1, NONE) else { return };
    let test = resolver(&server);
    let mut source = RunningSource::start(web(), &test.resolver);
    source.until(&MEMBERS).await;
    server.pause();
    while !matches!(source.next().await, Told::Failed { why: SourceFailure::Timeout, .. }) {}
    let start = clock::now();
    assert!(test.resolver.host("other.example").await.is_err());
    assert!(clock::now() - start < Duration::from_secs(5), "2 rounds of 2 s");
    server.resume();
    let start = clock::now();
    source.until(&MEMBERS).await;
    let took = clock::now() - start;
    assert!(took < Duration::from_secs(5), "{took:?}");
}

#[tokio::test]
async fn names_that_come_after_the_start_are_told() {
    let Some(server) = Dnsmasq::start("", 1, NONE) else { return };
    let test = resolver(&server);
    let mut source = RunningSource::start(web(), &test.resolver);
    source.until(&[]).await;
    server.change(HOSTS);
    source.until(&MEMBERS).await;
    eventually(async || test.resolver.host("web.example").await.is_ok()).await;
}
