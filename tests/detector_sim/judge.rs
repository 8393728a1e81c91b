//! Interface of all simulated detectors, and Tidegate's detector behind it.
//!
//! Called by `point`, which drives judges along a link. A judge owns no link and draws no
//! random numbers.

use super::link::{Link, MILLI, Micros};
use std::time::{Duration, Instant};
use tidegate_core::suspicion::{
    BeatInfo, ChannelState, DetectorRequest, DetectorState, DetectorStep, HeartbeatDetector, TryId,
    TryResult,
};

/// Heartbeat interval in all simulations.
pub(crate) const INTERVAL: Micros = 100 * MILLI;

/// A detector in virtual time.
pub(crate) trait Judge: Clone {
    /// Missing heartbeats that never make a calm judge act, so that [`Judge::due`] need not
    /// be called.
    const CALM: u32;

    /// Records a heartbeat.
    fn beat(&mut self, sequence: u64, now: Micros, link: &mut Link);

    /// Returns when to call [`Judge::act`].
    fn due(&self) -> Micros;

    /// Performs due work.
    fn act(&mut self, now: Micros, link: &mut Link);

    /// Whether the backend is up and no probe is running.
    fn calm(&self) -> bool;

    /// Whether the backend is down.
    fn down(&self) -> bool;

    /// Returns suspicions and removals so far.
    fn counts(&self) -> (u64, u64);
}

/// Tidegate's detector behind a controller with a timer of 1 ms, and with guards that allow
/// every removal.
#[derive(Debug, Clone)]
pub(crate) struct Tidegate {
    pub(crate) detector: HeartbeatDetector,
    start: Instant,
    /// The pending result of a try.
    flying: Option<(Micros, TryId, TryResult)>,
    suspicions: u64,
    ejections: u64,
}

// === impl Tidegate ===

impl Tidegate {
    pub(crate) fn new(start: Instant) -> Tidegate {
        let detector = HeartbeatDetector::new(Duration::from_micros(INTERVAL), start);
        Tidegate { detector, start, flying: None, suspicions: 0, ejections: 0 }
    }

    fn instant(&self, at: Micros) -> Instant {
        self.start + Duration::from_micros(at)
    }

    fn follow(&mut self, step: DetectorStep, now: Micros, link: &mut Link) {
        if let Some(change) = step.change {
            match change.to {
                DetectorState::Suspect => self.suspicions += 1,
                DetectorState::Down => self.ejections += 1,
                _ => {}
            }
        }
        match step.request {
            Some(DetectorRequest::Probe(next)) => {
                let end = now + next.timeout.as_micros() as Micros;
                let result = match link.connect(now) {
                    Some(at) if at <= end => (at, next.id, TryResult::Answered),
                    _ => (end, next.id, TryResult::Failed("connect timed out".to_owned())),
                };
                self.flying = Some(result);
            }
            Some(DetectorRequest::Eject { .. }) => {
                let step = self.detector.eject(self.instant(now));
                self.follow(step, now, link);
            }
            None => {}
        }
    }
}

impl Judge for Tidegate {
    const CALM: u32 = 1;

    fn beat(&mut self, sequence: u64, now: Micros, link: &mut Link) {
        let interval = Duration::from_micros(INTERVAL);
        let beat = BeatInfo { incarnation: 1, sequence, interval };
        let (_, step) = self.detector.beat(&beat, self.instant(now));
        if step != DetectorStep::default() {
            self.follow(step, now, link);
        }
    }

    fn due(&self) -> Micros {
        let due = self.detector.due().map_or(Micros::MAX, |due| {
            // Timers have a resolution of 1 ms.
            ((due - self.start).as_nanos().div_ceil(1_000_000)) as Micros * MILLI
        });
        due.min(self.flying.as_ref().map_or(Micros::MAX, |(at, ..)| *at))
    }

    fn act(&mut self, now: Micros, link: &mut Link) {
        if let Some((_, id, answer)) = self.flying.take_if(|(at, ..)| *at <= now) {
            let step = self.detector.probed(id, answer, self.instant(now));
            self.follow(step, now, link);
        }
        if self.detector.due().is_some_and(|due| due <= self.instant(now)) {
            let step = self.detector.check(ChannelState::Alive, self.instant(now));
            self.follow(step, now, link);
        }
    }

    fn calm(&self) -> bool {
        self.detector.state() == DetectorState::Up && self.flying.is_none()
    }

    fn down(&self) -> bool {
        self.detector.state() == DetectorState::Down
    }

    fn counts(&self) -> (u64, u64) {
        (self.suspicions, self.ejections)
    }
}
