//! Bytes that were sent but not acknowledged by the peer's kernel.
//!
//! Part of `engine`. It serves three purposes:
//!
//! - After one side failed, its last bytes are delivered before the other side is reset.
//! - A timeout acts only if the peers have acknowledged nothing.
//! - Undelivered bytes are counted at the end of a session.

use super::engine::{EngineIo, EngineSession};
use super::handle::Bytes;
use super::stages::{EngineState, SessionStage};
use crate::relay::session_timers::SessionTimers;
use std::time::{Duration, Instant};
use tidegate_core::outcome::{Cause, SessionEnd, SessionSide};
use tidegate_net::stream::{self, Delivery};

/// Pause before the second check of a delivery. It doubles with each check, at most
/// [`DOUBLINGS_MAX`] times (512 ms), so a slow reader costs about two checks per second.
const CHECK_FIRST: Duration = Duration::from_millis(16);
const DOUBLINGS_MAX: u8 = 5;

/// Returns the bytes of a session with this ending. After a close with FIN the kernel delivers
/// what is still queued, so a finished session has no undelivered bytes.
pub(super) fn bytes(session: &impl EngineSession, ending: SessionEnd) -> Bytes {
    let [client, backend] = SessionSide::BOTH.map(|side| session.close_state().carried(side));
    let undelivered = match ending.cause {
        Cause::Finished => 0,
        _ => SessionSide::BOTH.into_iter().map(|from| undelivered_from(session, from)).sum(),
    };
    Bytes { bytes_in: client.sent, bytes_out: backend.sent, undelivered }
}

/// Returns the bytes from `from` that the other side's kernel has not acknowledged: unread,
/// buffered here, or sent to it.
fn undelivered_from(session: &impl EngineSession, from: SessionSide) -> u64 {
    let carried = session.close_state().carried(from);
    let kept = carried.received.saturating_sub(carried.sent);
    let unread = session.socket(from).map_or(0, stream::unread);
    let queued = session.socket(from.other()).map_or(0, |to| match stream::delivery(to) {
        // The peer of a Unix socket can read them after the close.
        Delivery { quiet: None, .. } => 0,
        Delivery { waiting, .. } => {
            let fin = session.close_state().fin_sent(from.other());
            waiting.saturating_sub(fin.into())
        }
    });
    kept + unread + queued
}

/// Updates the timers with what the peers have acknowledged. Returns true if a socket cannot
/// show progress; then [`EngineIo::request_progress`] can.
pub(super) fn note_progress(
    session: &impl EngineSession,
    relaying: &mut SessionTimers,
    limit: Duration,
    now: Instant,
) -> bool {
    let mut queued = None;
    for side in SessionSide::BOTH {
        match session.socket(side).map(stream::delivery) {
            Some(Delivery { quiet: Some(ago), blocked, .. }) => {
                relaying.note_acknowledged(ago, blocked, limit, now);
            }
            Some(Delivery { quiet: None, waiting, .. }) => {
                queued = Some(queued.unwrap_or(0) + waiting);
            }
            None => {}
        }
    }
    queued.is_some_and(|queued| !relaying.note_queue(queued, now))
}

impl<M: EngineIo> EngineState<M> {
    /// Called when a session has ended and no operation uses its sockets. The session gets the
    /// sockets once the last bytes of a failed side are delivered.
    pub(super) fn settled(&mut self, key: u32) {
        self.sessions[key as usize].checks = 0;
        self.check_delivery(key);
    }

    /// Hands the sockets to the session, or checks again later if the peer still reads.
    pub(super) fn check_delivery(&mut self, key: u32) {
        if !self.is_delivering(key) {
            return self.stop_delivery(key);
        }
        let entry = &mut self.sessions[key as usize];
        entry.stage = match entry.take_stage() {
            SessionStage::Ended(ending, timers) => SessionStage::Delivering(ending, timers),
            other => other,
        };
        let due = self.now + CHECK_FIRST * (1 << entry.checks);
        entry.checks = (entry.checks + 1).min(DOUBLINGS_MAX);
        self.arm(key, self.sleep.tick_after(due));
    }

    /// Whether the surviving side still acknowledges bytes that the failed side had sent.
    fn is_delivering(&self, key: u32) -> bool {
        let entry = &self.sessions[key as usize];
        let (SessionStage::Ended(ending, timers) | SessionStage::Delivering(ending, timers)) =
            &entry.stage
        else {
            return false;
        };
        let survivor = entry.session.close_state().survivor(*ending);
        let survivor = survivor.and_then(|side| entry.session.socket(side));
        match survivor.map(stream::delivery) {
            Some(Delivery { waiting: 1.., quiet: Some(quiet), dead: false, .. }) => {
                quiet < timers.delivery_timeout()
            }
            _ => false,
        }
    }

    /// Hands the sockets to the session at once, delivered or not.
    pub(super) fn stop_delivery(&mut self, key: u32) {
        self.wheel.cancel(key);
        let entry = &mut self.sessions[key as usize];
        entry.stage = match entry.take_stage() {
            SessionStage::Delivering(ending, timers) => SessionStage::Ended(ending, timers),
            other => other,
        };
        entry.wake();
    }
}
