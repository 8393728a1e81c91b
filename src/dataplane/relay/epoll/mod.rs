//! The epoll engine: one edge-triggered epoll set per worker, nested in the runtime's reactor.
//!
//! Driven by `engine` and its task. It never blocks and keeps no operation in flight.
//!
//! - Each socket has one registration. A batch has at most [`BATCH`] events.
//! - A message is received and sent through one buffer of the engine. Only unsent bytes move
//!   to the session.

pub(crate) mod pump;

use super::engine::{ConnectResult, EngineIo, EngineSession, StopMode, TurnResult};
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

/// Time between two ticks.
const TICK: Duration = Duration::from_millis(500);

/// The epoll set, and state shared by all sessions.
#[derive(Debug)]
pub(super) struct EpollEngine {
    epoll: AsyncFd<Epoll>,
    /// Sessions that have used up their share of a turn.
    again: VecDeque<u32>,
    /// Receive and send buffer. Unsent bytes are copied to the session.
    buffer: Box<[u8]>,
    pipes: Pipes,
    budget: Arc<MemoryBudget>,
    batch: EpollBatch,
    /// Sessions for which the kernel had no memory. They get a turn at the next tick.
    short: Vec<u32>,
    /// The worker's counters, for local errors.
    worker: Arc<WorkerCounters>,
    /// Number of the last registration. It distinguishes sessions that use the same key.
    registrations: u32,
}

/// Sockets and streams of a session.
#[derive(Debug)]
pub(super) struct EpollSession {
    sockets: SocketPair,
    /// Pipes by the side that the bytes come from; `None` while a pipe would be empty.
    pipes: [Option<Box<Pipe>>; 2],
    pump: Pump,
    registration: u32,
    /// Indexed by [`SessionSide`].
    watched: [EpollWatch; 2],
    /// Set while the session is in `again`.
    queued: bool,
    /// Set while the session is in `short`.
    short: bool,
}

/// Events for which a socket is registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum EpollWatch {
    Not,
    /// All events except writable.
    Arrivals,
    All,
}

/// The client's and the backend's socket, indexed by [`SessionSide`].
#[derive(Debug, Default)]
struct SocketPair([Option<OwnedFd>; 2]);

/// Input and output of a pump: the session's sockets, and pipes from the worker's pool.
struct EpollIo<'a> {
    sockets: &'a SocketPair,
    own: &'a mut [Option<Box<Pipe>>; 2],
    pool: &'a mut Pipes,
    budget: &'a Arc<MemoryBudget>,
}

// === impl EpollEngine ===

impl EpollEngine {
    /// Creates an engine on the current thread's runtime.
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

    /// Moves bytes of a session until its sockets or its share of the round stop it.
    fn turn(&mut self, key: u32, session: &mut EpollSession, moved: &mut TurnBytes) -> TurnNext {
        let mut io = EpollIo {
            sockets: &session.sockets,
            own: &mut session.pipes,
            pool: &mut self.pipes,
            budget: &self.budget,
        };
        let next = session.pump.turn(&mut io, &mut self.buffer, moved);
        for side in SessionSide::BOTH {
            if session.watched[side as usize] == EpollWatch::Arrivals && session.pump.is_full(side)
            {
                self.watch_room(key, session, side);
            }
        }
        if next == TurnNext::Again && !session.queued {
            session.queued = true;
            self.again.push_back(key);
        }
        if let Some(error) = self.pipes.last_error() {
            self.count(local_errors::local_kind(&error));
        }
        if session.pump.is_short() {
            self.note_shortage(key, session);
        }
        next
    }

    /// Schedules another turn at the next tick, because the kernel had no memory.
    #[cold]
    fn note_shortage(&mut self, key: u32, session: &mut EpollSession) {
        self.count(LocalErrorKind::Memory);
        if !std::mem::replace(&mut session.short, true) {
            self.short.push(key);
        }
    }

    #[cold]
    fn count(&self, kind: LocalErrorKind) {
        self.worker.count_local_error(kind, LocalErrorPlace::Relay);
    }

    /// Registers a socket for writable events too. Most sessions never fill a socket and
    /// need none of these events.
    #[cold]
    fn watch_room(&self, key: u32, session: &mut EpollSession, side: SessionSide) {
        let Some(socket) = &session.sockets.0[side as usize] else { return };
        let token = token(key, session.registration, side);
        if self.epoll.get_ref().watch_room(socket.as_fd(), token).is_ok() {
            session.watched[side as usize] = EpollWatch::All;
        }
    }

    /// Registers a socket for all events except writable. Data that is already there is
    /// reported as well.
    fn watch(&self, key: u32, session: &mut EpollSession, side: SessionSide) -> io::Result<()> {
        let Some(socket) = &session.sockets.0[side as usize] else { return Ok(()) };
        if session.watched[side as usize] != EpollWatch::Not {
            return Ok(());
        }
        let token = token(key, session.registration, side);
        self.epoll.get_ref().watch(socket.as_fd(), token)?;
        session.watched[side as usize] = EpollWatch::Arrivals;
        Ok(())
    }

    fn handle(state: &mut EngineState<EpollEngine>, event: Event) {
        let (key, registration, side) = split(event.token);
        let Some(entry) = state.sessions.get_mut(key as usize) else { return };
        let session = &mut entry.session;
        if session.registration != registration {
            return;
        }
        session.pump.note(side, event.readable, event.writable, event.hang_up || event.urgent);
        if entry.is_relaying() {
            let first_failure = event.failed && entry.session.pump.close.note_failure(side);
            let mut moved = TurnBytes::default();
            let next = state.io.turn(key, &mut entry.session, &mut moved);
            state.progress(key, &moved, next);
            state.note_failure(key, first_failure);
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
        let Some(entry) = state.sessions.get_mut(key as usize) else { return };
        // The entry can be of an earlier session with this key. That costs one extra turn.
        if std::mem::take(&mut entry.session.queued) && entry.is_relaying() {
            let mut moved = TurnBytes::default();
            let next = state.io.turn(key, &mut entry.session, &mut moved);
            state.progress(key, &moved, next);
        }
    }
}

impl EngineIo for EpollEngine {
    type Session = EpollSession;

    /// Events wake the engine. Ticks only trim unused pipes and retry after memory shortage.
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
        session: &mut EpollSession,
        upstream: OwnedFd,
        pending: bool,
    ) -> io::Result<()> {
        let token = token(key, session.registration, SessionSide::Backend);
        let epoll = self.epoll.get_ref();
        session.watched[SessionSide::Backend as usize] = if pending {
            epoll.watch_all(upstream.as_fd(), token)?;
            EpollWatch::All
        } else {
            epoll.watch(upstream.as_fd(), token)?;
            EpollWatch::Arrivals
        };
        session.pump.renew(SessionSide::Backend);
        session.sockets.0[SessionSide::Backend as usize] = Some(upstream);
        Ok(())
    }

    fn detach(&mut self, session: &mut EpollSession) {
        session.sockets.0[SessionSide::Backend as usize] = None;
    }

    fn watch_client(&mut self, key: u32, session: &mut EpollSession, _: bool) {
        // `begin` tries again and reports the error.
        let _ = self.watch(key, session, SessionSide::Client);
    }

    fn begin(&mut self, key: u32, session: &mut EpollSession, moved: &mut TurnBytes) -> TurnNext {
        // The client's first bytes are usually in the receive queue. Sending them before the
        // registration saves an event.
        session.pump.note(SessionSide::Client, true, false, false);
        let next = self.turn(key, session, moved);
        if matches!(next, TurnNext::End(_)) {
            return next;
        }
        match self.watch(key, session, SessionSide::Client) {
            Ok(()) => next,
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(0);
                let ending = session.pump.close.abort(Cause::LocalResource);
                TurnNext::End(SessionEnd { errno, ..ending })
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
            // The key can be of a later session. That costs one extra turn.
            let Some(entry) = state.sessions.get_mut(key as usize) else { continue };
            entry.session.short = false;
            if !std::mem::replace(&mut entry.session.queued, true) {
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

impl EngineSession for EpollSession {
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
