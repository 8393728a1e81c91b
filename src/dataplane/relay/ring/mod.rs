//! The ring engine: receives and sends as io_uring operations, on one ring per worker.
//!
//! Driven by `engine` and its task, which the ring's eventfd wakes through the runtime's
//! reactor. It contains no unsafe code: `net::ring` owns all memory that the kernel uses.
//!
//! - Multishot receives fill buffers of a shared pool. Sends read from the same buffers.
//! - An idle session holds no buffer.

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

/// Size of the buffer pool of a worker, and the buffers offered to the kernel at first.
///
/// The pool takes up to 16 MiB, and only as much as was in use at the same time. In
/// measurements 256 buffers were enough for 512 busy sessions; 64 cost 20 %. The rest is for
/// slow readers, each of which holds eight. If the pool is empty, a session uses its own
/// buffer, which is slower. If the process's budget is used up too, it uses none.
///
/// Few buffers are offered at first: they stay in the CPU cache, and a sender that is faster
/// than its reader fills only those before it is stopped. But one system call completes up to
/// forty receives, and each needs a buffer: offering 16 cost up to 25 % with 512 busy sessions.
pub(crate) const SETTINGS: RingSettings = RingSettings { buffers: 1024, shown: 64 };

/// Time between two ticks. Ticks also cover a wake-up that the eventfd might miss.
const TICK: Duration = Duration::from_millis(100);

/// Ticks without a missing buffer after which fewer buffers are offered again.
const NARROW_AFTER: u32 = 10;

/// The ring, and state shared by all sessions.
#[derive(Debug)]
pub(super) struct RingEngine {
    ring: Ring,
    waker: AsyncFd<RingWaker>,
    pipes: Pipes,
    /// Sides that wait for a buffer.
    waiting: VecDeque<(u32, SessionSide)>,
    /// Sides whose receive has been stopped since the last tick, because their bytes wait.
    stalled: Vec<(u32, SessionSide)>,
    /// Sides for which the kernel had no memory since the last tick.
    short: Vec<(u32, SessionSide)>,
    /// Used while the pool has no buffer.
    fallback: FallbackBuffers,
    /// Count of missing buffers at the last tick.
    last_missing: u64,
    /// Ticks since a buffer was missing.
    quiet_ticks: u32,
    /// Set while the ring wakes the task.
    armed: bool,
    /// The worker's counters.
    worker: Arc<WorkerCounters>,
    /// Counts of the ring that have been added to the worker's counters.
    shown: RingCounts,
}

// === impl RingEngine ===

impl RingEngine {
    /// Creates an engine on the current thread's runtime.
    pub(super) fn new(
        settings: RingSettings,
        budget: Arc<MemoryBudget>,
        worker: Arc<WorkerCounters>,
    ) -> io::Result<RingEngine> {
        let ring = Ring::new(settings)?;
        let waker = reactor::watch_readable(ring.wake())?;
        Ok(RingEngine {
            ring,
            waker,
            pipes: Pipes::new(Arc::clone(&budget)),
            waiting: VecDeque::new(),
            stalled: Vec::new(),
            short: Vec::new(),
            fallback: FallbackBuffers::new(budget),
            last_missing: 0,
            quiet_ticks: 0,
            armed: false,
            worker,
            shown: RingCounts::default(),
        })
    }

    /// Adds new counts of the ring to the worker's counters.
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

    /// Sets the gauge of pool bytes that hold received data.
    fn show_held(&self) {
        let ring = &self.ring;
        let idle = ring.buffers_free() + ring.buffers_shown();
        self.worker.ring_held.set((ring.buffers_total().saturating_sub(idle) * BUFFER_LEN) as u64);
    }

    #[inline]
    fn handle(state: &mut EngineState<RingEngine>, event: Completion) {
        let key = streams::key_of(event.tag);
        // A session stays until its operations are complete, so the entry exists.
        let Some(entry) = state.sessions.get_mut(key as usize) else { return };
        let last = event.last;
        let mut moved = TurnBytes::default();
        let RingEngine { ring, pipes, .. } = &mut state.io;
        let result = entry.session.handle(event, ring, pipes, &mut moved);
        RingEngine::handle_result(state, key, result, &moved);
        if last {
            state.finish_when_idle(key);
        }
    }

    /// Applies the result of an event or of a retry to the engine.
    #[inline]
    fn handle_result(
        state: &mut EngineState<RingEngine>,
        key: u32,
        result: OpResult,
        moved: &TurnBytes,
    ) {
        let close = &state.sessions[key as usize].session.close;
        let next = close.ending().map_or(TurnNext::Wait, TurnNext::End);
        match result {
            OpResult::Nothing => {}
            OpResult::Connected(how) => state.connect_decided(key, how),
            OpResult::ClientFailed => state.client_failed(key),
            OpResult::ClientReadable => state.client_readable(key),
            OpResult::NoBuffer { side, alone } => {
                if !alone {
                    state.io.ring.widen();
                }
                state.io.waiting.push_back((key, side));
            }
            OpResult::Stalled(side) => state.io.stalled.push((key, side)),
            OpResult::Short(side) => state.io.note_shortage(key, side),
            OpResult::Failed(_) => state.note_failure(key, true),
        }
        state.progress(key, moved, next);
    }

    /// Schedules a retry for the side at the next tick, because the kernel had no memory.
    #[cold]
    fn note_shortage(&mut self, key: u32, side: SessionSide) {
        self.worker.count_local_error(LocalErrorKind::Memory, LocalErrorPlace::Relay);
        self.short.push((key, side));
    }

    /// Retries everything for which the kernel had no memory.
    fn retry_short(state: &mut EngineState<RingEngine>) {
        state.io.ring.retry_all();
        for (key, side) in std::mem::take(&mut state.io.short) {
            // The key can be of a later session, whose side is not marked short.
            let Some(entry) = state.sessions.get_mut(key as usize) else { continue };
            if !entry.is_relaying() {
                continue;
            }
            let mut moved = TurnBytes::default();
            let RingEngine { ring, pipes, .. } = &mut state.io;
            let result = entry.session.retry_short(key, side, ring, pipes, &mut moved);
            RingEngine::handle_result(state, key, result, &moved);
        }
    }

    /// Gives every side that waits for a buffer one attempt to receive.
    fn receive_fallback(state: &mut EngineState<RingEngine>) {
        for _ in 0..state.io.waiting.len() {
            let Some((key, side)) = state.io.waiting.pop_front() else { return };
            let Some(entry) = state.sessions.get_mut(key as usize) else { continue };
            // The key can be of a later session, whose side is not marked.
            if !entry.is_relaying() || !entry.session.is_without_buffer(side) {
                continue;
            }
            let RingEngine { ring, fallback, waiting, stalled, .. } = &mut state.io;
            let mut moved = TurnBytes::default();
            let (mut failed, mut short) = (false, false);
            match entry.session.receive_fallback(key, side, ring, fallback, &mut moved) {
                FallbackResult::Done => {}
                FallbackResult::MoreToRead => waiting.push_back((key, side)),
                FallbackResult::Waits => stalled.push((key, side)),
                FallbackResult::Short => short = true,
                FallbackResult::Failed => failed = true,
            }
            let next = entry.session.close.ending().map_or(TurnNext::Wait, TurnNext::End);
            if short {
                state.io.note_shortage(key, side);
            }
            state.note_failure(key, failed);
            state.progress(key, &moved, next);
        }
    }
}

impl EngineIo for RingEngine {
    type Session = RingSession;

    fn wants_tick(&self, sessions: bool) -> bool {
        sessions || self.pipes.has_spare()
    }

    fn open(&mut self, client: OwnedFd) -> RingSession {
        RingSession::new(client)
    }

    fn attach(
        &mut self,
        key: u32,
        session: &mut RingSession,
        upstream: OwnedFd,
        pending: bool,
    ) -> io::Result<()> {
        session.attach(key, upstream, pending, &mut self.ring);
        Ok(())
    }

    fn detach(&mut self, session: &mut RingSession) {
        session.detach(&mut self.ring);
    }

    fn watch_client(&mut self, key: u32, session: &mut RingSession, readable: bool) {
        session.watch_client(key, readable, &mut self.ring);
    }

    fn begin(&mut self, key: u32, session: &mut RingSession, _: &mut TurnBytes) -> TurnNext {
        for side in SessionSide::BOTH {
            session.arm(key, side, &mut self.ring);
        }
        TurnNext::Wait
    }

    fn stop(&mut self, session: &mut RingSession, how: StopMode) {
        if how == StopMode::Cancel {
            return session.halt(&mut self.ring);
        }
        self.worker.ring_events.cell(RingEvent::TornDown as usize, 0).add(1);
        tracing::warn!(
            operations = session.describe_operations(),
            "io_uring operations did not complete after the session ended; resetting its sockets"
        );
        session.reset(&mut self.ring);
    }

    fn request_progress(&mut self, session: &mut RingSession) -> bool {
        session.request_progress(&mut self.ring)
    }

    #[inline]
    fn has_work(&self) -> bool {
        self.ring.has_pending() || !self.waiting.is_empty()
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
        if !state.io.waiting.is_empty() {
            // Offer the buffers that this batch has freed.
            state.io.ring.show_buffers();
            RingEngine::receive_fallback(state);
        }
        Ok(TurnResult { drained: true, busy })
    }

    fn tick(state: &mut EngineState<RingEngine>) -> Duration {
        RingEngine::retry_short(state);
        let mut stalled = std::mem::take(&mut state.io.stalled);
        for (key, side) in stalled.drain(..) {
            if let Some(entry) = state.sessions.get_mut(key as usize)
                && entry.is_relaying()
            {
                entry.session.watch_stalled(key, side, &mut state.io.ring);
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
        let missing = io.ring.counts().starved;
        if std::mem::replace(&mut io.last_missing, missing) != missing {
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
        self.armed = self.waiting.is_empty() && self.ring.arm_wakeup();
        if self.armed {
            self.show_counts();
            self.show_held();
        }
        self.armed
    }

    fn poll_wake(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.waker.poll_read_ready(cx).map(|guard| guard.map(|mut guard| guard.clear_ready()))
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
