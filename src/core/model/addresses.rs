//! Addresses by their role, so that none is used in the place of another.
//!
//! Used by every member that handles an address. Each type prints and serialises as the
//! plain address. There is no `From` between the roles: a change of role is a named call.
//! Nothing here resolves, binds or connects.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use std::net::{AddrParseError, IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

/// Address of the client a session is for: limits, hashing and the access log go by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ClientAddr(SocketAddr);

/// Address at the other end of an accepted connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PeerAddr(SocketAddr);

/// Address of this host that connections to backends start at; the kernel chooses the
/// port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SourceAddr(IpAddr);

/// Where a backend listens.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BackendAddr {
    /// IPv4 or IPv6.
    Tcp(SocketAddr),
    /// A Unix stream socket.
    Unix(PathBuf),
}

/// What tells one bind from another.
///
/// Only what the kernel tells sockets apart by belongs here. Options of a socket, such as
/// `IP_FREEBIND`, do not: two sockets at one address share its clients whatever their
/// options are, and a changed option must not close the address. They are
/// [`BindOptions`](super::BindOptions).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BindKey {
    /// TCP and UDP ports are apart.
    pub protocol: Protocol,
    /// Unique among the binds of a protocol.
    pub address: BindAddr,
}

/// Transport protocol of a bind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// Stream sockets.
    Tcp,
}

/// Address of a bind.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BindAddr {
    /// IPv4 or IPv6, a wildcard or one address of this host.
    Ip(SocketAddr),
}

// === impl ClientAddr ===

impl ClientAddr {
    /// The client of a connection that announces no other: the peer itself.
    pub fn of_peer(peer: PeerAddr) -> ClientAddr {
        ClientAddr(peer.0)
    }

    /// The address without its port.
    pub fn ip(self) -> IpAddr {
        self.0.ip()
    }

    /// The port.
    pub fn port(self) -> u16 {
        self.0.port()
    }
}

impl fmt::Display for ClientAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

// === impl PeerAddr ===

impl PeerAddr {
    /// As accept(2) gave it.
    pub fn new(address: SocketAddr) -> PeerAddr {
        PeerAddr(address)
    }
}

impl fmt::Display for PeerAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

// === impl SourceAddr ===

impl SourceAddr {
    /// As configured.
    pub fn new(address: IpAddr) -> SourceAddr {
        SourceAddr(address)
    }

    /// For bind(2) before connect(2).
    pub fn ip(self) -> IpAddr {
        self.0
    }
}

impl fmt::Display for SourceAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

// === impl BackendAddr ===

impl fmt::Display for BackendAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BackendAddr::Tcp(address) => address.fmt(f),
            BackendAddr::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

// === impl BindKey ===

impl BindKey {
    /// TCP at that address.
    pub fn tcp(address: SocketAddr) -> BindKey {
        BindKey { protocol: Protocol::Tcp, address: BindAddr::Ip(address) }
    }

    /// For bind(2).
    pub fn socket_addr(&self) -> SocketAddr {
        match self.address {
            BindAddr::Ip(address) => address,
        }
    }
}

/// The address alone for TCP, as older programs print and read it.
impl fmt::Display for BindKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.protocol, &self.address) {
            (Protocol::Tcp, BindAddr::Ip(address)) => address.fmt(f),
        }
    }
}

impl FromStr for BindKey {
    type Err = AddrParseError;

    fn from_str(text: &str) -> Result<BindKey, AddrParseError> {
        text.parse().map(BindKey::tcp)
    }
}

impl Serialize for BindKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for BindKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<BindKey, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Upgrade messages and names of kept sockets were plain addresses before they were
    /// keys, and older programs still read and write them.
    #[test]
    fn a_bind_key_reads_and_writes_as_the_plain_address() {
        for text in ["127.0.0.1:80", "[::1]:80", "[fe80::1%3]:443"] {
            let address: SocketAddr = text.parse().unwrap();
            let key = BindKey::tcp(address);
            let written = serde_json::to_string(&key).unwrap();
            assert_eq!(written, serde_json::to_string(&address).unwrap());
            assert_eq!(serde_json::from_str::<BindKey>(&written).unwrap(), key);
            assert_eq!((key.to_string(), key.socket_addr()), (text.to_owned(), address));
        }
        assert!(serde_json::from_str::<BindKey>("\"udp:127.0.0.1:80\"").is_err());
    }

    #[test]
    fn every_role_prints_and_serialises_as_the_plain_address() {
        let address: SocketAddr = "[2001:db8::1]:4000".parse().unwrap();
        let (peer, source) = (PeerAddr::new(address), SourceAddr::new(address.ip()));
        let client = ClientAddr::of_peer(peer);
        assert_eq!((client.to_string(), client.ip()), (address.to_string(), address.ip()));
        assert_eq!(
            (peer.to_string(), source.to_string()),
            (address.to_string(), address.ip().to_string())
        );
        assert_eq!(serde_json::to_string(&client).unwrap(), "\"[2001:db8::1]:4000\"");
        assert_eq!(serde_json::to_string(&source).unwrap(), "\"2001:db8::1\"");
    }
}
