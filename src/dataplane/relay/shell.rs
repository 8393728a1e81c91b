//! What every engine has in common: its sessions' table, their stages, timers
//! and cuts, and the one long-lived task that drives them.
//!
//! Sessions reach it through `Flow`; the bytes are moved by a [`Mover`], behind
//! which the engines differ. It never touches a socket itself, never blocks and
//! never picks a backend.

mod delivery;
mod fall;
mod timers;

use super::flow::{ConnectEnd, Limits, Meter, Relayed};
use super::mover::{Decided, Mover, Round};
use super::pace::{Pace, TICK};
use crate::fault_points::{Fault, Faults};
use crate::relay::close_state::{Moved, Next};
use crate::relay::session_timers::{Answer, Relaying};
use crate::timer_wheel::Wheel;
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
use tidegate_core::outcome::{Cause, Ending, Phase, Side};
use tidegate_core::table::state::BackendId;
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
pub(super) struct Shell<M: Mover> {
    pace: Pace,
    /// How long to poll after the last activity before sleeping.
    spin: Option<Duration>,
    state: RefCell<State<M>>,
    /// A panic has left the state half-way.
    pub(super) broken: Notify,
    /// The worker has fallen: what is left is closed in `bury`.
    fallen: Cell<bool>,
    pub(super) faults: Faults,
    /// Where it shows what it is about.
    worker: OnceCell<Arc<WorkerCounters>>,
}

/// The sessions and what moves their bytes.
#[derive(Debug)]
pub(super) struct State<M: Mover> {
    pub(super) flows: Slab<Entry<M::Flow>>,
    pub(super) mover: M,
    wheel: Wheel,
    fired: Vec<u32>,
    /// Read once a batch.
    pub(super) now: Instant,
    /// When the mover had nothing left to do, at last.
    idle_at: Instant,
    next_tick: Instant,
}

#[derive(Debug)]
pub(super) struct Entry<F> {
    pub(super) flow: F,
    stage: Stage,
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
enum Stage {
    /// Before the relay; the connect of the backend socket may be pending.
    Setup(Setup),
    Relaying(Box<Relaying>),
    /// A side has failed, and what it had sent before is on its way to the other.
    Delivering(Ending, Box<Relaying>),
    Ended(Ending, Box<Relaying>),
}

#[derive(Debug, Default)]
struct Setup {
    /// When the pending connect has taken too long.
    deadline: Option<Instant>,
    /// How the pending connect came to an end.
    decided: Option<Decided>,
    timed_out: bool,
}

// === impl Shell: what sessions call ===

impl<M: Mover> Shell<M> {
    pub(super) fn new(mover: M, spin: Option<Duration>) -> Rc<Shell<M>> {
        let started = clock::now();
        Rc::new(Shell {
            pace: Pace::new(started),
            spin,
            state: RefCell::new(State {
                flows: Slab::new(),
                mover,
                wheel: Wheel::new(0),
                fired: Vec::new(),
                now: started,
                idle_at: started,
                next_tick: started,
            }),
            broken: Notify::new(),
            fallen: Cell::new(false),
            faults: Faults::default(),
            worker: OnceCell::new(),
        })
    }

    pub(super) fn count_for(&self, worker: Arc<WorkerCounters>) {
        // Told once.
        let _ = self.worker.set(worker);
    }

    #[inline]
    fn is_at(&self, stage: progress::Stage) {
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
        vacant.insert(Entry {
            flow: state.mover.open(key, client)?,
            stage: Stage::Setup(Setup::default()),
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
            self.pace.hurry(&state.mover);
        }
        verdict
    }

    fn start_connect(&self, key: u32, upstream: OwnedFd, deadline: Instant) -> io::Result<()> {
        let state = &mut *self.hold();
        let entry = &mut state.flows[key as usize];
        state.mover.attach(key, &mut entry.flow, upstream, true)?;
        entry.stage = Stage::Setup(Setup { deadline: Some(deadline), ..Setup::default() });
        let due = self.pace.tick_after(deadline.min(clock::now() + WATCH_AFTER));
        state.wheel.arm(key, due);
        self.pace.kick_if_sooner(due);
        self.pace.hurry(&state.mover);
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
            Stage::Setup(Setup { decided: Some(Decided::Well), .. }) => Poll::Ready(Ok(())),
            Stage::Setup(Setup { decided: Some(Decided::Unwatched(errno)), .. }) => {
                Poll::Ready(Err(ConnectEnd::Failed(io::Error::from_raw_os_error(errno))))
            }
            Stage::Setup(Setup { decided: Some(Decided::Failed), .. }) => {
                let gone = || io::Error::from_raw_os_error(libc::EBADF);
                let socket = M::backend(&entry.flow).ok_or_else(gone);
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
        {
            let state = &mut *self.hold();
            state.mover.watch_client(key, &mut state.flows[key as usize].flow);
            self.pace.hurry(&state.mover);
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

    pub(super) fn poll_relayed(&self, key: u32, cx: &Context<'_>) -> Poll<Relayed> {
        {
            let entry = &mut self.hold().flows[key as usize];
            if !matches!(entry.stage, Stage::Ended(..)) || !M::is_settled(&entry.flow) {
                // The same task waits until the end: one clone a session.
                entry.waiter.get_or_insert_with(|| cx.waker().clone());
                return Poll::Pending;
            }
        }
        Poll::Ready(self.take_relayed(key))
    }

    pub(super) fn start_relay(&self, key: u32, limits: Limits, meter: Meter) {
        let state = &mut *self.hold();
        state.now = clock::now();
        let entry = &mut state.flows[key as usize];
        entry.waiter = None;
        self.faults.pass(Fault::Relay);
        entry.stage = Stage::Relaying(Box::new(Relaying::new(limits, meter, state.now)));
        if let Some(cause) = entry.cut {
            state.end_by_us(key, cause, &self.pace);
        } else {
            let mut moved = Moved::default();
            let next = state.mover.begin(key, &mut entry.flow, &mut moved);
            state.rearm(key, &self.pace);
            state.progress(key, &moved, next, &self.pace);
        }
        self.pace.hurry(&state.mover);
    }

    fn take_relayed(&self, key: u32) -> Relayed {
        let mut state = self.hold();
        state.wheel.cancel(key);
        let entry = &mut state.flows[key as usize];
        let setup = Stage::Setup(Setup::default());
        let Stage::Ended(ending, relaying) = std::mem::replace(&mut entry.stage, setup) else {
            unreachable!("a relay was collected before it ended");
        };
        Relayed {
            ending,
            bytes: delivery::bytes::<M>(&entry.flow, ending),
            first_byte: match relaying.answer {
                Answer::Came(at) => Some(at),
                _ => None,
            },
            unanswered_since: match relaying.answer {
                Answer::Awaited(since) => Some(since),
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
        if let Stage::Relaying(relaying) = &entry.stage {
            relaying.over();
        }
        if self.fallen.get() {
            return;
        }
        entry.reset_leftovers::<M>();
        state.wheel.cancel(key);
        let entry = &mut state.flows[key as usize];
        if M::is_settled(&entry.flow) {
            state.flows.remove(key as usize);
            return;
        }
        entry.orphaned = true;
        state.mover.halt(&mut entry.flow);
        state.now = clock::now();
        state.expect_to_settle(key, &self.pace);
        self.pace.hurry(&state.mover);
    }

    pub(super) fn cut_all(&self, cause: Cause) -> usize {
        self.cut_where(cause, |_| true)
    }

    pub(super) fn cut_backend(&self, backend: BackendId, cause: Cause) -> usize {
        self.cut_where(
            cause,
            |stage| matches!(stage, Stage::Relaying(r) | Stage::Delivering(_, r) if r.meter.backend.id == backend),
        )
    }

    fn cut_where(&self, cause: Cause, matches: impl Fn(&Stage) -> bool) -> usize {
        let state = &mut *self.hold();
        state.now = clock::now();
        let chosen = state.flows.iter().filter(|(_, e)| !e.orphaned && matches(&e.stage));
        let keys: Vec<u32> = chosen.map(|(key, _)| key as u32).collect();
        for key in &keys {
            state.cut(*key, cause, &self.pace);
        }
        self.pace.hurry(&state.mover);
        keys.len()
    }
}

/// Whether a backend is gone of which the client need never know.
fn is_untouched<M: Mover>(flow: &M::Flow, ending: Ending, answer: Answer) -> bool {
    ending.cause == Cause::BackendReset
        && ending.phase == Phase::Data
        && answer == Answer::NobodySpoke
        && Side::BOTH.into_iter().all(|side| M::carried(flow, side).received == 0)
        && !M::verdict(flow).failed(Side::Client)
}

// === impl Shell: the task ===

impl<M: Mover> Shell<M> {
    /// Drives every flow; runs as long as the worker.
    pub(super) async fn run(self: Rc<Self>) -> io::Result<()> {
        let mut timer = pin!(tokio::time::sleep(Duration::ZERO));
        let mut last_activity = clock::now();
        let mut turns = 0;
        loop {
            self.is_at(progress::Stage::Relaying);
            let Round { drained, busy } = self.turn()?;
            self.is_at(progress::Stage::Waiting);
            let now = self.hold().now;
            if busy {
                last_activity = now;
            }
            let spinning = self.spin.is_some_and(|spin| now - last_activity < spin);
            turns += 1;
            let due = turns >= TURNS_A_PARK;
            let awake = !drained || spinning || !self.hold().mover.doze();
            if awake && (!due || !self.hold().mover.ring_the_bell()?) {
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
            self.hold().mover.rouse();
        }
    }

    fn turn(&self) -> io::Result<Round> {
        let mut busy = false;
        let mut ends_at = None;
        for _ in 0..BATCHES_A_TURN {
            let state = &mut *self.hold();
            let round = M::round(state, &self.pace)?;
            self.faults.pass(Fault::Engine);
            busy |= round.busy;
            let late = state.now >= *ends_at.get_or_insert(state.now + TURN_MAX);
            state.expire(&self.pace);
            if state.now >= state.next_tick {
                state.next_tick = state.now + M::TICK;
                M::tick(state, &self.pace);
            }
            if round.drained && !state.mover.has_work() {
                return Ok(Round { drained: true, busy });
            }
            if late {
                break;
            }
        }
        Ok(Round { drained: false, busy: true })
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
            self.pace.poll_kicked(cx).map(Ok)
        })
        .await?;
        self.pace.wake_up();
        Ok(())
    }
}

// === impl State ===

impl<M: Mover> State<M> {
    /// A pending connect came to an end; the worst that is said of it holds.
    pub(super) fn connect_decided(&mut self, key: u32, how: Decided) {
        let entry = &mut self.flows[key as usize];
        if let Stage::Setup(setup) = &mut entry.stage {
            setup.decided = setup.decided.max(Some(how));
            entry.wake();
        }
    }

    /// The client's connection has failed.
    pub(super) fn client_failed(&mut self, key: u32) {
        let entry = &mut self.flows[key as usize];
        if matches!(entry.stage, Stage::Setup(_)) {
            entry.client_failed = true;
            entry.wake();
        }
    }

    /// Counts what was moved and ends the session where it is over.
    #[inline]
    pub(super) fn progress(&mut self, key: u32, moved: &Moved, next: Next, pace: &Pace) {
        let entry = &mut self.flows[key as usize];
        let relaying = match &mut entry.stage {
            Stage::Relaying(relaying) => relaying,
            Stage::Ended(_, relaying) => return relaying.count(moved),
            _ => return,
        };
        relaying.account(moved, self.now);
        if let Next::End(ending) = next {
            self.end(key, ending, pace);
        } else if moved.ended {
            self.rearm(key, pace);
        }
    }

    /// A side has failed while bytes from it still wait.
    pub(super) fn note_failure(&mut self, key: u32, news: bool, pace: &Pace) {
        if news && self.flows[key as usize].is_relaying() {
            self.rearm(key, pace);
        }
    }

    /// An operation of this flow has come back: hands the session its sockets,
    /// or lets go of one that nobody waits for.
    #[inline]
    pub(super) fn settle(&mut self, key: u32, pace: &Pace) {
        let entry = &mut self.flows[key as usize];
        if !M::is_settled(&entry.flow) {
            return;
        }
        if entry.orphaned {
            self.wheel.cancel(key);
            self.flows.remove(key as usize);
        } else if matches!(entry.stage, Stage::Ended(..)) {
            self.settled(key, pace);
        }
    }

    fn end_by_us(&mut self, key: u32, cause: Cause, pace: &Pace) {
        let ending = M::verdict(&self.flows[key as usize].flow).cut(cause);
        self.end(key, ending, pace);
    }

    fn end(&mut self, key: u32, ending: Ending, pace: &Pace) {
        let entry = &mut self.flows[key as usize];
        let setup = Stage::Setup(Setup::default());
        match std::mem::replace(&mut entry.stage, setup) {
            Stage::Relaying(relaying) => {
                relaying.over();
                entry.stage = Stage::Ended(ending, relaying);
            }
            other => {
                entry.stage = other;
                return;
            }
        }
        self.mover.halt(&mut entry.flow);
        if M::is_settled(&entry.flow) {
            self.settled(key, pace);
        } else {
            self.expect_to_settle(key, pace);
        }
    }

    fn cut(&mut self, key: u32, cause: Cause, pace: &Pace) {
        let entry = &mut self.flows[key as usize];
        entry.cut = Some(cause);
        match entry.stage {
            Stage::Relaying(_) => self.end_by_us(key, cause, pace),
            Stage::Setup(_) => entry.wake(),
            Stage::Delivering(..) => self.stop_delivery(key),
            Stage::Ended(..) => {}
        }
    }
}

// === impl Entry ===

impl<F> Entry<F> {
    #[inline]
    pub(super) fn is_relaying(&self) -> bool {
        matches!(self.stage, Stage::Relaying(_))
    }

    fn interruption(&self) -> Option<ConnectEnd> {
        if let Some(cause) = self.cut {
            return Some(ConnectEnd::Cut(cause));
        }
        self.client_failed.then_some(ConnectEnd::ClientGone(libc::ECONNRESET))
    }

    fn wake(&mut self) {
        if let Some(waiter) = self.waiter.take() {
            waiter.wake();
        }
    }
}
