//! Tests of the datagram against the format table: round trips, truncation, additions,
//! bounds.

use super::*;
use crate::testing::{START, TestSender, secret};
use proptest::prelude::*;

fn datagram() -> Vec<u8> {
    TestSender::new().send().to_vec()
}

/// Returns the datagram with some bytes replaced and a valid signature.
fn signed_again(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut changed = datagram();
    changed[at..at + bytes.len()].copy_from_slice(bytes);
    let end = changed.len() - TAG_BYTES;
    let tag = secret(1).tag(&changed[..end]);
    changed[end..].copy_from_slice(&tag);
    changed
}

fn wrong(bytes: &[u8]) -> ParseError {
    ParsedHeartbeat::read(bytes).expect_err("malformed")
}

/// A datagram encoded in Python as `examples/heartbeat/sender.py` does. It checks the
/// format independently of this crate.
const FROM_PYTHON: &str = "\
    5447484201000204000000070000\
    01a3185c5000000000000000000100\
    0001a3185c500000000064000000110003\
    00fa00500a000001037765620161";

#[test]
fn encoded_bytes_match_the_format_table() {
    let bytes = datagram();
    let hex: String = bytes[..bytes.len() - TAG_BYTES].iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(hex, FROM_PYTHON);
}

#[test]
fn truncated_datagram_is_rejected() {
    let bytes = datagram();
    for length in 0..bytes.len() {
        let cut = wrong(&bytes[..length]);
        assert!(matches!(cut, ParseError::Short), "{length}: {cut:?}");
    }
}

#[test]
fn trailing_bytes_are_rejected() {
    for more in [1, 2, 100, 1_000, 65_000] {
        let bytes = [datagram(), vec![0; more]].concat();
        assert_eq!(wrong(&bytes), ParseError::Long);
    }
}

#[test]
fn wrong_name_lengths_are_rejected() {
    assert_eq!(wrong(&signed_again(54, &[4])), ParseError::Short);
    assert_eq!(wrong(&signed_again(54, &[255])), ParseError::Short);
    assert_eq!(wrong(&signed_again(58, &[0])), ParseError::Long);
}

#[test]
fn other_versions_and_flags_are_rejected() {
    for at in [4, 5] {
        assert_eq!(wrong(&signed_again(at, &[2])), ParseError::Version);
    }
    assert_eq!(wrong(&signed_again(0, b"HTTP")), ParseError::Magic);
}

#[test]
fn values_out_of_bounds_are_rejected() {
    let cases: [(usize, &[u8], ParseError); 12] = [
        (6, &[0], ParseError::State),
        (6, &[5], ParseError::State),
        (7, &[5], ParseError::Address),
        (36, &0_u32.to_be_bytes(), ParseError::Value),
        (36, &3_600_001_u32.to_be_bytes(), ParseError::Value),
        (44, &0_u16.to_be_bytes(), ParseError::Value),
        (44, &1_001_u16.to_be_bytes(), ParseError::Value),
        (46, &1_001_u16.to_be_bytes(), ParseError::Value),
        (48, &[0, 0], ParseError::Address),
        (50, &[0, 0, 0, 0], ParseError::Address),
        (50, &[224, 0, 0, 1], ParseError::Address),
        (50, &[255, 255, 255, 255], ParseError::Address),
    ];
    for (at, bytes, expected) in cases {
        assert_eq!(wrong(&signed_again(at, bytes)), expected, "{bytes:?} at {at}");
    }
}

#[test]
fn names_allow_only_the_characters_of_the_configuration() {
    for bad in [b' ', b'/', b':', b'"', 0, 0x7f, 0x80, 0xff] {
        assert_eq!(wrong(&signed_again(55, &[bad])), ParseError::Name, "pool {bad}");
        assert_eq!(wrong(&signed_again(59, &[bad])), ParseError::Name, "name {bad}");
    }
    assert_eq!(wrong(&signed_again(59, b".")), ParseError::Name);
}

#[test]
fn backend_name_can_be_its_own_address() {
    for address in ["10.0.0.1:80", "[2001:db8::1]:80"] {
        let mut sender = TestSender::named("web", address, address);
        assert_eq!(ParsedHeartbeat::read(&sender.send()).unwrap().name, address);
    }
    let other = SenderIdentity::new("web", "10.0.0.2:80", "10.0.0.1:80".parse().unwrap());
    assert!(matches!(other, Err(InvalidIdentity::Name(_))));
}

#[test]
fn addresses_that_no_client_can_connect_to_are_rejected() {
    for address in ["0.0.0.0:80", "10.0.0.1:0", "[::]:80", "[fe80::1]:80"] {
        let refused = SenderIdentity::new("web", "a", address.parse().unwrap());
        assert!(matches!(refused, Err(InvalidIdentity::Address(_))), "{address}");
    }
}

#[test]
fn ipv4_address_mapped_into_ipv6_is_announced_as_ipv4() {
    let mapped = "[::ffff:10.0.0.1]:80".parse().unwrap();
    let identity = SenderIdentity::new("web", "10.0.0.1:80", mapped).unwrap();
    assert_eq!(identity.address(), "10.0.0.1:80".parse().unwrap());
}

#[test]
fn largest_and_smallest_datagrams_match_their_constants() {
    let long = "x".repeat(NAME_BYTES_MAX);
    let largest = TestSender::named(&long, &long, "[2001:db8::1]:65535").send();
    assert_eq!(largest.len(), DATAGRAM_BYTES_MAX);
    assert_eq!(TestSender::named("p", "n", "10.0.0.1:1").send().len(), DATAGRAM_BYTES_MIN);
    const { assert!(DATAGRAM_BYTES_MAX <= 512) };
}

#[test]
fn only_the_same_secret_verifies() {
    let bytes = datagram();
    let parsed = ParsedHeartbeat::read(&bytes).unwrap();
    assert!(parsed.verify(&secret(1)));
    assert!(!parsed.verify(&secret(2)));
}

#[test]
fn debug_output_hides_the_secret() {
    assert_eq!(format!("{:?}", secret(b'x')), "Secret(hidden)");
}

fn name() -> impl Strategy<Value = String> {
    "[A-Za-z0-9._-]{0,63}[A-Za-z0-9_-]"
}

fn address() -> impl Strategy<Value = SocketAddr> {
    let v4 = any::<[u8; 4]>().prop_map(|octets| Ipv4Addr::from(octets).into());
    let v6 = any::<[u8; 16]>().prop_map(|octets| Ipv6Addr::from(octets).into());
    (prop_oneof![v4, v6], 1_u16..)
        .prop_map(|(ip, port): (IpAddr, u16)| SocketAddr::new(ip, port))
        .prop_filter("usable", |address| is_usable(*address))
}

proptest! {
    #[test]
    fn parsed_fields_equal_the_encoded_fields(
        pool in name(), name in name(), address in address(), key_id: u32, incarnation: u64,
        sequence: u64, sent: u64, interval in 1_u64..=3_600_000, state in 0_usize..4,
        weight in 1_u16..=1_000, in_flight: u32, load in 0_u16..=1_000, bytes in any::<[u8; 32]>(),
    ) {
        let identity = SenderIdentity::new(&pool, &name, address).unwrap();
        let (state, interval) = (SenderState::ALL[state], Duration::from_millis(interval));
        let draft = HeartbeatFields {
            identity: &identity, key_id, incarnation, sequence, sent, interval, state, weight,
            in_flight, load,
        };
        let secret = Secret::new(&bytes).unwrap();
        let datagram = encode(&draft, &secret);
        let read = ParsedHeartbeat::read(&datagram).unwrap();
        prop_assert!(read.verify(&secret));
        prop_assert_eq!((read.pool, read.name, read.address), (&*pool, &*name, address));
        prop_assert_eq!((read.key_id, read.incarnation, read.sequence), (key_id, incarnation, sequence));
        prop_assert_eq!((read.sent, read.interval, read.state), (sent, interval, state));
        prop_assert_eq!((read.weight, read.in_flight, read.load), (weight, in_flight, load));
    }

    #[test]
    fn parsing_arbitrary_bytes_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = ParsedHeartbeat::read(&bytes);
        let mut like_ours = datagram();
        let end = like_ours.len().min(bytes.len() + 6);
        like_ours[6..end].copy_from_slice(&bytes[..end - 6]);
        let _ = ParsedHeartbeat::read(&like_ours);
    }

    #[test]
    fn values_out_of_bounds_are_encoded_as_the_nearest_bound(weight: u16, load: u16, interval: u64) {
        let sender = TestSender { incarnation: START, ..TestSender::new() };
        let draft = HeartbeatFields {
            weight, load, interval: Duration::from_millis(interval), ..sender.draft()
        };
        let datagram = encode(&draft, &sender.secret);
        let read = ParsedHeartbeat::read(&datagram).unwrap();
        prop_assert_eq!(read.weight, weight.clamp(1, SHARE_MAX));
        prop_assert_eq!(read.load, load.min(SHARE_MAX));
    }
}
