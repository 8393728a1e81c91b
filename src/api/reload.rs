//! The answer to `POST /v1/reload`: the configuration in force, or what is wrong with
//! the file.
//!
//! Written by `daemon`, read by `tidegate reload`. Nothing here reads a file.

use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// With 200: a configuration is in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadDoc {
    /// Its number.
    pub generation: u64,
    /// False if the file says what was in force already.
    pub changed: bool,
    /// Settings that were accepted and wait for a restart, one sentence each.
    pub warnings: Vec<String>,
}

/// With 422: one thing wrong at one place of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProblemDoc {
    /// The file as the operator named it.
    pub file: Arc<str>,
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    /// One line.
    pub message: String,
    /// What would be right, on one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
    /// All of it with the source line and a caret, as `tidegate check` shows it. Empty
    /// where an older balancer does not send it.
    #[serde(default)]
    pub rendered: String,
}
