//! Writes headers.
//!
//! Called by the data path and by probes. The result goes into a buffer of the caller, which a
//! worker reuses.

use super::{
    FIXED_BYTES, HEADER_BYTES_MAX, ProxyVersion, SIGNATURE, Tlvs,
    checksum::{self, CRC_BYTES},
};
use std::io::Write;
use std::net::{IpAddr, SocketAddr};

/// The client and the address that it connected to. `None` if a side has no IP address.
pub type HeaderAddresses = Option<(SocketAddr, SocketAddr)>;

/// `PROXY`, version 2.
const PROXY: u8 = 0x21;
/// `LOCAL`, version 2.
const LOCAL: u8 = 0x20;

/// Bytes of an entry before its value.
const ENTRY_BYTES: usize = 3;

/// Replaces the content of `out` by a header that names `addresses`. `tlvs` and the checksum
/// are for version 2 only. An entry that would make the header longer than
/// [`HEADER_BYTES_MAX`] is left out.
pub fn encode<'t>(
    version: ProxyVersion,
    addresses: HeaderAddresses,
    tlvs: impl Iterator<Item = (u8, &'t [u8])>,
    with_checksum: bool,
    out: &mut Vec<u8>,
) {
    out.clear();
    let addresses = addresses.map(same_family);
    match version {
        ProxyVersion::V1 => line(addresses, out),
        ProxyVersion::V2 => {
            start(PROXY, addresses, out);
            let trailer = if with_checksum { ENTRY_BYTES + CRC_BYTES } else { 0 };
            for (kind, value) in tlvs {
                if out.len() + ENTRY_BYTES + value.len() + trailer <= HEADER_BYTES_MAX {
                    Tlvs::append(out, kind, value);
                }
            }
            let block = (out.len() + trailer - FIXED_BYTES) as u16;
            out[FIXED_BYTES - 2..FIXED_BYTES].copy_from_slice(&block.to_be_bytes());
            if with_checksum {
                checksum::append(out);
            }
        }
    }
}

/// Returns the header of a connection without a client, as probes send it. Version 1 has no
/// `LOCAL`; there it is `UNKNOWN`.
pub fn encode_local(version: ProxyVersion) -> Vec<u8> {
    let mut out = Vec::with_capacity(FIXED_BYTES);
    match version {
        ProxyVersion::V1 => line(None, &mut out),
        ProxyVersion::V2 => start(LOCAL, None, &mut out),
    }
    out
}

/// Writes IPv4 addresses as IPv6 if the other address is IPv6 (RFC 4291, 2.5.5.2).
fn same_family((client, destination): (SocketAddr, SocketAddr)) -> (SocketAddr, SocketAddr) {
    let canonical =
        |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    let mapped = |address: SocketAddr| match address.ip() {
        IpAddr::V4(v4) => SocketAddr::new(v4.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    };
    let (client, destination) = (canonical(client), canonical(destination));
    match client.is_ipv4() == destination.is_ipv4() {
        true => (client, destination),
        false => (mapped(client), mapped(destination)),
    }
}

fn line(addresses: HeaderAddresses, out: &mut Vec<u8>) {
    // Writing to a vector cannot fail.
    let _ = match addresses {
        None => write!(out, "PROXY UNKNOWN\r\n"),
        Some((client, destination)) => {
            let family = if client.is_ipv4() { 4 } else { 6 };
            let (ips, ports) =
                ((client.ip(), destination.ip()), (client.port(), destination.port()));
            write!(out, "PROXY TCP{family} {} {} {} {}\r\n", ips.0, ips.1, ports.0, ports.1)
        }
    };
}

/// Writes the start of version 2 up to the addresses, with a length of 0.
fn start(command: u8, addresses: HeaderAddresses, out: &mut Vec<u8>) {
    out.extend(SIGNATURE);
    let Some((client, destination)) = addresses else {
        return out.extend([command, 0, 0, 0]);
    };
    out.extend([command, if client.is_ipv4() { 0x11 } else { 0x21 }, 0, 0]);
    for address in [client, destination] {
        match address.ip() {
            IpAddr::V4(v4) => out.extend(v4.octets()),
            IpAddr::V6(v6) => out.extend(v6.octets()),
        }
    }
    for address in [client, destination] {
        out.extend(address.port().to_be_bytes());
    }
}
