//! Long-lived state of backends and frontends: what outlives every table.
//!
//! Created by the controller, reached by workers through the table they loaded,
//! read by the admin API. A reload that keeps a backend's identity keeps its
//! state. Nothing here decides eligibility: that is derived at table build.

use crate::balance::in_flight::InFlight;
use crate::config::BackendAddress;
use crate::proxy::admission::sources::Sources;
use crate::telemetry::counters::{Counter, CounterTable, Sharded};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

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
    pub address: BackendAddress,
    /// The address as text, made once for the access log.
    pub address_text: Arc<str>,
    /// Sessions holding this backend, from selection to close; all workers.
    pub in_flight: Arc<InFlight>,
    /// Connect failures since the last success, all workers; see
    /// [`BackendState::connect_failed`].
    failures_in_a_row: AtomicU32,
    /// One shard a worker.
    pub counters: Sharded<BackendCounters>,
}

/// What one worker has seen of one backend.
#[derive(Debug, Default)]
pub struct BackendCounters {
    /// Sessions whose upstream connection stood.
    pub sessions: Counter,
    /// Connect attempts that failed through the backend or the path to it.
    pub connect_failures: Counter,
    /// Bytes from clients.
    pub bytes_in: Counter,
    /// Bytes to clients.
    pub bytes_out: Counter,
}

/// What a frontend has done, whatever tables came and went. Identity is its
/// name.
#[derive(Debug)]
pub struct FrontendState {
    /// Process-unique.
    pub id: FrontendId,
    /// Unique among frontends.
    pub name: Arc<str>,
    /// Sessions open now; enforces the frontend's `connections_max`.
    pub in_flight: InFlight,
    /// What its sources have asked for; made when a limit is first asked about.
    pub sources: OnceLock<Arc<Sources>>,
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
    /// Refused, by reason (row: `proxy::close::RefusedReason`; one column).
    pub refused: CounterTable,
}

// === impl BackendState ===

impl BackendState {
    /// A backend nobody has used yet.
    pub fn new(
        id: BackendId,
        pool: Arc<str>,
        name: Arc<str>,
        address: BackendAddress,
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
            failures_in_a_row: AtomicU32::new(0),
            counters: Sharded::new(workers, BackendCounters::default),
        }
    }

    /// Notes a connect success: the row of failures ends. Costs one shared
    /// load while the backend is well.
    #[inline]
    pub fn connect_succeeded(&self) {
        if self.failures_in_a_row.load(Ordering::Relaxed) != 0 {
            self.failures_in_a_row.store(0, Ordering::Relaxed);
        }
    }

    /// Notes a connect failure that is the backend's or its path's, never a
    /// local one; gives the length of the row so far.
    pub fn connect_failed(&self) -> u32 {
        self.failures_in_a_row.fetch_add(1, Ordering::Relaxed).saturating_add(1)
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
}
