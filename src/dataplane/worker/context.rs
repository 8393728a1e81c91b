//! State shared by all tasks of one worker, and its queue to the control thread.
//!
//! Created by `worker`; listener and session tasks hold it in an `Rc`. It never blocks: data
//! for other threads goes through bounded queues.

use crate::accept::wait_queue::SlotWaiters;
use crate::access_log::AccessLogSender;
use crate::fault_points::FaultPlan;
use crate::relay::Engine;
use crate::session::HeaderBuffers;
use crate::session::numbers::Numbers;
use crossbeam::queue::ArrayQueue;
use crossbeam::utils::CachePadded;
use std::cell::{Cell, RefCell};
use std::io;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};
use tidegate_core::balance::in_flight::InFlight;
use tidegate_core::balance::{PickKey, PickRecord};
use tidegate_core::decision::rings::{Decisions, WorkerDecisions};
use tidegate_core::health::ConnectFailure;
use tidegate_core::metrics::counters::{LocalErrorKind, LocalErrorPlace, WorkerCounters};
use tidegate_core::metrics::histograms::Recorder;
use tidegate_core::model::ClientAddr;
use tidegate_core::outcome::Cause;
use tidegate_core::table::publish::TableReader;
use tidegate_core::table::state::BackendId;
use tidegate_core::table::{NoBackend, PoolTable, Reservation, Table};
use tidegate_net::budget::MemoryBudget;
use tidegate_net::clock;
use tokio::sync::Notify;

/// Reports queued for the control thread. A backend that fails under full load causes one per
/// connect in flight. Reports beyond this bound are dropped and counted: by then the control
/// thread has enough evidence.
const REPORTS_MAX: usize = 4096;

/// A report to the control thread.
#[derive(Debug, Clone, Copy)]
pub enum WorkerReport {
    /// A connect failed because of the backend or its path.
    ConnectFailed {
        /// The backend.
        backend: BackendId,
        /// The failure.
        failure: ConnectFailure,
        /// Failures since the last success.
        in_a_row: u32,
        /// Start of the attempt.
        begun: Instant,
    },
}

/// The queue of reports from all workers to the control thread.
#[derive(Debug)]
pub struct ReportQueue {
    queue: ArrayQueue<WorkerReport>,
    arrived: Notify,
}

/// State shared by all workers of the process.
#[derive(Debug, Clone)]
pub struct ProcessContext {
    /// Open sessions of this process and of the processes that share its caps. Enforces
    /// `process.connections_max`.
    pub in_flight: Arc<InFlight>,
    /// Open sessions of this process.
    pub sessions: Arc<CachePadded<AtomicU32>>,
    /// Listeners and clients that wait for a slot.
    pub waiters: Arc<SlotWaiters>,
    /// Reports to the control thread.
    pub reports: Arc<ReportQueue>,
    /// Notified when a worker has exited without a restart.
    pub ended: Arc<Notify>,
    /// Budget for buffered bytes, `process.buffers_max`.
    pub buffers: Arc<MemoryBudget>,
    /// Numbers for new sessions.
    pub numbers: Arc<Numbers>,
    /// Decisions of all workers. A restarted worker continues in the same rings.
    pub decisions: Arc<Decisions>,
}

/// State shared by all tasks of one worker.
#[derive(Debug)]
pub(crate) struct WorkerContext {
    /// Number of the worker, from 0.
    pub(crate) id: usize,
    /// The relay engine.
    pub(crate) engine: Engine,
    /// Process-wide caps, wait queues and reports.
    pub(crate) shared: ProcessContext,
    /// This worker's counters.
    pub(crate) counters: Arc<WorkerCounters>,
    /// This worker's histograms.
    pub(crate) recorder: RefCell<Recorder>,
    /// This worker's queue to the access log.
    pub(crate) access_log: AccessLogSender,
    /// Cause of sessions whose task is dropped before they end.
    pub(crate) interrupted_by: Cell<Cause>,
    /// True from accept until the session has a task. A panic then counts for the worker.
    pub(crate) admitting: Cell<bool>,
    /// Notified when a listener's task panics.
    pub(crate) listener_panicked: Notify,
    pub(crate) faults: FaultPlan,
    /// Notes of the last pick. Reused, so that a pick allocates nothing.
    pub(crate) pick_record: RefCell<PickRecord>,
    pub(crate) headers: RefCell<HeaderBuffers>,
    tables: RefCell<TableReader>,
    random: RefCell<fastrand::Rng>,
    /// Start and end of the unused part of this worker's block of session numbers.
    numbers: Cell<(u64, u64)>,
    /// No accept before this time, because descriptors or memory are short.
    accept_paused_until: Cell<Option<Instant>>,
    /// Per kind of local error: when it was last logged, and errors suppressed since.
    logged: [Cell<(Option<Instant>, u64)>; LocalErrorKind::ALL.len()],
}

/// State that a panicked thread hands to the next thread of the worker.
#[derive(Debug, Default)]
pub(crate) struct CarryOver {
    recorder: Recorder,
    numbers: (u64, u64),
}

/// How long no connection is accepted after a session ran out of descriptors or memory.
/// Clients then wait in the listen queue instead of being reset.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Time between two log lines about local errors of one kind on one worker.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

// === impl ReportQueue ===

impl ReportQueue {
    /// Returns an empty queue.
    pub fn new() -> ReportQueue {
        ReportQueue { queue: ArrayQueue::new(REPORTS_MAX), arrived: Notify::new() }
    }

    /// Queues a report. Returns false if the queue is full and the report is dropped.
    pub fn push(&self, report: WorkerReport) -> bool {
        let queued = self.queue.push(report).is_ok();
        self.arrived.notify_one();
        queued
    }

    /// Removes the oldest report.
    pub fn pop(&self) -> Option<WorkerReport> {
        self.queue.pop()
    }

    /// Resolves when the queue can hold a report.
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
    /// Returns the context of worker `id`. `seed` is for its random numbers.
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
            interrupted_by: Cell::new(Cause::InternalError),
            admitting: Cell::new(false),
            listener_panicked: Notify::new(),
            faults: FaultPlan::default(),
            pick_record: RefCell::default(),
            headers: RefCell::default(),
            tables: RefCell::new(tables),
            random: RefCell::new(fastrand::Rng::with_seed(seed)),
            numbers: Cell::new(carry_over.numbers),
            accept_paused_until: Cell::new(None),
            logged: Default::default(),
        }
    }

    /// Takes the state that the next thread of this worker continues with.
    pub(crate) fn carry_over(&self) -> CarryOver {
        CarryOver { recorder: self.recorder.take(), numbers: self.numbers.get() }
    }

    /// Counts a local error and logs it, at most once per [`LOG_INTERVAL`] and kind. Out of
    /// descriptors or memory on connect, it also pauses accepts for [`ACCEPT_PAUSE`].
    #[cold]
    pub(crate) fn local_error(&self, kind: LocalErrorKind, at: LocalErrorPlace, error: &io::Error) {
        self.counters.count_local_error(kind, at);
        let now = clock::now();
        if at == LocalErrorPlace::Connect
            && matches!(kind, LocalErrorKind::Descriptors | LocalErrorKind::Memory)
        {
            self.accept_paused_until.set(Some(now + ACCEPT_PAUSE));
        }
        let logged = &self.logged[kind as usize];
        let (last, suppressed) = logged.get();
        if last.is_some_and(|last| now < last + LOG_INTERVAL) {
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

    /// Whether accepts are paused because descriptors or memory are short.
    #[inline]
    pub(crate) fn is_accept_paused(&self) -> bool {
        let Some(until) = self.accept_paused_until.get() else { return false };
        let paused = clock::now() < until;
        if !paused {
            self.accept_paused_until.set(None);
        }
        paused
    }

    /// Returns the newest table.
    #[inline]
    pub(crate) fn table(&self) -> impl Deref<Target = Arc<Table>> + use<> {
        self.tables.borrow_mut().load()
    }

    /// Returns 64 random bits.
    #[inline]
    pub(crate) fn draw(&self) -> u64 {
        self.random.borrow_mut().u64(..)
    }

    /// Returns the input of a pick for `client` at that time.
    #[inline]
    pub(crate) fn pick_key(&self, client: ClientAddr, now: Instant) -> PickKey {
        PickKey { client: client.hash_ip(), draw: self.draw(), at: clock::millis(now) }
    }

    /// Picks a backend of the pool that is not in `tried`, and notes in `pick_record` what
    /// decided.
    #[inline]
    pub(crate) fn pick(
        &self,
        pool: &PoolTable,
        client: ClientAddr,
        tried: &[usize],
        now: Instant,
    ) -> Result<Reservation, NoBackend> {
        let key = self.pick_key(client, now);
        pool.pick_recorded(key, tried, &mut self.pick_record.borrow_mut())
    }

    /// Returns the rings of this worker's decisions.
    #[inline]
    pub(crate) fn decisions(&self) -> &WorkerDecisions {
        self.shared.decisions.of(self.id)
    }

    /// Returns a unique number for a new session.
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
