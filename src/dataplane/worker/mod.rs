//! A worker: one pinned thread with its own runtime, engine, listeners and
//! counters.
//!
//! Started by `daemon`, which talks to it through a [`Mailbox`]. Workers share
//! nothing they write but the counts that balancing and caps need. A worker
//! outlives its thread: after a panic another takes over, see `supervisor`.

pub mod context;
mod supervisor;
mod thread;

pub use supervisor::{Panicked, catch_panic};

use crate::access_log::AccessLogSender;
#[cfg(debug_assertions)]
use crate::fault_points::FaultPoint;
use crate::relay::{self, Engine, RING_SETTINGS};
use crate::worker::context::ProcessContext;
use crossbeam::queue::SegQueue;
use socket2::Socket;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use supervisor::{WorkerHandle, WorkerThread};
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::metrics::histograms::{HistogramDelta, RecycledHistograms};
use tidegate_core::metrics::progress::WorkerProgress;
use tidegate_core::model::BindKey;
use tidegate_core::outcome::Cause;
use tidegate_core::table::publish::TablePublisher;
use tidegate_core::table::state::BackendId;
use tidegate_net::budget::MemoryBudget;
use tidegate_net::ring::Ring;
use tokio::sync::{Notify, oneshot};

/// Entries of the tokio-uring submission queue; it carries few operations, as
/// bytes move through the engine's own ring.
const RING_ENTRIES: u32 = 1024;
const RING_COMPLETIONS: u32 = 8192;

/// Which engine moves the bytes, and on which runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineKind {
    /// The ring engine on tokio-uring.
    IoUring,
    /// The epoll engine on plain tokio.
    Epoll,
}

/// What a worker is started with.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// From 0.
    pub id: usize,
    /// Pin the thread to this CPU.
    pub cpu: Option<usize>,
    /// See [`EngineKind`].
    pub runtime: EngineKind,
    /// See `process.spin`.
    pub spin: Option<Duration>,
    /// Caps, wait queues, reports.
    pub shared: ProcessContext,
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
pub enum WorkerCommand {
    /// Accept from this socket.
    Listen(BindKey, Arc<Socket>),
    /// Stop accepting there, once the queue is empty.
    Retire(BindKey),
    /// Stop accepting there at once: the queue is somebody else's.
    Release(BindKey),
    /// Reset every session of that backend.
    ResetBackend(BackendId, Cause),
    /// Reset every session.
    ResetAll(Cause),
    /// Hand over what the histograms hold.
    Collect(oneshot::Sender<Option<HistogramDelta>>),
    /// Take the emptied histograms back, to be filled anew.
    ReturnHistograms(RecycledHistograms),
    /// End; sessions still open are dropped.
    Stop,
    /// Panic at that place; for tests.
    #[cfg(debug_assertions)]
    Fault(FaultPoint),
    /// Do nothing at all for so long; for tests.
    #[cfg(debug_assertions)]
    Stall(Duration),
}

/// A worker's inbox. Unbounded in type, bounded in use: only the control thread
/// writes, a handful of commands for each change an operator makes.
#[derive(Debug, Default)]
pub struct Mailbox {
    commands: SegQueue<WorkerCommand>,
    arrived: Notify,
}

/// A running worker.
#[derive(Debug)]
pub struct Worker {
    /// Its inbox.
    pub mailbox: Arc<Mailbox>,
    cpu: Option<usize>,
    handle: Arc<WorkerHandle>,
}

// === impl EngineKind ===

impl EngineKind {
    /// As in status and configuration.
    pub fn name(self) -> &'static str {
        match self {
            EngineKind::IoUring => "io_uring",
            EngineKind::Epoll => "epoll",
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
            scope.spawn(probe).join().unwrap_or_else(|_| Err(io::Error::other("check panicked")))
        })
    }

    /// The engine of a worker. Where no ring can be made for it, although one could at
    /// start, it is an epoll engine.
    pub(crate) fn engine(
        self,
        worker: usize,
        spin: Option<Duration>,
        budget: &Arc<MemoryBudget>,
        counters: &Arc<WorkerCounters>,
    ) -> io::Result<Engine> {
        let epoll = || relay::epoll_engine(spin, Arc::clone(budget), Arc::clone(counters));
        if self == EngineKind::Epoll {
            return epoll();
        }
        let (budget, counters) = (Arc::clone(budget), Arc::clone(counters));
        relay::ring_engine(spin, RING_SETTINGS, budget, counters).or_else(|error| {
            tracing::warn!(worker, %error, "cannot create an io_uring; the worker uses epoll");
            epoll()
        })
    }

    /// Runs `main` to its end on a fresh runtime of this kind.
    pub(crate) fn block_on<T>(self, main: impl Future<Output = T>) -> io::Result<T> {
        match self {
            EngineKind::IoUring => Ok(tokio_uring::Runtime::new(&ring_builder())?.block_on(main)),
            EngineKind::Epoll => {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                Ok(tokio::task::LocalSet::new().block_on(&runtime, main))
            }
        }
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
    pub fn send(&self, command: WorkerCommand) {
        self.commands.push(command);
        self.arrived.notify_one();
    }

    /// The next command. Each time it is woken, the worker's pulse is felt.
    pub(crate) async fn next(&self, pulse: &WorkerProgress) -> WorkerCommand {
        loop {
            pulse.report_progress();
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
    pub fn start(plan: WorkerConfig) -> io::Result<Worker> {
        let mailbox = Arc::new(Mailbox::default());
        let cpu = plan.cpu;
        let handle = WorkerThread::spawn_first(plan, Arc::clone(&mailbox))?;
        Ok(Worker { mailbox, cpu, handle })
    }

    /// The CPU its thread is bound to, if it is.
    pub fn cpu(&self) -> Option<usize> {
        self.cpu
    }

    /// Has it look at its mailbox, and answer to its pulse.
    pub fn wake(&self) {
        self.mailbox.arrived.notify_one();
    }

    /// Whether it has ended for good: told to, or after too many panics.
    pub fn is_finished(&self) -> bool {
        self.handle.has_ended()
    }

    /// Waits for the thread; false when it panicked.
    pub fn join(self) -> bool {
        self.handle.join()
    }
}
