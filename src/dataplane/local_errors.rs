//! Classifies an errno: local error, or failure of the peer or the path.
//!
//! Called after a failed system call on a session's socket. A local error is counted, but
//! never against a backend.

use std::io;
use tidegate_core::metrics::counters::LocalErrorKind;

/// Returns the kind of local error, or `None` if the peer or the path failed.
pub fn local_error_kind(error: &io::Error) -> Option<LocalErrorKind> {
    match error.raw_os_error()? {
        libc::EMFILE | libc::ENFILE => Some(LocalErrorKind::Descriptors),
        libc::EADDRNOTAVAIL | libc::EADDRINUSE => Some(LocalErrorKind::Ports),
        // ENOSPC: limit on the descriptors in all epoll sets of a user (epoll_ctl(2)).
        libc::ENOBUFS | libc::ENOMEM | libc::ENOSPC => Some(LocalErrorKind::Memory),
        // A local firewall or policy, a missing socket family, or a Unix socket in a directory
        // without search permission.
        libc::EPERM | libc::EACCES | libc::EAFNOSUPPORT | libc::EINVAL => {
            Some(LocalErrorKind::Other)
        }
        _ => None,
    }
}

/// Like [`local_error_kind`], for an error that connect(2) returned immediately.
///
/// No packet has left this host then, so a missing route or interface is a local error. After
/// a pending connect the same errno comes from ICMP and describes the path (tcp(7), "Error
/// handling"; `tcp_v4_err` in Linux).
///
/// EHOSTUNREACH is a path failure in both cases: a neighbour did not answer, or the route
/// declares this destination unreachable.
pub fn local_error_now(error: &io::Error) -> Option<LocalErrorKind> {
    match error.raw_os_error()? {
        libc::ENETUNREACH | libc::ENETDOWN | libc::ENONET => Some(LocalErrorKind::Route),
        _ => local_error_kind(error),
    }
}

/// Returns the kind of a failed call that involves this host only: every errno is local.
pub fn local_kind(error: &io::Error) -> LocalErrorKind {
    local_error_kind(error).unwrap_or(LocalErrorKind::Other)
}

/// Meaning of a failed send or receive for its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamError {
    /// No bytes can be moved now.
    WouldBlock,
    /// Repeat the call at once.
    Interrupted,
    /// This host is out of memory. The connection is unaffected; repeat the call later.
    Shortage,
    /// The connection has failed with this errno.
    Broken(i32),
}

impl StreamError {
    pub(crate) fn of(error: &io::Error) -> StreamError {
        match (error.kind(), error.raw_os_error()) {
            (io::ErrorKind::WouldBlock, _) => StreamError::WouldBlock,
            (io::ErrorKind::Interrupted, _) => StreamError::Interrupted,
            (_, Some(libc::ENOBUFS | libc::ENOMEM)) => StreamError::Shortage,
            (_, errno) => StreamError::Broken(errno.unwrap_or(libc::EIO)),
        }
    }
}

/// Whether accept(2) failed only for the connection it was about to return, so that the next
/// call can succeed (accept(2), "Error handling").
pub fn accept_can_continue(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ECONNABORTED
                | libc::EINTR
                | libc::ENETDOWN
                | libc::EPROTO
                | libc::ENOPROTOOPT
                | libc::EHOSTDOWN
                | libc::ENONET
                | libc::EHOSTUNREACH
                | libc::EOPNOTSUPP
                | libc::ENETUNREACH
        )
    )
}
