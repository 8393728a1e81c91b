//! ioctls that no crate wraps.
//!
//! Used by `stream` and `pipe`. They only read: no function changes a socket.

#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

/// Returns the bytes in the send queue that the peer has not acknowledged; 0 on an error.
pub(super) fn out_queue(socket: BorrowedFd<'_>) -> u64 {
    let mut queued: libc::c_int = 0;
    // SAFETY: SIOCOUTQ (the same number as TIOCOUTQ) writes one int through the pointer,
    // which is valid, aligned and exclusive during the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut queued) };
    if result == 0 { u64::try_from(queued).unwrap_or(0) } else { 0 }
}

/// Returns the bytes that can be received from the socket now; 0 on an error.
pub(super) fn in_queue(socket: BorrowedFd<'_>) -> u64 {
    let mut queued: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int through the pointer, which is valid, aligned and
    // exclusive during the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::FIONREAD, &raw mut queued) };
    if result == 0 { u64::try_from(queued).unwrap_or(0) } else { 0 }
}
