//! What goes into a ring and comes out of it, as values.
//!
//! Used by the ring engine. Plain data: nothing here knows of the kernel.

use super::buffers::Chunk;
use super::ops::Op;

/// Pool buffers (each `BUFFER_LEN`) of a ring.
#[derive(Debug, Clone, Copy)]
pub struct RingSettings {
    /// All there are: a power of two, at most 32,768.
    pub buffers: u16,
    /// How many the kernel sees at first, and so the most that one receive can
    /// take before anyone can stop it.
    pub shown: u16,
}

/// What there is to poll for. Failure and hang-up are always reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PollInterest {
    /// Only failure and hang-up.
    Failure,
    /// Something to receive.
    Readable,
    /// Room to send.
    Writable,
}

/// Something that happened to an operation.
#[derive(Debug)]
pub struct Completion {
    /// Which.
    pub op: Op,
    /// What the caller called it.
    pub tag: u64,
    /// This was its last event: the operation is over.
    pub last: bool,
    /// What.
    pub what: CompletionKind,
}

/// See [`Completion`].
#[derive(Debug)]
pub enum CompletionKind {
    /// Bytes came; never empty.
    Data(Chunk),
    /// The peer's FIN.
    End,
    /// No buffer was to be had.
    Starved,
    /// A receive ended for no fault of the connection's: it was cancelled or
    /// interrupted.
    Stopped,
    /// A receive failed.
    Failed(i32),
    /// A send was carried on by that many bytes, which is all of them if it was
    /// the last event.
    Sent(usize),
    /// A send failed, or was cancelled (`ECANCELED`) before it had sent anything.
    SendFailed(i32),
    /// A send was cancelled after so many bytes more.
    SendCut(usize),
    /// A poll: whether the socket has failed or been hung up, or the errno of
    /// the poll itself.
    Polled(Result<bool, i32>),
}

/// What went on inside, for those who ask.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct RingCounts {
    /// Times completions had outgrown their queue.
    pub overflows: u64,
    /// Times the kernel's flag for deferred work stood for none.
    pub stale_flags: u64,
    /// Receives that found no buffer.
    pub starved: u64,
    /// Sends that came back short and were resumed.
    pub resumed: u64,
    /// Operations the kernel had no memory for, and that are tried again.
    pub short: u64,
    /// Completions that named an operation long over. Never seen.
    pub strays: u64,
}
