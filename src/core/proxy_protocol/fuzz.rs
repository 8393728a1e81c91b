//! Fuzz target: arbitrary bytes as the start of a connection.
//!
//! Called by the fuzzer and by a property test. It checks:
//!
//! - Nothing panics.
//! - Every prefix needs more bytes or has the result of the whole.
//! - A count of needed bytes is above the bytes that are there, and never above the header.
//! - A header with addresses, written and read again, is the same.

use super::{Decoded, HEADER_BYTES_MAX, HeaderClient, ProxyVersion, decode, encode};

/// See the module's documentation.
pub fn check(data: &[u8]) {
    let data = &data[..data.len().min(2 * HEADER_BYTES_MAX)];
    let whole = decode(data);
    for len in 0..data.len() {
        match decode(&data[..len]) {
            Decoded::More(needed) => {
                assert!(needed > len, "{needed} bytes needed, {len} are there");
                if let Decoded::Done(header) = whole {
                    assert!(needed <= header.len, "{needed} needed for {} bytes", header.len);
                }
            }
            early => assert_eq!(early, whole, "after {len} bytes"),
        }
    }
    let Decoded::Done(header) = whole else { return };
    assert!(header.len <= data.len().min(HEADER_BYTES_MAX));
    let HeaderClient::Client(client, destination) = header.announced else { return };
    let mut out = Vec::new();
    for version in [ProxyVersion::V1, ProxyVersion::V2] {
        encode(version, Some((client, destination)), header.tlvs.iter(), false, &mut out);
        match decode(&out) {
            Decoded::Done(again) => {
                assert_eq!((again.len, again.announced), (out.len(), header.announced));
            }
            // A kept checksum entry is that of another header.
            other => assert!(version == ProxyVersion::V2, "{other:?}"),
        }
    }
}
