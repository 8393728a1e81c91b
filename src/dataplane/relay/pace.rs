//! Time in ticks, and the sleep of the engine task.
//!
//! Used by `shell`. It reads no clock.

use super::mover::EngineIo;
use std::cell::{Cell, RefCell};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// Length of a timer tick: deadlines are kept to this, or a little later.
pub(super) const TICK: Duration = Duration::from_millis(8);

/// When the engine task sleeps, and until when.
#[derive(Debug)]
pub(super) struct EngineSleep {
    started: Instant,
    /// The engine task, when it sleeps.
    sleeper: RefCell<Option<Waker>>,
    /// The tick the engine task sleeps to; `u64::MAX` for none.
    sleeps_to: Cell<u64>,
}

// === impl EngineSleep ===

impl EngineSleep {
    /// Ticks count from `started`.
    pub(super) fn new(started: Instant) -> EngineSleep {
        EngineSleep { started, sleeper: RefCell::new(None), sleeps_to: Cell::new(u64::MAX) }
    }

    /// The engine task goes to sleep to that tick, which begins at the moment
    /// given back.
    pub(super) fn fall_asleep(&self, to: Option<u64>) -> Option<Instant> {
        self.sleeps_to.set(to.unwrap_or(u64::MAX));
        to.map(|tick| self.started + Duration::from_millis(tick * TICK.as_millis() as u64))
    }

    /// Ready when the sleeping engine task was kicked.
    pub(super) fn poll_wake(&self, cx: &Context<'_>) -> Poll<()> {
        if self.sleeps_to.get() == 0 {
            return Poll::Ready(());
        }
        let mut sleeper = self.sleeper.borrow_mut();
        if !sleeper.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            *sleeper = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// The engine task is awake: it looks at everything anyway.
    pub(super) fn wake_up(&self) {
        self.sleeps_to.set(u64::MAX);
    }

    pub(super) fn tick_after(&self, at: Instant) -> u64 {
        let since = at.saturating_duration_since(self.started);
        (since.as_millis() as u64).div_ceil(TICK.as_millis() as u64)
    }

    pub(super) fn tick_at(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.started).as_millis() as u64 / TICK.as_millis() as u64
    }

    /// Wakes the engine task where it would sleep past `due`.
    pub(super) fn wake_if_sooner(&self, due: u64) {
        if due < self.sleeps_to.get() {
            self.sleeps_to.set(0);
            if let Some(waker) = self.sleeper.borrow_mut().take() {
                waker.wake();
            }
        }
    }

    /// Wakes the engine task where the mover has something to do.
    pub(super) fn bring_forward<M: EngineIo>(&self, mover: &M) {
        if mover.has_work() {
            self.wake_if_sooner(0);
        }
    }
}
