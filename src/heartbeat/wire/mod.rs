//! The heartbeat datagram: encode, parse, verify.
//!
//! `sender` encodes datagrams, and `daemon::heartbeat` parses them. The parser is strict,
//! allocates nothing and never panics. A parsed datagram is not trusted until
//! [`ParsedHeartbeat::verify`] returns true.
//!
//! # Format, version 1
//!
//! One UDP datagram, numbers big-endian, without padding or trailing bytes:
//!
//! | at | bytes | field | values |
//! |---|---|---|---|
//! | 0 | 4 | magic | `TGHB` |
//! | 4 | 1 | version | 1 |
//! | 5 | 1 | flags | 0 |
//! | 6 | 1 | state | 1 starting, 2 ready, 3 draining, 4 stopping |
//! | 7 | 1 | address family | 4 or 6 |
//! | 8 | 4 | key id | as configured on both sides |
//! | 12 | 8 | incarnation | start time of the sender, ms since 1970 |
//! | 20 | 8 | sequence | increases by one with each datagram of an incarnation |
//! | 28 | 8 | time | time of sending, ms since 1970 |
//! | 36 | 4 | interval | interval of sending, ms, 1 to 3,600,000 |
//! | 40 | 4 | in flight | connections that the backend serves |
//! | 44 | 2 | weight | 1 to 1000 |
//! | 46 | 2 | load | 0 (idle) to 1000 (full) |
//! | 48 | 2 | port | 1 to 65535 |
//! | 50 | 4 or 16 | address | address of the backend: IPv4 or IPv6, by the family |
//! | | 1 | length of the pool name | 1 to 64 |
//! | | as given | pool | `A-Z a-z 0-9 . _ -`, not only dots |
//! | | 1 | length of the backend name | 1 to 64 |
//! | | as given | name | as for pools; or the address and port as text (`10.0.0.1:80`, `[2001:db8::1]:80`), which is the name of a backend without a configured name |
//! | | 16 | tag | the first 16 bytes of HMAC-SHA-256 (RFC 2104) with the key over all earlier bytes |
//!
//! The smallest datagram has 76 bytes, the largest [`DATAGRAM_BYTES_MAX`]. These addresses
//! are malformed: unspecified, multicast, broadcast, IPv4-mapped IPv6, and link-local IPv6
//! (ambiguous without an interface). Every change of the format needs a new version.

use super::SenderState;
use super::keys::Secret;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

/// Longest name, as in the configuration.
pub const NAME_BYTES_MAX: usize = 64;

/// Longest datagram: header, IPv6 address, two of the longest names, tag.
pub const DATAGRAM_BYTES_MAX: usize = HEADER_BYTES + 16 + 2 * (1 + NAME_BYTES_MAX) + TAG_BYTES;

/// Shortest: header, IPv4 address, two names of one character, tag.
pub const DATAGRAM_BYTES_MIN: usize = HEADER_BYTES + 4 + 2 * (1 + 1) + TAG_BYTES;

/// Length of the tag: 128 bits. A random tag is valid with a probability of 2^-128.
pub const TAG_BYTES: usize = 16;

/// Greatest weight and greatest load.
pub const SHARE_MAX: u16 = 1000;

/// Longest interval: 1 h.
pub const INTERVAL_MAX: Duration = Duration::from_secs(3600);

const MAGIC: [u8; 4] = *b"TGHB";
const VERSION: u8 = 1;
/// Length of the fields before the address.
const HEADER_BYTES: usize = 50;

/// The backend that sends. It is checked when it is made, so that encoding cannot fail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SenderIdentity {
    pool: Arc<str>,
    name: Arc<str>,
    address: SocketAddr,
}

/// Why an identity is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidIdentity {
    /// The pool name.
    #[error("invalid pool name {0:?}: use 1 to 64 of A-Z a-z 0-9 . _ -")]
    Pool(String),
    /// The backend name.
    #[error("invalid backend name {0:?}: use its address or 1 to 64 of A-Z a-z 0-9 . _ -")]
    Name(String),
    /// No balancer can connect to the address.
    #[error("a balancer cannot connect to address {0}")]
    Address(SocketAddr),
}

/// The fields of a datagram. Weight, load and interval outside their bounds are sent as the
/// nearest bound.
#[derive(Debug, Clone, Copy)]
pub struct HeartbeatFields<'a> {
    /// The backend.
    pub identity: &'a SenderIdentity,
    /// ID of the key that signs the datagram.
    pub key_id: u32,
    /// Start time of the sender, ms since 1970.
    pub incarnation: u64,
    /// Sequence number, increased by one per datagram.
    pub sequence: u64,
    /// Current time, ms since 1970.
    pub sent: u64,
    /// Interval of sending.
    pub interval: Duration,
    /// State of the backend.
    pub state: SenderState,
    /// Requested weight, 1..=1000.
    pub weight: u16,
    /// Connections that the backend serves.
    pub in_flight: u32,
    /// Load of the backend, 0..=1000.
    pub load: u16,
}

/// An encoded datagram. Derefs to its bytes.
#[derive(Clone, Copy)]
pub struct EncodedHeartbeat {
    bytes: [u8; DATAGRAM_BYTES_MAX],
    length: usize,
}

/// A well-formed datagram that is not verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParsedHeartbeat<'a> {
    /// Pool of the backend.
    pub pool: &'a str,
    /// Backend name.
    pub name: &'a str,
    /// Address of the backend.
    pub address: SocketAddr,
    /// ID of the key that the datagram names.
    pub key_id: u32,
    /// Start time of the sender.
    pub incarnation: u64,
    /// Sequence number in the incarnation.
    pub sequence: u64,
    /// Time of sending, ms since 1970 on the sender's clock.
    pub sent: u64,
    /// Interval of sending.
    pub interval: Duration,
    /// State of the backend.
    pub state: SenderState,
    /// Requested weight.
    pub weight: u16,
    /// Connections that the backend serves.
    pub in_flight: u32,
    /// Load of the backend.
    pub load: u16,
    signed: &'a [u8],
    tag: &'a [u8],
}

/// Why a datagram is malformed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// It is shorter than the smallest datagram, or than its fields.
    #[error("datagram too short")]
    Short,
    /// It is longer than the largest datagram, or than its fields.
    #[error("datagram too long")]
    Long,
    /// It does not start with the magic bytes.
    #[error("not a heartbeat")]
    Magic,
    /// It has another version or unknown flags.
    #[error("unsupported version or flags")]
    Version,
    /// The state is unknown.
    #[error("unknown sender state")]
    State,
    /// The address family is unknown, or no balancer can connect to the address.
    #[error("unusable address")]
    Address,
    /// Interval, weight or load is out of bounds.
    #[error("value out of range")]
    Value,
    /// A name has a wrong length or wrong characters.
    #[error("invalid name")]
    Name,
}

/// Reads fields from the front and checks every length.
struct Cursor<'a>(&'a [u8]);

/// Encodes and signs a datagram.
pub fn encode(draft: &HeartbeatFields<'_>, secret: &Secret) -> EncodedHeartbeat {
    let SenderIdentity { pool, name, address } = draft.identity;
    let family = if address.is_ipv4() { 4 } else { 6 };
    let interval = draft.interval.clamp(Duration::from_millis(1), INTERVAL_MAX);
    let mut to = EncodedHeartbeat { bytes: [0; DATAGRAM_BYTES_MAX], length: 0 };
    to.put(&MAGIC);
    to.put(&[VERSION, 0, draft.state.code(), family]);
    to.put(&draft.key_id.to_be_bytes());
    to.put(&draft.incarnation.to_be_bytes());
    to.put(&draft.sequence.to_be_bytes());
    to.put(&draft.sent.to_be_bytes());
    to.put(&(interval.as_millis() as u32).to_be_bytes());
    to.put(&draft.in_flight.to_be_bytes());
    to.put(&draft.weight.clamp(1, SHARE_MAX).to_be_bytes());
    to.put(&draft.load.min(SHARE_MAX).to_be_bytes());
    to.put(&address.port().to_be_bytes());
    match address.ip() {
        IpAddr::V4(ip) => to.put(&ip.octets()),
        IpAddr::V6(ip) => to.put(&ip.octets()),
    }
    for text in [pool, name] {
        to.put(&[text.len() as u8]);
        to.put(text.as_bytes());
    }
    let tag = secret.tag(&to);
    to.put(&tag);
    to
}

/// Returns whether a balancer can connect to the address.
fn is_usable(address: SocketAddr) -> bool {
    let ip = address.ip();
    let odd = match ip {
        IpAddr::V4(ip) => ip.is_broadcast(),
        IpAddr::V6(ip) => ip.to_ipv4_mapped().is_some() || ip.is_unicast_link_local(),
    };
    address.port() != 0 && !ip.is_unspecified() && !ip.is_multicast() && !odd
}

/// Checks a name by the rule of the configuration: it needs no escaping as a metric label
/// or a path segment.
fn is_name(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    (1..=NAME_BYTES_MAX).contains(&text.len())
        && text.bytes().all(allowed)
        && text.bytes().any(|b| b != b'.')
}

/// Checks a backend name: a name, or the address of the backend.
pub fn is_backend_name(text: &str, address: SocketAddr) -> bool {
    // The check for a colon avoids formatting the address, which costs more.
    is_name(text) || (text.contains(':') && address.to_string() == text)
}

// === impl SenderIdentity ===

impl SenderIdentity {
    /// Makes the identity of a backend in `pool` with `address`.
    ///
    /// # Errors
    /// A name breaks the rules of the configuration, or no balancer can connect to the
    /// address.
    pub fn new(
        pool: &str,
        name: &str,
        address: SocketAddr,
    ) -> Result<SenderIdentity, InvalidIdentity> {
        // IPv4-mapped IPv6 is always treated as the IPv4 address.
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        if !is_name(pool) {
            return Err(InvalidIdentity::Pool(pool.to_owned()));
        }
        if !is_usable(address) {
            return Err(InvalidIdentity::Address(address));
        }
        if !is_backend_name(name, address) {
            return Err(InvalidIdentity::Name(name.to_owned()));
        }
        Ok(SenderIdentity { pool: pool.into(), name: name.into(), address })
    }

    /// Returns the pool of the backend.
    pub fn pool(&self) -> &str {
        &self.pool
    }

    /// Returns the backend name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the address of the backend.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

// === impl EncodedHeartbeat ===

impl EncodedHeartbeat {
    fn put(&mut self, bytes: &[u8]) {
        let end = self.length + bytes.len();
        self.bytes[self.length..end].copy_from_slice(bytes);
        self.length = end;
    }
}

impl Deref for EncodedHeartbeat {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl fmt::Debug for EncodedHeartbeat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Datagram({} bytes)", self.length)
    }
}

// === impl ParsedHeartbeat ===

impl<'a> ParsedHeartbeat<'a> {
    /// Parses a datagram.
    ///
    /// # Errors
    /// The first error from the front.
    pub fn read(datagram: &'a [u8]) -> Result<ParsedHeartbeat<'a>, ParseError> {
        match datagram.len() {
            ..DATAGRAM_BYTES_MIN => return Err(ParseError::Short),
            DATAGRAM_BYTES_MIN..=DATAGRAM_BYTES_MAX => {}
            _ => return Err(ParseError::Long),
        }
        let (signed, tag) = datagram.split_at(datagram.len() - TAG_BYTES);
        let mut from = Cursor(signed);
        if from.array::<4>()? != MAGIC {
            return Err(ParseError::Magic);
        }
        if from.array::<2>()? != [VERSION, 0] {
            return Err(ParseError::Version);
        }
        let [state, family] = from.array()?;
        let state = SenderState::from_code(state).ok_or(ParseError::State)?;
        let key_id = u32::from_be_bytes(from.array()?);
        let incarnation = u64::from_be_bytes(from.array()?);
        let sequence = u64::from_be_bytes(from.array()?);
        let sent = u64::from_be_bytes(from.array()?);
        let interval = Duration::from_millis(u32::from_be_bytes(from.array()?).into());
        let in_flight = u32::from_be_bytes(from.array()?);
        let weight = u16::from_be_bytes(from.array()?);
        let load = u16::from_be_bytes(from.array()?);
        let bounded = !interval.is_zero()
            && interval <= INTERVAL_MAX
            && (1..=SHARE_MAX).contains(&weight)
            && load <= SHARE_MAX;
        if !bounded {
            return Err(ParseError::Value);
        }
        let address = from.address(family)?;
        let (pool, name) = (from.text()?, from.text()?);
        if !from.0.is_empty() {
            return Err(ParseError::Long);
        }
        if !is_name(pool) || !is_backend_name(name, address) {
            return Err(ParseError::Name);
        }
        Ok(ParsedHeartbeat {
            pool,
            name,
            address,
            key_id,
            incarnation,
            sequence,
            sent,
            interval,
            state,
            weight,
            in_flight,
            load,
            signed,
            tag,
        })
    }

    /// Returns whether `secret` signed the datagram, in constant time.
    pub fn verify(&self, secret: &Secret) -> bool {
        secret.verify(self.signed, self.tag)
    }
}

// === impl Cursor ===

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], ParseError> {
        let (head, rest) = self.0.split_at_checked(count).ok_or(ParseError::Short)?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ParseError> {
        let (head, rest) = self.0.split_first_chunk().ok_or(ParseError::Short)?;
        self.0 = rest;
        Ok(*head)
    }

    fn address(&mut self, family: u8) -> Result<SocketAddr, ParseError> {
        let port = u16::from_be_bytes(self.array()?);
        let ip = match family {
            4 => Ipv4Addr::from(self.array::<4>()?).into(),
            6 => Ipv6Addr::from(self.array::<16>()?).into(),
            _ => return Err(ParseError::Address),
        };
        let address = SocketAddr::new(ip, port);
        if is_usable(address) { Ok(address) } else { Err(ParseError::Address) }
    }

    fn text(&mut self) -> Result<&'a str, ParseError> {
        let [length] = self.array()?;
        let bytes = self.take(length.into())?;
        std::str::from_utf8(bytes).map_err(|_| ParseError::Name)
    }
}

// === impl SenderState ===

impl SenderState {
    /// Returns the byte of the state in a datagram.
    fn code(self) -> u8 {
        match self {
            SenderState::Starting => 1,
            SenderState::Ready => 2,
            SenderState::Draining => 3,
            SenderState::Stopping => 4,
        }
    }

    fn from_code(code: u8) -> Option<SenderState> {
        let all = SenderState::ALL;
        all.into_iter().find(|state| state.code() == code)
    }
}

#[cfg(test)]
mod tests;
