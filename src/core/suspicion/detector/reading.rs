//! Reads the values of a detector, for metrics, `status` and `explain`.

use super::{DetectorPhase, HeartbeatDetector, PHI_DEVIATION_MIN};
use crate::suspicion::phi;
use crate::suspicion::snapshot::DetectorReading;
use std::time::Instant;

impl HeartbeatDetector {
    /// Returns all values of the detector.
    pub fn reading(&self, now: Instant) -> DetectorReading {
        let arrivals = &self.arrivals;
        let silence = self.silence(now);
        let mean = arrivals.mean_interval();
        let deviation = arrivals.jitter().max(mean.mul_f64(PHI_DEVIATION_MIN));
        let held = match &self.phase {
            DetectorPhase::Suspect(suspicion) => suspicion.held.clone(),
            _ => None,
        };
        DetectorReading {
            state: self.state(),
            since: self.since,
            incarnation: arrivals.newest().map(|(incarnation, _)| incarnation),
            sequence: arrivals.newest().map(|(_, sequence)| sequence),
            beats_total: arrivals.beats_total(),
            lost_total: arrivals.lost_total(),
            suspicions_total: self.suspicions_total,
            downs_total: self.downs_total,
            loss: arrivals.loss(),
            loss_after_loss: arrivals.loss_after_loss(),
            jitter: arrivals.jitter(),
            interval: arrivals.interval(),
            mean_interval: mean,
            missing_allowed: arrivals.missing_allowed(),
            timeout: arrivals.timeout(),
            try_timeout: self.answer_time.timeout(),
            silence,
            phi_normal: silence.map_or(0.0, |silence| phi::normal(silence, mean, deviation)),
            phi_exponential: silence.map_or(0.0, |silence| phi::exponential(silence, mean)),
            flaps: self.flaps.count(),
            hold_until: self.hold_until.filter(|until| *until > now),
            held,
        }
    }

    /// Returns the evidence against a backend confirmed as down that a guard keeps in
    /// rotation, and the guard's reason.
    pub fn held_removal(&self) -> Option<(String, String)> {
        let DetectorPhase::Suspect(suspicion) = &self.phase else { return None };
        let (confirmed, reason) = (suspicion.confirmed.as_ref()?, suspicion.held.clone()?);
        Some((format!("{}; {}", suspicion.evidence, confirmed.evidence), reason))
    }
}
