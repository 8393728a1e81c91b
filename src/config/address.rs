//! Parses the text of an address. Each form that operators write by mistake gets its
//! own advice.
//!
//! Called by `validate`, which knows the place of the text. It never resolves a name. It
//! asks the kernel only for the index of an interface.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;

use super::source;
use super::value::{ValueError, cut, shown};
use crate::host_name::host_name;
use tidegate_core::model::{
    AdminListen, BackendAddr, NameFamily, NameQuestion, NameRecord, ServerAddr, SourceAddr,
};

/// `sun_path` is 108 bytes with its final NUL (unix(7)).
const UNIX_PATH_BYTES_MAX: usize = 107;

/// A name of an interface is 16 bytes with its final NUL (netdevice(7), IFNAMSIZ).
const INTERFACE_BYTES_MAX: usize = 15;

/// Where a backend is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum BackendPlace {
    /// At this address.
    Address(BackendAddr),
    /// At the addresses of a name.
    Name(NameQuestion),
}

/// An IP address or a name, with a port.
enum Endpoint<'t> {
    Ip(SocketAddr),
    Name(&'t str, u16),
}

/// The addresses of one text of `bind`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BindAddresses {
    /// One address, or the IPv4 and the IPv6 wildcard for `*`.
    pub(super) hosts: Vec<SocketAddr>,
    /// The ports at each address.
    pub(super) ports: RangeInclusive<u16>,
}

/// Where one text of `bind` listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum BindPlace {
    /// At IP addresses.
    Ip(BindAddresses),
    /// On a Unix socket.
    Unix(PathBuf),
}

/// Parses a text of `bind`: IP addresses or a Unix socket.
pub(super) fn bind_place(text: &str) -> Result<BindPlace, ValueError> {
    match text.strip_prefix("unix:") {
        Some(path) => unix_path(path).map(BindPlace::Unix),
        None => bind_addresses(text).map(BindPlace::Ip),
    }
}

/// Parses addresses to listen on: `IP:PORT`, `[IPV6]:PORT` or `*:PORT`, with one port or a
/// range such as `8000-8010`.
fn bind_addresses(text: &str) -> Result<BindAddresses, ValueError> {
    let range =
        text.rsplit_once(':').and_then(|(host, ports)| Some((host, ports.split_once('-')?)));
    let (text, last) = match range {
        Some((host, (first, last))) => {
            (&format!("{host}:{first}")[..], Some(port_number(text, last)?))
        }
        None => (text, None),
    };
    let hosts = match text.strip_prefix("*:") {
        Some(port) => {
            let port = port_number(text, port)?;
            vec![(Ipv4Addr::UNSPECIFIED, port).into(), (Ipv6Addr::UNSPECIFIED, port).into()]
        }
        None => vec![bind_address(text)?],
    };
    let first = hosts.first().map_or(0, SocketAddr::port);
    let last = last.unwrap_or(first);
    if last < first {
        return Err(ValueError::new(format!("the range {first}-{last} ends before it starts"))
            .help(format!("write \"{last}-{first}\"")));
    }
    Ok(BindAddresses { hosts, ports: first..=last })
}

/// Parses the name of a network interface.
pub(super) fn interface_name(text: &str) -> Result<Arc<str>, ValueError> {
    let allowed = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | ':' | '%' | ']');
    if text.is_empty() || text.len() > INTERFACE_BYTES_MAX || !text.chars().all(allowed) {
        return Err(ValueError::new(format!("{} is not the name of an interface", shown(text)))
            .help("`ip link` shows the names, such as \"eth0\""));
    }
    Ok(text.into())
}

/// Parses `IP:PORT` or `[IPV6]:PORT` to listen on.
pub(super) fn bind_address(text: &str) -> Result<SocketAddr, ValueError> {
    if text.starts_with("unix:") {
        return Err(ValueError::new(format!(
            "{} is not an address that packets arrive at",
            shown(text)
        ))
        .help("write IP:PORT or [IPV6]:PORT"));
    }
    let address = socket_address(text)?;
    if address.ip().is_multicast() || address.ip() == IpAddr::V4(Ipv4Addr::BROADCAST) {
        return Err(ValueError::new(format!(
            "{} is a multicast or broadcast address; TCP cannot listen there",
            address.ip()
        )));
    }
    Ok(address)
}

/// Parses the address of a backend: an IP address, a Unix socket or a name.
pub(super) fn backend_place(text: &str) -> Result<BackendPlace, ValueError> {
    if let Some(path) = text.strip_prefix("unix:") {
        return unix_path(path).map(|path| BackendPlace::Address(BackendAddr::Unix(path)));
    }
    if let Some(name) = text.strip_prefix("srv:") {
        return srv_name(name).map(BackendPlace::Name);
    }
    if let Some(complaint) = name_without_port(text) {
        return Err(complaint);
    }
    if let Some(place) = client_port(text) {
        return place.map(BackendPlace::Address);
    }
    match endpoint(text)? {
        Endpoint::Ip(address) => {
            connectable(address).map(|address| BackendPlace::Address(BackendAddr::Tcp(address)))
        }
        Endpoint::Name(name, port) => Ok(BackendPlace::Name(NameQuestion {
            name: name.into(),
            record: NameRecord::Address,
            port: Some(port),
            family: NameFamily::Both,
        })),
    }
}

/// Parses the address of a backend at the client's port: an IP address alone, or with an
/// offset such as `10.0.0.7:+1000`. `None`: the text has another form.
fn client_port(text: &str) -> Option<Result<BackendAddr, ValueError>> {
    let offset = text.rsplit_once(':').filter(|(_, offset)| offset.starts_with(['+', '-']));
    let (host, offset) = match offset {
        Some((host, offset)) => (host, Some(offset)),
        None => (text, None),
    };
    let bare_v4 = host.parse::<Ipv4Addr>().is_ok();
    let v6 = host.starts_with('[') && host.ends_with(']');
    if !bare_v4 && !v6 {
        return None;
    }
    let digits =
        |text: &str| (1..=5).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
    let number = match offset {
        None => 0,
        Some(text) if digits(&text[1..]) => text.parse::<i32>().unwrap_or(0),
        Some(text) => {
            return Some(Err(ValueError::new(format!("{} is not an offset", shown(text)))
                .help("write a sign and at most five digits, such as \"10.0.0.7:+1000\"")));
        }
    };
    // Any port: only the address is checked.
    let place = socket_address(&format!("{host}:1")).and_then(connectable);
    Some(place.map(|mut address| {
        address.set_port(0);
        BackendAddr::ClientPort(address, number)
    }))
}

/// Parses the name after `srv:`.
fn srv_name(name: &str) -> Result<NameQuestion, ValueError> {
    if let Some((name, _)) = name.split_once(':') {
        return Err(ValueError::new("an address with srv: takes no port")
            .help(format!("SRV records have ports; write \"srv:{}\"", cut(name))));
    }
    host_name(name)?;
    let (record, family) = (NameRecord::Srv, NameFamily::Both);
    Ok(NameQuestion { name: name.into(), record, port: None, family })
}

/// Returns the error for a name alone.
fn name_without_port(text: &str) -> Option<ValueError> {
    let is_name = text.contains(|c: char| c.is_ascii_alphabetic()) && host_name(text).is_ok();
    is_name.then(|| {
        let complaint = ValueError::new(format!("the port is missing in {}", shown(text)));
        let text = cut(text);
        complaint.help(match text.starts_with('_') {
            true => format!("for the SRV records of this name write \"srv:{text}\""),
            false => format!("write NAME:PORT, such as \"{text}:8080\""),
        })
    })
}

/// Parses the address of a server that Tidegate asks: `IP:PORT`, `NAME:PORT` or
/// `unix:PATH`.
pub(super) fn server_address(text: &str) -> Result<ServerAddr, ValueError> {
    if let Some(path) = text.strip_prefix("unix:") {
        if path.starts_with('@') {
            return Err(ValueError::new("a server cannot be an abstract Unix socket")
                .help("write \"unix:/path/to/socket\""));
        }
        return unix_path(path).map(ServerAddr::Unix);
    }
    if let Some(complaint) = name_without_port(text) {
        return Err(complaint);
    }
    match endpoint(text)? {
        Endpoint::Ip(address) => connectable(address).map(ServerAddr::Ip),
        Endpoint::Name(host, port) => Ok(ServerAddr::Name { host: host.into(), port }),
    }
}

/// Parses `IP:PORT` or `[IPV6]:PORT` to connect to.
pub(super) fn ip_server(text: &str) -> Result<SocketAddr, ValueError> {
    connectable(socket_address(text)?)
}

/// Rejects addresses that no connection can reach.
fn connectable(address: SocketAddr) -> Result<SocketAddr, ValueError> {
    let ip = address.ip();
    if ip.is_unspecified() {
        return Err(ValueError::new(format!(
            "{ip} is not an address that Tidegate can connect to"
        ))
        .help(format!("for this machine write {}", own_address(ip, address.port()))));
    }
    if ip.is_multicast() || ip == IpAddr::V4(Ipv4Addr::BROADCAST) {
        return Err(ValueError::new(format!(
            "{ip} is a multicast or broadcast address; TCP cannot connect there"
        )));
    }
    Ok(address)
}

/// Parses a source address: an address of this host that connections start from.
pub(super) fn source_address(text: &str) -> Result<SourceAddr, ValueError> {
    let Ok(ip) = text.parse::<IpAddr>().map(|ip| ip.to_canonical()) else {
        return Err(ValueError::new(format!("{} is not an IP address", shown(text)))
            .help("write an address of this host without a port, such as \"10.0.0.5\""));
    };
    if ip.is_unspecified() || ip.is_multicast() || ip == IpAddr::V4(Ipv4Addr::BROADCAST) {
        return Err(ValueError::new(format!("{ip} cannot be a source address"))
            .help("without this key, the kernel chooses the source address"));
    }
    Ok(SourceAddr::new(ip))
}

/// Parses the address that the admin API listens on.
pub(super) fn admin_listen(text: &str) -> Result<AdminListen, ValueError> {
    match text.strip_prefix("unix:") {
        Some(path) if path.starts_with('@') => {
            Err(ValueError::new("the admin API cannot listen on an abstract Unix socket")
                .help("any user of this host could connect to it; give a file path"))
        }
        Some(path) => unix_path(path).map(AdminListen::Unix),
        None => socket_address(text).map(AdminListen::Tcp),
    }
}

fn own_address(ip: IpAddr, port: u16) -> SocketAddr {
    match ip {
        IpAddr::V4(_) => (Ipv4Addr::LOCALHOST, port).into(),
        IpAddr::V6(_) => (Ipv6Addr::LOCALHOST, port).into(),
    }
}

pub(super) fn unix_path(path: &str) -> Result<PathBuf, ValueError> {
    if path.is_empty() {
        return Err(ValueError::new("the path of the Unix socket is missing")
            .help("write \"unix:/path/to/socket\""));
    }
    if path.contains('\0') {
        return Err(ValueError::new(format!("{} is not a file path", shown(path)))
            .help("for an abstract Unix socket write \"unix:@name\""));
    }
    if path == "@" {
        return Err(ValueError::new("the name of the abstract Unix socket is missing")
            .help("write \"unix:@name\""));
    }
    if path.len() > UNIX_PATH_BYTES_MAX {
        return Err(ValueError::new(format!(
            "the path of a Unix socket has at most {UNIX_PATH_BYTES_MAX} bytes, this one has {}",
            path.len()
        )));
    }
    Ok(PathBuf::from(path))
}

/// Parses `IP:PORT` or `[IPV6]:PORT`.
fn socket_address(text: &str) -> Result<SocketAddr, ValueError> {
    let (host, port) = match endpoint(text)? {
        Endpoint::Ip(address) => return Ok(address),
        Endpoint::Name(host, port) => (host, port),
    };
    let complaint =
        ValueError::new(format!("{} is a host name; this key takes an IP address", shown(host)));
    Err(match host {
        "localhost" => complaint.help(format!("write \"127.0.0.1:{port}\" or \"[::1]:{port}\"")),
        _ => complaint,
    })
}

/// Parses `IP:PORT`, `[IPV6]:PORT` or `NAME:PORT`. Each rejected form has its own advice.
fn endpoint(text: &str) -> Result<Endpoint<'_>, ValueError> {
    if let Some((_, rest)) = text.split_once("://") {
        return Err(ValueError::new(format!("{} is a URL", shown(text)))
            .help(format!("give the address alone: {}", shown(rest))));
    }
    if let Some(rest) = text.strip_prefix('[') {
        return ipv6_address(text, rest).map(Endpoint::Ip);
    }
    let starts_v4 = text.split(':').next().is_some_and(|part| part.parse::<Ipv4Addr>().is_ok());
    if text.matches(':').count() > 1 && !starts_v4 {
        return Err(ValueError::new(format!("{} looks like IPv6 without brackets", shown(text)))
            .help("write [IPV6]:PORT, such as \"[::1]:8080\""));
    }
    let Some((host, port)) = text.split_once(':') else {
        return Err(missing_port(text));
    };
    let port = port_number(text, port)?;
    if let Ok(ip) = host.parse::<Ipv4Addr>() {
        return Ok(Endpoint::Ip((ip, port).into()));
    }
    named_host(host, port).map(|()| Endpoint::Name(host, port))
}

fn missing_port(text: &str) -> ValueError {
    if text.is_empty() {
        return ValueError::new("the address is empty")
            .help("write IP:PORT, such as \"10.0.0.1:8080\"");
    }
    if text.starts_with('/') {
        return ValueError::new(format!("{} is a path, not an address", shown(text)))
            .help(format!("for a Unix socket write \"unix:{}\"", cut(text)));
    }
    if text.bytes().all(|b| b.is_ascii_digit()) {
        return ValueError::new(format!("{} is a port without an address", shown(text))).help(
            format!("for every IPv4 address of this machine write \"0.0.0.0:{}\"", cut(text)),
        );
    }
    ValueError::new(format!("the port is missing in {}", shown(text)))
        .help("write IP:PORT, such as \"10.0.0.1:8080\"")
}

/// Checks the name before a port.
fn named_host(host: &str, port: u16) -> Result<(), ValueError> {
    if host.is_empty() || host == "*" {
        let complaint = ValueError::new("the IP address before the port is missing");
        return Err(complaint.help(format!(
            "\"0.0.0.0:{port}\" is every IPv4 address, \"[::]:{port}\" every IPv6 address"
        )));
    }
    if host.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return Err(ValueError::new(format!("{} is not an IPv4 address", shown(host)))
            .help("four numbers from 0 to 255 without leading zeros, such as 10.0.0.1"));
    }
    host_name(host)
}

fn ipv6_address(text: &str, rest: &str) -> Result<SocketAddr, ValueError> {
    let Some((host, after)) = rest.split_once(']') else {
        return Err(ValueError::new(format!("the closing bracket is missing in {}", shown(text)))
            .help("write [IPV6]:PORT, such as \"[::1]:8080\""));
    };
    let Some(port) = after.strip_prefix(':') else {
        return Err(ValueError::new(format!("the port is missing in {}", shown(text)))
            .help("write [IPV6]:PORT, such as \"[::1]:8080\""));
    };
    let port = port_number(text, port)?;
    let (ip, scope) = match host.split_once('%') {
        Some((ip, scope)) => (ip, Some(scope_id(scope)?)),
        None => (host, None),
    };
    let ip: Ipv6Addr =
        ip.parse().map_err(|_| ValueError::new(format!("{} is not an IPv6 address", shown(ip))))?;
    if let Some(v4) = ip.to_ipv4_mapped() {
        return Err(ValueError::new(format!("{ip} is an IPv4 address written as IPv6"))
            .help(format!("write \"{v4}:{port}\"")));
    }
    let link_local = ip.is_unicast_link_local();
    if link_local && scope.is_none() {
        return Err(ValueError::new(format!("{ip} is link-local and needs a scope id"))
            .help(format!("write \"[{ip}%eth0]:{port}\", with the interface's name or index")));
    }
    if !link_local && scope.is_some() {
        return Err(ValueError::new(format!("{ip} is not link-local and takes no scope id")));
    }
    Ok(SocketAddrV6::new(ip, port, 0, scope.unwrap_or(0)).into())
}

fn scope_id(text: &str) -> Result<u32, ValueError> {
    match text.parse::<u32>() {
        Ok(index) if index > 0 => return Ok(index),
        Ok(_) => {}
        Err(_) => match source::interface_index(text) {
            Some(index) => return Ok(index),
            None => {
                return Err(ValueError::new(format!("there is no interface {}", shown(text)))
                    .help("give the name of an interface or its index; `ip link` shows both"));
            }
        },
    }
    Err(ValueError::new(format!("{} is not a scope id", shown(text)))
        .help("give the name of an interface or its index; `ip link` shows both"))
}

/// Parses the port after an address. `text` is the whole address.
pub(super) fn port_number(text: &str, port: &str) -> Result<u16, ValueError> {
    if port.is_empty() {
        return Err(ValueError::new(format!("the port is missing in {}", shown(text)))
            .help("write IP:PORT, such as \"10.0.0.1:8080\""));
    }
    if !port.bytes().all(|b| b.is_ascii_digit()) {
        return Err(ValueError::new(format!("{} is not a port number", shown(port)))
            .help("give one port as a number from 1 to 65535"));
    }
    match port.parse::<u16>() {
        Ok(0) => {
            Err(ValueError::new("port 0 is not allowed").help("give a number from 1 to 65535"))
        }
        Ok(port) => Ok(port),
        Err(_) => Err(ValueError::new(format!("port {} is above 65535", cut(port)))),
    }
}

// === impl BackendPlace ===

impl fmt::Display for BackendPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BackendPlace::Address(address) => address.fmt(f),
            BackendPlace::Name(question) => question.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// A backend without a name has its address as name, so the text must be stable.
        #[test]
        fn shown_place_of_a_backend_is_read_as_the_same_place(
            text in prop_oneof![
                "(srv:)?[a-zA-Z0-9._-]{1,20}(:0{0,2}[0-9]{1,5})?",
                "[0-9]{1,3}(\\.[0-9]{1,3}){3}:[0-9]{1,5}",
                "\\PC{0,40}",
            ],
        ) {
            if let Ok(place) = backend_place(&text) {
                prop_assert_eq!(backend_place(&place.to_string()), Ok(place));
            }
            let _ = (server_address(&text), bind_addresses(&text), ip_server(&text));
        }
    }

    #[test]
    fn member_of_a_name_never_has_the_name_of_another_backend() {
        // Of all addresses only those of Unix sockets can have an @, and no name starts
        // like them.
        for text in ["unix:@db@10.0.0.1:80", "unix:/run/db@10.0.0.1:80"] {
            assert!(matches!(backend_place(text), Ok(BackendPlace::Address(_))), "{text}");
        }
        for text in ["unix:80", "db@10.0.0.1:80", "srv:db@10.0.0.1", "10.0.0.1@10.0.0.1:80"] {
            let name = matches!(backend_place(text), Ok(BackendPlace::Name(_)));
            assert!(!name, "{text}");
        }
        assert!(crate::value::name("pg@10.0.0.1:80").is_err());
    }
}
