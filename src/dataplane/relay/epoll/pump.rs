//! One session's two byte streams: what to read, what to send, what is kept,
//! when a FIN or a reset is passed on.
//!
//! Driven by the epoll engine with a socket pair behind [`PumpIo`], and by
//! tests with a scripted one. It owns no socket, reads no clock and knows no
//! timers. Bytes that could not be sent are the only thing it ever keeps: at
//! most one buffer or pipe a direction, none while a session is idle, and none
//! anew once the process's budget is spent.

use crate::local_errors::StreamError;
use crate::relay::close_state::{CloseState, TurnBytes, TurnNext};
use crate::relay::epoll::pump::splice::SpliceNext;
use std::io;
use tidegate_core::outcome::SessionSide;
use tidegate_net::budget::BudgetShare;
use tidegate_net::pipe::FillResult;

/// Read size until a stream proves to be bulk.
pub(super) const READ_SMALL: usize = 16 * 1024;

/// Read size of a bulk stream. 64 KiB in between measured worse than either.
pub(super) const READ_BULK: usize = 256 * 1024;

/// Full reads in a row, none of them held up by the receiver, that make a
/// stream bulk: it moves through a pipe, or where there is none in big reads.
const STREAK: u8 = 3;

/// Each time a pipe was no use, the next has to wait for twice as many; so many
/// times at most.
const CRAMMED_MAX: u8 = 4;

/// What one direction may ask to read before other sessions get their turn; the
/// last read may go beyond it.
const BYTES_A_TURN: usize = 1024 * 1024;

/// The two sockets and their pipes, as the pump sees them. A pipe is named by
/// the side its bytes come from.
pub(super) trait PumpIo {
    /// recv(2), non-blocking.
    fn receive(&self, side: SessionSide, buffer: &mut [u8]) -> io::Result<usize>;
    /// The same, and what was received stays to be received.
    fn peek(&self, side: SessionSide, buffer: &mut [u8]) -> io::Result<usize>;
    /// Whether so many bytes may be received that may have to be kept.
    fn may_keep(&self, bytes: usize) -> bool;
    /// Bytes are kept, as long as the share lives.
    fn keep(&self, bytes: usize) -> BudgetShare;
    /// send(2), non-blocking.
    fn send(&self, side: SessionSide, bytes: &[u8]) -> io::Result<usize>;
    /// shutdown(2) of the writing half.
    fn shutdown_write(&self, side: SessionSide) -> io::Result<()>;
    /// Much is going to be received from that side, and sent to the other. Said
    /// once.
    fn expect_bulk(&self, from: SessionSide);
    /// Makes sure there is a pipe; false where none is to be had.
    fn open_pipe(&mut self, from: SessionSide) -> bool;
    /// Gives the pipe up, and what is in it.
    fn close_pipe(&mut self, from: SessionSide);
    /// Bytes in the pipe; 0 where there is none.
    fn piped(&self, from: SessionSide) -> usize;
    /// splice(2) from the socket into its empty pipe.
    fn fill(&mut self, from: SessionSide) -> io::Result<FillResult>;
    /// splice(2) from the pipe into the other side's socket.
    fn drain(&mut self, from: SessionSide) -> io::Result<usize>;
}

/// Both directions of a session.
#[derive(Debug, Default)]
pub(super) struct Pump {
    /// Indexed by the side the bytes come from.
    streams: [PumpDirection; 2],
    /// Indexed by side.
    sockets: [PumpSocket; 2],
    pub(super) close: CloseState,
    /// A call of the last turn failed for want of memory.
    short: bool,
}

/// What is known of one socket; edge-triggered, so it must be remembered.
#[derive(Debug, Default, Clone, Copy)]
struct PumpSocket {
    readable: bool,
    writable: bool,
    /// Reads go on until they say FIN or error themselves: a short read no
    /// longer means "drained".
    read_to_the_end: bool,
}

/// Bytes from one side on their way to the other.
#[derive(Debug, Default)]
struct PumpDirection {
    /// Received and not yet sent; mostly none.
    kept: Option<Box<UnsentBytes>>,
    /// Full reads in a row.
    streak: u8,
    /// Fills in a row that were less than a full read, or crammed.
    small_fills: u8,
    last_crammed: bool,
    /// How often the pipe turned out to be no use.
    crammed: u8,
    /// It was bulk before.
    announced: bool,
    mode: PumpMode,
}

/// The one buffer of a direction.
#[derive(Debug)]
struct UnsentBytes {
    bytes: Vec<u8>,
    /// How much of it is sent.
    sent: usize,
    _share: BudgetShare,
}

/// How a stream's bytes are moved.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum PumpMode {
    /// Through the buffer; bulk is noticed.
    #[default]
    Copy,
    /// Through the buffer, in big reads for bulk: a pipe could not be had, or
    /// was no use.
    CopyOnly,
    /// Through a pipe.
    Bulk,
}

// === impl Pump ===

impl Pump {
    /// Fresh sockets: writable until they say otherwise.
    pub(super) fn new() -> Pump {
        let mut pump = Pump::default();
        for socket in &mut pump.sockets {
            socket.writable = true;
        }
        pump
    }

    /// That side has a new socket (another connect attempt).
    pub(super) fn renew(&mut self, side: SessionSide) {
        self.sockets[side as usize] = PumpSocket { writable: true, ..PumpSocket::default() };
    }

    /// Notes what a socket reported.
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

    /// Whether that side has no room, as far as is known.
    #[inline]
    pub(super) fn is_full(&self, side: SessionSide) -> bool {
        !self.sockets[side as usize].writable
    }

    /// Moves what can be moved, through `buffer` (at least [`READ_BULK`]).
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

    /// Whether the last turn stopped for want of memory: no socket will tell when
    /// to go on, so another turn is to be tried later.
    #[inline]
    pub(super) fn is_short(&self) -> bool {
        self.short
    }

    /// A side that failed while it was sent to, after its own turn to be read.
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

    /// Moves bytes from `from` to the other side; true when it stopped only
    /// because its share was used up.
    fn forward(
        &mut self,
        from: SessionSide,
        io: &mut impl PumpIo,
        buffer: &mut [u8],
        moved: &mut TurnBytes,
    ) -> bool {
        let to = from.other();
        let mut budget = BYTES_A_TURN;
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

    /// Sends what an earlier turn had to keep; false while some of it is left.
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
                        // Freed, not cleared: an idle session holds no buffer.
                        self.streams[from as usize].kept = None;
                        return true;
                    }
                    // send(2) took less than it was given: no more room.
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

    /// Sends what was just received, and keeps what does not go out.
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
            // The receiver is the bottleneck: big reads would only pin memory.
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
            if stream.streak == STREAK << stream.crammed && stream.mode == PumpMode::Copy {
                stream.mode = PumpMode::Bulk;
                if !std::mem::replace(&mut stream.announced, true) {
                    io.expect_bulk(from);
                }
            }
        } else {
            stream.streak = 0;
            // The next bulk may find a pipe again.
            stream.mode = PumpMode::Copy;
            let socket = &mut self.sockets[from as usize];
            // A short read drained the socket (epoll(7)), unless something
            // stands behind what was read: FIN, RST or an urgent mark.
            socket.readable = socket.read_to_the_end;
        }
    }

    /// Whether `from` is worth another look.
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

    /// `from` will send no more: FIN, or a failure with its errno.
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
    /// Sending to it failed; whatever it had sent before is still to be read.
    fn read_to_the_end(&mut self) {
        self.readable = true;
        self.read_to_the_end = true;
    }
}

mod low_memory;
mod splice;
#[cfg(test)]
mod tests;
