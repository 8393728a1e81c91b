//! Bytes that are out of our hands and not yet in those of the peer.
//!
//! Part of the shell: what a failed side had sent is waited for until the other has
//! it, before that is reset; timers look here whether a peer still takes bytes; and
//! what was not delivered is counted when a session ends.

use super::super::flow::Bytes;
use super::super::mover::EngineIo;
use super::super::pace::EngineSleep;
use super::{EngineState, SessionStage};
use crate::relay::session_timers::SessionTimers;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};
use tidegate_core::outcome::{Cause, SessionEnd, SessionSide};
use tidegate_net::stream::{self, Delivery};

/// The first look at a delivery, and the longest time to the next: each is twice as
/// late as the one before. Thousands of slow readers cost a look or two a second each.
const LOOK_FIRST: Duration = Duration::from_millis(16);
const LOOKS_DOUBLED: u8 = 5;

/// What a session moved, and what of it got lost by that ending. The kernel goes on
/// with what is queued behind an end in order, so nothing is asked after one.
pub(super) fn bytes<M: EngineIo>(flow: &M::Flow, ending: SessionEnd) -> Bytes {
    let [client, backend] = SessionSide::BOTH.map(|side| M::carried(flow, side));
    let undelivered = match ending.cause {
        Cause::Finished => 0,
        _ => SessionSide::BOTH.into_iter().map(|from| undelivered_from::<M>(flow, from)).sum(),
    };
    Bytes { bytes_in: client.sent, bytes_out: backend.sent, undelivered }
}

/// Bytes of that side that the other's kernel has not acknowledged: unread, kept
/// here or sent to it.
fn undelivered_from<M: EngineIo>(flow: &M::Flow, from: SessionSide) -> u64 {
    let carried = M::carried(flow, from);
    let kept = carried.received.saturating_sub(carried.sent);
    let unread = socket::<M>(flow, from).map_or(0, stream::unread);
    let queued = socket::<M>(flow, from.other()).map_or(0, |to| match stream::delivery(to) {
        // A Unix socket's peer can read it after the close.
        Delivery { quiet: None, .. } => 0,
        Delivery { waiting, .. } => {
            let fin = M::verdict(flow).was_told_fin(from.other());
            waiting.saturating_sub(fin.into())
        }
    });
    kept + unread + queued
}

fn socket<M: EngineIo>(flow: &M::Flow, side: SessionSide) -> Option<BorrowedFd<'_>> {
    match side {
        SessionSide::Client => M::client(flow),
        SessionSide::Backend => M::backend(flow),
    }
}

/// Has the timers know of what peers have taken since we last sent to them. True where
/// a socket could not tell: then [`EngineIo::request_progress`] may.
pub(super) fn note_progress<M: EngineIo>(
    flow: &M::Flow,
    relaying: &mut SessionTimers,
    limit: Duration,
    now: Instant,
) -> bool {
    let mut queued = None;
    for side in SessionSide::BOTH {
        match socket::<M>(flow, side).map(stream::delivery) {
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
    /// A session is over and its sockets are free: it gets them, once the last words
    /// of a side that failed are delivered.
    pub(super) fn settled(&mut self, key: u32, pace: &EngineSleep) {
        let entry = &mut self.flows[key as usize];
        entry.looks = 0;
        if self.is_delivering(key) {
            self.look_at_delivery_later(key, pace);
        } else {
            self.stop_delivery(key);
        }
    }

    /// Whether the peer still takes what the other side had sent before it failed.
    fn is_delivering(&self, key: u32) -> bool {
        let entry = &self.flows[key as usize];
        let (SessionStage::Ended(ending, relaying) | SessionStage::Delivering(ending, relaying)) =
            &entry.stage
        else {
            return false;
        };
        let survivor = M::verdict(&entry.flow).survivor(*ending);
        let survivor = survivor.and_then(|side| socket::<M>(&entry.flow, side));
        match survivor.map(stream::delivery) {
            Some(Delivery { waiting: 1.., quiet: Some(quiet), dead: false, .. }) => {
                quiet < relaying.patience()
            }
            _ => false,
        }
    }

    fn look_at_delivery_later(&mut self, key: u32, pace: &EngineSleep) {
        let entry = &mut self.flows[key as usize];
        let setup = SessionStage::Setup(super::SessionSetup::default());
        entry.stage = match std::mem::replace(&mut entry.stage, setup) {
            SessionStage::Ended(ending, relaying) => SessionStage::Delivering(ending, relaying),
            other => other,
        };
        let due = pace.tick_after(self.now + LOOK_FIRST * (1 << entry.looks));
        entry.looks = (entry.looks + 1).min(LOOKS_DOUBLED);
        self.wheel.arm(key, due);
        pace.wake_if_sooner(due);
    }

    /// The timer's look.
    pub(super) fn look_at_delivery(&mut self, key: u32, pace: &EngineSleep) {
        if self.is_delivering(key) {
            self.look_at_delivery_later(key, pace);
        } else {
            self.stop_delivery(key);
        }
    }

    /// The session gets its sockets now, whatever is delivered.
    pub(super) fn stop_delivery(&mut self, key: u32) {
        self.wheel.cancel(key);
        let entry = &mut self.flows[key as usize];
        let setup = SessionStage::Setup(super::SessionSetup::default());
        entry.stage = match std::mem::replace(&mut entry.stage, setup) {
            SessionStage::Delivering(ending, relaying) => SessionStage::Ended(ending, relaying),
            other => other,
        };
        entry.wake();
    }
}
