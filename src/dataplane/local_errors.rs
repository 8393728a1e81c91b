//! What an errno says about whose fault it is.
//!
//! Used wherever a socket call fails on behalf of a session: local trouble is
//! counted, never blamed on a backend.

use std::io;
use tidegate_core::metrics::counters::LocalErrorKind;

/// The kind of local trouble, or `None` where the peer or the path is to
/// blame.
pub fn local_error_kind(error: &io::Error) -> Option<LocalErrorKind> {
    match error.raw_os_error()? {
        libc::EMFILE | libc::ENFILE => Some(LocalErrorKind::Descriptors),
        libc::EADDRNOTAVAIL | libc::EADDRINUSE => Some(LocalErrorKind::Ports),
        // ENOSPC: the limit on what all epoll sets of a user watch (epoll_ctl(2)).
        libc::ENOBUFS | libc::ENOMEM | libc::ENOSPC => Some(LocalErrorKind::Memory),
        // A firewall or policy of this host, a socket family it lacks, or a
        // Unix socket whose directory we may not enter.
        libc::EPERM | libc::EACCES | libc::EAFNOSUPPORT | libc::EINVAL => {
            Some(LocalErrorKind::Other)
        }
        _ => None,
    }
}

/// As [`local_error_kind`], for an error that connect(2) gave at once. No packet has
/// left this host by then, so a lack of a route or of an interface is ours;
/// the same errno on a connect that was pending came by ICMP and speaks of the
/// path (tcp(7), "Error handling"; `tcp_v4_err` in Linux).
///
/// EHOSTUNREACH stays the path's even here: it says that a neighbour did not
/// answer, or that somebody declared this one host unreachable.
pub fn local_error_now(error: &io::Error) -> Option<LocalErrorKind> {
    match error.raw_os_error()? {
        libc::ENETUNREACH | libc::ENETDOWN | libc::ENONET => Some(LocalErrorKind::Route),
        _ => local_error_kind(error),
    }
}

/// Trouble that is ours whatever the errno: the call concerns nobody else.
pub fn local_kind(error: &io::Error) -> LocalErrorKind {
    local_error_kind(error).unwrap_or(LocalErrorKind::Other)
}

/// What a failed call that moves bytes means for its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamError {
    /// Nothing can be moved now.
    WouldBlock,
    /// The same call succeeds at once.
    Interrupted,
    /// This host is out of memory: the connection is well, and the same call can succeed
    /// later.
    Shortage,
    /// The connection has failed with that errno.
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

/// Whether accept(2) failed only for the connection it was about to return:
/// the next call may well succeed (accept(2), "Error handling").
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
