//! What one backend's heartbeats have said, and what follows from it for the backend: its
//! weight, what its heartbeats amount to, and when they expire.
//!
//! Filled by `heartbeats` with each datagram, read by tables and status. It judges no
//! silence and changes nothing but itself.

use super::silence_counts::CountedSender;
use crate::control::backends::BackendEntry;
use crate::health::{HeartbeatHealth, RequestedState};
use crate::model;
use crate::model::HeartbeatSpec;
use crate::suspicion::{DetectorState, HeartbeatDetector};
use std::time::{Duration, Instant};
use tidegate_heartbeat::{Heartbeat, SenderState};

/// Heartbeats of a slow sender that must be missing before `ttl` is over.
const TTL_INTERVALS: u32 = 3;

/// What one backend's heartbeats have said.
#[derive(Debug)]
pub(in crate::control) struct BackendHeartbeats {
    /// What their rhythm means.
    pub(in crate::control) detector: HeartbeatDetector,
    pub(in crate::control) incarnation: u64,
    pub(in crate::control) key_id: u32,
    pub(in crate::control) state: SenderState,
    /// As asked for.
    pub(in crate::control) weight: u16,
    /// As it counts: it follows changes by a tenth or more.
    pub(super) weight_in_force: u16,
    pub(in crate::control) in_flight: u32,
    pub(in crate::control) load: ReportedLoad,
    /// As declared, within bounds.
    pub(in crate::control) interval: Duration,
    pub(in crate::control) first_at: Instant,
    pub(in crate::control) last_at: Instant,
    /// Silent for `ttl`.
    pub(in crate::control) expired: bool,
    /// So much of the silence since then was our own doing.
    pub(in crate::control) excused: Duration,
    /// What of that was for heartbeats lost here, and not for being late.
    pub(in crate::control) deaf: Duration,
    /// Another process has said all this; nothing was heard here yet.
    pub(super) adopted: bool,
    /// What it is counted as among all.
    pub(in crate::control) counted: Option<CountedSender>,
}

/// How busy a sender says it is, made steady: an exponential mean, of which a
/// new share follows only where it changes it by a tenth.
#[derive(Debug, Clone, Copy)]
pub(in crate::control) struct ReportedLoad {
    /// As last said, 0..=1000.
    pub(in crate::control) said: u16,
    pub(super) mean: f64,
    /// In percent, a multiple of [`ReportedLoad::STEP`], 25..=100.
    pub(super) share: u32,
}

// === impl ReportedLoad ===

impl ReportedLoad {
    /// Weight of the newest heartbeat in the mean: a memory of ten.
    const GAIN: f64 = 0.1;

    /// Shares are multiples of it, so that a pool of many loads still has few
    /// different weights (each costs the round robin's preparation).
    const STEP: u32 = 5;

    pub(super) fn new(said: u16) -> ReportedLoad {
        let mean = f64::from(said.min(1000));
        ReportedLoad { said, mean, share: ReportedLoad::wanted(mean) }
    }

    /// Takes the newest; true when the share changes.
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

    /// The share of its weight that is left to it, in percent.
    pub(in crate::control) fn share(&self) -> u32 {
        self.share
    }

    /// The smoothed load, 0..=1000.
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
    /// The weight before anything lowers it: as configured, or less where its
    /// heartbeats ask for less.
    pub(in crate::control) fn base_weight(&self, pool: &model::PoolConfig) -> u16 {
        let Some(heartbeats) = self.heartbeats.as_deref().filter(|heartbeats| !heartbeats.expired)
        else {
            return self.spec.weight;
        };
        heartbeats.weight_in_force.clamp(1, self.weight_max(pool))
    }

    /// The largest weight its heartbeats may ask for.
    pub(in crate::control) fn weight_max(&self, pool: &model::PoolConfig) -> u16 {
        match (self.origins.is_registered(), &pool.heartbeat) {
            (true, Some(spec)) => spec.weight_max,
            _ => self.spec.weight,
        }
    }

    /// What its load leaves of the weight, in percent.
    pub(in crate::control) fn load_share(&self) -> u32 {
        let heartbeats = self.heartbeats.as_deref().filter(|heartbeats| !heartbeats.expired);
        heartbeats.map_or(100, |heartbeats| heartbeats.load.share())
    }

    /// Whether it may serve only on the word of its heartbeats.
    pub(in crate::control) fn needs_heartbeats(&self, spec: &HeartbeatSpec) -> bool {
        self.origins.is_registered() || spec.require
    }

    /// What its heartbeats amount to.
    pub(in crate::control) fn heartbeat_health(
        &self,
        spec: &HeartbeatSpec,
        now: Instant,
    ) -> HeartbeatHealth {
        let needed = self.needs_heartbeats(spec);
        let undecided = if needed { HeartbeatHealth::Waiting } else { HeartbeatHealth::Absent };
        let Some(heartbeats) = &self.heartbeats else {
            let excused = self.heartbeats_from.is_some_and(|from| now < from);
            return if excused { HeartbeatHealth::Absent } else { undecided };
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

    /// Silence that ends what its heartbeats vouch for, and when that is.
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
            deaf: Duration::ZERO,
            adopted: false,
            counted: None,
        }
    }
}

/// What a sender in that state asks for.
pub(super) fn requested(state: SenderState) -> RequestedState {
    match state {
        SenderState::Ready => RequestedState::Ready,
        SenderState::Starting => RequestedState::Starting,
        SenderState::Draining => RequestedState::Draining,
        SenderState::Stopping => RequestedState::Stopping,
    }
}

/// Silence that ends what heartbeats vouch for: as configured, or three
/// heartbeats of a sender that is slower than that.
pub(in crate::control) fn ttl(spec: &HeartbeatSpec, interval: Duration) -> Duration {
    spec.ttl.max(interval * TTL_INTERVALS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_backend_keeps_a_quarter_of_its_share() {
        assert_eq!([0, 500, 1000].map(|load| ReportedLoad::new(load).share()), [100, 65, 25]);
    }

    #[test]
    fn small_changes_of_load_change_no_share() {
        let mut load = ReportedLoad::new(500);
        let changes = (0..1000).filter(|n| load.apply_heartbeat(500 + (n % 2) * 60)).count();
        assert_eq!(changes, 0);
        let steps = (0..1000).filter(|_| load.apply_heartbeat(1000)).count();
        assert!((1..=8).contains(&steps), "{steps} tables on the way");
        assert!(load.share() <= 30, "{load:?}");
    }
}
