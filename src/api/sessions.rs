//! `/v1/sessions`: the open sessions, and the end of some of them.
//!
//! Written by `daemon`, read by `tidegate sessions`. It contains only data.

use serde::{Deserialize, Serialize};

/// The answer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SessionsDoc {
    /// The first sessions that match, in the requested order.
    pub sessions: Vec<OpenSessionDoc>,
    /// Open sessions that match.
    pub matched: u64,
    /// Open sessions of this process.
    pub open: u64,
    /// Open sessions of processes that an upgrade has replaced. They are not listed.
    pub elsewhere: u64,
}

/// `POST /v1/sessions/close` and `POST /v1/sessions/reset`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SessionsEndedDoc {
    /// Open sessions that matched before.
    pub matched: u64,
    /// Sessions that this request has ended.
    pub ended: u64,
    /// Sessions that this request has not closed, because bytes were on their way or no backend
    /// was connected.
    pub busy: u64,
}

/// `POST /v1/pools/{pool}/rebalance`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RebalanceDoc {
    /// Name of the pool.
    pub pool: String,
    /// Sessions of its eligible backends when the rebalance began.
    pub total: u64,
    /// Sessions above the shares of their backends and the tolerance, before this request.
    pub excess: u64,
    /// Sessions that this request has closed.
    pub ended: u64,
    /// Sessions that stay, because bytes were on their way.
    pub busy: u64,
    /// Sessions that stay, because a byte moved after they were chosen.
    pub spoke: u64,
    /// The eligible backends.
    pub backends: Vec<RebalancedBackendDoc>,
}

/// A backend of a rebalance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RebalancedBackendDoc {
    /// Name of the backend.
    pub backend: String,
    /// Its open sessions.
    pub sessions: u64,
    /// Its share of `total`, in sessions.
    pub expected: f64,
    /// Its sessions above that and the tolerance.
    pub excess: u64,
}

/// An open session.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OpenSessionDoc {
    /// Its number, the same as in the access log and in `tidegate explain --session`.
    pub session: u64,
    /// Number of its worker.
    pub worker: usize,
    /// Its client.
    pub client: String,
    /// Its frontend; empty if the frontend was removed before the session had a backend.
    pub frontend: String,
    /// Its pool; `null` before it is connected.
    pub pool: Option<String>,
    /// Its backend; `null` before it is connected.
    pub backend: Option<String>,
    /// `setup` before it is connected, then `data`, `half-closed` or `closed`.
    pub phase: String,
    /// Time since its accept, to a tenth of a second.
    pub age_seconds: f64,
    /// Time since its last byte.
    pub idle_seconds: f64,
    /// Bytes sent to the backend.
    pub bytes_in: u64,
    /// Bytes sent to the client.
    pub bytes_out: u64,
}
