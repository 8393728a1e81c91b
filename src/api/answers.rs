//! The short answers: drain and undrain, upgrade, life of the process, errors.
//!
//! Written by `daemon`, read by the commands that ask for these things. Answers have no
//! behaviour.

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
    /// What holds for it from now on.
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

/// `POST /v1/upgrade` with 200: another process serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradeDoc {
    /// Process id.
    pub pid: u32,
    /// Version of its program.
    pub version: String,
    /// Generation of its configuration.
    pub generation: u64,
}

/// Every answer above 399.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ErrorDoc {
    /// What was refused or failed, one short sentence.
    pub error: String,
    /// Why; may be empty.
    #[serde(default)]
    pub detail: String,
    /// What is wrong with the configuration file, where that is why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problems: Option<Vec<ProblemDoc>>,
}
