//! A session inside an engine: its stages, from the client's socket to the result.
//!
//! Part of `engine`, called by it and by the engines' events.

use super::engine::{ConnectResult, EngineFlow, EngineIo, StopMode};
use super::handle::ConnectEnd;
use super::task::EngineSleep;
use crate::relay::close_state::{TurnBytes, TurnNext};
use crate::relay::session_timers::SessionTimers;
use crate::timer_wheel::TimerWheel;
use slab::Slab;
use std::io;
use std::task::Waker;
use std::time::Instant;
use tidegate_core::outcome::{Cause, SessionEnd, SessionSide};
use tidegate_net::stream;

/// The sessions and what moves their bytes.
#[derive(Debug)]
pub(super) struct EngineState<M: EngineIo> {
    pub(super) flows: Slab<SessionEntry<M::Flow>>,
    pub(super) io: M,
    pub(super) sleep: EngineSleep,
    pub(super) wheel: TimerWheel,
    pub(super) fired: Vec<u32>,
    /// Read once a round.
    pub(super) now: Instant,
    /// When the engine last had nothing left to do.
    pub(super) idle_at: Instant,
    pub(super) next_tick: Instant,
    /// Rounds in a row for which timers that are due have waited.
    pub(super) postponed: usize,
}

#[derive(Debug)]
pub(super) struct SessionEntry<F> {
    pub(super) flow: F,
    pub(super) stage: SessionStage,
    /// The session, when it waits.
    pub(super) waiter: Option<Waker>,
    /// The client failed before the relay began.
    pub(super) client_failed: bool,
    /// Whether the client has sent what its session waits for; `None` where it does not.
    pub(super) client_sent: Option<bool>,
    pub(super) aborted: Option<Cause>,
    /// Its session is gone; kept only until it has settled.
    pub(super) orphaned: bool,
    /// How often it was looked at since it ended.
    pub(super) looks: u8,
}

#[derive(Debug)]
pub(super) enum SessionStage {
    /// Before the relay; the connect of the backend socket may be pending.
    Setup(SessionSetup),
    Relaying(Box<SessionTimers>),
    /// A side has failed, and what it had sent before is on its way to the other.
    Delivering(SessionEnd, Box<SessionTimers>),
    Ended(SessionEnd, Box<SessionTimers>),
}

#[derive(Debug, Default)]
pub(super) struct SessionSetup {
    /// When the pending connect has taken too long.
    pub(super) deadline: Option<Instant>,
    /// How the pending connect ended.
    pub(super) decided: Option<ConnectResult>,
    pub(super) timed_out: bool,
}

// === impl EngineState: how stages change ===

impl<M: EngineIo> EngineState<M> {
    /// A pending connect ended; the worst report about it holds.
    pub(super) fn connect_decided(&mut self, key: u32, how: ConnectResult) {
        let entry = &mut self.flows[key as usize];
        if let SessionStage::Setup(setup) = &mut entry.stage {
            setup.decided = setup.decided.max(Some(how));
            entry.wake();
        }
    }

    /// The client's connection has failed.
    pub(super) fn client_failed(&mut self, key: u32) {
        let entry = &mut self.flows[key as usize];
        if matches!(entry.stage, SessionStage::Setup(_)) {
            entry.client_failed = true;
            entry.wake();
        }
    }

    /// The client has sent as many bytes as were waited for, or has ended its side.
    pub(super) fn client_readable(&mut self, key: u32) {
        let entry = &mut self.flows[key as usize];
        if let Some(sent) = &mut entry.client_sent {
            *sent = true;
            entry.wake();
        }
    }

    /// Counts what was moved and ends the session where it is over.
    #[inline]
    pub(super) fn progress(&mut self, key: u32, moved: &TurnBytes, next: TurnNext) {
        let timers = match &mut self.flows[key as usize].stage {
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

    /// A side has failed while bytes from it still wait.
    pub(super) fn note_failure(&mut self, key: u32, news: bool) {
        if news && self.flows[key as usize].is_relaying() {
            self.rearm(key);
        }
    }

    /// An operation of this session has come back: gives the session its sockets, or
    /// removes one that is orphaned.
    #[inline]
    pub(super) fn finish_when_idle(&mut self, key: u32) {
        let entry = &mut self.flows[key as usize];
        if !entry.flow.is_settled() {
            return;
        }
        if entry.orphaned {
            self.wheel.cancel(key);
            self.flows.remove(key as usize);
        } else if matches!(entry.stage, SessionStage::Ended(..)) {
            self.settled(key);
        }
    }

    /// Ends a session that neither side has ended.
    pub(super) fn end_by_us(&mut self, key: u32, cause: Cause) {
        let ending = self.flows[key as usize].flow.close_state().cut(cause);
        self.end(key, ending);
    }

    fn end(&mut self, key: u32, ending: SessionEnd) {
        let entry = &mut self.flows[key as usize];
        match entry.take_stage() {
            SessionStage::Relaying(timers) => {
                timers.over();
                entry.stage = SessionStage::Ended(ending, timers);
            }
            other => {
                entry.stage = other;
                return;
            }
        }
        self.io.stop(&mut entry.flow, StopMode::Cancel);
        if entry.flow.is_settled() {
            self.settled(key);
        } else {
            self.expect_to_settle(key);
        }
    }

    pub(super) fn abort(&mut self, key: u32, cause: Cause) {
        let entry = &mut self.flows[key as usize];
        entry.aborted = Some(cause);
        match entry.stage {
            SessionStage::Relaying(_) => self.end_by_us(key, cause),
            SessionStage::Setup(_) => entry.wake(),
            SessionStage::Delivering(..) => self.stop_delivery(key),
            SessionStage::Ended(..) => {}
        }
    }

    /// Wakes the engine task where there is something to do at once.
    pub(super) fn wake_for_work(&mut self) {
        if self.io.has_work() {
            self.sleep.wake_if_sooner(0);
        }
    }
}

// === impl SessionEntry ===

impl<F: EngineFlow> SessionEntry<F> {
    #[inline]
    pub(super) fn is_relaying(&self) -> bool {
        matches!(self.stage, SessionStage::Relaying(_))
    }

    /// The stage, to be put back or replaced.
    pub(super) fn take_stage(&mut self) -> SessionStage {
        std::mem::replace(&mut self.stage, SessionStage::Setup(SessionSetup::default()))
    }

    /// How the pending connect ended, if it did.
    pub(super) fn connect_result(&self) -> Option<Result<(), ConnectEnd>> {
        if let Some(end) = self.interruption() {
            return Some(Err(end));
        }
        let SessionStage::Setup(setup) = &self.stage else { return None };
        match setup.decided {
            // Writable and well is connected; only a failure is worth asking for.
            Some(ConnectResult::Connected) => Some(Ok(())),
            Some(ConnectResult::Unwatched(errno)) => {
                Some(Err(ConnectEnd::Failed(io::Error::from_raw_os_error(errno))))
            }
            Some(ConnectResult::Failed) => {
                let gone = || io::Error::from_raw_os_error(libc::EBADF);
                let socket = self.flow.socket(SessionSide::Backend).ok_or_else(gone);
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
