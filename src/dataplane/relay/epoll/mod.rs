//! The epoll engine: sockets watched by one edge-triggered epoll set of a
//! worker's own, nested in the runtime's reactor.
//!
//! Driven by `engine` and its task. One registration a socket, recv and send of a message
//! back to back through one hot buffer, at most
//! [`epoll::BATCH`](tidegate_net::epoll::BATCH) sockets a batch. It never blocks
//! and keeps no operation in flight.

pub(crate) mod pump;

use super::engine::{ConnectResult, EngineFlow, EngineIo, StopMode, TurnResult};
use super::stages::EngineState;
use crate::local_errors;
use crate::relay::close_state::{CloseState, TurnBytes, TurnNext};
use crate::relay::epoll::pump::{Pump, PumpIo, READ_BULK};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tidegate_core::metrics::counters::{LocalErrorKind, LocalErrorPlace, WorkerCounters};
use tidegate_core::outcome::{Cause, SessionEnd, SessionSide};
use tidegate_net::budget::{BudgetShare, MemoryBudget};
use tidegate_net::clock;
use tidegate_net::epoll::{BATCH, Epoll, EpollBatch, EpollEvent as Event};
use tidegate_net::pipe::{FillResult, Pipe, Pipes};
use tidegate_net::{reactor, stream};
use tokio::io::unix::AsyncFd;

/// Between two ticks.
const TICK: Duration = Duration::from_millis(500);

/// The epoll set, and what is shared by all sessions.
#[derive(Debug)]
pub(super) struct EpollEngine {
    epoll: AsyncFd<Epoll>,
    /// Flows whose share of a turn was used up.
    again: VecDeque<u32>,
    /// Read into and sent from; what is left over moves to the flow.
    buffer: Box<[u8]>,
    pipes: Pipes,
    budget: Arc<MemoryBudget>,
    batch: EpollBatch,
    /// Flows that ran short of memory: tried again at the next tick.
    short: Vec<u32>,
    /// Where local errors are counted.
    worker: Arc<WorkerCounters>,
    /// Tells a flow's registration from an earlier one in the same slot.
    registrations: u32,
}

/// One session's sockets and streams.
#[derive(Debug)]
pub(super) struct EpollSession {
    sockets: SocketPair,
    /// In use only while they hold something, by the side it comes from.
    pipes: [Option<Box<Pipe>>; 2],
    pump: Pump,
    registration: u32,
    /// By [`SessionSide`] number.
    watched: [EpollWatch; 2],
    /// Set while in `again`.
    queued: bool,
    /// Set while in `short`.
    short: bool,
}

/// What a socket is watched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum EpollWatch {
    Not,
    /// Everything but room to send.
    Arrivals,
    All,
}

/// Client's and backend's, by [`SessionSide`] number.
#[derive(Debug, Default)]
struct SocketPair([Option<OwnedFd>; 2]);

/// What a pump works on: a flow's sockets, and its pipes from the worker's pool.
struct EpollIo<'a> {
    sockets: &'a SocketPair,
    own: &'a mut [Option<Box<Pipe>>; 2],
    pool: &'a mut Pipes,
    budget: &'a Arc<MemoryBudget>,
}

// === impl EpollEngine ===

impl EpollEngine {
    /// On the current thread's runtime.
    pub(super) fn new(
        budget: Arc<MemoryBudget>,
        worker: Arc<WorkerCounters>,
    ) -> io::Result<EpollEngine> {
        Ok(EpollEngine {
            epoll: reactor::watch_readable(Epoll::new()?)?,
            again: VecDeque::new(),
            buffer: vec![0; READ_BULK].into_boxed_slice(),
            pipes: Pipes::new(Arc::clone(&budget)),
            budget,
            batch: EpollBatch::new(),
            short: Vec::new(),
            worker,
            registrations: 0,
        })
    }

    /// Moves what can be moved on one flow.
    fn turn(&mut self, key: u32, flow: &mut EpollSession, moved: &mut TurnBytes) -> TurnNext {
        let mut wires = EpollIo {
            sockets: &flow.sockets,
            own: &mut flow.pipes,
            pool: &mut self.pipes,
            budget: &self.budget,
        };
        let next = flow.pump.turn(&mut wires, &mut self.buffer, moved);
        for side in SessionSide::BOTH {
            if flow.watched[side as usize] == EpollWatch::Arrivals && flow.pump.is_full(side) {
                self.watch_room(key, flow, side);
            }
        }
        if next == TurnNext::Again && !flow.queued {
            flow.queued = true;
            self.again.push_back(key);
        }
        if let Some(error) = self.pipes.last_error() {
            self.count(local_errors::local_kind(&error));
        }
        if flow.pump.is_short() {
            self.note_shortage(key, flow);
        }
        next
    }

    /// Has a flow that ran short of memory go on in a while.
    #[cold]
    fn note_shortage(&mut self, key: u32, flow: &mut EpollSession) {
        self.count(LocalErrorKind::Memory);
        if !std::mem::replace(&mut flow.short, true) {
            self.short.push(key);
        }
    }

    #[cold]
    fn count(&self, kind: LocalErrorKind) {
        self.worker.count_local_error(kind, LocalErrorPlace::Relay);
    }

    /// From now on that side's room to send is reported, too. Most sessions
    /// never fill a socket, and are spared the events.
    #[cold]
    fn watch_room(&self, key: u32, flow: &mut EpollSession, side: SessionSide) {
        let Some(socket) = &flow.sockets.0[side as usize] else { return };
        let token = token(key, flow.registration, side);
        if self.epoll.get_ref().watch_room(socket.as_fd(), token).is_ok() {
            flow.watched[side as usize] = EpollWatch::All;
        }
    }

    /// Has that side's arrivals reported from now on, and those that are there.
    fn watch(&self, key: u32, flow: &mut EpollSession, side: SessionSide) -> io::Result<()> {
        let Some(socket) = &flow.sockets.0[side as usize] else { return Ok(()) };
        if flow.watched[side as usize] != EpollWatch::Not {
            return Ok(());
        }
        let token = token(key, flow.registration, side);
        self.epoll.get_ref().watch(socket.as_fd(), token)?;
        flow.watched[side as usize] = EpollWatch::Arrivals;
        Ok(())
    }

    fn handle(state: &mut EngineState<EpollEngine>, event: Event) {
        let (key, registration, side) = split(event.token);
        let Some(entry) = state.flows.get_mut(key as usize) else { return };
        let flow = &mut entry.flow;
        if flow.registration != registration {
            return;
        }
        flow.pump.note(side, event.readable, event.writable, event.hang_up || event.urgent);
        if entry.is_relaying() {
            let news = event.failed && entry.flow.pump.close.note_failure(side);
            let mut moved = TurnBytes::default();
            let next = state.io.turn(key, &mut entry.flow, &mut moved);
            state.progress(key, &moved, next);
            state.note_failure(key, news);
        } else if side == SessionSide::Client && event.failed {
            state.client_failed(key);
        } else if side == SessionSide::Client && event.readable {
            state.client_readable(key);
        } else if side == SessionSide::Backend && (event.writable || event.hang_up) {
            let how = if event.hang_up { ConnectResult::Failed } else { ConnectResult::Connected };
            state.connect_decided(key, how);
        }
    }

    fn turn_again(state: &mut EngineState<EpollEngine>, key: u32) {
        let Some(entry) = state.flows.get_mut(key as usize) else { return };
        // A flag of an earlier flow's does no harm: a turn too many.
        if std::mem::take(&mut entry.flow.queued) && entry.is_relaying() {
            let mut moved = TurnBytes::default();
            let next = state.io.turn(key, &mut entry.flow, &mut moved);
            state.progress(key, &moved, next);
        }
    }
}

impl EngineIo for EpollEngine {
    type Flow = EpollSession;

    /// Edges are not lost; only unused pipes and free memory are waited for.
    fn wants_tick(&self, _: bool) -> bool {
        self.pipes.has_spare() || !self.short.is_empty()
    }

    fn open(&mut self, client: OwnedFd) -> EpollSession {
        self.registrations = self.registrations.wrapping_add(1);
        EpollSession {
            sockets: SocketPair([Some(client), None]),
            pipes: [None, None],
            pump: Pump::new(),
            registration: self.registrations,
            watched: [EpollWatch::Not; 2],
            queued: false,
            short: false,
        }
    }

    fn attach(
        &mut self,
        key: u32,
        flow: &mut EpollSession,
        upstream: OwnedFd,
        pending: bool,
    ) -> io::Result<()> {
        let token = token(key, flow.registration, SessionSide::Backend);
        let epoll = self.epoll.get_ref();
        flow.watched[SessionSide::Backend as usize] = if pending {
            epoll.watch_all(upstream.as_fd(), token)?;
            EpollWatch::All
        } else {
            epoll.watch(upstream.as_fd(), token)?;
            EpollWatch::Arrivals
        };
        flow.pump.renew(SessionSide::Backend);
        flow.sockets.0[SessionSide::Backend as usize] = Some(upstream);
        Ok(())
    }

    fn detach(&mut self, flow: &mut EpollSession) {
        flow.sockets.0[SessionSide::Backend as usize] = None;
    }

    fn watch_client(&mut self, key: u32, flow: &mut EpollSession, _: bool) {
        // Where it fails, `begin` finds out.
        let _ = self.watch(key, flow, SessionSide::Client);
    }

    fn begin(&mut self, key: u32, flow: &mut EpollSession, moved: &mut TurnBytes) -> TurnNext {
        // The client's first bytes are mostly there already: they go out before
        // it is watched, which would tell of them.
        flow.pump.note(SessionSide::Client, true, false, false);
        let next = self.turn(key, flow, moved);
        if matches!(next, TurnNext::End(_)) {
            return next;
        }
        match self.watch(key, flow, SessionSide::Client) {
            Ok(()) => next,
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(0);
                let cut = flow.pump.close.cut(Cause::LocalResource);
                TurnNext::End(SessionEnd { errno, ..cut })
            }
        }
    }

    fn stop(&mut self, _: &mut EpollSession, _: StopMode) {}

    fn request_progress(&mut self, _: &mut EpollSession) -> bool {
        false
    }

    #[inline]
    fn has_work(&self) -> bool {
        !self.again.is_empty()
    }

    fn round(state: &mut EngineState<EpollEngine>) -> io::Result<TurnResult> {
        let io = &mut state.io;
        io.epoll.get_ref().poll(&mut io.batch)?;
        let taken = io.batch.len();
        state.now = clock::now();
        for index in 0..taken {
            let event = state.io.batch.get(index);
            EpollEngine::handle(state, event);
        }
        for _ in 0..state.io.again.len() {
            if let Some(key) = state.io.again.pop_front() {
                EpollEngine::turn_again(state, key);
            }
        }
        Ok(TurnResult { drained: taken < BATCH, busy: taken > 0 })
    }

    fn tick(state: &mut EngineState<EpollEngine>) -> Duration {
        state.io.pipes.trim();
        for key in std::mem::take(&mut state.io.short) {
            // A flow that came after does no harm: a turn too many.
            let Some(entry) = state.flows.get_mut(key as usize) else { continue };
            entry.flow.short = false;
            if !std::mem::replace(&mut entry.flow.queued, true) {
                state.io.again.push_back(key);
            }
        }
        TICK
    }

    fn arm_wakeup(&mut self) -> bool {
        true
    }

    fn poll_wake(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.epoll.poll_read_ready(cx).map(|guard| guard.map(|mut guard| guard.clear_ready()))
    }

    fn signal_wakeup(&self) -> io::Result<bool> {
        Ok(false)
    }
}

impl EngineFlow for EpollSession {
    fn socket(&self, side: SessionSide) -> Option<BorrowedFd<'_>> {
        self.sockets.0[side as usize].as_ref().map(AsFd::as_fd)
    }

    fn close_state(&self) -> &CloseState {
        &self.pump.close
    }

    fn is_settled(&self) -> bool {
        true
    }

    fn take_sockets(&mut self) -> Option<[OwnedFd; 2]> {
        let [client, backend] = std::mem::take(&mut self.sockets).0;
        Some([client?, backend?])
    }
}

// === impl SocketPair ===

impl SocketPair {
    #[inline]
    fn of(&self, side: SessionSide) -> io::Result<&OwnedFd> {
        self.0[side as usize].as_ref().ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }
}

// === impl EpollIo ===

impl PumpIo for EpollIo<'_> {
    #[inline]
    fn receive(&self, side: SessionSide, buffer: &mut [u8]) -> io::Result<usize> {
        stream::receive(self.sockets.of(side)?, buffer)
    }

    fn peek(&self, side: SessionSide, buffer: &mut [u8]) -> io::Result<usize> {
        stream::peek(self.sockets.of(side)?, buffer)
    }

    #[inline]
    fn may_keep(&self, bytes: usize) -> bool {
        self.budget.has(bytes)
    }

    fn keep(&self, bytes: usize) -> BudgetShare {
        self.budget.take(bytes)
    }

    #[inline]
    fn send(&self, side: SessionSide, bytes: &[u8]) -> io::Result<usize> {
        stream::send(self.sockets.of(side)?, bytes)
    }

    fn shutdown_write(&self, side: SessionSide) -> io::Result<()> {
        stream::shutdown_write(self.sockets.of(side)?)
    }

    fn expect_bulk(&self, from: SessionSide) {
        if let (Ok(from), Ok(to)) = (self.sockets.of(from), self.sockets.of(from.other())) {
            stream::shorten_near_queues(from, to);
        }
    }

    fn open_pipe(&mut self, from: SessionSide) -> bool {
        let own = &mut self.own[from as usize];
        if own.is_none() {
            *own = self.pool.take().map(Box::new);
        }
        own.is_some()
    }

    fn close_pipe(&mut self, from: SessionSide) {
        if let Some(pipe) = self.own[from as usize].take() {
            self.pool.give_back(*pipe);
        }
    }

    fn piped(&self, from: SessionSide) -> usize {
        self.own[from as usize].as_ref().map_or(0, |pipe| pipe.holds())
    }

    fn fill(&mut self, from: SessionSide) -> io::Result<FillResult> {
        match &mut self.own[from as usize] {
            Some(pipe) => pipe.fill(self.sockets.of(from)?),
            None => Err(io::Error::from_raw_os_error(libc::EBADF)),
        }
    }

    fn drain(&mut self, from: SessionSide) -> io::Result<usize> {
        match &mut self.own[from as usize] {
            Some(pipe) => pipe.drain(self.sockets.of(from.other())?),
            None => Err(io::Error::from_raw_os_error(libc::EBADF)),
        }
    }
}

// === tokens ===

/// Key (31 bits), side (1 bit), registration (32 bits).
fn token(key: u32, registration: u32, side: SessionSide) -> u64 {
    u64::from(registration) << 32 | u64::from(key) << 1 | side as u64
}

fn split(token: u64) -> (u32, u32, SessionSide) {
    let side = if token & 1 == 0 { SessionSide::Client } else { SessionSide::Backend };
    ((token as u32) >> 1, (token >> 32) as u32, side)
}
