//! Tests of the list decoder: forms, faults with their places, arbitrary input.

use super::*;
use proptest::prelude::*;

fn list(text: &str) -> Vec<Announced> {
    decode_list(text.as_bytes()).unwrap()
}

fn fault(text: &str) -> String {
    decode_list(text.as_bytes()).unwrap_err().to_string()
}

#[test]
fn entries_are_texts_or_objects() {
    let members = list(
        r#"["10.0.0.1:80", {"address": "[2001:db8::1]:81", "name": "b", "weight": 7,
            "state": "maintenance", "backup": true, "labels": {"zone": "a"}},
            {"address": "10.0.0.\u0032:80"}]"#,
    );
    let [first, second, third] = &members[..] else { panic!("{members:?}") };
    assert_eq!((&*first.name, first.weight, first.wish), ("10.0.0.1:80", None, Wish::Sessions));
    assert_eq!((&*second.name, second.weight, second.tier), ("b", Some(7), 1));
    assert_eq!((first.tier, third.tier), (0, 0));
    let tiers = list(
        r#"[{"address": "10.0.0.1:80", "tier": 9}, {"address": "10.0.0.2:80", "tier": 1,
            "backup": true}]"#,
    );
    assert_eq!((tiers[0].tier, tiers[1].tier), (9, 1));
    assert_eq!((second.wish, &*second.raw), (Wish::Draining, "maintenance"));
    assert_eq!(&*third.name, "10.0.0.2:80");
    assert_eq!(second.labels.iter().collect::<Vec<_>>(), [("zone", "a")]);
    assert!(list(" [] ").is_empty());
}

#[test]
fn each_state_has_its_wish() {
    for (state, wish) in [
        ("ready", Wish::Sessions),
        ("starting", Wish::Starting),
        ("draining", Wish::Draining),
        ("maintenance", Wish::Draining),
        ("stopping", Wish::Draining),
        ("critical", Wish::Critical),
        ("down", Wish::Critical),
    ] {
        let members = list(&format!(r#"[{{"address": "10.0.0.1:80", "state": "{state}"}}]"#));
        assert_eq!((members[0].wish, &*members[0].raw), (wish, state));
    }
}

#[test]
fn faults_name_their_place_and_what_is_right() {
    let object =
        |rest: &str| format!("[\"10.0.0.9:80\",\n {{\"address\": \"10.0.0.1:80\"{rest}}}]");
    for (text, parts) in [
        ("", &["line 1, column 0: EOF"][..]),
        ("{}", &["expected a list of members"]),
        ("[\"10.0.0.1:80\"", &["entry 2, line 1", "EOF"]),
        ("[\"10.0.0.1:80\"] x", &["line 1, column 17", "trailing"]),
        ("[\"10.0.0.1\"]", &["entry 1", "\"10.0.0.1\" is not IP:PORT", "10.0.0.1:8080"]),
        ("[\"web:80\"]", &["\"web:80\" is not IP:PORT"]),
        ("[\"10.0.0.1:0\"]", &["has port 0"]),
        ("[\"0.0.0.0:1\"]", &["is not the address of one host"]),
        ("[7]", &["entry 1", "integer `7`", "a member: \"IP:PORT\" or an object"]),
        ("[{}]", &["missing field `address`"]),
        ("[\"10.0.0.1:80\", \"10.0.0.1:80\"]", &["entry 2, name", "is also in entry 1"]),
        (&object(", \"wieght\": 1"), &["entry 2, line 2", "unknown field `wieght`", "`weight`"]),
        (&object(", \"weight\": 0"), &["weight is 0", "draining"]),
        (&object(", \"weight\": 65536"), &["larger than 65535"]),
        (&object(", \"weight\": -1"), &["entry 2", "`-1`"]),
        (&object(", \"state\": \"up\""), &["unknown variant `up`", "`ready`"]),
        (&object(", \"name\": \"a b\""), &["contains a space"]),
        (&object(", \"name\": \"\""), &["name has 0 bytes"]),
        (&object(", \"backup\": 1"), &["expected a boolean"]),
        (&object(", \"tier\": 10"), &["entry 2", "tier 10 is larger than 9"]),
        (
            &object(", \"tier\": 2, \"backup\": true"),
            &["entry 2", "tier 2 contradicts backup true, which is tier 1"],
        ),
        (&object(", \"labels\": {\"a\": 1}"), &["expected a string"]),
        (&object(", \"address\": \"10.0.0.2:80\""), &["duplicate field `address`"]),
        (&object(", \"labels\": {}, \"labels\": {}"), &["duplicate field `labels`"]),
        (&object(", \"weight\": 1e400"), &["entry 2"]),
        (&object(", \"weight\": NaN"), &["entry 2"]),
        (&object(", \"weight\": 1.5"), &["entry 2", "floating point"]),
        ("[\"10.0.0.1:80\", \"[::ffff:10.0.0.1]:80\"]", &["is also in entry 1"]),
        ("[\"[::ffff:0.0.0.0]:80\"]", &["is not the address of one host"]),
    ] {
        let said = fault(text);
        assert!(parts.iter().all(|part| said.contains(part)), "{text}: {said}");
    }
}

#[test]
fn list_beyond_the_bound_is_refused() {
    let entry = |n: usize| format!("\"10.{}.{}.{}:80\"", n / 65536, n / 256 % 256, n % 256);
    let of = |n: usize| format!("[{}]", (0..n).map(entry).collect::<Vec<_>>().join(","));
    assert_eq!(list(&of(MEMBERS_MAX)).len(), MEMBERS_MAX);
    assert!(fault(&of(MEMBERS_MAX + 1)).contains("more than 10000 entries"));
    assert!(fault(&"[".repeat(1 << 20)).contains("entry 1"));
}

#[test]
fn member_takes_the_name_of_its_key() {
    let member = decode_member(br#"{"address": "10.0.0.1:80"}"#, "web-1").unwrap();
    assert_eq!(&*member.name, "web-1");
    let member = decode_member(br#"{"address": "10.0.0.1:80", "name": "own"}"#, "web-1").unwrap();
    assert_eq!(&*member.name, "own");
    let member = decode_member(br#""10.0.0.1:80""#, "web-1").unwrap();
    assert_eq!(&*member.name, "web-1");
    assert!(decode_member(br#""10.0.0.1:80""#, "a/b").is_err());
    assert!(decode_list(b"[\"10.0.0.1:80\", {\"address\": \"\xff\"}]").is_err());
    let fault = decode_member(b"[]", "web-1").unwrap_err();
    assert!(fault.entry.is_none() && fault.message.contains("a member"), "{fault}");
}

proptest! {
    #[test]
    fn prefix_of_a_list_is_no_list(cut in 0.0..1.0f64, ports in proptest::collection::btree_set(1u16.., 0..9)) {
        let entries: Vec<String> = ports.iter().map(|port| match port % 2 {
            0 => format!("\"10.0.0.1:{port}\""),
            _ => format!("{{\"address\": \"10.0.0.1:{port}\", \"state\": \"ready\"}}"),
        }).collect();
        let text = format!("[{}]", entries.join(", "));
        prop_assert_eq!(list(&text).len(), ports.len());
        let cut = (text.len() as f64 * cut) as usize;
        prop_assert!(decode_list(&text.as_bytes()[..cut]).is_err());
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        fuzz::check(&bytes);
    }

    #[test]
    fn mutated_lists_are_read_or_refused_with_a_place(at in 0usize..160, byte in any::<u8>()) {
        let mut bytes = br#"[{"address": "10.0.0.1:80", "name": "b", "weight": 7, "state": "ready",
            "backup": true, "labels": {"zone": "a"}}, "[2001:db8::1]:81"]"#.to_vec();
        let at = at % bytes.len();
        bytes[at] = byte;
        fuzz::check(&bytes);
        match decode_list(&bytes) {
            Ok(members) => prop_assert!(members.len() <= 2),
            Err(problem) => prop_assert!(problem.line > 0 && !problem.message.is_empty()),
        }
    }
}
