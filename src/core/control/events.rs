//! What the controller is told, and what it asks the shell to do.
//!
//! Made and read by `daemon`, `daemon::probe` and simulations. Values alone: nothing here
//! does anything.

use super::members::MemberSource;
use super::publish::detached_build::BuildToken;
use crate::health::{ConnectFailure, ProbeOutcome, Transition};
use crate::model::{BackendAddr, BackendConfig, Config, ProbeSpec};
use crate::table::Table;
use crate::table::build::{PoolBuild, PoolBuilt};
use crate::table::state::BackendId;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_heartbeat::Heartbeat;

/// Something that happened.
#[derive(Debug)]
pub enum ControlEvent {
    /// A validated configuration whose listeners are bound.
    Configure(Arc<Config>),
    /// A probe asked for by [`ControlEffect::Probe`] ended.
    Probed {
        /// Whom it probed.
        backend: BackendId,
        /// From the effect that asked for it.
        token: ProbeToken,
        /// How it ended.
        outcome: ProbeOutcome,
    },
    /// A session could not connect, or was reset early, and the backend or its
    /// path is to blame.
    ConnectFailed {
        /// To whom.
        backend: BackendId,
        /// How.
        failure: ConnectFailure,
        /// Failures since the last success, this one included.
        in_a_row: u32,
        /// When the attempt began: what was under way when the backend came back
        /// says nothing of it since.
        begun: Instant,
    },
    /// A heartbeat whose signature and freshness are proven. Those that have
    /// arrived are to be given before or together with anything else, or their
    /// silence is judged too early.
    Heartbeat {
        /// What it says.
        heartbeat: Heartbeat,
        /// When it arrived.
        at: Instant,
        /// Heartbeats of the same sender that it stands for, itself included.
        stands_for: u32,
    },
    /// The backends that a source names for a pool; they replace those it named before.
    /// A set that is older than the one taken, that is too large or that is of an unknown
    /// pool changes nothing and is counted ([`MembersIgnored`]).
    ///
    /// [`MembersIgnored`]: super::MembersIgnored
    Members {
        /// A [`MemberSource::Numbered`]: the file's members come by
        /// [`ControlEvent::Configure`], heartbeats bring theirs one by one.
        source: MemberSource,
        /// Name of the pool.
        pool: Arc<str>,
        /// Grows with each set of the source for the pool.
        revision: u64,
        /// All of them, at most [`MEMBERS_MAX`](super::MEMBERS_MAX).
        set: Vec<BackendConfig>,
    },
    /// That many heartbeats were lost on this machine.
    HeartbeatsLost(u64),
    /// What [`ControlEffect::Build`] asked for is made.
    Built {
        /// From the effect that asked for it.
        token: BuildToken,
        /// What has come of it.
        built: Box<PoolBuilt>,
        /// How long that took.
        took: Duration,
    },
    /// The time named by [`Controller::next_due`](super::Controller::next_due) has come.
    Tick,
}

/// Something for the shell to do.
#[derive(Debug)]
pub enum ControlEffect {
    /// New sessions go by this table.
    Publish(Arc<Table>),
    /// Run it on another thread and report it as [`ControlEvent::Built`]. A pool has one at a
    /// time.
    Build {
        /// To be given back with the result.
        token: BuildToken,
        /// To be run.
        build: Box<PoolBuild>,
    },
    /// Run one probe and report it as [`ControlEvent::Probed`].
    Probe {
        /// Whose turn it is.
        lane: ProbeLane,
        /// Whom.
        backend: BackendId,
        /// To be given back with the result.
        token: ProbeToken,
        /// Where.
        address: BackendAddr,
        /// How.
        spec: Arc<ProbeSpec>,
    },
    /// Write this to the log.
    Log(Transition),
    /// Write this to the log as a warning: nothing changed its standing, but
    /// somebody should know.
    Notice(Notice),
    /// A backend takes more sessions than before, by the same table: whoever
    /// waits for one may look again.
    SlotsFreed,
    /// Reset every session of that backend: its removal grace is over. Asked
    /// again every second while it still holds sessions.
    ResetSessions(BackendId),
}

/// Names one probe for the life of the process, so that a late result is not
/// taken for a newer probe's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProbeToken(pub u64);

/// Where a probe waits while too many run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProbeLane {
    /// Names its pool: pools take turns.
    pub pool: u32,
    /// A verdict is being changed, or there is none yet: before others of its pool.
    pub urgent: bool,
}

/// A warning that is no change of standing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// Pool name; empty where it is about no single pool.
    pub pool: Arc<str>,
    /// Backend name, where it is about one.
    pub backend: Option<Arc<str>>,
    /// In words.
    pub message: String,
}

/// Why an operator's request was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OperatorError {
    /// No pool of that name.
    UnknownPool,
    /// No backend of that name in the pool.
    UnknownBackend,
}
