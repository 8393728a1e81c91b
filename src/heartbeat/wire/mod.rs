//! The heartbeat datagram, byte by byte: encode, read, verify.
//!
//! Used by `sender` to write one and by `trust` to read one. Reading is strict
//! and allocates nothing; it never panics on any bytes and proves nothing until
//! [`ParsedHeartbeat::verify`] has been asked.
//!
//! # Format, version 1
//!
//! One UDP datagram, numbers big-endian, nothing before, between or after:
//!
//! | at | bytes | field | values |
//! |---|---|---|---|
//! | 0 | 4 | magic | `TGHB` |
//! | 4 | 1 | version | 1 |
//! | 5 | 1 | flags | 0 |
//! | 6 | 1 | state | 1 starting, 2 ready, 3 draining, 4 stopping |
//! | 7 | 1 | address family | 4 or 6 |
//! | 8 | 4 | key id | as configured on both sides |
//! | 12 | 8 | incarnation | when the sender started, ms since 1970 |
//! | 20 | 8 | sequence | one more with each datagram of an incarnation |
//! | 28 | 8 | time | when it was sent, ms since 1970 |
//! | 36 | 4 | interval | how often it is sent, ms, 1 to 3,600,000 |
//! | 40 | 4 | in flight | connections the backend is serving |
//! | 44 | 2 | weight | 1 to 1000 |
//! | 46 | 2 | load | 0 (idle) to 1000 (full) |
//! | 48 | 2 | port | 1 to 65535 |
//! | 50 | 4 or 16 | address | where the backend serves: IPv4 or IPv6, by the family |
//! | | 1 | length of the pool's name | 1 to 64 |
//! | | that | pool | `A-Z a-z 0-9 . _ -`, not dots alone |
//! | | 1 | length of the backend's name | 1 to 64 |
//! | | that | name | as a pool's, or the address and port as text (`10.0.0.1:80`, `[2001:db8::1]:80`): the name a backend has that was given none |
//! | | 16 | tag | the first 16 bytes of HMAC-SHA-256 (RFC 2104) with the key over everything before |
//!
//! The smallest is 76 bytes, the largest [`DATAGRAM_BYTES_MAX`]. Not every
//! address is one: unspecified, multicast, broadcast, IPv4 mapped into IPv6 and
//! link-local IPv6 (which means nothing without an interface) are malformed.
//! Whoever changes anything here raises the version.

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

/// 128 bits: a guess hits with 2^-128, and no receiver answers anyway.
pub const TAG_BYTES: usize = 16;

/// Greatest weight and greatest load.
pub const SHARE_MAX: u16 = 1000;

/// Longest interval a sender may claim: an hour.
pub const INTERVAL_MAX: Duration = Duration::from_secs(3600);

const MAGIC: [u8; 4] = *b"TGHB";
const VERSION: u8 = 1;
/// Everything before the address.
const HEADER_BYTES: usize = 50;

/// Who sends: checked once, so that encoding cannot fail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SenderIdentity {
    pool: Arc<str>,
    name: Arc<str>,
    address: SocketAddr,
}

/// Why an identity cannot be sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidIdentity {
    /// The pool's name.
    #[error("invalid pool name {0:?}: use 1 to 64 of A-Z a-z 0-9 . _ -")]
    Pool(String),
    /// The backend's name.
    #[error("invalid backend name {0:?}: use its address or 1 to 64 of A-Z a-z 0-9 . _ -")]
    Name(String),
    /// Nobody could connect there.
    #[error("a balancer cannot connect to address {0}")]
    Address(SocketAddr),
}

/// What one datagram is to say. Weight, load and interval beyond their bounds
/// are sent as the nearest bound.
#[derive(Debug, Clone, Copy)]
pub struct HeartbeatFields<'a> {
    /// Who.
    pub identity: &'a SenderIdentity,
    /// Number of the secret it is signed with.
    pub key_id: u32,
    /// When the sender started, ms since 1970.
    pub incarnation: u64,
    /// One more each time.
    pub sequence: u64,
    /// Now, ms since 1970.
    pub sent: u64,
    /// How often it sends.
    pub interval: Duration,
    /// Its state.
    pub state: SenderState,
    /// Its share, 1..=1000.
    pub weight: u16,
    /// Connections it is serving.
    pub in_flight: u32,
    /// How busy it is, 0..=1000.
    pub load: u16,
}

/// A datagram ready to be sent; derefs to its bytes.
#[derive(Clone, Copy)]
pub struct EncodedHeartbeat {
    bytes: [u8; DATAGRAM_BYTES_MAX],
    length: usize,
}

/// A well-formed datagram, not yet proven.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParsedHeartbeat<'a> {
    /// Pool it speaks for.
    pub pool: &'a str,
    /// Backend name.
    pub name: &'a str,
    /// Where the backend serves.
    pub address: SocketAddr,
    /// Number of the secret it claims to be signed with.
    pub key_id: u32,
    /// When the sender started.
    pub incarnation: u64,
    /// Its number in the incarnation.
    pub sequence: u64,
    /// When it was sent, ms since 1970 by the sender's clock.
    pub sent: u64,
    /// How often the sender sends.
    pub interval: Duration,
    /// The sender's state.
    pub state: SenderState,
    /// The share it asks for.
    pub weight: u16,
    /// Connections it is serving.
    pub in_flight: u32,
    /// How busy it is.
    pub load: u16,
    signed: &'a [u8],
    tag: &'a [u8],
}

/// What is wrong with the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Fewer bytes than the smallest datagram, or than it announces.
    #[error("datagram too short")]
    Short,
    /// More bytes than the largest datagram, or than it announces.
    #[error("datagram too long")]
    Long,
    /// Not one of ours.
    #[error("not a heartbeat")]
    Magic,
    /// One of ours, of another version or with unknown flags.
    #[error("unsupported version or flags")]
    Version,
    /// No such state.
    #[error("unknown sender state")]
    State,
    /// No such family, or an address nobody can connect to.
    #[error("unusable address")]
    Address,
    /// Interval, weight, load or port out of bounds.
    #[error("value out of range")]
    Value,
    /// A name of wrong length or characters.
    #[error("invalid name")]
    Name,
}

/// Takes fields off the front. Bounds were checked before where `take` cannot
/// fail, and are checked here in any case.
struct Cursor<'a>(&'a [u8]);

/// Writes and signs one datagram.
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

/// Whether a balancer could connect there: what a datagram may announce.
fn is_usable(address: SocketAddr) -> bool {
    let ip = address.ip();
    let odd = match ip {
        IpAddr::V4(ip) => ip.is_broadcast(),
        IpAddr::V6(ip) => ip.to_ipv4_mapped().is_some() || ip.is_unicast_link_local(),
    };
    address.port() != 0 && !ip.is_unspecified() && !ip.is_multicast() && !odd
}

/// The configuration's rule for names: what can be a metric label and a path
/// segment as it stands.
fn is_name(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    (1..=NAME_BYTES_MAX).contains(&text.len())
        && text.bytes().all(allowed)
        && text.bytes().any(|b| b != b'.')
}

/// A name, or what a backend is called that was given none: its address.
fn is_backend_name(text: &str, address: SocketAddr) -> bool {
    // Only then is there a colon; formatting an address costs more.
    is_name(text) || (text.contains(':') && address.to_string() == text)
}

// === impl SenderIdentity ===

impl SenderIdentity {
    /// A backend of `pool` that serves at `address`.
    ///
    /// # Errors
    /// Names outside the configuration's rules, addresses nobody can connect to.
    pub fn new(
        pool: &str,
        name: &str,
        address: SocketAddr,
    ) -> Result<SenderIdentity, InvalidIdentity> {
        // IPv4 mapped into IPv6 is the IPv4 address everywhere.
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

    /// Pool it speaks for.
    pub fn pool(&self) -> &str {
        &self.pool
    }

    /// Backend name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it serves.
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
    /// Takes a datagram apart.
    ///
    /// # Errors
    /// The first thing wrong, front to back.
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

    /// Whether `secret` has signed it; takes the same time whatever the answer.
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
    /// Its byte in a datagram.
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
