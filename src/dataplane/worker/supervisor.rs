//! Restarts a worker's thread after a panic.
//!
//! Started by `worker`. A worker has one thread at a time. It does not depend on the control
//! thread. If the event loop, the relay engine or a listener panics:
//!
//! 1. All sessions of the worker are counted and reset.
//! 2. A new thread takes over the listening sockets. Clients in the listen queues are not
//!    affected.
//! 3. After [`RESTARTS_MAX`] restarts within [`WINDOW`] the worker exits instead.

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

/// Attempts to start a thread, and the pause between them. Starts fail if the host is out of
/// memory or descriptors. Clients wait in the listen queues.
const TRIES_MAX: u32 = 50;
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// State shared between a worker's threads and the thread that started the worker.
#[derive(Debug)]
pub(crate) struct WorkerHandle {
    /// The current or last thread.
    thread: Mutex<Option<JoinHandle<()>>>,
    ended: AtomicBool,
    /// The worker ended by command.
    stopped: AtomicBool,
    /// Notified when the worker has ended.
    notify: Arc<Notify>,
}

/// One thread of a worker, with the state taken over from a panicked thread.
#[derive(Debug)]
pub(crate) struct WorkerThread {
    config: WorkerConfig,
    inbox: Arc<Mailbox>,
    handle: Arc<WorkerHandle>,
    listeners: Vec<InheritedListener>,
    carry_over: CarryOver,
    restarts: RestartLimit,
    /// When the last thread panicked.
    panicked_at: Option<Instant>,
}

/// On drop, marks the worker as exited, unless a new thread has taken over.
struct ExitGuard(Option<Arc<WorkerHandle>>);

// === impl WorkerHandle ===

impl WorkerHandle {
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Waits for the last thread. Returns true if the worker ended by command.
    pub(crate) fn join(&self) -> bool {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let joined = thread.is_none_or(|thread| thread.join().is_ok());
        joined && self.stopped.load(Ordering::Acquire)
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
    /// Starts the first thread. Returns once its runtime and engine are set up.
    pub(crate) fn spawn_first(
        config: WorkerConfig,
        inbox: Arc<Mailbox>,
    ) -> io::Result<Arc<WorkerHandle>> {
        let handle = Arc::new(WorkerHandle {
            thread: Mutex::new(None),
            ended: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            notify: Arc::clone(&config.shared.ended),
        });
        let (ready, started) = std::sync::mpsc::sync_channel::<io::Result<()>>(1);
        let first = WorkerThread {
            config,
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
        std::thread::Builder::new().name(format!("worker-{}", self.config.id))
    }

    /// Body of the thread. Only the first thread has `ready`.
    fn run(mut self, ready: Option<SyncSender<io::Result<()>>>) {
        self.config.counters.pulse.set_thread(cpu::current_thread());
        let (worker, exit) = (self.config.id, ExitGuard(Some(Arc::clone(&self.handle))));
        if let Some(cpu) = self.config.cpu
            && let Err(error) = cpu::pin_current_thread(cpu)
        {
            tracing::warn!(worker, cpu, %error, "cannot pin the worker to its CPU; leaving it to the scheduler");
        }
        for tries in 1.. {
            let (listeners, ctx) = (Rc::new(ListenerSet::default()), OnceCell::new());
            match self.run_until_stopped(&listeners, &ctx, ready.as_ref()) {
                ThreadExit::Stopped => {
                    self.handle.stopped.store(true, Ordering::Release);
                    return;
                }
                ThreadExit::StartFailed(error) => {
                    if let Some(ready) = &ready {
                        // `spawn_first` waits for this.
                        let _ = ready.send(Err(error));
                        return;
                    }
                    if tries == TRIES_MAX {
                        tracing::error!(worker, tries, %error, "cannot restart the worker; giving up");
                        return;
                    }
                    tracing::warn!(worker, %error, "cannot restart the worker yet; retrying");
                    clock::pause(RETRY_PAUSE);
                }
                ThreadExit::Panicked(why) => {
                    let Some(ctx) = ctx.into_inner() else { return };
                    return self.restart(exit, &listeners, ctx, why);
                }
            }
        }
    }

    /// Runs the runtime from start to end. When it returns, all tasks of the worker are
    /// dropped and all sessions accounted for.
    fn run_until_stopped(
        &mut self,
        listeners: &Rc<ListenerSet>,
        ctx_cell: &OnceCell<Rc<WorkerContext>>,
        ready: Option<&SyncSender<io::Result<()>>>,
    ) -> ThreadExit {
        let runtime = self.config.runtime;
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
            Err(_) => ThreadExit::Panicked("async runtime panicked"),
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
            self.config.clone();
        let engine = runtime.engine(id, spin, &shared.buffers, &counters)?;
        // The last thread's ring, if it had one, is closed.
        counters.ring_held.set(0);
        let carry_over = std::mem::take(&mut self.carry_over);
        let reader = tables.reader();
        Ok(Rc::new(WorkerContext::new(
            id, engine, shared, reader, counters, access_log, seed, carry_over,
        )))
    }

    /// Listens on the sockets of the last thread.
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

    /// Called after a panic, when all sessions are accounted for. Starts the next thread if the
    /// restart limit allows it, then closes the sockets of this thread's sessions.
    fn restart(
        mut self,
        exit: ExitGuard,
        listeners: &ListenerSet,
        ctx: Rc<WorkerContext>,
        reason: &str,
    ) {
        let now = clock::now();
        let (worker, counters) = (self.config.id, &self.config.counters);
        counters.panics.cell(PanicScope::Worker as usize, 0).add(1);
        let sessions = ctx.engine.open_sessions();
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
        self.config.seed = self.config.seed.wrapping_add(1 << 32);
        drop(ctx);
        self.spawn_next(exit);
        engine.close_all();
    }

    /// Starts the next thread before this one closes its sockets, because that can take long.
    fn spawn_next(self, mut exit: ExitGuard) {
        let (handle, worker) = (Arc::clone(&self.handle), self.config.id);
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
                    // The next thread has its own guard.
                    exit.0 = None;
                    return;
                }
                Err(error) => {
                    tracing::warn!(worker, %error, "cannot start the worker thread yet; retrying");
                    clock::pause(RETRY_PAUSE);
                }
            }
        }
        tracing::error!(worker, "cannot start the worker thread; giving up");
    }
}

// === panics and restarts ===

/// The future panicked. The panic hook has logged the details.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Panicked;

/// Runs `main` until it returns or panics. After a panic the caller must decide whether state
/// shared with `main` is still valid.
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

/// Restarts of a worker within [`WINDOW`]. Each restart resets all sessions of the worker. More
/// frequent panics indicate a corrupt state that only a new process clears.
const RESTARTS_MAX: usize = 5;
const WINDOW: Duration = Duration::from_secs(60);

/// Times of a worker's restarts within [`WINDOW`].
#[derive(Debug, Default)]
struct RestartLimit(VecDeque<Instant>);

impl RestartLimit {
    /// Returns whether another restart is allowed, and counts it if so.
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
    fn catch_panic_returns_the_output_or_the_panic() {
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
    fn sixth_restart_within_a_minute_is_rejected() {
        let (start, mut restarts) = (tidegate_net::clock::now(), RestartLimit::default());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!((0..5).all(|n| restarts.allow_restart(at(n * 10))));
        assert!(!restarts.allow_restart(at(59)));
        assert!(restarts.allow_restart(at(60)));
        assert!(!restarts.allow_restart(at(69)));
        assert!(restarts.allow_restart(at(70)));
    }

    #[test]
    fn restart_every_13_seconds_is_always_allowed() {
        let (start, mut restarts) = (tidegate_net::clock::now(), RestartLimit::default());
        assert!((0..1000).all(|n| restarts.allow_restart(start + Duration::from_secs(n * 13))));
    }
}
