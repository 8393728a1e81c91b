//! One session's two byte streams: what to read, what to send, what is kept,
//! when a FIN or a reset is passed on.
//!
//! Driven by the readiness engine with a socket pair behind [`Io`], and by
//! tests with a scripted one. It owns no socket, reads no clock and knows no
//! timers. Bytes that could not be sent are the only thing it ever keeps: at
//! most one buffer a direction, none while a session is idle.

use crate::proxy::close::{Cause, Ending, Phase, Side};
use std::io;

/// Read size until a stream proves to be bulk.
pub(super) const READ_SMALL: usize = 16 * 1024;

/// Read size of a bulk stream. 64 KiB in between measured worse than either.
pub(super) const READ_BULK: usize = 256 * 1024;

/// Full reads in a row, none of them held up by the receiver, that make a
/// stream bulk.
const STREAK: u8 = 3;

/// What one direction may ask to read before other sessions get their turn; the
/// last read may go beyond it.
const BYTES_A_TURN: usize = 1024 * 1024;

/// The two sockets, as the pump sees them.
pub(super) trait Io {
    /// recv(2), non-blocking.
    fn receive(&self, side: Side, buffer: &mut [u8]) -> io::Result<usize>;
    /// send(2), non-blocking.
    fn send(&self, side: Side, bytes: &[u8]) -> io::Result<usize>;
    /// shutdown(2) of the writing half.
    fn shutdown_write(&self, side: Side) -> io::Result<()>;
}

/// Both directions of a session.
#[derive(Debug, Default)]
pub(super) struct Pump {
    /// Indexed by the side the bytes come from.
    streams: [Stream; 2],
    /// Indexed by side.
    sockets: [Socket; 2],
    /// Which side ended first.
    closed_first: Option<Side>,
}

/// What is known of one socket; edge-triggered, so it must be remembered.
#[derive(Debug, Default, Clone, Copy)]
struct Socket {
    readable: bool,
    writable: bool,
    /// Reads go on until they say FIN or error themselves: a short read no
    /// longer means "drained".
    read_to_the_end: bool,
    /// The errno that ended it; 0 while it is well.
    failure: i32,
}

/// Bytes from one side on their way to the other.
#[derive(Debug, Default)]
struct Stream {
    /// Received and not yet sent; empty (and unallocated) mostly.
    kept: Vec<u8>,
    /// How much of `kept` is sent.
    sent: usize,
    bytes: u64,
    /// Full reads in a row.
    streak: u8,
    /// FIN (or the end by failure) was received.
    ended: bool,
    /// FIN was passed on.
    finished: bool,
}

/// What one turn did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Moved {
    /// Bytes received from each side, by [`Side`] number.
    pub(super) received: [u64; 2],
    /// Bytes were sent somewhere.
    pub(super) sent: bool,
    /// A side's FIN was seen this turn.
    pub(super) ended: bool,
}

/// What a turn asks for next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Wait for the sockets.
    Wait,
    /// Its share of this round is used up: turn again soon.
    Again,
    /// Over.
    End(Ending),
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
    pub(super) fn renew(&mut self, side: Side) {
        self.sockets[side as usize] = Socket { writable: true, ..Socket::default() };
    }

    /// Notes what a socket reported.
    #[inline]
    pub(super) fn note(
        &mut self,
        side: Side,
        readable: bool,
        writable: bool,
        read_to_the_end: bool,
    ) {
        let socket = &mut self.sockets[side as usize];
        socket.readable |= readable;
        socket.writable |= writable;
        socket.read_to_the_end |= read_to_the_end;
    }

    /// Notes that a side's connection has failed while bytes from it still wait
    /// for the other to take them; true when that is news. The failure itself is
    /// read in its turn, but nobody waits for more than the half-closed time.
    pub(super) fn note_failure(&mut self, side: Side) -> bool {
        let news = self.closed_first.is_none();
        self.closed_first.get_or_insert(side);
        news
    }

    /// Bytes received from that side so far.
    pub(super) fn bytes_from(&self, side: Side) -> u64 {
        self.streams[side as usize].bytes
    }

    /// Which side ended first, if one did.
    pub(super) fn closed_first(&self) -> Option<Side> {
        self.closed_first
    }

    /// How far the session has come.
    pub(super) fn phase(&self) -> Phase {
        match self.streams.iter().filter(|stream| stream.ended).count() {
            0 => Phase::Data,
            1 => Phase::HalfClosed,
            _ => Phase::Closed,
        }
    }

    /// Moves what can be moved, through `buffer` (at least [`READ_BULK`]).
    #[inline]
    pub(super) fn turn(&mut self, io: &impl Io, buffer: &mut [u8], moved: &mut Moved) -> Next {
        let again = self.forward(Side::Client, io, buffer, moved)
            | self.forward(Side::Backend, io, buffer, moved);
        if let Some(ending) = self.ending() {
            return Next::End(ending);
        }
        if again || self.failed_but_unread() { Next::Again } else { Next::Wait }
    }

    /// A side that failed while it was sent to, after its own turn to be read.
    fn failed_but_unread(&self) -> bool {
        Side::BOTH.into_iter().any(|side| {
            let socket = &self.sockets[side as usize];
            socket.failure != 0
                && socket.readable
                && !self.streams[side as usize].ended
                && self.streams[side as usize].kept.is_empty()
        })
    }

    /// Moves bytes from `from` to the other side; true when it stopped only
    /// because its share was used up.
    fn forward(&mut self, from: Side, io: &impl Io, buffer: &mut [u8], moved: &mut Moved) -> bool {
        let to = from.other();
        let mut budget = BYTES_A_TURN;
        while budget > 0 {
            if !self.send_kept(from, io, moved) {
                return false;
            }
            let stream = &mut self.streams[from as usize];
            if stream.ended {
                self.finish(from, io);
                return false;
            }
            if !self.sockets[from as usize].readable || self.sockets[to as usize].failure != 0 {
                return false;
            }
            let size = if stream.streak >= STREAK { READ_BULK } else { READ_SMALL };
            budget = budget.saturating_sub(size);
            match io.receive(from, &mut buffer[..size]) {
                Ok(0) => self.end_of(from, 0, moved),
                Ok(received) => {
                    self.received(from, received, size, moved);
                    self.send_fresh(from, io, &buffer[..received], moved);
                }
                Err(error) if is_would_block(&error) => {
                    self.sockets[from as usize].readable = false;
                    return false;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => self.end_of(from, errno_of(&error), moved),
            }
        }
        true
    }

    /// Sends what an earlier turn had to keep; false while some of it is left.
    #[inline]
    fn send_kept(&mut self, from: Side, io: &impl Io, moved: &mut Moved) -> bool {
        let to = from.other();
        let stream = &mut self.streams[from as usize];
        if stream.kept.is_empty() {
            return true;
        }
        let socket = &mut self.sockets[to as usize];
        while socket.writable && socket.failure == 0 {
            match io.send(to, &stream.kept[stream.sent..]) {
                Ok(sent) => {
                    moved.sent = true;
                    stream.sent += sent;
                    if stream.sent == stream.kept.len() {
                        // Freed, not cleared: an idle session holds no buffer.
                        stream.kept = Vec::new();
                        stream.sent = 0;
                        return true;
                    }
                    // send(2) took less than it was given: no more room.
                    socket.writable = false;
                }
                Err(error) => note_send_error(socket, &error),
            }
        }
        if socket.failure != 0 {
            stream.kept = Vec::new();
            stream.sent = 0;
            self.closed_first.get_or_insert(to);
        }
        socket.failure != 0
    }

    /// Sends what was just received, and keeps what does not go out.
    #[inline]
    fn send_fresh(&mut self, from: Side, io: &impl Io, bytes: &[u8], moved: &mut Moved) {
        let to = from.other();
        let stream = &mut self.streams[from as usize];
        let socket = &mut self.sockets[to as usize];
        let mut sent = 0;
        while sent < bytes.len() && socket.writable && socket.failure == 0 {
            match io.send(to, &bytes[sent..]) {
                Ok(more) => {
                    moved.sent = true;
                    sent += more;
                    socket.writable = sent == bytes.len();
                }
                Err(error) => note_send_error(socket, &error),
            }
        }
        if socket.failure != 0 {
            self.closed_first.get_or_insert(to);
        } else if sent < bytes.len() {
            // The receiver is the bottleneck: big reads would only pin memory.
            stream.streak = 0;
            stream.kept = bytes[sent..].to_vec();
        }
    }

    fn received(&mut self, from: Side, received: usize, size: usize, moved: &mut Moved) {
        let stream = &mut self.streams[from as usize];
        stream.bytes += received as u64;
        moved.received[from as usize] += received as u64;
        if received == size {
            stream.streak = stream.streak.saturating_add(1);
        } else {
            stream.streak = 0;
            let socket = &mut self.sockets[from as usize];
            // A short read drained the socket (epoll(7)), unless something
            // stands behind what was read: FIN, RST or an urgent mark.
            socket.readable = socket.read_to_the_end;
        }
    }

    /// `from` will send no more: FIN, or a failure with its errno.
    fn end_of(&mut self, from: Side, errno: i32, moved: &mut Moved) {
        self.streams[from as usize].ended = true;
        self.sockets[from as usize].readable = false;
        self.closed_first.get_or_insert(from);
        moved.ended = true;
        if errno != 0 {
            self.sockets[from as usize].failure = errno;
        }
    }

    /// Passes a FIN on, once everything before it is sent. A failure is not a
    /// FIN: it ends the session and is passed on as a reset.
    fn finish(&mut self, from: Side, io: &impl Io) {
        let to = from.other();
        let stream = &mut self.streams[from as usize];
        if stream.finished {
            return;
        }
        stream.finished = true;
        if self.sockets[from as usize].failure != 0 {
            return;
        }
        let socket = &mut self.sockets[to as usize];
        if let Err(error) = io.shutdown_write(to)
            && socket.failure == 0
        {
            socket.fail(errno_of(&error));
            self.closed_first.get_or_insert(to);
        }
    }

    /// The verdict, once nothing is left to move.
    fn ending(&self) -> Option<Ending> {
        let (phase, closed_first) = (self.phase(), self.closed_first);
        let both_failed = self.sockets.iter().all(|socket| socket.failure != 0);
        // The side that was first to end is to blame for the session's end.
        let first = closed_first.unwrap_or(Side::Client);
        for side in [first, first.other()] {
            let socket = &self.sockets[side as usize];
            // What a failed side had sent before is still delivered, unless
            // the other has failed, too.
            if socket.failure != 0 && (both_failed || self.streams[side as usize].finished) {
                let cause = Cause::of_failure(side, socket.failure);
                return Some(Ending { cause, phase, errno: socket.failure, closed_first });
            }
        }
        let over = self.streams.iter().all(|stream| stream.finished);
        over.then_some(Ending { cause: Cause::Finished, phase, errno: 0, closed_first })
    }
}

// === impl Socket ===

impl Socket {
    /// Sending to it failed; whatever it had sent before is still to be read.
    fn fail(&mut self, errno: i32) {
        self.failure = errno;
        self.readable = true;
        self.read_to_the_end = true;
    }
}

fn note_send_error(socket: &mut Socket, error: &io::Error) {
    if is_would_block(error) {
        socket.writable = false;
    } else if error.kind() != io::ErrorKind::Interrupted {
        socket.fail(errno_of(error));
    }
}

fn is_would_block(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

fn errno_of(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

#[cfg(test)]
mod tests;
