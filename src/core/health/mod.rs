//! Health of a backend: stored facts and the derived value *eligible*.
//!
//! Stored: the operator's intent, the results of probes and heartbeats, and the
//! ejection state. Derived: *eligible*. [`BackendHealth::eligible`] computes it, and
//! no code stores it. The controller owns the values. The detectors are pure: they
//! do no I/O and read no clock.
//!
//! # When a backend is eligible
//!
//! A backend is eligible if its intent is *ready*, its heartbeats request *ready*, it
//! is not ejected, and its observation is one of:
//!
//! - *up*;
//! - *suspect*: eligible with a tenth of its weight. Heartbeats are overdue, or its
//!   sessions wait too long for a first byte ([`slow_detector`]);
//! - *unknown*, if its pool has no probe and its heartbeats are not awaited;
//! - *unknown*, while the backend **fails open** and its heartbeats are not awaited.
//!
//! In a pool with probes, a new backend waits for its first result. The first result
//! decides alone. A backend fails open, and is eligible until its own first result,
//! in two cases:
//!
//! 1. `startup_grace` has passed and no backend of the pool has had a result. Then
//!    the probes are probably broken, and a pool without eligible backends serves no
//!    client. The rule also holds for backends that join before the pool's first
//!    result. The grace starts when the pool gets its probe, or when the last backend
//!    with a result leaves.
//! 2. The backend was in rotation before its pool got a probe. Adding a probe removes
//!    no backend that the probe has not found down.
//!
//! After an ejection a backend is *on trial*: it is eligible, but gets one session
//! only until the trial has passed ([`ejection`]).
//!
//! In a pool with a `role`, a backend is eligible only if it has this role ([`role`]),
//! whatever the rules above say. The agent of a backend ([`agent`]) can exclude new sessions
//! and reduce the weight.
//!
//! *Down* is never eligible. The table implements `when_none_eligible = "try-all"`;
//! it does not change this rule.
//!
//! # Probes and heartbeats together
//!
//! A probe tests the service. A heartbeat reports that the host works. A probe result
//! of `down` therefore takes precedence, and heartbeats detect a failure earlier.
//! [`combine_observations`] combines them as follows. The column "-" is a pool without
//! probes; the rows are the names that `status` shows.
//!
//! | heartbeats | - | probes: unknown | probes: up | probes: down |
//! |---|---|---|---|---|
//! | absent (not configured, or none received and none required) | unknown, eligible | unknown | up | down |
//! | awaited (required or registered, not yet confirmed) | unknown, waits | unknown, waits | unknown, waits | down |
//! | beating (received in time) | up | unknown | up | **down**: the host works, the service does not |
//! | suspect (overdue, not yet confirmed) | suspect | unknown | suspect | down |
//! | `vouched` (overdue, but a confirmation probe succeeded) | suspect | unknown | **up**: the sender failed, the service works | down |
//! | silent (overdue, and the confirmation probes failed) | down | down | down | down |
//! | expired (none for `ttl`; required or registered) | down | down | down | down |
//!
//! Unless the table says otherwise, the rule above decides whether an *unknown*
//! backend is eligible. A backend whose heartbeats report `starting`, `draining` or
//! `stopping` gets no new sessions, whatever its observation: see [`RequestedState`].
//!
//! # Member sources
//!
//! A registry can wish for less, never for more: [`MemberWish::Starting`] and
//! [`MemberWish::Draining`] exclude new sessions, [`MemberWish::Suspect`] reduces an eligible
//! backend to a tenth of its weight. A backend that is down here stays down. In a pool
//! without probes, a member that only member sources list is **unverified** and not
//! eligible until one connect to it has succeeded, unless it fails open.

pub mod agent;
pub mod ejection;
pub mod probe_detector;
mod probe_outcome;
pub mod recent;
pub mod role;
pub mod slow_detector;

use crate::discovery::view::MemberWish;
use crate::health::agent::AgentState;
use crate::health::ejection::EjectionState;
use crate::health::probe_detector::ProbeDetector;
use crate::health::slow_detector::SlowDetector;
pub use probe_outcome::{
    EndedProbe, LastProbe, LastProbes, PROBES_KEPT, ProbeAnswer, ProbeOutcome,
};
use recent::RecentFailures;
use role::{RoleFit, SeenRole};
use std::time::{Duration, Instant};

/// Weight of a suspect backend, in percent of its configured weight. Enough sessions
/// remain to learn from, and most clients use other backends.
pub const SUSPECT_WEIGHT_PERCENT: u32 = 10;

/// Reason text of a refused connect, for probes and sessions alike.
pub const REFUSED: &str = "connection refused";

/// Health of one backend.
#[derive(Debug, Clone)]
pub struct BackendHealth {
    /// The operator's intent.
    pub intent: Intent,
    /// When the intent was set.
    pub intent_since: Instant,
    /// Results of the pool's probes; `None` if the pool has no probe.
    pub detector: Option<ProbeDetector>,
    /// Passive ejection.
    pub outlier: EjectionState,
    /// Result of its heartbeats.
    pub heartbeat_health: HeartbeatHealth,
    /// State that its heartbeats request.
    pub requested: RequestedState,
    /// What the registries of its pool wish for it.
    pub wish: MemberWish,
    /// No connect to it has succeeded yet. Only in pools without probes.
    pub unverified: bool,
    /// Failures of sessions during the last minute.
    pub recent: RecentFailures,
    /// The role that its pool needs.
    pub role: RoleFit,
    /// Detector over the time to the first byte.
    pub slow: SlowDetector,
    /// Eligible while unknown; see the module documentation. The first result ends
    /// it.
    pub fails_open: bool,
    /// When the backend was configured.
    pub since: Instant,
}

/// Whether a backend without any result is eligible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenUnknown {
    /// Waits for its first result.
    NotEligible,
    /// Gets sessions.
    Eligible,
}

/// Result of a backend's heartbeats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeartbeatHealth {
    /// Heartbeats do not count: not configured, or none received and none required.
    Absent,
    /// Heartbeats are required, and no confirmed one has been received.
    Waiting,
    /// Heartbeats arrive in time.
    OnTime,
    /// Heartbeats are overdue, and a confirmation probe is running.
    Suspect,
    /// Heartbeats are overdue, but a confirmation probe succeeded.
    SilentButAnswering,
    /// Heartbeats are overdue, and the confirmation probes failed.
    Silent,
    /// No heartbeat for the pool's `ttl`.
    Expired,
}

/// State that a backend's heartbeats request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestedState {
    /// New sessions, or no request.
    Ready,
    /// No new sessions yet.
    Starting,
    /// No new sessions; open ones finish.
    Draining,
    /// No new sessions; the sender exits soon.
    Stopping,
}

/// The operator's intent for a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Intent {
    /// In rotation if healthy.
    Ready,
    /// No new sessions; open ones finish.
    Draining,
    /// Out of service.
    Maintenance,
}

/// Health of a backend as measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Observation {
    /// No result yet.
    Unknown,
    /// Works.
    Up,
    /// The evidence is unclear: eligible with reduced weight.
    Suspect,
    /// Does not work.
    Down,
}

/// Why a session failed before the first byte of its backend, if the backend or the
/// path to it caused the failure. Local errors are not represented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectFailure {
    /// RST in answer to the SYN, or the Unix socket does not exist.
    Refused,
    /// No answer within the connect timeout.
    Timeout,
    /// ICMP unreachable and similar errors.
    Unreachable,
    /// The connection was established and the client had sent data, but the backend
    /// reset the connection before its first byte.
    EarlyReset,
    /// Any other errno.
    Other(i32),
}

/// A change of a backend's state, logged once.
#[derive(Debug, Clone)]
pub struct Transition {
    /// Pool name.
    pub pool: std::sync::Arc<str>,
    /// Backend name.
    pub backend: std::sync::Arc<str>,
    /// State before, such as `up`, `ejected`, `draining`.
    pub from: &'static str,
    /// State after.
    pub to: &'static str,
    /// The evidence, as text for the log.
    pub reason: String,
    /// When the state changed.
    pub at: Instant,
    /// How long the state before had lasted.
    pub lasted: Duration,
}

/// Combines the results of heartbeats and probes by the table in the module
/// documentation. `probes` is `None` if the pool has no probe.
pub fn combine_observations(
    heartbeats: HeartbeatHealth,
    probes: Option<Observation>,
) -> Observation {
    match (heartbeats, probes) {
        (HeartbeatHealth::Silent | HeartbeatHealth::Expired, _) | (_, Some(Observation::Down)) => {
            Observation::Down
        }
        (HeartbeatHealth::Waiting, _) => Observation::Unknown,
        (
            HeartbeatHealth::Absent
            | HeartbeatHealth::OnTime
            | HeartbeatHealth::Suspect
            | HeartbeatHealth::SilentButAnswering,
            Some(Observation::Unknown),
        )
        | (HeartbeatHealth::Absent, None) => Observation::Unknown,
        (HeartbeatHealth::OnTime, None) => Observation::Up,
        (HeartbeatHealth::SilentButAnswering, None) | (HeartbeatHealth::Suspect, _) => {
            Observation::Suspect
        }
        (
            HeartbeatHealth::Absent | HeartbeatHealth::OnTime | HeartbeatHealth::SilentButAnswering,
            Some(seen),
        ) => seen,
    }
}

/// Returns a backend's share of its weight, in percent. 0: the backend is not
/// eligible.
pub fn weight_percent(
    intent: Intent,
    ejected: bool,
    observation: Observation,
    when_unknown: WhenUnknown,
) -> u32 {
    if intent != Intent::Ready || ejected {
        return 0;
    }
    match (observation, when_unknown) {
        (Observation::Up, _) => 100,
        (Observation::Suspect, _) => SUSPECT_WEIGHT_PERCENT,
        (Observation::Unknown, WhenUnknown::Eligible) => 100,
        (Observation::Unknown, WhenUnknown::NotEligible) => 0,
        (Observation::Down, _) => 0,
    }
}

// === impl BackendHealth ===

impl BackendHealth {
    /// Returns the health of a backend without any result.
    pub fn new(intent: Intent, detector: Option<ProbeDetector>, now: Instant) -> BackendHealth {
        BackendHealth {
            intent,
            intent_since: now,
            detector,
            outlier: EjectionState::new(),
            recent: RecentFailures::default(),
            heartbeat_health: HeartbeatHealth::Absent,
            requested: RequestedState::Ready,
            wish: MemberWish::Sessions,
            unverified: false,
            role: RoleFit::default(),
            slow: SlowDetector::default(),
            fails_open: false,
            since: now,
        }
    }

    /// Returns the combined result of probes and heartbeats.
    pub fn combined_observation(&self) -> Observation {
        combine_observations(self.heartbeat_health, self.probed())
    }

    /// Returns the result of probes; `None` if the pool has no probe.
    pub fn probed(&self) -> Option<Observation> {
        self.detector.as_ref().map(ProbeDetector::observation)
    }

    /// Returns the combined result of probes, heartbeats and, if these make the
    /// backend eligible, of the first bytes of its sessions and of its registries.
    pub fn observation(&self) -> Observation {
        let seen = self.combined_observation();
        let serves = match seen {
            Observation::Up => true,
            Observation::Unknown => self.when_unknown() == WhenUnknown::Eligible,
            Observation::Suspect | Observation::Down => false,
        };
        let suspect = self.slow.is_suspect() || self.wish == MemberWish::Suspect;
        if serves && suspect { Observation::Suspect } else { seen }
    }

    /// Whether new sessions can pick the backend.
    pub fn eligible(&self) -> bool {
        self.percent(self.outlier.is_ejected()) > 0
    }

    /// Whether the backend would be eligible without its ejection.
    pub fn eligible_but_for_ejection(&self) -> bool {
        self.outlier.is_ejected() && self.percent(false) > 0
    }

    /// Whether the backend is eligible and not on trial.
    pub fn is_fully_eligible(&self) -> bool {
        self.eligible() && !self.outlier.is_on_trial()
    }

    /// Returns the share of its weight, in percent: less than 100 while suspect, 0
    /// while not eligible.
    pub fn weight_share(&self) -> u32 {
        self.percent(self.outlier.is_ejected())
    }

    /// Ends the ejection, if any, and returns how long it lasted. Restarts the rows
    /// of failed connects.
    pub fn end_ejection(&mut self, now: Instant) -> Option<Duration> {
        let lasted = self.outlier.end(now)?;
        if let Some(detector) = &mut self.detector {
            detector.forget_connects();
        }
        Some(lasted)
    }

    /// Ends the ejection, if any, with a trial, and returns how long the ejection
    /// lasted. Restarts the rows of failed connects.
    pub fn begin_trial(&mut self, now: Instant) -> Option<Duration> {
        let lasted = self.outlier.begin_trial(now)?;
        if let Some(detector) = &mut self.detector {
            detector.forget_connects();
        }
        Some(lasted)
    }

    /// Returns when the probe state, the ejection state or the slow-backend state last
    /// changed.
    pub fn settled_since(&self) -> Instant {
        let judged = self.detector.as_ref().map_or(self.since, ProbeDetector::since);
        [self.outlier.back_since(), self.slow.suspect_since()]
            .into_iter()
            .flatten()
            .fold(judged, Instant::max)
    }

    /// Whether its heartbeats, its registries and its agent allow new sessions.
    pub fn is_wanted(&self) -> bool {
        self.requested == RequestedState::Ready && self.wish.serves() && self.agent().serves()
    }

    /// Returns what its agent has said.
    pub fn agent(&self) -> AgentState {
        self.detector.as_ref().map(ProbeDetector::agent).unwrap_or_default()
    }

    /// Whether the backend would be eligible if its registries wished for sessions.
    pub fn eligible_but_for_wish(&self) -> bool {
        let (seen, unknown) = (self.observation(), self.when_unknown());
        self.requested == RequestedState::Ready
            && self.agent().serves()
            && self.has_role()
            && weight_percent(self.intent, self.outlier.is_ejected(), seen, unknown) > 0
    }

    /// Returns the role that probes have found.
    pub fn seen_role(&self) -> Option<SeenRole> {
        self.detector.as_ref().and_then(ProbeDetector::role)
    }

    /// Whether the backend has the role that its pool needs.
    pub fn has_role(&self) -> bool {
        self.role.fits(self.seen_role())
    }

    fn when_unknown(&self) -> WhenUnknown {
        let open = (self.detector.is_none() && !self.unverified) || self.fails_open;
        if open && self.heartbeat_health != HeartbeatHealth::Waiting {
            WhenUnknown::Eligible
        } else {
            WhenUnknown::NotEligible
        }
    }

    fn percent(&self, ejected: bool) -> u32 {
        if !self.is_wanted() || !self.has_role() {
            return 0;
        }
        let percent = weight_percent(self.intent, ejected, self.observation(), self.when_unknown());
        self.agent().reduce(percent)
    }
}

// === impl HeartbeatHealth ===

impl HeartbeatHealth {
    /// Returns the name that `status` shows.
    pub fn name(self) -> &'static str {
        match self {
            HeartbeatHealth::Absent => "absent",
            HeartbeatHealth::Waiting => "awaited",
            HeartbeatHealth::OnTime => "beating",
            HeartbeatHealth::Suspect => "suspect",
            HeartbeatHealth::SilentButAnswering => "vouched",
            HeartbeatHealth::Silent => "silent",
            HeartbeatHealth::Expired => "expired",
        }
    }
}

// === impl RequestedState ===

impl RequestedState {
    /// Returns the name that `status` shows.
    pub fn name(self) -> &'static str {
        match self {
            RequestedState::Ready => "ready",
            RequestedState::Starting => "starting",
            RequestedState::Draining => "draining",
            RequestedState::Stopping => "stopping",
        }
    }
}

// === impl Intent ===

impl Intent {
    /// Returns the intent with this name.
    pub fn named(name: &str) -> Option<Intent> {
        [Intent::Ready, Intent::Draining, Intent::Maintenance]
            .into_iter()
            .find(|intent| intent.name() == name)
    }

    /// Returns the name that `status` shows.
    pub fn name(self) -> &'static str {
        match self {
            Intent::Ready => "ready",
            Intent::Draining => "draining",
            Intent::Maintenance => "maintenance",
        }
    }
}

// === impl Observation ===

impl Observation {
    /// Returns the observation with this name.
    pub fn named(name: &str) -> Option<Observation> {
        [Observation::Unknown, Observation::Up, Observation::Suspect, Observation::Down]
            .into_iter()
            .find(|observation| observation.name() == name)
    }

    /// Returns the name that `status` shows.
    pub fn name(self) -> &'static str {
        match self {
            Observation::Unknown => "unknown",
            Observation::Up => "up",
            Observation::Suspect => "suspect",
            Observation::Down => "down",
        }
    }
}

// === impl ConnectFailure ===

impl ConnectFailure {
    /// Returns the name that the access log shows.
    pub fn name(self) -> &'static str {
        match self {
            ConnectFailure::Refused => "refused",
            ConnectFailure::Timeout => "timeout",
            ConnectFailure::Unreachable => "unreachable",
            ConnectFailure::EarlyReset => "early-reset",
            ConnectFailure::Other(_) => "other",
        }
    }
}

impl std::fmt::Display for ConnectFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ConnectFailure::Refused => f.write_str(REFUSED),
            ConnectFailure::Timeout => f.write_str("connect timed out"),
            ConnectFailure::Unreachable => f.write_str("host unreachable"),
            ConnectFailure::EarlyReset => f.write_str("connection reset before the first byte"),
            ConnectFailure::Other(errno) => {
                write!(f, "connect failed: {}", std::io::Error::from_raw_os_error(*errno))
            }
        }
    }
}

#[cfg(test)]
mod tests;
