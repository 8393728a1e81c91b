//! Arms and fires the timers of sessions, in one wheel for all sessions of the engine.
//!
//! Part of `engine`. A session has one timer, armed for its earliest deadline. It reads no
//! clock: `now` is the time of the round.

use super::delivery;
use super::engine::{EngineIo, EngineSession, StopMode};
use super::session_timers::QUIET;
use super::stages::{EngineState, SessionStage};
use std::time::Duration;
use tidegate_core::outcome::{Cause, SessionSide};
use tidegate_net::stream;

/// Time between two checks of an ended session whose operations are not complete, and the
/// number of checks before its connections are reset.
///
/// A cancel takes microseconds. A check counts only if the engine has been idle since the last
/// check. On a busy worker operations complete late, and a reset would break streams that can
/// still be delivered.
const SETTLE_CHECK: Duration = Duration::from_millis(100);
const SETTLE_CHECKS: u8 = 5;

/// Maximum time between two rounds for which the later round is current: it shows the state of
/// the kernel at `now`. After a longer gap the process may have been stopped between the
/// system call and the reading of the clock.
pub(super) const ROUND_GAP_MAX: Duration = Duration::from_millis(10);

/// Sessions that a full round covers at least: it takes 32 events, and a session has two
/// sockets.
///
/// The kernel queues events. Once the rounds have covered all sessions, every event from before
/// the due time is handled. Rounds are counted, not timed, so stopping the process skips none.
const SESSIONS_PER_ROUND: usize = 16;

impl<M: EngineIo> EngineState<M> {
    /// Arms a session's timer for the tick `due`.
    pub(super) fn arm(&mut self, key: u32, due: u64) {
        self.wheel.arm(key, due);
        self.sleep.wake_if_sooner(due);
    }

    /// Arms a session's timer for its next deadline. Called again when a side ends,
    /// because `half_closed_timeout` can be much shorter than `idle_timeout`.
    pub(super) fn rearm(&mut self, key: u32) {
        let entry = &self.sessions[key as usize];
        let SessionStage::Relaying(relaying) = &entry.stage else { return };
        let half_closed = entry.session.close_state().closed_first().is_some();
        let due = relaying.due(half_closed, self.now);
        self.arm(key, self.sleep.tick_after(due));
    }

    pub(super) fn expect_to_settle(&mut self, key: u32) {
        self.arm(key, self.sleep.tick_after(self.now + SETTLE_CHECK));
    }

    /// Checks an ended session whose operations are not complete.
    fn check_settling(&mut self, key: u32) {
        let entry = &mut self.sessions[key as usize];
        // Idle at about the last check. This can be wrong once, but not SETTLE_CHECKS times.
        let caught_up = self.now.saturating_duration_since(self.idle_at) <= SETTLE_CHECK * 2;
        entry.checks += u8::from(caught_up);
        if entry.checks == SETTLE_CHECKS {
            entry.checks = 0;
            self.io.stop(&mut entry.session, StopMode::Reset);
        }
        self.expect_to_settle(key);
    }

    /// Fires the timers that are due. Returns false if they are postponed to another round.
    ///
    /// Timers are postponed if an event that prevents the timeout can still be unhandled:
    /// because the round was not `current`, or because more events were queued than it took.
    pub(super) fn expire(&mut self, current: bool) -> bool {
        let now = self.sleep.tick_at(self.now);
        if self.wheel.next_due().is_none_or(|due| due > now) {
            self.postponed = 0;
            return true;
        }
        if !current && self.postponed < 2 + self.sessions.len() / SESSIONS_PER_ROUND {
            self.postponed += 1;
            return false;
        }
        self.postponed = 0;
        let mut fired = std::mem::take(&mut self.fired);
        self.wheel.advance(now, &mut fired);
        for key in fired.drain(..) {
            self.timer_fired(key);
        }
        self.fired = fired;
        true
    }

    fn timer_fired(&mut self, key: u32) {
        let now = self.now;
        let entry = &mut self.sessions[key as usize];
        if entry.orphaned {
            return self.check_settling(key);
        }
        match &mut entry.stage {
            SessionStage::Setup(setup) => match setup.deadline {
                Some(deadline) if now < deadline => {
                    self.io.watch_client(key, &mut entry.session, false);
                    self.wheel.arm(key, self.sleep.tick_after(deadline));
                }
                _ => {
                    setup.timed_out = true;
                    entry.wake();
                }
            },
            SessionStage::Relaying(_) => self.check_timeouts(key),
            SessionStage::Delivering(..) => self.check_delivery(key),
            SessionStage::Ended(..) => self.check_settling(key),
        }
    }

    fn check_timeouts(&mut self, key: u32) {
        let entry = &mut self.sessions[key as usize];
        let SessionStage::Relaying(relaying) = &mut entry.stage else { return };
        let half_closed = entry.session.close_state().closed_first().is_some();
        if relaying.is_quiet_at_end(self.now) {
            // Bytes that the peer acknowledges show that the session is in use.
            delivery::note_progress(&entry.session, relaying, QUIET, self.now);
        }
        if relaying.is_too_old(self.now) {
            return self.abort_relay(key, Cause::SessionMax);
        }
        if relaying.overdue(half_closed, self.now).is_some() {
            let limit = relaying.limit_now(half_closed);
            let unsure = delivery::note_progress(&entry.session, relaying, limit, self.now);
            if unsure
                && relaying.take_progress_request()
                && self.io.request_progress(&mut entry.session)
            {
                // Progress is reported before the tick after the next, if there is any.
                self.wheel.arm(key, self.sleep.tick_at(self.now) + 2);
                return;
            }
            if let Some(cause) = relaying.overdue(half_closed, self.now) {
                self.abort_relay(key, cause);
                return;
            }
        }
        if relaying.take_liveness(self.now)
            && let Some(upstream) = entry.session.socket(SessionSide::Backend)
        {
            let (keepalive, user_timeout) = relaying.liveness();
            // This fails only if the connection has failed.
            let _ = stream::set_liveness(upstream, keepalive, user_timeout);
        }
        self.rearm(key);
    }
}
