//! Places of values in a file, for problems that are found after the file was read, such
//! as an address in use or a user that does not exist.
//!
//! Filled by `validate`, used by `daemon` and the command line. It reads no file.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use super::diagnose::{Problem, Severity};
use super::source::{LineIndex, SourceText};
use super::value::ValueError;
use tidegate_core::model::{BindKey, ServerAddr, SourceAddr, SourceKey};

/// A value that can be wrong on this host although its text is right.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Spot {
    /// A bind address of a frontend.
    Bind(BindKey),
    /// A source address of a pool.
    Source(SourceAddr),
    /// An address that the heartbeat receiver listens on.
    HeartbeatListen(SocketAddr),
    /// `[admin] listen`
    AdminListen,
    /// `[admin] token_file`
    TokenFile,
    /// `[admin] read_token_file`
    ReadTokenFile,
    /// `[log] access`
    AccessLog,
    /// `[process] user`
    User,
    /// `[process] group`
    Group,
    /// `[process] state`
    State,
    /// An element of `servers` of the registry with this name.
    RegistryServer(Arc<str>, ServerAddr),
    /// `from` or `kind` of a `discover` table, or `address` of a backend that is a name.
    MemberSource(SourceKey),
    /// A file with certificates or secrets for member sources.
    NamedFile(PathBuf),
}

/// The text of a file and the places of its values.
#[derive(Debug, Clone, PartialEq)]
pub struct Origin {
    file: Arc<str>,
    text: Arc<str>,
    index: Arc<LineIndex>,
    spots: HashMap<Spot, Range<usize>>,
}

impl Origin {
    pub(super) fn new(source: &SourceText<'_>, spots: HashMap<Spot, Range<usize>>) -> Origin {
        let (file, index) = (Arc::clone(&source.file), Arc::clone(&source.index));
        Origin { file, text: source.text.into(), index, spots }
    }

    /// Makes an error at the spot, or at the first character if the file does not set that
    /// value. `message` and `help` are one line each.
    pub fn error(&self, spot: &Spot, message: impl Into<String>, help: Option<String>) -> Problem {
        self.problem(spot, Severity::Error, message.into(), help)
    }

    /// Makes a warning at the spot, with the same rules as [`Origin::error`].
    pub fn warning(
        &self,
        spot: &Spot,
        message: impl Into<String>,
        help: Option<String>,
    ) -> Problem {
        self.problem(spot, Severity::Warning, message.into(), help)
    }

    fn problem(
        &self,
        spot: &Spot,
        severity: Severity,
        message: String,
        help: Option<String>,
    ) -> Problem {
        match self.spots.get(spot) {
            Some(place) => {
                let (file, index) = (Arc::clone(&self.file), Arc::clone(&self.index));
                let source = SourceText { file, text: &self.text, index };
                Problem::new(&source, place, severity, ValueError { message, help })
            }
            None => Problem::of_file(&self.file, severity, message, help),
        }
    }
}
