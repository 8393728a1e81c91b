//! Stream sockets: connect, receive, send, shut down, reset.
//!
//! Used by workers. Functions never block. Each makes one system call unless its name or
//! documentation says otherwise. Errors are returned unchanged; the caller interprets the
//! errno.

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

/// The address to connect to.
#[derive(Debug, Clone, Copy)]
pub enum ConnectTarget<'a> {
    /// IPv4 or IPv6.
    Tcp(SocketAddr),
    /// A Unix stream socket.
    Unix(&'a Path),
}

/// The state of a connection after connect(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Connecting {
    /// Established.
    Done,
    /// In progress. The socket becomes writable when connecting succeeds or fails.
    Pending,
}

/// Longest interval between keepalive probes. A shorter idle time is also the interval.
const KEEPALIVE_INTERVAL_MAX: Duration = Duration::from_secs(15);

/// Unanswered keepalive probes that end a connection.
const KEEPALIVE_PROBES: u32 = 4;

/// Send and receive buffers for peers on this host. The kernel doubles the value for its
/// overhead (socket(7), SO_SNDBUF).
///
/// The send buffer is the default of `net.core.wmem_max`, which any process may request.
/// A receive buffer below 208 KiB was slower than no bound in measurements.
const NEAR_SEND_QUEUE: usize = 208 * 1024;
const NEAR_RECEIVE_QUEUE: usize = 256 * 1024;

/// Returns the name of a Unix socket for the kernel. A leading `@` becomes the NUL byte of
/// an abstract socket (unix(7)).
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

/// Starts connecting to `peer` on a new socket, from the address `source` if it is given.
///
/// `source` must be of the family of a TCP peer; see [`start_at`].
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
        // Set before the first byte can arrive. Accepted connections inherit the option.
        keep_urgent_inline(&socket);
    }
    if let Some(source) = source {
        start_at(&socket, source)?;
    }
    let how_far = match socket.connect(&peer) {
        Ok(()) => Connecting::Done,
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Connecting::Pending,
        // connect(2) on a Unix socket gives EAGAIN if the listen queue is full, and the
        // socket does not connect. The backend is overloaded then. On a TCP socket, EAGAIN
        // means that this kernel is out of memory for routes.
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
            let errno = if protocol.is_some() { libc::ENOBUFS } else { libc::ECONNREFUSED };
            return Err(io::Error::from_raw_os_error(errno));
        }
        Err(error) => return Err(error),
    };
    Ok((socket.into(), how_far))
}

/// Checks that connections can start from `source`: it is an address of this host.
pub fn try_source(source: IpAddr) -> io::Result<()> {
    let domain = if source.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(domain, kind, Some(Protocol::TCP))?;
    start_at(&socket, source)
}

/// Sets the source address of an unconnected TCP socket.
///
/// The kernel assigns the port at connect(2), when it knows both addresses (ip(7),
/// IP_BIND_ADDRESS_NO_PORT).
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

/// Connects as [`connect_from`] does, and checks the result again for loopback peers.
///
/// The handshake with a loopback peer has finished when connect(2) returns, although it
/// returns EINPROGRESS. The check is a second system call.
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
    // A second connect(2) returns the result of the first.
    match rustix::net::connect(&socket, &address) {
        Ok(()) | Err(rustix::io::Errno::ISCONN) => Ok((socket, Connecting::Done)),
        Err(rustix::io::Errno::ALREADY) => Ok((socket, Connecting::Pending)),
        Err(error) => Err(error.into()),
    }
}

/// Returns the result of a pending connect, after the socket became writable.
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

/// Receives available bytes into `buffer`. `Ok(0)`: the peer sent FIN.
#[inline]
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    #[cfg(any(test, feature = "fake"))]
    if let Some(answer) = fake::receive(&socket, buffer) {
        return answer;
    }
    let (received, _) = rustix::net::recv(socket, buffer, RecvFlags::DONTWAIT)?;
    Ok(received)
}

/// Copies available bytes into `buffer` without removing them from the socket. `Ok(0)`:
/// the peer sent FIN.
pub fn peek(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    #[cfg(any(test, feature = "fake"))]
    if let Some(answer) = fake::peek(&socket, buffer) {
        return answer;
    }
    let (there, _) = rustix::net::recv(socket, buffer, RecvFlags::DONTWAIT | RecvFlags::PEEK)?;
    Ok(there)
}

/// Makes the socket readable only when `bytes` have arrived or the stream has ended.
pub fn set_low_water(socket: impl AsFd, bytes: u32) -> io::Result<()> {
    super::sockopt::receive_low_water(socket.as_fd(), bytes)
}

/// Receives and discards available bytes, at most the length of `buffer`.
///
/// On a TCP socket nothing is copied (tcp(7), MSG_TRUNC). `Ok(0)`: the peer sent FIN.
#[inline]
pub fn discard(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    let (_, taken) = rustix::net::recv(socket, buffer, RecvFlags::DONTWAIT | RecvFlags::TRUNC)?;
    Ok(taken)
}

/// Sends as many of `bytes` as fit into the send buffer.
#[inline]
pub fn send(socket: impl AsFd, bytes: &[u8]) -> io::Result<usize> {
    #[cfg(any(test, feature = "fake"))]
    if let Some(answer) = fake::send(&socket, bytes) {
        return answer;
    }
    Ok(rustix::net::send(socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?)
}

/// Sends the first bytes of a connection. With `more`, the kernel waits for the next send for
/// up to 200 ms, to fill the segment (tcp(7), `TCP_CORK`).
pub fn send_first(socket: impl AsFd, bytes: &[u8], more: bool) -> io::Result<usize> {
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let flags = if more { flags | SendFlags::MORE } else { flags };
    Ok(rustix::net::send(socket, bytes, flags)?)
}

/// Returns whether the peer has sent FIN or the connection has failed, even if received bytes
/// are unread.
pub fn has_ended(socket: impl AsFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut watched = [PollFd::new(&socket, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut watched, Some(&now)).is_ok_and(|ready| ready > 0)
}

/// Sends FIN after the queued bytes (RFC 9293 section 3.6: half-close).
pub fn shutdown_write(socket: impl AsFd) -> io::Result<()> {
    #[cfg(any(test, feature = "fake"))]
    if let Some(answer) = fake::shutdown_write(&socket) {
        return answer;
    }
    rustix::net::shutdown(socket, Shutdown::Write)?;
    Ok(())
}

/// Closes with RST and discards queued data (socket(7), SO_LINGER with a time of zero).
///
/// On a Unix socket it is a plain close, which has the same effect there.
pub fn reset(socket: OwnedFd) {
    #[cfg(any(test, feature = "fake"))]
    if fake::reset_on_close(&socket).is_some() {
        return;
    }
    // If this fails, the peer gets a FIN instead of an RST.
    let _ = SockRef::from(&socket).set_linger(Some(Duration::ZERO));
    drop(socket);
}

/// Shortens the socket queues of peers on this host, so that queued bytes stay in the CPU
/// caches. Call it before bulk data moves from `from` to `to`.
///
/// A stream to another host needs queues for its bandwidth-delay product, which the kernel
/// measures. On this host the delay is only the wait for a CPU. Queues of megabytes
/// would move each byte to main memory and back.
///
/// It has no effect for other peers and if the kernel rejects the size. A receive queue
/// that is already longer is not changed, because the kernel would drop bytes for which it
/// has announced a window.
pub fn shorten_near_queues(from: impl AsFd, to: impl AsFd) {
    let (from, to) = (SockRef::from(&from), SockRef::from(&to));
    if is_near(&to) {
        let _ = to.set_send_buffer_size(NEAR_SEND_QUEUE);
    }
    if is_near(&from) && from.recv_buffer_size().is_ok_and(|bytes| bytes < 2 * NEAR_RECEIVE_QUEUE) {
        let _ = from.set_recv_buffer_size(NEAR_RECEIVE_QUEUE);
    }
}

/// Returns whether the peer is on this host.
fn is_near(socket: &Socket) -> bool {
    let ip = |address: io::Result<SockAddr>| Some(address.ok()?.as_socket()?.ip().to_canonical());
    ip(socket.peer_addr())
        .is_some_and(|peer| peer.is_loopback() || ip(socket.local_addr()) == Some(peer))
}

/// Makes the last close of `socket` send RST instead of FIN.
pub fn reset_on_close(socket: impl AsFd) {
    #[cfg(any(test, feature = "fake"))]
    if fake::reset_on_close(&socket).is_some() {
        return;
    }
    let _ = SockRef::from(&socket).set_linger(Some(Duration::ZERO));
}

/// Ends the connection without closing the descriptor. The peer gets RST (connect(2),
/// AF_UNSPEC), and tasks that wait for the socket are woken.
pub fn abort(socket: impl AsFd) {
    #[cfg(any(test, feature = "fake"))]
    if fake::tear_down(&socket).is_some() {
        return;
    }
    // An error means that the socket is already disconnected.
    let _ = rustix::net::connect_unspec(&socket);
    let _ = rustix::net::shutdown(&socket, Shutdown::Both);
}

/// The progress of a socket with the bytes that it must send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delivery {
    /// Bytes that the peer's kernel has not acknowledged (tcp(7), SIOCOUTQ). A FIN counts
    /// as a byte. On a Unix socket: memory of the bytes that the peer has not read.
    pub waiting: u64,
    /// Time since the last progress. `None`: unknown, as on a Unix socket. It is up to
    /// [`KERNEL_TICK_MAX`] too long, because the kernel counts in ticks.
    pub quiet: Option<Duration>,
    /// The peer's kernel has no space for the waiting bytes, and it answers window probes.
    pub blocked: bool,
    /// The connection is closed.
    pub dead: bool,
}

/// Longest clock tick of the kernel, by which its times can be too short.
const KERNEL_TICK_MAX: Duration = Duration::from_millis(10);

/// Returns the progress of a socket. Makes two system calls.
///
/// With a full window, the kernel sends data only after the peer has read some. Probes of
/// a closed window and of an idle connection carry no data. Therefore the time of the last
/// data sent is the time of the last progress. If the kernel is retransmitting, it is the
/// time of the last acknowledgement instead.
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
    // One window probe may still be unanswered.
    let answers = info.tcpi_retransmits == 0 && info.tcpi_probes <= 1;
    Delivery { waiting, quiet, blocked: waiting > 0 && answers && !dead, dead }
}

/// Returns the bytes that can be received from the socket; 0 if unknown.
pub fn unread(socket: impl AsFd) -> u64 {
    #[cfg(any(test, feature = "fake"))]
    if let Some(answer) = fake::unread(&socket) {
        return answer;
    }
    super::ioctl::in_queue(socket.as_fd())
}

/// Returns the bytes that the peer's kernel has not acknowledged (tcp(7), SIOCOUTQ); 0 if
/// unknown.
pub fn unacknowledged(socket: impl AsFd) -> u64 {
    super::ioctl::out_queue(socket.as_fd())
}

/// Returns the errno of a TCP connection that the kernel has closed.
///
/// Use it if `SO_ERROR` is already cleared: the kernel reports an error once, and a send
/// that returned fewer bytes may have consumed it. A FIN from the peer does not close a
/// connection; it stays in CLOSE_WAIT (RFC 9293 section 3.3.2). `None`: the connection is
/// open, or it is not TCP.
pub fn close_error(socket: impl AsFd) -> Option<i32> {
    /// `TCP_CLOSE` of `net/tcp_states.h`.
    const CLOSE: u8 = 7;
    let info = super::sockopt::tcp_info(socket.as_fd()).filter(|info| info.tcpi_state == CLOSE)?;
    // The kernel timed the connection out if it was retransmitting or probing, or if no
    // data was sent for the whole user timeout.
    let limit = SockRef::from(&socket).tcp_user_timeout().ok().flatten();
    let quiet = Duration::from_millis(info.tcpi_last_data_sent.into());
    let timed_out = info.tcpi_retransmits > 0
        || info.tcpi_probes > 0
        || limit.is_some_and(|limit| !limit.is_zero() && quiet >= limit);
    Some(if timed_out { libc::ETIMEDOUT } else { libc::ECONNRESET })
}

/// Keeps urgent bytes in the stream instead of dropping them (tcp(7)).
pub fn keep_urgent_inline(socket: impl AsFd) {
    let _ = SockRef::from(&socket).set_out_of_band_inline(true);
}

/// Sets the most bytes per second that the kernel sends; `None`: no limit. Connections inherit
/// the limit of their listener. It has no effect on Unix sockets.
pub fn set_max_rate(socket: impl AsFd, bytes_per_second: Option<u64>) -> io::Result<()> {
    #[cfg(any(test, feature = "fake"))]
    if let Some(answer) = fake::set_option(&socket) {
        return answer;
    }
    super::sockopt::max_pacing_rate(socket.as_fd(), bytes_per_second.unwrap_or(u64::MAX))
}

/// Sets keepalive and `TCP_USER_TIMEOUT`; `None` switches each off. It has no effect on
/// Unix sockets.
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
    fn close_error_finds_a_reset_that_another_call_reported() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let pair = || {
            let client = std::net::TcpStream::connect(address).unwrap();
            (client, listener.accept().unwrap().0)
        };
        let (mut closed, peer) = pair();
        drop(peer);
        assert_eq!(std::io::Read::read(&mut closed, &mut [0]).unwrap(), 0);
        assert_eq!(close_error(&closed), None);
        let (mut failed, peer) = pair();
        reset(peer.into());
        let reported = std::io::Write::write(&mut failed, &[0]).unwrap_err();
        assert_eq!(reported.raw_os_error(), Some(libc::ECONNRESET));
        assert_eq!(std::io::Read::read(&mut failed, &mut [0]).unwrap(), 0, "as after a FIN");
        assert_eq!(close_error(&failed), Some(libc::ECONNRESET));
        let (unix, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(close_error(&unix), None);
    }

    #[test]
    fn connect_to_this_host_is_done_or_refused_immediately() {
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
    fn connect_to_a_full_listen_queue_is_pending() {
        let listener = super::super::listen::bind("127.0.0.1:0".parse().unwrap(), 1).unwrap();
        listener[0].listen(0).unwrap();
        let address = listener[0].local_addr().unwrap().as_socket().unwrap();
        let connects: Vec<_> = (0..3)
            .map(|_| connect_checking_result(None, ConnectTarget::Tcp(address)).unwrap())
            .collect();
        assert!(connects.iter().any(|(_, how_far)| *how_far == Connecting::Pending));
    }
}
