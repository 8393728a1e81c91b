//! The two byte streams of a session: receive, send, buffer, and pass on the end.
//!
//! Driven by the epoll engine with a socket pair behind [`PumpIo`], and by tests with a
//! scripted one. It owns no socket, reads no clock and knows no timers.
//!
//! It buffers only bytes that could not be sent: at most one buffer or pipe per direction, none
//! while a session is idle, and none once the process's budget is used up.

use crate::local_errors::StreamError;
use crate::relay::close_state::{CloseState, TurnBytes, TurnNext};
use crate::relay::epoll::pump::splice::SpliceNext;
use std::io;
use tidegate_core::outcome::SessionSide;
use tidegate_net::budget::BudgetShare;
use tidegate_net::pipe::FillResult;

/// Read size of a stream that is not bulk.
pub(super) const READ_SMALL: usize = 16 * 1024;

/// Read size of a bulk stream. 64 KiB was slower than both sizes in measurements.
pub(super) const READ_BULK: usize = 256 * 1024;

/// Full reads in a row, each sent completely, after which a stream is bulk. Bulk moves through
/// a pipe, or in large reads if no pipe is available.
const STREAK: u8 = 3;

/// How often the required streak is doubled. It doubles each time a pipe was inefficient.
const PIPE_FAILURES_MAX: u8 = 4;

/// Bytes that one direction can request to read per turn. The last read can exceed it.
const BYTES_PER_TURN: usize = 1024 * 1024;

/// The sockets and pipes of a session. A pipe is named by the side that its bytes come from.
pub(super) trait PumpIo {
    /// recv(2), non-blocking.
    fn receive(&self, side: SessionSide, buffer: &mut [u8]) -> io::Result<usize>;
    /// recv(2) with `MSG_PEEK`, non-blocking: the bytes stay in the receive queue.
    fn peek(&self, side: SessionSide, buffer: &mut [u8]) -> io::Result<usize>;
    /// Whether the budget has room for `bytes` received bytes, should they need a buffer.
    fn may_keep(&self, bytes: usize) -> bool;
    /// Takes `bytes` from the budget until the share is dropped.
    fn keep(&self, bytes: usize) -> BudgetShare;
    /// send(2), non-blocking.
    fn send(&self, side: SessionSide, bytes: &[u8]) -> io::Result<usize>;
    /// shutdown(2) of the writing half.
    fn shutdown_write(&self, side: SessionSide) -> io::Result<()>;
    /// Prepares the sockets for a bulk stream from this side. Called once.
    fn expect_bulk(&self, from: SessionSide);
    /// Opens a pipe if there is none. Returns false if no pipe is available.
    fn open_pipe(&mut self, from: SessionSide) -> bool;
    /// Closes the pipe and discards the bytes in it.
    fn close_pipe(&mut self, from: SessionSide);
    /// Returns the bytes in the pipe; 0 if there is no pipe.
    fn piped(&self, from: SessionSide) -> usize;
    /// splice(2) from the socket into its empty pipe.
    fn fill(&mut self, from: SessionSide) -> io::Result<FillResult>;
    /// splice(2) from the pipe into the other side's socket.
    fn drain(&mut self, from: SessionSide) -> io::Result<usize>;
}

/// Both directions of a session.
#[derive(Debug, Default)]
pub(super) struct Pump {
    /// Indexed by the side that the bytes come from.
    streams: [PumpDirection; 2],
    /// Indexed by side.
    sockets: [PumpSocket; 2],
    pub(super) close: CloseState,
    /// A call in the last turn failed because the kernel had no memory.
    short: bool,
}

/// Last known readiness of a socket. Edge-triggered events report it only once.
#[derive(Debug, Default, Clone, Copy)]
struct PumpSocket {
    readable: bool,
    writable: bool,
    /// Read until FIN or an error: a short read does not mean that the receive queue is empty.
    read_to_the_end: bool,
}

/// Bytes from one side to the other.
#[derive(Debug, Default)]
struct PumpDirection {
    /// Bytes received and not yet sent; usually `None`.
    kept: Option<Box<UnsentBytes>>,
    /// Full reads in a row.
    streak: u8,
    /// Fills in a row that were small or crammed.
    small_fills: u8,
    last_crammed: bool,
    /// How often a pipe was inefficient.
    pipe_failures: u8,
    /// The stream has been bulk before.
    was_bulk: bool,
    mode: PumpMode,
}

/// The buffer of a direction.
#[derive(Debug)]
struct UnsentBytes {
    bytes: Vec<u8>,
    /// Length of the prefix that has been sent.
    sent: usize,
    _share: BudgetShare,
}

/// How the bytes of a stream are moved.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum PumpMode {
    /// Through the buffer. The stream can become bulk.
    #[default]
    Copy,
    /// Through the buffer, in large reads for bulk, because no pipe is available or the pipe
    /// was inefficient.
    CopyOnly,
    /// Through a pipe.
    Bulk,
}

// === impl Pump ===

impl Pump {
    /// Returns a pump for new sockets, which count as writable until a send fails.
    pub(super) fn new() -> Pump {
        let mut pump = Pump::default();
        for socket in &mut pump.sockets {
            socket.writable = true;
        }
        pump
    }

    /// Resets the state of a side for a new socket (another connect attempt).
    pub(super) fn renew(&mut self, side: SessionSide) {
        self.sockets[side as usize] = PumpSocket { writable: true, ..PumpSocket::default() };
    }

    /// Records the events of a socket.
    #[inline]
    pub(super) fn note(
        &mut self,
        side: SessionSide,
        readable: bool,
        writable: bool,
        read_to_the_end: bool,
    ) {
        let socket = &mut self.sockets[side as usize];
        socket.readable |= readable;
        socket.writable |= writable;
        socket.read_to_the_end |= read_to_the_end;
    }

    /// Whether the last send to this side found no room.
    #[inline]
    pub(super) fn is_full(&self, side: SessionSide) -> bool {
        !self.sockets[side as usize].writable
    }

    /// Moves bytes in both directions through `buffer`, of at least [`READ_BULK`] bytes.
    #[inline]
    pub(super) fn turn(
        &mut self,
        io: &mut impl PumpIo,
        buffer: &mut [u8],
        moved: &mut TurnBytes,
    ) -> TurnNext {
        self.short = false;
        let again = self.forward(SessionSide::Client, io, buffer, moved)
            | self.forward(SessionSide::Backend, io, buffer, moved);
        if let Some(ending) = self.close.ending() {
            return TurnNext::End(ending);
        }
        let again = again || self.failed_but_unread(io);
        if again && !self.short { TurnNext::Again } else { TurnNext::Wait }
    }

    /// Whether the last turn stopped because the kernel had no memory. No event follows, so
    /// the caller must schedule another turn.
    #[inline]
    pub(super) fn is_short(&self) -> bool {
        self.short
    }

    /// Whether a side failed in a send after its receive of this turn, so that bytes from it
    /// can still be unread.
    fn failed_but_unread(&self, io: &impl PumpIo) -> bool {
        SessionSide::BOTH.into_iter().any(|side| {
            self.close.failed(side)
                && self.sockets[side as usize].readable
                && !self.close.ended(side)
                && self.streams[side as usize].kept.is_none()
                && io.piped(side) == 0
                && (self.sockets[side.other() as usize].writable || io.may_keep(READ_SMALL))
        })
    }

    /// Moves bytes from `from` to the other side. Returns true if only the share of the turn
    /// stopped it.
    fn forward(
        &mut self,
        from: SessionSide,
        io: &mut impl PumpIo,
        buffer: &mut [u8],
        moved: &mut TurnBytes,
    ) -> bool {
        let to = from.other();
        let mut budget = BYTES_PER_TURN;
        while budget > 0 {
            if self.streams[from as usize].mode == PumpMode::Bulk {
                match self.forward_bulk(from, io, moved) {
                    SpliceNext::Wait => return false,
                    SpliceNext::Again => return true,
                    SpliceNext::Copy => {}
                }
            }
            if !self.send_kept(from, io, moved) {
                return false;
            }
            if self.close.ended(from) {
                self.finish(from, io);
                return false;
            }
            if !self.sockets[from as usize].readable || self.close.failed(to) {
                return false;
            }
            let size =
                if self.streams[from as usize].streak >= STREAK { READ_BULK } else { READ_SMALL };
            budget = budget.saturating_sub(size);
            if !io.may_keep(size) {
                if !self.forward_scarce(from, io, &mut buffer[..READ_SMALL], moved) {
                    return false;
                }
                continue;
            }
            match io.receive(from, &mut buffer[..size]) {
                Ok(0) => self.end_of(from, 0, moved),
                Ok(received) => {
                    self.received(from, received, size, io, moved);
                    self.send_fresh(from, io, &buffer[..received], moved);
                }
                Err(error) => {
                    if !self.receive_failed(from, &error, moved) {
                        return false;
                    }
                }
            }
        }
        true
    }

    /// Sends bytes kept from an earlier turn. Returns false if some are left.
    #[inline]
    fn send_kept(&mut self, from: SessionSide, io: &impl PumpIo, moved: &mut TurnBytes) -> bool {
        let to = from.other();
        while self.may_send(to) {
            let Some(kept) = &mut self.streams[from as usize].kept else { break };
            match io.send(to, &kept.bytes[kept.sent..]) {
                Ok(sent) => {
                    kept.sent += sent;
                    let all = kept.sent == kept.bytes.len();
                    self.close.sent_on(from, sent, moved);
                    if all {
                        // Free the buffer: an idle session holds none.
                        self.streams[from as usize].kept = None;
                        return true;
                    }
                    // A short send(2) means that the send queue is full.
                    self.sockets[to as usize].writable = false;
                }
                Err(error) => self.send_error(to, &error),
            }
        }
        let stream = &mut self.streams[from as usize];
        if self.close.failed(to) {
            stream.kept = None;
        }
        stream.kept.is_none()
    }

    /// Sends bytes just received and keeps the unsent rest.
    #[inline]
    fn send_fresh(
        &mut self,
        from: SessionSide,
        io: &impl PumpIo,
        bytes: &[u8],
        moved: &mut TurnBytes,
    ) {
        let to = from.other();
        let mut sent = 0;
        while sent < bytes.len() && self.may_send(to) {
            match io.send(to, &bytes[sent..]) {
                Ok(more) => {
                    self.close.sent_on(from, more, moved);
                    sent += more;
                    self.sockets[to as usize].writable = sent == bytes.len();
                }
                Err(error) => self.send_error(to, &error),
            }
        }
        if sent < bytes.len() && !self.close.failed(to) {
            let stream = &mut self.streams[from as usize];
            // The receiver is the bottleneck, so large reads would only use memory.
            stream.streak = 0;
            stream.mode = if stream.mode == PumpMode::Bulk { PumpMode::Copy } else { stream.mode };
            let rest = &bytes[sent..];
            let _share = io.keep(rest.len());
            stream.kept = Some(Box::new(UnsentBytes { bytes: rest.to_vec(), sent: 0, _share }));
        }
    }

    #[inline]
    fn may_send(&self, to: SessionSide) -> bool {
        self.sockets[to as usize].writable && !self.close.failed(to) && !self.short
    }

    fn received(
        &mut self,
        from: SessionSide,
        received: usize,
        size: usize,
        io: &impl PumpIo,
        moved: &mut TurnBytes,
    ) {
        self.close.received(from, received, moved);
        let stream = &mut self.streams[from as usize];
        if received == size {
            stream.streak = stream.streak.saturating_add(1);
            if stream.streak == STREAK << stream.pipe_failures && stream.mode == PumpMode::Copy {
                stream.mode = PumpMode::Bulk;
                if !std::mem::replace(&mut stream.was_bulk, true) {
                    io.expect_bulk(from);
                }
            }
        } else {
            stream.streak = 0;
            // The next bulk tries a pipe again.
            stream.mode = PumpMode::Copy;
            let socket = &mut self.sockets[from as usize];
            // After a short read the receive queue is empty (epoll(7)), unless a FIN, a RST or
            // an urgent mark follows the bytes.
            socket.readable = socket.read_to_the_end;
        }
    }

    /// Handles a failed receive. Returns whether to call `forward`'s loop again.
    fn receive_failed(
        &mut self,
        from: SessionSide,
        error: &io::Error,
        moved: &mut TurnBytes,
    ) -> bool {
        match StreamError::of(error) {
            StreamError::WouldBlock => self.sockets[from as usize].readable = false,
            StreamError::Shortage => self.short = true,
            StreamError::Interrupted => return true,
            StreamError::Broken(errno) => {
                self.end_of(from, errno, moved);
                return true;
            }
        }
        false
    }

    /// Records the end of a side: a FIN if `errno` is 0, else a failure.
    fn end_of(&mut self, from: SessionSide, errno: i32, moved: &mut TurnBytes) {
        self.sockets[from as usize].readable = false;
        self.close.end_of(from, errno, moved);
    }

    fn finish(&mut self, from: SessionSide, io: &impl PumpIo) {
        let to = from.other();
        if self.close.finish(from, || io.shutdown_write(to)) {
            self.sockets[to as usize].read_to_the_end();
        }
    }

    fn send_error(&mut self, to: SessionSide, error: &io::Error) {
        let socket = &mut self.sockets[to as usize];
        match StreamError::of(error) {
            StreamError::WouldBlock => socket.writable = false,
            StreamError::Shortage => self.short = true,
            StreamError::Interrupted => {}
            StreamError::Broken(errno) => {
                socket.read_to_the_end();
                self.close.send_failed(to, errno);
            }
        }
    }
}

// === impl PumpSocket ===

impl PumpSocket {
    /// Sets the socket to be read until its end, because bytes that it sent before a failed
    /// send to it can still be unread.
    fn read_to_the_end(&mut self) {
        self.readable = true;
        self.read_to_the_end = true;
    }
}

mod low_memory;
mod splice;
#[cfg(test)]
mod tests;
