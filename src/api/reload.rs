//! The answer to `POST /v1/reload`: the generation in force, or the problems of the file.
//!
//! Written by `daemon`, read by `tidegate reload`. It contains only data.

use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// The answer with 200: the configuration was accepted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadDoc {
    /// Generation of the configuration in force.
    pub generation: u64,
    /// False if the file has the same meaning as the configuration that was in force.
    pub changed: bool,
    /// Accepted settings that take effect after a restart, one sentence each.
    pub warnings: Vec<String>,
}

/// One problem of the file, in the answer with 422.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProblemDoc {
    /// The file, as the operator named it.
    pub file: Arc<str>,
    /// Line number, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// The problem, in one line.
    pub message: String,
    /// How to correct it, in one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
    /// The problem with its source line and a caret, as `tidegate check` shows it. Empty if
    /// an older balancer does not send it.
    #[serde(default)]
    pub rendered: String,
}
