//! Bulk streams: through a pipe, without copying.
//!
//! A stream comes here after a few full reads in a row and goes back to copying
//! when little arrives at a time, when it arrives in pieces that fill the pipe
//! with little, or when there is no pipe for it. Small messages never come here:
//! two splices cost more than one copy.

use super::{
    BYTES_A_TURN, CRAMMED_MAX, Pump, PumpIo, PumpMode, READ_SMALL, errno_of, is_would_block,
};
use crate::local_errors;
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
                io.close_pipe(from);
                let stream = &mut self.streams[from as usize];
                let crammed = std::mem::take(&mut stream.last_crammed);
                stream.crammed = (stream.crammed + u8::from(crammed)).min(CRAMMED_MAX);
                let mode = if crammed { PumpMode::CopyOnly } else { PumpMode::Copy };
                return self.copy_again(from, mode);
            }
            if budget == 0 {
                return SpliceNext::Again;
            }
            if !io.open_pipe(from) {
                return self.copy_again(from, PumpMode::CopyOnly);
            }
            match io.fill(from) {
                Ok(FillResult { bytes: 0, .. }) => {
                    // The end, or an urgent mark that an end stands behind
                    // (`tcp_splice_read` in Linux): a read knows.
                    self.sockets[from as usize].read_to_the_end();
                    io.close_pipe(from);
                    return self.copy_again(from, PumpMode::Copy);
                }
                Ok(fill) => {
                    budget = budget.saturating_sub(fill.bytes);
                    self.filled(from, fill, moved);
                }
                Err(error) if is_would_block(&error) => {
                    let socket = &mut self.sockets[from as usize];
                    if socket.read_to_the_end {
                        // splice(2) stops at an urgent mark; a read goes on.
                        io.close_pipe(from);
                        return self.copy_again(from, PumpMode::Copy);
                    }
                    socket.readable = false;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    // This kind of socket cannot be spliced (splice(2)).
                    io.close_pipe(from);
                    return self.copy_again(from, PumpMode::CopyOnly);
                }
                Err(error) if local_errors::is_shortage(&error) => {
                    // A copy needs less.
                    io.close_pipe(from);
                    return self.copy_again(from, PumpMode::CopyOnly);
                }
                Err(error) => self.end_of(from, errno_of(&error), moved),
            }
        }
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

    fn copy_again(&mut self, from: SessionSide, mode: PumpMode) -> SpliceNext {
        let stream = &mut self.streams[from as usize];
        stream.mode = mode;
        stream.streak = 0;
        stream.small_fills = 0;
        SpliceNext::Copy
    }
}
