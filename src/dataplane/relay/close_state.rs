//! Which sides of a session have ended or failed, what was moved, and how the session
//! ends.
//!
//! The rules every engine shares. The engines report; this says when a FIN is passed on,
//! when the session is over, and how. Pure.

use std::io;
use tidegate_core::outcome::{Cause, Phase, SessionEnd, SessionSide};

/// The standing of both sides.
#[derive(Debug, Default)]
pub(super) struct CloseState {
    sides: [SideState; 2],
    /// Which side ended first.
    closed_first: Option<SessionSide>,
    /// Whom a FIN was sent to.
    told_fin: [bool; 2],
    /// By the side the bytes come from.
    carried: [Carried; 2],
}

#[derive(Debug, Default, Clone, Copy)]
struct SideState {
    /// The errno that ended the socket; 0 while it is well.
    failure: i32,
    /// FIN (or the end by failure) was received from it.
    ended: bool,
    /// It was a FIN.
    in_order: bool,
    /// All it had sent is passed on (or cannot be any more), and so is its FIN.
    finished: bool,
    /// It was sent something after its end: if it had closed, it answers with a
    /// reset.
    sent_after_end: bool,
}

/// What one turn did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct TurnBytes {
    /// Bytes received from each side, by [`SessionSide`] number.
    pub(super) received: [u64; 2],
    /// Bytes sent on, by the number of the side they came from.
    pub(super) sent: [u64; 2],
    /// A side's end was seen this turn.
    pub(super) ended: bool,
}

/// What became of the bytes of one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Carried {
    /// Received from the side they come from.
    pub(super) received: u64,
    /// Of these, taken by the other side's socket. The rest is kept, or was thrown
    /// away as there was nobody left to take it.
    pub(super) sent: u64,
}

/// What a turn asks for next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TurnNext {
    /// Wait for the sockets.
    Wait,
    /// Its share of this round is used up: turn again soon.
    Again,
    /// Over.
    End(SessionEnd),
}

// === impl CloseState ===

impl CloseState {
    /// Whether that side's socket has failed.
    #[inline]
    pub(super) fn failed(&self, side: SessionSide) -> bool {
        self.sides[side as usize].failure != 0
    }

    /// Whether that side will send no more.
    #[inline]
    pub(super) fn ended(&self, side: SessionSide) -> bool {
        self.sides[side as usize].ended
    }

    /// Which side ended first, if one did.
    pub(super) fn closed_first(&self) -> Option<SessionSide> {
        self.closed_first
    }

    /// How far the session has come.
    pub(super) fn phase(&self) -> Phase {
        match self.sides.iter().filter(|side| side.in_order).count() {
            0 => Phase::Data,
            1 => Phase::HalfClosed,
            _ => Phase::Closed,
        }
    }

    /// What became of that side's bytes so far.
    pub(super) fn carried(&self, from: SessionSide) -> Carried {
        self.carried[from as usize]
    }

    /// So many bytes came from that side.
    #[inline]
    pub(super) fn received(&mut self, from: SessionSide, bytes: usize, moved: &mut TurnBytes) {
        self.carried[from as usize].received += bytes as u64;
        moved.received[from as usize] += bytes as u64;
    }

    /// Receives bytes that were only looked at, and are sent since: as many as `seen` is
    /// long. They are there, so an end instead of them is a failure; gives its errno.
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

    /// The other side's socket has taken so many bytes.
    #[inline]
    pub(super) fn sent_on(&mut self, from: SessionSide, bytes: usize, moved: &mut TurnBytes) {
        self.carried[from as usize].sent += bytes as u64;
        moved.sent[from as usize] += bytes as u64;
        let to = &mut self.sides[from.other() as usize];
        to.sent_after_end |= to.ended;
    }

    /// `from` will send no more: FIN (0), or a failure with its errno.
    pub(super) fn end_of(&mut self, from: SessionSide, errno: i32, moved: &mut TurnBytes) {
        moved.ended = true;
        let side = &mut self.sides[from as usize];
        side.ended = true;
        side.in_order = errno == 0;
        if errno != 0 {
            side.failure = errno;
        }
        self.closed_first.get_or_insert(from);
    }

    /// Sending to that side failed. Whatever it had sent before is still to be
    /// read.
    pub(super) fn send_failed(&mut self, to: SessionSide, errno: i32) {
        let side = &mut self.sides[to as usize];
        if side.failure == 0 {
            side.failure = errno;
        }
        self.closed_first.get_or_insert(to);
    }

    /// Notes that a side's connection has failed while bytes from it still wait
    /// for the other to take them; true when that is news. The failure itself is
    /// read in its turn, but nobody waits for more than the half-closed time.
    pub(super) fn note_failure(&mut self, side: SessionSide) -> bool {
        let news = self.closed_first.is_none();
        self.closed_first.get_or_insert(side);
        news
    }

    /// Passes the end of `from` on, once everything before it is sent: by
    /// `shutdown` of the other side's writing half, or else by the close that
    /// follows when both sides have ended. A failure is not a FIN: it ends the
    /// session and is passed on as a reset. True when the other side turned out
    /// to have failed.
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
        let told = shutdown();
        self.told_fin[from.other() as usize] = told.is_ok();
        match told {
            Err(error) if !self.failed(from.other()) => {
                self.send_failed(from.other(), error.raw_os_error().unwrap_or(libc::EIO));
                true
            }
            _ => false,
        }
    }

    /// The ending, once nothing is left to move.
    #[inline]
    pub(super) fn ending(&self) -> Option<SessionEnd> {
        let first = self.closed_first?;
        let (phase, closed_first) = (self.phase(), self.closed_first);
        for from in [first, first.other()] {
            let SideState { failure, finished, .. } = self.sides[from as usize];
            // What a failed side had sent before is still delivered, as long as
            // there is somebody to take it.
            if failure != 0 && (finished || self.failed(from.other())) {
                let cause = Cause::of_failure(from, failure);
                return Some(SessionEnd { cause, phase, errno: failure, closed_first });
            }
        }
        let over = self.sides.iter().all(|side| side.finished);
        over.then_some(SessionEnd { cause: Cause::Finished, phase, errno: 0, closed_first })
    }

    /// Whether a FIN was sent to that side.
    pub(super) fn was_told_fin(&self, side: SessionSide) -> bool {
        self.told_fin[side as usize]
    }

    /// Who still takes what the other had sent before it failed, once the session
    /// ends with that failure.
    pub(super) fn survivor(&self, ending: SessionEnd) -> Option<SessionSide> {
        let survivor = match ending.cause {
            Cause::ClientReset | Cause::ClientLost => SessionSide::Backend,
            Cause::BackendReset | Cause::BackendLost => SessionSide::Client,
            _ => return None,
        };
        (!self.failed(survivor)).then_some(survivor)
    }

    /// The ending when the session is ended by us.
    pub(super) fn cut(&self, cause: Cause) -> SessionEnd {
        SessionEnd { cause, phase: self.phase(), errno: 0, closed_first: self.closed_first }
    }
}
