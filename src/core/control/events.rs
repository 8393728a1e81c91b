//! Inputs and outputs of the controller.
//!
//! `daemon`, `daemon::probe` and simulations create the events and perform the effects.
//! This module holds data only.

use super::publish::detached_build::BuildToken;
use crate::discovery::Told;
use crate::health::{ConnectFailure, ProbeOutcome, Transition};
use crate::model::{BackendAddr, Config, ProbeSpec, SourceKey};
use crate::outcome::Cause;
use crate::table::Table;
use crate::table::build::{PoolBuild, PoolBuilt};
use crate::table::state::BackendId;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_heartbeat::Heartbeat;

/// An input of the controller.
#[derive(Debug)]
pub enum ControlEvent {
    /// A validated configuration whose listeners are bound.
    Configure(Arc<Config>),
    /// A probe requested by [`ControlEffect::Probe`] ended.
    Probed {
        /// The probed backend.
        backend: BackendId,
        /// From the effect.
        token: ProbeToken,
        /// Result of the probe.
        outcome: ProbeOutcome,
    },
    /// A session could not connect or was reset early, because of the backend or the path
    /// to it.
    ConnectFailed {
        /// The backend.
        backend: BackendId,
        /// The failure.
        failure: ConnectFailure,
        /// Failures since the last success, this one included.
        in_a_row: u32,
        /// When the attempt began. An attempt that began before the backend returned is
        /// no evidence about the backend now.
        begun: Instant,
    },
    /// A heartbeat with a valid signature and a fresh timestamp. Pass in all received
    /// heartbeats before or together with other events, so that no silence is detected too
    /// early.
    Heartbeat {
        /// Content of the heartbeat.
        heartbeat: Heartbeat,
        /// When it arrived.
        at: Instant,
        /// Heartbeats of the same sender that were merged into this one, itself included.
        stands_for: u32,
    },
    /// What a member source tells. Ignored and counted ([`MembersIgnored`]) if the
    /// configuration has no such source.
    ///
    /// [`MembersIgnored`]: super::MembersIgnored
    Told {
        /// The source.
        key: SourceKey,
        /// What it tells.
        told: Told,
        /// When it told that.
        at: Instant,
    },
    /// This many heartbeats were lost on this host.
    HeartbeatsLost(u64),
    /// A build requested by [`ControlEffect::Build`] is complete.
    Built {
        /// From the effect.
        token: BuildToken,
        /// Result of the build.
        built: Box<PoolBuilt>,
        /// Duration of the build.
        took: Duration,
    },
    /// The time returned by [`Controller::next_due`](super::Controller::next_due) has come.
    Tick,
}

/// An action for the daemon to perform.
#[derive(Debug)]
pub enum ControlEffect {
    /// Publish this table. New sessions use it.
    Publish(Arc<Table>),
    /// Run the build on another thread and report it with [`ControlEvent::Built`]. A pool
    /// has one build at a time.
    Build {
        /// Returned with the result.
        token: BuildToken,
        /// The build.
        build: Box<PoolBuild>,
    },
    /// Run one probe and report it with [`ControlEvent::Probed`].
    Probe {
        /// Priority of the probe.
        lane: ProbeLane,
        /// The backend to probe.
        backend: BackendId,
        /// Returned with the result.
        token: ProbeToken,
        /// Pool and name of the backend.
        names: (Arc<str>, Arc<str>),
        /// Address of the backend.
        address: BackendAddr,
        /// Kind and settings of the probe.
        spec: Arc<ProbeSpec>,
    },
    /// Log a transition.
    Log(Transition),
    /// Log a line that is not a transition.
    Notice(Box<Notice>),
    /// Log a verdict at level `debug`.
    Verdict(DetectorVerdict),
    /// A backend accepts more sessions than before under the same table: wake the queues.
    SlotsFreed,
    /// End every session of this backend, with this cause: its removal grace, or the time of
    /// `on_down` or `on_recover` has ended. Repeated, because a session can connect after the first reset.
    ResetSessions(BackendId, Cause),
}

/// Identifies one probe of this process, so that a late result does not count for a newer
/// probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProbeToken(pub u64);

/// Priority of a probe while the cap on running probes is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProbeLane {
    /// The pool. Pools take turns.
    pub pool: u32,
    /// The observation is about to change, or there is none yet: precedes other probes of
    /// the pool.
    pub urgent: bool,
}

/// The result of one detector for a backend. It causes a [`Transition`] only if the state of
/// the backend changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DetectorVerdict {
    /// The backend.
    pub backend: BackendId,
    /// The detector: `heartbeat`, `guard`, `first-byte` or `trial`.
    pub detector: &'static str,
    /// The result, such as a state of the detector.
    pub verdict: &'static str,
    /// The evidence.
    pub reason: String,
}

/// How much a notice matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NoticeLevel {
    /// The operator can ignore it.
    Info,
    /// The operator should look.
    #[default]
    Warn,
}

/// A log line that is not a transition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// Level of the line.
    pub level: NoticeLevel,
    /// Pool name; empty if the notice concerns all pools.
    pub pool: Arc<str>,
    /// Backend name, if the notice concerns one backend.
    pub backend: Option<Arc<str>>,
    /// What happened and what Tidegate does; constant text.
    pub message: &'static str,
    /// The variables of the log line.
    pub fields: NoticeFields,
}

/// Fields of a notice's log line, with the names that the log shows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NoticeFields {
    /// Why it happened.
    pub reason: Option<String>,
    /// The evidence against a backend.
    pub evidence: Option<String>,
    /// Address in a heartbeat, or of a backend.
    pub address: Option<String>,
    /// Source address of connections, or the member source.
    pub source: Option<String>,
    /// Local ports in use.
    pub used: Option<u64>,
    /// The limit that `used` approaches.
    pub limit: Option<u64>,
    /// The pool's `startup_grace`.
    pub startup_grace: Option<String>,
    /// Registered backends of the pool.
    pub registered: Option<u64>,
    /// Members of a view.
    pub members: Option<u64>,
    /// Members that joined.
    pub joined: Option<u64>,
    /// Members that left, or that an answer would remove.
    pub removed: Option<u64>,
    /// Version of an answer, in the words of the source.
    pub version: Option<String>,
    /// Age of the last answer.
    pub age: Option<String>,
    /// How late the control thread was.
    pub late: Option<String>,
    /// Heartbeats dropped on this host.
    pub dropped: Option<u64>,
    /// Heartbeats of this sender that were rejected.
    pub rejected: Option<u64>,
    /// Notices of the same kind that were not logged.
    pub suppressed: Option<u64>,
    /// What the operator can do.
    pub help: &'static str,
}

/// Why an operator's request was rejected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OperatorError {
    /// No pool has this name.
    UnknownPool,
    /// No backend of the pool has this name.
    UnknownBackend,
    /// The request is about one backend, and the address of this one is a name: it has these
    /// members, perhaps none yet.
    Members(Vec<Arc<str>>),
}
