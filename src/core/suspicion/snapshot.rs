//! What is known of one backend's heartbeats, as figures for people.
//!
//! Made by the heartbeat detector, shown by metrics and explanations. Nothing
//! is decided by it.

use super::DetectorState;
use std::time::{Duration, Instant};

/// Everything known of one backend's heartbeats, for metrics and explanations.
#[derive(Debug, Clone, PartialEq)]
pub struct DetectorReading {
    /// Its state.
    pub state: DetectorState,
    /// Since when.
    pub since: Instant,
    /// Of the sender heard last.
    pub incarnation: Option<u64>,
    /// Newest sequence number.
    pub sequence: Option<u64>,
    /// Heartbeats that counted.
    pub beats_total: u64,
    /// Sequence numbers skipped, outages included.
    pub lost_total: u64,
    /// Times it became suspect.
    pub suspicions_total: u64,
    /// Times it was taken out for a failure.
    pub downs_total: u64,
    /// Share of heartbeats lost, as a fraction.
    pub loss: f64,
    /// Share of losses followed by another, as a fraction.
    pub loss_after_loss: f64,
    /// Deviation of arrivals from their expected times.
    pub jitter: Duration,
    /// As declared.
    pub interval: Duration,
    /// As learned.
    pub mean_interval: Duration,
    /// Heartbeats that may be missing in a row.
    pub missing_allowed: u32,
    /// Silence that makes it suspect.
    pub timeout: Duration,
    /// How long a confirming try may take.
    pub try_timeout: Duration,
    /// Since the newest heartbeat.
    pub silence: Option<Duration>,
    /// Normal tail; a figure, not a verdict.
    pub phi_normal: f64,
    /// Exponential tail; a figure, not a verdict.
    pub phi_exponential: f64,
    /// Failures that still count towards the hold-down.
    pub flaps: u32,
    /// Not back before then.
    pub hold_until: Option<Instant>,
    /// Why it is not taken out though confirmed.
    pub held: Option<String>,
}
