//! Bytes that were sent and that the peer's kernel has not acknowledged yet.
//!
//! Part of `engine`: what a failed side had sent is waited for until the other has
//! it, before that is reset; timers look here whether a peer still takes bytes; and
//! what was not delivered is counted when a session ends.

use super::engine::{EngineFlow, EngineIo};
use super::handle::Bytes;
use super::stages::{EngineState, SessionStage};
use crate::relay::session_timers::SessionTimers;
use std::time::{Duration, Instant};
use tidegate_core::outcome::{Cause, SessionEnd, SessionSide};
use tidegate_net::stream::{self, Delivery};

/// The first look at a delivery, and the longest time to the next: each is twice as
/// late as the one before. Thousands of slow readers cost a look or two a second each.
const LOOK_FIRST: Duration = Duration::from_millis(16);
const LOOKS_DOUBLED: u8 = 5;

/// What a session moved, and what of it got lost by that ending. The kernel goes on
/// with what is queued behind an end in order, so nothing is asked after one.
pub(super) fn bytes(flow: &impl EngineFlow, ending: SessionEnd) -> Bytes {
    let [client, backend] = SessionSide::BOTH.map(|side| flow.close_state().carried(side));
    let undelivered = match ending.cause {
        Cause::Finished => 0,
        _ => SessionSide::BOTH.into_iter().map(|from| undelivered_from(flow, from)).sum(),
    };
    Bytes { bytes_in: client.sent, bytes_out: backend.sent, undelivered }
}

/// Bytes of that side that the other's kernel has not acknowledged: unread, kept
/// here or sent to it.
fn undelivered_from(flow: &impl EngineFlow, from: SessionSide) -> u64 {
    let carried = flow.close_state().carried(from);
    let kept = carried.received.saturating_sub(carried.sent);
    let unread = flow.socket(from).map_or(0, stream::unread);
    let queued = flow.socket(from.other()).map_or(0, |to| match stream::delivery(to) {
        // A Unix socket's peer can read it after the close.
        Delivery { quiet: None, .. } => 0,
        Delivery { waiting, .. } => {
            let fin = flow.close_state().was_told_fin(from.other());
            waiting.saturating_sub(fin.into())
        }
    });
    kept + unread + queued
}

/// Has the timers know of what peers have taken since we last sent to them. True where
/// a socket could not tell: then [`EngineIo::request_progress`] may.
pub(super) fn note_progress(
    flow: &impl EngineFlow,
    relaying: &mut SessionTimers,
    limit: Duration,
    now: Instant,
) -> bool {
    let mut queued = None;
    for side in SessionSide::BOTH {
        match flow.socket(side).map(stream::delivery) {
            Some(Delivery { quiet: Some(ago), blocked, .. }) => {
                relaying.moved_unseen(ago, blocked, limit, now);
            }
            Some(Delivery { quiet: None, waiting, .. }) => {
                queued = Some(queued.unwrap_or(0) + waiting);
            }
            None => {}
        }
    }
    queued.is_some_and(|queued| !relaying.looks_moved(queued, now))
}

impl<M: EngineIo> EngineState<M> {
    /// A session is over and its sockets are free: it gets them, once what a failed side
    /// had sent before is delivered.
    pub(super) fn settled(&mut self, key: u32) {
        self.flows[key as usize].looks = 0;
        self.look_at_delivery(key);
    }

    /// Looks now, and again later where the peer still takes bytes.
    pub(super) fn look_at_delivery(&mut self, key: u32) {
        if !self.is_delivering(key) {
            return self.stop_delivery(key);
        }
        let entry = &mut self.flows[key as usize];
        entry.stage = match entry.take_stage() {
            SessionStage::Ended(ending, timers) => SessionStage::Delivering(ending, timers),
            other => other,
        };
        let due = self.now + LOOK_FIRST * (1 << entry.looks);
        entry.looks = (entry.looks + 1).min(LOOKS_DOUBLED);
        self.arm(key, self.sleep.tick_after(due));
    }

    /// Whether the peer still takes what the other side had sent before it failed.
    fn is_delivering(&self, key: u32) -> bool {
        let entry = &self.flows[key as usize];
        let (SessionStage::Ended(ending, timers) | SessionStage::Delivering(ending, timers)) =
            &entry.stage
        else {
            return false;
        };
        let survivor = entry.flow.close_state().survivor(*ending);
        let survivor = survivor.and_then(|side| entry.flow.socket(side));
        match survivor.map(stream::delivery) {
            Some(Delivery { waiting: 1.., quiet: Some(quiet), dead: false, .. }) => {
                quiet < timers.patience()
            }
            _ => false,
        }
    }

    /// The session gets its sockets now, whatever is delivered.
    pub(super) fn stop_delivery(&mut self, key: u32) {
        self.wheel.cancel(key);
        let entry = &mut self.flows[key as usize];
        entry.stage = match entry.take_stage() {
            SessionStage::Delivering(ending, timers) => SessionStage::Ended(ending, timers),
            other => other,
        };
        entry.wake();
    }
}
