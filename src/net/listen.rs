//! Listening sockets: bind, set options, accept, retire.
//!
//! `daemon` binds one socket per worker and bind address (SO_REUSEPORT), and each worker
//! accepts from its sockets. It never decides when to pause or retire a listener.

use super::sockopt;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, acceptfrom_with};
use socket2::{Domain, Protocol, SockAddr, SockFilter, Socket, Type};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Listen queue of sockets that [`bind`] makes. The kernel lowers it to
/// `net.core.somaxconn`.
const BACKLOG: u16 = u16::MAX;

/// Where a socket listens.
#[derive(Debug, Clone, Copy)]
pub struct ListenPlace<'a> {
    /// Its local address.
    pub address: SocketAddr,
    /// The address need not be configured on an interface (ip(7), IP_FREEBIND).
    pub freebind: bool,
    /// The only interface whose packets the socket gets (socket(7), SO_BINDTODEVICE).
    pub interface: Option<&'a str>,
}

/// Checks that no other socket listens on the address. Returns a socket that listens there.
///
/// With SO_REUSEPORT alone, two processes of one user could share the traffic without an
/// error.
pub fn check_unused(place: ListenPlace<'_>) -> io::Result<Socket> {
    let socket = unbound(place)?;
    socket.bind(&SockAddr::from(place.address))?;
    socket.listen(1)?;
    Ok(socket)
}

/// Makes `count` listening sockets that share `address`. The kernel distributes new
/// connections among them by hash.
pub fn bind(address: SocketAddr, count: usize) -> io::Result<Vec<Socket>> {
    // All sockets are bound before the first listens, so that the first does not get all
    // connections.
    let sockets = reserve(address.into(), count)?;
    sockets.iter().try_for_each(|socket| start(socket, BACKLOG))?;
    Ok(sockets)
}

/// Binds `count` sockets that share a place. No client can connect before [`start`].
///
/// # Errors
/// The error of the kernel, or an error without a number if the interface cannot be used.
pub fn reserve(place: ListenPlace<'_>, count: usize) -> io::Result<Vec<Socket>> {
    (0..count)
        .map(|_| {
            let socket = unbound(place)?;
            socket.set_reuse_port(true)?;
            prepare(&socket)?;
            socket.bind(&SockAddr::from(place.address))?;
            Ok(socket)
        })
        .collect()
}

/// Starts listening. On a socket that listens already, changes the length of its queue.
pub fn start(socket: &Socket, backlog: u16) -> io::Result<()> {
    socket.listen(i32::from(backlog))
}

/// Sets the options of a listener that accepted connections inherit, so that no call per
/// connection is needed.
pub fn prepare(socket: &Socket) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    if socket.local_addr()?.is_unix() {
        return Ok(());
    }
    socket.set_tcp_nodelay(true)?;
    // Urgent bytes stay in the stream (tcp(7)).
    socket.set_out_of_band_inline(true)
}

fn unbound(place: ListenPlace<'_>) -> io::Result<Socket> {
    let ListenPlace { address, freebind, interface } = place;
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    match address {
        SocketAddr::V4(_) if freebind => socket.set_freebind_v4(true)?,
        SocketAddr::V6(_) if freebind => socket.set_freebind_v6(true)?,
        _ => {}
    }
    if let Some(interface) = interface {
        socket
            .bind_device(Some(interface.as_bytes()))
            .map_err(|error| interface_error(interface, &error))?;
    }
    Ok(socket)
}

/// Names the interface in the error.
fn interface_error(interface: &str, error: &io::Error) -> io::Error {
    let why = match error.raw_os_error() {
        Some(libc::ENODEV) => format!("there is no interface {interface}"),
        // Kernels before 5.7 allow it only with this capability.
        Some(libc::EPERM) => {
            format!("listening on interface {interface} needs CAP_NET_RAW on this kernel")
        }
        _ => format!("cannot use interface {interface}: {error}"),
    };
    io::Error::new(error.kind(), why)
}

/// Sets the timers that connections inherit if they are accepted after this call.
pub fn tune(
    listener: &Socket,
    keepalive: Option<Duration>,
    user_timeout: Option<Duration>,
) -> io::Result<()> {
    super::stream::set_liveness(listener, keepalive, user_timeout)
}

/// Sets mark and differentiated services code point of the packets to clients. Connections
/// inherit both if they are accepted after this call.
///
/// # Errors
/// CAP_NET_ADMIN is missing for another mark than the present one; see [`try_mark`].
pub fn set_marks(listener: &Socket, mark: u32, dscp: u8) -> io::Result<()> {
    if listener.mark()? != mark {
        listener.set_mark(mark).map_err(|error| mark_error(mark, &error))?;
    }
    // The two lower bits of the field are for congestion notification (RFC 3168).
    let field = u32::from(dscp) << 2;
    match listener.local_addr()?.is_ipv6() {
        false => listener.set_tos_v4(field),
        true => listener.set_tclass_v6(field),
    }
}

/// Checks that [`set_marks`] can change the mark of `listener`. It changes nothing.
///
/// # Errors
/// CAP_NET_ADMIN is missing.
pub fn try_mark(listener: &Socket, mark: u32) -> io::Result<()> {
    if listener.mark()? == mark {
        return Ok(());
    }
    let socket = Socket::new(Domain::IPV4, Type::STREAM.cloexec(), None)?;
    socket.set_mark(mark).map_err(|error| mark_error(mark, &error))
}

fn mark_error(mark: u32, error: &io::Error) -> io::Error {
    let why = match error.raw_os_error() {
        Some(libc::EPERM) => format!("mark {mark} needs the capability CAP_NET_ADMIN"),
        _ => format!("cannot set mark {mark}: {error}"),
    };
    io::Error::new(error.kind(), why)
}

/// The peer of an accepted connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AcceptedPeer {
    /// Of a TCP connection.
    Ip(SocketAddr),
    /// Of a connection to a Unix socket: the user and the process that connected (unix(7),
    /// SO_PEERCRED).
    Local {
        /// Effective user number.
        user: u32,
        /// Process number; 0 if it belongs to another namespace.
        process: u32,
    },
}

/// Accepts one connection. Returns `WouldBlock` if the listen queue is empty. A connection to a
/// Unix socket costs a second system call.
pub fn accept(listener: impl AsFd) -> io::Result<(OwnedFd, AcceptedPeer)> {
    let (socket, peer) = take(listener)?;
    if let AcceptedPeer::Ip(peer) = peer
        && BY_HOP_LIMIT.load(Ordering::SeqCst)
    {
        // The connection inherited the limit if its handshake ended after the listener
        // retired. Setting it to 0 cannot fail for a socket of that family.
        let _ = sockopt::least_hop_limit(socket.as_fd(), peer.is_ipv6(), 0);
    }
    Ok((socket, peer))
}

fn take(listener: impl AsFd) -> io::Result<(OwnedFd, AcceptedPeer)> {
    #[cfg(any(test, feature = "fake"))]
    if let Some(answer) = super::fake::accept(&listener) {
        return answer.map(|(socket, peer)| (socket, AcceptedPeer::Ip(peer)));
    }
    let (socket, peer) = acceptfrom_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC)?;
    let peer = match peer {
        Some(any) if any.address_family() == AddressFamily::UNIX => {
            let (user, process) = sockopt::peer_credentials(socket.as_fd())?;
            AcceptedPeer::Local { user, process }
        }
        peer => peer
            .and_then(|any| SocketAddr::try_from(any).ok())
            .map(AcceptedPeer::Ip)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ECONNABORTED))?,
    };
    Ok((socket, peer))
}

/// Returns whether a connection waits in the listen queue.
pub fn has_queued(listener: impl AsFd) -> bool {
    #[cfg(any(test, feature = "fake"))]
    if let Some(answer) = super::fake::has_queued(&listener) {
        return answer;
    }
    let mut fds = [PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    // On an error no connection can be accepted, so it counts as an empty queue.
    poll(&mut fds, Some(&at_once)).is_ok_and(|ready| ready > 0)
}

/// Stops new handshakes on a listener and keeps connections that are queued or in a
/// handshake.
///
/// A filter on the listener drops SYNs without ACK. The client's kernel retransmits its
/// SYN after a second. By then the address is refused, or another socket listens on it.
///
/// Closing the listener immediately would reset every connection in its queue (195 of
/// 400 in a measurement).
///
/// Kernels of 2026 require CAP_NET_ADMIN for a filter on a TCP socket. Without it,
/// [`retire_by_hop_limit`] has nearly the same effect.
///
/// It has no effect on a Unix socket: the caller removes its file.
///
/// # Errors
/// The error of the kernel. New clients can still connect then.
pub fn retire(listener: &Socket) -> io::Result<()> {
    if listener.local_addr()?.is_unix() {
        return Ok(());
    }
    match drop_bare_syns(listener) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            retire_by_hop_limit(listener)
        }
        done => done,
    }
}

/// True after a listener of this process was retired by its hop limit. Accepted
/// connections must then reset their inherited limit.
static BY_HOP_LIMIT: AtomicBool = AtomicBool::new(false);

/// The largest hop limit of a packet. Nearly all clients start with 64 or 128.
const MOST_HOPS: u8 = 255;

/// Makes the listener drop packets with a hop limit below [`MOST_HOPS`] (ip(7),
/// IP_MINTTL; IPV6_MINHOPCOUNT), which are nearly all SYNs.
///
/// The kernel handles handshakes in progress before it checks the limit, so they finish.
/// The client retransmits what arrives between the end of the handshake and the accept.
fn retire_by_hop_limit(listener: &Socket) -> io::Result<()> {
    let v6 = listener.local_addr()?.is_ipv6();
    // Set first, because a connection can inherit the limit immediately.
    BY_HOP_LIMIT.store(true, Ordering::SeqCst);
    sockopt::least_hop_limit(listener.as_fd(), v6, MOST_HOPS)
}

fn drop_bare_syns(listener: &Socket) -> io::Result<()> {
    /// Offset of the flags in the TCP header (RFC 9293 section 3.1). A filter on a TCP
    /// socket reads from the start of that header.
    const FLAGS_OFFSET: u32 = 13;
    const SYN: u32 = 0x02;
    const ACK: u32 = 0x10;
    const EVERYTHING: u32 = u32::MAX;
    let load = (libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16;
    let and = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
    let jump_if_equal = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    let give = (libc::BPF_RET | libc::BPF_K) as u16;
    listener.attach_filter(&[
        SockFilter::new(load, 0, 0, FLAGS_OFFSET),
        SockFilter::new(and, 0, 0, SYN | ACK),
        SockFilter::new(jump_if_equal, 0, 1, SYN),
        SockFilter::new(give, 0, 0, 0),
        SockFilter::new(give, 0, 0, EVERYTHING),
    ])
}

// === impl ListenPlace ===

impl From<SocketAddr> for ListenPlace<'_> {
    fn from(address: SocketAddr) -> Self {
        ListenPlace { address, freebind: false, interface: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpStream;

    fn any_port() -> (SocketAddr, Socket) {
        let mut sockets = bind("127.0.0.1:0".parse().unwrap(), 1).unwrap();
        let socket = sockets.pop().unwrap();
        (socket.local_addr().unwrap().as_socket().unwrap(), socket)
    }

    #[test]
    fn address_with_a_listener_is_in_use() {
        let (address, socket) = any_port();
        assert_eq!(check_unused(address.into()).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(socket);
        check_unused(address.into()).unwrap();
    }

    #[test]
    fn error_names_an_interface_that_does_not_exist() {
        let address: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let place = ListenPlace { interface: Some("absent0"), ..ListenPlace::from(address) };
        let error = reserve(place, 1).unwrap_err().to_string();
        assert_eq!(error, "there is no interface absent0");
        reserve(ListenPlace { interface: Some("lo"), ..place }, 2).unwrap();
    }

    #[test]
    fn accepted_connections_inherit_the_code_point() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = bind(address.parse().unwrap(), 1).unwrap().remove(0);
            set_marks(&listener, 0, 46).unwrap();
            let address = listener.local_addr().unwrap().as_socket().unwrap();
            let _client = TcpStream::connect(address).unwrap();
            let socket = Socket::from(accept(&listener).unwrap().0);
            let field = match address.is_ipv6() {
                false => socket.tos_v4(),
                true => socket.tclass_v6(),
            };
            assert_eq!(field.unwrap(), 46 << 2);
        }
    }

    #[test]
    fn retired_listener_serves_its_queue_and_accepts_no_new_client() {
        for retire in [drop_bare_syns, retire_by_hop_limit] {
            serves_its_queue_and_accepts_no_new_client(retire);
        }
    }

    fn serves_its_queue_and_accepts_no_new_client(retire: fn(&Socket) -> io::Result<()>) {
        let (address, listener) = any_port();
        let mut queued = TcpStream::connect(address).unwrap();
        match retire(&listener) {
            // The user of this test lacks CAP_NET_ADMIN.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return,
            done => done.unwrap(),
        }

        let late = TcpStream::connect_timeout(&address, Duration::from_millis(300));
        assert_eq!(late.unwrap_err().kind(), io::ErrorKind::TimedOut);

        let (socket, _) = accept(&listener).unwrap();
        drop(listener);
        queued.write_all(b"ping").unwrap();
        let mut server = TcpStream::from(socket);
        server.set_nonblocking(false).unwrap();
        let mut got = [0; 4];
        server.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"ping");
    }
}
