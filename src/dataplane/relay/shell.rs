//! What every engine has in common: its sessions' table, their stages, timers
//! and cuts, and the one long-lived task that drives them.
//!
//! Sessions reach it through `Flow`; the bytes are moved by a [`EngineIo`], behind
//! which the engines differ. It never touches a socket itself, never blocks and
//! never picks a backend.

mod abort;
mod delivery;
mod fall;
mod timers;

use super::flow::{ConnectEnd, RelayResult, SessionMeter, SessionTimeouts};
use super::mover::{ConnectResult, EngineIo, TurnResult};
use super::pace::{EngineSleep, TICK};
use crate::fault_points::{FaultPlan, FaultPoint};
use crate::relay::close_state::{TurnBytes, TurnNext};
use crate::relay::session_timers::{FirstByteState, SessionTimers};
use crate::timer_wheel::TimerWheel;
use slab::Slab;
use std::cell::{Cell, OnceCell, RefCell};
use std::fmt::Debug;
use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::metrics::progress;
use tidegate_core::outcome::{Cause, Phase, SessionEnd, SessionSide};
use tidegate_net::clock;
use tidegate_net::stream;
use tokio::sync::Notify;

/// Batches in a row before accepts and other tasks of the worker get a turn.
const BATCHES_A_TURN: u32 = 8;

/// The same in time: eight batches of bulk can take 20 ms, of small ones not this.
const TURN_MAX: Duration = Duration::from_millis(2);

/// Turns in a row before the thread really goes through its reactor's park:
/// tokio-uring submits its own operations only there, not when a task yields.
const TURNS_A_PARK: u32 = 32;

/// A connect that takes longer has the client watched meanwhile. Most take
/// microseconds, and are spared that.
const WATCH_AFTER: Duration = Duration::from_millis(2 * TICK.as_millis() as u64);

/// One worker's engine.
#[derive(Debug)]
pub(super) struct EngineCore<M: EngineIo> {
    pace: EngineSleep,
    /// How long to poll after the last activity before sleeping.
    spin: Option<Duration>,
    state: RefCell<EngineState<M>>,
    /// A panic has left the state half-way.
    pub(super) broken: Notify,
    /// The worker has fallen: what is left is closed in `bury`.
    fallen: Cell<bool>,
    pub(super) faults: FaultPlan,
    /// Where it shows what it is about.
    worker: OnceCell<Arc<WorkerCounters>>,
}

/// The sessions and what moves their bytes.
#[derive(Debug)]
pub(super) struct EngineState<M: EngineIo> {
    pub(super) flows: Slab<SessionEntry<M::Flow>>,
    pub(super) mover: M,
    wheel: TimerWheel,
    fired: Vec<u32>,
    /// Read once a batch.
    pub(super) now: Instant,
    /// When the mover had nothing left to do, at last.
    idle_at: Instant,
    next_tick: Instant,
    /// Rounds in a row for which timers that are due have waited.
    postponed: usize,
}

#[derive(Debug)]
pub(super) struct SessionEntry<F> {
    pub(super) flow: F,
    stage: SessionStage,
    /// The session, when it waits.
    waiter: Option<Waker>,
    /// The client failed before the relay began.
    client_failed: bool,
    cut: Option<Cause>,
    /// Its session is gone; kept only until it has settled.
    orphaned: bool,
    /// Its client was turned away.
    refused: bool,
    /// How often it was looked at since it ended.
    looks: u8,
}

#[derive(Debug)]
enum SessionStage {
    /// Before the relay; the connect of the backend socket may be pending.
    Setup(SessionSetup),
    Relaying(Box<SessionTimers>),
    /// A side has failed, and what it had sent before is on its way to the other.
    Delivering(SessionEnd, Box<SessionTimers>),
    Ended(SessionEnd, Box<SessionTimers>),
}

#[derive(Debug, Default)]
struct SessionSetup {
    /// When the pending connect has taken too long.
    deadline: Option<Instant>,
    /// How the pending connect came to an end.
    decided: Option<ConnectResult>,
    timed_out: bool,
}

// === impl EngineCore: what sessions call ===

impl<M: EngineIo> EngineCore<M> {
    pub(super) fn new(mover: M, spin: Option<Duration>) -> Rc<EngineCore<M>> {
        let started = clock::now();
        Rc::new(EngineCore {
            pace: EngineSleep::new(started),
            spin,
            state: RefCell::new(EngineState {
                flows: Slab::new(),
                mover,
                wheel: TimerWheel::new(0),
                fired: Vec::new(),
                now: started,
                idle_at: started,
                next_tick: started,
                postponed: 0,
            }),
            broken: Notify::new(),
            fallen: Cell::new(false),
            faults: FaultPlan::default(),
            worker: OnceCell::new(),
        })
    }

    pub(super) fn count_for(&self, worker: Arc<WorkerCounters>) {
        // Told once.
        let _ = self.worker.set(worker);
    }

    #[inline]
    fn is_at(&self, stage: progress::WorkerStage) {
        if let Some(worker) = self.worker.get() {
            worker.pulse.at(stage);
        }
    }

    pub(super) fn with_mover(&self, tell: impl FnOnce(&mut M)) {
        tell(&mut self.hold().mover);
    }

    pub(super) fn open(&self, client: OwnedFd) -> io::Result<u32> {
        let state = &mut *self.hold();
        let vacant = state.flows.vacant_entry();
        let key = vacant.key() as u32;
        vacant.insert(SessionEntry {
            flow: state.mover.open(key, client)?,
            stage: SessionStage::Setup(SessionSetup::default()),
            waiter: None,
            client_failed: false,
            cut: None,
            orphaned: false,
            refused: false,
            looks: 0,
        });
        Ok(key)
    }

    pub(super) fn open_flows(&self) -> usize {
        self.hold().flows.len()
    }

    pub(super) fn attach(&self, key: u32, upstream: OwnedFd) -> io::Result<()> {
        let state = &mut *self.hold();
        let entry = &mut state.flows[key as usize];
        state.mover.attach(key, &mut entry.flow, upstream, false)
    }

    pub(super) async fn connected(
        &self,
        key: u32,
        upstream: OwnedFd,
        deadline: Instant,
    ) -> Result<(), ConnectEnd> {
        self.start_connect(key, upstream, deadline).map_err(ConnectEnd::Failed)?;
        let verdict = poll_fn(|cx| self.poll_connected(key, cx)).await;
        let state = &mut *self.hold();
        state.wheel.cancel(key);
        if verdict.is_err() {
            state.mover.detach(&mut state.flows[key as usize].flow);
            self.pace.bring_forward(&state.mover);
        }
        verdict
    }

    fn start_connect(&self, key: u32, upstream: OwnedFd, deadline: Instant) -> io::Result<()> {
        let state = &mut *self.hold();
        let entry = &mut state.flows[key as usize];
        state.mover.attach(key, &mut entry.flow, upstream, true)?;
        entry.stage = SessionStage::Setup(SessionSetup {
            deadline: Some(deadline),
            ..SessionSetup::default()
        });
        let due = self.pace.tick_after(deadline.min(clock::now() + WATCH_AFTER));
        state.wheel.arm(key, due);
        self.pace.wake_if_sooner(due);
        self.pace.bring_forward(&state.mover);
        Ok(())
    }

    fn poll_connected(&self, key: u32, cx: &Context<'_>) -> Poll<Result<(), ConnectEnd>> {
        let state = &mut *self.hold();
        let entry = &mut state.flows[key as usize];
        if let Some(end) = entry.interruption() {
            return Poll::Ready(Err(end));
        }
        match entry.stage {
            // Writable and well is connected; only a failure is worth asking for.
            SessionStage::Setup(SessionSetup {
                decided: Some(ConnectResult::Connected), ..
            }) => Poll::Ready(Ok(())),
            SessionStage::Setup(SessionSetup {
                decided: Some(ConnectResult::Unwatched(errno)),
                ..
            }) => Poll::Ready(Err(ConnectEnd::Failed(io::Error::from_raw_os_error(errno)))),
            SessionStage::Setup(SessionSetup { decided: Some(ConnectResult::Failed), .. }) => {
                let gone = || io::Error::from_raw_os_error(libc::EBADF);
                let socket = M::backend(&entry.flow).ok_or_else(gone);
                let verdict = socket.and_then(stream::connect_result);
                Poll::Ready(verdict.map_err(ConnectEnd::Failed))
            }
            SessionStage::Setup(SessionSetup { timed_out: true, .. }) => {
                Poll::Ready(Err(ConnectEnd::TimedOut))
            }
            _ => {
                entry.waiter = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    pub(super) async fn interrupted(&self, key: u32) -> ConnectEnd {
        {
            let state = &mut *self.hold();
            state.mover.watch_client(key, &mut state.flows[key as usize].flow);
            self.pace.bring_forward(&state.mover);
        }
        poll_fn(|cx| {
            let entry = &mut self.hold().flows[key as usize];
            match entry.interruption() {
                Some(end) => Poll::Ready(end),
                None => {
                    entry.waiter = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }

    pub(super) fn client_left_silently(&self, key: u32) -> bool {
        let left = |client| matches!(stream::peek(client, &mut [0]), Ok(0));
        M::client(&self.state.borrow().flows[key as usize].flow).is_some_and(left)
    }

    pub(super) fn poll_relayed(&self, key: u32, cx: &Context<'_>) -> Poll<RelayResult> {
        {
            let entry = &mut self.hold().flows[key as usize];
            if !matches!(entry.stage, SessionStage::Ended(..)) || !M::is_settled(&entry.flow) {
                // The same task waits until the end: one clone a session.
                entry.waiter.get_or_insert_with(|| cx.waker().clone());
                return Poll::Pending;
            }
        }
        Poll::Ready(self.take_relayed(key))
    }

    pub(super) fn start_relay(&self, key: u32, limits: SessionTimeouts, meter: SessionMeter) {
        let state = &mut *self.hold();
        state.now = clock::now();
        let entry = &mut state.flows[key as usize];
        entry.waiter = None;
        self.faults.pass(FaultPoint::Relay);
        entry.stage =
            SessionStage::Relaying(Box::new(SessionTimers::new(limits, meter, state.now)));
        if let Some(cause) = entry.cut {
            state.end_by_timer(key, cause, &self.pace);
        } else {
            let mut moved = TurnBytes::default();
            let next = state.mover.begin(key, &mut entry.flow, &mut moved);
            state.rearm(key, &self.pace);
            state.progress(key, &moved, next, &self.pace);
        }
        self.pace.bring_forward(&state.mover);
    }

    fn take_relayed(&self, key: u32) -> RelayResult {
        let mut state = self.hold();
        state.wheel.cancel(key);
        let entry = &mut state.flows[key as usize];
        let setup = SessionStage::Setup(SessionSetup::default());
        let SessionStage::Ended(ending, relaying) = std::mem::replace(&mut entry.stage, setup)
        else {
            unreachable!("a relay was collected before it ended");
        };
        RelayResult {
            ending,
            bytes: delivery::bytes::<M>(&entry.flow, ending),
            first_byte: match relaying.answer {
                FirstByteState::Answered(at) => Some(at),
                _ => None,
            },
            unanswered_since: match relaying.answer {
                FirstByteState::Awaited(since) => Some(since),
                _ => None,
            },
            untouched: is_untouched::<M>(&entry.flow, ending, relaying.answer),
            sockets: M::take_sockets(&mut entry.flow).expect("a settled relay has both sockets"),
        }
    }

    pub(super) fn refuse(&self, key: u32) -> u64 {
        let state = &mut *self.hold();
        let entry = &mut state.flows[key as usize];
        entry.refused = true;
        let unread = M::client(&entry.flow).map_or(0, stream::unread);
        state.mover.refuse(&mut entry.flow);
        unread
    }

    pub(super) fn remove(&self, key: u32) {
        let state = &mut *self.hold();
        let entry = &mut state.flows[key as usize];
        entry.waiter = None;
        if let SessionStage::Relaying(relaying) = &entry.stage {
            relaying.over();
        }
        if self.fallen.get() {
            return;
        }
        entry.reset_remaining::<M>();
        state.wheel.cancel(key);
        let entry = &mut state.flows[key as usize];
        if M::is_settled(&entry.flow) {
            state.flows.remove(key as usize);
            return;
        }
        entry.orphaned = true;
        state.mover.stop_relaying(&mut entry.flow);
        state.now = clock::now();
        state.expect_to_settle(key, &self.pace);
        self.pace.bring_forward(&state.mover);
    }
}

/// Whether a backend is gone of which the client need never know.
fn is_untouched<M: EngineIo>(flow: &M::Flow, ending: SessionEnd, answer: FirstByteState) -> bool {
    ending.cause == Cause::BackendReset
        && ending.phase == Phase::Data
        && answer == FirstByteState::Idle
        && SessionSide::BOTH.into_iter().all(|side| M::carried(flow, side).received == 0)
        && !M::verdict(flow).failed(SessionSide::Client)
}

// === impl EngineCore: the task ===

impl<M: EngineIo> EngineCore<M> {
    /// Drives every flow; runs as long as the worker.
    pub(super) async fn run(self: Rc<Self>) -> io::Result<()> {
        let mut timer = pin!(tokio::time::sleep(Duration::ZERO));
        let mut last_activity = clock::now();
        let mut turns = 0;
        loop {
            self.is_at(progress::WorkerStage::Relaying);
            let TurnResult { drained, busy } = self.turn()?;
            self.is_at(progress::WorkerStage::Waiting);
            let now = self.hold().now;
            if busy {
                last_activity = now;
            }
            let spinning = self.spin.is_some_and(|spin| now - last_activity < spin);
            turns += 1;
            let due = turns >= TURNS_A_PARK;
            let awake = !drained || spinning || !self.hold().mover.arm_wakeup();
            if awake && (!due || !self.hold().mover.signal_wakeup()?) {
                // Lets accepts and sessions run, and the reactor look around: no
                // turn follows another without it, whatever the mover says.
                tokio::task::yield_now().await;
                continue;
            }
            turns = 0;
            if !awake {
                let state = &mut *self.hold();
                state.idle_at = state.now;
            }
            self.sleep(timer.as_mut()).await?;
            self.hold().mover.disarm_wakeup();
        }
    }

    fn turn(&self) -> io::Result<TurnResult> {
        let mut busy = false;
        let mut ends_at = None;
        for _ in 0..BATCHES_A_TURN {
            let state = &mut *self.hold();
            let before = state.now;
            let round = M::round(state, &self.pace)?;
            self.faults.pass(FaultPoint::Engine);
            busy |= round.busy;
            let late = state.now >= *ends_at.get_or_insert(state.now + TURN_MAX);
            let gap = state.now.saturating_duration_since(before);
            let expired = state.expire(round.drained && gap < timers::ROUND_GAP_MAX, &self.pace);
            if state.now >= state.next_tick {
                state.next_tick = state.now + M::TICK;
                M::tick(state, &self.pace);
            }
            if round.drained && expired && !state.mover.has_work() {
                return Ok(TurnResult { drained: true, busy });
            }
            if late {
                break;
            }
        }
        Ok(TurnResult { drained: false, busy: true })
    }

    /// Sleeps until the mover, a timer or a session wants something.
    async fn sleep(&self, mut timer: std::pin::Pin<&mut tokio::time::Sleep>) -> io::Result<()> {
        let next = {
            let state = self.hold();
            let wanted = state.mover.wants_tick(!state.flows.is_empty());
            let tick = wanted.then(|| self.pace.tick_after(state.next_tick));
            [state.wheel.next_due(), tick].into_iter().flatten().min()
        };
        if let Some(at) = self.pace.fall_asleep(next)
            && timer.deadline() != at.into()
        {
            timer.as_mut().reset(at.into());
        }
        poll_fn(|cx| {
            if let Poll::Ready(woken) = self.hold().mover.poll_wake(cx) {
                return Poll::Ready(woken);
            }
            if next.is_some() && timer.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            self.pace.poll_wake(cx).map(Ok)
        })
        .await?;
        self.pace.wake_up();
        Ok(())
    }
}

// === impl EngineState ===

impl<M: EngineIo> EngineState<M> {
    /// A pending connect came to an end; the worst that is said of it holds.
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

    /// Counts what was moved and ends the session where it is over.
    #[inline]
    pub(super) fn progress(
        &mut self,
        key: u32,
        moved: &TurnBytes,
        next: TurnNext,
        pace: &EngineSleep,
    ) {
        let entry = &mut self.flows[key as usize];
        let relaying = match &mut entry.stage {
            SessionStage::Relaying(relaying) => relaying,
            SessionStage::Ended(_, relaying) => return relaying.count(moved),
            _ => return,
        };
        relaying.account(moved, self.now);
        if let TurnNext::End(ending) = next {
            self.end(key, ending, pace);
        } else if moved.ended {
            self.rearm(key, pace);
        }
    }

    /// A side has failed while bytes from it still wait.
    pub(super) fn note_failure(&mut self, key: u32, news: bool, pace: &EngineSleep) {
        if news && self.flows[key as usize].is_relaying() {
            self.rearm(key, pace);
        }
    }

    /// An operation of this flow has come back: hands the session its sockets,
    /// or lets go of one that nobody waits for.
    #[inline]
    pub(super) fn finish_when_idle(&mut self, key: u32, pace: &EngineSleep) {
        let entry = &mut self.flows[key as usize];
        if !M::is_settled(&entry.flow) {
            return;
        }
        if entry.orphaned {
            self.wheel.cancel(key);
            self.flows.remove(key as usize);
        } else if matches!(entry.stage, SessionStage::Ended(..)) {
            self.settled(key, pace);
        }
    }

    fn end_by_timer(&mut self, key: u32, cause: Cause, pace: &EngineSleep) {
        let ending = M::verdict(&self.flows[key as usize].flow).cut(cause);
        self.end(key, ending, pace);
    }

    fn end(&mut self, key: u32, ending: SessionEnd, pace: &EngineSleep) {
        let entry = &mut self.flows[key as usize];
        let setup = SessionStage::Setup(SessionSetup::default());
        match std::mem::replace(&mut entry.stage, setup) {
            SessionStage::Relaying(relaying) => {
                relaying.over();
                entry.stage = SessionStage::Ended(ending, relaying);
            }
            other => {
                entry.stage = other;
                return;
            }
        }
        self.mover.stop_relaying(&mut entry.flow);
        if M::is_settled(&entry.flow) {
            self.settled(key, pace);
        } else {
            self.expect_to_settle(key, pace);
        }
    }

    fn abort(&mut self, key: u32, cause: Cause, pace: &EngineSleep) {
        let entry = &mut self.flows[key as usize];
        entry.cut = Some(cause);
        match entry.stage {
            SessionStage::Relaying(_) => self.end_by_timer(key, cause, pace),
            SessionStage::Setup(_) => entry.wake(),
            SessionStage::Delivering(..) => self.stop_delivery(key),
            SessionStage::Ended(..) => {}
        }
    }
}

// === impl SessionEntry ===

impl<F> SessionEntry<F> {
    #[inline]
    pub(super) fn is_relaying(&self) -> bool {
        matches!(self.stage, SessionStage::Relaying(_))
    }

    fn interruption(&self) -> Option<ConnectEnd> {
        if let Some(cause) = self.cut {
            return Some(ConnectEnd::Aborted(cause));
        }
        self.client_failed.then_some(ConnectEnd::ClientGone(libc::ECONNRESET))
    }

    fn wake(&mut self) {
        if let Some(waiter) = self.waiter.take() {
            waiter.wake();
        }
    }
}
