//! Socket options that no crate wraps.
//!
//! Used by `listen`, `stream` and `datagram`. Each function makes one setsockopt(2) or
//! getsockopt(2) call.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// IP_BIND_ADDRESS_NO_PORT (ip(7)): bind(2) to port 0 assigns no port. connect(2) assigns
/// it when the peer is known, so that connections to different peers can share a port.
pub(super) fn pick_port_at_connect(socket: BorrowedFd<'_>) -> io::Result<()> {
    set(socket, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)
}

/// SO_RCVBUFFORCE (socket(7)): sets a receive buffer above `net.core.rmem_max`. It needs
/// CAP_NET_ADMIN.
pub(super) fn force_receive_buffer(socket: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    set(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, bytes)
}

/// IP_MINTTL (ip(7)) or IPV6_MINHOPCOUNT: packets with a hop limit below `least` are
/// dropped. 0 drops none.
pub(super) fn least_hop_limit(socket: BorrowedFd<'_>, v6: bool, least: u8) -> io::Result<()> {
    match v6 {
        false => set(socket, libc::IPPROTO_IP, libc::IP_MINTTL, least.into()),
        true => set(socket, libc::IPPROTO_IPV6, libc::IPV6_MINHOPCOUNT, least.into()),
    }
}

/// SO_RCVLOWAT (socket(7)): the socket is readable when `bytes` have arrived or the stream
/// has ended.
pub(super) fn receive_low_water(socket: BorrowedFd<'_>, bytes: u32) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    set(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, bytes)
}

/// SO_TIMESTAMPNS (socket(7)): the kernel adds its time of arrival to each datagram.
pub(super) fn enable_timestamps(socket: BorrowedFd<'_>) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, 1)
}

/// SO_RXQ_OVFL (socket(7)): the kernel adds the count of dropped datagrams to each
/// datagram.
pub(super) fn enable_drop_counter(socket: BorrowedFd<'_>) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 1)
}

/// SO_MAX_PACING_RATE (socket(7), tcp(7)): the kernel sends at most this many bytes per
/// second. `u64::MAX`: no limit.
pub(super) fn max_pacing_rate(socket: BorrowedFd<'_>, rate: u64) -> io::Result<()> {
    // SAFETY: the kernel reads an unsigned long, which is not longer than the value. The pointer
    // is valid during the call, and the length is the size of the value.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MAX_PACING_RATE,
            (&raw const rate).cast(),
            size_of_val(&rate) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Reads TCP_INFO (tcp(7)). `None`: the socket is not TCP.
pub(super) fn tcp_info(socket: BorrowedFd<'_>) -> Option<libc::tcp_info> {
    // SAFETY: the struct consists of integers, for which zero is valid.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = size_of_val(&info) as libc::socklen_t;
    // SAFETY: both pointers are valid during the call, and the kernel writes at most `len`
    // bytes of the struct. Older kernels write less.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut len,
        )
    };
    (result == 0).then_some(info)
}

/// SO_PEERCRED (unix(7)): user and process that connected to a Unix socket.
pub(super) fn peer_credentials(socket: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    let mut credentials = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut len = size_of_val(&credentials) as libc::socklen_t;
    // SAFETY: both pointers are valid during the call, and the kernel writes at most `len`
    // bytes of the struct, which consists of integers.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut len,
        )
    };
    match result {
        0 => Ok((credentials.uid, credentials.pid.cast_unsigned())),
        _ => Err(io::Error::last_os_error()),
    }
}

fn set(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the options in this module take one int. The pointer to it is valid during
    // the call, and the length is the size of the int.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
