//! Moves bulk streams of the ring engine through a pipe with splice(2), without copying.
//!
//! Called by `streams` after a few full buffers in a row, once they are sent. The ring only
//! reports readiness. splice(2) is a system call: as a ring operation it was not faster in
//! measurements. The stream returns to receives in three cases:
//!
//! - Few bytes arrive at a time.
//! - The bytes arrive in fragments that fill the pipe with little data.
//! - No pipe is available.

use super::streams::{OpResult, OpUse, PIPE_FAILURES_MAX, RingMode, RingSession};
use crate::local_errors::StreamError;
use crate::relay::close_state::TurnBytes;
use tidegate_core::outcome::SessionSide;
use tidegate_net::pipe::{FillResult, Pipes};
use tidegate_net::ring::{BUFFER_LEN, Ring};

/// Small or crammed fills in a row, or wake-ups without bytes, that end bulk.
const SMALL_FILLS: u8 = 8;

/// Bytes that one direction can move per turn. The last fill can exceed it.
const BYTES_PER_TURN: usize = 1024 * 1024;

/// Result of a fill.
enum FillOutcome {
    /// This many bytes are in the pipe.
    Some(usize),
    /// No bytes to receive now.
    Nothing,
    /// The side has failed.
    Failed,
    /// The end of the stream, or an urgent mark before it (`tcp_splice_read` in Linux). Only a
    /// receive can distinguish them.
    Unclear,
    /// No pipe is available, or the socket does not support splice(2).
    NoPipe,
}

impl RingSession {
    /// Moves bytes from `from` to the other side through a pipe, until a socket or the share of
    /// the turn stops it. `readable`: a readable event caused this turn.
    pub(super) fn splice(
        &mut self,
        key: u32,
        from: SessionSide,
        mut readable: bool,
        ring: &mut Ring,
        pipes: &mut Pipes,
        moved: &mut TurnBytes,
    ) -> OpResult {
        let mut budget = BYTES_PER_TURN;
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
                    // An urgent mark makes the socket readable, but splice(2) stops at it.
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
                    self.streams[from as usize].pipe_failed = true;
                    self.leave_bulk(from);
                    break;
                }
            }
            readable = false;
        }
        self.give_back_pipe(from, pipes);
        OpResult::Nothing
    }

    /// Sends all bytes in the pipe.
    fn empty_pipe(&mut self, from: SessionSide, moved: &mut TurnBytes) -> Result<(), StreamError> {
        let Some(pipe) = &mut self.streams[from as usize].pipe else { return Ok(()) };
        let Some(to) = &self.sockets[from.other() as usize] else { return Ok(()) };
        while pipe.holds() > 0 {
            match pipe.drain(to) {
                // splice(2) cannot return 0 for a pipe that is not empty.
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
                stream.pipe_failed = crammed;
                FillOutcome::Some(bytes)
            }
            Err(StreamError::WouldBlock | StreamError::Interrupted) => FillOutcome::Nothing,
            // A receive needs less memory. EINVAL: splice(2) does not support this socket.
            Err(StreamError::Shortage | StreamError::Broken(libc::EINVAL)) => FillOutcome::NoPipe,
            Err(StreamError::Broken(errno)) => {
                self.end_of(from, errno, moved);
                FillOutcome::Failed
            }
        }
    }

    /// Returns the stream to receives. The caller arms the first one.
    fn leave_bulk(&mut self, from: SessionSide) {
        let stream = &mut self.streams[from as usize];
        stream.mode = RingMode::Ring;
        stream.streak = 0;
        if std::mem::take(&mut stream.pipe_failed) {
            stream.pipe_failures = (stream.pipe_failures + 1).min(PIPE_FAILURES_MAX);
        }
    }

    /// Returns an empty pipe to the pool, for other sessions.
    fn give_back_pipe(&mut self, from: SessionSide, pipes: &mut Pipes) {
        if let Some(pipe) = self.streams[from as usize].pipe.take_if(|pipe| pipe.holds() == 0) {
            pipes.give_back(*pipe);
        }
    }
}
