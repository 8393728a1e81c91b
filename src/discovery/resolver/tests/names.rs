//! Which names the resolver asks for, and which it answers itself.

use super::*;

/// A server that knows these names, each with the address 192.0.2.N of its place, and no
/// other.
async fn server(names: &'static [&'static str]) -> DnsLiar {
    let script = move |question: &LiarQuestion| {
        let place = names.iter().position(|name| *name == question.name);
        let reply = match place {
            Some(place) => question.addresses(60, &[&format!("192.0.2.{place}")]),
            None => question.reply().code(3),
        };
        reply.send()
    };
    DnsLiar::start(script).await
}

fn names(liar: &DnsLiar) -> Vec<String> {
    let of_a = |question: LiarQuestion| (question.kind == TYPE_A).then_some(question.name);
    liar.seen().into_iter().filter_map(of_a).collect()
}

#[tokio::test]
async fn ip_addresses_resolve_to_themselves() {
    let test = TestResolver::new(&[]);
    assert_eq!(test.host("192.0.2.1").await.unwrap(), ["192.0.2.1"]);
    assert_eq!(test.host("2001:db8::1").await.unwrap(), ["2001:db8::1"]);
}

#[tokio::test]
async fn hosts_take_precedence_and_changes_apply() {
    let liar = server(&["web.example"]).await;
    let hosts = "192.0.2.9 web.example\n2001:db8::9 web.example\n";
    let test = TestResolver::with(&[liar.address], "", hosts, |_| {});
    let expected = ["192.0.2.9", "2001:db8::9"];
    assert_eq!(test.host("Web.Example.").await.unwrap(), expected);
    assert!(liar.seen().is_empty());
    std::fs::write(test.dir.path().join("hosts"), "").unwrap();
    eventually(async || test.host("web.example").await.unwrap() == ["192.0.2.0"]).await;
}

#[tokio::test]
async fn a_name_with_a_final_dot_is_asked_as_it_is() {
    let liar = server(&[]).await;
    let test = TestResolver::with(&[liar.address], "search a.example\n", "", |_| {});
    let failure = test.failure("web.").await;
    assert_eq!(failure.why, SourceFailure::NotFound);
    assert!(failure.detail.contains("NXDOMAIN"), "{failure}");
    assert_eq!(names(&liar), ["web"]);
}

#[tokio::test]
async fn search_domains_apply_in_the_order_of_ndots() {
    let liar = server(&["web.two.b.example"]).await;
    let conf = "search a.example b.example\noptions ndots:2\n";
    let test = TestResolver::with(&[liar.address], conf, "", |_| {});
    assert_eq!(test.host("web.two").await.unwrap(), ["192.0.2.0"]);
    assert_eq!(names(&liar), ["web.two.a.example", "web.two.b.example"]);
    assert!(test.host("some.other.name").await.is_err());
    let asked = names(&liar).split_off(2);
    assert_eq!(
        asked,
        ["some.other.name", "some.other.name.a.example", "some.other.name.b.example"]
    );
}

#[tokio::test]
async fn a_failure_ends_the_search() {
    let script = |question: &LiarQuestion| match &*question.name {
        "web.a.example" => question.reply().code(2).send(),
        _ => question.addresses(60, &["192.0.2.1"]).send(),
    };
    let liar = DnsLiar::start(script).await;
    let conf = "search a.example b.example\n";
    let test = TestResolver::with(&[liar.address], conf, "", |_| {});
    let failure = test.failure("web").await;
    assert_eq!(failure.why, SourceFailure::Protocol);
    assert!(failure.detail.contains("SERVFAIL"), "{failure}");
    assert!(failure.detail.contains(&liar.address.to_string()), "{failure}");
    assert_eq!(names(&liar), ["web.a.example"]);
}

#[tokio::test]
async fn servers_of_resolv_conf_are_used_and_read_again() {
    let test =
        TestResolver::with(&[], "nameserver 127.0.0.53\n", "", |config| config.servers = None);
    let servers = || test.resolver.settings(clock::now()).resolv_conf.servers.clone();
    assert_eq!(servers(), ["127.0.0.53:53".parse().unwrap()]);
    std::fs::write(test.dir.path().join("resolv.conf"), "nameserver 127.0.0.54\n").unwrap();
    eventually(async || servers() == ["127.0.0.54:53".parse().unwrap()]).await;
}

#[tokio::test]
async fn names_that_fit_into_no_message_fail_without_a_question() {
    let liar = server(&[]).await;
    let test = TestResolver::new(&[liar.address]);
    let failure = test.failure("ü.example").await;
    assert_eq!(failure.why, SourceFailure::NotFound);
    assert!(liar.seen().is_empty());
}
