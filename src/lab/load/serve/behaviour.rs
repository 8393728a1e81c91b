//! What a server does with its connections.
//!
//! Chosen by `lab::cli::backend`, followed by `worker` and `peer`. Plain values.

use socket2::Socket;
use std::io;
use std::time::Duration;
use tidegate_net::epoll::EpollInterest;

/// Receive buffer of a slow reader: small, so that it is felt at once.
const SLOW_BUFFER: usize = 4 * 1024;

/// Well, and badly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    /// Send back what comes.
    Echo,
    /// For every `request` bytes that come send `answer` bytes.
    Respond {
        /// Bytes of a request; at least one.
        request: usize,
        /// Bytes of an answer; at least one.
        answer: usize,
    },
    /// Receive and throw away.
    Sink,
    /// Send without end, in writes of this size.
    Source {
        /// Bytes of a write; at least one.
        size: usize,
    },
    /// Echo, but do nothing at all for `pause` out of each `every`.
    Hiccup {
        /// How long nothing is done.
        pause: Duration,
        /// From one pause's beginning to the next's; longer than `pause`.
        every: Duration,
    },
    /// Accept and never read, answer or close.
    Stall,
    /// Echo until this many bytes have come on a connection, then reset it;
    /// 0 resets as soon as it is accepted.
    Reset {
        /// Bytes received before the reset.
        after: u64,
    },
    /// Answer the first bytes with this many and a FIN, then receive on until
    /// the peer is done.
    HalfClose {
        /// Bytes of the answer; may be none.
        answer: usize,
    },
    /// Receive this many bytes a second on each connection, and throw them
    /// away.
    SlowRead {
        /// Bytes a second; at least one.
        rate: u64,
    },
}

// === impl Behaviour ===

impl Behaviour {
    /// What accepted sockets inherit from their listener.
    pub(super) fn tune(&self, listener: &Socket) -> io::Result<()> {
        match self {
            Behaviour::SlowRead { .. } => listener.set_recv_buffer_size(SLOW_BUFFER),
            _ => Ok(()),
        }
    }

    /// What a new connection is watched for.
    pub(super) fn interest(&self) -> EpollInterest {
        match self {
            Behaviour::Sink => EpollInterest::WhileReadable,
            Behaviour::Source { .. } => EpollInterest::WhileWritable,
            // Also those that never read: failures are told in any case.
            _ => EpollInterest::EdgeReadable,
        }
    }

    /// Bytes that are sent again and again by those that do not echo.
    pub(super) fn filler(&self) -> usize {
        match *self {
            Behaviour::Respond { answer, .. } | Behaviour::HalfClose { answer } => answer,
            Behaviour::Source { size } => size,
            _ => 0,
        }
    }
}
