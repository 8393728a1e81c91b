//! What a server does with its connections.
//!
//! `lab::cli::backend` chooses it, `worker` and `peer` follow it. Plain values.

use socket2::Socket;
use std::io;
use std::time::Duration;
use tidegate_net::epoll::EpollInterest;

/// Receive buffer of a slow reader: small, so that the sender is limited immediately.
const SLOW_BUFFER: usize = 4 * 1024;

/// Behaviours of a server, correct and faulty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    /// Send back what is received.
    Echo,
    /// Send `answer` bytes for every `request` bytes received.
    Respond {
        /// Bytes of a request; at least one.
        request: usize,
        /// Bytes of an answer; at least one.
        answer: usize,
    },
    /// Receive and discard.
    Sink,
    /// Send continuously, in writes of this size.
    Source {
        /// Bytes of a write; at least one.
        size: usize,
    },
    /// Echo, but pause completely for `pause` in each `every`.
    Hiccup {
        /// Length of a pause.
        pause: Duration,
        /// Time from the start of a pause to the start of the next; longer than
        /// `pause`.
        every: Duration,
    },
    /// Accept and never read, answer or close.
    Stall,
    /// Echo until this number of bytes was received on a connection, then reset it. 0
    /// resets it right after accept.
    Reset {
        /// Bytes received before the reset.
        after: u64,
    },
    /// Answer the first bytes with this number of bytes and a FIN, then receive until
    /// the peer has finished.
    HalfClose {
        /// Bytes of the answer; can be 0.
        answer: usize,
    },
    /// Receive and discard this number of bytes per second on each connection.
    SlowRead {
        /// Bytes per second; at least one.
        rate: u64,
    },
}

// === impl Behaviour ===

impl Behaviour {
    /// Sets the options that accepted sockets inherit from their listener.
    pub(super) fn tune(&self, listener: &Socket) -> io::Result<()> {
        match self {
            Behaviour::SlowRead { .. } => listener.set_recv_buffer_size(SLOW_BUFFER),
            _ => Ok(()),
        }
    }

    /// Returns what a new connection is watched for.
    pub(super) fn interest(&self) -> EpollInterest {
        match self {
            Behaviour::Sink => EpollInterest::WhileReadable,
            Behaviour::Source { .. } => EpollInterest::WhileWritable,
            // Also for connections that are never read: epoll reports errors in any
            // case.
            _ => EpollInterest::EdgeReadable,
        }
    }

    /// Returns the size of the block that is sent repeatedly; 0 for behaviours that
    /// echo.
    pub(super) fn filler(&self) -> usize {
        match *self {
            Behaviour::Respond { answer, .. } | Behaviour::HalfClose { answer } => answer,
            Behaviour::Source { size } => size,
            _ => 0,
        }
    }
}
