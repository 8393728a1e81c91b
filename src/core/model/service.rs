//! Probes that speak the protocol of one service, and the role that such a probe finds.
//!
//! `config` builds the values, `daemon` runs the probes. Nothing here opens a connection.

use super::text_forms::words;
use serde::Serialize;
use std::path::PathBuf;

/// `role = ...`: what a node of a database is for its clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NodeRole {
    /// It takes writes.
    Primary,
    /// It follows a primary and takes reads only.
    Replica,
}

words!(NodeRole: "primary" => Primary, "replica" => Replica);

/// How a probe logs in.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct ProbeLogin {
    /// `None`: the user that the protocol implies, or no login.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// File with the password in one line; it is read for each probe. `None`: no password.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
}

/// `kind = "postgres"`
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct PostgresProbe {
    /// Without a user, the probe asks only whether the server takes TLS.
    #[serde(flatten)]
    pub login: ProbeLogin,
    /// `None`: the database with the name of the user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub database: Option<String>,
}
