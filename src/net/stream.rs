//! Connected stream sockets: connect, receive, send, shut down, reset. All
//! non-blocking.
//!
//! Used by the workers. Every call is one system call unless its name says
//! otherwise; errors come back as they are, for `errno` to judge.

#[cfg(any(test, feature = "fake"))]
use super::fake;
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, TcpKeepalive, Type};
use std::borrow::Cow;
use std::ffi::OsString;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Whom to connect to.
#[derive(Debug, Clone, Copy)]
pub enum ConnectTarget<'a> {
    /// IPv4 or IPv6.
    Tcp(SocketAddr),
    /// A Unix stream socket.
    Unix(&'a Path),
}

/// How far connect(2) got at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Connecting {
    /// Established.
    Done,
    /// Under way: becomes writable when it is decided.
    Pending,
}

/// Between keepalive probes once the idle time is over, where that is not
/// shorter itself.
const KEEPALIVE_INTERVAL_MAX: Duration = Duration::from_secs(15);

/// Unanswered keepalive probes that end a connection.
const KEEPALIVE_PROBES: u32 = 4;

/// What the kernel may queue for a peer on this host, to be sent and to be
/// received; it counts double, with its own bookkeeping (socket(7), SO_SNDBUF). The
/// first is as much as any process may ask for where `net.core.wmem_max` is as
/// usual. Less than 208 KiB of the second measured worse than no bound.
const NEAR_SEND_QUEUE: usize = 208 * 1024;
const NEAR_RECEIVE_QUEUE: usize = 256 * 1024;

/// The name of a Unix socket as the kernel takes it: a leading `@` stands for the
/// NUL byte of an abstract socket (unix(7)).
pub fn unix_name(path: &Path) -> Cow<'_, Path> {
    match path.as_os_str().as_bytes().strip_prefix(b"@") {
        Some(name) => {
            let name = [b"\0", name].concat();
            Cow::Owned(PathBuf::from(OsString::from_vec(name)))
        }
        None => Cow::Borrowed(path),
    }
}

/// Starts connecting to `peer` on a new socket.
pub fn connect(peer: ConnectTarget<'_>) -> io::Result<(OwnedFd, Connecting)> {
    connect_from(None, peer)
}

/// Starts connecting to `peer` on a new socket, from the address `source` if one
/// is given; see [`start_at`]. It is for TCP peers of its own family.
pub fn connect_from(
    source: Option<IpAddr>,
    peer: ConnectTarget<'_>,
) -> io::Result<(OwnedFd, Connecting)> {
    let (domain, protocol, peer) = match peer {
        ConnectTarget::Tcp(tcp) => {
            (Domain::for_address(tcp), Some(Protocol::TCP), SockAddr::from(tcp))
        }
        ConnectTarget::Unix(path) => (Domain::UNIX, None, SockAddr::unix(unix_name(path))?),
    };
    #[cfg(any(test, feature = "fake"))]
    if let Some(socket) = peer.as_socket().and_then(fake::socket) {
        return connect_faked(socket?);
    }
    let socket = Socket::new(domain, Type::STREAM.nonblocking().cloexec(), protocol)?;
    if protocol.is_some() {
        socket.set_tcp_nodelay(true)?;
        // Before the first byte can come. What is accepted has it from its listener.
        keep_urgent_inline(&socket);
    }
    if let Some(source) = source {
        start_at(&socket, source)?;
    }
    let how_far = match socket.connect(&peer) {
        Ok(()) => Connecting::Done,
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Connecting::Pending,
        // connect(2): a Unix socket whose backlog is full says EAGAIN and is
        // not connecting; the backend is not keeping up, as when TCP times out.
        // Of TCP it is this kernel that is short of entries for the route.
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
            let says = if protocol.is_some() { libc::ENOBUFS } else { libc::ECONNREFUSED };
            return Err(io::Error::from_raw_os_error(says));
        }
        Err(error) => return Err(error),
    };
    Ok((socket.into(), how_far))
}

/// Whether connections can start at `source` now: it is an address of this host.
pub fn try_source(source: IpAddr) -> io::Result<()> {
    let domain = if source.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(domain, kind, Some(Protocol::TCP))?;
    start_at(&socket, source)
}

/// Has the TCP socket, not connected yet, connect from that address and whatever
/// port makes the connection unique: the kernel picks it when it knows both ends
/// (ip(7), IP_BIND_ADDRESS_NO_PORT).
pub fn start_at(socket: impl AsFd, source: IpAddr) -> io::Result<()> {
    super::sockopt::pick_port_at_connect(socket.as_fd())?;
    SockRef::from(&socket).bind(&SockAddr::from(SocketAddr::new(source, 0)))
}

#[cfg(any(test, feature = "fake"))]
fn connect_faked(socket: OwnedFd) -> io::Result<(OwnedFd, Connecting)> {
    match fake::connect(&socket) {
        Some(Err(error)) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok((socket, Connecting::Pending)),
    }
}

/// As [`connect_from`], and looks again at once where the peer is on this host: the
/// handshake with it is over, one way or the other, by the time connect(2)
/// returns, although that says "in progress".
pub fn connect_checking_result(
    source: Option<IpAddr>,
    peer: ConnectTarget<'_>,
) -> io::Result<(OwnedFd, Connecting)> {
    let (socket, how_far) = connect_from(source, peer)?;
    let ConnectTarget::Tcp(address) = peer else { return Ok((socket, how_far)) };
    if how_far == Connecting::Done || !address.ip().is_loopback() {
        return Ok((socket, how_far));
    }
    #[cfg(any(test, feature = "fake"))]
    if let Some(answer) = fake::connect(&socket) {
        return match answer {
            Ok(()) => Ok((socket, Connecting::Done)),
            Err(error) if error.raw_os_error() == Some(libc::EALREADY) => {
                Ok((socket, Connecting::Pending))
            }
            Err(error) => Err(error),
        };
    }
    // connect(2) on a connecting socket tells how that went.
    match rustix::net::connect(&socket, &address) {
        Ok(()) | Err(rustix::io::Errno::ISCONN) => Ok((socket, Connecting::Done)),
        Err(rustix::io::Errno::ALREADY) => Ok((socket, Connecting::Pending)),
        Err(error) => Err(error.into()),
    }
}

/// How a connect that was pending ended, once the socket has become writable.
pub fn connect_result(socket: impl AsFd) -> io::Result<()> {
    #[cfg(any(test, feature = "fake"))]
    if let Some(answer) = fake::take_error(&socket) {
        return answer;
    }
    match SockRef::from(&socket).take_error()? {
        None => Ok(()),
        Some(error) => Err(error),
    }
}

/// Receives what there is into `buffer`; `Ok(0)` is the peer's FIN.
#[inline]
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    #[cfg(any(test, feature = "fake"))]
    if let Some(answer) = fake::receive(&socket, buffer) {
        return answer;
    }
    let (received, _) = rustix::net::recv(socket, buffer, RecvFlags::DONTWAIT)?;
    Ok(received)
}

/// Looks at what there is, as far as it goes into `buffer`, and leaves it to be
/// received; `Ok(0)` is the peer's FIN.
pub fn peek(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    #[cfg(any(test, feature = "fake"))]
    if let Some(answer) = fake::peek(&socket, buffer) {
        return answer;
    }
    let (there, _) = rustix::net::recv(socket, buffer, RecvFlags::DONTWAIT | RecvFlags::PEEK)?;
    Ok(there)
}

/// Has the socket tell of bytes to receive only once so many wait (or its peer has ended).
pub fn set_low_water(socket: impl AsFd, bytes: u32) -> io::Result<()> {
    super::sockopt::receive_low_water(socket.as_fd(), bytes)
}

/// Takes what there is, at most `buffer`'s length, and throws it away: on a TCP
/// socket nothing is copied (tcp(7), MSG_TRUNC). `Ok(0)` is the peer's FIN.
#[inline]
pub fn discard(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    let (_, taken) = rustix::net::recv(socket, buffer, RecvFlags::DONTWAIT | RecvFlags::TRUNC)?;
    Ok(taken)
}

/// Sends as much of `bytes` as there is room for.
#[inline]
pub fn send(socket: impl AsFd, bytes: &[u8]) -> io::Result<usize> {
    #[cfg(any(test, feature = "fake"))]
    if let Some(answer) = fake::send(&socket, bytes) {
        return answer;
    }
    Ok(rustix::net::send(socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?)
}

/// Sends FIN behind whatever is queued (RFC 9293 section 3.6: half-close).
pub fn shutdown_write(socket: impl AsFd) -> io::Result<()> {
    #[cfg(any(test, feature = "fake"))]
    if let Some(answer) = fake::shutdown_write(&socket) {
        return answer;
    }
    rustix::net::shutdown(socket, Shutdown::Write)?;
    Ok(())
}

/// Closes with RST: queued data is thrown away and the peer learns that the
/// connection was cut (socket(7), SO_LINGER with a time of zero). On a Unix
/// socket it is a plain close, which has the same effect there.
pub fn reset(socket: OwnedFd) {
    #[cfg(any(test, feature = "fake"))]
    if fake::reset_on_close(&socket).is_some() {
        return;
    }
    // A failure here can only turn the RST into a FIN.
    let _ = SockRef::from(&socket).set_linger(Some(Duration::ZERO));
    drop(socket);
}

/// Keeps what is queued between this process and peers on this very host short
/// enough to stay in the caches, before much is moved from one socket to the other.
///
/// On its way to another host a stream needs queues as long as the way, which the
/// kernel finds out. On this one nothing is on its way: what is queued only waits
/// for somebody's turn on a CPU, and where that is megabytes each byte goes out to
/// memory and comes back. A no-op for other peers, and where the kernel refuses. A
/// receive queue that has grown longer stays: what its sender was promised room
/// for would be dropped.
pub fn shorten_near_queues(from: impl AsFd, to: impl AsFd) {
    let (from, to) = (SockRef::from(&from), SockRef::from(&to));
    if is_near(&to) {
        let _ = to.set_send_buffer_size(NEAR_SEND_QUEUE);
    }
    if is_near(&from) && from.recv_buffer_size().is_ok_and(|bytes| bytes < 2 * NEAR_RECEIVE_QUEUE) {
        let _ = from.set_recv_buffer_size(NEAR_RECEIVE_QUEUE);
    }
}

/// Whether the peer is on this host.
fn is_near(socket: &Socket) -> bool {
    let ip = |address: io::Result<SockAddr>| Some(address.ok()?.as_socket()?.ip().to_canonical());
    ip(socket.peer_addr())
        .is_some_and(|peer| peer.is_loopback() || ip(socket.local_addr()) == Some(peer))
}

/// Makes the last close of `socket` a reset, as [`reset`] does at once.
pub fn reset_on_close(socket: impl AsFd) {
    #[cfg(any(test, feature = "fake"))]
    if fake::reset_on_close(&socket).is_some() {
        return;
    }
    let _ = SockRef::from(&socket).set_linger(Some(Duration::ZERO));
}

/// Tears the connection down without closing the descriptor: the peer gets RST
/// (connect(2), AF_UNSPEC), and whoever waits on the socket is woken.
pub fn abort(socket: impl AsFd) {
    #[cfg(any(test, feature = "fake"))]
    if fake::tear_down(&socket).is_some() {
        return;
    }
    // Neither can fail in a way that leaves anyone waiting.
    let _ = rustix::net::connect_unspec(&socket);
    let _ = rustix::net::shutdown(&socket, Shutdown::Both);
}

/// How far a socket is with what it was given to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delivery {
    /// Bytes that the peer's kernel has not acknowledged (tcp(7), SIOCOUTQ), a FIN
    /// as one of them. On a Unix socket: memory of what the peer has not read.
    pub waiting: u64,
    /// How long ago the last of it got further; `None` where that cannot be told, as
    /// on a Unix socket. A little longer than it is: the kernel counts in its ticks.
    pub quiet: Option<Duration>,
    /// The peer's kernel has no room for what waits, and answers when it is asked.
    pub blocked: bool,
    /// The connection is no more.
    pub dead: bool,
}

/// What the kernel's clock ticks may take away from a time it tells.
const KERNEL_TICK_MAX: Duration = Duration::from_millis(10);

/// Two system calls.
///
/// The kernel sends data when its peer has made room for it by taking some, and only
/// then: probes of a closed window and of an idle connection carry none. So the time
/// of the last data sent is when the peer was last seen taking any, unless it was
/// sent once more for want of an answer; then it is that of the last answer.
pub fn delivery(socket: impl AsFd) -> Delivery {
    /// `TCP_CLOSE` of `net/tcp_states.h`.
    const CLOSE: u8 = 7;
    #[cfg(any(test, feature = "fake"))]
    if let Some(answer) = fake::delivery(&socket) {
        return answer;
    }
    let waiting = super::ioctl::out_queue(socket.as_fd());
    let Some(info) = super::sockopt::tcp_info(socket.as_fd()) else {
        return Delivery { waiting, quiet: None, blocked: false, dead: false };
    };
    let millis = match info.tcpi_retransmits {
        0 => info.tcpi_last_data_sent,
        _ => info.tcpi_last_ack_recv,
    };
    let quiet = Some(Duration::from_millis(millis.into()) + KERNEL_TICK_MAX);
    let dead = info.tcpi_state == CLOSE;
    // One probe may be on its way.
    let answers = info.tcpi_retransmits == 0 && info.tcpi_probes <= 1;
    Delivery { waiting, quiet, blocked: waiting > 0 && answers && !dead, dead }
}

/// Bytes that wait at the socket to be received; 0 where that cannot be told.
pub fn unread(socket: impl AsFd) -> u64 {
    #[cfg(any(test, feature = "fake"))]
    if let Some(answer) = fake::unread(&socket) {
        return answer;
    }
    super::ioctl::in_queue(socket.as_fd())
}

/// Bytes sent but not yet acknowledged by the peer's kernel (tcp(7), SIOCOUTQ);
/// 0 where that cannot be told.
pub fn unacknowledged(socket: impl AsFd) -> u64 {
    super::ioctl::out_queue(socket.as_fd())
}

/// The errno of a TCP connection that is dead though we have not ended it and
/// its error is not to be had any more: the kernel tells it once, and may have
/// told it to a send that it then reported as a short one. A peer's FIN alone
/// leaves a connection in CLOSE_WAIT, not in CLOSE (RFC 9293 section 3.3.2).
/// `None` where the connection stands or is none of TCP's.
pub fn close_error(socket: impl AsFd) -> Option<i32> {
    /// `TCP_CLOSE` of `net/tcp_states.h`.
    const CLOSE: u8 = 7;
    let info = super::sockopt::tcp_info(socket.as_fd()).filter(|info| info.tcpi_state == CLOSE)?;
    // Sent to in vain, or kept from sending, when the kernel gave it up: then no
    // data had gone out for the whole of the limit.
    let limit = SockRef::from(&socket).tcp_user_timeout().ok().flatten();
    let quiet = Duration::from_millis(info.tcpi_last_data_sent.into());
    let given_up = info.tcpi_retransmits > 0
        || info.tcpi_probes > 0
        || limit.is_some_and(|limit| !limit.is_zero() && quiet >= limit);
    Some(if given_up { libc::ETIMEDOUT } else { libc::ECONNRESET })
}

/// Keeps the byte marked urgent in the stream instead of dropping it (tcp(7)).
pub fn keep_urgent_inline(socket: impl AsFd) {
    let _ = SockRef::from(&socket).set_out_of_band_inline(true);
}

/// Switches keepalive and `TCP_USER_TIMEOUT` on (or leaves them off). A no-op
/// on Unix sockets.
pub fn set_liveness(
    socket: impl AsFd,
    keepalive: Option<Duration>,
    user_timeout: Option<Duration>,
) -> io::Result<()> {
    #[cfg(any(test, feature = "fake"))]
    if let Some(answer) = fake::set_option(&socket) {
        return answer;
    }
    let socket = SockRef::from(&socket);
    if socket.local_addr()?.is_unix() {
        return Ok(());
    }
    match keepalive {
        Some(idle) => {
            // The kernel counts whole seconds from 1 to 32,767.
            let idle = idle.clamp(Duration::from_secs(1), Duration::from_secs(32_767));
            let keepalive = TcpKeepalive::new()
                .with_time(idle)
                .with_interval(idle.min(KEEPALIVE_INTERVAL_MAX))
                .with_retries(KEEPALIVE_PROBES);
            socket.set_tcp_keepalive(&keepalive)?;
        }
        None => socket.set_keepalive(false)?,
    }
    socket.set_tcp_user_timeout(user_timeout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reset_reported_elsewhere_is_not_an_orderly_end() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let pair = || {
            let ours = std::net::TcpStream::connect(address).unwrap();
            (ours, listener.accept().unwrap().0)
        };
        let (mut closed, peer) = pair();
        drop(peer);
        assert_eq!(std::io::Read::read(&mut closed, &mut [0]).unwrap(), 0);
        assert_eq!(close_error(&closed), None);
        let (mut fallen, peer) = pair();
        reset(peer.into());
        let told = std::io::Write::write(&mut fallen, &[0]).unwrap_err();
        assert_eq!(told.raw_os_error(), Some(libc::ECONNRESET));
        assert_eq!(std::io::Read::read(&mut fallen, &mut [0]).unwrap(), 0, "as after a FIN");
        assert_eq!(close_error(&fallen), Some(libc::ECONNRESET));
        let (unix, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(close_error(&unix), None);
    }

    #[test]
    fn a_connect_within_the_host_is_decided_at_once() {
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let listener = std::net::TcpListener::bind(host).unwrap();
            let address = listener.local_addr().unwrap();
            let (_socket, how_far) =
                connect_checking_result(None, ConnectTarget::Tcp(address)).unwrap();
            assert_eq!(how_far, Connecting::Done);
            drop(listener);
            let refused = connect_checking_result(None, ConnectTarget::Tcp(address)).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::ECONNREFUSED));
        }
    }

    #[test]
    fn a_connect_that_waits_for_room_in_the_backlog_is_pending() {
        let listener = super::super::listen::bind("127.0.0.1:0".parse().unwrap(), 1).unwrap();
        listener[0].listen(0).unwrap();
        let address = listener[0].local_addr().unwrap().as_socket().unwrap();
        let connects: Vec<_> = (0..3)
            .map(|_| connect_checking_result(None, ConnectTarget::Tcp(address)).unwrap())
            .collect();
        assert!(connects.iter().any(|(_, how_far)| *how_far == Connecting::Pending));
    }
}
