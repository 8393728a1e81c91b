//! The PROXY protocol, versions 1 and 2: reads and writes headers.
//!
//! A proxy sends a header before the first byte of a connection. It names the client of that
//! proxy. The data path reads headers of clients and writes headers to backends; probes write
//! headers too. Pure: nothing here reads a socket or waits.
//!
//! Source: `doc/proxy-protocol.txt` of HAProxy. Two points differ from it:
//!
//! - A header with an unknown address family is accepted like one with the family `UNSPEC`.
//!   The specification requires a reset. The connection is served with the address of the
//!   socket, as for `UNSPEC`.
//! - A header of version 2 has at most [`HEADER_BYTES_MAX`] bytes. The specification allows
//!   65,551.

mod checksum;
mod decode;
mod encode;
pub mod fuzz;
#[cfg(test)]
mod tests;

pub use decode::decode;
pub use encode::{HeaderAddresses, encode, encode_local};

use crate::outcome::Cause;
use std::net::SocketAddr;

/// Longest accepted header of version 2. HAProxy and the load balancers of cloud providers
/// send less than 1 KiB.
pub const HEADER_BYTES_MAX: usize = 4096;

/// Longest header of version 1, with its line end (specification, section 2.1).
pub const LINE_BYTES_MAX: usize = 107;

/// Longest accepted `UNIQUE_ID` (specification, section 2.2.5).
pub const UNIQUE_ID_BYTES_MAX: usize = 128;

/// Longest accepted `AUTHORITY`: a host name.
pub const AUTHORITY_BYTES_MAX: usize = 255;

/// First bytes of version 1.
const LINE_START: &[u8] = b"PROXY ";

/// First bytes of version 2.
const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// Bytes of version 2 before the addresses.
const FIXED_BYTES: usize = 16;

/// Types of TLVs (specification, section 2.2).
pub mod tlv {
    /// Application protocol of the client's TLS handshake.
    pub const ALPN: u8 = 0x01;
    /// Host name of the client's TLS handshake.
    pub const AUTHORITY: u8 = 0x02;
    /// Checksum of the header.
    pub const CRC32C: u8 = 0x03;
    /// Padding.
    pub const NOOP: u8 = 0x04;
    /// Identifier of the connection.
    pub const UNIQUE_ID: u8 = 0x05;
    /// Description of the client's TLS connection.
    pub const SSL: u8 = 0x20;
}

/// Version of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProxyVersion {
    /// A line of text.
    V1,
    /// Binary, with TLVs.
    V2,
}

/// What [`decode`] found at the start of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decoded<'a> {
    /// The header is incomplete. A complete header has at least this many bytes.
    More(usize),
    /// These bytes cannot become a valid header.
    Bad(HeaderFault),
    /// A complete header.
    Done(ProxyHeader<'a>),
}

/// A complete header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProxyHeader<'a> {
    /// Bytes of the header. The client's own bytes follow.
    pub len: usize,
    /// The client that the header names.
    pub announced: HeaderClient,
    /// Its TLVs. None for version 1, for `LOCAL` and if `announced` has no addresses, except
    /// for Unix sockets.
    pub tlvs: Tlvs<'a>,
}

/// The client that a header names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeaderClient {
    /// No client: the proxy itself opened the connection (`LOCAL`), usually for a health check.
    Local,
    /// A client without an IP address (`UNKNOWN`, `UNSPEC`, a Unix socket) or of an unknown
    /// address family.
    Unknown,
    /// A client, and the address that it connected to. IPv4-mapped IPv6 addresses are
    /// IPv4 addresses here.
    Client(SocketAddr, SocketAddr),
}

/// Type-length-value entries with valid lengths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tlvs<'a>(&'a [u8]);

/// Why a header is invalid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeaderFault {
    /// The connection does not start with a header.
    Missing,
    /// Version 1: not one of the forms of the specification.
    Line,
    /// Version 1: no line end in [`LINE_BYTES_MAX`] bytes.
    LongLine,
    /// Version 1: an address of the other family.
    Family,
    /// A version other than 1 and 2.
    Version,
    /// Version 2: neither `LOCAL` nor `PROXY`.
    Command,
    /// Version 2: a datagram protocol, on a stream.
    Datagram,
    /// Version 2: an unknown transport protocol.
    Transport,
    /// Version 2: too short for its addresses.
    AddressLength,
    /// Version 2: more than [`HEADER_BYTES_MAX`] bytes.
    TooLong,
    /// Version 2: a TLV with a wrong length, or a second checksum.
    Tlv,
    /// Version 2: the checksum is wrong.
    Checksum,
    /// The client sent FIN before the end of the header.
    Truncated,
}

// === impl HeaderFault ===

impl HeaderFault {
    /// Name for the log.
    pub fn name(self) -> &'static str {
        match self {
            HeaderFault::Missing => "missing",
            HeaderFault::Line => "line",
            HeaderFault::LongLine => "long-line",
            HeaderFault::Family => "family",
            HeaderFault::Version => "version",
            HeaderFault::Command => "command",
            HeaderFault::Datagram => "datagram",
            HeaderFault::Transport => "transport",
            HeaderFault::AddressLength => "address-length",
            HeaderFault::TooLong => "too-long",
            HeaderFault::Tlv => "tlv",
            HeaderFault::Checksum => "checksum",
            HeaderFault::Truncated => "truncated",
        }
    }

    /// How the session ends.
    pub fn cause(self) -> Cause {
        match self {
            HeaderFault::Missing => Cause::ProxyHeaderMissing,
            HeaderFault::Checksum => Cause::ProxyHeaderCrc,
            _ => Cause::ProxyHeaderMalformed,
        }
    }
}

// === impl Tlvs ===

impl<'a> Tlvs<'a> {
    /// No entries.
    pub const NONE: Tlvs<'static> = Tlvs(&[]);

    /// Wraps entries that [`Tlvs::append`] wrote. Bytes that are not entries end the list.
    pub fn new(bytes: &'a [u8]) -> Tlvs<'a> {
        Tlvs(bytes)
    }

    /// Returns type and value of each entry, in order.
    pub fn iter(self) -> impl Iterator<Item = (u8, &'a [u8])> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let (kind, value, after) = next_entry(rest)?;
            rest = after;
            Some((kind, value))
        })
    }

    /// Appends an entry to `bytes`. A value of more than 65,535 bytes is cut.
    pub fn append(bytes: &mut Vec<u8>, kind: u8, value: &[u8]) {
        let length = u16::try_from(value.len()).unwrap_or(u16::MAX);
        bytes.push(kind);
        bytes.extend(length.to_be_bytes());
        bytes.extend(&value[..usize::from(length)]);
    }
}

/// Splits the first entry off: its type, its value and the rest. `None` if the entry is longer
/// than `bytes`.
fn next_entry(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&[kind, high, low], after) = bytes.split_first_chunk()?;
    let (value, rest) = after.split_at_checked(usize::from(u16::from_be_bytes([high, low])))?;
    Some((kind, value, rest))
}
