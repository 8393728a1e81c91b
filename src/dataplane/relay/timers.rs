//! The sessions' timers: armed for whatever is due first, looked at when they
//! fire.
//!
//! Part of `engine`; one wheel for all sessions. It reads no clock: `now` is the
//! time of the round.

use super::delivery;
use super::engine::{EngineFlow, EngineIo, StopMode};
use super::stages::{EngineState, SessionStage};
use std::time::Duration;
use tidegate_core::outcome::SessionSide;
use tidegate_net::stream;

/// How often an ended session is looked at whose operations have not come back,
/// and how often in vain before its sockets are torn down under them. Cancelling
/// takes microseconds. A look counts only where the engine has had nothing left to do
/// since: to a worker that gets no processor, or is behind, operations come back
/// late, and a reset would break streams that are whole.
const SETTLE_LOOK: Duration = Duration::from_millis(100);
const SETTLE_LOOKS: u8 = 5;

/// Longest time between two rounds after which the later one still shows what the kernel
/// had at `now`. After a longer one this process may have been stopped in between: after
/// the kernel was asked, before the time was read.
pub(super) const ROUND_GAP_MAX: Duration = Duration::from_millis(10);

/// Sessions that a round passes over at least where it leaves events behind: it takes 32
/// events, and a session has two sockets. The kernel keeps them in a queue, so once the
/// rounds have passed over all sessions, no event is left that was there when the timers
/// were due. Counted, not timed: a process that is stopped meanwhile loses no round.
const SESSIONS_A_ROUND: usize = 16;

impl<M: EngineIo> EngineState<M> {
    /// Arms a session's timer for that tick.
    pub(super) fn arm(&mut self, key: u32, due: u64) {
        self.wheel.arm(key, due);
        self.sleep.wake_if_sooner(due);
    }

    /// Sets a session's timer anew. The half-closed timer may be due long before
    /// the idle one.
    pub(super) fn rearm(&mut self, key: u32) {
        let entry = &self.flows[key as usize];
        let SessionStage::Relaying(relaying) = &entry.stage else { return };
        let half_closed = entry.flow.close_state().closed_first().is_some();
        let due = relaying.due(half_closed, self.now);
        self.arm(key, self.sleep.tick_after(due));
    }

    pub(super) fn expect_to_settle(&mut self, key: u32) {
        self.arm(key, self.sleep.tick_after(self.now + SETTLE_LOOK));
    }

    /// Its operations have still not come back.
    fn unsettled(&mut self, key: u32) {
        let entry = &mut self.flows[key as usize];
        // About since the last look: that one may be wrong, not all of them.
        let caught_up = self.now.saturating_duration_since(self.idle_at) <= SETTLE_LOOK * 2;
        entry.looks += u8::from(caught_up);
        if entry.looks == SETTLE_LOOKS {
            entry.looks = 0;
            self.io.stop(&mut entry.flow, StopMode::Reset);
        }
        self.expect_to_settle(key);
    }

    /// Fires the timers that are due; false where they wait for another round. What they
    /// would end may have happened in time: the round was not `current`, or other events
    /// stood before it.
    pub(super) fn expire(&mut self, current: bool) -> bool {
        let now = self.sleep.tick_at(self.now);
        if self.wheel.next_due().is_none_or(|due| due > now) {
            self.postponed = 0;
            return true;
        }
        if !current && self.postponed < 2 + self.flows.len() / SESSIONS_A_ROUND {
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
        let entry = &mut self.flows[key as usize];
        if entry.orphaned {
            return self.unsettled(key);
        }
        match &mut entry.stage {
            SessionStage::Setup(setup) => match setup.deadline {
                Some(deadline) if now < deadline => {
                    self.io.watch_client(key, &mut entry.flow, false);
                    self.wheel.arm(key, self.sleep.tick_after(deadline));
                }
                _ => {
                    setup.timed_out = true;
                    entry.wake();
                }
            },
            SessionStage::Relaying(_) => self.look_at_timers(key),
            SessionStage::Delivering(..) => self.look_at_delivery(key),
            SessionStage::Ended(..) => self.unsettled(key),
        }
    }

    fn look_at_timers(&mut self, key: u32) {
        let entry = &mut self.flows[key as usize];
        let SessionStage::Relaying(relaying) = &mut entry.stage else { return };
        let half_closed = entry.flow.close_state().closed_first().is_some();
        if relaying.overdue(half_closed, self.now).is_some() {
            let limit = relaying.limit_now(half_closed);
            let unsure = delivery::note_progress(&entry.flow, relaying, limit, self.now);
            if unsure && relaying.may_ask() && self.io.request_progress(&mut entry.flow) {
                // The answer is there by the next tick, if there is one.
                self.wheel.arm(key, self.sleep.tick_at(self.now) + 2);
                return;
            }
            if let Some(cause) = relaying.overdue(half_closed, self.now) {
                self.end_by_us(key, cause);
                return;
            }
        }
        if relaying.take_liveness(self.now)
            && let Some(upstream) = entry.flow.socket(SessionSide::Backend)
        {
            let (keepalive, user_timeout) = relaying.liveness();
            // Refused at most for a socket that is dead already.
            let _ = stream::set_liveness(upstream, keepalive, user_timeout);
        }
        self.rearm(key);
    }
}
