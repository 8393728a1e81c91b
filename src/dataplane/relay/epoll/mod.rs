//! The readiness engine: sockets watched by one edge-triggered epoll set of a
//! worker's own, nested in the runtime's reactor.
//!
//! Driven by the shell. One registration a socket, recv and send of a message
//! back to back through one hot buffer, at most
//! [`epoll::BATCH`](tidegate_net::epoll::BATCH) sockets a batch. It never blocks
//! and keeps no operation in flight.

pub(crate) mod pump;

use super::mover::{Decided, Mover, Round};
use super::pace::Pace;
use super::shell::State;
use crate::local_errors;
use crate::relay::close_state::{Carried, Moved, Next, Verdict};
use crate::relay::epoll::pump::{Io, Pump, READ_BULK};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tidegate_core::metrics::counters::{LocalAt, LocalError, WorkerCounters};
use tidegate_core::outcome::{Cause, Ending, Side};
use tidegate_net::budget::{Budget, Share};
use tidegate_net::clock;
use tidegate_net::epoll::{BATCH, Batch, Epoll, Readiness as Event};
use tidegate_net::pipe::{Fill, Pipe, Pipes};
use tidegate_net::{reactor, stream};
use tokio::io::unix::AsyncFd;

/// The epoll set, and what is shared by all sessions.
#[derive(Debug)]
pub(super) struct Readiness {
    epoll: AsyncFd<Epoll>,
    /// Flows whose share of a turn was used up.
    again: VecDeque<u32>,
    /// Read into and sent from; what is left over moves to the flow.
    buffer: Box<[u8]>,
    pipes: Pipes,
    budget: Arc<Budget>,
    batch: Batch,
    /// Flows that ran short of memory: tried again at the next tick.
    short: Vec<u32>,
    /// Whose counters show trouble of our own.
    shown_by: Option<Arc<WorkerCounters>>,
    /// Tells a flow's registration from an earlier one in the same slot.
    registrations: u32,
}

/// One session's sockets and streams.
#[derive(Debug)]
pub(super) struct Flow {
    sockets: Sockets,
    /// In use only while they hold something, by the side it comes from.
    pipes: [Option<Box<Pipe>>; 2],
    pump: Pump,
    registration: u32,
    /// By [`Side`] number.
    watched: [Watched; 2],
    /// Set while in `again`.
    queued: bool,
    /// Set while in `short`.
    short: bool,
}

/// What a socket is watched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Watched {
    Not,
    /// Everything but room to send.
    Arrivals,
    All,
}

/// Client's and backend's, by [`Side`] number.
#[derive(Debug, Default)]
struct Sockets([Option<OwnedFd>; 2]);

/// What a pump works on: a flow's sockets, and its pipes from the worker's pool.
struct Wires<'a> {
    sockets: &'a Sockets,
    own: &'a mut [Option<Box<Pipe>>; 2],
    pool: &'a mut Pipes,
    budget: &'a Arc<Budget>,
}

// === impl Readiness ===

impl Readiness {
    /// On the current thread's runtime.
    pub(super) fn new(budget: Arc<Budget>) -> io::Result<Readiness> {
        Ok(Readiness {
            epoll: reactor::watch_readable(Epoll::new()?)?,
            again: VecDeque::new(),
            buffer: vec![0; READ_BULK].into_boxed_slice(),
            pipes: Pipes::new(Arc::clone(&budget)),
            budget,
            batch: Batch::new(),
            short: Vec::new(),
            shown_by: None,
            registrations: 0,
        })
    }

    /// Counts trouble of our own for that worker from now on.
    pub(super) fn count_for(&mut self, worker: Arc<WorkerCounters>) {
        self.shown_by = Some(worker);
    }

    /// Moves what can be moved on one flow.
    fn turn(&mut self, key: u32, flow: &mut Flow, moved: &mut Moved) -> Next {
        let mut wires = Wires {
            sockets: &flow.sockets,
            own: &mut flow.pipes,
            pool: &mut self.pipes,
            budget: &self.budget,
        };
        let next = flow.pump.turn(&mut wires, &mut self.buffer, moved);
        for side in Side::BOTH {
            if flow.watched[side as usize] == Watched::Arrivals && flow.pump.is_full(side) {
                self.watch_room(key, flow, side);
            }
        }
        if next == Next::Again && !flow.queued {
            flow.queued = true;
            self.again.push_back(key);
        }
        if let Some(error) = self.pipes.trouble() {
            self.count(local_errors::local_kind(&error));
        }
        if flow.pump.is_short() {
            self.ran_short(key, flow);
        }
        next
    }

    /// Has a flow that ran short of memory go on in a while.
    #[cold]
    fn ran_short(&mut self, key: u32, flow: &mut Flow) {
        self.count(LocalError::Memory);
        if !std::mem::replace(&mut flow.short, true) {
            self.short.push(key);
        }
    }

    #[cold]
    fn count(&self, kind: LocalError) {
        if let Some(worker) = &self.shown_by {
            worker.local_trouble(kind, LocalAt::Relay);
        }
    }

    /// From now on that side's room to send is reported, too. Most sessions
    /// never fill a socket, and are spared the events.
    #[cold]
    fn watch_room(&self, key: u32, flow: &mut Flow, side: Side) {
        let Some(socket) = &flow.sockets.0[side as usize] else { return };
        let token = token(key, flow.registration, side);
        if self.epoll.get_ref().watch_room(socket.as_fd(), token).is_ok() {
            flow.watched[side as usize] = Watched::All;
        }
    }

    /// Has that side's arrivals reported from now on, and those that are there.
    fn watch(&self, key: u32, flow: &mut Flow, side: Side) -> io::Result<()> {
        let Some(socket) = &flow.sockets.0[side as usize] else { return Ok(()) };
        if flow.watched[side as usize] != Watched::Not {
            return Ok(());
        }
        let token = token(key, flow.registration, side);
        self.epoll.get_ref().watch(socket.as_fd(), token)?;
        flow.watched[side as usize] = Watched::Arrivals;
        Ok(())
    }

    fn handle(state: &mut State<Readiness>, event: Event, pace: &Pace) {
        let (key, registration, side) = split(event.token);
        let Some(entry) = state.flows.get_mut(key as usize) else { return };
        let flow = &mut entry.flow;
        if flow.registration != registration {
            return;
        }
        flow.pump.note(side, event.readable, event.writable, event.hang_up || event.urgent);
        if entry.is_relaying() {
            let news = event.failed && entry.flow.pump.verdict.note_failure(side);
            let mut moved = Moved::default();
            let next = state.mover.turn(key, &mut entry.flow, &mut moved);
            state.progress(key, &moved, next, pace);
            state.note_failure(key, news, pace);
        } else if side == Side::Client && event.failed {
            state.client_failed(key);
        } else if side == Side::Backend && (event.writable || event.hang_up) {
            let how = if event.hang_up { Decided::Failed } else { Decided::Well };
            state.connect_decided(key, how);
        }
    }

    fn turn_again(state: &mut State<Readiness>, key: u32, pace: &Pace) {
        let Some(entry) = state.flows.get_mut(key as usize) else { return };
        // A flag of an earlier flow's does no harm: a turn too many.
        if std::mem::take(&mut entry.flow.queued) && entry.is_relaying() {
            let mut moved = Moved::default();
            let next = state.mover.turn(key, &mut entry.flow, &mut moved);
            state.progress(key, &moved, next, pace);
        }
    }
}

impl Mover for Readiness {
    type Flow = Flow;

    const TICK: Duration = Duration::from_millis(500);

    /// Edges are not lost; only unused pipes and free memory are waited for.
    fn wants_tick(&self, _: bool) -> bool {
        self.pipes.has_spare() || !self.short.is_empty()
    }

    fn open(&mut self, _: u32, client: OwnedFd) -> io::Result<Flow> {
        self.registrations = self.registrations.wrapping_add(1);
        Ok(Flow {
            sockets: Sockets([Some(client), None]),
            pipes: [None, None],
            pump: Pump::new(),
            registration: self.registrations,
            watched: [Watched::Not; 2],
            queued: false,
            short: false,
        })
    }

    fn attach(
        &mut self,
        key: u32,
        flow: &mut Flow,
        upstream: OwnedFd,
        pending: bool,
    ) -> io::Result<()> {
        let token = token(key, flow.registration, Side::Backend);
        let epoll = self.epoll.get_ref();
        flow.watched[Side::Backend as usize] = if pending {
            epoll.watch_all(upstream.as_fd(), token)?;
            Watched::All
        } else {
            epoll.watch(upstream.as_fd(), token)?;
            Watched::Arrivals
        };
        flow.pump.renew(Side::Backend);
        flow.sockets.0[Side::Backend as usize] = Some(upstream);
        Ok(())
    }

    fn detach(&mut self, flow: &mut Flow) {
        flow.sockets.0[Side::Backend as usize] = None;
    }

    fn watch_client(&mut self, key: u32, flow: &mut Flow) {
        // Where it fails, `begin` finds out.
        let _ = self.watch(key, flow, Side::Client);
    }

    fn begin(&mut self, key: u32, flow: &mut Flow, moved: &mut Moved) -> Next {
        // The client's first bytes are mostly there already: they go out before
        // it is watched, which would tell of them.
        flow.pump.note(Side::Client, true, false, false);
        let next = self.turn(key, flow, moved);
        if matches!(next, Next::End(_)) {
            return next;
        }
        match self.watch(key, flow, Side::Client) {
            Ok(()) => next,
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(0);
                let cut = flow.pump.verdict.cut(Cause::LocalResource);
                Next::End(Ending { errno, ..cut })
            }
        }
    }

    fn halt(&mut self, _: &mut Flow) {}

    fn is_settled(_: &Flow) -> bool {
        true
    }

    fn tear_down(&mut self, _: &mut Flow) {}

    fn ask_progress(&mut self, _: &mut Flow) -> bool {
        false
    }

    fn verdict(flow: &Flow) -> &Verdict {
        &flow.pump.verdict
    }

    fn carried(flow: &Flow, from: Side) -> Carried {
        flow.pump.carried(from)
    }

    fn client(flow: &Flow) -> Option<BorrowedFd<'_>> {
        flow.sockets.0[Side::Client as usize].as_ref().map(AsFd::as_fd)
    }

    fn backend(flow: &Flow) -> Option<BorrowedFd<'_>> {
        flow.sockets.0[Side::Backend as usize].as_ref().map(AsFd::as_fd)
    }

    fn take_sockets(flow: &mut Flow) -> Option<[OwnedFd; 2]> {
        let [client, backend] = std::mem::take(&mut flow.sockets).0;
        Some([client?, backend?])
    }

    fn refuse(&mut self, flow: &mut Flow) {
        if let Some(client) = flow.sockets.0[Side::Client as usize].take() {
            stream::reset(client);
        }
    }

    #[inline]
    fn has_work(&self) -> bool {
        !self.again.is_empty()
    }

    fn round(state: &mut State<Readiness>, pace: &Pace) -> io::Result<Round> {
        let mover = &mut state.mover;
        mover.epoll.get_ref().poll(&mut mover.batch)?;
        let taken = mover.batch.len();
        state.now = clock::now();
        for index in 0..taken {
            let event = state.mover.batch.get(index);
            Readiness::handle(state, event, pace);
        }
        for _ in 0..state.mover.again.len() {
            if let Some(key) = state.mover.again.pop_front() {
                Readiness::turn_again(state, key, pace);
            }
        }
        Ok(Round { drained: taken < BATCH, busy: taken > 0 })
    }

    fn tick(state: &mut State<Readiness>, _: &Pace) {
        state.mover.pipes.trim();
        for key in std::mem::take(&mut state.mover.short) {
            // A flow that came after does no harm: a turn too many.
            let Some(entry) = state.flows.get_mut(key as usize) else { continue };
            entry.flow.short = false;
            if !std::mem::replace(&mut entry.flow.queued, true) {
                state.mover.again.push_back(key);
            }
        }
    }

    fn doze(&mut self) -> bool {
        true
    }

    fn poll_wake(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.epoll.poll_read_ready(cx).map(|guard| guard.map(|mut guard| guard.clear_ready()))
    }

    fn rouse(&mut self) {}

    fn ring_the_bell(&self) -> io::Result<bool> {
        Ok(false)
    }
}

// === impl Sockets ===

impl Sockets {
    #[inline]
    fn of(&self, side: Side) -> io::Result<&OwnedFd> {
        self.0[side as usize].as_ref().ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }
}

// === impl Wires ===

impl Io for Wires<'_> {
    #[inline]
    fn receive(&self, side: Side, buffer: &mut [u8]) -> io::Result<usize> {
        stream::receive(self.sockets.of(side)?, buffer)
    }

    fn peek(&self, side: Side, buffer: &mut [u8]) -> io::Result<usize> {
        stream::peek(self.sockets.of(side)?, buffer)
    }

    #[inline]
    fn may_keep(&self, bytes: usize) -> bool {
        self.budget.has(bytes)
    }

    fn keep(&self, bytes: usize) -> Share {
        self.budget.take(bytes)
    }

    #[inline]
    fn send(&self, side: Side, bytes: &[u8]) -> io::Result<usize> {
        stream::send(self.sockets.of(side)?, bytes)
    }

    fn shutdown_write(&self, side: Side) -> io::Result<()> {
        stream::shutdown_write(self.sockets.of(side)?)
    }

    fn expect_bulk(&self, from: Side) {
        if let (Ok(from), Ok(to)) = (self.sockets.of(from), self.sockets.of(from.other())) {
            stream::shorten_near_queues(from, to);
        }
    }

    fn open_pipe(&mut self, from: Side) -> bool {
        let own = &mut self.own[from as usize];
        if own.is_none() {
            *own = self.pool.take().map(Box::new);
        }
        own.is_some()
    }

    fn close_pipe(&mut self, from: Side) {
        if let Some(pipe) = self.own[from as usize].take() {
            self.pool.give_back(*pipe);
        }
    }

    fn piped(&self, from: Side) -> usize {
        self.own[from as usize].as_ref().map_or(0, |pipe| pipe.holds())
    }

    fn fill(&mut self, from: Side) -> io::Result<Fill> {
        match &mut self.own[from as usize] {
            Some(pipe) => pipe.fill(self.sockets.of(from)?),
            None => Err(io::Error::from_raw_os_error(libc::EBADF)),
        }
    }

    fn drain(&mut self, from: Side) -> io::Result<usize> {
        match &mut self.own[from as usize] {
            Some(pipe) => pipe.drain(self.sockets.of(from.other())?),
            None => Err(io::Error::from_raw_os_error(libc::EBADF)),
        }
    }
}

// === tokens ===

/// Key (31 bits), side (1 bit), registration (32 bits).
fn token(key: u32, registration: u32, side: Side) -> u64 {
    u64::from(registration) << 32 | u64::from(key) << 1 | side as u64
}

fn split(token: u64) -> (u32, u32, Side) {
    let side = if token & 1 == 0 { Side::Client } else { Side::Backend };
    ((token as u32) >> 1, (token >> 32) as u32, side)
}
