//! The codec against documents of the shape that the API pages and the vendor's own
//! templates show, and against damaged ones.

use super::*;
use proptest::prelude::*;

/// All fields that the page "Health" shows, and those of newer agents.
const SAMPLE: &str = r#"[
  {
    "Node": {
      "ID": "7d2c5f0e-51d8-4f5e-9d7b-0d3c36a8d1a4", "Node": "rack-7", "Address": "10.4.0.7",
      "Datacenter": "dc1", "TaggedAddresses": {"lan": "10.4.0.7", "wan": "10.4.0.7"},
      "Meta": {"rack": "7"}, "CreateIndex": 5, "ModifyIndex": 6
    },
    "Service": {
      "ID": "cache-a", "Service": "cache", "Tags": ["primary"], "Address": "10.4.1.7",
      "TaggedAddresses": {
        "lan": {"address": "10.4.1.7", "port": 6379}, "wan": {"address": "192.0.2.7", "port": 80}
      },
      "Meta": {"version": "7"}, "Port": 6379, "Weights": {"Passing": 10, "Warning": 1},
      "EnableTagOverride": false, "Namespace": "default", "Kind": "",
      "Proxy": {"Mode": "", "MeshGateway": {}, "Expose": {}}, "Connect": {}, "PeerName": "",
      "CreateIndex": 5, "ModifyIndex": 5
    },
    "Checks": [
      {
        "Node": "rack-7", "CheckID": "service:cache-a", "Name": "Service 'cache' check",
        "Status": "warning", "Notes": "", "Output": "slow", "ServiceID": "cache-a",
        "ServiceName": "cache", "ServiceTags": ["primary"], "Type": "ttl",
        "Definition": {}, "CreateIndex": 5, "ModifyIndex": 5
      },
      {
        "Node": "rack-7", "CheckID": "serfHealth", "Name": "Serf Health Status",
        "Status": "passing", "Notes": "", "Output": "", "ServiceID": "", "ServiceName": "",
        "ServiceTags": []
      }
    ]
  }
]"#;

fn entry(node: &str, service: &str, checks: &str) -> String {
    format!(r#"{{"Node":{{{node}}},"Service":{{{service}}},"Checks":[{checks}]}}"#)
}

fn check(id: &str, status: &str) -> String {
    format!(r#"{{"CheckID":"{id}","Status":"{status}"}}"#)
}

const NODE: &str = r#""Node":"n1","Address":"10.0.0.1""#;

fn read(entries: &[String]) -> Result<HealthAnswer, String> {
    read_health(format!("[{}]", entries.join(",")).as_bytes())
}

/// Wish, weight and raw state of an instance with these checks and weights.
fn meaning(weights: &str, checks: &[String]) -> (Wish, Option<u16>, &'static str) {
    let service = format!(r#""ID":"a","Address":"","Port":80{weights}"#);
    let answer = read(&[entry(NODE, &service, &checks.join(","))]).unwrap();
    let only = &answer.instances[0];
    (only.wish, only.weight, only.raw)
}

#[test]
fn every_field_that_counts_is_read_from_a_full_answer() {
    let answer = read_health(SAMPLE.as_bytes()).unwrap();
    let expected = ConsulInstance {
        name: "cache-a".into(),
        host: InstanceHost::Ip([10, 4, 1, 7].into()),
        port: 6379,
        weight: Some(1),
        wish: Wish::Sessions,
        raw: "warning",
    };
    assert_eq!(
        answer,
        HealthAnswer { instances: vec![expected], unreadable: Unreadable::default() }
    );
}

#[test]
fn checks_and_weights_give_the_wish() {
    let weights = r#","Weights":{"Passing":7,"Warning":2}"#;
    let (passing, warning) = (check("serfHealth", "passing"), check("c", "warning"));
    let critical = check("c2", "critical");
    let of = |weights, checks: &[&String]| {
        meaning(weights, &checks.iter().map(|check| (*check).clone()).collect::<Vec<_>>())
    };
    assert_eq!(of(weights, &[&passing]), (Wish::Sessions, Some(7), "passing"));
    assert_eq!(of(weights, &[]), (Wish::Sessions, Some(7), "passing"));
    assert_eq!(of("", &[&passing]), (Wish::Sessions, None, "passing"));
    assert_eq!(of(weights, &[&passing, &warning]), (Wish::Sessions, Some(2), "warning"));
    assert_eq!(of(weights, &[&critical, &warning]), (Wish::Critical, Some(7), "critical"));
    let drained = r#","Weights":{"Passing":7,"Warning":0}"#;
    assert_eq!(of(drained, &[&warning]), (Wish::Draining, Some(7), "warning"));
    let odd = r#","Weights":{"Passing":-3,"Warning":99999999}"#;
    assert_eq!(of(odd, &[&passing]).1, Some(1));
    assert_eq!(of(odd, &[&warning]).1, Some(u16::MAX));
    for id in ["_node_maintenance", "_service_maintenance:a"] {
        let maintenance = check(id, "critical");
        let expected = (Wish::Draining, Some(7), "maintenance");
        assert_eq!(of(weights, &[&critical, &maintenance]), expected);
    }
}

#[test]
fn the_nodes_address_serves_for_a_service_without_one() {
    let cases = [
        ("10.9.9.9", Some("10.9.9.9")),
        ("", Some("10.0.0.1")),
        ("fd00::7", Some("fd00::7")),
        ("::ffff:10.1.1.1", Some("10.1.1.1")),
        ("0.0.0.0", None),
    ];
    for (own, expected) in cases {
        let service = format!(r#""ID":"a","Address":"{own}","Port":80"#);
        let answer = read(&[entry(NODE, &service, "")]).unwrap();
        let found = answer.instances.first().map(|instance| instance.host.clone());
        let expected = expected.map(|ip| InstanceHost::Ip(ip.parse().unwrap()));
        assert_eq!(found, expected, "{own}");
        assert_eq!(answer.unreadable.count(), u32::from(expected.is_none()));
    }
}

#[test]
fn ids_of_several_nodes_get_the_name_of_their_node() {
    let on = |node: &str, id: &str| {
        let node = format!(r#""Node":"{node}","Address":"10.0.0.1""#);
        entry(&node, &format!(r#""ID":"{id}","Port":80"#), "")
    };
    let answer = read(&[on("n2", "web"), on("n1", "web"), on("n1", "api")]).unwrap();
    let names: Vec<&str> = answer.instances.iter().map(|instance| &*instance.name).collect();
    assert_eq!(names, ["api", "web@n1", "web@n2"]);
}

#[test]
fn the_order_of_entries_does_not_matter() {
    let at = |port: u16| entry(NODE, &format!(r#""ID":"web","Port":{port}"#), "");
    let (one, other) = (read(&[at(1), at(2)]).unwrap(), read(&[at(2), at(1)]).unwrap());
    assert_eq!(one, other);
    assert_eq!((one.instances.len(), one.instances[0].port, one.unreadable.count()), (1, 1, 1));
}

#[test]
fn entries_without_a_usable_place_are_counted() {
    let of = |service: &str| entry(NODE, service, "");
    let answer = read(&[
        of(r#""ID":"good","Port":80"#),
        of(r#""ID":"zero","Port":0"#),
        of(r#""ID":"large","Port":65536"#),
        of(r#""ID":"negative","Port":-1"#),
        of(r#""ID":"","Port":80"#),
        of(r#""ID":"line\nbreak","Port":80"#),
        of(r#""ID":"url","Address":"http://x/","Port":80"#),
        of(r#""ID":"name","Address":"db-1.example","Port":80"#),
    ]);
    let answer = answer.unwrap();
    let names: Vec<&str> = answer.instances.iter().map(|instance| &*instance.name).collect();
    assert_eq!((names, answer.unreadable.count()), (vec!["good", "name"], 6));
    assert_eq!(answer.instances[1].host, InstanceHost::Name("db-1.example".into()));
}

#[test]
fn instances_beyond_the_bound_leave_by_address() {
    let of = |number: u32| {
        let [_, _, high, low] = number.to_be_bytes();
        entry(NODE, &format!(r#""ID":"i{number}","Address":"10.0.{high}.{low}","Port":1"#), "")
    };
    let entries: Vec<String> = (0..10_005).rev().map(of).collect();
    let answer = read(&entries).unwrap();
    assert_eq!((answer.instances.len(), answer.unreadable.count()), (MEMBERS_MAX, 5));
    assert!(answer.instances.iter().all(|instance| &*instance.name != "i10000"));
}

#[test]
fn documents_of_another_form_are_refused_as_a_whole() {
    let service = r#""ID":"a","Port":80"#;
    let unknown = read(&[entry(NODE, service, &check("c", "unheard"))]).unwrap_err();
    assert_eq!(unknown, r#"check "c" of "a" has the unknown status "unheard""#);
    for body in ["", "null", "{}", "[", "[1]", "[{}]", r#"[{"Service":{"Port":1}}]"#, "No leader"] {
        assert!(read_health(body.as_bytes()).is_err(), "{body}");
    }
    let null = format!(r#"[{{"Node":{{{NODE}}},"Service":{{{service}}},"Checks":null}}]"#);
    assert_eq!(read_health(null.as_bytes()).unwrap().instances.len(), 1);
}

#[test]
fn the_question_is_a_path_with_encoded_parameters() {
    let query = RegistryQuery::Consul {
        service: "a/b c".into(),
        tags: vec!["v1".to_owned(), "x&y".to_owned()],
        datacenter: Some("dc2".to_owned()),
        namespace: Some("team".to_owned()),
        filter: Some("\"x\" in Service.Tags".to_owned()),
        max_stale: Duration::from_secs(10),
    };
    let path = health_path(&query, 7, Duration::from_millis(29_500)).unwrap();
    let expected = "/v1/health/service/a%2Fb%20c?index=7&wait=29500ms&tag=v1&tag=x%26y&dc=dc2\
                    &ns=team&filter=%22x%22%20in%20Service%2ETags";
    assert_eq!(path, expected);
    let other = RegistryQuery::Etcd { prefix: "/x/".into() };
    assert_eq!(health_path(&other, 0, Duration::ZERO), None);
}

#[test]
fn headers_decide_whether_an_answer_can_remove() {
    let meta = |headers: &[(&str, &'static str)]| {
        read_meta(|name| headers.iter().find(|(own, _)| *own == name).map(|(_, value)| *value))
    };
    let max = Duration::from_secs(10);
    let trusts = |headers: &[(&str, &'static str)]| meta(headers).is_trusted(max, false, true);
    assert!(trusts(&[]) && trusts(&[("x-consul-knownleader", "true")]));
    assert!(trusts(&[("x-consul-lastcontact", "10000")]));
    assert!(!trusts(&[("x-consul-lastcontact", "10001")]));
    assert!(!trusts(&[("x-consul-knownleader", "false")]));
    assert!(!trusts(&[("x-consul-results-filtered-by-acls", "true")]));
    let denies = meta(&[("x-consul-default-acl-policy", "deny")]);
    assert!(denies.is_trusted(max, false, true) && denies.is_trusted(max, true, false));
    assert!(!denies.is_trusted(max, true, true));
    assert_eq!(meta(&[("x-consul-index", "81")]).index, 81);
    assert_eq!(meta(&[("x-consul-index", "-1")]).index, 0);
}

proptest! {
    /// Bytes that are no document and damaged documents give errors, never a panic.
    #[test]
    fn no_body_panics(body: Vec<u8>, at in 0..SAMPLE.len(), byte: u8) {
        let _ = read_health(&body);
        let mut damaged = SAMPLE.as_bytes().to_vec();
        damaged[at] = byte;
        let _ = read_health(&damaged);
        let _ = read_health(&SAMPLE.as_bytes()[..at]);
    }
}

#[test]
fn an_answer_of_more_entries_than_there_can_be_is_refused() {
    let entry = r#"{"Service":{"ID":"a"}}"#;
    let answer = format!("[{}]", vec![entry; ENTRIES_MAX + 1].join(","));
    assert!(read_health(answer.as_bytes()).unwrap_err().contains("at most 100000 entries"));
}

#[test]
fn an_address_of_no_host_is_unreadable_in_any_spelling() {
    for address in ["0.0.0.0", "::", "::ffff:0.0.0.0", "224.0.0.1", "ff02::1", "::ffff:224.0.0.1"] {
        let answer = format!(r#"[{{"Service":{{"ID":"a","Port":1,"Address":"{address}"}}}}]"#);
        let read = read_health(answer.as_bytes()).unwrap();
        assert_eq!((read.instances.len(), read.unreadable.count()), (0, 1), "{address}");
        assert!(read.unreadable.are_named() && read.unreadable.has("a"));
    }
}
