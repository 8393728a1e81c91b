//! Bulk streams: through a pipe, without copying.
//!
//! A stream comes here after a few full reads in a row and goes back to copying
//! when little arrives at a time, when it arrives in pieces that fill the pipe
//! with little, or when there is no pipe for it. Small messages never come here:
//! two splices cost more than one copy.

use super::{BYTES_A_TURN, CRAMMED_MAX, Pump, PumpIo, PumpMode, READ_SMALL};
use crate::local_errors::StreamError;
use crate::relay::close_state::TurnBytes;
use std::io;
use tidegate_core::outcome::SessionSide;
use tidegate_net::pipe::FillResult;

/// Small fills in a row that end the bulk mode.
const SMALL_FILLS: u8 = 8;

/// What a bulk turn leaves to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SpliceNext {
    /// Wait for the sockets.
    Wait,
    /// Its share of this round is used up.
    Again,
    /// The stream is to be copied from now on.
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
        let mut budget = BYTES_A_TURN;
        loop {
            if !self.empty_pipe(from, io, moved) {
                return SpliceNext::Wait;
            }
            if self.close.ended(from) {
                io.close_pipe(from);
                return SpliceNext::Copy;
            }
            if !self.sockets[from as usize].readable || self.close.failed(from.other()) {
                // Nothing to move: others may use the pipe.
                io.close_pipe(from);
                return SpliceNext::Wait;
            }
            if self.streams[from as usize].small_fills == SMALL_FILLS {
                let stream = &mut self.streams[from as usize];
                let crammed = std::mem::take(&mut stream.last_crammed);
                stream.crammed = (stream.crammed + u8::from(crammed)).min(CRAMMED_MAX);
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
                    // The end, or an urgent mark that an end stands behind
                    // (`tcp_splice_read` in Linux): a read knows.
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

    /// How the stream continues where it does not by splice(2).
    fn fill_failed(
        &mut self,
        from: SessionSide,
        error: &io::Error,
        moved: &mut TurnBytes,
    ) -> Option<PumpMode> {
        let socket = &mut self.sockets[from as usize];
        match StreamError::of(error) {
            // It stops at an urgent mark; a read does not.
            StreamError::WouldBlock if socket.read_to_the_end => return Some(PumpMode::Copy),
            StreamError::WouldBlock => socket.readable = false,
            StreamError::Interrupted => {}
            // A copy needs less memory; EINVAL: this kind of socket cannot be spliced.
            StreamError::Shortage | StreamError::Broken(libc::EINVAL) => {
                return Some(PumpMode::CopyOnly);
            }
            StreamError::Broken(errno) => self.end_of(from, errno, moved),
        }
        None
    }

    /// Sends what is in the pipe; false while some of it is left.
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
                // Not to be had from a pipe that holds something.
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
