//! The admin API: HTTP/1.1 over a Unix socket or TCP.
//!
//! Bound by `daemon` and served on the control thread. The control loop answers its
//! [`AdminRequest`]s. Operators, Prometheus and the command line call it. It never
//! touches the data path: its facts come from the control loop and from [`ReadyState`].
//!
//! | request | answer |
//! |---|---|
//! | `GET /`, `/page/{file}` | The files of the operator page ([`page`]) |
//! | `GET /live` | 200 while the API answers |
//! | `GET /ready` | 200 while serving; 503 while starting or draining, while a worker is stalled, or while a pool waits for its first health result |
//! | `GET /metrics` | Prometheus text 0.0.4 ([`metrics`]) |
//! | `GET /v1/status` | JSON ([`status`]) |
//! | `GET /v1/sessions` | JSON ([`tidegate_api::sessions`]); 400 |
//! | `POST /v1/sessions/close`, `.../reset` | JSON ([`tidegate_api::sessions`]); 400 |
//! | `POST /v1/pools/{pool}/rebalance` | JSON ([`tidegate_api::sessions`]); 400; 404; 409 |
//! | `GET /v1/events` | JSON ([`tidegate_api::events`]); 400 |
//! | `GET /v1/stream` | server-sent events ([`tidegate_api::stream`]); 400; 503 |
//! | `GET /v1/pools/{pool}/backends/{name}/history`, `.../minute` | JSON ([`history`]); 404 |
//! | `POST /v1/reload` | 200 `{generation, changed, warnings}`; 409 while draining; 422 with `problems` |
//! | `POST /v1/pools/{pool}/backends/{name}/drain`, `.../undrain` | 200 `{pool, backend, intent}`; 404 |
//! | `POST /v1/upgrade` | 200 `{pid, version, generation}`; 409 if it was rejected; 422 if the new process did not get to serving |
//! | `GET /v1/pools/{pool}/backends/{name}/explain` | JSON ([`explain`]); 404 |
//! | `GET /v1/explain?session=N`, `?client=ADDR&frontend=NAME` | JSON ([`tidegate_api::decision`]); 400; 404 |
//! | `POST /v1/shutdown` | 200 `{state: "draining"}` |
//!
//! Names in paths are percent-decoded (`%2F` for the `/` of a Unix backend).
//! Errors are `{"error", "detail"}`. Request bodies are read up to a limit and ignored.

mod bind;
mod body;
mod decisions;
mod events;
pub mod explain;
#[cfg(debug_assertions)]
mod faults;
mod findings;
mod forecast;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod guard;
pub mod history;
pub mod metrics;
mod page;
pub mod process;
mod questions;
mod rebalance;
mod rejections;
mod routes;
mod serve;
mod sessions;
pub mod snapshot;
mod sources;
pub mod status;
mod status_query;
mod stream;
#[cfg(test)]
mod tests;
mod token;
mod upgrade;

pub use bind::{AdminBindError, AdminListener, SocketFileLock, bind, take_over};
pub use forecast::ForecastBasis;
pub use serve::{DroppedConnections, serve};
pub use snapshot::{AdminSnapshot, HeartbeatCounts, ReloadCounts, UpgradeCounts};
pub use stream::StreamCounters;
pub use tidegate_api::answers::UpgradeDoc;
pub use tidegate_api::reload::{ProblemDoc, ReloadDoc};
pub use token::{Token, TokenError, TokenStore, Tokens};

use crate::event_log::EventLog;
use crate::rendering::Latencies;
use std::fmt;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use tidegate_api::names::ServiceState;
use tidegate_core::control::OperatorError;
use tidegate_core::control::names::{NamedIds, Names};
use tidegate_core::control::what_if::{UnknownAssumption, WhatIf};
use tidegate_core::decision::rings::Decisions;
use tidegate_core::health::Intent;
use tidegate_core::sessions::{SessionList, SessionQuery, SessionsEnded, SessionsToEnd};
use tidegate_core::table::PoolTable;
use tokio::sync::oneshot;

/// A request of the API to the control loop. The receiver of the reply can be gone, if
/// the client disconnected or the timeout passed. The request takes effect all the same.
#[derive(Debug)]
pub enum AdminRequest {
    /// Returns the text of [`status::render`].
    Status(oneshot::Sender<String>),
    /// Returns the text of [`metrics::render`].
    Metrics(oneshot::Sender<String>),
    /// Reloads the configuration file.
    Reload {
        /// The client, as events name it.
        who: String,
        /// The new generation, or why it was rejected.
        reply: oneshot::Sender<Result<ReloadDoc, ReloadError>>,
    },
    /// Returns a text that [`explain::render`] writes later.
    Explain {
        /// Pool name.
        pool: String,
        /// Backend name.
        backend: String,
        /// The explanation.
        reply: oneshot::Sender<Result<DeferredText, OperatorError>>,
    },
    /// Returns a snapshot, for documents that another thread writes.
    Observe {
        /// Asks the workers for their newest latencies first.
        latencies: bool,
        /// The snapshot.
        reply: oneshot::Sender<Observed>,
    },
    /// Returns a text that [`history::render`] or [`history::render_minute`] writes later.
    History {
        /// Pool name.
        pool: String,
        /// Backend name.
        backend: String,
        /// How much of it.
        part: HistoryPart,
        /// The history.
        reply: oneshot::Sender<Result<DeferredText, OperatorError>>,
    },
    /// Asks every worker for its open sessions.
    Sessions {
        /// Which sessions.
        query: Arc<SessionQuery>,
        /// The answers of the workers, which come later.
        reply: oneshot::Sender<AskedWorkers>,
    },
    /// Ends sessions.
    EndSessions {
        /// Which.
        order: Arc<SessionsToEnd>,
        /// The answers of the workers, which come later.
        reply: oneshot::Sender<Vec<oneshot::Receiver<SessionsEnded>>>,
    },
    /// Returns the part of the current table for a pool.
    PoolTable {
        /// Its name.
        pool: String,
        /// `None` if there is no such pool.
        reply: oneshot::Sender<Option<Arc<PoolTable>>>,
    },
    /// Returns the decisions of all workers.
    Decisions(oneshot::Sender<SessionRecords>),
    /// Returns the names of frontends, pools and backends.
    Names {
        /// Their ids.
        ids: NamedIds,
        /// The names.
        reply: oneshot::Sender<Names>,
    },
    /// Returns what a forecast of a new connection needs.
    Forecast {
        /// Changes to assume.
        assumed: Vec<WhatIf>,
        /// An error if a change names an unknown pool or backend.
        reply: oneshot::Sender<Result<ForecastBasis, UnknownAssumption>>,
    },
    /// Sets the operator's intent for one backend.
    SetIntent {
        /// Pool name.
        pool: String,
        /// Backend name.
        backend: String,
        /// The new intent.
        intent: Intent,
        /// The client, as events name it.
        who: String,
        /// An error if there is no such backend.
        reply: oneshot::Sender<Result<(), OperatorError>>,
    },
    /// Upgrades to a new process. The reply comes once the new process serves or has
    /// failed.
    Upgrade {
        /// The program to start, if it differs from the one this process was started from.
        binary: Option<PathBuf>,
        /// The configuration file, if it differs from this process's.
        config: Option<PathBuf>,
        /// The Unix connection of the request, which identifies the requesting user.
        asked_over: Option<Arc<OwnedFd>>,
        /// The client, as events name it.
        who: String,
        /// The new process, or why the upgrade did not take place.
        reply: oneshot::Sender<Result<UpgradeDoc, UpgradeError>>,
    },
    /// Injects a fault. For tests.
    #[cfg(debug_assertions)]
    Fault {
        /// Name of the fault or of its location.
        place: String,
        /// Number of the worker.
        worker: usize,
        /// Duration of the fault, in ms.
        millis: u64,
        /// False if there is no such fault or worker.
        reply: oneshot::Sender<bool>,
    },
    /// Drains and exits.
    Shutdown {
        /// The client, as events name it.
        who: String,
        /// Comes once draining has begun.
        reply: oneshot::Sender<()>,
    },
}

/// A text that a blocking thread writes from facts of the control thread.
pub struct DeferredText(Box<dyn FnOnce() -> String + Send>);

/// What the API reads without asking the control loop. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Observables {
    /// The events.
    pub events: EventLog,
    /// Counts of the streams.
    pub streams: StreamCounters,
}

/// Which history a client wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HistoryPart {
    /// The last 60 minutes.
    Hour,
    /// The last 60 s.
    Minute,
}

/// The state of the process at one moment, and its latencies. Clones share both.
#[derive(Debug, Clone)]
pub struct Observed {
    pub(crate) snapshot: Arc<AdminSnapshot>,
    pub(crate) latencies: Latencies,
}

/// The pending lists of open sessions.
#[derive(Debug)]
pub struct AskedWorkers {
    /// One per worker, in their order.
    pub lists: Vec<oneshot::Receiver<SessionList>>,
    /// Open sessions of old processes.
    pub elsewhere: u32,
}

/// The decisions of all workers, and the session numbers of this process.
#[derive(Debug)]
pub struct SessionRecords {
    /// The rings of all workers.
    pub decisions: Arc<Decisions>,
    /// The numbers that this process has reserved for sessions.
    pub given_out: Range<u64>,
}

/// Why an upgrade did not take place. This process continues to serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UpgradeError {
    /// The upgrade was rejected before a process was started.
    Refused(String),
    /// The new process did not get to serving.
    Failed(String),
}

/// Why a reload was rejected. The configuration in force stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReloadError {
    /// All problems of the file.
    Problems(Vec<ProblemDoc>),
    /// Why no file can be read now.
    NotNow(&'static str),
}

/// Cap on requests waiting for the control loop. Further requests wait in their
/// connections, which have a cap too.
pub const REQUESTS_MAX: usize = 32;

/// The state that `/ready` reports without asking the control loop. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct ReadyState(Arc<ReadyFlags>);

#[derive(Debug, Default)]
struct ReadyFlags {
    state: AtomicU8,
    /// Number of a stalled worker plus 1; 0 if no worker is stalled.
    stalled: AtomicUsize,
    /// Pools without an eligible backend that wait for a first health result.
    undecided: AtomicUsize,
}

const STARTING: u8 = 0;
const READY: u8 = 1;
const DRAINING: u8 = 2;

// === impl DeferredText ===

impl DeferredText {
    /// Returns the text that `write` returns.
    pub fn new(write: impl FnOnce() -> String + Send + 'static) -> DeferredText {
        DeferredText(Box::new(write))
    }

    /// Writes the text.
    pub fn write(self) -> String {
        (self.0)()
    }
}

impl fmt::Debug for DeferredText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DeferredText").finish_non_exhaustive()
    }
}

// === impl ReadyState ===

impl ReadyState {
    /// Returns the state of a starting process.
    pub fn new() -> ReadyState {
        ReadyState::default()
    }

    /// Sets the state to serving: listeners are bound and a table is published. Has no
    /// effect while draining.
    pub fn set_ready(&self) {
        // A drain that was requested during the start must not be undone.
        let (from, to) = (STARTING, READY);
        let _ = self.0.state.compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Sets the state to draining.
    pub fn set_draining(&self) {
        self.0.state.store(DRAINING, Ordering::Relaxed);
    }

    /// Sets the state to serving again after the new process of an upgrade has exited.
    pub fn set_ready_again(&self) {
        self.0.state.store(READY, Ordering::Relaxed);
    }

    /// Sets or clears the stalled worker. Clients of a stalled worker wait.
    pub fn set_stalled(&self, worker: Option<usize>) {
        self.0.stalled.store(worker.map_or(0, |worker| worker + 1), Ordering::Relaxed);
    }

    /// Returns the number of a stalled worker.
    pub fn stalled(&self) -> Option<usize> {
        self.0.stalled.load(Ordering::Relaxed).checked_sub(1)
    }

    /// Sets the number of pools that wait for a first health result.
    pub fn set_undecided(&self, pools: usize) {
        self.0.undecided.store(pools, Ordering::Relaxed);
    }

    /// Returns the number of pools that wait for a first health result.
    pub fn undecided(&self) -> usize {
        self.0.undecided.load(Ordering::Relaxed)
    }

    /// Returns true between [`ReadyState::set_ready`] and [`ReadyState::set_draining`].
    pub fn is_ready(&self) -> bool {
        self.0.state.load(Ordering::Relaxed) == READY
    }

    /// Returns the state of the process.
    pub fn state(&self) -> ServiceState {
        match self.0.state.load(Ordering::Relaxed) {
            STARTING => ServiceState::Starting,
            READY => ServiceState::Serving,
            _ => ServiceState::Draining,
        }
    }
}
