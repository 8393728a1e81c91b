//! The readiness engine: one task a worker that drives every flow through one
//! edge-triggered epoll set of its own, nested in the runtime's reactor.
//!
//! Sessions reach it through `Flow`. One registration a socket, recv and send
//! of a message back to back through one hot buffer, at most
//! [`epoll::BATCH`](crate::net::epoll::BATCH) sockets a batch, a lazily
//! re-armed timer a flow. It never blocks and never picks a backend.

use super::flow::{ConnectEnd, Flow, Limits, Meter, Relayed};
use super::pump::{Io, Moved, Next, Pump, READ_BULK};
use crate::clock;
use crate::net::epoll::{Batch, Epoll, Readiness};
use crate::net::{reactor, stream};
use crate::proxy::close::{Cause, Ending, Side};
use crate::proxy::wheel::Wheel;
use crate::table::state::BackendId;
use slab::Slab;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};
use tokio::io::unix::AsyncFd;

/// Length of a timer tick: deadlines are kept to this, or a little later.
const TICK: Duration = Duration::from_millis(8);

/// Batches in a row before accepts and other tasks of the worker get a turn.
const BATCHES_A_TURN: u32 = 8;

/// Sessions younger than this get no keepalive or user timeout on the upstream
/// leg: neither could act earlier, and short sessions save the system calls.
const LIVENESS_AFTER: Duration = Duration::from_secs(10);

/// One worker's engine.
#[derive(Debug)]
pub struct Engine {
    epoll: AsyncFd<Epoll>,
    started: Instant,
    /// How long to poll after the last activity before sleeping.
    spin: Option<Duration>,
    state: RefCell<State>,
    /// The engine task, when it sleeps.
    sleeper: RefCell<Option<Waker>>,
    /// The tick the engine task sleeps to; `u64::MAX` for none.
    sleeps_to: Cell<u64>,
}

#[derive(Debug)]
struct State {
    flows: Slab<Entry>,
    wheel: Wheel,
    /// Flows whose share of a turn was used up.
    again: VecDeque<u32>,
    /// Read into and sent from; what is left over moves to the flow.
    buffer: Box<[u8]>,
    fired: Vec<u32>,
    /// Read once a batch.
    now: Instant,
    /// Tells a flow's registration from an earlier one in the same slot.
    registrations: u32,
}

#[derive(Debug)]
struct Entry {
    sockets: Sockets,
    registration: u32,
    pump: Pump,
    stage: Stage,
    /// The session, when it waits.
    waiter: Option<Waker>,
    /// Set while in `again`.
    queued: bool,
    /// The client failed before the relay began.
    client_failed: bool,
    cut: Option<Cause>,
}

#[derive(Debug)]
enum Stage {
    /// Before the relay; the connect of the backend socket may be pending.
    Setup(Setup),
    Relaying(Box<Relaying>),
    Ended(Ending, Box<Relaying>),
}

#[derive(Debug, Default)]
struct Setup {
    /// The pending connect came to an end.
    decided: bool,
    /// Its end was a failure: the socket knows which.
    failed: bool,
    timed_out: bool,
}

#[derive(Debug)]
struct Relaying {
    limits: Limits,
    meter: Meter,
    last_activity: Instant,
    first_byte: Option<Instant>,
    /// When keepalive is to be switched on upstream; `None` once it is.
    liveness_due: Option<Instant>,
}

/// Client's and backend's, by [`Side`] number.
#[derive(Debug, Default)]
struct Sockets([Option<OwnedFd>; 2]);

// === impl Engine: what sessions call ===

impl Engine {
    /// An engine for the current thread's runtime.
    pub fn new(spin: Option<Duration>) -> io::Result<Rc<Engine>> {
        let started = clock::now();
        Ok(Rc::new(Engine {
            epoll: reactor::watch_readable(Epoll::new()?)?,
            started,
            spin,
            state: RefCell::new(State {
                flows: Slab::new(),
                wheel: Wheel::new(0),
                again: VecDeque::new(),
                buffer: vec![0; READ_BULK].into_boxed_slice(),
                fired: Vec::new(),
                now: started,
                registrations: 0,
            }),
            sleeper: RefCell::new(None),
            sleeps_to: Cell::new(u64::MAX),
        }))
    }

    /// A flow for an accepted client; from now on its reset is noticed.
    pub fn open(self: &Rc<Self>, client: OwnedFd) -> io::Result<Flow> {
        let mut state = self.state.borrow_mut();
        state.registrations = state.registrations.wrapping_add(1);
        let registration = state.registrations;
        let entry = state.flows.vacant_entry();
        let key = entry.key() as u32;
        self.epoll.get_ref().watch(client.as_fd(), token(key, registration, Side::Client))?;
        entry.insert(Entry {
            sockets: Sockets([Some(client), None]),
            registration,
            pump: Pump::new(),
            stage: Stage::Setup(Setup::default()),
            waiter: None,
            queued: false,
            client_failed: false,
            cut: None,
        });
        Ok(Flow { engine: Rc::clone(self), key })
    }

    /// Flows open now.
    pub fn open_flows(&self) -> usize {
        self.state.borrow().flows.len()
    }

    pub(super) fn attach(&self, key: u32, upstream: OwnedFd) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        let entry = &mut state.flows[key as usize];
        let token = token(key, entry.registration, Side::Backend);
        self.epoll.get_ref().watch(upstream.as_fd(), token)?;
        entry.pump.renew(Side::Backend);
        entry.sockets.0[Side::Backend as usize] = Some(upstream);
        Ok(())
    }

    pub(super) async fn connected(
        &self,
        key: u32,
        upstream: OwnedFd,
        deadline: Instant,
    ) -> Result<(), ConnectEnd> {
        self.attach(key, upstream).map_err(ConnectEnd::Failed)?;
        {
            let state = &mut *self.state.borrow_mut();
            state.flows[key as usize].stage = Stage::Setup(Setup::default());
            state.wheel.arm(key, self.tick_after(deadline));
        }
        self.kick_if_sooner(self.tick_after(deadline));
        let verdict = poll_fn(|cx| self.poll_connected(key, cx)).await;
        let state = &mut *self.state.borrow_mut();
        state.wheel.cancel(key);
        if verdict.is_err() {
            state.flows[key as usize].sockets.0[Side::Backend as usize] = None;
        }
        verdict
    }

    fn poll_connected(&self, key: u32, cx: &Context<'_>) -> Poll<Result<(), ConnectEnd>> {
        let state = &mut *self.state.borrow_mut();
        let entry = &mut state.flows[key as usize];
        if let Some(end) = entry.interruption() {
            return Poll::Ready(Err(end));
        }
        match entry.stage {
            // Writable and well is connected; only a failure is worth asking for.
            Stage::Setup(Setup { decided: true, failed: false, .. }) => Poll::Ready(Ok(())),
            Stage::Setup(Setup { decided: true, .. }) => {
                let socket = entry.sockets.of(Side::Backend);
                let verdict = socket.and_then(stream::connect_result);
                Poll::Ready(verdict.map_err(ConnectEnd::Failed))
            }
            Stage::Setup(Setup { timed_out: true, .. }) => Poll::Ready(Err(ConnectEnd::TimedOut)),
            _ => {
                entry.waiter = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    pub(super) async fn interrupted(&self, key: u32) -> ConnectEnd {
        poll_fn(|cx| {
            let entry = &mut self.state.borrow_mut().flows[key as usize];
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

    pub(super) async fn relay(&self, key: u32, limits: Limits, meter: Meter) -> Relayed {
        self.start_relay(key, limits, meter);
        poll_fn(|cx| {
            let entry = &mut self.state.borrow_mut().flows[key as usize];
            match entry.stage {
                Stage::Ended(..) => Poll::Ready(()),
                _ => {
                    // The same task waits until the end: one clone a session.
                    entry.waiter.get_or_insert_with(|| cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await;
        self.take_relayed(key)
    }

    fn start_relay(&self, key: u32, limits: Limits, meter: Meter) {
        let state = &mut *self.state.borrow_mut();
        let now = clock::now();
        state.now = now;
        let entry = &mut state.flows[key as usize];
        entry.waiter = None;
        entry.stage = Stage::Relaying(Box::new(Relaying {
            limits,
            meter,
            last_activity: now,
            first_byte: None,
            liveness_due: Some(now + LIVENESS_AFTER),
        }));
        if let Some(cause) = entry.cut {
            state.end(key, cause);
            return;
        }
        let due = self.tick_after(state.turn_on_timer(key));
        state.wheel.arm(key, due);
        state.turn(key, self);
        // A flow with more to move than its share needs the engine at once.
        let due = if state.again.is_empty() { due } else { 0 };
        self.kick_if_sooner(due);
    }

    fn take_relayed(&self, key: u32) -> Relayed {
        let mut state = self.state.borrow_mut();
        let entry = &mut state.flows[key as usize];
        let setup = Stage::Setup(Setup::default());
        let Stage::Ended(ending, relaying) = std::mem::replace(&mut entry.stage, setup) else {
            unreachable!("a relay was collected before it ended");
        };
        let [client, backend] = std::mem::take(&mut entry.sockets).0;
        Relayed {
            ending,
            bytes_in: entry.pump.bytes_from(Side::Client),
            bytes_out: entry.pump.bytes_from(Side::Backend),
            first_byte: relaying.first_byte,
            sockets: [
                client.expect("a relayed flow has a client socket"),
                backend.expect("a relayed flow has a backend socket"),
            ],
        }
    }

    pub(super) fn take_socket(&self, key: u32, side: Side) -> Option<OwnedFd> {
        self.state.borrow_mut().flows[key as usize].sockets.0[side as usize].take()
    }

    pub(super) fn remove(&self, key: u32) {
        let mut state = self.state.borrow_mut();
        state.wheel.cancel(key);
        state.flows.remove(key as usize);
    }

    /// Ends every flow, whatever it is doing; gives their number.
    pub fn cut_all(&self, cause: Cause) -> usize {
        let mut state = self.state.borrow_mut();
        let keys: Vec<u32> = state.flows.iter().map(|(key, _)| key as u32).collect();
        for key in &keys {
            state.cut(*key, cause);
        }
        keys.len()
    }

    /// Ends every relayed flow of one backend; gives their number.
    pub fn cut_backend(&self, backend: BackendId, cause: Cause) -> usize {
        let mut state = self.state.borrow_mut();
        let keys: Vec<u32> = state
            .flows
            .iter()
            .filter(|(_, entry)| {
                matches!(&entry.stage, Stage::Relaying(r) if r.meter.backend.id == backend)
            })
            .map(|(key, _)| key as u32)
            .collect();
        for key in &keys {
            state.cut(*key, cause);
        }
        keys.len()
    }
}

// === impl Engine: the task ===

impl Engine {
    /// Drives every flow; runs as long as the worker.
    pub async fn run(self: Rc<Self>) -> io::Result<()> {
        let mut sleep = pin!(tokio::time::sleep(Duration::ZERO));
        let mut last_activity = clock::now();
        let mut batch = Batch::new();
        loop {
            let (drained, moved) = self.round(&mut batch)?;
            let now = self.state.borrow().now;
            if moved {
                last_activity = now;
            }
            let spinning = self.spin.is_some_and(|spin| now - last_activity < spin);
            if !drained || spinning {
                // Lets accepts and sessions run, and the reactor look around.
                tokio::task::yield_now().await;
                continue;
            }
            let next = self.state.borrow().wheel.next_due();
            self.sleeps_to.set(next.unwrap_or(u64::MAX));
            if let Some(tick) = next {
                let at = self.started + Duration::from_millis(tick * TICK.as_millis() as u64);
                sleep.as_mut().reset(at.into());
            }
            poll_fn(|cx| {
                if let Poll::Ready(guard) = self.epoll.poll_read_ready(cx) {
                    return Poll::Ready(guard.map(|mut guard| guard.clear_ready()));
                }
                if next.is_some() && sleep.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(Ok(()));
                }
                if self.sleeps_to.get() == 0 {
                    return Poll::Ready(Ok(()));
                }
                *self.sleeper.borrow_mut() = Some(cx.waker().clone());
                Poll::Pending
            })
            .await?;
            *self.sleeper.borrow_mut() = None;
        }
    }

    /// Handles what is ready, up to a turn's worth: whether that was all, and
    /// whether anything happened.
    fn round(&self, batch: &mut Batch) -> io::Result<(bool, bool)> {
        let mut busy = false;
        for _ in 0..BATCHES_A_TURN {
            self.epoll.get_ref().poll(batch)?;
            let state = &mut *self.state.borrow_mut();
            state.now = clock::now();
            busy |= !batch.is_empty();
            for index in 0..batch.len() {
                state.handle(batch.get(index), self);
            }
            for _ in 0..state.again.len() {
                if let Some(key) = state.again.pop_front() {
                    state.turn_again(key, self);
                }
            }
            state.expire(self);
            if batch.len() < crate::net::epoll::BATCH && state.again.is_empty() {
                return Ok((true, busy));
            }
        }
        Ok((false, true))
    }

    fn tick_after(&self, at: Instant) -> u64 {
        let since = at.saturating_duration_since(self.started);
        (since.as_millis() as u64).div_ceil(TICK.as_millis() as u64)
    }

    fn tick_at(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.started).as_millis() as u64 / TICK.as_millis() as u64
    }

    /// Wakes the engine task where it would sleep past `due`.
    fn kick_if_sooner(&self, due: u64) {
        if due < self.sleeps_to.get() {
            self.sleeps_to.set(0);
            if let Some(waker) = self.sleeper.borrow_mut().take() {
                waker.wake();
            }
        }
    }
}

// === impl State ===

impl State {
    fn handle(&mut self, event: Readiness, engine: &Engine) {
        let (key, registration, side) = split(event.token);
        let Some(entry) = self.flows.get_mut(key as usize) else { return };
        if entry.registration != registration {
            return;
        }
        if event.urgent
            && let Some(socket) = &entry.sockets.0[side as usize]
        {
            stream::keep_urgent_inline(socket);
        }
        let to_the_end = event.hang_up || event.urgent;
        entry.pump.note(side, event.readable, event.writable, to_the_end);
        match &mut entry.stage {
            Stage::Relaying(_) => {
                let news = event.failed && entry.pump.note_failure(side);
                self.turn(key, engine);
                if news {
                    self.rearm(key, engine);
                }
            }
            Stage::Setup(setup) => {
                match side {
                    Side::Client => entry.client_failed |= event.failed,
                    Side::Backend => {
                        setup.decided |= event.writable || event.hang_up;
                        setup.failed |= event.hang_up;
                    }
                }
                if (entry.client_failed || side == Side::Backend)
                    && let Some(waiter) = entry.waiter.take()
                {
                    waiter.wake();
                }
            }
            Stage::Ended(..) => {}
        }
    }

    fn turn_again(&mut self, key: u32, engine: &Engine) {
        if let Some(entry) = self.flows.get_mut(key as usize)
            && entry.queued
        {
            entry.queued = false;
            if matches!(entry.stage, Stage::Relaying(_)) {
                self.turn(key, engine);
            }
        }
    }

    /// Moves what can be moved on one flow.
    fn turn(&mut self, key: u32, engine: &Engine) {
        let entry = &mut self.flows[key as usize];
        let Stage::Relaying(relaying) = &mut entry.stage else { return };
        let mut moved = Moved::default();
        let next = entry.pump.turn(&entry.sockets, &mut self.buffer, &mut moved);
        relaying.account(&moved, self.now);
        match next {
            Next::Wait => {}
            Next::Again if entry.queued => {}
            Next::Again => {
                entry.queued = true;
                self.again.push_back(key);
            }
            Next::End(ending) => {
                entry.end(ending);
                self.wheel.cancel(key);
                return;
            }
        }
        if moved.ended {
            self.rearm(key, engine);
        }
    }

    /// Sets a flow's timer anew once a side has ended: the half-closed timer may
    /// be due long before the idle one.
    fn rearm(&mut self, key: u32, engine: &Engine) {
        if matches!(self.flows[key as usize].stage, Stage::Relaying(_)) {
            let due = engine.tick_after(self.turn_on_timer(key));
            self.wheel.arm(key, due);
            engine.kick_if_sooner(due);
        }
    }

    /// When a relaying flow's timer has to be looked at next.
    fn turn_on_timer(&self, key: u32) -> Instant {
        let entry = &self.flows[key as usize];
        let Stage::Relaying(relaying) = &entry.stage else { return self.now };
        let limit = relaying.limit(entry.pump.closed_first().is_some());
        let idle = limit.map(|limit| relaying.last_activity + limit);
        // Both off: look again in a day.
        let never = self.now + Duration::from_secs(86_400);
        [idle, relaying.liveness_due].into_iter().flatten().min().unwrap_or(never)
    }

    /// Fires the timers that are due.
    fn expire(&mut self, engine: &Engine) {
        let now = engine.tick_at(self.now);
        if self.wheel.next_due().is_none_or(|due| due > now) {
            return;
        }
        let mut fired = std::mem::take(&mut self.fired);
        self.wheel.advance(now, &mut fired);
        for key in fired.drain(..) {
            self.timer_fired(key, engine);
        }
        self.fired = fired;
    }

    fn timer_fired(&mut self, key: u32, engine: &Engine) {
        let now = self.now;
        let entry = &mut self.flows[key as usize];
        match &mut entry.stage {
            Stage::Setup(setup) => {
                setup.timed_out = true;
                if let Some(waiter) = entry.waiter.take() {
                    waiter.wake();
                }
            }
            Stage::Relaying(relaying) => {
                let half_closed = entry.pump.closed_first().is_some();
                let limit = relaying.limit(half_closed);
                if limit.is_some_and(|limit| now - relaying.last_activity >= limit) {
                    let cause =
                        if half_closed { Cause::HalfClosedTimeout } else { Cause::IdleTimeout };
                    self.end(key, cause);
                    return;
                }
                if relaying.liveness_due.is_some_and(|due| due <= now) {
                    relaying.liveness_due = None;
                    entry.sockets.set_liveness(&relaying.limits);
                }
                let due = engine.tick_after(self.turn_on_timer(key));
                self.wheel.arm(key, due);
            }
            Stage::Ended(..) => {}
        }
    }

    /// Ends a relaying flow from our side.
    fn end(&mut self, key: u32, cause: Cause) {
        let entry = &mut self.flows[key as usize];
        let (phase, closed_first) = (entry.pump.phase(), entry.pump.closed_first());
        entry.end(Ending { cause, phase, errno: 0, closed_first });
        self.wheel.cancel(key);
    }

    fn cut(&mut self, key: u32, cause: Cause) {
        let entry = &mut self.flows[key as usize];
        entry.cut = Some(cause);
        match entry.stage {
            Stage::Relaying(_) => self.end(key, cause),
            Stage::Setup(_) => {
                if let Some(waiter) = entry.waiter.take() {
                    waiter.wake();
                }
            }
            Stage::Ended(..) => {}
        }
    }
}

// === impl Entry ===

impl Entry {
    fn interruption(&self) -> Option<ConnectEnd> {
        if let Some(cause) = self.cut {
            return Some(ConnectEnd::Cut(cause));
        }
        self.client_failed.then_some(ConnectEnd::ClientGone(libc::ECONNRESET))
    }

    fn end(&mut self, ending: Ending) {
        let setup = Stage::Setup(Setup::default());
        match std::mem::replace(&mut self.stage, setup) {
            Stage::Relaying(relaying) => self.stage = Stage::Ended(ending, relaying),
            other => self.stage = other,
        }
        if let Some(waiter) = self.waiter.take() {
            waiter.wake();
        }
    }
}

// === impl Relaying ===

impl Relaying {
    fn limit(&self, half_closed: bool) -> Option<Duration> {
        if half_closed { self.limits.half_closed } else { self.limits.idle }
    }

    #[inline]
    fn account(&mut self, moved: &Moved, now: Instant) {
        let [bytes_in, bytes_out] = moved.received;
        if bytes_in | bytes_out == 0 && !moved.sent && !moved.ended {
            return;
        }
        self.last_activity = now;
        let frontend = self.meter.frontend.counters.of(self.meter.worker);
        let backend = self.meter.backend.counters.of(self.meter.worker);
        if bytes_in != 0 {
            frontend.bytes_in.add(bytes_in);
            backend.bytes_in.add(bytes_in);
        }
        if bytes_out != 0 {
            frontend.bytes_out.add(bytes_out);
            backend.bytes_out.add(bytes_out);
            self.first_byte.get_or_insert(now);
        }
    }
}

// === impl Sockets ===

impl Sockets {
    #[inline]
    fn of(&self, side: Side) -> io::Result<&OwnedFd> {
        self.0[side as usize].as_ref().ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    fn set_liveness(&self, limits: &Limits) {
        if let Some(upstream) = &self.0[Side::Backend as usize] {
            // Refused at most for a socket that is dead already.
            let _ = stream::set_liveness(upstream, limits.keepalive, limits.user_timeout);
        }
    }
}

impl Io for Sockets {
    #[inline]
    fn receive(&self, side: Side, buffer: &mut [u8]) -> io::Result<usize> {
        stream::receive(self.of(side)?, buffer)
    }

    #[inline]
    fn send(&self, side: Side, bytes: &[u8]) -> io::Result<usize> {
        stream::send(self.of(side)?, bytes)
    }

    fn shutdown_write(&self, side: Side) -> io::Result<()> {
        stream::shutdown_write(self.of(side)?)
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
