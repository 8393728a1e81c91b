//! What is known of a backend, kept apart by who knows it, and what follows.
//!
//! Operator intent, observation and ejection are stored; *eligible* is derived
//! here and nowhere stored. Used by the controller. Detectors are pure; only
//! `probe` (a shell) does I/O.
//!
//! # Who takes traffic
//!
//! A backend is eligible when its intent is *ready*, it is not ejected, and its
//! observation is one of
//!
//! - *up*;
//! - *suspect*, at a tenth of its weight: what works by probes, or is not
//!   probed, and is gray by what sessions see of it (`gray`);
//! - *unknown*, where its pool has no probe;
//! - *unknown*, while it **fails open**.
//!
//! In a pool with probes a new backend thus waits for its first result, which
//! decides alone. It fails open, and is eligible until its own first result, in
//! two cases:
//!
//! 1. `startup_grace` has run out and not one backend of its pool has had a
//!    result: then our probes are what is broken, and a pool that serves
//!    nobody helps nobody. This holds for backends that join before the pool's
//!    first result, too. The grace is counted from the moment the pool got its
//!    probe, or lost the last backend that had a result.
//! 2. It was in service before its pool got a probe: adding a probe takes
//!    nothing out that the probe has not found broken.
//!
//! After an ejection it is *on trial*: eligible, but a single session gets in
//! until it has passed (`outlier`).
//!
//! *Down* is never eligible; `when_none_eligible = "try-all"` is the table's
//! business, not part of this rule.
//!
//! # Probes and heartbeats together
//!
//! Probes ask the service itself, heartbeats are what its host says of it; so a
//! probe's verdict rules where there is one, and heartbeats say it sooner. What
//! the two make of a backend ([`combine_observations`]; a dash: its pool has no probe):
//!
//! | heartbeats | - | probes: unknown | probes: up | probes: down |
//! |---|---|---|---|---|
//! | absent (none taken, or none heard and none required) | unknown, serves | unknown | up | down |
//! | awaited (required or registered, not yet confirmed) | unknown, waits | unknown, waits | unknown, waits | down |
//! | beating | up | unknown | up | **down**: the host is well, the service is not |
//! | suspect (silent, not yet confirmed) | suspect | unknown | suspect | down |
//! | vouched (silent, but a probe found it there) | suspect | unknown | **up**: the sender is gone, the service is not | down |
//! | silent (and the confirming probes failed) | down | down | down | down |
//! | expired (silent for `ttl`; required or registered) | down | down | down | down |
//!
//! *Unknown* serves and waits by the rule above, except where the table says.
//! Whatever the verdict, a backend whose heartbeats say `starting`, `draining`
//! or `stopping` gets no new sessions: see [`RequestedState`].

pub mod ejection;
pub mod probe_detector;
pub mod recent;
pub mod slow_detector;

use crate::health::ejection::EjectionState;
use crate::health::probe_detector::ProbeDetector;
use crate::health::slow_detector::SlowDetector;
use recent::RecentFailures;
use std::time::{Duration, Instant};

/// What is left of a suspect's weight, in percent: enough to go on learning
/// from its sessions, little enough to spare most clients.
pub const SUSPECT_WEIGHT_PERCENT: u32 = 10;

/// How probes and sessions say that nobody listens.
pub const REFUSED: &str = "connection refused";

/// Everything known of one backend.
#[derive(Debug, Clone)]
pub struct BackendHealth {
    /// Operator's wish.
    pub intent: Intent,
    /// Since when.
    pub intent_since: Instant,
    /// Probes' verdict; `None` where the pool has no probe.
    pub detector: Option<ProbeDetector>,
    /// Passive ejection.
    pub outlier: EjectionState,
    /// What its heartbeats amount to.
    pub heartbeat_health: HeartbeatHealth,
    /// What its heartbeats ask for.
    pub requested: RequestedState,
    /// Failures of sessions during the last minute.
    pub recent: RecentFailures,
    /// What its first bytes say.
    pub gray: SlowDetector,
    /// Eligible while unknown; see the module's documentation. Ends with the
    /// first result.
    pub fails_open: bool,
    /// When the backend was configured.
    pub since: Instant,
}

/// What an unknown backend is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenUnknown {
    /// Waits for its first result.
    NotEligible,
    /// Takes traffic.
    Eligible,
}

/// What a backend's heartbeats amount to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeartbeatHealth {
    /// They have no say.
    Absent,
    /// It needs them, and they have not yet brought it into service.
    Waiting,
    /// They come.
    OnTime,
    /// They are overdue, and it is being asked.
    Suspect,
    /// They stay out, but a probe found it there.
    SilentButAnswering,
    /// They stay out, and probes did not find it.
    Silent,
    /// They have stayed out for the pool's `ttl`.
    Expired,
}

/// What a backend's heartbeats ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestedState {
    /// New sessions, or nothing at all.
    Ready,
    /// No new sessions yet.
    Starting,
    /// No new sessions any more.
    Draining,
    /// As before, and it is about to be gone.
    Stopping,
}

/// What the operator wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Intent {
    /// Take traffic.
    Ready,
    /// No new sessions; old ones finish.
    Draining,
    /// Out of service.
    Maintenance,
}

/// What probes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Observation {
    /// No result yet.
    Unknown,
    /// Works.
    Up,
    /// In doubt: takes part at reduced weight.
    Suspect,
    /// Does not work.
    Down,
}

/// How one probe ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeOutcome {
    /// As wished; how long it took.
    Success {
        /// From connect to verdict.
        took: Duration,
    },
    /// The backend's or its path's fault, in words for the log.
    Failure {
        /// Such as `connection refused` or `status 503, expected 200-399`.
        reason: String,
    },
    /// Our own trouble (no descriptors, no ports): proves nothing.
    Local {
        /// In words for the log.
        reason: String,
    },
}

/// How a session failed at its backend before it got anything from it, where the
/// backend or its path is to blame. Local trouble never gets here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectFailure {
    /// RST to our SYN, or no such socket.
    Refused,
    /// No answer within the connect timeout.
    Timeout,
    /// ICMP unreachable and the like.
    Unreachable,
    /// The connection stood and the client had spoken, but all that came was a
    /// reset.
    EarlyReset,
    /// Any other errno.
    Other(i32),
}

/// A change of a backend's standing, logged once.
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
    /// The evidence, in words.
    pub reason: String,
    /// When.
    pub at: Instant,
    /// How long the state before had lasted.
    pub lasted: Duration,
}

/// What heartbeats and probes together make of a backend; `probes` is `None`
/// where its pool has none. The table in the module's documentation.
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

/// The share of its weight a backend serves with, in percent; 0 means it is
/// not eligible. The whole rule is here.
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
    /// Nothing known yet but the operator's wish.
    pub fn new(intent: Intent, detector: Option<ProbeDetector>, now: Instant) -> BackendHealth {
        BackendHealth {
            intent,
            intent_since: now,
            detector,
            outlier: EjectionState::new(),
            recent: RecentFailures::default(),
            heartbeat_health: HeartbeatHealth::Absent,
            requested: RequestedState::Ready,
            gray: SlowDetector::default(),
            fails_open: false,
            since: now,
        }
    }

    /// What probes and heartbeats together say.
    pub fn record_heartbeat_health(&self) -> Observation {
        combine_observations(self.heartbeat_health, self.probed())
    }

    /// Probes' verdict alone; `None` where there are none.
    pub fn probed(&self) -> Option<Observation> {
        self.detector.as_ref().map(ProbeDetector::observation)
    }

    /// What probes and heartbeats together say, and sessions of what is in
    /// service by that.
    pub fn observation(&self) -> Observation {
        let seen = self.record_heartbeat_health();
        let serves = match seen {
            Observation::Up => true,
            Observation::Unknown => self.when_unknown() == WhenUnknown::Eligible,
            Observation::Suspect | Observation::Down => false,
        };
        if serves && self.gray.is_suspect() { Observation::Suspect } else { seen }
    }

    /// Derived: may it be chosen for new sessions?
    pub fn eligible(&self) -> bool {
        self.percent(self.outlier.is_ejected()) > 0
    }

    /// Whether only its ejection keeps it out.
    pub fn eligible_but_for_ejection(&self) -> bool {
        self.outlier.is_ejected() && self.percent(false) > 0
    }

    /// Whether it takes sessions, and not just one to try it.
    pub fn is_fully_eligible(&self) -> bool {
        self.eligible() && !self.outlier.is_on_trial()
    }

    /// What is left of its weight, in percent: all of it, less while it is
    /// suspect, 0 while it is not eligible.
    pub fn weight_share(&self) -> u32 {
        self.percent(self.outlier.is_ejected())
    }

    /// Ends the ejection, if there is one, and gives how long it lasted. Rows
    /// of failed connects start anew.
    pub fn end_ejection(&mut self, now: Instant) -> Option<Duration> {
        let lasted = self.outlier.end(now)?;
        if let Some(detector) = &mut self.detector {
            detector.forget_connects();
        }
        Some(lasted)
    }

    /// Ends the ejection, if there is one, with a trial, and gives how long it
    /// lasted. Rows of failed connects start anew.
    pub fn begin_trial(&mut self, now: Instant) -> Option<Duration> {
        let lasted = self.outlier.begin_trial(now)?;
        if let Some(detector) = &mut self.detector {
            detector.forget_connects();
        }
        Some(lasted)
    }

    /// Since when it has been neither judged anew nor ejected.
    pub fn settled_since(&self) -> Instant {
        let judged = self.detector.as_ref().map_or(self.since, ProbeDetector::since);
        [self.outlier.back_since(), self.gray.suspect_since()]
            .into_iter()
            .flatten()
            .fold(judged, Instant::max)
    }

    fn when_unknown(&self) -> WhenUnknown {
        let open = self.detector.is_none() || self.fails_open;
        if open && self.heartbeat_health != HeartbeatHealth::Waiting {
            WhenUnknown::Eligible
        } else {
            WhenUnknown::NotEligible
        }
    }

    fn percent(&self, ejected: bool) -> u32 {
        if self.requested != RequestedState::Ready {
            return 0;
        }
        weight_percent(self.intent, ejected, self.observation(), self.when_unknown())
    }
}

// === impl HeartbeatHealth ===

impl HeartbeatHealth {
    /// As in status.
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
    /// As in status.
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
    /// The one of that name.
    pub fn named(name: &str) -> Option<Intent> {
        [Intent::Ready, Intent::Draining, Intent::Maintenance]
            .into_iter()
            .find(|intent| intent.name() == name)
    }

    /// As in status.
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
    /// The one of that name.
    pub fn named(name: &str) -> Option<Observation> {
        [Observation::Unknown, Observation::Up, Observation::Suspect, Observation::Down]
            .into_iter()
            .find(|observation| observation.name() == name)
    }

    /// As in status.
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

impl std::fmt::Display for ProbeOutcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ProbeOutcome::Success { took } => write!(f, "success after {took:.1?}"),
            ProbeOutcome::Failure { reason } => write!(f, "failure: {reason}"),
            ProbeOutcome::Local { reason } => write!(f, "not run: {reason}"),
        }
    }
}

impl ConnectFailure {
    /// As in the access log.
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
mod tests {
    use super::*;
    use expect_test::expect;
    use std::fmt::Write;

    #[test]
    fn the_truth_table_of_eligibility() {
        let mut out = String::new();
        let observations =
            [Observation::Unknown, Observation::Up, Observation::Suspect, Observation::Down];
        for intent in [Intent::Ready, Intent::Draining, Intent::Maintenance] {
            for ejected in [false, true] {
                for when_unknown in [WhenUnknown::NotEligible, WhenUnknown::Eligible] {
                    let row: Vec<String> = observations
                        .iter()
                        .map(|o| {
                            let percent = weight_percent(intent, ejected, *o, when_unknown);
                            format!("{}={percent}", o.name())
                        })
                        .collect();
                    let ejected = if ejected { "ejected" } else { "in" };
                    let row = row.join(" ");
                    writeln!(out, "{} {ejected} unknown-{when_unknown:?}: {row}", intent.name())
                        .unwrap();
                }
            }
        }
        expect![[r#"
            ready in unknown-NotEligible: unknown=0 up=100 suspect=10 down=0
            ready in unknown-Eligible: unknown=100 up=100 suspect=10 down=0
            ready ejected unknown-NotEligible: unknown=0 up=0 suspect=0 down=0
            ready ejected unknown-Eligible: unknown=0 up=0 suspect=0 down=0
            draining in unknown-NotEligible: unknown=0 up=0 suspect=0 down=0
            draining in unknown-Eligible: unknown=0 up=0 suspect=0 down=0
            draining ejected unknown-NotEligible: unknown=0 up=0 suspect=0 down=0
            draining ejected unknown-Eligible: unknown=0 up=0 suspect=0 down=0
            maintenance in unknown-NotEligible: unknown=0 up=0 suspect=0 down=0
            maintenance in unknown-Eligible: unknown=0 up=0 suspect=0 down=0
            maintenance ejected unknown-NotEligible: unknown=0 up=0 suspect=0 down=0
            maintenance ejected unknown-Eligible: unknown=0 up=0 suspect=0 down=0
        "#]]
        .assert_eq(&out);
    }

    #[test]
    fn unknown_serves_without_a_probe_or_while_it_fails_open_only() {
        let now = tidegate_net::clock::now();
        let mut health = BackendHealth::new(Intent::Ready, None, now);
        assert_eq!(health.weight_share(), 100);
        health.detector = Some(ProbeDetector::new(2, 3, now));
        assert_eq!(health.weight_share(), 0, "waits for its first result");
        health.gray.suspect(now);
        assert_eq!(health.observation(), Observation::Unknown, "it takes no sessions");
        health.fails_open = true;
        assert_eq!(health.weight_share(), 10);
        health.gray.clear();
        assert_eq!(health.weight_share(), 100);
    }

    #[test]
    fn the_truth_table_of_heartbeats_and_probes() {
        let probes = [None, Some(Observation::Unknown), Some(Observation::Up)];
        let probes = probes.into_iter().chain([Some(Observation::Down)]);
        let mut out = String::new();
        for heartbeats in [
            HeartbeatHealth::Absent,
            HeartbeatHealth::Waiting,
            HeartbeatHealth::OnTime,
            HeartbeatHealth::Suspect,
            HeartbeatHealth::SilentButAnswering,
            HeartbeatHealth::Silent,
            HeartbeatHealth::Expired,
        ] {
            let cell =
                |probes: Option<Observation>| combine_observations(heartbeats, probes).name();
            let row: Vec<&str> = probes.clone().map(cell).collect();
            writeln!(out, "{}: {}", heartbeats.name(), row.join(" ")).unwrap();
        }
        expect![[r#"
            absent: unknown unknown up down
            awaited: unknown unknown unknown down
            beating: up unknown up down
            suspect: suspect unknown suspect down
            vouched: suspect unknown up down
            silent: down down down down
            expired: down down down down
        "#]]
        .assert_eq(&out);
    }

    #[test]
    fn sender_that_asks_for_no_sessions_gets_none() {
        let now = tidegate_net::clock::now();
        let mut health = BackendHealth::new(Intent::Ready, None, now);
        health.heartbeat_health = HeartbeatHealth::OnTime;
        for requested in
            [RequestedState::Starting, RequestedState::Draining, RequestedState::Stopping]
        {
            health.requested = requested;
            assert!(!health.eligible(), "{}", requested.name());
        }
        health.requested = RequestedState::Ready;
        assert!(health.eligible());
        health.heartbeat_health = HeartbeatHealth::Waiting;
        assert!(!health.eligible(), "joins only when it is confirmed");
    }
}
