//! UDP sockets that are read in batches, with the time the kernel received each
//! datagram and how many it had to drop.
//!
//! Used by the reception of heartbeats. It never blocks, and knows nothing of
//! what datagrams say.

#![allow(unsafe_code)]

use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};
use std::io;
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Datagrams taken with one system call.
pub const BATCH: usize = 64;

/// Room for one datagram; what is longer is cut to this.
pub const DATAGRAM_BYTES: usize = 512;

/// Asked of the kernel for a socket: some 10,000 small datagrams, a tenth of a
/// second of a flood.
const RECEIVE_BUFFER_BYTES: usize = 8 * 1024 * 1024;

/// `sockaddr_in6`, the longer of the two families.
const NAME_BYTES: usize = size_of::<libc::sockaddr_in6>();

/// A timestamp and a count, each with its header, and some to spare.
const CONTROL_BYTES: usize = 128;

/// Room for a batch of datagrams and what the kernel says of them.
pub struct DatagramBatch {
    slots: Box<[ControlBuffer]>,
    filled: usize,
}

/// One datagram.
#[derive(Debug, Clone, Copy)]
pub struct ReceivedDatagram<'a> {
    /// Its first [`DATAGRAM_BYTES`] at most.
    pub bytes: &'a [u8],
    /// Where it claims to come from.
    pub from: SocketAddr,
    /// When the kernel received it, by the wall clock (socket(7),
    /// SO_TIMESTAMPNS).
    pub received: Option<SystemTime>,
    /// Datagrams this socket had dropped by then because its buffer was full,
    /// since it was made and modulo 2^32 (socket(7), SO_RXQ_OVFL).
    pub dropped: Option<u32>,
}

/// Aligned as control messages must be (cmsg(3)).
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

/// Binds a socket to `address`. `ours` are sockets of this process that may
/// overlap with it (a wildcard and one of its addresses): until they are closed
/// each datagram goes to the more specific one. Nobody else's may.
pub fn bind(address: SocketAddr, ours: &[BorrowedFd<'_>]) -> io::Result<OwnedFd> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::DGRAM.nonblocking().cloexec(),
        Some(Protocol::UDP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    // Only the kernel's own limit may be asked for without CAP_NET_ADMIN.
    if super::sockopt::force_receive_buffer(socket.as_fd(), RECEIVE_BUFFER_BYTES).is_err() {
        socket.set_recv_buffer_size(RECEIVE_BUFFER_BYTES)?;
    }
    super::sockopt::enable_timestamps(socket.as_fd())?;
    super::sockopt::enable_drop_counter(socket.as_fd())?;
    let to = SockAddr::from(address);
    match socket.bind(&to) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && !ours.is_empty() => {
            bind_beside(&socket, &to, ours)?;
        }
        result => result?,
    }
    Ok(socket.into())
}

/// SO_REUSEADDR counts while bind(2) looks for conflicts and only if both have
/// it; it does not stay, or anybody could bind beside us.
fn bind_beside(socket: &Socket, to: &SockAddr, ours: &[BorrowedFd<'_>]) -> io::Result<()> {
    let set = |on| ours.iter().try_for_each(|one| SockRef::from(one).set_reuse_address(on));
    socket.set_reuse_address(true)?;
    let result = set(true).and_then(|()| socket.bind(to));
    let _ = set(false);
    result?;
    socket.set_reuse_address(false)
}

/// Where a socket is bound.
pub fn local_address(socket: impl AsFd) -> io::Result<SocketAddr> {
    let address = SockRef::from(&socket).local_addr()?;
    address.as_socket().ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))
}

/// Bytes of buffer the kernel gave a socket, its own overhead included.
pub fn receive_buffer(socket: impl AsFd) -> io::Result<usize> {
    SockRef::from(&socket).recv_buffer_size()
}

// === impl DatagramBatch ===

impl DatagramBatch {
    /// Empty.
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

    /// Takes the datagrams that have arrived, at most [`BATCH`], instead of
    /// those taken before; `WouldBlock` if there are none.
    pub fn receive(&mut self, socket: impl AsFd) -> io::Result<usize> {
        self.filled = 0;
        let (parts, mut headers) = self.headers();
        // SAFETY: each header points to a name, a control buffer and one iovec,
        // each with its true length; the iovecs in `parts` and the slots they
        // point into outlive the call, and nothing else uses them during it.
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
            // Its type differs between C libraries.
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
            // SAFETY: integers and pointers, for all of which zero is a value.
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

    /// The datagrams taken last, in order of arrival.
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
    /// `None` only if the kernel names no source.
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

/// `sockaddr_in` or `sockaddr_in6` (ip(7), ipv6(7)).
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

/// Takes one control message off the front: level, kind, data (cmsg(3)).
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

/// A `timespec` since 1970.
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
    fn a_batch_tells_bytes_source_and_time_of_each_datagram() {
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
    fn a_long_datagram_is_cut_and_the_next_is_whole() {
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
    fn what_the_kernel_drops_is_told_with_the_next_datagram() {
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
        let beside = bind(narrow, &[wide.as_fd()]).unwrap();
        drop(wide);
        UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"x", narrow).unwrap();
        assert_eq!(DatagramBatch::new().receive(&beside).unwrap(), 1);
        assert!(UdpSocket::bind(narrow).is_err());
    }
}
