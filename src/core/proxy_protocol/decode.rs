//! Reads a header from the first bytes of a connection.
//!
//! Called by the data path with what it has peeked so far. It allocates nothing.

use super::checksum::{self, CRC_BYTES};
use super::{
    AUTHORITY_BYTES_MAX, Decoded, FIXED_BYTES, HEADER_BYTES_MAX, HeaderClient, HeaderFault,
    LINE_BYTES_MAX, LINE_START, ProxyHeader, SIGNATURE, Tlvs, UNIQUE_ID_BYTES_MAX, next_entry, tlv,
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Shortest header of version 1: `PROXY UNKNOWN\r\n`.
const LINE_BYTES_MIN: usize = 15;

/// What follows `PROXY ` in version 1.
const LINE_WORDS: [&[u8]; 3] = [b"TCP4 ", b"TCP6 ", UNKNOWN];
const UNKNOWN: &[u8] = b"UNKNOWN";

/// Returns the header at the start of `bytes`. Bytes after it are ignored.
///
/// For every prefix of an input, the result is `More` or the result of the whole input.
pub fn decode(bytes: &[u8]) -> Decoded<'_> {
    if bytes.is_empty() {
        return Decoded::More(1);
    }
    let starts = |with: &[u8]| {
        let both = with.len().min(bytes.len());
        with[..both] == bytes[..both]
    };
    let (start, least) = match () {
        () if starts(SIGNATURE) => (SIGNATURE, FIXED_BYTES),
        () if starts(LINE_START) => (LINE_START, LINE_BYTES_MIN),
        () => return Decoded::Bad(HeaderFault::Missing),
    };
    if bytes.len() < start.len() {
        return Decoded::More(least);
    }
    let decoded = if start == SIGNATURE { binary(bytes) } else { line(bytes) };
    decoded.unwrap_or_else(Decoded::Bad)
}

/// Version 1.
fn line(bytes: &[u8]) -> Result<Decoded<'_>, HeaderFault> {
    let rest = &bytes[LINE_START.len()..];
    let agrees = |word: &&[u8]| word.iter().zip(rest).all(|(a, b)| a == b);
    let word = LINE_WORDS.into_iter().find(agrees).ok_or(HeaderFault::Line)?;
    let Some(rest) = rest.get(word.len()..) else { return Ok(Decoded::More(LINE_BYTES_MIN)) };
    let start = bytes.len() - rest.len();
    let window = &rest[..rest.len().min(LINE_BYTES_MAX - start)];
    let end = window.windows(2).position(|pair| pair == b"\r\n");
    let content = &window[..end.unwrap_or(window.len())];
    let known = word != UNKNOWN;
    // A line feed alone does not end the line.
    let fits = |byte: &u8| byte.is_ascii_hexdigit() || b".: ".contains(byte);
    let content = match end {
        None => content.strip_suffix(b"\r").unwrap_or(content),
        Some(_) => content,
    };
    if known && !content.iter().all(fits) {
        return Err(HeaderFault::Line);
    }
    match end {
        None if bytes.len() >= LINE_BYTES_MAX => Err(HeaderFault::LongLine),
        None => {
            let missing = if window.ends_with(b"\r") { 1 } else { 2 };
            Ok(Decoded::More((bytes.len() + missing).max(LINE_BYTES_MIN)))
        }
        Some(end) => {
            let announced = if known { addresses(word, content)? } else { unknown(content)? };
            Ok(Decoded::Done(ProxyHeader { len: start + end + 2, announced, tlvs: Tlvs::NONE }))
        }
    }
}

/// The rest of a line `PROXY UNKNOWN`, which receivers ignore.
fn unknown(content: &[u8]) -> Result<HeaderClient, HeaderFault> {
    match content.first() {
        None | Some(b' ') => Ok(HeaderClient::Unknown),
        Some(_) => Err(HeaderFault::Line),
    }
}

/// `CLIENT DESTINATION CLIENT-PORT DESTINATION-PORT`
fn addresses(word: &[u8], content: &[u8]) -> Result<HeaderClient, HeaderFault> {
    let text = std::str::from_utf8(content).map_err(|_| HeaderFault::Line)?;
    let mut fields = text.split(' ');
    let mut field = || fields.next().ok_or(HeaderFault::Line);
    let [client, destination] = [field()?, field()?];
    let [client_port, destination_port] = [field()?, field()?];
    if fields.next().is_some() {
        return Err(HeaderFault::Line);
    }
    let v4 = word == LINE_WORDS[0];
    let client = SocketAddr::new(address(client, v4)?, port(client_port)?);
    let destination = SocketAddr::new(address(destination, v4)?, port(destination_port)?);
    Ok(announced(client, destination))
}

/// The parsers of the standard library accept no leading zeros.
fn address(text: &str, v4: bool) -> Result<IpAddr, HeaderFault> {
    let address: IpAddr = text.parse().map_err(|_| HeaderFault::Line)?;
    if address.is_ipv4() == v4 { Ok(address) } else { Err(HeaderFault::Family) }
}

fn port(text: &str) -> Result<u16, HeaderFault> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit());
    let zeros = text.len() > 1 && text.starts_with('0');
    match text.parse() {
        Ok(port) if plain && !zeros => Ok(port),
        _ => Err(HeaderFault::Line),
    }
}

fn announced(client: SocketAddr, destination: SocketAddr) -> HeaderClient {
    let canonical =
        |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    HeaderClient::Client(canonical(client), canonical(destination))
}

/// Version 2.
fn binary(bytes: &[u8]) -> Result<Decoded<'_>, HeaderFault> {
    let Some(&command) = bytes.get(SIGNATURE.len()) else { return Ok(Decoded::More(FIXED_BYTES)) };
    let local = match command {
        0x20 => true,
        0x21 => false,
        _ if command >> 4 == 2 => return Err(HeaderFault::Command),
        _ => return Err(HeaderFault::Version),
    };
    let Some(&protocol) = bytes.get(SIGNATURE.len() + 1) else {
        return Ok(Decoded::More(FIXED_BYTES));
    };
    if !local {
        match protocol & 0xf {
            0 | 1 => {}
            2 => return Err(HeaderFault::Datagram),
            _ => return Err(HeaderFault::Transport),
        }
    }
    let Some(&[high, low]) = bytes.get(FIXED_BYTES - 2..FIXED_BYTES) else {
        return Ok(Decoded::More(FIXED_BYTES));
    };
    let block = usize::from(u16::from_be_bytes([high, low]));
    let len = FIXED_BYTES + block;
    // Without a known family, nothing tells where the TLVs begin.
    let before_tlvs = match protocol {
        _ if local => block,
        0x11 => 12,
        0x21 => 36,
        0x31 => 216,
        _ => block,
    };
    if len > HEADER_BYTES_MAX {
        return Err(HeaderFault::TooLong);
    }
    if block < before_tlvs {
        return Err(HeaderFault::AddressLength);
    }
    let Some(header) = bytes.get(..len) else { return Ok(Decoded::More(len)) };
    let (addresses, tlvs) = header[FIXED_BYTES..].split_at(before_tlvs);
    check_tlvs(header, FIXED_BYTES + before_tlvs)?;
    let announced = match protocol {
        _ if local => HeaderClient::Local,
        0x11 => of_ports(addresses, |[a, b, c, d]: [u8; 4]| Ipv4Addr::new(a, b, c, d).into()),
        0x21 => of_ports(addresses, |octets: [u8; 16]| Ipv6Addr::from(octets).into()),
        _ => HeaderClient::Unknown,
    };
    Ok(Decoded::Done(ProxyHeader { len, announced, tlvs: Tlvs(tlvs) }))
}

/// Two addresses of `N` bytes and two ports.
fn of_ports<const N: usize>(bytes: &[u8], address: impl Fn([u8; N]) -> IpAddr) -> HeaderClient {
    let Some((client, rest)) = bytes.split_first_chunk() else { return HeaderClient::Unknown };
    let Some((destination, ports)) = rest.split_first_chunk() else { return HeaderClient::Unknown };
    let &[a, b, c, d] = ports else { return HeaderClient::Unknown };
    let of =
        |octets: [u8; N], port: [u8; 2]| SocketAddr::new(address(octets), u16::from_be_bytes(port));
    announced(of(*client, [a, b]), of(*destination, [c, d]))
}

/// Checks the lengths of the entries from `start` on, and the checksum if there is one.
fn check_tlvs(header: &[u8], start: usize) -> Result<(), HeaderFault> {
    let mut rest = &header[start..];
    let mut checksum = None;
    while !rest.is_empty() {
        let (kind, value, after) = next_entry(rest).ok_or(HeaderFault::Tlv)?;
        let fits = match kind {
            tlv::AUTHORITY => value.len() <= AUTHORITY_BYTES_MAX,
            tlv::UNIQUE_ID => value.len() <= UNIQUE_ID_BYTES_MAX,
            tlv::CRC32C => checksum.is_none() && value.len() == CRC_BYTES,
            _ => true,
        };
        if !fits {
            return Err(HeaderFault::Tlv);
        }
        if kind == tlv::CRC32C {
            checksum = Some(header.len() - after.len() - CRC_BYTES);
        }
        rest = after;
    }
    match checksum {
        Some(field)
            if header[field..field + CRC_BYTES]
                != checksum::of_header(header, field).to_be_bytes() =>
        {
            Err(HeaderFault::Checksum)
        }
        _ => Ok(()),
    }
}
