//! A worker: one pinned thread with its own runtime, engine, listeners and
//! counters.
//!
//! Started by `app`, which talks to it through a [`Mailbox`]. Workers share
//! nothing they write but the counts that balancing and caps need.

use super::close::Cause;
use super::context::{Context, Shared};
use super::listener::{Listener, Retirement};
use super::relay::{Engine, RING_SETTINGS};
use crate::net::cpu;
use crate::net::ring::Ring;
use crate::table::publish::TablePublisher;
use crate::table::state::BackendId;
use crate::telemetry::access_log::AccessLogSender;
use crate::telemetry::counters::WorkerCounters;
use crate::telemetry::histograms::{Delta, Spent};
use crossbeam::queue::SegQueue;
use socket2::Socket;
use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, oneshot};

/// Entries of the tokio-uring submission queue; it carries few operations, as
/// bytes move through the engine's own ring.
const RING_ENTRIES: u32 = 1024;
const RING_COMPLETIONS: u32 = 8192;

/// Which engine moves the bytes, and on which runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    /// The ring engine on tokio-uring.
    IoUring,
    /// The readiness engine on plain tokio.
    Epoll,
}

/// What a worker is started with.
#[derive(Debug)]
pub struct Plan {
    /// From 0.
    pub id: usize,
    /// Pin the thread to this CPU.
    pub cpu: Option<usize>,
    /// See [`Runtime`].
    pub runtime: Runtime,
    /// See `process.spin`.
    pub spin: Option<Duration>,
    /// Caps, gate, reports.
    pub shared: Shared,
    /// Where sessions are routed.
    pub tables: TablePublisher,
    /// This worker's counts.
    pub counters: Arc<WorkerCounters>,
    /// This worker's queue to the access log.
    pub access_log: AccessLogSender,
    /// For random draws.
    pub seed: u64,
}

/// Something a worker is told. Rare: never per session.
#[derive(Debug)]
pub enum Command {
    /// Accept from this socket.
    Listen(SocketAddr, Arc<Socket>),
    /// Stop accepting there, once the queue is empty.
    Retire(SocketAddr),
    /// Stop accepting there at once: the queue is somebody else's.
    Release(SocketAddr),
    /// Reset every session of that backend.
    CutBackend(BackendId, Cause),
    /// Reset every session.
    CutAll(Cause),
    /// Hand over what the histograms hold.
    Collect(oneshot::Sender<Option<Delta>>),
    /// Take the emptied histograms back, to be filled anew.
    GiveBack(Spent),
    /// End; sessions still open are dropped.
    Stop,
}

/// A worker's inbox. Unbounded in type, bounded in use: only the control thread
/// writes, a handful of commands for each change an operator makes.
#[derive(Debug, Default)]
pub struct Mailbox {
    commands: SegQueue<Command>,
    arrived: Notify,
}

/// A running worker.
#[derive(Debug)]
pub struct Worker {
    /// Its inbox.
    pub mailbox: Arc<Mailbox>,
    thread: std::thread::JoinHandle<()>,
}

// === impl Runtime ===

impl Runtime {
    /// As in status and configuration.
    pub fn name(self) -> &'static str {
        match self {
            Runtime::IoUring => "io_uring",
            Runtime::Epoll => "epoll",
        }
    }

    /// Whether the kernel lets us have rings that do what we need: sets one of
    /// each kind up and throws them away.
    pub fn io_uring_allowed() -> io::Result<()> {
        let probe = || {
            tokio_uring::Runtime::new(&ring_builder()).map(drop)?;
            Ring::probe()
        };
        // On a thread of its own: a ring belongs to the thread that made it.
        std::thread::scope(|scope| {
            scope.spawn(probe).join().unwrap_or_else(|_| Err(io::Error::other("probe panicked")))
        })
    }

    /// The engine of a worker. Where there is no ring to be had for it although
    /// there was at start, readiness has to do.
    fn engine(self, worker: usize, spin: Option<Duration>) -> io::Result<Engine> {
        if self == Runtime::Epoll {
            return Engine::readiness(spin);
        }
        Engine::ring(spin, RING_SETTINGS).or_else(|error| {
            tracing::warn!(worker, %error, "no ring for this worker; it uses readiness");
            Engine::readiness(spin)
        })
    }

    /// Runs `main` to its end on a fresh runtime of this kind.
    pub(super) fn block_on(self, main: impl Future<Output = ()>) -> io::Result<()> {
        match self {
            Runtime::IoUring => {
                tokio_uring::Runtime::new(&ring_builder())?.block_on(main);
            }
            Runtime::Epoll => {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                tokio::task::LocalSet::new().block_on(&runtime, main);
            }
        }
        Ok(())
    }
}

/// `coop_taskrun` and `single_issuer`: without the first, every completion
/// interrupts the thread, which measured up to three times the CPU.
fn ring_builder() -> tokio_uring::Builder {
    let mut ring = tokio_uring::uring_builder();
    ring.setup_coop_taskrun().setup_single_issuer().setup_cqsize(RING_COMPLETIONS);
    let mut builder = tokio_uring::builder();
    builder.entries(RING_ENTRIES).uring_builder(&ring);
    builder
}

// === impl Mailbox ===

impl Mailbox {
    /// Delivers a command.
    pub fn send(&self, command: Command) {
        self.commands.push(command);
        self.arrived.notify_one();
    }

    async fn next(&self) -> Command {
        loop {
            if let Some(command) = self.commands.pop() {
                return command;
            }
            self.arrived.notified().await;
        }
    }
}

// === impl Worker ===

impl Worker {
    /// Starts the thread; returns once its runtime and engine stand.
    pub fn start(plan: Plan) -> io::Result<Worker> {
        let mailbox = Arc::new(Mailbox::default());
        let (ready, started) = std::sync::mpsc::sync_channel::<io::Result<()>>(1);
        let inbox = Arc::clone(&mailbox);
        let thread =
            std::thread::Builder::new().name(format!("worker-{}", plan.id)).spawn(move || {
                if let Some(cpu) = plan.cpu
                    && let Err(error) = cpu::pin_current_thread(cpu)
                {
                    tracing::warn!(worker = plan.id, cpu, %error, "not pinned");
                }
                let failed = ready.clone();
                let ran = plan.runtime.block_on(async move {
                    match set_up(plan) {
                        Ok(ctx) => {
                            let _ = ready.send(Ok(()));
                            serve(ctx, &inbox).await;
                        }
                        Err(error) => {
                            let _ = ready.send(Err(error));
                        }
                    }
                });
                if let Err(error) = ran {
                    let _ = failed.send(Err(error));
                }
            })?;
        match started.recv() {
            Ok(Ok(())) => Ok(Worker { mailbox, thread }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::other("the worker thread died while it started")),
        }
    }

    /// Whether its thread has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for the thread; false when it panicked.
    pub fn join(self) -> bool {
        self.thread.join().is_ok()
    }
}

fn set_up(plan: Plan) -> io::Result<Rc<Context>> {
    let engine = plan.runtime.engine(plan.id, plan.spin)?;
    engine.count_for(Arc::clone(&plan.counters));
    Ok(Rc::new(Context::new(
        plan.id,
        engine,
        plan.shared,
        plan.tables.reader(),
        plan.counters,
        plan.access_log,
        plan.seed,
    )))
}

/// Obeys commands until told to stop; the engine, the listeners and the
/// sessions are tasks beside it.
async fn serve(ctx: Rc<Context>, inbox: &Mailbox) {
    let mut engine = tokio::task::spawn_local(ctx.engine.clone().run());
    let mut listeners: HashMap<SocketAddr, Vec<Rc<Retirement>>> = HashMap::new();
    loop {
        let command = tokio::select! {
            command = inbox.next() => command,
            ended = &mut engine => panic!("the relay engine ended: {ended:?}"),
        };
        match command {
            Command::Listen(bind, socket) => {
                let retirement = Rc::new(Retirement::default());
                let serving =
                    Listener::serve(Rc::clone(&ctx), bind, socket, Rc::clone(&retirement));
                listeners.entry(bind).or_default().push(retirement);
                tokio::task::spawn_local(serving);
            }
            Command::Retire(bind) => {
                for retirement in listeners.remove(&bind).into_iter().flatten() {
                    retirement.begin();
                }
            }
            Command::Release(bind) => {
                for retirement in listeners.remove(&bind).into_iter().flatten() {
                    retirement.release();
                }
            }
            Command::CutBackend(backend, cause) => {
                ctx.engine.cut_backend(backend, cause);
            }
            Command::CutAll(cause) => {
                ctx.engine.cut_all(cause);
            }
            Command::Collect(reply) => {
                let _ = reply.send(ctx.recorder.borrow_mut().take());
            }
            Command::GiveBack(spent) => ctx.recorder.borrow_mut().give_back(spent),
            Command::Stop => break,
        }
    }
    engine.abort();
}
