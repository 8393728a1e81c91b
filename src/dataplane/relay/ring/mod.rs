//! The ring engine: receives and sends as io_uring operations on a ring of a
//! worker's own.
//!
//! Driven by the shell, woken by the ring's eventfd through the runtime's
//! reactor. Multishot receives into shared buffers, sends straight out of them;
//! an idle session holds no buffer. Nothing here is unsafe: what the kernel uses
//! belongs to `net::ring`.

mod account;
mod bulk;
mod end;
mod fallback;
mod queue;
mod streams;
#[cfg(test)]
mod tests;

use super::mover::{Mover, Round};
use super::pace::Pace;
use super::shell::State;
use crate::local_errors;
use crate::relay::close_state::{Carried, Moved, Next, Verdict};
use crate::relay::ring::fallback::{Fed, Larder};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use streams::{Flow, Meaning};
use tidegate_core::metrics::counters::{LocalAt, LocalError, RingEvent, WorkerCounters};
use tidegate_core::outcome::Side;
use tidegate_net::budget::Budget;
use tidegate_net::clock;
use tidegate_net::pipe::Pipes;
use tidegate_net::ring::{BUFFER_LEN, Counts, Event, Ring, Settings, Wake};
use tidegate_net::{reactor, stream};
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
pub const SETTINGS: Settings = Settings { buffers: 1024, shown: 64 };

/// Wake-ups by the eventfd are argued for, not promised: look now and then.
const SAFETY_TICK: Duration = Duration::from_millis(100);

/// Ticks without starvation after which fewer buffers are shown again.
const NARROW_AFTER: u32 = 10;

/// The ring, and what is shared by all sessions.
#[derive(Debug)]
pub(super) struct Ringed {
    ring: Ring,
    bell: AsyncFd<Wake>,
    pipes: Pipes,
    /// Sides that wait for a buffer.
    starved: VecDeque<(u32, Side)>,
    /// Sides not received from since the last tick.
    stalled: Vec<(u32, Side)>,
    /// Sides the kernel had no memory for since the last tick.
    short: Vec<(u32, Side)>,
    /// For reading where there is no buffer.
    larder: Larder,
    /// Starvations seen at the last tick, and ticks since there was one.
    starved_before: u64,
    quiet_ticks: u32,
    /// Where the ring's counts are shown, and those that are.
    shown_by: Option<Arc<WorkerCounters>>,
    shown: Counts,
}

// === impl Ringed ===

impl Ringed {
    /// On the current thread and its runtime.
    pub(super) fn new(settings: Settings, budget: Arc<Budget>) -> io::Result<Ringed> {
        let ring = Ring::new(settings)?;
        let bell = reactor::watch_readable(ring.wake())?;
        Ok(Ringed {
            ring,
            bell,
            pipes: Pipes::new(Arc::clone(&budget)),
            starved: VecDeque::new(),
            stalled: Vec::new(),
            short: Vec::new(),
            larder: Larder::new(budget),
            starved_before: 0,
            quiet_ticks: 0,
            shown_by: None,
            shown: Counts::default(),
        })
    }

    pub(super) fn count_for(&mut self, worker: Arc<WorkerCounters>) {
        self.shown_by = Some(worker);
    }

    #[cfg(all(test, feature = "sim"))]
    pub(super) fn is_clean(&self) -> bool {
        let buffers = self.ring.buffers_free() + self.ring.buffers_shown();
        self.ring.in_flight() == 0 && buffers == self.ring.buffers_total()
    }

    /// Adds what the ring has counted since the last time.
    fn show_counts(&mut self) {
        let now = self.ring.counts();
        let Some(worker) = &self.shown_by else { return };
        let before = std::mem::replace(&mut self.shown, now);
        if before == now {
            return;
        }
        let add = |event: RingEvent, count: fn(&Counts) -> u64| {
            worker.ring_events.cell(event as usize, 0).add(count(&now) - count(&before));
        };
        add(RingEvent::Overflow, |counts| counts.overflows);
        add(RingEvent::Starved, |counts| counts.starved);
        add(RingEvent::Resumed, |counts| counts.resumed);
        add(RingEvent::Stray, |counts| counts.strays);
        add(RingEvent::StaleFlag, |counts| counts.stale_flags);
        let memory = worker.local_errors.cell(LocalError::Memory as usize, LocalAt::Relay as usize);
        memory.add(now.short - before.short);
    }

    /// Shows how much of the pool holds received bytes.
    fn show_held(&self) {
        let Some(worker) = &self.shown_by else { return };
        let ring = &self.ring;
        let idle = ring.buffers_free() + ring.buffers_shown();
        worker.ring_held.set((ring.buffers_total().saturating_sub(idle) * BUFFER_LEN) as u64);
    }

    #[inline]
    fn handle(state: &mut State<Ringed>, event: Event, pace: &Pace) {
        let key = streams::key_of(event.tag);
        // Flows outlive their operations, so this one is there.
        let Some(entry) = state.flows.get_mut(key as usize) else { return };
        let last = event.last;
        let mut moved = Moved::default();
        let Ringed { ring, pipes, .. } = &mut state.mover;
        let meaning = entry.flow.handle(event, ring, pipes, &mut moved);
        Ringed::go_on(state, key, meaning, &moved, pace);
        if last {
            state.settle(key, pace);
        }
    }

    /// What an event, or a try without one, leaves to do.
    #[inline]
    fn go_on(state: &mut State<Ringed>, key: u32, meaning: Meaning, moved: &Moved, pace: &Pace) {
        let verdict = &state.flows[key as usize].flow.verdict;
        let next = verdict.ending().map_or(Next::Wait, Next::End);
        match meaning {
            Meaning::Nothing => {}
            Meaning::Connected(how) => state.connect_decided(key, how),
            Meaning::ClientFailed => state.client_failed(key),
            Meaning::Starved { side, alone } => {
                if !alone {
                    state.mover.ring.widen();
                }
                state.mover.starved.push_back((key, side));
            }
            Meaning::Stalled(side) => state.mover.stalled.push((key, side)),
            Meaning::Short(side) => state.mover.ran_short(key, side),
            Meaning::Failed(_) => state.note_failure(key, true, pace),
        }
        state.progress(key, moved, next, pace);
    }

    /// Has that side go on at the next tick.
    #[cold]
    fn ran_short(&mut self, key: u32, side: Side) {
        if let Some(worker) = &self.shown_by {
            worker.local_trouble(LocalError::Memory, LocalAt::Relay);
        }
        self.short.push((key, side));
    }

    /// Has everything go on that ran short of memory.
    fn retry_short(state: &mut State<Ringed>, pace: &Pace) {
        state.mover.ring.retry_shelved();
        for (key, side) in std::mem::take(&mut state.mover.short) {
            // A flow that came after is not short.
            let Some(entry) = state.flows.get_mut(key as usize) else { continue };
            if !entry.is_relaying() {
                continue;
            }
            let mut moved = Moved::default();
            let Ringed { ring, pipes, .. } = &mut state.mover;
            let meaning = entry.flow.retry_short(key, side, ring, pipes, &mut moved);
            Ringed::go_on(state, key, meaning, &moved, pace);
        }
    }

    /// Lets every starved side try again, once.
    fn feed(state: &mut State<Ringed>, pace: &Pace) {
        for _ in 0..state.mover.starved.len() {
            let Some((key, side)) = state.mover.starved.pop_front() else { return };
            let Some(entry) = state.flows.get_mut(key as usize) else { continue };
            // An entry of an earlier flow in this place does no harm.
            if !entry.is_relaying() || !entry.flow.is_starved(side) {
                continue;
            }
            let Ringed { ring, larder, starved, stalled, .. } = &mut state.mover;
            let mut moved = Moved::default();
            let (mut failed, mut short) = (false, false);
            match entry.flow.feed(key, side, ring, larder, &mut moved) {
                Fed::Done => {}
                Fed::Hungry => starved.push_back((key, side)),
                Fed::Waits => stalled.push((key, side)),
                Fed::Short => short = true,
                Fed::Failed => failed = true,
            }
            let next = entry.flow.verdict.ending().map_or(Next::Wait, Next::End);
            if short {
                state.mover.ran_short(key, side);
            }
            state.note_failure(key, failed, pace);
            state.progress(key, &moved, next, pace);
        }
    }
}

impl Mover for Ringed {
    type Flow = Flow;

    const TICK: Duration = SAFETY_TICK;

    fn wants_tick(&self, sessions: bool) -> bool {
        sessions || self.pipes.has_spare()
    }

    fn open(&mut self, _: u32, client: OwnedFd) -> io::Result<Flow> {
        Ok(Flow::new(client))
    }

    fn attach(
        &mut self,
        key: u32,
        flow: &mut Flow,
        upstream: OwnedFd,
        pending: bool,
    ) -> io::Result<()> {
        flow.attach(key, upstream, pending, &mut self.ring);
        Ok(())
    }

    fn detach(&mut self, flow: &mut Flow) {
        flow.detach(&mut self.ring);
    }

    fn watch_client(&mut self, key: u32, flow: &mut Flow) {
        flow.watch_client(key, &mut self.ring);
    }

    fn begin(&mut self, key: u32, flow: &mut Flow, _: &mut Moved) -> Next {
        for side in Side::BOTH {
            flow.arm(key, side, &mut self.ring);
        }
        Next::Wait
    }

    fn halt(&mut self, flow: &mut Flow) {
        flow.halt(&mut self.ring);
    }

    #[inline]
    fn is_settled(flow: &Flow) -> bool {
        flow.is_settled()
    }

    fn tear_down(&mut self, flow: &mut Flow) {
        if let Some(worker) = &self.shown_by {
            worker.ring_events.cell(RingEvent::TornDown as usize, 0).add(1);
        }
        tracing::warn!(
            operations = flow.describe_operations(),
            "operations of an ended session do not come back; its sockets are reset"
        );
        flow.tear_down(&mut self.ring);
    }

    fn ask_progress(&mut self, flow: &mut Flow) -> bool {
        flow.ask_progress(&mut self.ring)
    }

    #[inline]
    fn verdict(flow: &Flow) -> &Verdict {
        &flow.verdict
    }

    fn carried(flow: &Flow, from: Side) -> Carried {
        flow.carried(from)
    }

    fn client(flow: &Flow) -> Option<BorrowedFd<'_>> {
        flow.socket(Side::Client).map(|socket| socket.as_fd())
    }

    fn backend(flow: &Flow) -> Option<BorrowedFd<'_>> {
        flow.socket(Side::Backend).map(|socket| socket.as_fd())
    }

    fn take_sockets(flow: &mut Flow) -> Option<[OwnedFd; 2]> {
        flow.take_sockets()
    }

    fn refuse(&mut self, flow: &mut Flow) {
        if let Some(client) = flow.socket(Side::Client) {
            stream::reset_on_close(client);
        }
    }

    #[inline]
    fn has_work(&self) -> bool {
        self.ring.has_pending() || !self.starved.is_empty()
    }

    fn round(state: &mut State<Ringed>, pace: &Pace) -> io::Result<Round> {
        state.mover.ring.enter()?;
        state.now = clock::now();
        let mut busy = false;
        while let Some(event) = state.mover.ring.next_event() {
            busy = true;
            Ringed::handle(state, event, pace);
        }
        if !state.mover.starved.is_empty() {
            // What this batch gave back is to be had before the next.
            state.mover.ring.show_buffers();
            Ringed::feed(state, pace);
        }
        Ok(Round { drained: true, busy })
    }

    fn tick(state: &mut State<Ringed>, pace: &Pace) {
        Ringed::retry_short(state, pace);
        let mut stalled = std::mem::take(&mut state.mover.stalled);
        for (key, side) in stalled.drain(..) {
            if let Some(entry) = state.flows.get_mut(key as usize)
                && entry.is_relaying()
            {
                entry.flow.watch_stalled(key, side, &mut state.mover.ring);
            }
        }
        let mover = &mut state.mover;
        mover.stalled = stalled;
        mover.pipes.trim();
        if let (Some(error), Some(worker)) = (mover.pipes.trouble(), &mover.shown_by) {
            worker.local_trouble(local_errors::local_kind(&error), LocalAt::Relay);
        }
        mover.show_counts();
        mover.show_held();
        let starved = mover.ring.counts().starved;
        if std::mem::replace(&mut mover.starved_before, starved) != starved {
            mover.quiet_ticks = 0;
            return;
        }
        mover.quiet_ticks += 1;
        if mover.quiet_ticks >= NARROW_AFTER {
            mover.quiet_ticks = 0;
            mover.ring.narrow();
        }
    }

    fn doze(&mut self) -> bool {
        let dozes = self.starved.is_empty() && self.ring.doze();
        if dozes {
            self.show_counts();
            self.show_held();
        }
        dozes
    }

    fn poll_wake(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.bell.poll_read_ready(cx).map(|guard| guard.map(|mut guard| guard.clear_ready()))
    }

    fn rouse(&mut self) {
        self.ring.rouse();
    }

    fn ring_the_bell(&self) -> io::Result<bool> {
        self.ring.ring_the_bell().map(|()| true)
    }
}
