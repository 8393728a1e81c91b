//! UDP sockets that are read in batches. Each datagram comes with the time at which the
//! kernel received it and with the number of dropped datagrams.
//!
//! Used by the heartbeat receiver. It never blocks and never interprets datagrams.

#![allow(unsafe_code)]

use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};
use std::io;
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Most datagrams that one system call receives.
pub const BATCH: usize = 64;

/// Size of the buffer of a datagram. Longer datagrams are cut.
pub const DATAGRAM_BYTES: usize = 512;

/// Requested receive buffer of a socket. It holds about 10,000 small datagrams, which is
/// 100 ms of a flood.
const RECEIVE_BUFFER_BYTES: usize = 8 * 1024 * 1024;

/// Size of `sockaddr_in6`, the longer address of the two families.
const NAME_BYTES: usize = size_of::<libc::sockaddr_in6>();

/// Enough for a timestamp and a counter with their headers.
const CONTROL_BYTES: usize = 128;

/// Buffers for a batch of datagrams and their control messages.
pub struct DatagramBatch {
    slots: Box<[ControlBuffer]>,
    filled: usize,
}

/// A datagram.
#[derive(Debug, Clone, Copy)]
pub struct ReceivedDatagram<'a> {
    /// Its payload, at most [`DATAGRAM_BYTES`].
    pub bytes: &'a [u8],
    /// Its source address, which can be forged.
    pub from: SocketAddr,
    /// Wall-clock time at which the kernel received it (socket(7), SO_TIMESTAMPNS).
    pub received: Option<SystemTime>,
    /// Datagrams that the socket dropped before it because the buffer was full, since
    /// the socket was made, modulo 2^32 (socket(7), SO_RXQ_OVFL).
    pub dropped: Option<u32>,
}

/// Buffers of a datagram, aligned for control messages (cmsg(3)).
#[repr(C, align(8))]
#[derive(Clone)]
struct ControlBuffer {
    control: [u8; CONTROL_BYTES],
    bytes: [u8; DATAGRAM_BYTES],
    name: [u8; NAME_BYTES],
    length: usize,
    name_length: usize,
    control_length: usize,
}

/// Binds a socket to `address`.
///
/// Only the sockets in `overlapping`, all of this process, may overlap with `address` (a
/// wildcard and one of its addresses). While both are open, each datagram goes to the
/// more specific socket.
pub fn bind(address: SocketAddr, overlapping: &[BorrowedFd<'_>]) -> io::Result<OwnedFd> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::DGRAM.nonblocking().cloexec(),
        Some(Protocol::UDP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    // Without CAP_NET_ADMIN the kernel's limit (net.core.rmem_max) applies.
    if super::sockopt::force_receive_buffer(socket.as_fd(), RECEIVE_BUFFER_BYTES).is_err() {
        socket.set_recv_buffer_size(RECEIVE_BUFFER_BYTES)?;
    }
    super::sockopt::enable_timestamps(socket.as_fd())?;
    super::sockopt::enable_drop_counter(socket.as_fd())?;
    let to = SockAddr::from(address);
    match socket.bind(&to) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && !overlapping.is_empty() => {
            bind_overlapping(&socket, &to, overlapping)?;
        }
        result => result?,
    }
    Ok(socket.into())
}

/// Binds a socket next to sockets of this process, with SO_REUSEADDR on all of them.
///
/// The option matters only during bind(2). It is removed afterwards, because any process
/// could otherwise bind the same address.
fn bind_overlapping(socket: &Socket, to: &SockAddr, others: &[BorrowedFd<'_>]) -> io::Result<()> {
    let set = |on| others.iter().try_for_each(|other| SockRef::from(other).set_reuse_address(on));
    socket.set_reuse_address(true)?;
    let result = set(true).and_then(|()| socket.bind(to));
    let _ = set(false);
    result?;
    socket.set_reuse_address(false)
}

/// Returns the address that a socket is bound to.
pub fn local_address(socket: impl AsFd) -> io::Result<SocketAddr> {
    let address = SockRef::from(&socket).local_addr()?;
    address.as_socket().ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))
}

/// Returns the size of the receive buffer in bytes, including the overhead of the kernel.
pub fn receive_buffer(socket: impl AsFd) -> io::Result<usize> {
    SockRef::from(&socket).recv_buffer_size()
}

// === impl DatagramBatch ===

impl DatagramBatch {
    /// Makes an empty batch.
    pub fn new() -> DatagramBatch {
        let empty = ControlBuffer {
            control: [0; CONTROL_BYTES],
            bytes: [0; DATAGRAM_BYTES],
            name: [0; NAME_BYTES],
            length: 0,
            name_length: 0,
            control_length: 0,
        };
        DatagramBatch { slots: vec![empty; BATCH].into(), filled: 0 }
    }

    /// Receives at most [`BATCH`] datagrams, which replace the previous ones. Returns
    /// `WouldBlock` if the receive buffer is empty.
    pub fn receive(&mut self, socket: impl AsFd) -> io::Result<usize> {
        self.filled = 0;
        let (parts, mut headers) = self.headers();
        // SAFETY: each header points to a name, a control buffer and one iovec, each with
        // its correct length. The iovecs in `parts` and the slots that they point into
        // outlive the call, and no other code uses them during the call.
        let received = unsafe {
            libc::recvmmsg(
                socket.as_fd().as_raw_fd(),
                headers.as_mut_ptr(),
                BATCH as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        drop(parts);
        let filled = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
        for (slot, header) in self.slots.iter_mut().zip(&headers[..filled]) {
            slot.length = (header.msg_len as usize).min(DATAGRAM_BYTES);
            slot.name_length = (header.msg_hdr.msg_namelen as usize).min(NAME_BYTES);
            // The type of the field differs between C libraries.
            #[allow(clippy::unnecessary_cast)]
            let control_length = header.msg_hdr.msg_controllen as usize;
            slot.control_length = control_length.min(CONTROL_BYTES);
        }
        self.filled = filled;
        Ok(filled)
    }

    fn headers(&mut self) -> (Vec<libc::iovec>, Vec<libc::mmsghdr>) {
        let mut parts: Vec<libc::iovec> = self
            .slots
            .iter_mut()
            .map(|slot| libc::iovec {
                iov_base: slot.bytes.as_mut_ptr().cast(),
                iov_len: DATAGRAM_BYTES,
            })
            .collect();
        let headers = self.slots.iter_mut().zip(&mut parts).map(|(slot, part)| {
            // SAFETY: the struct consists of integers and raw pointers, for which zero is
            // valid.
            let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
            header.msg_hdr.msg_name = slot.name.as_mut_ptr().cast();
            header.msg_hdr.msg_namelen = NAME_BYTES as _;
            header.msg_hdr.msg_iov = part;
            header.msg_hdr.msg_iovlen = 1;
            header.msg_hdr.msg_control = slot.control.as_mut_ptr().cast();
            header.msg_hdr.msg_controllen = CONTROL_BYTES as _;
            header
        });
        let headers = headers.collect();
        (parts, headers)
    }

    /// Returns the datagrams of the last call of [`DatagramBatch::receive`], in order of
    /// arrival.
    pub fn messages(&self) -> impl Iterator<Item = ReceivedDatagram<'_>> {
        self.slots[..self.filled].iter().filter_map(ControlBuffer::message)
    }
}

impl Default for DatagramBatch {
    fn default() -> Self {
        DatagramBatch::new()
    }
}

impl std::fmt::Debug for DatagramBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Batch({} datagrams)", self.filled)
    }
}

// === impl ControlBuffer ===

impl ControlBuffer {
    /// Returns the datagram. `None`: the kernel gave no valid source address.
    fn message(&self) -> Option<ReceivedDatagram<'_>> {
        let from = source(&self.name[..self.name_length])?;
        let bytes = &self.bytes[..self.length];
        let mut message = ReceivedDatagram { bytes, from, received: None, dropped: None };
        let mut rest = &self.control[..self.control_length];
        while let Some((level, kind, data)) = control_message(&mut rest) {
            if level != libc::SOL_SOCKET {
                continue;
            }
            match kind {
                libc::SCM_TIMESTAMPNS => message.received = timestamp(data),
                libc::SO_RXQ_OVFL => {
                    message.dropped = data.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes));
                }
                _ => {}
            }
        }
        Some(message)
    }
}

/// Parses a `sockaddr_in` or `sockaddr_in6` (ip(7), ipv6(7)).
fn source(name: &[u8]) -> Option<SocketAddr> {
    let at = |from: usize| name.get(from..);
    let family = libc::c_int::from(u16::from_ne_bytes(*name.first_chunk()?));
    let port = u16::from_be_bytes(*at(2)?.first_chunk()?);
    match family {
        libc::AF_INET => {
            let ip = *at(4)?.first_chunk::<4>()?;
            Some(SocketAddrV4::new(ip.into(), port).into())
        }
        libc::AF_INET6 => {
            let ip = *at(8)?.first_chunk::<16>()?;
            let scope = u32::from_ne_bytes(*at(24)?.first_chunk()?);
            Some(SocketAddrV6::new(ip.into(), port, 0, scope).into())
        }
        _ => None,
    }
}

/// Removes the first control message and returns its level, kind and data (cmsg(3)).
fn control_message<'a>(rest: &mut &'a [u8]) -> Option<(libc::c_int, libc::c_int, &'a [u8])> {
    const INT: usize = size_of::<libc::c_int>();
    let aligned = |length: usize| length.next_multiple_of(size_of::<usize>());
    let header = aligned(size_of::<libc::cmsghdr>());
    let whole = rest.get(..header)?;
    let length = usize::from_ne_bytes(*whole.first_chunk()?);
    let kinds = size_of::<libc::cmsghdr>() - 2 * INT;
    let level = libc::c_int::from_ne_bytes(*whole[kinds..].first_chunk()?);
    let kind = libc::c_int::from_ne_bytes(*whole[kinds + INT..].first_chunk()?);
    let data = rest.get(header..length)?;
    *rest = rest.get(aligned(length)..).unwrap_or_default();
    Some((level, kind, data))
}

/// Parses a `timespec` since 1970.
fn timestamp(data: &[u8]) -> Option<SystemTime> {
    const LONG: usize = size_of::<libc::c_long>();
    let seconds = libc::c_long::from_ne_bytes(*data.first_chunk()?);
    let nanos = libc::c_long::from_ne_bytes(*data.get(LONG..)?.first_chunk()?);
    let since = Duration::new(u64::try_from(seconds).ok()?, u32::try_from(nanos).ok()?);
    UNIX_EPOCH.checked_add(since)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    fn bound(address: &str) -> (OwnedFd, SocketAddr) {
        let socket = bind(address.parse().unwrap(), &[]).unwrap();
        let address = local_address(&socket).unwrap();
        (socket, address)
    }

    #[test]
    fn batch_has_payload_source_and_time_of_each_datagram() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let (socket, to) = bound(address);
            let sender = UdpSocket::bind(address).unwrap();
            for text in ["a", "bb", ""] {
                sender.send_to(text.as_bytes(), to).unwrap();
            }
            let mut batch = DatagramBatch::new();
            assert_eq!(batch.receive(&socket).unwrap(), 3);
            let texts: Vec<&[u8]> = batch.messages().map(|message| message.bytes).collect();
            assert_eq!(texts, [&b"a"[..], b"bb", b""]);
            for message in batch.messages() {
                assert_eq!(message.from, sender.local_addr().unwrap());
                let age = crate::clock::wall().duration_since(message.received.unwrap()).unwrap();
                assert!(age < Duration::from_secs(60), "{age:?}");
            }
            assert_eq!(batch.receive(&socket).unwrap_err().kind(), io::ErrorKind::WouldBlock);
            assert_eq!(batch.messages().count(), 0);
        }
    }

    #[test]
    fn long_datagram_is_cut_and_the_next_is_complete() {
        let (socket, to) = bound("127.0.0.1:0");
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        sender.send_to(&[1; 60_000], to).unwrap();
        sender.send_to(&[2; 7], to).unwrap();
        let mut batch = DatagramBatch::new();
        batch.receive(&socket).unwrap();
        let lengths: Vec<usize> = batch.messages().map(|message| message.bytes.len()).collect();
        assert_eq!(lengths, [DATAGRAM_BYTES, 7]);
    }

    #[test]
    fn next_datagram_has_the_count_of_dropped_datagrams() {
        let (socket, to) = bound("127.0.0.1:0");
        SockRef::from(&socket).set_recv_buffer_size(1).unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        for _ in 0..200 {
            sender.send_to(b"x", to).unwrap();
        }
        let mut batch = DatagramBatch::new();
        let kept = batch.receive(&socket).unwrap();
        sender.send_to(b"after", to).unwrap();
        batch.receive(&socket).unwrap();
        let after = batch.messages().last().unwrap();
        assert_eq!(after.dropped, Some(200 - kept as u32));
    }

    #[test]
    fn overlapping_address_is_bound_only_next_to_a_socket_of_this_process() {
        let (wide, address) = bound("0.0.0.0:0");
        let narrow = SocketAddr::new("127.0.0.1".parse().unwrap(), address.port());
        assert_eq!(bind(narrow, &[]).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        let second = bind(narrow, &[wide.as_fd()]).unwrap();
        drop(wide);
        UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"x", narrow).unwrap();
        assert_eq!(DatagramBatch::new().receive(&second).unwrap(), 1);
        assert!(UdpSocket::bind(narrow).is_err());
    }
}
