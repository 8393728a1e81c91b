//! The engine task: rounds of events and due timers, then sleep until the next event.
//!
//! One per worker, started by `worker`. It yields between turns, so that accepts and session
//! tasks of the worker run.

use super::engine::{EngineCore, EngineIo, TurnResult};
use super::timers;
use crate::fault_points::FaultPoint;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};
use tidegate_core::metrics::progress::WorkerStage;
use tidegate_net::clock;
use tokio::time::Sleep;

/// Rounds per turn, before other tasks of the worker run.
const ROUNDS_PER_TURN: u32 = 8;

/// Time limit of a turn. Eight rounds of small messages are shorter; eight rounds of bulk can
/// take 20 ms.
const TURN_MAX: Duration = Duration::from_millis(2);

/// Turns before the thread parks in its reactor. tokio-uring submits its own operations only
/// when it parks, not when a task yields.
const TURNS_PER_PARK: u32 = 32;

/// Length of a timer tick. Timers fire up to one tick late, or later under load.
pub(super) const TICK: Duration = Duration::from_millis(8);

/// Converts time to ticks, and wakes the sleeping engine task. It reads no clock.
#[derive(Debug)]
pub(super) struct EngineSleep {
    started: Instant,
    /// Waker of the sleeping engine task.
    sleeper: Option<Waker>,
    /// The tick at which the engine task wakes up: `u64::MAX` for none, 0 for at once.
    sleeps_to: u64,
}

// === impl EngineSleep ===

impl EngineSleep {
    /// Returns a state whose tick 0 is `started`.
    pub(super) fn new(started: Instant) -> EngineSleep {
        EngineSleep { started, sleeper: None, sleeps_to: u64::MAX }
    }

    /// Returns the first tick that begins at `at` or later.
    pub(super) fn tick_after(&self, at: Instant) -> u64 {
        let since = at.saturating_duration_since(self.started);
        (since.as_millis() as u64).div_ceil(TICK.as_millis() as u64)
    }

    pub(super) fn tick_at(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.started).as_millis() as u64 / TICK.as_millis() as u64
    }

    /// Returns the tenths of a second from the start to `now`, at most 13 years.
    pub(super) fn tenths_at(&self, now: Instant) -> u32 {
        let since = now.saturating_duration_since(self.started);
        u32::try_from(since.as_millis() / 100).unwrap_or(u32::MAX)
    }

    pub(super) fn start_of_tenth(&self, tenth: u32) -> Instant {
        self.started + Duration::from_millis(u64::from(tenth) * 100)
    }

    fn start_of(&self, tick: u64) -> Instant {
        self.started + Duration::from_millis(tick * TICK.as_millis() as u64)
    }

    /// Wakes the engine task if it would sleep past the tick `due`.
    pub(super) fn wake_if_sooner(&mut self, due: u64) {
        if due < self.sleeps_to {
            self.sleeps_to = 0;
            if let Some(waker) = self.sleeper.take() {
                waker.wake();
            }
        }
    }

    /// Ready if `wake_if_sooner` has woken the engine task.
    fn poll_wake(&mut self, cx: &Context<'_>) -> Poll<()> {
        if self.sleeps_to == 0 {
            return Poll::Ready(());
        }
        if !self.sleeper.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            self.sleeper = Some(cx.waker().clone());
        }
        Poll::Pending
    }
}

// === impl EngineCore ===

impl<M: EngineIo> EngineCore<M> {
    /// Body of the engine task.
    pub(super) async fn drive(self: Rc<Self>) -> io::Result<()> {
        let mut timer = pin!(tokio::time::sleep(Duration::ZERO));
        let mut last_activity = clock::now();
        let mut turns = 0;
        loop {
            self.worker.pulse.at(WorkerStage::Relaying);
            let TurnResult { drained, busy } = self.turn()?;
            self.worker.pulse.at(WorkerStage::Waiting);
            turns += 1;
            let idle = {
                let state = &mut *self.hold();
                if busy {
                    last_activity = state.now;
                }
                let spins = self.spin.is_some_and(|spin| state.now - last_activity < spin);
                let idle = drained && !spins && state.io.arm_wakeup();
                if idle {
                    state.idle_at = state.now;
                }
                idle || turns >= TURNS_PER_PARK && state.io.signal_wakeup()?
            };
            if idle {
                turns = 0;
                self.sleep(timer.as_mut()).await?;
            } else {
                // Accepts, session tasks and the reactor run between two turns.
                tokio::task::yield_now().await;
            }
        }
    }

    fn turn(&self) -> io::Result<TurnResult> {
        let mut busy = false;
        let mut ends_at = None;
        for _ in 0..ROUNDS_PER_TURN {
            let state = &mut *self.hold();
            let before = state.now;
            let round = M::round(state)?;
            self.faults.pass(FaultPoint::Engine);
            busy |= round.busy;
            let late = state.now >= *ends_at.get_or_insert(state.now + TURN_MAX);
            let gap = state.now.saturating_duration_since(before);
            let expired = state.expire(round.drained && gap < timers::ROUND_GAP_MAX);
            if state.now >= state.next_tick {
                state.next_tick = state.now + M::tick(state);
            }
            if round.drained && expired && !state.io.has_work() {
                return Ok(TurnResult { drained: true, busy });
            }
            if late {
                break;
            }
        }
        Ok(TurnResult { drained: false, busy: true })
    }

    /// Sleeps until the engine, a timer or a session needs a turn.
    async fn sleep(&self, mut timer: Pin<&mut Sleep>) -> io::Result<()> {
        let next = {
            let state = &mut *self.hold();
            let wanted = state.io.wants_tick(!state.sessions.is_empty());
            let tick = wanted.then(|| state.sleep.tick_after(state.next_tick));
            let next = [state.wheel.next_due(), tick].into_iter().flatten().min();
            state.sleep.sleeps_to = next.unwrap_or(u64::MAX);
            next.map(|tick| state.sleep.start_of(tick))
        };
        if let Some(at) = next
            && timer.deadline() != at.into()
        {
            timer.as_mut().reset(at.into());
        }
        poll_fn(|cx| {
            let state = &mut *self.hold();
            if let Poll::Ready(woken) = state.io.poll_wake(cx) {
                return Poll::Ready(woken);
            }
            if next.is_some() && timer.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            state.sleep.poll_wake(cx).map(Ok)
        })
        .await?;
        // An awake task needs no wake-up.
        self.hold().sleep.sleeps_to = u64::MAX;
        Ok(())
    }
}
