//! The few socket options no crate wraps.
//!
//! Used by `stream`. Each function is one setsockopt(2).

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// bind(2) to port 0 then takes no port yet: connect(2) does, when it knows the
/// peer, so that a port serves once for each peer (ip(7)).
pub(super) fn pick_port_at_connect(socket: BorrowedFd<'_>) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the option takes one int; the pointer to it is valid for the
    // call and the length is its own.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
