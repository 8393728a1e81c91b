//! Moves bulk streams through a pipe with splice(2), without copying.
//!
//! Called by the pump after [`STREAK`](super::STREAK) full reads in a row. The stream returns
//! to copying in three cases:
//!
//! - Few bytes arrive at a time. Two splices cost more than one copy.
//! - The bytes arrive in fragments that fill the pipe with little data.
//! - No pipe is available.

use super::{BYTES_PER_TURN, PIPE_FAILURES_MAX, Pump, PumpIo, PumpMode, READ_SMALL};
use crate::local_errors::StreamError;
use crate::relay::close_state::TurnBytes;
use std::io;
use tidegate_core::outcome::SessionSide;
use tidegate_net::pipe::FillResult;

/// Small or crammed fills in a row that end the bulk mode.
const SMALL_FILLS: u8 = 8;

/// What a stream needs after a bulk turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SpliceNext {
    /// Wait for the sockets.
    Wait,
    /// Another turn: its share of this one is used up.
    Again,
    /// Copy instead.
    Copy,
}

impl Pump {
    /// Moves bytes from `from` to the other side through its pipe.
    pub(super) fn forward_bulk(
        &mut self,
        from: SessionSide,
        io: &mut impl PumpIo,
        moved: &mut TurnBytes,
    ) -> SpliceNext {
        let mut budget = BYTES_PER_TURN;
        loop {
            if !self.empty_pipe(from, io, moved) {
                return SpliceNext::Wait;
            }
            if self.close.ended(from) {
                io.close_pipe(from);
                return SpliceNext::Copy;
            }
            if !self.sockets[from as usize].readable || self.close.failed(from.other()) {
                // No bytes to move: free the pipe for other sessions.
                io.close_pipe(from);
                return SpliceNext::Wait;
            }
            if self.streams[from as usize].small_fills == SMALL_FILLS {
                let stream = &mut self.streams[from as usize];
                let crammed = std::mem::take(&mut stream.last_crammed);
                stream.pipe_failures =
                    (stream.pipe_failures + u8::from(crammed)).min(PIPE_FAILURES_MAX);
                let mode = if crammed { PumpMode::CopyOnly } else { PumpMode::Copy };
                return self.copy_again(from, io, mode);
            }
            if budget == 0 {
                return SpliceNext::Again;
            }
            if !io.open_pipe(from) {
                return self.copy_again(from, io, PumpMode::CopyOnly);
            }
            match io.fill(from) {
                Ok(FillResult { bytes: 0, .. }) => {
                    // The end of the stream, or an urgent mark before it (`tcp_splice_read` in
                    // Linux). Only a read can distinguish them.
                    self.sockets[from as usize].read_to_the_end();
                    return self.copy_again(from, io, PumpMode::Copy);
                }
                Ok(fill) => {
                    budget = budget.saturating_sub(fill.bytes);
                    self.filled(from, fill, moved);
                }
                Err(error) => {
                    if let Some(mode) = self.fill_failed(from, &error, moved) {
                        return self.copy_again(from, io, mode);
                    }
                }
            }
        }
    }

    /// Handles a failed fill. Returns the new mode if the stream must be copied.
    fn fill_failed(
        &mut self,
        from: SessionSide,
        error: &io::Error,
        moved: &mut TurnBytes,
    ) -> Option<PumpMode> {
        let socket = &mut self.sockets[from as usize];
        match StreamError::of(error) {
            // splice(2) stops at an urgent mark; a read does not.
            StreamError::WouldBlock if socket.read_to_the_end => return Some(PumpMode::Copy),
            StreamError::WouldBlock => socket.readable = false,
            StreamError::Interrupted => {}
            // A copy needs less memory. EINVAL: splice(2) does not support this socket.
            StreamError::Shortage | StreamError::Broken(libc::EINVAL) => {
                return Some(PumpMode::CopyOnly);
            }
            StreamError::Broken(errno) => self.end_of(from, errno, moved),
        }
        None
    }

    /// Sends the bytes in the pipe. Returns false if some are left.
    fn empty_pipe(
        &mut self,
        from: SessionSide,
        io: &mut impl PumpIo,
        moved: &mut TurnBytes,
    ) -> bool {
        let to = from.other();
        while io.piped(from) > 0 {
            if self.close.failed(to) {
                io.close_pipe(from);
                return true;
            }
            if !self.may_send(to) {
                return false;
            }
            match io.drain(from) {
                // splice(2) cannot return 0 for a pipe that is not empty.
                Ok(0) => self.send_error(to, &io::Error::from_raw_os_error(libc::EIO)),
                Ok(sent) => self.close.sent_on(from, sent, moved),
                Err(error) => self.send_error(to, &error),
            }
        }
        true
    }

    fn filled(&mut self, from: SessionSide, fill: FillResult, moved: &mut TurnBytes) {
        self.close.received(from, fill.bytes, moved);
        let stream = &mut self.streams[from as usize];
        let small = fill.crammed || fill.bytes < READ_SMALL;
        stream.small_fills = if small { stream.small_fills + 1 } else { 0 };
        stream.last_crammed = fill.crammed;
    }

    fn copy_again(
        &mut self,
        from: SessionSide,
        io: &mut impl PumpIo,
        mode: PumpMode,
    ) -> SpliceNext {
        io.close_pipe(from);
        let stream = &mut self.streams[from as usize];
        stream.mode = mode;
        stream.streak = 0;
        stream.small_fills = 0;
        SpliceNext::Copy
    }
}
