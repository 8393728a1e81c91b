//! Values of one backend's heartbeat detector, for metrics and `explain`.
//!
//! The detector creates it. No decision uses it.

use super::DetectorState;
use std::time::{Duration, Instant};

/// See the module documentation.
#[derive(Debug, Clone, PartialEq)]
pub struct DetectorReading {
    /// State of the detector.
    pub state: DetectorState,
    /// When the state last changed.
    pub since: Instant,
    /// Incarnation of the newest heartbeat.
    pub incarnation: Option<u64>,
    /// Sequence number of the newest heartbeat.
    pub sequence: Option<u64>,
    /// Heartbeats counted.
    pub beats_total: u64,
    /// Sequence numbers skipped, outages included.
    pub lost_total: u64,
    /// Suspicions.
    pub suspicions_total: u64,
    /// Removals after a confirmed failure.
    pub downs_total: u64,
    /// Share of heartbeats lost, as a fraction.
    pub loss: f64,
    /// Share of losses followed by another, as a fraction.
    pub loss_after_loss: f64,
    /// Standard deviation of arrivals from their expected times.
    pub jitter: Duration,
    /// Declared interval.
    pub interval: Duration,
    /// Learned interval.
    pub mean_interval: Duration,
    /// Heartbeats that may be missing in a row.
    pub missing_allowed: u32,
    /// Silence after which the backend becomes suspect.
    pub timeout: Duration,
    /// Timeout of a try of a confirmation probe.
    pub try_timeout: Duration,
    /// Time since the newest heartbeat.
    pub silence: Option<Duration>,
    /// Phi with a normal tail. No decision uses it.
    pub phi_normal: f64,
    /// Phi with an exponential tail. No decision uses it.
    pub phi_exponential: f64,
    /// Failures that still count towards the hold-down.
    pub flaps: u32,
    /// End of the hold-down.
    pub hold_until: Option<Instant>,
    /// Why a guard prevents the removal of a backend confirmed as down.
    pub held: Option<String>,
}
