//! The admin API: HTTP/1.1 over a Unix socket or TCP.
//!
//! `daemon` binds it, serves it on the control thread and answers its
//! [`AdminRequest`]s from the control loop; operators, Prometheus and the command
//! line's client call it. It never touches the data path: it knows what the
//! control loop tells it and two shared atomics.
//!
//! | request | answer |
//! |---|---|
//! | `GET /live` | 200 while the API answers at all |
//! | `GET /ready` | 200 when serving, 503 while starting or draining, while a worker is stalled, or while a pool waits for its first verdict |
//! | `GET /metrics` | Prometheus text 0.0.4 ([`metrics`]) |
//! | `GET /v1/status` | JSON ([`status`]) |
//! | `POST /v1/reload` | 200 `{generation, changed, warnings}`; 409 while draining; 422 with `problems` |
//! | `POST /v1/pools/{pool}/backends/{name}/drain`, `.../undrain` | 200 `{pool, backend, intent}`; 404 |
//! | `POST /v1/upgrade` | 200 `{pid, version, generation}`; 409 when it cannot be tried; 422 when the new process did not serve |
//! | `GET /v1/pools/{pool}/backends/{name}/explain` | JSON ([`explain`]); 404 |
//! | `POST /v1/shutdown` | 200 `{state: "draining"}` |
//!
//! Names in paths are percent-decoded (`%2F` for the `/` of a Unix backend).
//! Errors are `{"error", "detail"}`. Bodies are read, bounded and ignored.

mod bind;
mod body;
pub mod explain;
#[cfg(debug_assertions)]
mod faults;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod guard;
pub mod metrics;
pub mod process;
mod rejections;
mod routes;
mod serve;
pub mod snapshot;
pub mod status;
#[cfg(test)]
mod tests;
mod token;
mod upgrade;

pub use bind::{AdminBindError, AdminListener, SocketFileLock, bind, take_over};
pub use serve::{DroppedConnections, serve};
pub use snapshot::{AdminSnapshot, HeartbeatCounts, ReloadCounts, UpgradeCounts};
pub use tidegate_api::answers::UpgradeDoc;
pub use tidegate_api::reload::{ProblemDoc, ReloadDoc};
pub use token::{Token, TokenError, TokenStore};

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use tidegate_api::names::ServiceState;
use tidegate_core::control::OperatorError;
use tidegate_core::health::Intent;
use tokio::sync::oneshot;

/// What the API asks of the control loop. A reply may find no receiver: the client
/// left, or its 5 s are over. What was asked for stays done.
#[derive(Debug)]
pub enum AdminRequest {
    /// The text of [`status::render`].
    Status(oneshot::Sender<String>),
    /// The text of [`metrics::render`].
    Metrics(oneshot::Sender<String>),
    /// Read the configuration again and put it in force.
    Reload(oneshot::Sender<Result<ReloadDoc, ReloadError>>),
    /// The text of [`explain::render`].
    Explain {
        /// Pool name.
        pool: String,
        /// Backend name.
        backend: String,
        /// The explanation.
        reply: oneshot::Sender<Result<String, OperatorError>>,
    },
    /// Change an operator's intent for one backend.
    SetIntent {
        /// Pool name.
        pool: String,
        /// Backend name.
        backend: String,
        /// The new intent.
        intent: Intent,
        /// Whether it was done.
        reply: oneshot::Sender<Result<(), OperatorError>>,
    },
    /// Hand everything over to a new process of the program; answered once that serves
    /// or has failed.
    Upgrade {
        /// Start this program instead of the one this process was started from.
        binary: Option<PathBuf>,
        /// Start it with this configuration file.
        config: Option<PathBuf>,
        /// The connection over which it was asked for: it shows which user asks.
        asked_over: Option<Arc<OwnedFd>>,
        /// The new process, or why there is none.
        reply: oneshot::Sender<Result<UpgradeDoc, UpgradeError>>,
    },
    /// Cause a fault; answered whether there is such a fault. For tests.
    #[cfg(debug_assertions)]
    Fault {
        /// What, or where.
        place: String,
        /// Number of the worker.
        worker: usize,
        /// For how long.
        millis: u64,
        /// Whether it was ordered.
        reply: oneshot::Sender<bool>,
    },
    /// Drain and exit; answered once draining has begun.
    Shutdown(oneshot::Sender<()>),
}

/// This process serves as before; why, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UpgradeError {
    /// It was not tried.
    Refused(String),
    /// The new process did not serve.
    Failed(String),
}

/// A file was refused, or not even read; what was in force stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReloadError {
    /// Everything wrong with it.
    Problems(Vec<ProblemDoc>),
    /// Why no file is read now, in words.
    NotNow(&'static str),
}

/// Requests that may wait for the control loop; more wait in their connections,
/// which are bounded as well.
pub const REQUESTS_MAX: usize = 32;

/// What `/ready` says, known without the control loop. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct ReadyState(Arc<ReadyFlags>);

#[derive(Debug, Default)]
struct ReadyFlags {
    state: AtomicU8,
    /// One more than the number of a stalled worker; 0 for none.
    stalled: AtomicUsize,
    /// Pools in which no backend serves before a first verdict.
    undecided: AtomicUsize,
}

const STARTING: u8 = 0;
const READY: u8 = 1;
const DRAINING: u8 = 2;

// === impl ReadyState ===

impl ReadyState {
    /// Starting: not ready yet.
    pub fn new() -> ReadyState {
        ReadyState::default()
    }

    /// Listeners are bound and a table is published. Without effect once
    /// draining.
    pub fn set_ready(&self) {
        // A drain asked for during start-up must not be undone.
        let (from, to) = (STARTING, READY);
        let _ = self.0.state.compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// The process was told to stop.
    pub fn set_draining(&self) {
        self.0.state.store(DRAINING, Ordering::Relaxed);
    }

    /// The new process of an upgrade has ended: ready as before.
    pub fn set_ready_again(&self) {
        self.0.state.store(READY, Ordering::Relaxed);
    }

    /// That worker makes no progress: clients that connect to it wait.
    pub fn set_stalled(&self, worker: Option<usize>) {
        self.0.stalled.store(worker.map_or(0, |worker| worker + 1), Ordering::Relaxed);
    }

    /// A worker that makes no progress.
    pub fn stalled(&self) -> Option<usize> {
        self.0.stalled.load(Ordering::Relaxed).checked_sub(1)
    }

    /// So many pools have no backend to serve before a first verdict.
    pub fn set_undecided(&self, pools: usize) {
        self.0.undecided.store(pools, Ordering::Relaxed);
    }

    /// Pools in which no backend serves before a first verdict.
    pub fn undecided(&self) -> usize {
        self.0.undecided.load(Ordering::Relaxed)
    }

    /// True between [`ReadyState::set_ready`] and [`ReadyState::set_draining`].
    pub fn is_ready(&self) -> bool {
        self.0.state.load(Ordering::Relaxed) == READY
    }

    /// Where the process is in its life.
    pub fn state(&self) -> ServiceState {
        match self.0.state.load(Ordering::Relaxed) {
            STARTING => ServiceState::Starting,
            READY => ServiceState::Serving,
            _ => ServiceState::Draining,
        }
    }
}
