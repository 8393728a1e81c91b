//! The common part of both engines: the table of sessions and the [`RelayEngine`] interface.
//!
//! Called by sessions and the worker. An [`EngineIo`] moves the bytes; that is the part in
//! which the engines differ. It never blocks and never picks a backend.

use super::RelayEngine;
use super::delivery;
use super::handle::{
    ConnectEnd, RelayResult, RelayedView, SessionIdentity, SessionMeter, SessionTimeouts,
    SessionView,
};
use super::stages::{EngineState, SessionEntry, SessionSetup, SessionStage};
use super::task::{EngineSleep, TICK};
use crate::fault_points::{FaultPlan, FaultPoint};
use crate::relay::close_state::{CloseState, TurnBytes, TurnNext};
use crate::relay::session_timers::{FirstByteState, SessionTimers};
use crate::timer_wheel::TimerWheel;
use slab::Slab;
use std::cell::{Cell, RefCell};
use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::model::ClientAddr;
use tidegate_core::outcome::{Cause, Phase, SessionEnd, SessionSide};
use tidegate_core::sessions::{SessionsEnded, SessionsToEnd};
use tidegate_core::table::state::BackendId;
use tidegate_net::clock;
use tokio::sync::Notify;

/// Time after which the engine watches the client of a pending connect for a reset. Most
/// connects take microseconds and need no watch.
const WATCH_AFTER: Duration = Duration::from_millis(2 * TICK.as_millis() as u64);

/// The part in which the engines differ: moves the bytes of sessions, identified by keys.
pub(super) trait EngineIo: Sized + Debug + 'static {
    /// Sockets and streams of a session.
    type Session: EngineSession;

    /// Creates a session that has only a client.
    fn open(&mut self, client: OwnedFd) -> Self::Session;

    /// Adds the backend socket. If its connect is `pending`, reports the end of the connect.
    fn attach(
        &mut self,
        key: u32,
        session: &mut Self::Session,
        upstream: OwnedFd,
        pending: bool,
    ) -> io::Result<()>;

    /// Removes the backend socket and closes it.
    fn detach(&mut self, session: &mut Self::Session);

    /// Starts to report a failure of the client. If `readable`, also reports once that the
    /// client has sent bytes or a FIN.
    fn watch_client(&mut self, key: u32, session: &mut Self::Session, readable: bool);

    /// Starts relaying.
    fn begin(&mut self, key: u32, session: &mut Self::Session, moved: &mut TurnBytes) -> TurnNext;

    /// Stops moving bytes of a session that has ended. The session settles once its operations
    /// are complete.
    fn stop(&mut self, session: &mut Self::Session, how: StopMode);

    /// Requests progress that has not been reported yet. Returns false if there is none.
    fn request_progress(&mut self, session: &mut Self::Session) -> bool;

    /// Whether work is due at once.
    fn has_work(&self) -> bool;

    /// Handles at most one batch of events.
    fn round(state: &mut EngineState<Self>) -> io::Result<TurnResult>;

    /// Does periodic work and returns the time to the next tick. Called while the engine is
    /// awake, and from sleep if [`EngineIo::wants_tick`] returns true.
    fn tick(state: &mut EngineState<Self>) -> Duration;

    /// Whether to wake from sleep for the next tick. `sessions`: the engine has sessions.
    fn wants_tick(&self, sessions: bool) -> bool;

    /// Prepares `poll_wake` until the next round. Returns false if work is due.
    fn arm_wakeup(&mut self) -> bool;

    /// Makes `poll_wake` ready through the reactor. Returns false if the engine cannot.
    fn signal_wakeup(&self) -> io::Result<bool>;

    /// Ready when work is due.
    fn poll_wake(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Whether all buffers and operations have been returned.
    #[cfg(all(test, feature = "sim"))]
    fn is_clean(&self) -> bool {
        true
    }
}

/// Sockets and streams of a session, in either engine.
pub(super) trait EngineSession: Debug {
    fn socket(&self, side: SessionSide) -> Option<BorrowedFd<'_>>;

    /// Ends of the sides and byte counts.
    fn close_state(&self) -> &CloseState;

    /// Whether no operation uses the sockets, so that they can be handed out.
    fn is_settled(&self) -> bool;

    /// Removes both sockets from a settled, connected session.
    fn take_sockets(&mut self) -> Option<[OwnedFd; 2]>;
}

/// How a session is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StopMode {
    /// Cancel the operations.
    Cancel,
    /// Reset the connections, because the operations did not end after a cancel.
    Reset,
}

/// How a pending connect ended, from best to worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ConnectResult {
    Connected,
    /// The connect failed. The socket has the errno.
    Failed,
    /// The connect continues, but waiting for it failed with this errno, a local error.
    Unwatched(i32),
}

/// Result of a round or turn.
#[derive(Debug, Clone, Copy)]
pub(super) struct TurnResult {
    /// No work is left.
    pub(super) drained: bool,
    /// Some work was done.
    pub(super) busy: bool,
}

/// The engine of a worker.
#[derive(Debug)]
pub(super) struct EngineCore<M: EngineIo> {
    /// How long to poll after the last activity before the engine sleeps.
    pub(super) spin: Option<Duration>,
    pub(super) state: RefCell<EngineState<M>>,
    /// Notified when a panic has left the state invalid.
    pub(super) broken: Notify,
    /// The worker has panicked. `close_all` closes the remaining sockets.
    pub(super) worker_panicked: Cell<bool>,
    pub(super) faults: FaultPlan,
    /// The worker's counters, for progress reports.
    pub(super) worker: Arc<WorkerCounters>,
}

// === impl EngineCore: interface for sessions and the worker ===

impl<M: EngineIo> EngineCore<M> {
    pub(super) fn new(io: M, spin: Option<Duration>, worker: Arc<WorkerCounters>) -> Rc<Self> {
        let started = clock::now();
        Rc::new(EngineCore {
            spin,
            state: RefCell::new(EngineState {
                sessions: Slab::new(),
                io,
                sleep: EngineSleep::new(started),
                wheel: TimerWheel::new(0),
                fired: Vec::new(),
                now: started,
                idle_at: started,
                next_tick: started,
                postponed: 0,
            }),
            broken: Notify::new(),
            worker_panicked: Cell::new(false),
            faults: FaultPlan::default(),
            worker,
        })
    }

    fn abort_where(&self, cause: Cause, matches: impl Fn(&SessionStage) -> bool) -> usize {
        let state = &mut *self.hold();
        state.now = clock::now();
        let chosen = state.sessions.iter().filter(|(_, e)| !e.orphaned && matches(&e.stage));
        let keys: Vec<u32> = chosen.map(|(key, _)| key as u32).collect();
        for key in &keys {
            state.abort(*key, cause);
        }
        state.wake_for_work();
        keys.len()
    }
}

impl<M: EngineIo> RelayEngine for EngineCore<M> {
    fn open(&self, client: OwnedFd, identity: SessionIdentity, accepted: Instant) -> u32 {
        let state = &mut *self.hold();
        let session = state.io.open(client);
        let accepted = state.sleep.tenths_at(accepted);
        state.sessions.insert(SessionEntry {
            session,
            identity,
            accepted,
            stage: SessionStage::Setup(SessionSetup::default()),
            waiter: None,
            client_failed: false,
            client_sent: None,
            aborted: None,
            orphaned: false,
            checks: 0,
        }) as u32
    }

    fn set_client(&self, key: u32, client: ClientAddr) {
        self.hold().sessions[key as usize].identity.client = client;
    }

    fn attach(&self, key: u32, upstream: OwnedFd) -> io::Result<()> {
        let state = &mut *self.hold();
        state.io.attach(key, &mut state.sessions[key as usize].session, upstream, false)
    }

    fn start_connect(&self, key: u32, upstream: OwnedFd, deadline: Instant) -> io::Result<()> {
        let state = &mut *self.hold();
        let entry = &mut state.sessions[key as usize];
        state.io.attach(key, &mut entry.session, upstream, true)?;
        let setup = SessionSetup { deadline: Some(deadline), ..SessionSetup::default() };
        entry.stage = SessionStage::Setup(setup);
        state.arm(key, state.sleep.tick_after(deadline.min(clock::now() + WATCH_AFTER)));
        state.wake_for_work();
        Ok(())
    }

    fn poll_connected(&self, key: u32, cx: &Context<'_>) -> Poll<Result<(), ConnectEnd>> {
        let state = &mut *self.hold();
        let entry = &mut state.sessions[key as usize];
        let Some(result) = entry.connect_result() else {
            entry.waiter = Some(cx.waker().clone());
            return Poll::Pending;
        };
        state.wheel.cancel(key);
        if result.is_err() {
            state.io.detach(&mut entry.session);
            state.wake_for_work();
        }
        Poll::Ready(result)
    }

    fn watch_client(&self, key: u32, readable: bool) {
        let state = &mut *self.hold();
        let entry = &mut state.sessions[key as usize];
        entry.client_sent = readable.then_some(false);
        state.io.watch_client(key, &mut entry.session, readable);
        state.wake_for_work();
    }

    fn poll_client(&self, key: u32, cx: &Context<'_>) -> Poll<Result<(), ConnectEnd>> {
        let entry = &mut self.hold().sessions[key as usize];
        if let Some(end) = entry.interruption() {
            return Poll::Ready(Err(end));
        }
        if entry.client_sent.take_if(|sent| *sent).is_some() {
            return Poll::Ready(Ok(()));
        }
        entry.waiter = Some(cx.waker().clone());
        Poll::Pending
    }

    fn with_socket(&self, key: u32, side: SessionSide, act: &mut dyn FnMut(BorrowedFd<'_>)) {
        let state = self.hold();
        if let Some(socket) = state.sessions[key as usize].session.socket(side) {
            act(socket);
        }
    }

    fn detach(&self, key: u32) {
        let state = &mut *self.hold();
        state.io.detach(&mut state.sessions[key as usize].session);
        state.wake_for_work();
    }

    fn start_relay(&self, key: u32, limits: SessionTimeouts, meter: SessionMeter) {
        let state = &mut *self.hold();
        state.now = clock::now();
        let entry = &mut state.sessions[key as usize];
        entry.waiter = None;
        self.faults.pass(FaultPoint::Relay);
        let timers = Box::new(SessionTimers::new(limits, meter, state.now));
        entry.stage = SessionStage::Relaying(timers);
        if let Some(cause) = entry.aborted {
            state.abort_relay(key, cause);
        } else {
            let mut moved = TurnBytes::default();
            let next = state.io.begin(key, &mut entry.session, &mut moved);
            state.rearm(key);
            state.progress(key, &moved, next);
        }
        state.wake_for_work();
    }

    fn poll_relayed(&self, key: u32, cx: &Context<'_>) -> Poll<RelayResult> {
        let state = &mut *self.hold();
        let entry = &mut state.sessions[key as usize];
        let settled = entry.session.is_settled();
        let SessionStage::Ended(ending, timers) = &entry.stage else {
            // The same task waits until the end, so one clone per session is enough.
            entry.waiter.get_or_insert_with(|| cx.waker().clone());
            return Poll::Pending;
        };
        if !settled {
            entry.waiter.get_or_insert_with(|| cx.waker().clone());
            return Poll::Pending;
        }
        let mut result = relay_result(&entry.session, *ending, timers.answer);
        result.sockets = entry.session.take_sockets();
        entry.stage = SessionStage::Setup(SessionSetup::default());
        state.wheel.cancel(key);
        Poll::Ready(result)
    }

    fn so_far(&self, key: u32, cause: Cause) -> Option<RelayResult> {
        let state = self.state.try_borrow().ok()?;
        let entry = state.sessions.get(key as usize)?;
        let (ending, answer) = match &entry.stage {
            SessionStage::Ended(ending, timers) | SessionStage::Delivering(ending, timers) => {
                (*ending, timers.answer)
            }
            SessionStage::Relaying(timers) => {
                (entry.session.close_state().abort(cause), timers.answer)
            }
            SessionStage::Setup(_) => {
                (entry.session.close_state().abort(cause), FirstByteState::OFF)
            }
        };
        Some(relay_result(&entry.session, ending, answer))
    }

    fn remove(&self, key: u32) {
        let state = &mut *self.hold();
        let entry = &mut state.sessions[key as usize];
        entry.waiter = None;
        if let SessionStage::Relaying(timers) = &entry.stage {
            timers.ended();
        }
        if self.worker_panicked.get() {
            return;
        }
        entry.reset_remaining();
        state.wheel.cancel(key);
        if entry.session.is_settled() {
            state.sessions.remove(key as usize);
            return;
        }
        entry.orphaned = true;
        state.io.stop(&mut entry.session, StopMode::Cancel);
        state.now = clock::now();
        state.expect_to_settle(key);
        state.wake_for_work();
    }

    fn open_sessions(&self) -> usize {
        self.hold().sessions.len()
    }

    fn visit(&self, keys: Range<u32>, visit: &mut dyn FnMut(&SessionView<'_>)) -> bool {
        let state = &*self.hold();
        let more = (keys.end as usize) < state.sessions.capacity();
        for key in keys {
            if let Some(entry) = state.sessions.get(key as usize).filter(|entry| !entry.orphaned) {
                visit(&view(entry, state.sleep.start_of_tenth(entry.accepted)));
            }
        }
        more
    }

    fn end_some(&self, keys: Range<u32>, order: &SessionsToEnd) -> SessionsEnded {
        let state = &mut *self.hold();
        state.now = clock::now();
        let more = (keys.end as usize) < state.sessions.capacity();
        let mut done = SessionsEnded { more, ..SessionsEnded::default() };
        for key in keys {
            let Some(entry) = state.sessions.get(key as usize) else { continue };
            if entry.orphaned || !order.numbers.contains(&entry.identity.number) {
                continue;
            }
            if !entry.is_idle_for(order.idle, state.now) {
                done.spoke += 1;
            } else if !entry.can_end(order.cause) {
                done.busy += 1;
            } else if order.take() {
                state.abort(key, order.cause);
                done.ended += 1;
            }
        }
        state.wake_for_work();
        done
    }

    fn abort_all(&self, cause: Cause) -> usize {
        self.abort_where(cause, |_| true)
    }

    fn abort_backend(&self, backend: BackendId, cause: Cause) -> usize {
        // A session that delivers its last bytes ends by itself.
        let in_order = cause.closes_in_order(0);
        self.abort_where(cause, |stage| match stage {
            SessionStage::Relaying(timers) => timers.meter.backend.id == backend,
            SessionStage::Delivering(_, timers) => !in_order && timers.meter.backend.id == backend,
            _ => false,
        })
    }

    fn broken(&self) -> &Notify {
        &self.broken
    }

    fn mark_broken(&self) {
        self.worker_panicked.set(true);
    }

    fn close_all(&self) {
        if let Ok(state) = self.state.try_borrow_mut() {
            state.sessions.iter().for_each(|(_, entry)| entry.reset_remaining());
        }
    }

    #[cfg(debug_assertions)]
    fn arm_fault(&self, fault: FaultPoint) {
        self.faults.arm(fault);
    }

    #[cfg(all(test, feature = "sim"))]
    fn is_clean(&self) -> bool {
        self.hold().io.is_clean()
    }

    fn run(self: Rc<Self>) -> Pin<Box<dyn Future<Output = io::Result<()>>>> {
        Box::pin(self.drive())
    }
}

fn view<S: EngineSession>(entry: &SessionEntry<S>, accepted: Instant) -> SessionView<'_> {
    let relayed = match &entry.stage {
        SessionStage::Setup(_) => None,
        SessionStage::Relaying(timers)
        | SessionStage::Delivering(_, timers)
        | SessionStage::Ended(_, timers) => Some(RelayedView {
            meter: &timers.meter,
            phase: entry.session.close_state().phase(),
            last_activity: timers.last_activity(),
            bytes: SessionSide::BOTH.map(|side| entry.session.close_state().carried(side).sent),
        }),
    };
    SessionView { identity: entry.identity, accepted, relayed }
}

/// Returns the result of a session, without its sockets.
fn relay_result(
    session: &impl EngineSession,
    ending: SessionEnd,
    answer: FirstByteState,
) -> RelayResult {
    let (first_byte, unanswered_since) = match answer {
        FirstByteState::Idle(_) => (None, None),
        FirstByteState::Awaited(since) => (None, Some(since)),
        FirstByteState::Answered(at) => (Some(at), None),
    };
    let untouched = ending.cause == Cause::BackendReset
        && ending.phase == Phase::Data
        && matches!(answer, FirstByteState::Idle(_))
        && SessionSide::BOTH
            .into_iter()
            .all(|side| session.close_state().carried(side).received == 0)
        && !session.close_state().failed(SessionSide::Client);
    let bytes = delivery::bytes(session, ending);
    RelayResult { ending, bytes, first_byte, unanswered_since, untouched, sockets: None }
}
