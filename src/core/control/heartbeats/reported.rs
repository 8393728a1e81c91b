//! The heartbeats of one backend, and what follows from them: its weight, its
//! [`HeartbeatHealth`], and the expiry.
//!
//! Updated by `heartbeats` with each datagram, read by `publish` and `status`. The detector
//! evaluates silence.

use super::silence_counts::CountedSender;
use crate::control::backends::BackendEntry;
use crate::health::{HeartbeatHealth, RequestedState};
use crate::model;
use crate::model::HeartbeatSpec;
use crate::suspicion::{DetectorState, HeartbeatDetector};
use std::time::{Duration, Instant};
use tidegate_heartbeat::{Heartbeat, SenderState};

/// Lower bound of `ttl`, in intervals of the sender.
const TTL_INTERVALS: u32 = 3;

/// The heartbeats of one backend.
#[derive(Debug)]
pub(in crate::control) struct BackendHeartbeats {
    /// Evaluates silence.
    pub(in crate::control) detector: HeartbeatDetector,
    pub(in crate::control) incarnation: u64,
    pub(in crate::control) key_id: u32,
    pub(in crate::control) state: SenderState,
    /// Requested weight.
    pub(in crate::control) weight: u16,
    /// Weight in use. It follows changes of a tenth or more.
    pub(super) weight_in_force: u16,
    pub(in crate::control) in_flight: u32,
    pub(in crate::control) load: ReportedLoad,
    /// Declared interval, within bounds.
    pub(in crate::control) interval: Duration,
    pub(in crate::control) first_at: Instant,
    pub(in crate::control) last_at: Instant,
    /// No heartbeat for `ttl`.
    pub(in crate::control) expired: bool,
    /// The part of the silence since `last_at` that does not count.
    pub(in crate::control) excused: Duration,
    /// The part of `excused` for heartbeats lost on this host. Bounded by `ttl`.
    pub(in crate::control) excused_for_losses: Duration,
    /// Handed over by another process; this process has received no heartbeat yet.
    pub(super) adopted: bool,
    /// How the backend counts in [`SilenceCounts`](super::silence_counts::SilenceCounts).
    pub(in crate::control) counted: Option<CountedSender>,
}

/// The load that a sender reports, smoothed by an exponential mean. The share follows
/// changes of a tenth or more.
#[derive(Debug, Clone, Copy)]
pub(in crate::control) struct ReportedLoad {
    /// Last reported load, 0..=1000.
    pub(in crate::control) said: u16,
    pub(super) mean: f64,
    /// In percent, a multiple of [`ReportedLoad::STEP`], 25..=100.
    pub(super) share: u32,
}

// === impl ReportedLoad ===

impl ReportedLoad {
    /// Weight of the newest heartbeat in the mean: a memory of ten heartbeats.
    const GAIN: f64 = 0.1;

    /// Shares are multiples of `STEP`. Each different weight adds to the cost of preparing
    /// the round robin.
    const STEP: u32 = 5;

    pub(super) fn new(said: u16) -> ReportedLoad {
        let mean = f64::from(said.min(1000));
        ReportedLoad { said, mean, share: ReportedLoad::wanted(mean) }
    }

    /// Records a reported load. Returns true if the share changes.
    pub(super) fn apply_heartbeat(&mut self, said: u16) -> bool {
        self.said = said;
        self.mean += ReportedLoad::GAIN * (f64::from(said.min(1000)) - self.mean);
        let wanted = ReportedLoad::wanted(self.mean);
        let changes = wanted.abs_diff(self.share) * 10 >= self.share && wanted != self.share;
        if changes {
            self.share = wanted;
        }
        changes
    }

    /// Returns the share of the weight that the load leaves, in percent.
    pub(in crate::control) fn share(&self) -> u32 {
        self.share
    }

    /// Returns the smoothed load, 0..=1000.
    pub(in crate::control) fn mean(&self) -> f64 {
        self.mean
    }

    pub(super) fn wanted(mean: f64) -> u32 {
        let percent = 100.0 - 75.0 * mean / 1000.0;
        (percent / f64::from(ReportedLoad::STEP)).round() as u32 * ReportedLoad::STEP
    }
}

// === impl BackendEntry ===

impl BackendEntry {
    /// Returns the weight before any reduction: as configured, or less if its heartbeats
    /// request less.
    pub(in crate::control) fn base_weight(&self, pool: &model::PoolConfig) -> u16 {
        let Some(heartbeats) = self.heartbeats.as_deref().filter(|heartbeats| !heartbeats.expired)
        else {
            return self.spec.weight;
        };
        heartbeats.weight_in_force.clamp(1, self.weight_max(pool))
    }

    /// Returns the largest weight that its heartbeats may request.
    pub(in crate::control) fn weight_max(&self, pool: &model::PoolConfig) -> u16 {
        match (self.origins.is_registered(), &pool.heartbeat) {
            (true, Some(spec)) => spec.weight_max,
            _ => self.spec.weight,
        }
    }

    /// Returns the share of the weight that its load leaves, in percent.
    pub(in crate::control) fn load_share(&self) -> u32 {
        let heartbeats = self.heartbeats.as_deref().filter(|heartbeats| !heartbeats.expired);
        heartbeats.map_or(100, |heartbeats| heartbeats.load.share())
    }

    /// Whether the backend is eligible only with heartbeats.
    pub(in crate::control) fn needs_heartbeats(&self, spec: &HeartbeatSpec) -> bool {
        self.origins.is_registered() || spec.require
    }

    /// Returns the result of its heartbeats.
    pub(in crate::control) fn heartbeat_health(
        &self,
        spec: &HeartbeatSpec,
        now: Instant,
    ) -> HeartbeatHealth {
        let needed = self.needs_heartbeats(spec);
        let undecided = if needed { HeartbeatHealth::Waiting } else { HeartbeatHealth::Absent };
        let Some(heartbeats) = &self.heartbeats else {
            let not_yet_required = self.heartbeats_from.is_some_and(|from| now < from);
            return if not_yet_required { HeartbeatHealth::Absent } else { undecided };
        };
        if heartbeats.expired {
            return if needed { HeartbeatHealth::Expired } else { HeartbeatHealth::Absent };
        }
        match heartbeats.detector.state() {
            DetectorState::Waiting => undecided,
            DetectorState::Up => HeartbeatHealth::OnTime,
            DetectorState::Suspect if heartbeats.detector.answers(now) => {
                HeartbeatHealth::SilentButAnswering
            }
            DetectorState::Suspect => HeartbeatHealth::Suspect,
            DetectorState::Down => HeartbeatHealth::Silent,
            DetectorState::Recovering if heartbeats.detector.was_down() => HeartbeatHealth::Silent,
            DetectorState::Recovering => undecided,
        }
    }

    /// Returns the effective `ttl`, and when its heartbeats expire.
    pub(in crate::control) fn expiry(&self, spec: &HeartbeatSpec) -> Option<(Duration, Instant)> {
        let heartbeats = self.heartbeats.as_deref()?;
        let ttl = ttl(spec, heartbeats.interval);
        Some((ttl, heartbeats.last_at + heartbeats.excused + ttl))
    }
}

// === impl BackendHeartbeats ===

impl BackendHeartbeats {
    pub(super) fn first(
        heartbeat: &Heartbeat,
        detector: HeartbeatDetector,
        at: Instant,
    ) -> BackendHeartbeats {
        BackendHeartbeats {
            detector,
            incarnation: heartbeat.incarnation,
            key_id: heartbeat.key_id,
            state: heartbeat.state,
            weight: heartbeat.weight,
            weight_in_force: heartbeat.weight.max(1),
            in_flight: heartbeat.in_flight,
            load: ReportedLoad::new(heartbeat.load),
            interval: heartbeat.interval,
            first_at: at,
            last_at: at,
            expired: false,
            excused: Duration::ZERO,
            excused_for_losses: Duration::ZERO,
            adopted: false,
            counted: None,
        }
    }
}

/// Returns the state that a sender requests.
pub(super) fn requested(state: SenderState) -> RequestedState {
    match state {
        SenderState::Ready => RequestedState::Ready,
        SenderState::Starting => RequestedState::Starting,
        SenderState::Draining => RequestedState::Draining,
        SenderState::Stopping => RequestedState::Stopping,
    }
}

/// Returns the effective `ttl`: as configured, but at least three intervals of the sender.
pub(in crate::control) fn ttl(spec: &HeartbeatSpec, interval: Duration) -> Duration {
    spec.ttl.max(interval * TTL_INTERVALS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_backend_keeps_a_quarter_of_its_weight() {
        assert_eq!([0, 500, 1000].map(|load| ReportedLoad::new(load).share()), [100, 65, 25]);
    }

    #[test]
    fn small_changes_of_load_do_not_change_the_share() {
        let mut load = ReportedLoad::new(500);
        let changes = (0..1000).filter(|n| load.apply_heartbeat(500 + (n % 2) * 60)).count();
        assert_eq!(changes, 0);
        let steps = (0..1000).filter(|_| load.apply_heartbeat(1000)).count();
        assert!((1..=8).contains(&steps), "{steps} changes of the share");
        assert!(load.share() <= 30, "{load:?}");
    }
}
