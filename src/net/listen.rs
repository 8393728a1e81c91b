//! Listening sockets: bind, tune, accept, retire.
//!
//! `daemon` binds one for each worker and bind address (SO_REUSEPORT); workers
//! accept from theirs. No policy: when to pause or retire is decided above.

use super::sockopt;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SocketFlags, acceptfrom_with};
use socket2::{Domain, Protocol, SockAddr, SockFilter, Socket, Type};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Connections the kernel may queue on each listener; it lowers this to
/// `net.core.somaxconn`.
const BACKLOG: i32 = 65_535;

/// Whether another socket listens there already. SO_REUSEPORT alone would let
/// two processes of one user share the traffic in silence.
pub fn taken(address: SocketAddr, freebind: bool) -> io::Result<()> {
    let socket = unbound(address, freebind)?;
    socket.bind(&SockAddr::from(address))?;
    socket.listen(1)
}

/// `count` listening sockets that share `address`; the kernel spreads new
/// connections over them by hash.
pub fn bind(address: SocketAddr, count: usize) -> io::Result<Vec<Socket>> {
    // All are bound before any listens: no connection can land on the first
    // while the rest are not there yet.
    let sockets = reserve(address, count, false)?;
    sockets.iter().try_for_each(start)?;
    Ok(sockets)
}

/// The same, not yet listening: no client can connect before [`start`]. With
/// `freebind` no interface needs to have the address (ip(7), IP_FREEBIND).
pub fn reserve(address: SocketAddr, count: usize, freebind: bool) -> io::Result<Vec<Socket>> {
    (0..count)
        .map(|_| {
            let socket = unbound(address, freebind)?;
            socket.set_reuse_port(true)?;
            prepare(&socket)?;
            socket.bind(&SockAddr::from(address))?;
            Ok(socket)
        })
        .collect()
}

/// Lets clients in.
pub fn start(socket: &Socket) -> io::Result<()> {
    socket.listen(BACKLOG)
}

/// Sets what holds for every listener and is inherited by what it accepts, so
/// that no call is needed for each connection.
pub fn prepare(socket: &Socket) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    // Urgent bytes stay in the stream (tcp(7)).
    socket.set_out_of_band_inline(true)
}

fn unbound(address: SocketAddr, freebind: bool) -> io::Result<Socket> {
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
    Ok(socket)
}

/// Sets what connections accepted from now on inherit.
pub fn tune(
    listener: &Socket,
    keepalive: Option<Duration>,
    user_timeout: Option<Duration>,
) -> io::Result<()> {
    super::stream::set_liveness(listener, keepalive, user_timeout)
}

/// Takes one connection off the queue; `WouldBlock` when it is empty.
pub fn accept(listener: impl AsFd) -> io::Result<(OwnedFd, SocketAddr)> {
    let (socket, peer) = take(listener)?;
    if BY_HOP_LIMIT.load(Ordering::SeqCst) {
        // Inherited, where its handshake ended after the listener had retired.
        // It fails for no socket of that family.
        let _ = sockopt::least_hop_limit(socket.as_fd(), peer.is_ipv6(), 0);
    }
    Ok((socket, peer))
}

fn take(listener: impl AsFd) -> io::Result<(OwnedFd, SocketAddr)> {
    #[cfg(any(test, feature = "fake"))]
    if let Some(answer) = super::fake::accept(&listener) {
        return answer;
    }
    let (socket, peer) = acceptfrom_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC)?;
    let peer = peer
        .and_then(|any| SocketAddr::try_from(any).ok())
        .ok_or_else(|| io::Error::from_raw_os_error(libc::ECONNABORTED))?;
    Ok((socket, peer))
}

/// Whether a connection waits in the queue to be accepted.
pub fn has_queued(listener: impl AsFd) -> bool {
    #[cfg(any(test, feature = "fake"))]
    if let Some(answer) = super::fake::has_queued(&listener) {
        return answer;
    }
    let mut fds = [PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    // An error would say the same as an empty queue: nobody to be served.
    poll(&mut fds, Some(&at_once)).is_ok_and(|ready| ready > 0)
}

/// Lets nobody new in, while connections that are queued or mid-handshake stay
/// whole: a filter on the listener drops bare SYNs. The peers' kernels send
/// theirs again a second later and are refused then, or find whoever listens
/// there by that time.
///
/// Closing a listener at once would reset everything in its queue (measured:
/// 195 of 400).
///
/// Kernels of 2026 ask for CAP_NET_ADMIN before they filter a TCP socket. Without
/// it [`retire_by_hop_limit`] does nearly the same.
///
/// # Errors
/// The kernel's; then new clients still get in.
pub fn retire(listener: &Socket) -> io::Result<()> {
    match drop_bare_syns(listener) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            retire_by_hop_limit(listener)
        }
        done => done,
    }
}

/// Whether a listener of this process has retired by its hop limit: what is
/// accepted has to be freed of it.
static BY_HOP_LIMIT: AtomicBool = AtomicBool::new(false);

/// As many as a packet can have; those of clients start with 64 or 128, nearly all
/// of them.
const MOST_HOPS: u8 = 255;

/// The listener drops what has fewer than [`MOST_HOPS`] left (ip(7), IP_MINTTL;
/// IPV6_MINHOPCOUNT), which every SYN has. Handshakes under way are looked at
/// before that and end as they should; what arrives between a handshake's end and
/// the accept is sent again by the client.
fn retire_by_hop_limit(listener: &Socket) -> io::Result<()> {
    let v6 = listener.local_addr()?.is_ipv6();
    // Before: what is accepted from now on may have inherited it.
    BY_HOP_LIMIT.store(true, Ordering::SeqCst);
    sockopt::least_hop_limit(listener.as_fd(), v6, MOST_HOPS)
}

fn drop_bare_syns(listener: &Socket) -> io::Result<()> {
    /// Flags byte of the TCP header (RFC 9293 section 3.1), where a filter on a
    /// TCP socket starts reading.
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
    fn address_with_a_listener_is_taken() {
        let (address, socket) = any_port();
        assert_eq!(taken(address, false).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(socket);
        taken(address, false).unwrap();
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
            // A plain user's test.
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
