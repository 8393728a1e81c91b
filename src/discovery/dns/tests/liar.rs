//! What the answers of a scripted server tell about addresses.

use super::*;
use crate::testing::dns_liar::*;
use std::collections::HashMap;
use std::sync::Mutex;

/// A server whose answers the test changes: addresses and code, per type of record.
#[derive(Clone, Default)]
struct Zone(Arc<Mutex<ZoneRecords>>);

type ZoneRecords = HashMap<u16, (u16, Vec<&'static str>)>;

impl Zone {
    fn set(&self, kind: u16, code: u16, addresses: &[&'static str]) {
        self.0.lock().unwrap().insert(kind, (code, addresses.to_vec()));
    }

    async fn serve(&self, ttl: u32) -> (DnsLiar, TestResolver) {
        let zone = self.clone();
        let liar = DnsLiar::start(move |question| {
            let known = zone.0.lock().unwrap().get(&question.kind).cloned();
            let (code, addresses) = known.unwrap_or_default();
            question.addresses(ttl, &addresses).code(code).send()
        });
        let liar = liar.await;
        let test = TestResolver::new(&[liar.address]);
        (liar, test)
    }
}

#[tokio::test]
async fn addresses_of_both_families_are_one_trusted_set() {
    let zone = Zone::default();
    zone.set(TYPE_A, 0, &["192.0.2.2", "192.0.2.1"]);
    zone.set(TYPE_AAAA, 0, &["2001:db8::1"]);
    let (_liar, test) = zone.serve(60).await;
    let set = RunningSource::start(web(), &test.resolver).whole().await;
    assert_eq!(names(&set), ["192.0.2.1:80", "192.0.2.2:80", "[2001:db8::1]:80"]);
    assert!(set.trusted && set.members.iter().all(|m| m.weight.is_none() && m.tier == 0));
    for (family, expected) in [(NameFamily::Ipv4, 2), (NameFamily::Ipv6, 1)] {
        let question = question("web.example", NameRecord::Address, family);
        let set = RunningSource::start(question, &test.resolver).whole().await;
        assert_eq!(set.members.len(), expected);
    }
}

#[tokio::test]
async fn missing_names_are_trusted_empty_sets_that_repeat() {
    let zone = Zone::default();
    zone.set(TYPE_A, 3, &[]);
    zone.set(TYPE_AAAA, 3, &[]);
    let (_liar, test) = zone.serve(60).await;
    let mut source = RunningSource::start(web(), &test.resolver);
    for _ in 0..3 {
        let start = clock::now();
        let set = source.whole().await;
        assert!(set.trusted && set.members.is_empty());
        assert!(clock::now() - start < Duration::from_secs(6));
    }
}

#[tokio::test]
async fn answers_without_records_and_errors_are_failures() {
    for (code, why, text) in [
        (0, SourceFailure::NotFound, "NOERROR"),
        (2, SourceFailure::Protocol, "SERVFAIL"),
        (5, SourceFailure::Auth, "REFUSED"),
    ] {
        let zone = Zone::default();
        zone.set(TYPE_A, code, &[]);
        zone.set(TYPE_AAAA, code, &[]);
        let (_liar, test) = zone.serve(60).await;
        let (failed, detail) = RunningSource::start(web(), &test.resolver).failed().await;
        assert_eq!(failed, why);
        assert!(detail.contains(text), "{detail}");
    }
}

#[tokio::test]
async fn failure_of_a_family_without_addresses_of_the_other_is_a_failure() {
    let zone = Zone::default();
    zone.set(TYPE_A, 2, &[]);
    let (_liar, test) = zone.serve(60).await;
    let (why, _) = RunningSource::start(web(), &test.resolver).failed().await;
    assert_eq!(why, SourceFailure::Protocol);
}

#[tokio::test]
async fn failure_of_a_family_never_seen_gives_a_set_that_removes_nothing() {
    let zone = Zone::default();
    zone.set(TYPE_A, 0, &["192.0.2.1"]);
    zone.set(TYPE_AAAA, 2, &[]);
    let (_liar, test) = zone.serve(60).await;
    let mut source = RunningSource::start(web(), &test.resolver);
    let set = source.whole().await;
    assert!(!set.trusted);
    assert_eq!(names(&set), ["192.0.2.1:80"]);
    assert_eq!(source.failed().await.0, SourceFailure::Protocol);
    // The failed family recovers long before the TTL of the other one is over.
    zone.set(TYPE_AAAA, 0, &["2001:db8::1"]);
    source.until(&["192.0.2.1:80", "[2001:db8::1]:80"]).await;
}

#[tokio::test]
async fn failure_of_a_family_keeps_its_last_addresses() {
    let zone = Zone::default();
    zone.set(TYPE_A, 0, &["192.0.2.1", "192.0.2.2"]);
    zone.set(TYPE_AAAA, 0, &["2001:db8::1"]);
    let (_liar, test) = zone.serve(0).await;
    let mut source = RunningSource::start(web(), &test.resolver);
    assert_eq!(source.whole().await.members.len(), 3);
    zone.set(TYPE_AAAA, 2, &[]);
    zone.set(TYPE_A, 0, &["192.0.2.1"]);
    source.until(&["192.0.2.1:80", "[2001:db8::1]:80"]).await;
    assert_eq!(source.failed().await.0, SourceFailure::Protocol);
}

#[tokio::test]
async fn ttl_zero_is_asked_once_per_ttl_min() {
    let zone = Zone::default();
    zone.set(TYPE_A, 0, &["192.0.2.1"]);
    let (liar, test) = zone.serve(0).await;
    let mut source = RunningSource::start(web(), &test.resolver);
    let start = clock::now();
    for _ in 0..4 {
        assert!(source.whole().await.trusted);
    }
    let took = clock::now() - start;
    assert!(took >= Duration::from_secs(3) && took < Duration::from_secs(6), "{took:?}");
    assert!(liar.count(TYPE_A) <= 5);
}

#[tokio::test]
async fn ttls_have_bounds() {
    for (ttl, min, max, expected) in [(0, 200, 500, 200..900), (3600, 100, 300, 300..1000)] {
        let zone = Zone::default();
        zone.set(TYPE_A, 0, &["192.0.2.1"]);
        let (liar, _) = zone.serve(ttl).await;
        let test = TestResolver::with(&[liar.address], "", "", |config| {
            config.ttl_min = Duration::from_millis(min);
            config.ttl_max = Duration::from_millis(max);
        });
        let mut source = RunningSource::start(web(), &test.resolver);
        source.whole().await;
        let start = clock::now();
        source.whole().await;
        let took = (clock::now() - start).as_millis();
        assert!(expected.contains(&took), "{took} ms");
    }
}

#[tokio::test]
async fn several_sources_of_one_name_ask_once() {
    let zone = Zone::default();
    zone.set(TYPE_A, 0, &["192.0.2.1"]);
    let (liar, test) = zone.serve(1).await;
    let mut sources: Vec<_> =
        (0..20).map(|_| RunningSource::start(web(), &test.resolver)).collect();
    let start = clock::now();
    for _ in 0..3 {
        for source in &mut sources {
            source.until(&["192.0.2.1:80"]).await;
        }
    }
    let rounds = (clock::now() - start).as_secs() as usize + 2;
    let (a, aaaa) = (liar.count(TYPE_A), liar.count(TYPE_AAAA));
    assert!(a <= rounds && aaaa <= rounds, "{a} and {aaaa} questions in {rounds} rounds");
}

#[tokio::test]
async fn rotating_subsets_and_orders_are_told_as_they_come() {
    let mut turn = 0;
    let liar = DnsLiar::start(move |question| {
        let all = ["192.0.2.1", "192.0.2.2", "192.0.2.3"];
        turn += usize::from(question.kind == TYPE_A);
        question.addresses(0, &[all[turn % 3], all[(turn + 1) % 3]]).send()
    })
    .await;
    let test = TestResolver::new(&[liar.address]);
    let mut source = RunningSource::start(web(), &test.resolver);
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..3 {
        let names = names(&source.whole().await);
        assert!(names.is_sorted(), "{names:?}");
        seen.extend(names);
    }
    assert_eq!(seen.len(), 3);
}

#[tokio::test]
async fn new_settings_apply_at_once() {
    let (old, new) = (Zone::default(), Zone::default());
    old.set(TYPE_A, 0, &["192.0.2.1"]);
    new.set(TYPE_A, 0, &["192.0.2.2"]);
    let ((_old, test), (new, _)) = (old.serve(3600).await, new.serve(3600).await);
    let mut source = RunningSource::start(web(), &test.resolver);
    source.until(&["192.0.2.1:80"]).await;
    let mut config = test.resolver.changes().borrow().as_ref().clone();
    config.servers = Some(vec![new.address]);
    test.resolver.configure(config);
    let start = clock::now();
    source.until(&["192.0.2.2:80"]).await;
    assert!(clock::now() - start < Duration::from_secs(2));
}

#[tokio::test]
async fn an_answer_to_older_settings_does_not_count() {
    let old = DnsLiar::start(|question| {
        let mut steps = vec![LiarStep::Wait(Duration::from_millis(300))];
        steps.extend(question.addresses(3600, &["192.0.2.1"]).send());
        steps
    })
    .await;
    let new = DnsLiar::start(|question| question.addresses(3600, &["192.0.2.2"]).send()).await;
    let test = TestResolver::new(&[old.address]);
    let mut source = RunningSource::start(web(), &test.resolver);
    while old.seen().is_empty() {
        sleep(Duration::from_millis(10)).await;
    }
    let mut config = test.resolver.changes().borrow().as_ref().clone();
    config.servers = Some(vec![new.address]);
    test.resolver.configure(config);
    assert_eq!(names(&source.whole().await), ["192.0.2.2:80"]);
}

#[tokio::test]
async fn a_server_that_answers_again_is_used_within_five_seconds() {
    let zone = Zone::default();
    zone.set(TYPE_A, 0, &["192.0.2.1"]);
    let (up, down) = (Arc::new(Mutex::new(true)), zone.clone());
    let is_up = Arc::clone(&up);
    let liar = DnsLiar::start(move |question| {
        let addresses = down.0.lock().unwrap()[&TYPE_A].1.clone();
        let answers = *is_up.lock().unwrap();
        if answers { question.addresses(0, &addresses).send() } else { Vec::new() }
    })
    .await;
    let test = TestResolver::with(&[liar.address], "", "", |_| {});
    let mut source = RunningSource::start(web(), &test.resolver);
    source.until(&["192.0.2.1:80"]).await;
    *up.lock().unwrap() = false;
    for _ in 0..2 {
        while !matches!(source.next().await, Told::Failed { why: SourceFailure::Timeout, .. }) {}
    }
    *up.lock().unwrap() = true;
    let start = clock::now();
    source.until(&["192.0.2.1:80"]).await;
    assert!(clock::now() - start < Duration::from_secs(5));
}
