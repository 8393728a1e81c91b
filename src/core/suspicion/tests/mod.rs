//! Tests of the heartbeat detector in virtual time.
//!
//! [`Lab`] takes the place of the controller for one backend. `tests/detector_sim` measures
//! the detector on lossy links.

mod arbitrary_input;
mod guarding;
mod learning;
mod state_machine;

use super::*;
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_millis(100);

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn failed() -> TryResult {
    TryResult::Failed("connect timed out".to_owned())
}

/// One detector with its sender and the time.
struct Lab {
    detector: HeartbeatDetector,
    now: Instant,
    sequence: u64,
    incarnation: u64,
    /// The newest requested try.
    next_try: Option<ConfirmationTry>,
    /// The last request of any kind.
    request: Option<DetectorRequest>,
    /// Transitions so far, as `from>to`.
    transitions: Vec<String>,
    reason: String,
}

impl Lab {
    fn new() -> Lab {
        let now = tidegate_net::clock::now();
        Lab {
            detector: HeartbeatDetector::new(INTERVAL, now),
            now,
            sequence: 0,
            incarnation: 1,
            next_try: None,
            request: None,
            transitions: Vec::new(),
            reason: String::new(),
        }
    }

    /// Returns an up detector after 101 heartbeats without loss.
    fn up() -> Lab {
        let mut lab = Lab::new();
        lab.beat();
        lab.answer(TryResult::Answered);
        lab.beats(100);
        assert_eq!(lab.detector.state(), DetectorState::Up);
        lab.transitions.clear();
        lab.request = None;
        lab
    }

    /// Returns a detector that is down after a confirmed silence.
    fn down() -> Lab {
        let mut lab = Lab::up();
        lab.stop_heartbeats();
        lab.answer(failed());
        lab.answer(failed());
        lab.eject();
        lab.transitions.clear();
        lab
    }

    /// Delivers the next heartbeat, an interval later.
    fn beat(&mut self) {
        self.now += INTERVAL;
        self.beat_now();
    }

    fn beat_now(&mut self) {
        self.sequence += 1;
        let Lab { incarnation, sequence, now, .. } = *self;
        let beat = BeatInfo { incarnation, sequence, interval: INTERVAL };
        let (_, step) = self.detector.beat(&beat, now);
        self.take(step);
    }

    fn beats(&mut self, count: u32) {
        for _ in 0..count {
            self.beat();
        }
    }

    /// Delivers no heartbeat until the next one is overdue.
    fn stop_heartbeats(&mut self) {
        let due = self.detector.due().expect("a heartbeat is expected");
        self.check_at(due, ChannelState::Alive);
    }

    fn check_at(&mut self, at: Instant, channel: ChannelState) {
        self.now = self.now.max(at);
        let step = self.detector.check(channel, self.now);
        self.take(step);
    }

    fn wait(&mut self, wait: Duration) {
        self.check_at(self.now + wait, ChannelState::Alive);
    }

    fn answer(&mut self, answer: TryResult) {
        let asked = self.next_try.take().expect("a try was requested");
        if matches!(answer, TryResult::Failed(_)) {
            self.now += asked.timeout;
        }
        let step = self.detector.probed(asked.id, answer, self.now);
        self.take(step);
    }

    fn eject(&mut self) {
        assert!(matches!(self.request, Some(DetectorRequest::Eject { .. })), "{:?}", self.request);
        let step = self.detector.eject(self.now);
        self.take(step);
    }

    fn take(&mut self, step: DetectorStep) {
        if let Some(change) = &step.change {
            self.transitions.push(format!("{}>{}", change.from.name(), change.to.name()));
            self.reason.clone_from(&change.reason);
        }
        if let Some(DetectorRequest::Probe(asked)) = step.request {
            self.next_try = Some(asked);
        }
        if step.request.is_some() {
            self.request = step.request;
        }
    }
}
