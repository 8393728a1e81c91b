//! State of backends and frontends that outlives tables.
//!
//! The controller creates it, workers reach it through the table they loaded, and the
//! admin API reads it. A reload that keeps a backend's identity keeps its state.
//! Nothing here decides eligibility: that is derived at table build.

pub use crate::model::{BackendId, FrontendId, PoolId};

use crate::balance::in_flight::InFlight;
use crate::balance::latency::Latency;
use crate::decision::SkipReason;
use crate::limits::client_sources::SourceTable;
use crate::metrics::counters::{Counter, CounterTable, Sharded};
use crate::model::{BackendAddr, SourceAddr};
use crate::table::source_addrs::SourceAddrs;
use arc_swap::{ArcSwap, ArcSwapOption};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Identity, counts and statistics of a backend, independent of tables.
///
/// The identity is pool + name + address: a new address under an old name is a new
/// backend with new state.
#[derive(Debug)]
pub struct BackendState {
    /// Unique in the process.
    pub id: BackendId,
    /// Name of its pool.
    pub pool: Arc<str>,
    /// Unique in its pool.
    pub name: Arc<str>,
    /// Address that it listens on.
    pub address: BackendAddr,
    /// The address as text, formatted once for the access log.
    pub address_text: Arc<str>,
    /// Sessions that hold a slot of this backend, from pick to close; over all workers
    /// and all processes of an upgrade.
    pub in_flight: Arc<InFlight>,
    /// Connect and first-byte latency for `peak-ewma`; over all workers.
    pub latency: Arc<Latency>,
    /// Failures since the last success, over all workers; see [`BackendState::failed`].
    failures_in_a_row: AtomicU32,
    /// Source addresses of connections to it; only the controller replaces them.
    pub source_addrs: ArcSwap<SourceAddrs>,
    /// See [`BackendState::left_out`].
    left_out: ArcSwapOption<(SkipReason, Instant)>,
    /// One shard per worker.
    pub counters: Sharded<BackendCounters>,
}

/// What one worker counted for one backend.
#[derive(Debug, Default)]
pub struct BackendCounters {
    /// Sessions whose backend connection was established.
    pub sessions: Counter,
    /// Connections that Tidegate closed first, with a source address that the kernel
    /// chose: their ports stay in TIME_WAIT for a while.
    pub lingering: Counter,
    /// Connect attempts that failed because of the backend or the path to it.
    pub connect_failures: Counter,
    /// Bytes from clients.
    pub bytes_in: Counter,
    /// Bytes to clients.
    pub bytes_out: Counter,
    /// Sessions whose client sent data before the backend did.
    pub questions: Counter,
    /// Sessions in `questions` that the backend answered.
    pub answers: Counter,
    /// Sessions in `questions` that ended without an answer.
    pub unanswered: Counter,
    /// Sum of log2(microseconds to the first byte) over `answers`, in units of
    /// 1/[`LOG_UNIT`]. Sum / `answers` is the logarithm of the geometric mean, which a
    /// few extreme answers change only a little.
    pub answer_log2: Counter,
}

/// Units of `answer_log2` per unit of log2.
pub const LOG_UNIT: f64 = 1024.0;

/// Identity, counts and statistics of a frontend, independent of tables. The identity
/// is its name.
#[derive(Debug)]
pub struct FrontendState {
    /// Unique in the process.
    pub id: FrontendId,
    /// Unique among frontends.
    pub name: Arc<str>,
    /// Open sessions, over all workers and all processes of an upgrade; enforces the
    /// frontend's `connections_max`.
    pub in_flight: InFlight,
    /// Usage per client source; created when a limit is first checked.
    pub sources: OnceLock<Arc<SourceTable>>,
    /// One shard per worker.
    pub counters: Sharded<FrontendCounters>,
}

/// What one worker counted for one frontend.
#[derive(Debug)]
pub struct FrontendCounters {
    /// Connections accepted.
    pub sessions: Counter,
    /// Bytes from clients.
    pub bytes_in: Counter,
    /// Bytes to clients.
    pub bytes_out: Counter,
    /// Connections admitted without a check of their client source's limits because the
    /// table of client sources was full.
    pub untracked: Counter,
    /// Rejected connections by reason (row: `core::outcome::RefusedReason`; one
    /// column).
    pub refused: CounterTable,
}

// === impl BackendState ===

impl BackendState {
    /// Returns the names of its pool and itself.
    pub fn names(&self) -> (Arc<str>, Arc<str>) {
        (Arc::clone(&self.pool), Arc::clone(&self.name))
    }

    /// Creates the state of a new backend.
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
            source_addrs: ArcSwap::from_pointee(SourceAddrs::any()),
            left_out: ArcSwapOption::empty(),
            counters: Sharded::new(workers, BackendCounters::default),
        }
    }

    /// Replaces the in-flight count.
    pub fn counted_by(self, in_flight: InFlight) -> BackendState {
        BackendState { in_flight: Arc::new(in_flight), ..self }
    }

    /// Returns the identity: pool, name and address.
    pub fn identity(&self) -> (Arc<str>, Arc<str>, Arc<str>) {
        (Arc::clone(&self.pool), Arc::clone(&self.name), Arc::clone(&self.address_text))
    }

    /// Returns why the backend is not eligible, and since when; for an ejection, until when.
    /// `None` if it is eligible. Decisions show it; picks do not depend on it.
    pub fn left_out(&self) -> Option<(SkipReason, Instant)> {
        self.left_out.load().as_deref().copied()
    }

    /// Replaces what [`BackendState::left_out`] returns. Only the controller calls it.
    pub fn set_left_out(&self, reason: Option<(SkipReason, Instant)>) {
        self.left_out.store(reason.map(Arc::new));
    }

    /// Sets the source addresses of new connections; see [`SourceAddrs::new`].
    pub fn start_from(&self, sources: &[SourceAddr], workers: usize) {
        let to = match &self.address {
            BackendAddr::Tcp(to) | BackendAddr::ClientPort(to, _) => Some(*to),
            BackendAddr::Unix(_) => None,
        };
        let before = self.source_addrs.load();
        if !before.are_of(sources, to) {
            self.source_addrs.store(Arc::new(SourceAddrs::new(sources, to, workers, &before)));
        }
    }

    /// Records a success, which ends the row of failures. Costs one shared load while
    /// there is no failure.
    ///
    /// If resets before the first byte count as failures, an established connection is
    /// not a success yet. A first byte or a close with FIN is.
    #[inline]
    pub fn succeeded(&self) {
        if self.failures_in_a_row.load(Ordering::Relaxed) != 0 {
            self.failures_in_a_row.store(0, Ordering::Relaxed);
        }
    }

    /// Records a failed connect or an early reset that the backend or its path caused,
    /// never a local error. Returns the number of failures in a row.
    pub fn failed(&self) -> u32 {
        self.failures_in_a_row.fetch_add(1, Ordering::Relaxed).saturating_add(1)
    }

    /// Returns the number of failures in a row.
    pub fn failed_in_a_row(&self) -> u32 {
        self.failures_in_a_row.load(Ordering::Relaxed)
    }

    /// Records that a client has sent data and waits for an answer.
    #[inline]
    pub fn count_client_spoke(&self, worker: usize) {
        self.counters.of(worker).questions.add(1);
    }

    /// Records the first byte from the backend. `after` is the time since the client's
    /// first byte; `None` if the backend sent first.
    #[inline]
    pub fn count_answered(&self, worker: usize, after: Option<Duration>) {
        self.succeeded();
        let Some(after) = after else { return };
        let micros = (after.as_nanos() as f32 / 1e3).max(1.0);
        let counters = self.counters.of(worker);
        counters.answer_log2.add((f64::from(micros.log2()) * LOG_UNIT) as u64);
        counters.answers.add(1);
    }

    /// Records that a session ended while its client waited for an answer.
    pub fn count_unanswered(&self, worker: usize) {
        self.counters.of(worker).unanswered.add(1);
    }
}

// === impl FrontendState ===

impl FrontendState {
    /// Creates the state of a new frontend. `refused_reasons` is the number of
    /// rejection reasons.
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

    /// Replaces the in-flight count.
    pub fn counted_by(self, in_flight: InFlight) -> FrontendState {
        FrontendState { in_flight, ..self }
    }
}
