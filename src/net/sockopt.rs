//! The few socket options no crate wraps.
//!
//! Used by `listen`, `stream` and `datagram`. Each function is one setsockopt(2) or
//! getsockopt(2).

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// bind(2) to port 0 then takes no port yet: connect(2) does, when it knows the
/// peer, so that a port serves once for each peer (ip(7)).
pub(super) fn pick_port_at_connect(socket: BorrowedFd<'_>) -> io::Result<()> {
    set(socket, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)
}

/// SO_RCVBUFFORCE (socket(7)): a receive buffer beyond `net.core.rmem_max`, for
/// those with CAP_NET_ADMIN.
pub(super) fn force_receive_buffer(socket: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    set(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, bytes)
}

/// IP_MINTTL (ip(7)) or IPV6_MINHOPCOUNT: packets that have come further than from
/// a sender of 255 minus that many routers are dropped; 0 drops none.
pub(super) fn least_hop_limit(socket: BorrowedFd<'_>, v6: bool, least: u8) -> io::Result<()> {
    match v6 {
        false => set(socket, libc::IPPROTO_IP, libc::IP_MINTTL, least.into()),
        true => set(socket, libc::IPPROTO_IPV6, libc::IPV6_MINHOPCOUNT, least.into()),
    }
}

/// SO_RCVLOWAT (socket(7)): the socket is readable once so many bytes wait, or it has ended.
pub(super) fn receive_low_water(socket: BorrowedFd<'_>, bytes: u32) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    set(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, bytes)
}

/// SO_TIMESTAMPNS (socket(7)): each datagram comes with its time of arrival.
pub(super) fn enable_timestamps(socket: BorrowedFd<'_>) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, 1)
}

/// SO_RXQ_OVFL (socket(7)): datagrams come with the count of dropped ones.
pub(super) fn enable_drop_counter(socket: BorrowedFd<'_>) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 1)
}

/// TCP_INFO (tcp(7)); `None` where it is no TCP socket.
pub(super) fn tcp_info(socket: BorrowedFd<'_>) -> Option<libc::tcp_info> {
    // SAFETY: a C struct of plain integers, for which all zeros is a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = size_of_val(&info) as libc::socklen_t;
    // SAFETY: both pointers are valid for the call, and the kernel writes no
    // more than `len` bytes of the struct: older kernels less, newer no more.
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

fn set(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the options used here take one int; the pointer to it is valid
    // for the call and the length is its own.
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
