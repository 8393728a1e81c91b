//! Address types by role, so that one role is not used in place of another.
//!
//! All crates that handle addresses use them. Each type prints and serialises as the
//! plain address. There is no `From` between roles: a change of role is a named call.
//! Nothing here resolves, binds or connects.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use std::net::{AddrParseError, IpAddr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

/// Address of the client of a session; used for limits, hashing and the access log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct ClientAddr(PeerAddr);

/// Address of the peer of an accepted connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PeerAddr {
    /// Of a TCP connection.
    Ip(SocketAddr),
    /// Of a connection to a Unix socket, which has no address.
    Local(LocalPeer),
}

/// The process that connected to a Unix socket, as of its connect(2) (unix(7), SO_PEERCRED).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LocalPeer {
    /// Effective user number.
    pub user: u32,
    /// Process number; 0 if this process cannot see that one.
    pub process: u32,
}

/// Address of this host from which connections to backends start. The kernel chooses
/// the port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SourceAddr(IpAddr);

/// Address that a backend listens on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BackendAddr {
    /// IPv4 or IPv6.
    Tcp(SocketAddr),
    /// An IPv4 or IPv6 address without a port (the port here is 0), and what is added to the
    /// port that the client connected to.
    ClientPort(SocketAddr, i32),
    /// A Unix stream socket.
    Unix(PathBuf),
}

/// Identity of a bind.
///
/// It contains only what distinguishes sockets for the kernel. Socket options such as
/// `IP_FREEBIND` do not belong here: two sockets at one address share its clients
/// whatever their options, and a changed option must not close the address. Options are
/// in [`BindOptions`](super::BindOptions).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BindKey {
    /// TCP and UDP ports are separate.
    pub protocol: Protocol,
    /// Unique among the binds of a protocol and an interface.
    pub address: BindAddr,
    /// The only interface whose packets the socket gets (socket(7), SO_BINDTODEVICE).
    /// `None`: every interface.
    pub interface: Option<Arc<str>>,
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
    /// IPv4 or IPv6: a wildcard or a local address.
    Ip(SocketAddr),
    /// A Unix stream socket: a path, or `@` and a name in the abstract namespace (unix(7)).
    Unix(PathBuf),
}

// === impl ClientAddr ===

impl ClientAddr {
    /// Returns the peer as the client. Used if the connection announces no other
    /// client.
    pub fn of_peer(peer: PeerAddr) -> ClientAddr {
        ClientAddr(peer)
    }

    /// Returns the client that a PROXY header announced.
    pub fn announced(client: SocketAddr) -> ClientAddr {
        ClientAddr(PeerAddr::Ip(client))
    }

    /// Returns the same address as the peer of a socket. Use it only for a client that no
    /// header has announced.
    pub fn socket(self) -> PeerAddr {
        self.0
    }

    /// Returns address and port; `None` for a client of a Unix socket.
    pub fn socket_addr(self) -> Option<SocketAddr> {
        self.0.socket_addr()
    }

    /// Returns the address without its port; `None` for a client of a Unix socket.
    pub fn ip(self) -> Option<IpAddr> {
        self.socket_addr().map(|address| address.ip())
    }

    /// Returns what `source-hash` hashes: the IP address, or for a client of a Unix socket
    /// an address of the discard prefix (RFC 6666), which no host has, with the number of
    /// its user.
    pub fn hash_ip(self) -> IpAddr {
        match self.0 {
            PeerAddr::Ip(address) => address.ip(),
            PeerAddr::Local(peer) => {
                let prefix = u128::from(0x0100_u16) << 112;
                IpAddr::V6((prefix | u128::from(peer.user)).into())
            }
        }
    }
}

impl fmt::Display for ClientAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

// === impl PeerAddr ===

impl PeerAddr {
    /// Wraps an address from accept(2).
    pub fn new(address: SocketAddr) -> PeerAddr {
        PeerAddr::Ip(address)
    }

    /// Returns address and port; `None` for a peer on a Unix socket.
    pub fn socket_addr(self) -> Option<SocketAddr> {
        match self {
            PeerAddr::Ip(address) => Some(address),
            PeerAddr::Local(_) => None,
        }
    }
}

impl fmt::Display for PeerAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PeerAddr::Ip(address) => address.fmt(f),
            PeerAddr::Local(LocalPeer { user, process }) => {
                write!(f, "unix:uid={user},pid={process}")
            }
        }
    }
}

impl Serialize for PeerAddr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

// === impl SourceAddr ===

impl SourceAddr {
    /// Wraps an address from the configuration.
    pub fn new(address: IpAddr) -> SourceAddr {
        SourceAddr(address)
    }

    /// Returns the address for bind(2) before connect(2).
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

impl BackendAddr {
    /// Returns the address for connect(2), for a client that connected to `port`. `None`: a
    /// Unix socket, or the offset leads to no port.
    pub fn tcp(&self, port: u16) -> Option<SocketAddr> {
        match self {
            BackendAddr::Tcp(address) => Some(*address),
            BackendAddr::ClientPort(address, offset) => {
                let port = u16::try_from(i32::from(port) + offset).ok().filter(|port| *port > 0)?;
                let mut address = *address;
                address.set_port(port);
                Some(address)
            }
            BackendAddr::Unix(_) => None,
        }
    }
}

/// Parses the printed form.
impl FromStr for BackendAddr {
    type Err = AddrParseError;

    fn from_str(text: &str) -> Result<BackendAddr, AddrParseError> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(BackendAddr::Unix(path.into()));
        }
        let complete = text.parse().map(BackendAddr::Tcp);
        let offset = text.rsplit_once(':').filter(|(_, offset)| offset.starts_with(['+', '-']));
        let (host, offset) = match offset.map(|(host, offset)| (host, offset.parse())) {
            Some((host, Ok(offset))) => (host, offset),
            Some((_, Err(_))) => return complete,
            None => (text, 0),
        };
        complete.or_else(|_| {
            format!("{host}:0").parse().map(|address| BackendAddr::ClientPort(address, offset))
        })
    }
}

impl fmt::Display for BackendAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BackendAddr::Tcp(address) => address.fmt(f),
            BackendAddr::ClientPort(address, offset) => {
                let text = address.to_string();
                f.write_str(text.strip_suffix(":0").unwrap_or(&text))?;
                if *offset == 0 { Ok(()) } else { write!(f, ":{offset:+}") }
            }
            BackendAddr::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

// === impl BindKey ===

impl BindKey {
    /// Returns the key of a TCP bind on every interface.
    pub fn tcp(address: SocketAddr) -> BindKey {
        BindKey { protocol: Protocol::Tcp, address: BindAddr::Ip(address), interface: None }
    }

    /// Returns the same bind on one interface.
    #[must_use]
    pub fn on(self, interface: Option<Arc<str>>) -> BindKey {
        BindKey { interface, ..self }
    }

    /// Returns the key of a Unix socket.
    pub fn unix(path: PathBuf) -> BindKey {
        BindKey { protocol: Protocol::Tcp, address: BindAddr::Unix(path), interface: None }
    }

    /// Returns IP address and port; `None` for a Unix socket.
    pub fn socket_addr(&self) -> Option<SocketAddr> {
        match self.address {
            BindAddr::Ip(address) => Some(address),
            BindAddr::Unix(_) => None,
        }
    }

    /// Returns the path of a Unix socket.
    pub fn unix_path(&self) -> Option<&Path> {
        match &self.address {
            BindAddr::Ip(_) => None,
            BindAddr::Unix(path) => Some(path),
        }
    }

    /// Returns the file of a Unix socket that is not abstract.
    pub fn socket_file(&self) -> Option<&Path> {
        self.unix_path().filter(|path| !path.as_os_str().as_bytes().starts_with(b"@"))
    }
}

/// Prints only the address of a TCP bind, as older versions print and read it. The name of
/// an interface follows after `%`.
impl fmt::Display for BindKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.protocol, &self.address) {
            (Protocol::Tcp, BindAddr::Ip(address)) => address.fmt(f)?,
            (Protocol::Tcp, BindAddr::Unix(path)) => write!(f, "unix:{}", path.display())?,
        }
        self.interface.as_ref().map_or(Ok(()), |interface| write!(f, "%{interface}"))
    }
}

impl FromStr for BindKey {
    type Err = AddrParseError;

    fn from_str(text: &str) -> Result<BindKey, AddrParseError> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(BindKey::unix(path.into()));
        }
        // A scope id is before the bracket, not after it.
        let interface = text.rsplit_once('%').filter(|(_, after)| !after.contains(']'));
        let (address, interface) = match interface {
            Some((address, interface)) => (address, Some(interface.into())),
            None => (text, None),
        };
        address.parse().map(|address| BindKey::tcp(address).on(interface))
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

    /// Older versions use plain addresses in upgrade messages and in the names of kept
    /// sockets. They must read this form, and their form must be readable.
    #[test]
    fn bind_key_serialises_as_the_plain_address() {
        for text in ["127.0.0.1:80", "[::1]:80", "[fe80::1%3]:443"] {
            let address: SocketAddr = text.parse().unwrap();
            let key = BindKey::tcp(address);
            let written = serde_json::to_string(&key).unwrap();
            assert_eq!(written, serde_json::to_string(&address).unwrap());
            assert_eq!(serde_json::from_str::<BindKey>(&written).unwrap(), key);
            assert_eq!((key.to_string(), key.socket_addr()), (text.to_owned(), Some(address)));
        }
        assert!(serde_json::from_str::<BindKey>("\"udp:127.0.0.1:80\"").is_err());
    }

    #[test]
    fn bind_key_of_an_interface_is_read_as_printed() {
        for text in ["127.0.0.1:80%eth1", "[fe80::1%3]:443%eth1", "[::]:80%br-0.7"] {
            let key: BindKey = text.parse().unwrap();
            assert_eq!(key.to_string(), text);
            assert_ne!(key, BindKey::tcp(key.socket_addr().unwrap()));
        }
    }

    #[test]
    fn bind_key_of_a_unix_socket_is_read_as_printed() {
        for (text, file) in [("unix:/run/a%b.sock", Some("/run/a%b.sock")), ("unix:@a", None)] {
            let key: BindKey = text.parse().unwrap();
            assert_eq!((key.to_string(), key.socket_addr()), (text.to_owned(), None));
            assert_eq!(key.socket_file(), file.map(Path::new));
        }
    }

    #[test]
    fn clients_of_one_user_have_one_hash_and_print_user_and_process() {
        let client =
            |user, process| ClientAddr::of_peer(PeerAddr::Local(LocalPeer { user, process }));
        assert_eq!(client(1000, 1).hash_ip(), client(1000, 2).hash_ip());
        assert_ne!(client(1000, 1).hash_ip(), client(0, 1).hash_ip());
        assert_eq!(client(7, 9).hash_ip(), "100::7".parse::<IpAddr>().unwrap());
        assert_eq!(
            (client(7, 9).ip(), client(7, 9).to_string().as_str()),
            (None, "unix:uid=7,pid=9")
        );
    }

    #[test]
    fn backend_address_is_read_as_printed() {
        for text in [
            "10.0.0.7",
            "10.0.0.7:80",
            "10.0.0.7:+1000",
            "10.0.0.7:-1",
            "[fe80::1%3]",
            "[::1]:+7",
            "unix:@a",
        ] {
            let address: BackendAddr = text.parse().unwrap();
            assert_eq!(address.to_string(), text);
        }
        let port = |text: &str, port| text.parse::<BackendAddr>().unwrap().tcp(port);
        assert_eq!(port("10.0.0.7:+1000", 80), Some(([10, 0, 0, 7], 1080).into()));
        assert_eq!(port("10.0.0.7", 80), Some(([10, 0, 0, 7], 80).into()));
        for (text, local) in [("10.0.0.7:+1", u16::MAX), ("10.0.0.7:-80", 80), ("unix:@a", 80)] {
            assert_eq!(port(text, local), None);
        }
    }

    #[test]
    fn all_roles_print_and_serialise_as_the_plain_address() {
        let address: SocketAddr = "[2001:db8::1]:4000".parse().unwrap();
        let (peer, source) = (PeerAddr::new(address), SourceAddr::new(address.ip()));
        let client = ClientAddr::of_peer(peer);
        assert_eq!((client.to_string(), client.ip()), (address.to_string(), Some(address.ip())));
        assert_eq!(
            (peer.to_string(), source.to_string()),
            (address.to_string(), address.ip().to_string())
        );
        assert_eq!(serde_json::to_string(&client).unwrap(), "\"[2001:db8::1]:4000\"");
        assert_eq!(serde_json::to_string(&source).unwrap(), "\"2001:db8::1\"");
    }
}
