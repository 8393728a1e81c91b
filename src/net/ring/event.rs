//! The inputs and outputs of a ring as plain data.
//!
//! Used by the ring engine. It never makes a system call.

use super::buffers::Chunk;
use super::ops::Op;

/// The number of pool buffers of a ring. Each has the length `BUFFER_LEN`.
#[derive(Debug, Clone, Copy)]
pub struct RingSettings {
    /// All buffers: a power of two, at most 32,768.
    pub buffers: u16,
    /// Buffers that the kernel can use at first. One receive can use all of them before
    /// it can be cancelled.
    pub shown: u16,
}

/// The event to poll for. Failure and hang-up are always reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PollInterest {
    /// Only failure and hang-up.
    Failure,
    /// Bytes can be received.
    Readable,
    /// Bytes can be sent.
    Writable,
}

/// An event of an operation.
#[derive(Debug)]
pub struct Completion {
    /// The operation.
    pub op: Op,
    /// The tag that the caller gave the operation.
    pub tag: u64,
    /// True if the operation has ended.
    pub last: bool,
    /// The event.
    pub what: CompletionKind,
}

/// The event of a [`Completion`].
#[derive(Debug)]
pub enum CompletionKind {
    /// Bytes arrived; never empty.
    Data(Chunk),
    /// The peer sent FIN.
    End,
    /// A receive ended because no buffer was free.
    Starved,
    /// A receive was cancelled or interrupted. The connection has not failed.
    Stopped,
    /// A receive failed.
    Failed(i32),
    /// A send has sent this many more bytes. In the last event these are all remaining
    /// bytes.
    Sent(usize),
    /// A send failed, or was cancelled (`ECANCELED`) before it sent more bytes.
    SendFailed(i32),
    /// A send was cancelled after it sent this many more bytes.
    SendCut(usize),
    /// A poll ended: true if the socket has failed or hung up, or the errno of the poll.
    Polled(Result<bool, i32>),
}

/// Counters of a ring.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct RingCounts {
    /// Times the completion queue overflowed.
    pub overflows: u64,
    /// Times the kernel's flag for deferred work was set without deferred work.
    pub stale_flags: u64,
    /// Receives that found no buffer.
    pub starved: u64,
    /// Sends that returned short and were resumed.
    pub resumed: u64,
    /// Operations that failed because the kernel was out of memory, and are retried.
    pub short: u64,
    /// Completions that named an operation that has ended. Not expected.
    pub strays: u64,
}
