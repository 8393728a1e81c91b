//! Tests of the codec: vectors in every prefix, round trips, and two other implementations as
//! referees.

use super::*;
use proptest::prelude::*;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Shared with the tests of the program.
const VECTORS: &str = include_str!("../../../tests/common/vectors/proxy_headers.txt");

/// Name, expected result and bytes.
fn vectors() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let lines = VECTORS.lines().filter(|line| !line.starts_with('#'));
    let vectors = lines.map(|line| {
        let (name, rest) = line.split_once(": ").unwrap();
        let (expected, hex) = rest.split_once(": ").or(rest.split_once(':')).unwrap();
        let (hex, times) = hex.split_once('*').unwrap_or((hex, "1"));
        let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        let mut bytes: Vec<u8> = (0..hex.len()).step_by(2).map(byte).collect();
        if let Some(last) = bytes.last().copied() {
            bytes.extend(std::iter::repeat_n(last, times.parse::<usize>().unwrap() - 1));
        }
        (name, expected, bytes)
    });
    vectors.collect()
}

/// The result in the words of the vectors.
fn words(decoded: Decoded<'_>) -> String {
    match decoded {
        Decoded::More(_) => "incomplete".to_owned(),
        Decoded::Bad(HeaderFault::Missing) => "missing".to_owned(),
        Decoded::Bad(HeaderFault::Checksum) => "crc".to_owned(),
        Decoded::Bad(_) => "malformed".to_owned(),
        Decoded::Done(header) => match header.announced {
            HeaderClient::Local => "local".to_owned(),
            HeaderClient::Unknown => "socket".to_owned(),
            HeaderClient::Client(client, _) => format!("client {client}"),
        },
    }
}

#[test]
fn vectors_have_their_results_and_every_prefix_agrees() {
    let vectors = vectors();
    assert!(vectors.len() > 40);
    for (name, expected, bytes) in vectors {
        assert_eq!(words(decode(&bytes)), expected, "{name}");
        fuzz::check(&bytes);
        if let Decoded::Done(header) = decode(&bytes) {
            assert_eq!(header.len, bytes.len(), "{name}");
            let followed = [&bytes[..], b"GET / HTTP/1.1\r\n\r\n"].concat();
            assert_eq!(decode(&followed), decode(&bytes), "{name}");
            fuzz::check(&followed);
        }
    }
}

#[test]
fn wrong_bit_anywhere_in_a_header_with_a_checksum_is_found() {
    let (.., bytes) = vectors().into_iter().find(|(name, ..)| *name == "v2-crc").unwrap();
    let kind = bytes.len() - 7;
    assert_eq!(bytes[kind], tlv::CRC32C);
    // Before it the header has another form. Without this type it has no checksum.
    for bit in (FIXED_BYTES * 8..bytes.len() * 8).filter(|bit| bit / 8 != kind) {
        let mut wrong = bytes.clone();
        wrong[bit / 8] ^= 1 << (bit % 8);
        assert!(matches!(decode(&wrong), Decoded::Bad(_)), "bit {bit}");
    }
}

#[test]
fn tlvs_are_read_in_order() {
    let (.., bytes) = vectors().into_iter().find(|(name, ..)| *name == "v2-crc").unwrap();
    let Decoded::Done(header) = decode(&bytes) else { panic!() };
    let tlvs: Vec<_> = header.tlvs.iter().collect();
    assert_eq!(tlvs[0], (tlv::AUTHORITY, &b"example.com"[..]));
    assert_eq!((tlvs[1].0, tlvs.len()), (tlv::CRC32C, 2));
}

#[test]
fn header_of_a_probe_names_no_client() {
    assert_eq!(encode_local(ProxyVersion::V1), b"PROXY UNKNOWN\r\n");
    assert_eq!(words(decode(&encode_local(ProxyVersion::V2))), "local");
    assert_eq!(encode_local(ProxyVersion::V2).len(), FIXED_BYTES);
}

#[test]
fn addresses_of_two_families_are_sent_as_ipv6() {
    let client: SocketAddr = "[2001:db8::1]:5".parse().unwrap();
    let destination: SocketAddr = "192.0.2.1:443".parse().unwrap();
    let mut out = Vec::new();
    encode(ProxyVersion::V1, Some((client, destination)), std::iter::empty(), false, &mut out);
    assert_eq!(out, b"PROXY TCP6 2001:db8::1 ::ffff:192.0.2.1 5 443\r\n");
    encode(ProxyVersion::V2, Some((client, destination)), std::iter::empty(), false, &mut out);
    assert_eq!((out[13], out.len()), (0x21, 52));
    let mapped: SocketAddr = "[::ffff:192.0.2.9]:7".parse().unwrap();
    encode(ProxyVersion::V1, Some((mapped, destination)), std::iter::empty(), false, &mut out);
    assert_eq!(out, b"PROXY TCP4 192.0.2.9 192.0.2.1 7 443\r\n");
    encode(ProxyVersion::V2, None, std::iter::empty(), false, &mut out);
    assert_eq!(words(decode(&out)), "socket");
}

#[test]
fn header_never_exceeds_its_bound() {
    let value = vec![0; 2000];
    let tlvs = [(0xe0, &value[..]), (0xe1, &value), (0xe2, &value), (0xe3, b"x")];
    let mut out = Vec::new();
    encode(ProxyVersion::V2, None, tlvs.into_iter(), true, &mut out);
    assert!(out.len() <= HEADER_BYTES_MAX);
    assert!(matches!(decode(&out), Decoded::Done(_)));
}

fn any_address() -> impl Strategy<Value = SocketAddr> {
    // Mapped addresses become IPv4 addresses.
    let v6 = any::<u128>().prop_map(|bits| IpAddr::V6(Ipv6Addr::from_bits(bits | 1 << 127)));
    let ip = prop_oneof![any::<u32>().prop_map(|bits| IpAddr::V4(Ipv4Addr::from_bits(bits))), v6];
    (ip, any::<u16>()).prop_map(|(ip, port)| SocketAddr::new(ip, port))
}

fn any_tlvs() -> impl Strategy<Value = Vec<(u8, Vec<u8>)>> {
    let one = (0xe0..=0xff_u8, proptest::collection::vec(any::<u8>(), 0..200));
    proptest::collection::vec(one, 0..5)
}

/// Headers of both versions with random changes, and random bytes.
fn any_start() -> impl Strategy<Value = Vec<u8>> {
    let header = (any_address(), any_address(), any_tlvs(), any::<(bool, bool)>()).prop_map(
        |(client, destination, tlvs, (v1, crc))| {
            let version = if v1 { ProxyVersion::V1 } else { ProxyVersion::V2 };
            let mut out = Vec::new();
            let tlvs = tlvs.iter().map(|(kind, value)| (*kind, &value[..]));
            encode(version, Some((client, destination)), tlvs, crc, &mut out);
            out
        },
    );
    let changes = proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..3);
    let changed = (header, changes, any::<proptest::sample::Index>()).prop_map(
        |(mut bytes, changes, cut)| {
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if cut.index(4) == 0 {
                let len = cut.index(bytes.len());
                bytes.truncate(len);
            }
            bytes
        },
    );
    prop_oneof![9 => changed, 1 => proptest::collection::vec(any::<u8>(), 0..64)]
}

/// Client of a complete header with addresses, by the crate `ppp`.
fn by_ppp(bytes: &[u8]) -> Option<SocketAddr> {
    use ppp::{HeaderResult, v1, v2};
    match HeaderResult::parse(bytes) {
        HeaderResult::V1(Ok(header)) => match header.addresses {
            v1::Addresses::Tcp4(a) => Some(SocketAddr::new(a.source_address.into(), a.source_port)),
            v1::Addresses::Tcp6(a) => Some(SocketAddr::new(a.source_address.into(), a.source_port)),
            v1::Addresses::Unknown => None,
        },
        HeaderResult::V2(Ok(header)) => match header.addresses {
            v2::Addresses::IPv4(a) => Some(SocketAddr::new(a.source_address.into(), a.source_port)),
            v2::Addresses::IPv6(a) => Some(SocketAddr::new(a.source_address.into(), a.source_port)),
            _ => None,
        },
        _ => None,
    }
}

/// The same by the crate `proxy-header`, with the length of the header.
fn by_proxy_header(bytes: &[u8]) -> Option<(SocketAddr, usize)> {
    let parsed = proxy_header::ProxyHeader::parse(bytes, proxy_header::ParseConfig::default());
    let (header, len) = parsed.ok()?;
    Some((header.proxied_address()?.source, len))
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

proptest! {
    #[test]
    fn any_start_of_a_connection_agrees_with_its_prefixes(bytes in any_start()) {
        fuzz::check(&bytes);
    }

    #[test]
    fn header_is_read_as_it_was_written(
        (client, destination) in (any_address(), any_address()),
        tlvs in any_tlvs(),
        crc in any::<bool>(),
    ) {
        let mut out = Vec::new();
        for version in [ProxyVersion::V1, ProxyVersion::V2] {
            let given = tlvs.iter().map(|(kind, value)| (*kind, &value[..]));
            encode(version, Some((client, destination)), given.clone(), crc, &mut out);
            let Decoded::Done(header) = decode(&out) else { panic!("{:?}", decode(&out)) };
            prop_assert_eq!(header.announced, HeaderClient::Client(client, destination));
            if version == ProxyVersion::V2 {
                let read = header.tlvs.iter().filter(|(kind, _)| *kind != tlv::CRC32C);
                prop_assert_eq!(read.collect::<Vec<_>>(), given.collect::<Vec<_>>());
            }
        }
    }

    /// What this codec accepts, both referees accept with the same client. They accept more:
    /// neither checks the checksum or the transport protocol of a stream, `ppp` accepts
    /// lengths of TLVs that overrun the header, and both ports with leading zeros or a sign.
    #[test]
    fn referees_read_the_same_client(bytes in any_start()) {
        let Decoded::Done(header) = decode(&bytes) else { return Ok(()) };
        let HeaderClient::Client(client, _) = header.announced else { return Ok(()) };
        let header_alone = &bytes[..header.len];
        prop_assert_eq!(by_ppp(header_alone).map(canonical), Some(client));
        let referee = by_proxy_header(header_alone).map(|(client, len)| (canonical(client), len));
        prop_assert_eq!(referee, Some((client, header.len)));
    }

    /// What a referee accepts, this codec accepts, except for the known differences. One is that
    /// the referee accepts any byte between `PROXY` and the rest of a line.
    #[test]
    fn headers_that_only_a_referee_accepts_have_a_known_fault(bytes in any_start()) {
        let Some((referee, len)) = by_proxy_header(&bytes) else { return Ok(()) };
        match decode(&bytes) {
            Decoded::Done(header) => {
                prop_assert_eq!(header.len, len);
                if let HeaderClient::Client(client, _) = header.announced {
                    prop_assert_eq!(client, canonical(referee));
                }
            }
            Decoded::Bad(HeaderFault::Missing) => prop_assert!(
                bytes.starts_with(b"PROXY") && bytes[5] != b' ',
                "{bytes:?}"
            ),
            Decoded::Bad(fault) => prop_assert!(
                matches!(
                    fault,
                    HeaderFault::Checksum
                        | HeaderFault::Datagram
                        | HeaderFault::Transport
                        | HeaderFault::Tlv
                        | HeaderFault::TooLong
                        | HeaderFault::Line
                ),
                "{fault:?}"
            ),
            Decoded::More(_) => prop_assert!(false, "incomplete, but a referee accepts it"),
        }
    }
}
