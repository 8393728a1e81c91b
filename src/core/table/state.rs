//! Long-lived state of backends and frontends: what outlives every table.
//!
//! Created by the controller, reached by workers through the table they loaded,
//! read by the admin API. A reload that keeps a backend's identity keeps its
//! state. Nothing here decides eligibility: that is derived at table build.

use crate::balance::in_flight::InFlight;
use crate::balance::latency::Latency;
use crate::limits::client_sources::SourceTable;
use crate::metrics::counters::{Counter, CounterTable, Sharded};
use crate::model::{BackendAddr, SourceAddr};
use crate::table::source_addrs::SourceAddrs;
use arc_swap::ArcSwap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Names a backend for the life of the process; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendId(pub u32);

/// Names a frontend for the life of the process; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrontendId(pub u32);

/// What a backend is and has done, whatever tables came and went.
///
/// Identity is pool + name + address: a new address under an old name is a new
/// backend with a state of its own.
#[derive(Debug)]
pub struct BackendState {
    /// Process-unique.
    pub id: BackendId,
    /// Name of its pool.
    pub pool: Arc<str>,
    /// Unique in its pool.
    pub name: Arc<str>,
    /// Where it listens.
    pub address: BackendAddr,
    /// The address as text, made once for the access log.
    pub address_text: Arc<str>,
    /// Sessions holding this backend, from selection to close; all workers, and all
    /// processes of an upgrade.
    pub in_flight: Arc<InFlight>,
    /// What its connects and first bytes take, for `peak-ewma`; all workers.
    pub latency: Arc<Latency>,
    /// Failures since the last success, all workers; see
    /// [`BackendState::failed`].
    failures_in_a_row: AtomicU32,
    /// Where connections to it start; replaced by the controller alone.
    pub ways: ArcSwap<SourceAddrs>,
    /// One shard a worker.
    pub counters: Sharded<BackendCounters>,
}

/// What one worker has seen of one backend.
#[derive(Debug, Default)]
pub struct BackendCounters {
    /// Sessions whose upstream connection stood.
    pub sessions: Counter,
    /// Connections closed by us first, from wherever the kernel chose: their ports
    /// are in TIME_WAIT for a while.
    pub lingering: Counter,
    /// Connect attempts that failed through the backend or the path to it.
    pub connect_failures: Counter,
    /// Bytes from clients.
    pub bytes_in: Counter,
    /// Bytes to clients.
    pub bytes_out: Counter,
    /// Sessions whose client spoke before the backend did.
    pub questions: Counter,
    /// Those of them that were answered.
    pub answers: Counter,
    /// Those of them that ended without an answer.
    pub unanswered: Counter,
    /// Sum of log2(microseconds to the first byte) over `answers`, in
    /// [`LOG_UNIT`]ths: their mean is the logarithm of the geometric mean, which
    /// a few answers of a minute do not move far.
    pub answer_log2: Counter,
}

/// What one answer in `answer_log2` is counted in.
pub const LOG_UNIT: f64 = 1024.0;

/// What a frontend has done, whatever tables came and went. Identity is its
/// name.
#[derive(Debug)]
pub struct FrontendState {
    /// Process-unique.
    pub id: FrontendId,
    /// Unique among frontends.
    pub name: Arc<str>,
    /// Sessions open now, likewise; enforces the frontend's `connections_max`.
    pub in_flight: InFlight,
    /// What its sources have asked for; made when a limit is first asked about.
    pub sources: OnceLock<Arc<SourceTable>>,
    /// One shard a worker.
    pub counters: Sharded<FrontendCounters>,
}

/// What one worker has seen of one frontend.
#[derive(Debug)]
pub struct FrontendCounters {
    /// Connections accepted.
    pub sessions: Counter,
    /// Bytes from clients.
    pub bytes_in: Counter,
    /// Bytes to clients.
    pub bytes_out: Counter,
    /// Let in past the limits of their sources, for want of room to count them.
    pub untracked: Counter,
    /// Refused, by reason (row: `core::outcome::RefusedReason`; one column).
    pub refused: CounterTable,
}

// === impl BackendState ===

impl BackendState {
    /// A backend nobody has used yet.
    pub fn new(
        id: BackendId,
        pool: Arc<str>,
        name: Arc<str>,
        address: BackendAddr,
        workers: usize,
    ) -> BackendState {
        let address_text = address.to_string().into();
        BackendState {
            id,
            pool,
            name,
            address,
            address_text,
            in_flight: Arc::new(InFlight::new()),
            latency: Arc::new(Latency::new()),
            failures_in_a_row: AtomicU32::new(0),
            ways: ArcSwap::from_pointee(SourceAddrs::any()),
            counters: Sharded::new(workers, BackendCounters::default),
        }
    }

    /// The same, its sessions counted there.
    pub fn counted_by(self, in_flight: InFlight) -> BackendState {
        BackendState { in_flight: Arc::new(in_flight), ..self }
    }

    /// What makes it the same backend: pool, name and address.
    pub fn identity(&self) -> (Arc<str>, Arc<str>, Arc<str>) {
        (Arc::clone(&self.pool), Arc::clone(&self.name), Arc::clone(&self.address_text))
    }

    /// Has connections start at `sources` from now on; see [`SourceAddrs::new`].
    pub fn start_from(&self, sources: &[SourceAddr], workers: usize) {
        let to = match &self.address {
            BackendAddr::Tcp(to) => Some(*to),
            BackendAddr::Unix(_) => None,
        };
        let before = self.ways.load();
        if !before.are_by(sources, to) {
            self.ways.store(Arc::new(SourceAddrs::new(sources, to, workers, &before)));
        }
    }

    /// Notes a success: the row of failures ends. Where resets before the first
    /// byte count as failures, a connection that stands is none yet; a first
    /// byte or an end in order is. Costs one shared load while the backend is
    /// well.
    #[inline]
    pub fn succeeded(&self) {
        if self.failures_in_a_row.load(Ordering::Relaxed) != 0 {
            self.failures_in_a_row.store(0, Ordering::Relaxed);
        }
    }

    /// Notes a failed connect or early reset that is the backend's or its
    /// path's, never a local one; gives the length of the row so far.
    pub fn failed(&self) -> u32 {
        self.failures_in_a_row.fetch_add(1, Ordering::Relaxed).saturating_add(1)
    }

    /// The length of the row of failures so far.
    pub fn failed_in_a_row(&self) -> u32 {
        self.failures_in_a_row.load(Ordering::Relaxed)
    }

    /// Notes that a client has spoken and now waits.
    #[inline]
    pub fn count_client_spoke(&self, worker: usize) {
        self.counters.of(worker).questions.add(1);
    }

    /// Notes the first byte of a session; `after` is the time since the client
    /// spoke, `None` where the backend spoke first.
    #[inline]
    pub fn count_answered(&self, worker: usize, after: Option<Duration>) {
        self.succeeded();
        let Some(after) = after else { return };
        let micros = (after.as_nanos() as f32 / 1e3).max(1.0);
        let counters = self.counters.of(worker);
        counters.answer_log2.add((f64::from(micros.log2()) * LOG_UNIT) as u64);
        counters.answers.add(1);
    }

    /// Notes that a session ended while its client waited.
    pub fn count_unanswered(&self, worker: usize) {
        self.counters.of(worker).unanswered.add(1);
    }
}

// === impl FrontendState ===

impl FrontendState {
    /// A frontend nobody has used yet. `refused_reasons` is the number of
    /// refusal reasons there are.
    pub fn new(id: FrontendId, name: Arc<str>, workers: usize, refused_reasons: usize) -> Self {
        FrontendState {
            id,
            name,
            in_flight: InFlight::new(),
            sources: OnceLock::new(),
            counters: Sharded::new(workers, || FrontendCounters {
                sessions: Counter::default(),
                bytes_in: Counter::default(),
                bytes_out: Counter::default(),
                untracked: Counter::default(),
                refused: CounterTable::new(refused_reasons, 1),
            }),
        }
    }

    /// The same, its sessions counted there.
    pub fn counted_by(self, in_flight: InFlight) -> FrontendState {
        FrontendState { in_flight, ..self }
    }
}
