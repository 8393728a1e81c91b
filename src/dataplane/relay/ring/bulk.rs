//! Bulk streams on the ring: through a pipe, without copying.
//!
//! A stream comes here after a few full buffers in a row, once all of them are
//! sent, and goes back to receives when little arrives at a time, when it arrives
//! in pieces that fill the pipe with little, or when there is no pipe for it. The
//! ring only tells when to go on: splice(2) itself is a plain call, as one by the
//! ring measured the same. Small messages never come here.

use super::streams::{OpResult, OpUse, RingMode, RingSession, SHUNNED_MAX};
use crate::local_errors::StreamError;
use crate::relay::close_state::TurnBytes;
use tidegate_core::outcome::SessionSide;
use tidegate_net::pipe::{FillResult, Pipes};
use tidegate_net::ring::{BUFFER_LEN, Ring};

/// Small or crammed fills in a row, or wake-ups that brought nothing, that end
/// bulk.
const SMALL_FILLS: u8 = 8;

/// What one direction may move before other sessions get their turn; the last
/// fill may go beyond it.
const BYTES_A_TURN: usize = 1024 * 1024;

/// What a fill leaves to do.
enum FillOutcome {
    /// Pass that on.
    Some(usize),
    /// There is nothing to receive now.
    Nothing,
    /// The side has failed.
    Failed,
    /// The end, or an urgent mark that an end stands behind (`tcp_splice_read` in
    /// Linux): a receive knows.
    Unclear,
    /// No pipe, or none of use to this socket.
    NoPipe,
}

impl RingSession {
    /// Moves bytes from `from` to the other side through a pipe, until a socket
    /// or the turn's share says stop. `readable` is whether it was woken for
    /// bytes to receive.
    pub(super) fn splice(
        &mut self,
        key: u32,
        from: SessionSide,
        mut readable: bool,
        ring: &mut Ring,
        pipes: &mut Pipes,
        moved: &mut TurnBytes,
    ) -> OpResult {
        let mut budget = BYTES_A_TURN;
        loop {
            match self.empty_pipe(from, moved) {
                Ok(()) => {}
                Err(StreamError::WouldBlock | StreamError::Interrupted) => {
                    self.wait(key, from, OpUse::Writable, ring);
                    return OpResult::Nothing;
                }
                Err(StreamError::Shortage) => {
                    self.streams[from as usize].short = true;
                    return OpResult::Short(from);
                }
                Err(StreamError::Broken(errno)) => return self.send_failed(from, errno, ring),
            }
            if self.close.failed(from.other()) {
                break;
            }
            if self.streams[from as usize].streak >= SMALL_FILLS {
                self.leave_bulk(from);
                break;
            }
            if budget == 0 {
                self.wait(key, from, OpUse::Readable, ring);
                break;
            }
            match self.fill(from, pipes, moved) {
                FillOutcome::Some(bytes) => budget = budget.saturating_sub(bytes),
                FillOutcome::Nothing => {
                    // An urgent mark is readable, but not by splice.
                    self.streams[from as usize].streak += u8::from(readable);
                    self.wait(key, from, OpUse::Readable, ring);
                    break;
                }
                FillOutcome::Failed => break,
                FillOutcome::Unclear => {
                    self.leave_bulk(from);
                    break;
                }
                FillOutcome::NoPipe => {
                    self.streams[from as usize].crammed = true;
                    self.leave_bulk(from);
                    break;
                }
            }
            readable = false;
        }
        self.give_back_pipe(from, pipes);
        OpResult::Nothing
    }

    /// Sends all that is in the pipe.
    fn empty_pipe(&mut self, from: SessionSide, moved: &mut TurnBytes) -> Result<(), StreamError> {
        let Some(pipe) = &mut self.streams[from as usize].pipe else { return Ok(()) };
        let Some(to) = &self.sockets[from.other() as usize] else { return Ok(()) };
        while pipe.holds() > 0 {
            match pipe.drain(to) {
                // Not to be had from a pipe that holds something.
                Ok(0) => return Err(StreamError::Broken(libc::EIO)),
                Ok(sent) => self.close.sent_on(from, sent, moved),
                Err(error) => match StreamError::of(&error) {
                    StreamError::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }

    /// Receives into an empty pipe.
    fn fill(&mut self, from: SessionSide, pipes: &mut Pipes, moved: &mut TurnBytes) -> FillOutcome {
        let stream = &mut self.streams[from as usize];
        let Some(socket) = &self.sockets[from as usize] else { return FillOutcome::Nothing };
        if stream.pipe.is_none() {
            stream.pipe = pipes.take().map(Box::new);
        }
        let Some(pipe) = &mut stream.pipe else { return FillOutcome::NoPipe };
        let filled = loop {
            match pipe.fill(socket).map_err(|error| StreamError::of(&error)) {
                Err(StreamError::Interrupted) => {}
                filled => break filled,
            }
        };
        match filled {
            Ok(FillResult { bytes: 0, .. }) => FillOutcome::Unclear,
            Ok(FillResult { bytes, crammed }) => {
                self.close.received(from, bytes, moved);
                let small = crammed || bytes < BUFFER_LEN;
                stream.streak = if small { stream.streak + 1 } else { 0 };
                stream.crammed = crammed;
                FillOutcome::Some(bytes)
            }
            Err(StreamError::WouldBlock | StreamError::Interrupted) => FillOutcome::Nothing,
            // A receive needs less memory; EINVAL: this kind of socket cannot be spliced
            // (splice(2)).
            Err(StreamError::Shortage | StreamError::Broken(libc::EINVAL)) => FillOutcome::NoPipe,
            Err(StreamError::Broken(errno)) => {
                self.end_of(from, errno, moved);
                FillOutcome::Failed
            }
        }
    }

    /// From now on by receives, the first of which is armed by the caller.
    fn leave_bulk(&mut self, from: SessionSide) {
        let stream = &mut self.streams[from as usize];
        stream.mode = RingMode::Ring;
        stream.streak = 0;
        if std::mem::take(&mut stream.crammed) {
            stream.shunned = (stream.shunned + 1).min(SHUNNED_MAX);
        }
    }

    /// Others may use it. One that still holds something stays.
    fn give_back_pipe(&mut self, from: SessionSide, pipes: &mut Pipes) {
        if let Some(pipe) = self.streams[from as usize].pipe.take_if(|pipe| pipe.holds() == 0) {
            pipes.give_back(*pipe);
        }
    }
}
