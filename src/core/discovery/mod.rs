//! Member sources, seen from the core: what a source tells, and the view that decides what
//! an answer changes.
//!
//! The sources in the member `discovery` create [`Told`] values. The controller keeps one
//! view per source of a pool. One rule applies to all of them: an answer that removes
//! members is evidence, not an order. Nothing here asks a source or reads a clock.

pub mod labels;
mod unreadable;
pub mod view;

pub use unreadable::{KEY_BYTES_MAX, UNREADABLE_NAMED_MAX, Unreadable};

use labels::MemberLabels;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

/// Most members in one set of a source.
pub const MEMBERS_MAX: usize = 10_000;

/// A member as a source announces it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announced {
    /// Identity at the source, such as a service id; unique in a set. It becomes the name
    /// of the backend. Sources without names use the address.
    pub name: Arc<str>,
    /// Where it listens.
    pub address: SocketAddr,
    /// `None`: the source has no weights.
    pub weight: Option<u16>,
    /// 0..=[`TIER_MAX`](crate::model::TIER_MAX); above 0 it is a backup.
    pub tier: u8,
    /// What the source wishes for it.
    pub wish: Wish,
    /// The state in the words of the source, such as `warning`; empty if it has none.
    pub raw: Arc<str>,
    /// For people; they decide nothing.
    pub labels: MemberLabels,
}

/// What a source wishes for a member. Probes of this host take precedence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wish {
    /// New sessions.
    #[default]
    Sessions,
    /// No new sessions yet.
    Starting,
    /// No new sessions; open ones finish.
    Draining,
    /// The registry's own check fails; `critical` decides.
    Critical,
}

/// What a source tells about one of its questions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    /// The complete set of members.
    Whole(WholeSet),
    /// The source gave no answer that counts. The view stays.
    Failed {
        /// The kind of failure.
        why: SourceFailure,
        /// What happened, for the log and `explain`.
        detail: String,
    },
    /// The source still answers and its last set still holds. It counts as a repetition of
    /// that set, so it can confirm a removal. A source sends it only if the check is as
    /// current as the set was.
    Alive,
}

/// A complete answer of a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WholeSet {
    /// Unique by name, in any order. At most [`MEMBERS_MAX`].
    pub members: Arc<[Announced]>,
    /// Version in the words of the source, such as `index 81`; empty if it has none.
    pub version: String,
    /// Whether the answer is current: linearizable, or from a server that knows its leader.
    /// Another answer can add members but not remove any.
    pub trusted: bool,
    /// Announcements that the source could not read.
    pub unreadable: Unreadable,
    /// The address and the key of each member whose key at the source is not its name. Keys
    /// longer than [`KEY_BYTES_MAX`] can be absent.
    pub keys: Arc<[(SocketAddr, Arc<str>)]>,
}

/// Why a source gave no answer; the label of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SourceFailure {
    /// No connection.
    Connect,
    /// No answer in time.
    Timeout,
    /// The server rejected the token, the password or the permission.
    Auth,
    /// The question does not exist at the server.
    NotFound,
    /// The answer cannot be read.
    Protocol,
    /// The server's history begins after the last revision that was seen.
    Compacted,
    /// The answer is older than one that was seen, or of a server without a leader.
    Stale,
    /// An error of this host, such as no free descriptor.
    Local,
}

// === impl Wish ===

impl Wish {
    /// Returns the name in `explain` and in the state directory.
    pub fn name(self) -> &'static str {
        match self {
            Wish::Sessions => "sessions",
            Wish::Starting => "starting",
            Wish::Draining => "draining",
            Wish::Critical => "critical",
        }
    }
}

// === impl SourceFailure ===

impl SourceFailure {
    /// All reasons.
    pub const ALL: [SourceFailure; 8] = [
        SourceFailure::Connect,
        SourceFailure::Timeout,
        SourceFailure::Auth,
        SourceFailure::NotFound,
        SourceFailure::Protocol,
        SourceFailure::Compacted,
        SourceFailure::Stale,
        SourceFailure::Local,
    ];

    /// Returns the label value in metrics.
    pub fn name(self) -> &'static str {
        match self {
            SourceFailure::Connect => "connect",
            SourceFailure::Timeout => "timeout",
            SourceFailure::Auth => "auth",
            SourceFailure::NotFound => "not-found",
            SourceFailure::Protocol => "protocol",
            SourceFailure::Compacted => "compacted",
            SourceFailure::Stale => "stale",
            SourceFailure::Local => "local",
        }
    }
}

impl fmt::Display for SourceFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
