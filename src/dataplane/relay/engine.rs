//! What the engines share: the table of sessions, their stages and how they end.
//!
//! Sessions and the worker call it as a [`RelayEngine`]; the bytes are moved by an
//! [`EngineIo`], in which the engines differ. It never blocks and never picks a backend.

use super::RelayEngine;
use super::delivery;
use super::handle::{ConnectEnd, RelayResult, SessionMeter, SessionTimeouts};
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
use std::os::fd::{BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::outcome::{Cause, Phase, SessionEnd, SessionSide};
use tidegate_core::table::state::BackendId;
use tidegate_net::clock;
use tidegate_net::stream;
use tokio::sync::Notify;

/// A connect that takes longer has the client watched meanwhile. Most take microseconds
/// and are spared that.
const WATCH_AFTER: Duration = Duration::from_millis(2 * TICK.as_millis() as u64);

/// The part in which the engines differ: moves the bytes of sessions, each known by its key.
pub(super) trait EngineIo: Sized + Debug + 'static {
    /// One session's sockets and streams.
    type Flow: EngineFlow;

    /// A session with only a client.
    fn open(&mut self, client: OwnedFd) -> Self::Flow;

    /// Gives it a backend socket. Where a connect is `pending` on that, its end is reported.
    fn attach(
        &mut self,
        key: u32,
        flow: &mut Self::Flow,
        upstream: OwnedFd,
        pending: bool,
    ) -> io::Result<()>;

    /// Takes the backend socket away again and closes it.
    fn detach(&mut self, flow: &mut Self::Flow);

    /// From now on the client's failure is reported, and where `readable`, once, that it has
    /// bytes or has ended.
    fn watch_client(&mut self, key: u32, flow: &mut Self::Flow, readable: bool);

    /// Starts relaying.
    fn begin(&mut self, key: u32, flow: &mut Self::Flow, moved: &mut TurnBytes) -> TurnNext;

    /// The session is over: nothing is moved any more, and it settles.
    fn stop(&mut self, flow: &mut Self::Flow, how: StopMode);

    /// Asks for progress that has not shown yet; false where there can be none.
    fn request_progress(&mut self, flow: &mut Self::Flow) -> bool;

    /// Whether something waits to be done at once.
    fn has_work(&self) -> bool;

    /// Handles what has happened, a batch at most.
    fn round(state: &mut EngineState<Self>) -> io::Result<TurnResult>;

    /// Periodic work; gives the time to the next tick. Called while awake, or asleep where
    /// it [wants to be](EngineIo::wants_tick).
    fn tick(state: &mut EngineState<Self>) -> Duration;

    /// Whether to wake for the next tick; `sessions` says whether there are any.
    fn wants_tick(&self, sessions: bool) -> bool;

    /// Gets ready to be awaited; false where there is something to do. The next round
    /// ends that.
    fn arm_wakeup(&mut self) -> bool;

    /// Makes `poll_wake` ready through the reactor; false where it cannot.
    fn signal_wakeup(&self) -> io::Result<bool>;

    /// Ready when there is something to do.
    fn poll_wake(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Whether all buffers and operations are back.
    #[cfg(all(test, feature = "sim"))]
    fn is_clean(&self) -> bool {
        true
    }
}

/// One session's sockets and streams, as the engines share them.
pub(super) trait EngineFlow: Debug {
    fn socket(&self, side: SessionSide) -> Option<BorrowedFd<'_>>;

    /// Which sides have ended, and what was moved.
    fn close_state(&self) -> &CloseState;

    /// Whether its sockets can be given away: no operation uses them.
    fn is_settled(&self) -> bool;

    /// Takes both sockets out of a settled, connected session.
    fn take_sockets(&mut self) -> Option<[OwnedFd; 2]>;
}

/// How a session is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StopMode {
    /// Operations are cancelled.
    Cancel,
    /// That was not enough: its connections are reset under them.
    Reset,
}

/// How a pending connect ended, from good to bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ConnectResult {
    Connected,
    /// The socket knows how.
    Failed,
    /// It continues, but its end cannot be seen: this host failed to wait.
    Unwatched(i32),
}

/// What a round did.
#[derive(Debug, Clone, Copy)]
pub(super) struct TurnResult {
    /// Nothing is left to do now.
    pub(super) drained: bool,
    /// Something was done.
    pub(super) busy: bool,
}

/// One worker's engine.
#[derive(Debug)]
pub(super) struct EngineCore<M: EngineIo> {
    /// How long to poll after the last activity before sleeping.
    pub(super) spin: Option<Duration>,
    pub(super) state: RefCell<EngineState<M>>,
    /// A panic has left the state half-way.
    pub(super) broken: Notify,
    /// The worker has panicked: what is left is closed in `close_all`.
    pub(super) worker_panicked: Cell<bool>,
    pub(super) faults: FaultPlan,
    /// Where it shows its progress.
    pub(super) worker: Arc<WorkerCounters>,
}

// === impl EngineCore: what sessions and the worker call ===

impl<M: EngineIo> EngineCore<M> {
    pub(super) fn new(io: M, spin: Option<Duration>, worker: Arc<WorkerCounters>) -> Rc<Self> {
        let started = clock::now();
        Rc::new(EngineCore {
            spin,
            state: RefCell::new(EngineState {
                flows: Slab::new(),
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
        let chosen = state.flows.iter().filter(|(_, e)| !e.orphaned && matches(&e.stage));
        let keys: Vec<u32> = chosen.map(|(key, _)| key as u32).collect();
        for key in &keys {
            state.abort(*key, cause);
        }
        state.wake_for_work();
        keys.len()
    }
}

impl<M: EngineIo> RelayEngine for EngineCore<M> {
    fn open(&self, client: OwnedFd) -> u32 {
        let state = &mut *self.hold();
        let flow = state.io.open(client);
        state.flows.insert(SessionEntry {
            flow,
            stage: SessionStage::Setup(SessionSetup::default()),
            waiter: None,
            client_failed: false,
            client_sent: None,
            aborted: None,
            orphaned: false,
            looks: 0,
        }) as u32
    }

    fn attach(&self, key: u32, upstream: OwnedFd) -> io::Result<()> {
        let state = &mut *self.hold();
        state.io.attach(key, &mut state.flows[key as usize].flow, upstream, false)
    }

    fn start_connect(&self, key: u32, upstream: OwnedFd, deadline: Instant) -> io::Result<()> {
        let state = &mut *self.hold();
        let entry = &mut state.flows[key as usize];
        state.io.attach(key, &mut entry.flow, upstream, true)?;
        let setup = SessionSetup { deadline: Some(deadline), ..SessionSetup::default() };
        entry.stage = SessionStage::Setup(setup);
        state.arm(key, state.sleep.tick_after(deadline.min(clock::now() + WATCH_AFTER)));
        state.wake_for_work();
        Ok(())
    }

    fn poll_connected(&self, key: u32, cx: &Context<'_>) -> Poll<Result<(), ConnectEnd>> {
        let state = &mut *self.hold();
        let entry = &mut state.flows[key as usize];
        let Some(result) = entry.connect_result() else {
            entry.waiter = Some(cx.waker().clone());
            return Poll::Pending;
        };
        state.wheel.cancel(key);
        if result.is_err() {
            state.io.detach(&mut entry.flow);
            state.wake_for_work();
        }
        Poll::Ready(result)
    }

    fn watch_client(&self, key: u32, readable: bool) {
        let state = &mut *self.hold();
        let entry = &mut state.flows[key as usize];
        entry.client_sent = readable.then_some(false);
        state.io.watch_client(key, &mut entry.flow, readable);
        state.wake_for_work();
    }

    fn poll_client(&self, key: u32, cx: &Context<'_>) -> Poll<Result<(), ConnectEnd>> {
        let entry = &mut self.hold().flows[key as usize];
        if let Some(end) = entry.interruption() {
            return Poll::Ready(Err(end));
        }
        if entry.client_sent.take_if(|sent| *sent).is_some() {
            return Poll::Ready(Ok(()));
        }
        entry.waiter = Some(cx.waker().clone());
        Poll::Pending
    }

    fn set_low_water(&self, key: u32, bytes: u32) -> io::Result<()> {
        let state = self.hold();
        let client = state.flows[key as usize].flow.socket(SessionSide::Client);
        client.map_or(Ok(()), |client| stream::set_low_water(client, bytes))
    }

    fn client_left_silently(&self, key: u32) -> bool {
        let left = |client| matches!(stream::peek(client, &mut [0]), Ok(0));
        self.hold().flows[key as usize].flow.socket(SessionSide::Client).is_some_and(left)
    }

    fn unread(&self, key: u32) -> u64 {
        let state = self.hold();
        state.flows[key as usize].flow.socket(SessionSide::Client).map_or(0, stream::unread)
    }

    fn start_relay(&self, key: u32, limits: SessionTimeouts, meter: SessionMeter) {
        let state = &mut *self.hold();
        state.now = clock::now();
        let entry = &mut state.flows[key as usize];
        entry.waiter = None;
        self.faults.pass(FaultPoint::Relay);
        let timers = Box::new(SessionTimers::new(limits, meter, state.now));
        entry.stage = SessionStage::Relaying(timers);
        if let Some(cause) = entry.aborted {
            state.end_by_us(key, cause);
        } else {
            let mut moved = TurnBytes::default();
            let next = state.io.begin(key, &mut entry.flow, &mut moved);
            state.rearm(key);
            state.progress(key, &moved, next);
        }
        state.wake_for_work();
    }

    fn poll_relayed(&self, key: u32, cx: &Context<'_>) -> Poll<RelayResult> {
        let state = &mut *self.hold();
        let entry = &mut state.flows[key as usize];
        let settled = entry.flow.is_settled();
        let SessionStage::Ended(ending, timers) = &entry.stage else {
            // The same task waits until the end: one clone a session.
            entry.waiter.get_or_insert_with(|| cx.waker().clone());
            return Poll::Pending;
        };
        if !settled {
            entry.waiter.get_or_insert_with(|| cx.waker().clone());
            return Poll::Pending;
        }
        let mut result = relay_result(&entry.flow, *ending, timers.answer);
        result.sockets = entry.flow.take_sockets();
        entry.stage = SessionStage::Setup(SessionSetup::default());
        state.wheel.cancel(key);
        Poll::Ready(result)
    }

    fn so_far(&self, key: u32, cause: Cause) -> Option<RelayResult> {
        let state = self.state.try_borrow().ok()?;
        let entry = state.flows.get(key as usize)?;
        let (ending, answer) = match &entry.stage {
            SessionStage::Ended(ending, timers) | SessionStage::Delivering(ending, timers) => {
                (*ending, timers.answer)
            }
            SessionStage::Relaying(timers) => (entry.flow.close_state().cut(cause), timers.answer),
            SessionStage::Setup(_) => (entry.flow.close_state().cut(cause), FirstByteState::Idle),
        };
        Some(relay_result(&entry.flow, ending, answer))
    }

    fn remove(&self, key: u32) {
        let state = &mut *self.hold();
        let entry = &mut state.flows[key as usize];
        entry.waiter = None;
        if let SessionStage::Relaying(timers) = &entry.stage {
            timers.over();
        }
        if self.worker_panicked.get() {
            return;
        }
        entry.reset_remaining();
        state.wheel.cancel(key);
        if entry.flow.is_settled() {
            state.flows.remove(key as usize);
            return;
        }
        entry.orphaned = true;
        state.io.stop(&mut entry.flow, StopMode::Cancel);
        state.now = clock::now();
        state.expect_to_settle(key);
        state.wake_for_work();
    }

    fn open_flows(&self) -> usize {
        self.hold().flows.len()
    }

    fn abort_all(&self, cause: Cause) -> usize {
        self.abort_where(cause, |_| true)
    }

    fn abort_backend(&self, backend: BackendId, cause: Cause) -> usize {
        self.abort_where(cause, |stage| match stage {
            SessionStage::Relaying(timers) | SessionStage::Delivering(_, timers) => {
                timers.meter.backend.id == backend
            }
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
            state.flows.iter().for_each(|(_, entry)| entry.reset_remaining());
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

/// What a session moved and how it ended, without its sockets.
fn relay_result(flow: &impl EngineFlow, ending: SessionEnd, answer: FirstByteState) -> RelayResult {
    let (first_byte, unanswered_since) = match answer {
        FirstByteState::Idle => (None, None),
        FirstByteState::Awaited(since) => (None, Some(since)),
        FirstByteState::Answered(at) => (Some(at), None),
    };
    let untouched = ending.cause == Cause::BackendReset
        && ending.phase == Phase::Data
        && answer == FirstByteState::Idle
        && SessionSide::BOTH.into_iter().all(|side| flow.close_state().carried(side).received == 0)
        && !flow.close_state().failed(SessionSide::Client);
    let bytes = delivery::bytes(flow, ending);
    RelayResult { ending, bytes, first_byte, unanswered_since, untouched, sockets: None }
}
