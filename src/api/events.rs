//! `GET /v1/events`: what has happened to the balancer.
//!
//! Written by `daemon` and passed from process to process by an upgrade. Read by
//! `tidegate events`. It contains only data.

use super::names::{EventKindName, EventLevelName};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// One event.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EventDoc {
    /// Its number. Events are numbered from 1 in the order in which they happened. An upgrade
    /// continues the numbers, a restart begins them again.
    pub seq: u64,
    /// When it happened, as Unix time in seconds with 3 decimals.
    pub at: f64,
    /// What kind of event it is.
    pub kind: EventKindName,
    /// How much it needs attention.
    pub level: EventLevelName,
    /// What it happened to: `POOL`, `POOL/BACKEND`, `frontend NAME`, `generation N`,
    /// `worker N` or `tidegate`.
    pub subject: String,
    /// What happened, and why; at most 1,000 characters.
    pub text: String,
    /// Its originator, such as `uid 0, pid 4242` or `SIGHUP`. Empty: no order caused it.
    #[serde(default)]
    pub who: String,
    /// What a reload changed, one line each; at most 100 lines of 200 characters.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<String>,
}

/// The answer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EventsDoc {
    /// The events that match, oldest first.
    pub events: Vec<Arc<EventDoc>>,
    /// Number of the newest event, whether it matches or not; 0 if there is none.
    pub last: u64,
    /// Events after the one in the question that are no longer kept.
    pub lost: u64,
}

/// Limit on the characters of [`EventDoc::text`] and of [`EventDoc::subject`].
pub const TEXT_MAX: usize = 1_000;

/// Limit on the lines of [`EventDoc::changes`].
pub const CHANGES_MAX: usize = 100;

/// Limit on the characters of a line of [`EventDoc::changes`].
pub const CHANGE_MAX: usize = 200;
