//! The short answers: drain and undrain, upgrade, state of the process, errors.
//!
//! Written by `daemon`, read by the commands that make these requests. They contain only
//! data.

use super::names::{IntentName, ServiceState};
use super::reload::ProblemDoc;
use serde::{Deserialize, Serialize};

/// `GET /live`, `GET /ready` with 200, `POST /v1/shutdown`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StateDoc {
    /// Whether the process accepts connections.
    pub state: ServiceState,
}

/// `POST /v1/pools/{pool}/backends/{name}/drain` and `.../undrain`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct IntentDoc {
    /// Pool name.
    pub pool: String,
    /// Backend name.
    pub backend: String,
    /// The new intent.
    pub intent: IntentName,
}

/// Printed by `tidegate drain --wait --json`: the backend has no session left.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DrainedDoc {
    /// Backend name.
    pub backend: String,
    /// Pool name.
    pub pool: String,
    /// Sessions left: 0.
    pub sessions: u64,
}

/// `POST /v1/upgrade` with 200: a new process serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradeDoc {
    /// ID of the new process.
    pub pid: u32,
    /// Version of its program.
    pub version: String,
    /// Generation of its configuration.
    pub generation: u64,
}

/// The body of every answer with a status of 400 or higher.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ErrorDoc {
    /// What was rejected or failed, in one short sentence.
    pub error: String,
    /// The reason; can be empty.
    #[serde(default)]
    pub detail: String,
    /// The problems of the configuration file, if they are the reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problems: Option<Vec<ProblemDoc>>,
}
