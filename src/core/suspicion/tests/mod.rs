//! Tests of the heartbeat detector: learning, judging, guarding.
//!
//! All in virtual time, through a small laboratory that plays the controller
//! for one backend. `tests/detector_sim` measures it on lossy links.

mod guarding;
mod judging;
mod learning;
mod surprises;

use super::*;
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_millis(100);

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn failed() -> TryResult {
    TryResult::Failed("connect timed out".to_owned())
}

/// One detector, its sender, and the time.
struct Lab {
    detector: HeartbeatDetector,
    now: Instant,
    sequence: u64,
    incarnation: u64,
    /// The newest try asked for.
    asked: Option<ConfirmationTry>,
    /// What was asked for last, of whatever kind.
    ask: Option<DetectorRequest>,
    /// Changes so far, as `from>to`.
    story: Vec<String>,
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
            asked: None,
            ask: None,
            story: Vec::new(),
            reason: String::new(),
        }
    }

    /// Up, with a hundred heartbeats heard and nothing lost.
    fn up() -> Lab {
        let mut lab = Lab::new();
        lab.beat();
        lab.answer(TryResult::Answered);
        lab.beats(100);
        assert_eq!(lab.detector.state(), DetectorState::Up);
        lab.story.clear();
        lab.ask = None;
        lab
    }

    /// Down after a silence.
    fn down() -> Lab {
        let mut lab = Lab::up();
        lab.fall_silent();
        lab.answer(failed());
        lab.answer(failed());
        lab.eject();
        lab.story.clear();
        lab
    }

    /// The next heartbeat, an interval later.
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

    /// Heartbeats get lost until the detector minds.
    fn fall_silent(&mut self) {
        self.check_at(self.detector.due().expect("it waits for a heartbeat"), ChannelState::Alive);
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
        let asked = self.asked.take().expect("a try was asked for");
        if matches!(answer, TryResult::Failed(_)) {
            self.now += asked.timeout;
        }
        let step = self.detector.probed(asked.id, answer, self.now);
        self.take(step);
    }

    fn eject(&mut self) {
        assert!(matches!(self.ask, Some(DetectorRequest::Eject { .. })), "{:?}", self.ask);
        let step = self.detector.eject(self.now);
        self.take(step);
    }

    fn take(&mut self, step: DetectorStep) {
        if let Some(change) = &step.change {
            self.story.push(format!("{}>{}", change.from.name(), change.to.name()));
            self.reason.clone_from(&change.reason);
        }
        if let Some(DetectorRequest::Probe(asked)) = step.ask {
            self.asked = Some(asked);
        }
        if step.ask.is_some() {
            self.ask = step.ask;
        }
    }
}
