//! SRV records: priorities, weights, targets and their addresses.

use super::*;
use crate::testing::dns_liar::*;

const NAME: &str = "_http._tcp.web.example";

fn srv() -> NameQuestion {
    question(NAME, NameRecord::Srv, NameFamily::Both)
}

/// A service that the server announces: priority, weight, port and target.
type Service = (u16, u16, u16, &'static str);

async fn serve(
    services: &'static [Service],
    addresses: &'static [(&'static str, &'static str)],
    with_additional: bool,
) -> (DnsLiar, TestResolver) {
    let liar = DnsLiar::start(move |question| {
        let of_name = addresses.iter().filter(|(name, _)| *name == question.name);
        if question.kind != TYPE_SRV {
            let found: Vec<&str> = of_name.map(|(_, address)| *address).collect();
            let code = if found.is_empty() { 3 } else { 0 };
            return question.addresses(60, &found).code(code).send();
        }
        let reply = services.iter().fold(question.reply(), |reply, service| {
            let (priority, weight, port, target) = *service;
            reply.record(NAME, 60, LiarData::Service { priority, weight, port, target })
        });
        let additional = addresses.iter().filter(|_| with_additional);
        let reply = additional.fold(reply, |reply, (name, address)| {
            reply.additional(name, 60, LiarData::Address(address.parse().unwrap()))
        });
        reply.send()
    })
    .await;
    let test = TestResolver::new(&[liar.address]);
    (liar, test)
}

/// Name, weight and tier of each member.
fn members(set: &WholeSet) -> Vec<(String, u16, u8)> {
    let member = |m: &Announced| (m.name.to_string(), m.weight.unwrap(), m.tier);
    set.members.iter().map(member).collect()
}

#[tokio::test]
async fn rank_of_a_priority_is_the_tier_of_its_members() {
    let services: &[Service] =
        &[(20, 7, 81, "b.example"), (10, 3, 80, "a.example"), (30, 0, 82, "b.example")];
    let addresses = &[("a.example", "192.0.2.1"), ("b.example", "192.0.2.2")];
    for with_additional in [true, false] {
        let (liar, test) = serve(services, addresses, with_additional).await;
        let set = RunningSource::start(srv(), &test.resolver).whole().await;
        let expected = [("192.0.2.1:80", 3, 0), ("192.0.2.2:81", 7, 1), ("192.0.2.2:82", 1, 2)];
        assert_eq!(members(&set), expected.map(|(n, w, t)| (n.to_owned(), w, t)));
        assert!(set.trusted);
        assert_eq!(liar.count(TYPE_A), if with_additional { 0 } else { 2 });
        assert_eq!(liar.count(TYPE_AAAA), 2, "what the additional records lack is asked");
    }
}

#[tokio::test]
async fn port_of_the_configuration_takes_precedence() {
    let (_liar, test) =
        serve(&[(1, 1, 80, "a.example")], &[("a.example", "192.0.2.1")], true).await;
    let question = NameQuestion { port: Some(9000), ..srv() };
    let set = RunningSource::start(question, &test.resolver).whole().await;
    assert_eq!(names(&set), ["192.0.2.1:9000"]);
}

#[test]
fn weights_keep_their_ratio_within_a_priority() {
    let record = |priority, weight| ServiceRecord { priority, weight, port: 1, target: None };
    let weights = |given: &[(u16, u16)]| {
        let records: Vec<_> = given.iter().map(|(p, w)| record(*p, *w)).collect();
        let refs: Vec<_> = records.iter().collect();
        let scale = ServiceScale::of(&refs);
        records.iter().map(|record| scale.of_record(record).0).collect::<Vec<_>>()
    };
    assert_eq!(weights(&[(1, 0), (1, 0)]), [1, 1]);
    assert_eq!(weights(&[(1, 0), (1, 10)]), [1, 10]);
    assert_eq!(weights(&[(1, 1), (1, 255)]), [1, 255]);
    assert_eq!(weights(&[(1, 65535), (1, 32768), (1, 1)]), [1000, 500, 1]);
    assert_eq!(weights(&[(1, 5), (2, 65535)]), [5, 1000]);
}

#[test]
fn of_two_services_with_one_address_the_primary_counts() {
    let address = "192.0.2.1:80".parse().unwrap();
    let mut set = NamedMembers::default();
    for (weight, tier) in [(5, 1), (2, 0), (3, 0), (9, 1)] {
        set.add(member(address, Some(weight), tier));
    }
    assert_eq!(members(&set.whole(true)), [("192.0.2.1:80".to_owned(), 3, 0)]);
}

#[test]
fn sets_that_are_too_large_are_cut_by_address() {
    let mut set = NamedMembers::default();
    for host in 0..(MEMBERS_MAX as u32 + 5) {
        set.add(member(SocketAddr::new(IpAddr::V4((0x0a00_0000 + host).into()), 80), None, 0));
    }
    let set = set.whole(true);
    assert_eq!((set.members.len(), set.unreadable.count()), (MEMBERS_MAX, 5));
    assert_eq!(&*set.members[0].name, "10.0.0.0:80");
}

#[tokio::test]
async fn target_of_a_dot_means_that_the_service_has_no_members() {
    let (_liar, test) = serve(&[(0, 0, 0, ".")], &[], true).await;
    let set = RunningSource::start(srv(), &test.resolver).whole().await;
    assert!(set.trusted && set.members.is_empty());
}

#[tokio::test]
async fn targets_without_addresses_are_counted_and_all_of_them_are_a_failure() {
    let some: &[Service] = &[(1, 1, 80, "a.example"), (1, 1, 80, "none.example")];
    let (_liar, test) = serve(some, &[("a.example", "192.0.2.1")], false).await;
    let set = RunningSource::start(srv(), &test.resolver).whole().await;
    assert!(set.trusted);
    assert_eq!((names(&set), set.unreadable.count()), (vec!["192.0.2.1:80".to_owned()], 1));
    let (_liar, test) = serve(&[(1, 1, 80, "none.example")], &[], false).await;
    let (why, detail) = RunningSource::start(srv(), &test.resolver).failed().await;
    assert_eq!(why, SourceFailure::NotFound);
    assert!(detail.contains("none of the 1 targets"), "{detail}");
}

#[tokio::test]
async fn names_without_services_are_failures_and_missing_names_are_empty() {
    let (_liar, test) = serve(&[], &[], false).await;
    let (why, detail) = RunningSource::start(srv(), &test.resolver).failed().await;
    assert_eq!(why, SourceFailure::NotFound);
    assert!(detail.contains("SRV"), "{detail}");
    let liar = DnsLiar::start(|question| question.reply().code(3).send()).await;
    let test = TestResolver::new(&[liar.address]);
    let set = RunningSource::start(srv(), &test.resolver).whole().await;
    assert!(set.trusted && set.members.is_empty());
}

#[tokio::test]
async fn each_trusted_set_comes_from_new_records() {
    let liar = DnsLiar::start(|question| {
        let target = "a.example";
        let service = LiarData::Service { priority: 1, weight: 1, port: 80, target };
        match question.kind {
            TYPE_SRV => question.reply().record(NAME, 3600, service).send(),
            TYPE_A => question.addresses(0, &["192.0.2.1"]).send(),
            _ => question.addresses(3600, &["2001:db8::1"]).send(),
        }
    })
    .await;
    let test = TestResolver::new(&[liar.address]);
    let mut source = RunningSource::start(srv(), &test.resolver);
    for sets in 1..=3 {
        assert!(source.whole().await.trusted);
        let counts = [TYPE_SRV, TYPE_A, TYPE_AAAA].map(|kind| liar.count(kind));
        assert!(counts.iter().all(|count| *count >= sets), "{counts:?} questions, {sets} sets");
    }
}

#[tokio::test]
async fn failed_target_keeps_its_last_addresses() {
    let mut count = 0;
    let liar = DnsLiar::start(move |question| {
        let service = |target| LiarData::Service { priority: 1, weight: 1, port: 80, target };
        if question.kind == TYPE_SRV {
            count += 1;
            let reply = question.reply().record(NAME, 0, service("a.example"));
            return reply.record(NAME, 0, service("b.example")).send();
        }
        let address = if question.name == "a.example" { "192.0.2.1" } else { "192.0.2.2" };
        let code = if question.name == "b.example" && count > 1 { 2 } else { 0 };
        question.addresses(0, &[address]).code(code).send()
    })
    .await;
    let test = TestResolver::new(&[liar.address]);
    let mut source = RunningSource::start(srv(), &test.resolver);
    let both = ["192.0.2.1:80", "192.0.2.2:80"];
    source.until(&both).await;
    source.until(&both).await;
    assert_eq!(source.failed().await.0, SourceFailure::Protocol);
}
