//! One point of the comparison: one detector on one kind of link, for a given number of
//! heartbeats.
//!
//! The detector watches a healthy backend. At regular intervals a copy of the detector sees
//! the backend fail at a random moment. A seed replays a point.

use super::judge::{INTERVAL, Judge, Tidegate};
use super::link::{Link, MILLI, Micros, Pattern, SECOND};
use super::rivals::{Akka, Cassandra, Gaps, Independent, Phi, RiseFall, Silence};
use fastrand::Rng;

/// After a later arrival, even a calm judge must check its due time.
const LATE: Micros = 60 * MILLI;

/// The detector to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DetectorKind {
    Tidegate,
    Independent,
    Phi,
    Akka,
    Cassandra,
    Checks2s,
    Checks100ms,
}

/// The point to run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Point {
    pub(crate) kind: DetectorKind,
    pub(crate) pattern: Pattern,
    pub(crate) loss: f64,
    pub(crate) beats: u64,
    /// Simulated failures.
    pub(crate) deaths: u64,
    pub(crate) seed: u64,
}

/// Result of a point.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outcome {
    pub(crate) hours: f64,
    pub(crate) suspicions: u64,
    pub(crate) ejections: u64,
    /// Detection times, sorted.
    pub(crate) detections: Vec<Micros>,
}

// === impl DetectorKind ===

impl DetectorKind {
    pub(crate) const ALL: [DetectorKind; 7] = [
        DetectorKind::Tidegate,
        DetectorKind::Independent,
        DetectorKind::Phi,
        DetectorKind::Akka,
        DetectorKind::Cassandra,
        DetectorKind::Checks2s,
        DetectorKind::Checks100ms,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            DetectorKind::Tidegate => "tidegate",
            DetectorKind::Independent => "tidegate, no burst memory",
            DetectorKind::Phi => "phi 8 + 2 probes",
            DetectorKind::Akka => "phi 8, Akka's defaults",
            DetectorKind::Cassandra => "phi 8, Cassandra's",
            DetectorKind::Checks2s => "checks 2 s, fall 3",
            DetectorKind::Checks100ms => "checks 100 ms, fall 3",
        }
    }

    pub(crate) fn key(self) -> &'static str {
        match self {
            DetectorKind::Tidegate => "tidegate",
            DetectorKind::Independent => "tidegate-independent",
            DetectorKind::Phi => "phi",
            DetectorKind::Akka => "akka",
            DetectorKind::Cassandra => "cassandra",
            DetectorKind::Checks2s => "checks-2s",
            DetectorKind::Checks100ms => "checks-100ms",
        }
    }
}

// === impl Point ===

impl Point {
    pub(crate) fn run(self) -> Outcome {
        let start = tidegate_net::clock::now();
        let mut outcome = match self.kind {
            DetectorKind::Tidegate => self.watch(Tidegate::new(start)),
            DetectorKind::Independent => self.watch(Silence::new(Independent::new(start))),
            DetectorKind::Phi => self.watch(Silence::new(Phi(Gaps::new()))),
            DetectorKind::Akka => self.watch(Silence::new(Akka(Gaps::new()))),
            DetectorKind::Cassandra => self.watch(Silence::new(Cassandra(Gaps::new()))),
            DetectorKind::Checks2s => self.check(2 * SECOND),
            DetectorKind::Checks100ms => self.check(INTERVAL),
        };
        outcome.hours = (self.beats * INTERVAL) as f64 / SECOND as f64 / 3_600.0;
        outcome.detections.sort_unstable();
        outcome
    }

    fn check(self, interval: Micros) -> Outcome {
        let mut link = Link::new(self.pattern, self.loss, self.seed);
        let mut rng = Rng::with_seed(self.seed);
        let checks = RiseFall { interval, rise: 2, fall: 3 };
        let end = self.beats * INTERVAL;
        let (ejections, detections) = checks.run(&mut link, end, self.deaths, &mut rng);
        Outcome { ejections, detections, ..Outcome::default() }
    }

    fn watch<J: Judge>(self, mut judge: J) -> Outcome {
        let mut link = Link::new(self.pattern, self.loss, self.seed);
        let mut rng = Rng::with_seed(self.seed);
        let every = (self.beats / self.deaths.max(1)).max(1);
        let mut detections = Vec::new();
        let (mut missing, mut last) = (0, 0);
        let mut due = Micros::MAX;
        for sequence in 0..self.beats {
            let sent = sequence * INTERVAL;
            act_until(sent, &mut judge, &mut due, &mut link);
            if let Some(arrival) = link.heartbeat(sent) {
                // A path is a queue: datagrams do not overtake.
                let arrival = arrival.max(last);
                last = arrival;
                if missing > J::CALM || arrival > sent + LATE {
                    due = judge.due();
                }
                act_until(arrival, &mut judge, &mut due, &mut link);
                judge.beat(sequence, arrival, &mut link);
                missing = 0;
                due = if judge.calm() { Micros::MAX } else { judge.due() };
            } else {
                missing += 1;
                if missing > J::CALM || !judge.calm() {
                    due = judge.due();
                }
            }
            if sequence % every == every - 1 && !judge.down() {
                let death = sent + rng.u64(0..INTERVAL);
                detections.push(
                    detect_failure(judge.clone(), link.failed_backend()).saturating_sub(death),
                );
            }
        }
        let (suspicions, ejections) = judge.counts();
        Outcome { hours: 0.0, suspicions, ejections, detections }
    }
}

// === impl Outcome ===

impl Outcome {
    /// Returns the `share` quantile of the detection times, in milliseconds.
    pub(crate) fn detection(&self, share: f64) -> f64 {
        let last = self.detections.len().saturating_sub(1);
        let index = (last as f64 * share).round() as usize;
        self.detections.get(index).map_or(f64::NAN, |at| *at as f64 / MILLI as f64)
    }

    pub(crate) fn ejections_per_hour(&self) -> f64 {
        self.ejections as f64 / self.hours
    }

    pub(crate) fn suspicions_per_hour(&self) -> f64 {
        self.suspicions as f64 / self.hours
    }
}

fn act_until<J: Judge>(until: Micros, judge: &mut J, due: &mut Micros, link: &mut Link) {
    while *due <= until {
        let now = *due;
        judge.act(now, link);
        *due = judge.due();
        assert!(*due > now, "the due time is later after an action");
    }
}

/// Returns when a judge without further heartbeats finds the backend down.
fn detect_failure<J: Judge>(mut judge: J, mut link: Link) -> Micros {
    loop {
        let due = judge.due();
        assert!(due < Micros::MAX, "a failed backend is detected");
        judge.act(due, &mut link);
        if judge.down() {
            return due;
        }
    }
}
