//! What everything on one worker shares, and the way to the control thread.
//!
//! Made by `worker`, held by the listener and session tasks through an `Rc`.
//! Nothing here blocks; what crosses threads goes through bounded queues.

use crate::accept::wait_queue::SlotWaiters;
use crate::access_log::AccessLogSender;
use crate::fault_points::FaultPlan;
use crate::relay::Engine;
use crate::session::numbers::Numbers;
use crossbeam::queue::ArrayQueue;
use crossbeam::utils::CachePadded;
use std::cell::{Cell, RefCell};
use std::io;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};
use tidegate_core::balance::PickKey;
use tidegate_core::balance::in_flight::InFlight;
use tidegate_core::health::ConnectFailure;
use tidegate_core::metrics::counters::{LocalErrorKind, LocalErrorPlace, WorkerCounters};
use tidegate_core::metrics::histograms::Recorder;
use tidegate_core::model::ClientAddr;
use tidegate_core::outcome::Cause;
use tidegate_core::table::Table;
use tidegate_core::table::publish::TableReader;
use tidegate_core::table::state::BackendId;
use tidegate_net::budget::MemoryBudget;
use tidegate_net::clock;
use tokio::sync::Notify;

/// Reports that may wait for the control thread. A backend that dies under
/// full load makes one for each connect in flight; beyond this they are
/// counted and dropped, and the verdict has long been reached.
const REPORTS_MAX: usize = 4096;

/// What workers tell the control thread.
#[derive(Debug, Clone, Copy)]
pub enum WorkerReport {
    /// A connect failed through the backend or its path.
    ConnectFailed {
        /// To whom.
        backend: BackendId,
        /// How.
        failure: ConnectFailure,
        /// Failures since the last success.
        in_a_row: u32,
        /// When the attempt began.
        begun: Instant,
    },
}

/// The queue of reports, all workers to the control thread.
#[derive(Debug)]
pub struct ReportQueue {
    queue: ArrayQueue<WorkerReport>,
    arrived: Notify,
}

/// Whole-process things a worker needs.
#[derive(Debug, Clone)]
pub struct ProcessContext {
    /// Sessions open in the process and those that share the count; enforces
    /// `process.connections_max`.
    pub in_flight: Arc<InFlight>,
    /// Of them, this process's.
    pub sessions: Arc<CachePadded<AtomicU32>>,
    /// Where to wait for slots.
    pub waiters: Arc<SlotWaiters>,
    /// To the control thread.
    pub reports: Arc<ReportQueue>,
    /// A worker has ended for good.
    pub ended: Arc<Notify>,
    /// What sessions may have buffered; `process.buffers_max`.
    pub buffers: Arc<MemoryBudget>,
    /// For new sessions.
    pub numbers: Arc<Numbers>,
}

/// One worker's surroundings.
#[derive(Debug)]
pub(crate) struct WorkerContext {
    /// The worker's number, from 0.
    pub(crate) id: usize,
    /// Moves the bytes.
    pub(crate) engine: Engine,
    /// Process-wide caps, wait queues and reports.
    pub(crate) shared: ProcessContext,
    /// This worker's counts.
    pub(crate) counters: Arc<WorkerCounters>,
    /// This worker's histograms.
    pub(crate) recorder: RefCell<Recorder>,
    /// This worker's queue to the access log.
    pub(crate) access_log: AccessLogSender,
    /// What ends sessions whose task ends before they do.
    pub(crate) broken_off_by: Cell<Cause>,
    /// A connection has just been accepted, and is no session's task yet.
    pub(crate) admitting: Cell<bool>,
    /// A listener's task has panicked.
    pub(crate) alarm: Notify,
    pub(crate) faults: FaultPlan,
    tables: RefCell<TableReader>,
    random: RefCell<fastrand::Rng>,
    /// The rest of its block of session numbers.
    numbers: Cell<(u64, u64)>,
    /// Until then nothing is accepted: there would be nothing to serve it with.
    short_until: Cell<Option<Instant>>,
    /// When local errors were last logged, by their kind, and how many were suppressed
    /// since.
    logged: [Cell<(Option<Instant>, u64)>; LocalErrorKind::ALL.len()],
}

/// What one thread of a worker leaves to the next.
#[derive(Debug, Default)]
pub(crate) struct CarryOver {
    recorder: Recorder,
    numbers: (u64, u64),
}

/// How long no connection is accepted after a session ran out of descriptors or memory.
/// Those that arrive wait in the kernel's queue instead of being reset.
const SHORT_PAUSE: Duration = Duration::from_millis(100);

/// Time between two log lines about local errors of one kind on one worker.
const LOG_AGAIN: Duration = Duration::from_secs(10);

// === impl ReportQueue ===

impl ReportQueue {
    /// Empty.
    pub fn new() -> ReportQueue {
        ReportQueue { queue: ArrayQueue::new(REPORTS_MAX), arrived: Notify::new() }
    }

    /// Queues a report; false when the queue is full.
    pub fn push(&self, report: WorkerReport) -> bool {
        let queued = self.queue.push(report).is_ok();
        self.arrived.notify_one();
        queued
    }

    /// The oldest report.
    pub fn pop(&self) -> Option<WorkerReport> {
        self.queue.pop()
    }

    /// Resolves when there may be a report.
    pub async fn arrived(&self) {
        self.arrived.notified().await;
    }
}

impl Default for ReportQueue {
    fn default() -> Self {
        ReportQueue::new()
    }
}

// === impl WorkerContext ===

impl WorkerContext {
    /// The surroundings of worker `id`; `seed` drives its random draws.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn new(
        id: usize,
        engine: Engine,
        shared: ProcessContext,
        tables: TableReader,
        counters: Arc<WorkerCounters>,
        access_log: AccessLogSender,
        seed: u64,
        carry_over: CarryOver,
    ) -> WorkerContext {
        WorkerContext {
            id,
            engine,
            shared,
            counters,
            recorder: RefCell::new(carry_over.recorder),
            access_log,
            broken_off_by: Cell::new(Cause::InternalError),
            admitting: Cell::new(false),
            alarm: Notify::new(),
            faults: FaultPlan::default(),
            tables: RefCell::new(tables),
            random: RefCell::new(fastrand::Rng::with_seed(seed)),
            numbers: Cell::new(carry_over.numbers),
            short_until: Cell::new(None),
            logged: Default::default(),
        }
    }

    /// What the next thread of this worker takes over.
    pub(crate) fn carry_over(&self) -> CarryOver {
        CarryOver { recorder: self.recorder.take(), numbers: self.numbers.get() }
    }

    /// Counts a local error and logs it. A lack of descriptors or memory has the listeners
    /// wait a moment.
    #[cold]
    pub(crate) fn local_error(&self, kind: LocalErrorKind, at: LocalErrorPlace, error: &io::Error) {
        self.counters.count_local_error(kind, at);
        let now = clock::now();
        if at == LocalErrorPlace::Connect
            && matches!(kind, LocalErrorKind::Descriptors | LocalErrorKind::Memory)
        {
            self.short_until.set(Some(now + SHORT_PAUSE));
        }
        let logged = &self.logged[kind as usize];
        let (last, suppressed) = logged.get();
        if last.is_some_and(|last| now < last + LOG_AGAIN) {
            logged.set((last, suppressed + 1));
            return;
        }
        logged.set((Some(now), 0));
        let (reason, at, worker) = (kind.name(), at.name(), self.id);
        tracing::warn!(
            reason, at, worker, suppressed, %error,
            "local error; not counted against a backend"
        );
    }

    /// Whether sessions ran short of something a moment ago.
    #[inline]
    pub(crate) fn is_short(&self) -> bool {
        let Some(until) = self.short_until.get() else { return false };
        let short = clock::now() < until;
        if !short {
            self.short_until.set(None);
        }
        short
    }

    /// The newest table.
    #[inline]
    pub(crate) fn table(&self) -> impl Deref<Target = Arc<Table>> + use<> {
        self.tables.borrow_mut().load()
    }

    /// Fresh random bits.
    #[inline]
    pub(crate) fn draw(&self) -> u64 {
        self.random.borrow_mut().u64(..)
    }

    /// What a pick for that client goes by, now.
    #[inline]
    pub(crate) fn pick_key(&self, client: ClientAddr) -> PickKey {
        PickKey { client: client.ip(), draw: self.draw(), at: clock::millis(clock::now()) }
    }

    /// A number for a new session, which no other session has.
    pub(crate) fn next_session(&self) -> u64 {
        let (mut next, mut end) = self.numbers.get();
        if next == end {
            let block = self.shared.numbers.block();
            (next, end) = (block.start, block.end);
        }
        self.numbers.set((next + 1, end));
        next
    }
}
