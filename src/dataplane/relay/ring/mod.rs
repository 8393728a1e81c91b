//! The ring engine: receives and sends as io_uring operations on a ring of a
//! worker's own.
//!
//! Driven by `engine` and its task, woken by the ring's eventfd through the runtime's
//! reactor. Multishot receives into shared buffers, sends straight out of them;
//! an idle session holds no buffer. Nothing here is unsafe: what the kernel uses
//! belongs to `net::ring`.

mod bulk;
mod fallback;
mod queue;
mod streams;
#[cfg(test)]
mod tests;

use super::engine::{EngineIo, StopMode, TurnResult};
use super::stages::EngineState;
use crate::local_errors;
use crate::relay::close_state::{TurnBytes, TurnNext};
use crate::relay::ring::fallback::{FallbackBuffers, FallbackResult};
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use streams::{OpResult, RingSession};
use tidegate_core::metrics::counters::{
    LocalErrorKind, LocalErrorPlace, RingEvent, WorkerCounters,
};
use tidegate_core::outcome::SessionSide;
use tidegate_net::budget::MemoryBudget;
use tidegate_net::clock;
use tidegate_net::pipe::Pipes;
use tidegate_net::reactor;
use tidegate_net::ring::{BUFFER_LEN, Completion, Ring, RingCounts, RingSettings, RingWaker};
use tokio::io::unix::AsyncFd;

/// 16 MiB at most for a worker, and only as much as was ever in use at once.
/// 256 were enough for 512 busy sessions and 64 cost them 20 %; the rest is for
/// slow readers, each of which pins eight. Where they run out, sessions go on
/// with a buffer each of their own, slower, and where the process's budget has no
/// room for that, with none. Few are shown at first: those stay
/// in the cache, and a sender faster than its reader fills no more than those
/// before it is stopped. But one system call completes up to forty receives
/// (twice twenty pieces of deferred work), and each needs one: showing sixteen
/// cost up to 25 % at 512 busy sessions.
pub(crate) const SETTINGS: RingSettings = RingSettings { buffers: 1024, shown: 64 };

/// Between two ticks. Wake-ups by the eventfd are argued for, not promised: look now and then.
const TICK: Duration = Duration::from_millis(100);

/// Ticks without starvation after which fewer buffers are shown again.
const NARROW_AFTER: u32 = 10;

/// The ring, and what is shared by all sessions.
#[derive(Debug)]
pub(super) struct RingEngine {
    ring: Ring,
    bell: AsyncFd<RingWaker>,
    pipes: Pipes,
    /// Sides that wait for a buffer.
    starved: VecDeque<(u32, SessionSide)>,
    /// Sides not received from since the last tick.
    stalled: Vec<(u32, SessionSide)>,
    /// Sides the kernel had no memory for since the last tick.
    short: Vec<(u32, SessionSide)>,
    /// For reading where there is no buffer.
    fallback: FallbackBuffers,
    /// Starvations seen at the last tick, and ticks since there was one.
    starved_before: u64,
    quiet_ticks: u32,
    /// Set while the ring wakes the task.
    armed: bool,
    /// Where the ring's counts are shown, and those that are.
    worker: Arc<WorkerCounters>,
    shown: RingCounts,
}

// === impl RingEngine ===

impl RingEngine {
    /// On the current thread and its runtime.
    pub(super) fn new(
        settings: RingSettings,
        budget: Arc<MemoryBudget>,
        worker: Arc<WorkerCounters>,
    ) -> io::Result<RingEngine> {
        let ring = Ring::new(settings)?;
        let bell = reactor::watch_readable(ring.wake())?;
        Ok(RingEngine {
            ring,
            bell,
            pipes: Pipes::new(Arc::clone(&budget)),
            starved: VecDeque::new(),
            stalled: Vec::new(),
            short: Vec::new(),
            fallback: FallbackBuffers::new(budget),
            starved_before: 0,
            quiet_ticks: 0,
            armed: false,
            worker,
            shown: RingCounts::default(),
        })
    }

    /// Adds what the ring has counted since the last time.
    fn show_counts(&mut self) {
        let now = self.ring.counts();
        let before = std::mem::replace(&mut self.shown, now);
        if before == now {
            return;
        }
        let add = |event: RingEvent, count: fn(&RingCounts) -> u64| {
            self.worker.ring_events.cell(event as usize, 0).add(count(&now) - count(&before));
        };
        add(RingEvent::Overflow, |counts| counts.overflows);
        add(RingEvent::Starved, |counts| counts.starved);
        add(RingEvent::Resumed, |counts| counts.resumed);
        add(RingEvent::Stray, |counts| counts.strays);
        add(RingEvent::StaleFlag, |counts| counts.stale_flags);
        let errors = &self.worker.local_errors;
        let memory = errors.cell(LocalErrorKind::Memory as usize, LocalErrorPlace::Relay as usize);
        memory.add(now.short - before.short);
    }

    /// Shows how much of the pool holds received bytes.
    fn show_held(&self) {
        let ring = &self.ring;
        let idle = ring.buffers_free() + ring.buffers_shown();
        self.worker.ring_held.set((ring.buffers_total().saturating_sub(idle) * BUFFER_LEN) as u64);
    }

    #[inline]
    fn handle(state: &mut EngineState<RingEngine>, event: Completion) {
        let key = streams::key_of(event.tag);
        // Flows outlive their operations, so this one is there.
        let Some(entry) = state.flows.get_mut(key as usize) else { return };
        let last = event.last;
        let mut moved = TurnBytes::default();
        let RingEngine { ring, pipes, .. } = &mut state.io;
        let meaning = entry.flow.handle(event, ring, pipes, &mut moved);
        RingEngine::handle_result(state, key, meaning, &moved);
        if last {
            state.finish_when_idle(key);
        }
    }

    /// What an event, or a try without one, leaves to do.
    #[inline]
    fn handle_result(
        state: &mut EngineState<RingEngine>,
        key: u32,
        meaning: OpResult,
        moved: &TurnBytes,
    ) {
        let verdict = &state.flows[key as usize].flow.close;
        let next = verdict.ending().map_or(TurnNext::Wait, TurnNext::End);
        match meaning {
            OpResult::Nothing => {}
            OpResult::Connected(how) => state.connect_decided(key, how),
            OpResult::ClientFailed => state.client_failed(key),
            OpResult::ClientReadable => state.client_readable(key),
            OpResult::Starved { side, alone } => {
                if !alone {
                    state.io.ring.widen();
                }
                state.io.starved.push_back((key, side));
            }
            OpResult::Stalled(side) => state.io.stalled.push((key, side)),
            OpResult::Short(side) => state.io.note_shortage(key, side),
            OpResult::Failed(_) => state.note_failure(key, true),
        }
        state.progress(key, moved, next);
    }

    /// Has that side go on at the next tick.
    #[cold]
    fn note_shortage(&mut self, key: u32, side: SessionSide) {
        self.worker.count_local_error(LocalErrorKind::Memory, LocalErrorPlace::Relay);
        self.short.push((key, side));
    }

    /// Has everything go on that ran short of memory.
    fn retry_short(state: &mut EngineState<RingEngine>) {
        state.io.ring.retry_all();
        for (key, side) in std::mem::take(&mut state.io.short) {
            // A flow that came after is not short.
            let Some(entry) = state.flows.get_mut(key as usize) else { continue };
            if !entry.is_relaying() {
                continue;
            }
            let mut moved = TurnBytes::default();
            let RingEngine { ring, pipes, .. } = &mut state.io;
            let meaning = entry.flow.retry_short(key, side, ring, pipes, &mut moved);
            RingEngine::handle_result(state, key, meaning, &moved);
        }
    }

    /// Lets every starved side try again, once.
    fn receive_fallback(state: &mut EngineState<RingEngine>) {
        for _ in 0..state.io.starved.len() {
            let Some((key, side)) = state.io.starved.pop_front() else { return };
            let Some(entry) = state.flows.get_mut(key as usize) else { continue };
            // An entry of an earlier flow in this place does no harm.
            if !entry.is_relaying() || !entry.flow.is_without_buffer(side) {
                continue;
            }
            let RingEngine { ring, fallback, starved, stalled, .. } = &mut state.io;
            let mut moved = TurnBytes::default();
            let (mut failed, mut short) = (false, false);
            match entry.flow.receive_fallback(key, side, ring, fallback, &mut moved) {
                FallbackResult::Done => {}
                FallbackResult::MoreToRead => starved.push_back((key, side)),
                FallbackResult::Waits => stalled.push((key, side)),
                FallbackResult::Short => short = true,
                FallbackResult::Failed => failed = true,
            }
            let next = entry.flow.close.ending().map_or(TurnNext::Wait, TurnNext::End);
            if short {
                state.io.note_shortage(key, side);
            }
            state.note_failure(key, failed);
            state.progress(key, &moved, next);
        }
    }
}

impl EngineIo for RingEngine {
    type Flow = RingSession;

    fn wants_tick(&self, sessions: bool) -> bool {
        sessions || self.pipes.has_spare()
    }

    fn open(&mut self, client: OwnedFd) -> RingSession {
        RingSession::new(client)
    }

    fn attach(
        &mut self,
        key: u32,
        flow: &mut RingSession,
        upstream: OwnedFd,
        pending: bool,
    ) -> io::Result<()> {
        flow.attach(key, upstream, pending, &mut self.ring);
        Ok(())
    }

    fn detach(&mut self, flow: &mut RingSession) {
        flow.detach(&mut self.ring);
    }

    fn watch_client(&mut self, key: u32, flow: &mut RingSession, readable: bool) {
        flow.watch_client(key, readable, &mut self.ring);
    }

    fn begin(&mut self, key: u32, flow: &mut RingSession, _: &mut TurnBytes) -> TurnNext {
        for side in SessionSide::BOTH {
            flow.arm(key, side, &mut self.ring);
        }
        TurnNext::Wait
    }

    fn stop(&mut self, flow: &mut RingSession, how: StopMode) {
        if how == StopMode::Cancel {
            return flow.halt(&mut self.ring);
        }
        self.worker.ring_events.cell(RingEvent::TornDown as usize, 0).add(1);
        tracing::warn!(
            operations = flow.describe_operations(),
            "io_uring operations did not complete after the session ended; resetting its sockets"
        );
        flow.tear_down(&mut self.ring);
    }

    fn request_progress(&mut self, flow: &mut RingSession) -> bool {
        flow.ask_progress(&mut self.ring)
    }

    #[inline]
    fn has_work(&self) -> bool {
        self.ring.has_pending() || !self.starved.is_empty()
    }

    fn round(state: &mut EngineState<RingEngine>) -> io::Result<TurnResult> {
        if std::mem::take(&mut state.io.armed) {
            state.io.ring.disarm_wakeup();
        }
        state.io.ring.enter()?;
        state.now = clock::now();
        let mut busy = false;
        while let Some(event) = state.io.ring.next_event() {
            busy = true;
            RingEngine::handle(state, event);
        }
        if !state.io.starved.is_empty() {
            // What this batch gave back is to be had before the next.
            state.io.ring.show_buffers();
            RingEngine::receive_fallback(state);
        }
        Ok(TurnResult { drained: true, busy })
    }

    fn tick(state: &mut EngineState<RingEngine>) -> Duration {
        RingEngine::retry_short(state);
        let mut stalled = std::mem::take(&mut state.io.stalled);
        for (key, side) in stalled.drain(..) {
            if let Some(entry) = state.flows.get_mut(key as usize)
                && entry.is_relaying()
            {
                entry.flow.watch_stalled(key, side, &mut state.io.ring);
            }
        }
        let io = &mut state.io;
        io.stalled = stalled;
        io.pipes.trim();
        if let Some(error) = io.pipes.last_error() {
            io.worker.count_local_error(local_errors::local_kind(&error), LocalErrorPlace::Relay);
        }
        io.show_counts();
        io.show_held();
        let starved = io.ring.counts().starved;
        if std::mem::replace(&mut io.starved_before, starved) != starved {
            io.quiet_ticks = 0;
            return TICK;
        }
        io.quiet_ticks += 1;
        if io.quiet_ticks >= NARROW_AFTER {
            io.quiet_ticks = 0;
            io.ring.narrow();
        }
        TICK
    }

    fn arm_wakeup(&mut self) -> bool {
        self.armed = self.starved.is_empty() && self.ring.arm_wakeup();
        if self.armed {
            self.show_counts();
            self.show_held();
        }
        self.armed
    }

    fn poll_wake(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.bell.poll_read_ready(cx).map(|guard| guard.map(|mut guard| guard.clear_ready()))
    }

    fn signal_wakeup(&self) -> io::Result<bool> {
        self.ring.signal_wakeup().map(|()| true)
    }

    #[cfg(all(test, feature = "sim"))]
    fn is_clean(&self) -> bool {
        let buffers = self.ring.buffers_free() + self.ring.buffers_shown();
        self.ring.in_flight() == 0 && buffers == self.ring.buffers_total()
    }
}
