//! Counts TCP connections by their local port (sock_diag(7)).
//!
//! Used by the heartbeat sender to count the connections of a service. The kernel filters
//! by port and answers in binary, while `/proc/net/tcp` lists all connections of the host
//! as text. It never changes a socket.

use rustix::net::netlink::{SOCK_DIAG, SocketAddrNetlink};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with,
};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

/// Largest part of a dump that the kernel sends.
const PIECE_BYTES: usize = 32 * 1024;

/// Bounds the wait for an answer. The kernel normally answers immediately.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// Sizes of `nlmsghdr` and `inet_diag_req_v2` (linux/netlink.h, linux/inet_diag.h).
const HEADER_BYTES: usize = 16;
const REQUEST_BYTES: usize = HEADER_BYTES + 56;

/// Offsets in a message of the answer. After the header follows `inet_diag_msg`, with
/// `inet_diag_sockid` at offset 4: both ports, then the local address.
const PORT_AT: usize = HEADER_BYTES + 4;
const ADDRESS_AT: usize = PORT_AT + 4;

/// From linux/netlink.h and linux/sock_diag.h.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST_DUMP: u16 = 0x301;

/// Returns the number of established connections with the local address `local` in this
/// network namespace.
///
/// For an IPv4 address it includes connections that an IPv6 socket accepted over IPv4.
///
/// # Errors
/// The kernel has no sock_diag, or this process may not use it.
pub fn established(local: SocketAddr) -> io::Result<u32> {
    let wanted = SocketAddr::new(local.ip().to_canonical(), local.port());
    let inet6 = count(libc::AF_INET6, wanted);
    if wanted.is_ipv6() {
        return inet6;
    }
    let inet = count(libc::AF_INET, wanted)?;
    // Without IPv6 in the kernel, the second count fails.
    Ok(inet.saturating_add(inet6.unwrap_or(0)))
}

fn count(family: i32, wanted: SocketAddr) -> io::Result<u32> {
    let socket = ask(family, wanted.port())?;
    let mut sum = 0_u32;
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let (_, length) = match recv(&socket, &mut piece[..], RecvFlags::empty()) {
            Err(rustix::io::Errno::INTR) => continue,
            received => received?,
        };
        let mut rest = piece.get(..length).unwrap_or(&piece);
        if rest.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        while let Some((message, after)) = first_message(rest) {
            match kind(message) {
                NLMSG_DONE => return Ok(sum),
                NLMSG_ERROR => return Err(error(message)),
                _ => sum += u32::from(local_address(message) == Some(wanted)),
            }
            rest = after;
        }
    }
}

fn ask(family: i32, port: u16) -> io::Result<OwnedFd> {
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        Some(SOCK_DIAG),
    )?;
    set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_TIMEOUT))?;
    let kernel = SocketAddrNetlink::new(0, 0);
    sendto(&socket, &request(family, port), SendFlags::empty(), &kernel)?;
    Ok(socket)
}

/// Encodes a request for established TCP connections of a family and local port. The
/// kernel filters by port (`inet_diag_dump_icsk`).
fn request(family: i32, port: u16) -> [u8; REQUEST_BYTES] {
    const ESTABLISHED: u32 = 1 << 1;
    let mut bytes = [0; REQUEST_BYTES];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, &(REQUEST_BYTES as u32).to_ne_bytes());
    put(4, &SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    put(6, &NLM_F_REQUEST_DUMP.to_ne_bytes());
    put(HEADER_BYTES, &[family as u8, libc::IPPROTO_TCP as u8]);
    put(HEADER_BYTES + 4, &ESTABLISHED.to_ne_bytes());
    put(HEADER_BYTES + 8, &port.to_be_bytes());
    // INET_DIAG_NOCOOKIE
    put(REQUEST_BYTES - 8, &[0xff; 8]);
    bytes
}

/// Returns the first message and the bytes after it. `None`: the end, or a malformed
/// message.
fn first_message(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let message = bytes.get(..length).filter(|message| message.len() >= HEADER_BYTES)?;
    let aligned = length.next_multiple_of(4).min(bytes.len());
    Some((message, &bytes[aligned..]))
}

fn kind(message: &[u8]) -> u16 {
    u16::from_ne_bytes([message[4], message[5]])
}

/// Returns the error of a `nlmsgerr`, which holds a negative errno.
fn error(message: &[u8]) -> io::Error {
    match message.get(HEADER_BYTES..).and_then(<[u8]>::first_chunk) {
        Some(errno) => io::Error::from_raw_os_error(-i32::from_ne_bytes(*errno)),
        None => io::ErrorKind::InvalidData.into(),
    }
}

fn local_address(message: &[u8]) -> Option<SocketAddr> {
    let family = i32::from(*message.get(HEADER_BYTES)?);
    let port = u16::from_be_bytes(*message.get(PORT_AT..)?.first_chunk()?);
    let address = message.get(ADDRESS_AT..)?;
    let ip = match family {
        libc::AF_INET => IpAddr::V4(Ipv4Addr::from(*address.first_chunk::<4>()?)),
        libc::AF_INET6 => IpAddr::V6(Ipv6Addr::from(*address.first_chunk::<16>()?)).to_canonical(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn only_connections_of_the_port_and_address_are_counted() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        assert_eq!(established(address).unwrap(), 0);
        // More connections than one part of the answer holds.
        let pair = |_| (TcpStream::connect(address).unwrap(), listener.accept().unwrap());
        let clients: Vec<_> = (0..400).map(pair).collect();
        assert_eq!(established(address).unwrap(), 400);
        let elsewhere = SocketAddr::new([127, 0, 0, 2].into(), address.port());
        assert_eq!(established(elsewhere).unwrap(), 0);
        let mapped = SocketAddr::new(Ipv4Addr::LOCALHOST.to_ipv6_mapped().into(), address.port());
        assert_eq!(established(mapped).unwrap(), 400);
        drop(clients);
    }

    #[test]
    fn malformed_messages_end_the_reading() {
        assert!(first_message(&[]).is_none());
        assert!(first_message(&[0; 64]).is_none());
        assert!(first_message(&[0xff; 64]).is_none());
        let mut short = [0; 20];
        short[0] = 20;
        let (message, rest) = first_message(&short).unwrap();
        assert_eq!((local_address(message), rest.len()), (None, 0));
    }
}
