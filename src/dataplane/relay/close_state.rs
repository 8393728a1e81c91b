//! Which sides of a session have ended or failed, and how the session ends.
//!
//! Both engines report received bytes, sent bytes and ends of sides. This module decides when a
//! FIN is passed on, when the session has ended, and with which cause. Pure.

use std::io;
use tidegate_core::outcome::{Cause, Phase, SessionEnd, SessionSide};

/// The state of both sides, and the bytes moved between them.
#[derive(Debug, Default)]
pub(super) struct CloseState {
    sides: [SideState; 2],
    /// The side that ended first.
    closed_first: Option<SessionSide>,
    /// Sides to which a FIN was sent.
    fin_sent: [bool; 2],
    /// Bytes by the side that sent them.
    carried: [Carried; 2],
}

#[derive(Debug, Default, Clone, Copy)]
struct SideState {
    /// The errno with which the socket failed; 0 if it has not failed.
    failure: i32,
    /// A FIN or a failure was received from this side.
    ended: bool,
    /// A FIN was received.
    fin_received: bool,
    /// All bytes from this side are passed on or discarded, and its FIN is passed on.
    finished: bool,
    /// Bytes were sent to this side after its end. If it had closed its socket, it answers
    /// with a reset.
    sent_after_end: bool,
}

/// What a turn has moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct TurnBytes {
    /// Bytes received from each side, indexed by [`SessionSide`].
    pub(super) received: [u64; 2],
    /// Bytes sent, indexed by the side that they came from.
    pub(super) sent: [u64; 2],
    /// A side ended in this turn.
    pub(super) ended: bool,
}

/// Byte counts of one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Carried {
    /// Bytes received.
    pub(super) received: u64,
    /// Bytes sent to the other side. The rest is buffered, or was discarded because the other
    /// side had failed.
    pub(super) sent: u64,
}

/// What a session needs after a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TurnNext {
    /// Wait until a socket is ready.
    Wait,
    /// Another turn soon: its share of this round is used up.
    Again,
    /// The session has ended.
    End(SessionEnd),
}

// === impl CloseState ===

impl CloseState {
    /// Whether the side's socket has failed.
    #[inline]
    pub(super) fn failed(&self, side: SessionSide) -> bool {
        self.sides[side as usize].failure != 0
    }

    /// Whether the side has sent a FIN or failed.
    #[inline]
    pub(super) fn ended(&self, side: SessionSide) -> bool {
        self.sides[side as usize].ended
    }

    /// The side that ended first.
    pub(super) fn closed_first(&self) -> Option<SessionSide> {
        self.closed_first
    }

    /// The phase, from the number of sides that have sent a FIN.
    pub(super) fn phase(&self) -> Phase {
        match self.sides.iter().filter(|side| side.fin_received).count() {
            0 => Phase::Data,
            1 => Phase::HalfClosed,
            _ => Phase::Closed,
        }
    }

    /// Byte counts of the direction from `from`.
    pub(super) fn carried(&self, from: SessionSide) -> Carried {
        self.carried[from as usize]
    }

    /// Counts bytes received from a side.
    #[inline]
    pub(super) fn received(&mut self, from: SessionSide, bytes: usize, moved: &mut TurnBytes) {
        self.carried[from as usize].received += bytes as u64;
        moved.received[from as usize] += bytes as u64;
    }

    /// Consumes bytes that were peeked and have been sent: `seen.len()` bytes. They are in the
    /// receive queue, so an end of the stream before them is a failure.
    ///
    /// # Errors
    /// The errno of that failure.
    pub(super) fn receive_seen(
        &mut self,
        from: SessionSide,
        seen: &mut [u8],
        moved: &mut TurnBytes,
        receive: impl Fn(&mut [u8]) -> io::Result<usize>,
    ) -> Result<(), i32> {
        let mut taken = 0;
        while taken < seen.len() {
            match receive(&mut seen[taken..]) {
                Ok(0) => return Err(libc::EIO),
                Ok(more) => {
                    taken += more;
                    self.received(from, more, moved);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.raw_os_error().unwrap_or(libc::EIO)),
            }
        }
        Ok(())
    }

    /// Counts bytes from `from` that were sent to the other side.
    #[inline]
    pub(super) fn sent_on(&mut self, from: SessionSide, bytes: usize, moved: &mut TurnBytes) {
        self.carried[from as usize].sent += bytes as u64;
        moved.sent[from as usize] += bytes as u64;
        let to = &mut self.sides[from.other() as usize];
        to.sent_after_end |= to.ended;
    }

    /// Records the end of a side: a FIN if `errno` is 0, else a failure.
    pub(super) fn end_of(&mut self, from: SessionSide, errno: i32, moved: &mut TurnBytes) {
        moved.ended = true;
        let side = &mut self.sides[from as usize];
        side.ended = true;
        side.fin_received = errno == 0;
        if errno != 0 {
            side.failure = errno;
        }
        self.closed_first.get_or_insert(from);
    }

    /// Records that sending to a side failed. Bytes that it had sent before can still be
    /// received.
    pub(super) fn send_failed(&mut self, to: SessionSide, errno: i32) {
        let side = &mut self.sides[to as usize];
        if side.failure == 0 {
            side.failure = errno;
        }
        self.closed_first.get_or_insert(to);
    }

    /// Records that a side has failed while bytes from it are not yet sent. Returns true if no
    /// side had ended before. The failure itself is received after those bytes; from now on the
    /// half-closed timeout applies.
    pub(super) fn note_failure(&mut self, side: SessionSide) -> bool {
        let first = self.closed_first.is_none();
        self.closed_first.get_or_insert(side);
        first
    }

    /// Passes on the FIN of `from` once all bytes before it are sent. Returns true if the other
    /// side turns out to have failed.
    ///
    /// The FIN is sent by `shutdown` of the other side, or by the close that follows if both
    /// sides have ended. A failure is not passed on as FIN: it ends the session with a reset.
    pub(super) fn finish(
        &mut self,
        from: SessionSide,
        shutdown: impl FnOnce() -> io::Result<()>,
    ) -> bool {
        let side = &mut self.sides[from as usize];
        if std::mem::replace(&mut side.finished, true) || side.failure != 0 {
            return false;
        }
        let other = self.sides[from.other() as usize];
        if other.finished && !other.sent_after_end {
            return false;
        }
        let sent = shutdown();
        self.fin_sent[from.other() as usize] = sent.is_ok();
        match sent {
            Err(error) if !self.failed(from.other()) => {
                self.send_failed(from.other(), error.raw_os_error().unwrap_or(libc::EIO));
                true
            }
            _ => false,
        }
    }

    /// Returns the ending once no bytes are left to move.
    #[inline]
    pub(super) fn ending(&self) -> Option<SessionEnd> {
        let first = self.closed_first?;
        let (phase, closed_first) = (self.phase(), self.closed_first);
        for from in [first, first.other()] {
            let SideState { failure, finished, .. } = self.sides[from as usize];
            // Bytes that a failed side had sent are still delivered, unless the other side has
            // failed too.
            if failure != 0 && (finished || self.failed(from.other())) {
                let cause = Cause::of_failure(from, failure);
                return Some(SessionEnd { cause, phase, errno: failure, closed_first });
            }
        }
        let over = self.sides.iter().all(|side| side.finished);
        over.then_some(SessionEnd { cause: Cause::Finished, phase, errno: 0, closed_first })
    }

    /// Whether a FIN was sent to the side.
    pub(super) fn fin_sent(&self, side: SessionSide) -> bool {
        self.fin_sent[side as usize]
    }

    /// Returns the side that can still receive the last bytes of the failed side, if the
    /// session ended by a failure.
    pub(super) fn survivor(&self, ending: SessionEnd) -> Option<SessionSide> {
        let survivor = match ending.cause {
            Cause::ClientReset | Cause::ClientLost => SessionSide::Backend,
            Cause::BackendReset | Cause::BackendLost => SessionSide::Client,
            _ => return None,
        };
        (!self.failed(survivor)).then_some(survivor)
    }

    /// The ending if Tidegate ends the session with `cause`.
    pub(super) fn abort(&self, cause: Cause) -> SessionEnd {
        SessionEnd { cause, phase: self.phase(), errno: 0, closed_first: self.closed_first }
    }
}
