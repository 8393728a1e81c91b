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
