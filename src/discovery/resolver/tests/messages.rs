//! The decoder: bytes to records, and any other bytes to an error.

use super::*;
use crate::resolver::wire::{ALIASES_MAX, BadMessage, DnsReply, ReplyCode, decode, encode};
use proptest::prelude::*;

fn question(kind: RecordKind) -> RecordQuestion {
    RecordQuestion { name: DnsName::parse("Web.Example.").unwrap(), kind }
}

fn liar_question(kind: u16) -> LiarQuestion {
    let name = "web.example".to_owned();
    LiarQuestion { id: 7, name, kind, edns: true, tcp: false, port: 1 }
}

fn read(reply: &LiarReply, kind: RecordKind) -> Result<DnsReply, BadMessage> {
    decode(&reply.bytes(), 7, &question(kind))
}

fn malformed(result: Result<DnsReply, BadMessage>) -> String {
    match result {
        Err(BadMessage::Malformed(what)) => what,
        other => panic!("{other:?}"),
    }
}

#[test]
fn question_is_one_name_with_recursion_desired() {
    let plain = encode(&question(RecordKind::A), 0x1234, false).unwrap();
    let expected = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x03web\x07example\0\0\x01\0\x01";
    assert_eq!(plain, expected);
    let edns = encode(&question(RecordKind::A), 0x1234, true).unwrap();
    assert_eq!(edns[plain.len()..], *b"\0\0\x29\x04\xd0\0\0\0\0\0\0", "OPT with 1,232 bytes");
}

#[test]
fn names_that_fit_into_no_message_are_refused() {
    let long = "a".repeat(64);
    let total = "a.".repeat(128);
    for bad in ["", ".", "a..b", "a b", "a\\b", "ü.example", &long, &total, ".a"] {
        assert!(DnsName::parse(bad).is_err(), "{bad}");
    }
    for good in ["a", "a.", "_http._tcp.Example", &"a".repeat(63), &"a.".repeat(127)] {
        assert!(DnsName::parse(good).is_ok(), "{good}");
    }
}

#[test]
fn aliases_are_followed_and_the_smallest_ttl_counts() {
    let asked = liar_question(TYPE_A);
    let address = LiarData::Address("192.0.2.1".parse().unwrap());
    let reply = asked
        .reply()
        .record("B.example", 90, address.clone())
        .record("web.example", 20, LiarData::Alias("b.example"))
        .record("other.example", 1, address);
    let read = read(&reply, RecordKind::A).unwrap();
    assert_eq!(read.records.addresses, ["192.0.2.1".parse::<IpAddr>().unwrap()]);
    assert_eq!(read.records.ttl, Duration::from_secs(20));
}

#[test]
fn chains_of_aliases_have_a_bound_and_loops_end() {
    let chain = |length: usize| {
        let name = |at: usize| if at == 0 { "web.example".to_owned() } else { format!("a{at}") };
        let reply = (0..length).fold(liar_question(TYPE_A).reply(), |reply, at| {
            reply.record(&name(at), 60, LiarData::Alias(&name(at + 1)))
        });
        let address = LiarData::Address("192.0.2.1".parse().unwrap());
        read(&reply.record(&name(length), 60, address), RecordKind::A)
    };
    assert_eq!(chain(ALIASES_MAX).unwrap().records.addresses.len(), 1);
    assert!(malformed(chain(ALIASES_MAX + 1)).contains("aliases"));
    let reply = liar_question(TYPE_A).reply();
    let to_itself = reply.record("web.example", 60, LiarData::Alias("web.example"));
    assert!(malformed(read(&to_itself, RecordKind::A)).contains("loop"));
}

#[test]
fn messages_of_other_questions_are_foreign() {
    let reply = liar_question(TYPE_A).addresses(60, &["192.0.2.1"]);
    let foreign = [
        reply.clone().id(8),
        reply.clone().question(Some(("other.example", TYPE_A))),
        reply.clone().question(Some(("web.example", TYPE_AAAA))),
        reply.clone().question(None),
    ];
    for reply in foreign {
        assert_eq!(read(&reply, RecordKind::A), Err(BadMessage::Foreign));
    }
    let query = encode(&question(RecordKind::A), 7, true).unwrap();
    assert_eq!(decode(&query, 7, &question(RecordKind::A)), Err(BadMessage::Foreign));
    assert_eq!(decode(b"\0\x07", 7, &question(RecordKind::A)), Err(BadMessage::Foreign));
    // An old server repeats no question when it cannot read it.
    let format_error = reply.question(None).code(1);
    assert_eq!(read(&format_error, RecordKind::A).unwrap().code, ReplyCode::FORMAT_ERROR);
}

#[test]
fn addresses_that_no_member_can_have_are_counted() {
    let unusable = ["0.0.0.0", "224.0.0.1", "255.255.255.255", "192.0.2.1", "192.0.2.1"];
    let read_a = read(&liar_question(TYPE_A).addresses(60, &unusable), RecordKind::A).unwrap();
    assert_eq!((read_a.records.addresses.len(), read_a.records.unusable), (1, 3));
    let six = liar_question(TYPE_AAAA).addresses(60, &["::", "ff02::1", "2001:db8::1"]);
    let read_six = read(&six, RecordKind::Aaaa).unwrap();
    assert_eq!((read_six.records.addresses.len(), read_six.records.unusable), (1, 2));
}

#[test]
fn services_have_targets_and_additional_addresses() {
    let service = |target| LiarData::Service { priority: 1, weight: 2, port: 80, target };
    let address = |text: &str| LiarData::Address(text.parse().unwrap());
    let reply = liar_question(TYPE_SRV)
        .reply()
        .record("web.example", 60, service("A.example"))
        .record("web.example", 60, service("."))
        .record("web.example", 60, service("a\\b"))
        .additional("a.example", 5, address("192.0.2.1"))
        .additional("a.example", 50, address("2001:db8::1"))
        .additional("unrelated.example", 1, address("192.0.2.9"));
    let records = read(&reply, RecordKind::Srv).unwrap().records;
    let targets: Vec<_> = records.services.iter().map(|s| s.target.as_ref()).collect();
    assert_eq!(targets, [Some(&DnsName::parse("a.example").unwrap()), None]);
    assert_eq!((records.additional.len(), records.unusable), (2, 1));
    assert_eq!(records.ttl, Duration::from_secs(5));
}

#[test]
fn ttl_with_the_highest_bit_is_zero() {
    let reply = liar_question(TYPE_A).addresses(0x8000_0001, &["192.0.2.1"]);
    assert_eq!(read(&reply, RecordKind::A).unwrap().records.ttl, Duration::ZERO);
}

#[test]
fn compression_loops_and_long_chains_of_pointers_are_errors() {
    let pointer = |to: usize| (0xc000 | to as u16).to_be_bytes();
    let record_at = liar_question(TYPE_A).reply().bytes().len();
    for target in [record_at, record_at + 2, 0x3fff] {
        let mut bytes = liar_question(TYPE_A).addresses(60, &["192.0.2.1"]).bytes();
        // Name of the record: a pointer instead of the written name.
        bytes.splice(record_at..record_at + 13, pointer(target));
        assert!(!malformed(decode(&bytes, 7, &question(RecordKind::A))).is_empty());
    }
    // 8,000 pointers, each to the one before it, and 4,000 records whose name is the last.
    let mut chain = pointer(12).to_vec();
    let data_at = record_at + 13 + 10;
    (0..7990).for_each(|at| chain.extend(pointer(data_at + 2 * at)));
    let reply = liar_question(TYPE_A).reply().record("web.example", 9, LiarData::Raw(10, chain));
    let mut bytes = reply.bytes();
    for _ in 0..4000 {
        bytes.extend(pointer(data_at + 2 * 7990));
        bytes.extend(b"\0\x01\0\x01\0\0\0\x09\0\x04\xc0\0\x02\x01");
    }
    bytes[6..8].copy_from_slice(&4001u16.to_be_bytes());
    let start = clock::now();
    let read = decode(&bytes, 7, &question(RecordKind::A));
    let took = clock::now() - start;
    drop(read);
    assert!(took < Duration::from_secs(5), "{took:?}");
    eprintln!("the longest chains of pointers in 64 KiB: {took:?}");
}

#[test]
fn counts_in_the_header_cost_no_memory() {
    let mut bytes = liar_question(TYPE_A).reply().bytes();
    bytes[6..8].copy_from_slice(&[0xff; 2]);
    assert!(malformed(decode(&bytes, 7, &question(RecordKind::A))).contains("10000"));
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        fuzz::check_answers(&bytes);
        // Past the checks of the header.
        if bytes.len() >= 13 {
            bytes[1..5].copy_from_slice(&[0, 7, 0x81, 0x80]);
            bytes[5..13].iter_mut().step_by(2).for_each(|byte| *byte = 0);
        }
        fuzz::check_answers(&bytes);
    }

    #[test]
    fn changed_answers_are_read_or_refused(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let service = LiarData::Service { priority: 1, weight: 2, port: 80, target: "a.example" };
        let reply = liar_question(TYPE_SRV)
            .reply()
            .record("web.example", 60, LiarData::Alias("b.example"))
            .record("b.example", 60, service)
            .additional("a.example", 5, LiarData::Address("192.0.2.1".parse().unwrap()))
            .additional("", 0, LiarData::Raw(41, vec![0, 10, 0, 1, 9]));
        let mut bytes = reply.bytes();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes.insert(0, 2);
        fuzz::check_answers(&bytes);
        fuzz::check_answers(&bytes[..cut.index(bytes.len())]);
    }
}
