//! The threads of a worker: one at a time; where one panics, the next takes its sockets.
//!
//! Started by `worker`. A panic in the worker's own loop, its engine or a
//! listener ends the thread: its sessions are accounted for and reset, and the
//! next thread takes the same sockets, whose listen queues are untouched. Nothing
//! here waits for the control thread.

use super::context::{CarryOver, WorkerContext};
use super::thread::{InheritedListener, ListenerSet, ThreadExit, listen, serve};
use super::{Mailbox, WorkerConfig};
use crate::accept::listener::ListenerRetirement;
use std::cell::OnceCell;
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tidegate_core::metrics::counters::PanicScope;
use tidegate_net::clock;
use tidegate_net::cpu;
use tokio::sync::Notify;

/// How often, and after which pause, a thread that cannot start is tried again: the host
/// is out of memory or descriptors. Clients queue for so long.
const TRIES_MAX: u32 = 50;
const TRY_AGAIN: Duration = Duration::from_millis(100);

/// What a worker's threads share with the thread that started the worker.
#[derive(Debug)]
pub(crate) struct WorkerHandle {
    /// The one that runs, or ran last.
    thread: Mutex<Option<JoinHandle<()>>>,
    ended: AtomicBool,
    in_order: AtomicBool,
    /// Notified at the end.
    notify: Arc<Notify>,
}

/// One thread of a worker, and what it took over from the one before.
#[derive(Debug)]
pub(crate) struct WorkerThread {
    plan: WorkerConfig,
    inbox: Arc<Mailbox>,
    handle: Arc<WorkerHandle>,
    listeners: Vec<InheritedListener>,
    carry_over: CarryOver,
    restarts: RestartLimit,
    /// When the thread before panicked.
    panicked_at: Option<Instant>,
}

/// Ends the worker for good when it is dropped, unless another thread takes over.
struct ExitGuard(Option<Arc<WorkerHandle>>);

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
        if let Some(handle) = self.0.take() {
            handle.ended.store(true, Ordering::Release);
            handle.notify.notify_one();
        }
    }
}

// === impl WorkerThread ===

impl WorkerThread {
    /// Starts the first thread; returns once its runtime and engine are set up.
    pub(crate) fn spawn_first(
        plan: WorkerConfig,
        inbox: Arc<Mailbox>,
    ) -> io::Result<Arc<WorkerHandle>> {
        let handle = Arc::new(WorkerHandle {
            thread: Mutex::new(None),
            ended: AtomicBool::new(false),
            in_order: AtomicBool::new(false),
            notify: Arc::clone(&plan.shared.ended),
        });
        let (ready, started) = std::sync::mpsc::sync_channel::<io::Result<()>>(1);
        let first = WorkerThread {
            plan,
            inbox,
            handle: Arc::clone(&handle),
            listeners: Vec::new(),
            carry_over: CarryOver::default(),
            restarts: RestartLimit::default(),
            panicked_at: None,
        };
        let thread = first.builder().spawn(move || first.run(Some(ready)))?;
        handle.set_thread(thread);
        match started.recv() {
            Ok(Ok(())) => Ok(handle),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::other("worker thread panicked while starting")),
        }
    }

    fn builder(&self) -> std::thread::Builder {
        std::thread::Builder::new().name(format!("worker-{}", self.plan.id))
    }

    /// The thread's body; `ready` is the first one's.
    fn run(mut self, ready: Option<SyncSender<io::Result<()>>>) {
        self.plan.counters.pulse.set_thread(cpu::current_thread());
        let (worker, exit) = (self.plan.id, ExitGuard(Some(Arc::clone(&self.handle))));
        if let Some(cpu) = self.plan.cpu
            && let Err(error) = cpu::pin_current_thread(cpu)
        {
            tracing::warn!(worker, cpu, %error, "cannot pin the worker to its CPU");
        }
        for tries in 1.. {
            let (listeners, ctx) = (Rc::new(ListenerSet::default()), OnceCell::new());
            match self.run_until_stopped(&listeners, &ctx, ready.as_ref()) {
                ThreadExit::Stopped => {
                    self.handle.in_order.store(true, Ordering::Release);
                    return;
                }
                ThreadExit::StartFailed(error) => {
                    if let Some(ready) = &ready {
                        // The starting thread waits for this.
                        let _ = ready.send(Err(error));
                        return;
                    }
                    if tries == TRIES_MAX {
                        tracing::error!(worker, tries, %error, "cannot restart the worker; giving up");
                        return;
                    }
                    tracing::warn!(worker, %error, "cannot restart the worker yet; retrying");
                    clock::pause(TRY_AGAIN);
                }
                ThreadExit::Panicked(why) => {
                    let Some(ctx) = ctx.into_inner() else { return };
                    return self.restart(exit, &listeners, ctx, why);
                }
            }
        }
    }

    /// Everything from the runtime's start to its end. Once it is back, every
    /// task of the worker is gone and accounted for.
    fn run_until_stopped(
        &mut self,
        listeners: &Rc<ListenerSet>,
        ctx_cell: &OnceCell<Rc<WorkerContext>>,
        ready: Option<&SyncSender<io::Result<()>>>,
    ) -> ThreadExit {
        let runtime = self.plan.runtime;
        let main = async {
            let exit = catch_panic(self.run_once(listeners, ctx_cell, ready)).await;
            let exit = exit.unwrap_or(ThreadExit::Panicked("event loop panicked"));
            if let (ThreadExit::Panicked(_), Some(ctx)) = (&exit, ctx_cell.get()) {
                ctx.engine.mark_broken();
            }
            exit
        };
        let ran = catch_unwind(AssertUnwindSafe(|| runtime.block_on(main)));
        let exit = match ran {
            Ok(Ok(exit)) => exit,
            Ok(Err(error)) => ThreadExit::StartFailed(error),
            Err(_) => ThreadExit::Panicked("runtime panicked"),
        };
        match exit {
            ThreadExit::Panicked(why) if ctx_cell.get().is_none() => {
                ThreadExit::StartFailed(io::Error::other(why))
            }
            exit => exit,
        }
    }

    async fn run_once(
        &mut self,
        listeners: &Rc<ListenerSet>,
        ctx_cell: &OnceCell<Rc<WorkerContext>>,
        ready: Option<&SyncSender<io::Result<()>>>,
    ) -> ThreadExit {
        let ctx = match self.set_up() {
            Ok(ctx) => ctx_cell.get_or_init(|| ctx),
            Err(error) => return ThreadExit::StartFailed(error),
        };
        self.reopen_listeners(ctx, listeners);
        if let Some(ready) = ready {
            let _ = ready.send(Ok(()));
        }
        self.log_restart(ctx);
        serve(ctx, &self.inbox, listeners).await
    }

    fn set_up(&mut self) -> io::Result<Rc<WorkerContext>> {
        let WorkerConfig { id, runtime, spin, shared, tables, counters, access_log, seed, .. } =
            self.plan.clone();
        let engine = runtime.engine(id, spin, &shared.buffers, &counters)?;
        // Of the thread before, if it had a ring.
        counters.ring_held.set(0);
        let carry_over = std::mem::take(&mut self.carry_over);
        let reader = tables.reader();
        Ok(Rc::new(WorkerContext::new(
            id, engine, shared, reader, counters, access_log, seed, carry_over,
        )))
    }

    /// Listens where the thread before did.
    fn reopen_listeners(&mut self, ctx: &Rc<WorkerContext>, listeners: &Rc<ListenerSet>) {
        for InheritedListener { bind, socket, retires } in self.listeners.drain(..) {
            let retirement = Rc::new(ListenerRetirement::due(retires));
            listen(ctx, listeners, bind, socket, retirement);
        }
    }

    fn log_restart(&self, ctx: &WorkerContext) {
        if let Some(panicked_at) = self.panicked_at {
            ctx.counters.restarts.add(1);
            let took = clock::now() - panicked_at;
            tracing::warn!(worker = ctx.id, took_us = took.as_micros(), "worker restarted");
        }
    }

    /// The thread has panicked and its sessions are accounted for: starts the next
    /// one, where the limit allows it, and closes what this one leaves behind.
    fn restart(
        mut self,
        exit: ExitGuard,
        listeners: &ListenerSet,
        ctx: Rc<WorkerContext>,
        reason: &str,
    ) {
        let now = clock::now();
        let (worker, counters) = (self.plan.id, &self.plan.counters);
        counters.panics.cell(PanicScope::Worker as usize, 0).add(1);
        let sessions = ctx.engine.open_flows();
        tracing::error!(worker, sessions, reason, "worker panicked; resetting its sessions");
        let engine = Rc::clone(&ctx.engine);
        if !self.restarts.allow_restart(now) {
            tracing::error!(
                worker,
                restarts = RESTARTS_MAX,
                "worker panicked too often; exiting so that the supervisor starts a new process"
            );
            drop(ctx);
            engine.close_all();
            return drop(exit);
        }
        self.panicked_at = Some(now);
        self.listeners = listeners.take_listeners();
        self.carry_over = ctx.carry_over();
        self.plan.seed = self.plan.seed.wrapping_add(1 << 32);
        drop(ctx);
        self.spawn_next(exit);
        engine.close_all();
    }

    /// In a thread of its own: this one may take long to close what it has.
    fn spawn_next(self, mut exit: ExitGuard) {
        let (handle, worker) = (Arc::clone(&self.handle), self.plan.id);
        let waiting = Arc::new(Mutex::new(Some(self)));
        for _ in 0..TRIES_MAX {
            let (next, name) = (Arc::clone(&waiting), format!("worker-{worker}"));
            let body = move || {
                let next = next.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let Some(next) = next {
                    next.run(None);
                }
            };
            match std::thread::Builder::new().name(name).spawn(body) {
                Ok(thread) => {
                    handle.set_thread(thread);
                    // The next thread has its own.
                    exit.0 = None;
                    return;
                }
                Err(error) => {
                    tracing::warn!(worker, %error, "cannot start the worker thread yet; retrying");
                    clock::pause(TRY_AGAIN);
                }
            }
        }
        tracing::error!(worker, "cannot start the worker thread; giving up");
    }
}

// === panics and restarts ===

/// The future panicked; the panic hook has logged the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Panicked;

/// Runs `main` to its end or to its panic. What `main` shared with others is for
/// the caller to judge, or to give up.
pub async fn catch_panic<F: Future>(main: F) -> Result<F::Output, Panicked> {
    let mut main = Box::pin(main);
    poll_fn(|cx| {
        // Never polled again after a panic.
        match catch_unwind(AssertUnwindSafe(|| main.as_mut().poll(cx))) {
            Ok(poll) => poll.map(Ok),
            Err(_) => Poll::Ready(Err(Panicked)),
        }
    })
    .await
}

/// Restarts of one worker in [`WINDOW`]. A panic once a day is better survived; panics
/// every few seconds come from a state that only a new process is free of, and each resets
/// all sessions of the worker.
const RESTARTS_MAX: usize = 5;
const WINDOW: Duration = Duration::from_secs(60);

/// A worker's recent restarts; see [`RESTARTS_MAX`].
#[derive(Debug, Default)]
struct RestartLimit(VecDeque<Instant>);

impl RestartLimit {
    /// Whether one more is allowed, which is then counted.
    fn allow_restart(&mut self, now: Instant) -> bool {
        while self.0.front().is_some_and(|at| now.saturating_duration_since(*at) >= WINDOW) {
            self.0.pop_front();
        }
        let allowed = self.0.len() < RESTARTS_MAX;
        if allowed {
            self.0.push_back(now);
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_answer_and_anything_else_passes() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            assert_eq!(catch_panic(async { 3 }).await, Ok(3));
            let panics = async {
                tokio::task::yield_now().await;
                panic!("on purpose");
            };
            assert_eq!(catch_panic::<_>(panics).await.map(|(): ()| ()), Err(Panicked));
        });
    }

    #[test]
    fn five_in_a_minute_and_no_sixth_until_the_first_is_forgotten() {
        let (start, mut restarts) = (tidegate_net::clock::now(), RestartLimit::default());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!((0..5).all(|n| restarts.allow_restart(at(n * 10))));
        assert!(!restarts.allow_restart(at(59)));
        assert!(restarts.allow_restart(at(60)));
        assert!(!restarts.allow_restart(at(69)));
        assert!(restarts.allow_restart(at(70)));
    }

    #[test]
    fn one_now_and_then_is_always_allowed() {
        let (start, mut restarts) = (tidegate_net::clock::now(), RestartLimit::default());
        assert!((0..1000).all(|n| restarts.allow_restart(start + Duration::from_secs(n * 13))));
    }
}
