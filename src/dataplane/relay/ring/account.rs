//! What became of a session's bytes, counted as the ring tells of them.
//!
//! Called by `streams` and `shortage`. It moves nothing.

use super::streams::RingSession;
use crate::relay::close_state::{Carried, TurnBytes};
use tidegate_core::outcome::SessionSide;
use tidegate_net::ring::CompletionKind;

impl RingSession {
    pub(super) fn carried(&self, from: SessionSide) -> Carried {
        self.streams[from as usize].carried
    }

    /// The other side's socket has taken so many bytes.
    #[inline]
    pub(super) fn sent_on(&mut self, from: SessionSide, bytes: usize, moved: &mut TurnBytes) {
        self.streams[from as usize].carried.sent += bytes as u64;
        moved.sent[from as usize] += bytes as u64;
        self.verdict.sent_to(from.other());
    }

    /// What an operation did before it was stopped is counted, though nothing more is
    /// made of it.
    #[cold]
    pub(super) fn note_late(
        &mut self,
        side: SessionSide,
        what: &CompletionKind,
        moved: &mut TurnBytes,
    ) {
        match what {
            CompletionKind::Data(chunk) => {
                self.streams[side as usize].carried.received += chunk.len() as u64;
            }
            CompletionKind::Sent(bytes) | CompletionKind::SendCut(bytes) => {
                self.sent_on(side, *bytes, moved)
            }
            _ => {}
        }
    }
}
