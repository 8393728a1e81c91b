//! A worker: one pinned thread with its own runtime, engine, listeners and counters.
//!
//! Started by `daemon`, which controls it through a [`Mailbox`]. The only values that workers
//! share and write are the counts for balancing and caps. After a panic a new thread continues
//! the worker, see `supervisor`.

pub mod context;
mod sessions;
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
use tidegate_core::sessions::{SessionList, SessionQuery, SessionsEnded, SessionsToEnd};
use tidegate_core::table::publish::TablePublisher;
use tidegate_core::table::state::BackendId;
use tidegate_net::budget::MemoryBudget;
use tidegate_net::ring::Ring;
use tokio::sync::{Notify, oneshot};

/// Submission and completion entries of the tokio-uring runtime. It carries few operations,
/// because bytes move through the engine's own ring.
const RING_ENTRIES: u32 = 1024;
const RING_COMPLETIONS: u32 = 8192;

/// The relay engine of a worker, and its runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineKind {
    /// The ring engine on tokio-uring.
    IoUring,
    /// The epoll engine on plain tokio.
    Epoll,
}

/// Configuration of a worker.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Number of the worker, from 0.
    pub id: usize,
    /// CPU to pin the thread to.
    pub cpu: Option<usize>,
    /// Engine and runtime.
    pub runtime: EngineKind,
    /// `process.spin`.
    pub spin: Option<Duration>,
    /// Process-wide caps, wait queues and reports.
    pub shared: ProcessContext,
    /// Source of routing tables.
    pub tables: TablePublisher,
    /// This worker's counters.
    pub counters: Arc<WorkerCounters>,
    /// This worker's queue to the access log.
    pub access_log: AccessLogSender,
    /// Seed of the worker's random numbers.
    pub seed: u64,
}

/// A command to a worker. Rare: never sent per session.
#[derive(Debug)]
pub enum WorkerCommand {
    /// Accept from this socket.
    Listen(BindKey, Arc<Socket>),
    /// Stop accepting on this bind once its listen queue is empty.
    Retire(BindKey),
    /// Stop accepting on this bind at once: another process serves its listen queue.
    Release(BindKey),
    /// Reset all sessions of this backend.
    ResetBackend(BackendId, Cause),
    /// Reset all sessions.
    ResetAll(Cause),
    /// List open sessions.
    ListSessions(Arc<SessionQuery>, oneshot::Sender<SessionList>),
    /// End sessions.
    EndSessions(Arc<SessionsToEnd>, oneshot::Sender<SessionsEnded>),
    /// Send the histograms recorded since the last `Collect`.
    Collect(oneshot::Sender<Option<HistogramDelta>>),
    /// Reuse these emptied histograms.
    ReturnHistograms(RecycledHistograms),
    /// Exit. Open sessions are dropped.
    Stop,
    /// Panic at this point (tests only).
    #[cfg(debug_assertions)]
    Fault(FaultPoint),
    /// Block the thread for this long (tests only).
    #[cfg(debug_assertions)]
    Stall(Duration),
}

/// A worker's command queue. The type has no bound, but only the control thread writes: a few
/// commands per change by the operator.
#[derive(Debug, Default)]
pub struct Mailbox {
    commands: SegQueue<WorkerCommand>,
    arrived: Notify,
}

/// A running worker.
#[derive(Debug)]
pub struct Worker {
    /// Its command queue.
    pub mailbox: Arc<Mailbox>,
    cpu: Option<usize>,
    handle: Arc<WorkerHandle>,
}

// === impl EngineKind ===

impl EngineKind {
    /// The name in `status` and in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            EngineKind::IoUring => "io_uring",
            EngineKind::Epoll => "epoll",
        }
    }

    /// Checks that the kernel allows both kinds of io_uring that a worker needs, by setting up
    /// one of each.
    ///
    /// # Errors
    /// A ring cannot be set up.
    pub fn io_uring_allowed() -> io::Result<()> {
        let probe = || {
            tokio_uring::Runtime::new(&ring_builder()).map(drop)?;
            Ring::probe()
        };
        // On its own thread: a ring belongs to the thread that created it.
        std::thread::scope(|scope| {
            scope.spawn(probe).join().unwrap_or_else(|_| Err(io::Error::other("check panicked")))
        })
    }

    /// Creates the engine of a worker. Falls back to epoll if no ring can be created.
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

    /// Runs `main` to completion on a new runtime of this kind.
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

/// Without `coop_taskrun`, every completion interrupts the thread. That used up to three times
/// the CPU in measurements.
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

    /// Returns the next command. Reports progress on each wake-up, for the watchdog.
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
    /// Starts the thread. Returns once its runtime and engine are set up.
    ///
    /// # Errors
    /// The thread, its runtime or its engine cannot be started.
    pub fn start(config: WorkerConfig) -> io::Result<Worker> {
        let mailbox = Arc::new(Mailbox::default());
        let cpu = config.cpu;
        let handle = WorkerThread::spawn_first(config, Arc::clone(&mailbox))?;
        Ok(Worker { mailbox, cpu, handle })
    }

    /// The CPU that the thread is pinned to.
    pub fn cpu(&self) -> Option<usize> {
        self.cpu
    }

    /// Wakes the worker, so that it reports progress.
    pub fn wake(&self) {
        self.mailbox.arrived.notify_one();
    }

    /// Whether the worker has exited, by command or after too many panics.
    pub fn is_finished(&self) -> bool {
        self.handle.has_ended()
    }

    /// Waits for the thread. Returns false if the worker did not stop by command.
    pub fn join(self) -> bool {
        self.handle.join()
    }
}
