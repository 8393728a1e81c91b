//! The threads of a worker: one at a time, each going on where the one before
//! fell.
//!
//! Started by `worker`. A panic in the worker's own loop, its engine or a
//! listener ends the thread: its sessions are accounted for and reset, and the
//! next thread takes the same sockets, whose queues nobody has touched. Nothing
//! here waits for the control thread.

use super::context::{CarryOver, WorkerContext};
use super::restarts::{RESTARTS_MAX, RestartLimit};
use crate::accept::listener::{Listener, ListenerRetirement};
use crate::worker::catch_panic::catch_panic;
use crate::worker::listener_set::{InheritedListener, ListenerSet};
use crate::worker::{Mailbox, WorkerCommand, WorkerConfig};
use socket2::Socket;
use std::cell::OnceCell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tidegate_core::metrics::counters::PanicScope;
use tidegate_core::metrics::progress::WorkerStage;
use tidegate_core::model::BindKey;
use tidegate_core::outcome::Cause;
use tidegate_net::clock;
use tidegate_net::cpu;
use tokio::sync::Notify;
use tokio::task::JoinError;

/// How often, and after which pause, a thread that cannot be had is tried for
/// again: for want of memory or descriptors. Meanwhile clients queue.
const TRIES_MAX: u32 = 50;
const TRY_AGAIN: Duration = Duration::from_millis(100);

/// What a worker's threads have in common with whoever started it.
#[derive(Debug)]
pub(crate) struct WorkerHandle {
    /// The one that runs, or ran last.
    thread: Mutex<Option<JoinHandle<()>>>,
    ended: AtomicBool,
    in_order: AtomicBool,
    /// Told of the end.
    told: Arc<Notify>,
}

/// One thread of a worker, and what it was left by the one before.
#[derive(Debug)]
pub(crate) struct WorkerThread {
    plan: WorkerConfig,
    inbox: Arc<Mailbox>,
    station: Arc<WorkerHandle>,
    posts: Vec<InheritedListener>,
    legacy: CarryOver,
    restarts: RestartLimit,
    /// When the thread before fell.
    fell: Option<Instant>,
}

/// How a thread's work ended.
enum ThreadExit {
    Stopped,
    /// It could not begin.
    StartFailed(io::Error),
    Panicked(&'static str),
}

/// Ends the worker for good when it is dropped, unless another thread goes on.
struct ExitGuard(Option<Arc<WorkerHandle>>);

/// Raises the alarm when a listener's task panics.
struct ListenerPanicGuard(Rc<WorkerContext>);

// === impl WorkerHandle ===

impl WorkerHandle {
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Waits for the last thread; true when it ended in order.
    pub(crate) fn join(&self) -> bool {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let joined = thread.is_none_or(|thread| thread.join().is_ok());
        joined && self.in_order.load(Ordering::Acquire)
    }

    fn set_thread(&self, thread: JoinHandle<()>) {
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
    }
}

// === impl ExitGuard ===

impl Drop for ExitGuard {
    fn drop(&mut self) {
        if let Some(station) = self.0.take() {
            station.ended.store(true, Ordering::Release);
            station.told.notify_one();
        }
    }
}

// === impl WorkerThread ===

impl WorkerThread {
    /// Starts the first thread; returns once its runtime and engine stand.
    pub(crate) fn spawn_first(
        plan: WorkerConfig,
        inbox: Arc<Mailbox>,
    ) -> io::Result<Arc<WorkerHandle>> {
        let station = Arc::new(WorkerHandle {
            thread: Mutex::new(None),
            ended: AtomicBool::new(false),
            in_order: AtomicBool::new(false),
            told: Arc::clone(&plan.shared.ended),
        });
        let (ready, started) = std::sync::mpsc::sync_channel::<io::Result<()>>(1);
        let life = WorkerThread {
            plan,
            inbox,
            station: Arc::clone(&station),
            posts: Vec::new(),
            legacy: CarryOver::default(),
            restarts: RestartLimit::default(),
            fell: None,
        };
        let thread = life.builder().spawn(move || life.run(Some(ready)))?;
        station.set_thread(thread);
        match started.recv() {
            Ok(Ok(())) => Ok(station),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::other("the worker thread died while it started")),
        }
    }

    fn builder(&self) -> std::thread::Builder {
        std::thread::Builder::new().name(format!("worker-{}", self.plan.id))
    }

    /// The thread's body; `ready` is the first one's.
    fn run(mut self, ready: Option<SyncSender<io::Result<()>>>) {
        self.plan.counters.pulse.set_thread(cpu::current_thread());
        let obituary = ExitGuard(Some(Arc::clone(&self.station)));
        if let Some(cpu) = self.plan.cpu
            && let Err(error) = cpu::pin_current_thread(cpu)
        {
            tracing::warn!(worker = self.plan.id, cpu, %error, "not pinned");
        }
        for tries in 1.. {
            let (posts, ctx) = (Rc::new(ListenerSet::default()), OnceCell::new());
            match self.run_until_stopped(&posts, &ctx, ready.as_ref()) {
                ThreadExit::Stopped => {
                    self.station.in_order.store(true, Ordering::Release);
                    return;
                }
                ThreadExit::StartFailed(error) => {
                    if let Some(ready) = &ready {
                        // Whoever started it waits for this.
                        let _ = ready.send(Err(error));
                        return;
                    }
                    if tries == TRIES_MAX {
                        tracing::error!(worker = self.plan.id, %error, "worker cannot begin anew");
                        return;
                    }
                    tracing::warn!(worker = self.plan.id, %error, "worker cannot begin anew yet");
                    clock::pause(TRY_AGAIN);
                }
                ThreadExit::Panicked(why) => {
                    let Some(ctx) = ctx.into_inner() else { return };
                    return self.restart(obituary, &posts, ctx, why);
                }
            }
        }
    }

    /// Everything from the runtime's start to its end. Once it is back, every
    /// task of the worker is gone and accounted for.
    fn run_until_stopped(
        &mut self,
        posts: &Rc<ListenerSet>,
        place: &OnceCell<Rc<WorkerContext>>,
        ready: Option<&SyncSender<io::Result<()>>>,
    ) -> ThreadExit {
        let (runtime, inbox) = (self.plan.runtime, Arc::clone(&self.inbox));
        let main = async {
            let main = async {
                let ctx = match self.set_up() {
                    Ok(ctx) => place.get_or_init(|| ctx),
                    Err(error) => return ThreadExit::StartFailed(error),
                };
                self.reopen_listeners(ctx, posts);
                if let Some(ready) = ready {
                    let _ = ready.send(Ok(()));
                }
                self.log_restart(ctx);
                serve(ctx, &inbox, posts).await
            };
            let outcome =
                catch_panic(main).await.unwrap_or(ThreadExit::Panicked("its loop panicked"));
            if let (ThreadExit::Panicked(_), Some(ctx)) = (&outcome, place.get()) {
                ctx.engine.mark_broken();
            }
            outcome
        };
        let ran = catch_unwind(AssertUnwindSafe(|| runtime.block_on(main)));
        let outcome = match ran {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(error)) => ThreadExit::StartFailed(error),
            Err(_) => ThreadExit::Panicked("its runtime panicked"),
        };
        match outcome {
            ThreadExit::Panicked(why) if place.get().is_none() => {
                ThreadExit::StartFailed(io::Error::other(why))
            }
            outcome => outcome,
        }
    }

    fn set_up(&mut self) -> io::Result<Rc<WorkerContext>> {
        let WorkerConfig { id, runtime, spin, shared, tables, counters, access_log, seed, .. } =
            self.plan.clone();
        let engine = runtime.engine(id, spin, &shared.buffers, &counters)?;
        // Of the thread before, if it had a ring.
        counters.ring_held.set(0);
        let legacy = std::mem::take(&mut self.legacy);
        let reader = tables.reader();
        Ok(Rc::new(WorkerContext::new(
            id, engine, shared, reader, counters, access_log, seed, legacy,
        )))
    }

    /// Listens where the thread before did.
    fn reopen_listeners(&mut self, ctx: &Rc<WorkerContext>, posts: &Rc<ListenerSet>) {
        for InheritedListener { bind, socket, retires } in self.posts.drain(..) {
            let retirement = Rc::new(ListenerRetirement::due(retires));
            listen(ctx, posts, bind, socket, retirement);
        }
    }

    fn log_restart(&self, ctx: &WorkerContext) {
        if let Some(fell) = self.fell {
            ctx.counters.restarts.add(1);
            let took = clock::now() - fell;
            tracing::warn!(worker = ctx.id, took_us = took.as_micros(), "worker serves again");
        }
    }

    /// The thread has fallen and its sessions are accounted for: starts the next
    /// one, if there may be one, and closes what this one leaves behind.
    fn restart(
        mut self,
        obituary: ExitGuard,
        posts: &ListenerSet,
        ctx: Rc<WorkerContext>,
        why: &str,
    ) {
        let now = clock::now();
        let (worker, counters) = (self.plan.id, &self.plan.counters);
        counters.panics.cell(PanicScope::Worker as usize, 0).add(1);
        let sessions = ctx.engine.open_flows();
        tracing::error!(worker, why, sessions, "worker fell: its sessions are reset");
        let engine = Rc::clone(&ctx.engine);
        if !self.restarts.allow_restart(now) {
            tracing::error!(
                worker,
                restarts = RESTARTS_MAX,
                "worker falls again and again: the process ends, for a new one is needed"
            );
            drop(ctx);
            engine.close_all();
            return drop(obituary);
        }
        self.fell = Some(now);
        self.posts = posts.take_listeners();
        self.legacy = ctx.carry_over();
        self.plan.seed = self.plan.seed.wrapping_add(1 << 32);
        drop(ctx);
        self.spawn_next(obituary);
        engine.close_all();
    }

    /// In a thread of its own: this one may take long to close what it has.
    fn spawn_next(self, mut obituary: ExitGuard) {
        let (station, worker) = (Arc::clone(&self.station), self.plan.id);
        let waiting = Arc::new(Mutex::new(Some(self)));
        for _ in 0..TRIES_MAX {
            let (next, name) = (Arc::clone(&waiting), format!("worker-{worker}"));
            let body = move || {
                let life = next.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let Some(life) = life {
                    life.run(None);
                }
            };
            match std::thread::Builder::new().name(name).spawn(body) {
                Ok(thread) => {
                    station.set_thread(thread);
                    // The next thread has its own.
                    obituary.0 = None;
                    return;
                }
                Err(error) => {
                    tracing::warn!(worker, %error, "worker cannot begin anew yet");
                    clock::pause(TRY_AGAIN);
                }
            }
        }
        tracing::error!(worker, "worker cannot begin anew");
    }
}

/// Starts a listener's task.
fn listen(
    ctx: &Rc<WorkerContext>,
    posts: &Rc<ListenerSet>,
    bind: BindKey,
    socket: Arc<Socket>,
    retirement: Rc<ListenerRetirement>,
) {
    posts.add(bind.clone(), Arc::clone(&socket), Rc::clone(&retirement));
    let (watch, posts) = (ListenerPanicGuard(Rc::clone(ctx)), Rc::clone(posts));
    tokio::task::spawn_local(async move {
        let watch = watch;
        Listener::serve(Rc::clone(&watch.0), bind, socket, Rc::clone(&retirement)).await;
        posts.remove(&retirement);
    });
}

/// Obeys commands until told to stop; the engine, the listeners and the
/// sessions are tasks beside it.
async fn serve(ctx: &Rc<WorkerContext>, inbox: &Mailbox, posts: &Rc<ListenerSet>) -> ThreadExit {
    let mut engine = tokio::task::spawn_local(Rc::clone(&ctx.engine).run());
    let pulse = &ctx.counters.pulse;
    loop {
        pulse.at(WorkerStage::Waiting);
        let command = tokio::select! {
            command = inbox.next(pulse) => command,
            ended = &mut engine => return ThreadExit::Panicked(engine_ended(ctx, ended)),
            () = ctx.engine.broken().notified() => return ThreadExit::Panicked("a session panicked in the engine"),
            () = ctx.alarm.notified() => return ThreadExit::Panicked("a listener panicked"),
        };
        pulse.at(WorkerStage::RunningCommand);
        match command {
            WorkerCommand::Listen(bind, socket) => {
                listen(ctx, posts, bind, socket, Rc::new(ListenerRetirement::default()));
            }
            WorkerCommand::Retire(bind) => posts.retire_after(&bind, ListenerRetirement::begin),
            WorkerCommand::Release(bind) => posts.retire_after(&bind, ListenerRetirement::release),
            WorkerCommand::ResetBackend(backend, cause) => {
                ctx.engine.abort_backend(backend, cause);
            }
            WorkerCommand::ResetAll(cause) => {
                ctx.engine.abort_all(cause);
            }
            WorkerCommand::Collect(reply) => {
                // Who has given up waiting gets it the next time.
                if !reply.is_closed() {
                    let _ = reply.send(ctx.recorder.borrow_mut().take());
                }
            }
            WorkerCommand::ReturnHistograms(spent) => ctx.recorder.borrow_mut().give_back(spent),
            WorkerCommand::Stop => break,
            #[cfg(debug_assertions)]
            WorkerCommand::Fault(fault) => {
                ctx.engine.order(fault);
                ctx.faults.order(fault);
                ctx.faults.pass(crate::fault_points::FaultPoint::Worker);
            }
            #[cfg(debug_assertions)]
            WorkerCommand::Stall(time) => clock::pause(time),
        }
    }
    // Who is still here has been cut already.
    ctx.broken_off_by.set(Cause::DrainDeadline);
    engine.abort();
    ThreadExit::Stopped
}

/// Says why.
fn engine_ended(ctx: &WorkerContext, ended: Result<io::Result<()>, JoinError>) -> &'static str {
    match ended {
        Ok(Err(error)) => {
            tracing::error!(worker = ctx.id, %error, "the relay engine has failed");
            "its engine failed"
        }
        _ => "its engine panicked",
    }
}

// === impl ListenerPanicGuard ===

impl Drop for ListenerPanicGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.alarm.notify_one();
        }
    }
}
