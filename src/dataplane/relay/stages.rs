//! The stages of a session inside an engine, from setup to the result.
//!
//! Part of `engine`, called by it and by the event handlers of both engines.

use super::delivery;
use super::engine::{ConnectResult, EngineIo, EngineSession, StopMode};
use super::handle::{ConnectEnd, SessionIdentity};
use super::task::EngineSleep;
use crate::relay::close_state::{TurnBytes, TurnNext};
use crate::relay::session_timers::SessionTimers;
use crate::timer_wheel::TimerWheel;
use slab::Slab;
use std::io;
use std::task::Waker;
use std::time::{Duration, Instant};
use tidegate_core::outcome::{Cause, SessionEnd, SessionSide};
use tidegate_net::stream;

/// The sessions of an engine and its event loop state.
#[derive(Debug)]
pub(super) struct EngineState<M: EngineIo> {
    pub(super) sessions: Slab<SessionEntry<M::Session>>,
    pub(super) io: M,
    pub(super) sleep: EngineSleep,
    pub(super) wheel: TimerWheel,
    pub(super) fired: Vec<u32>,
    /// Time of the current round.
    pub(super) now: Instant,
    /// When the engine was last idle.
    pub(super) idle_at: Instant,
    pub(super) next_tick: Instant,
    /// Rounds in a row for which due timers have been postponed.
    pub(super) postponed: usize,
}

#[derive(Debug)]
pub(super) struct SessionEntry<F> {
    pub(super) session: F,
    pub(super) identity: SessionIdentity,
    /// Tenths of a second from the start of the engine to the accept.
    pub(super) accepted: u32,
    pub(super) stage: SessionStage,
    /// Waker of the session's task, while it waits.
    pub(super) waiter: Option<Waker>,
    /// The client failed before the relay began.
    pub(super) client_failed: bool,
    /// Whether the awaited first bytes have arrived; `None` if the session awaits none.
    pub(super) client_sent: Option<bool>,
    pub(super) aborted: Option<Cause>,
    /// The session was dropped. The entry stays until its operations are complete.
    pub(super) orphaned: bool,
    /// Checks since the session ended.
    pub(super) checks: u8,
}

#[derive(Debug)]
pub(super) enum SessionStage {
    /// Before the relay; the connect of the backend socket can be pending.
    Setup(SessionSetup),
    Relaying(Box<SessionTimers>),
    /// A side has failed, and its last bytes are being delivered to the other side.
    Delivering(SessionEnd, Box<SessionTimers>),
    Ended(SessionEnd, Box<SessionTimers>),
}

#[derive(Debug, Default)]
pub(super) struct SessionSetup {
    /// Deadline of the pending connect.
    pub(super) deadline: Option<Instant>,
    /// How the pending connect ended.
    pub(super) decided: Option<ConnectResult>,
    pub(super) timed_out: bool,
}

// === impl EngineState: changes of stage ===

impl<M: EngineIo> EngineState<M> {
    /// Records the end of a pending connect. Of several results the worst counts.
    pub(super) fn connect_decided(&mut self, key: u32, how: ConnectResult) {
        let entry = &mut self.sessions[key as usize];
        if let SessionStage::Setup(setup) = &mut entry.stage {
            setup.decided = setup.decided.max(Some(how));
            entry.wake();
        }
    }

    /// Records a failure of the client's connection before the relay.
    pub(super) fn client_failed(&mut self, key: u32) {
        let entry = &mut self.sessions[key as usize];
        if matches!(entry.stage, SessionStage::Setup(_)) {
            entry.client_failed = true;
            entry.wake();
        }
    }

    /// Records that the awaited first bytes, or a FIN, have arrived.
    pub(super) fn client_readable(&mut self, key: u32) {
        let entry = &mut self.sessions[key as usize];
        if let Some(sent) = &mut entry.client_sent {
            *sent = true;
            entry.wake();
        }
    }

    /// Counts moved bytes and ends the session if `next` is an end.
    #[inline]
    pub(super) fn progress(&mut self, key: u32, moved: &TurnBytes, next: TurnNext) {
        let timers = match &mut self.sessions[key as usize].stage {
            SessionStage::Relaying(timers) => timers,
            SessionStage::Ended(_, timers) => return timers.count(moved),
            _ => return,
        };
        timers.account(moved, self.now);
        if let TurnNext::End(ending) = next {
            self.end(key, ending);
        } else if moved.ended {
            self.rearm(key);
        }
    }

    /// Rearms the timer if a side has failed while bytes from it are not yet sent, and no side
    /// had ended before (`first`).
    pub(super) fn note_failure(&mut self, key: u32, first: bool) {
        if first && self.sessions[key as usize].is_relaying() {
            self.rearm(key);
        }
    }

    /// Called after a completed operation. If the session has ended and settled, hands its
    /// sockets out, or removes the entry if it is orphaned.
    #[inline]
    pub(super) fn finish_when_idle(&mut self, key: u32) {
        let entry = &mut self.sessions[key as usize];
        if !entry.session.is_settled() {
            return;
        }
        if entry.orphaned {
            self.wheel.cancel(key);
            self.sessions.remove(key as usize);
        } else if matches!(entry.stage, SessionStage::Ended(..)) {
            self.settled(key);
        }
    }

    /// Ends a relay for a cause other than its sides.
    pub(super) fn abort_relay(&mut self, key: u32, cause: Cause) {
        let ending = self.sessions[key as usize].session.close_state().abort(cause);
        self.end(key, ending);
    }

    fn end(&mut self, key: u32, ending: SessionEnd) {
        let entry = &mut self.sessions[key as usize];
        match entry.take_stage() {
            SessionStage::Relaying(timers) => {
                timers.ended();
                entry.stage = SessionStage::Ended(ending, timers);
            }
            other => {
                entry.stage = other;
                return;
            }
        }
        self.io.stop(&mut entry.session, StopMode::Cancel);
        if entry.session.is_settled() {
            self.settled(key);
        } else {
            self.expect_to_settle(key);
        }
    }

    pub(super) fn abort(&mut self, key: u32, cause: Cause) {
        let entry = &mut self.sessions[key as usize];
        entry.aborted = Some(cause);
        match entry.stage {
            SessionStage::Relaying(_) => self.abort_relay(key, cause),
            SessionStage::Setup(_) => entry.wake(),
            SessionStage::Delivering(..) => self.stop_delivery(key),
            SessionStage::Ended(..) => {}
        }
    }

    /// Wakes the engine task if work is due at once.
    pub(super) fn wake_for_work(&mut self) {
        if self.io.has_work() {
            self.sleep.wake_if_sooner(0);
        }
    }
}

// === impl SessionEntry ===

impl<F: EngineSession> SessionEntry<F> {
    #[inline]
    pub(super) fn is_relaying(&self) -> bool {
        matches!(self.stage, SessionStage::Relaying(_))
    }

    /// Whether this cause can end the session now: in order only if no byte would be lost.
    pub(super) fn can_end(&self, cause: Cause) -> bool {
        if !matches!(cause, Cause::ClosedByOperator | Cause::Rebalanced) {
            return true;
        }
        let ending = self.session.close_state().abort(cause);
        self.is_relaying() && delivery::bytes(&self.session, ending).undelivered == 0
    }

    /// Whether no byte has moved for this time. A session without a backend is never idle.
    pub(super) fn is_idle_for(&self, idle: Duration, now: Instant) -> bool {
        let SessionStage::Relaying(timers) = &self.stage else { return idle.is_zero() };
        now.saturating_duration_since(timers.last_activity()) >= idle
    }

    /// Takes the stage out, for the caller to replace or put back.
    pub(super) fn take_stage(&mut self) -> SessionStage {
        std::mem::replace(&mut self.stage, SessionStage::Setup(SessionSetup::default()))
    }

    /// Returns the result of the pending connect once it has ended.
    pub(super) fn connect_result(&self) -> Option<Result<(), ConnectEnd>> {
        if let Some(end) = self.interruption() {
            return Some(Err(end));
        }
        let SessionStage::Setup(setup) = &self.stage else { return None };
        match setup.decided {
            // A writable socket without an error is connected. Only a failure needs a system
            // call for its errno.
            Some(ConnectResult::Connected) => Some(Ok(())),
            Some(ConnectResult::Unwatched(errno)) => {
                Some(Err(ConnectEnd::Failed(io::Error::from_raw_os_error(errno))))
            }
            Some(ConnectResult::Failed) => {
                let gone = || io::Error::from_raw_os_error(libc::EBADF);
                let socket = self.session.socket(SessionSide::Backend).ok_or_else(gone);
                Some(socket.and_then(stream::connect_result).map_err(ConnectEnd::Failed))
            }
            None => setup.timed_out.then_some(Err(ConnectEnd::TimedOut)),
        }
    }

    pub(super) fn interruption(&self) -> Option<ConnectEnd> {
        if let Some(cause) = self.aborted {
            return Some(ConnectEnd::Aborted(cause));
        }
        self.client_failed.then_some(ConnectEnd::ClientGone(libc::ECONNRESET))
    }

    pub(super) fn wake(&mut self) {
        if let Some(waiter) = self.waiter.take() {
            waiter.wake();
        }
    }
}
