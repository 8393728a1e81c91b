//! Handover of a heartbeat detector in an upgrade.
//!
//! Called by the controller's handover. The state is kept; a running confirmation probe
//! is restarted.

use super::{
    AnswerTime, DetectorPhase, DetectorState, FlapDamping, HeartbeatDetector, Suspicion,
    SuspicionCause,
};
use crate::suspicion::arrivals::{Arrivals, SavedArrivals};
use crate::suspicion::flap_damping::HOLD_MAX;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// [`HeartbeatDetector`] in a handover. Times are in milliseconds relative to the moment of
/// saving.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SavedDetector {
    /// Name of the state.
    pub state: String,
    /// Age of the state.
    pub since_ms: u64,
    /// The backend was down before.
    pub was_down: bool,
    /// Rest of the hold-down.
    pub hold_ms: Option<u64>,
    /// Failures that still count.
    pub flaps: u32,
    /// Time since the backend came into rotation.
    pub up_ms: Option<u64>,
    /// Time since a probe last succeeded.
    pub answered_ms: Option<u64>,
    /// Answer time of probes and its deviation, in seconds.
    pub reach: Option<(f64, f64)>,
    /// Suspicions so far.
    pub suspicions_total: u64,
    /// Removals after a confirmed failure.
    pub downs_total: u64,
    /// Statistics of the heartbeats.
    pub arrivals: SavedArrivals,
}

// === impl HeartbeatDetector ===

impl HeartbeatDetector {
    /// Returns the state for an upgrade's handover.
    pub fn save(&self, now: Instant) -> SavedDetector {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let ago = |then: Instant| millis(now.saturating_duration_since(then));
        let (flaps, up_since) = self.flaps.parts();
        SavedDetector {
            state: self.state().name().to_owned(),
            since_ms: ago(self.since),
            was_down: self.was_down,
            hold_ms: self.hold_until.map(|until| millis(until.saturating_duration_since(now))),
            flaps,
            up_ms: up_since.map(ago),
            answered_ms: self.answered_at.map(ago),
            reach: self.answer_time.known(),
            suspicions_total: self.suspicions_total,
            downs_total: self.downs_total,
            arrivals: self.arrivals.save(now),
        }
    }

    /// Restores a state that the old process handed over at `now`.
    pub fn restore(saved: &SavedDetector, now: Instant) -> HeartbeatDetector {
        let before = |ms: u64| now.checked_sub(Duration::from_millis(ms)).unwrap_or(now);
        let arrivals = Arrivals::restore(&saved.arrivals, now);
        let heard = arrivals.newest().is_some();
        let named = |state: DetectorState| heard && saved.state == state.name();
        let phase = if named(DetectorState::Up) {
            DetectorPhase::Up
        } else if named(DetectorState::Suspect) {
            DetectorPhase::Suspect(Suspicion {
                cause: SuspicionCause::Silent,
                evidence: "suspect since before the upgrade".to_owned(),
                confirmed: None,
                held: None,
            })
        } else if named(DetectorState::Down) {
            DetectorPhase::Down
        } else if named(DetectorState::Recovering) {
            DetectorPhase::Recovering { beats: 1 }
        } else {
            DetectorPhase::Waiting
        };
        let asks = matches!(phase, DetectorPhase::Suspect(_) | DetectorPhase::Recovering { .. });
        let hold = |ms: u64| now + Duration::from_millis(ms).min(HOLD_MAX);
        HeartbeatDetector {
            arrivals,
            answer_time: AnswerTime::knowing(saved.reach),
            phase,
            since: before(saved.since_ms),
            round: None,
            next_round: asks.then_some(now),
            try_serial: 0,
            was_down: saved.was_down,
            hold_until: saved.hold_ms.map(hold),
            flaps: FlapDamping::of(saved.flaps, saved.up_ms.map(before)),
            answered_at: saved.answered_ms.map(before),
            suspicions_total: saved.suspicions_total.min(u64::MAX / 2),
            downs_total: saved.downs_total.min(u64::MAX / 2),
        }
    }

    /// Returns incarnation, sequence number and time of the newest heartbeat.
    pub fn newest(&self) -> Option<((u64, u64), Instant)> {
        self.arrivals.newest().zip(self.arrivals.newest_at())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suspicion::{ArrivalOrder, BeatInfo, ChannelState};
    use proptest::prelude::*;

    const INTERVAL: Duration = Duration::from_secs(5);

    fn heard(beats: u64) -> (HeartbeatDetector, Instant) {
        let mut now = tidegate_net::clock::now();
        let mut detector = HeartbeatDetector::new(INTERVAL, now);
        for sequence in 1..=beats {
            let beat = BeatInfo { incarnation: 3, sequence, interval: INTERVAL };
            let (_, step) = detector.beat(&beat, now);
            if let Some(crate::suspicion::DetectorRequest::Probe(next)) = step.request {
                let _ = detector.probed(next.id, crate::suspicion::TryResult::Answered, now);
            }
            now += INTERVAL;
        }
        (detector, now)
    }

    fn next(old: &HeartbeatDetector, now: Instant) -> HeartbeatDetector {
        let text = serde_json::to_string(&old.save(now)).unwrap();
        HeartbeatDetector::restore(&serde_json::from_str(&text).unwrap(), now)
    }

    #[test]
    fn backend_stays_up_after_an_upgrade_and_a_later_failure_is_detected() {
        let (old, now) = heard(50);
        assert_eq!(old.state(), DetectorState::Up);
        let mut new = next(&old, now);
        assert_eq!(new.state(), DetectorState::Up);
        let (was, is) = (old.reading(now), new.reading(now));
        assert_eq!((was.loss, was.jitter, was.sequence), (is.loss, is.jitter, is.sequence));
        assert_eq!((was.beats_total, was.timeout), (is.beats_total, is.timeout));
        let due = new.due().expect("an up backend has a due time");
        let _ = new.check(ChannelState::Alive, due);
        assert_eq!(new.state(), DetectorState::Suspect);
    }

    #[test]
    fn heartbeats_during_the_handover_are_not_learned_as_loss() {
        let (old, now) = heard(50);
        let mut new = next(&old, now);
        let loss = new.reading(now).loss;
        let beat = BeatInfo { incarnation: 3, sequence: 53, interval: INTERVAL };
        assert_eq!(new.beat(&beat, now + INTERVAL).0, ArrivalOrder::Next { missing: 2 });
        assert_eq!(new.reading(now).loss, loss);
        let again = new.beat(&BeatInfo { sequence: 20, ..beat }, now + INTERVAL).0;
        assert_eq!(again, ArrivalOrder::Old, "received before the upgrade");
    }

    proptest! {
        #[test]
        fn detector_works_after_restoring_arbitrary_values(
            numbers: [f64; 8], newest: Option<(u64, u64)>, state in "up|down|suspect|recovering|x",
            ms: [u64; 4],
        ) {
            let [interval, spacing, variance, loss, slow_loss, losses, repeats, since_loss] = numbers;
            let saved = SavedDetector {
                state, since_ms: ms[0], hold_ms: Some(ms[1]), answered_ms: Some(ms[2]),
                reach: Some((loss, variance)), flaps: u32::MAX,
                arrivals: SavedArrivals {
                    newest, newest_ms: ms[3], interval, spacing, variance, delays: u32::MAX, loss,
                    slow_loss, datagrams: u32::MAX, losses, repeats, since_loss,
                    beats_total: u64::MAX, lost_total: u64::MAX,
                },
                ..SavedDetector::default()
            };
            let mut now = tidegate_net::clock::now();
            let mut detector = HeartbeatDetector::restore(&saved, now);
            for sequence in 0..4 {
                now += Duration::from_millis(ms[0] % 100_000);
                let beat = BeatInfo { incarnation: 7, sequence, interval: INTERVAL };
                let _ = detector.beat(&beat, now);
                let _ = detector.check(ChannelState::Alive, now);
                detector.reading(now);
                detector.due();
                detector.save(now);
            }
        }
    }
}
