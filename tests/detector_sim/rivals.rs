//! Other detectors on the same links: phi accrual in plain form and with the settings of
//! Akka and Cassandra, Tidegate's detector without its memory of bursts, and HAProxy's
//! rise/fall.
//!
//! Each is simplified in its favour: it checks continuously, and is up again with the next
//! heartbeat.

use super::judge::{INTERVAL, Judge};
use super::link::{Link, Micros, SECOND, TRY};
use std::time::{Duration, Instant};
use tidegate_core::suspicion::{Arrivals, BeatInfo};

/// Gaps in the memory of the phi detectors.
const WINDOW: usize = 1_000;

/// Deviations above the mean at which phi is 8: exact, and in Akka's logistic
/// approximation.
const EXACT_8: f64 = 5.612_001;
const LOGISTIC_8: f64 = 5.223_4;

/// How long a silence may last.
pub(crate) trait Patience: Clone {
    const CALM: u32;
    /// Whether two failed tries of a probe must confirm a suspicion.
    const PROBES: bool;
    fn beat(&mut self, sequence: u64, gap: Option<Micros>, now: Micros);
    fn timeout(&self) -> Micros;
}

/// Down after a silence, up with the next heartbeat.
#[derive(Debug, Clone)]
pub(crate) struct Silence<P> {
    patience: P,
    last: Option<Micros>,
    standing: Standing,
    suspicions: u64,
    ejections: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    In,
    /// Number of failed tries, and the time of the next one.
    Trying {
        failed: u32,
        at: Micros,
    },
    Out,
}

/// The newest [`WINDOW`] gaps between heartbeats.
#[derive(Debug, Clone)]
pub(crate) struct Gaps {
    gaps: Vec<u32>,
    next: usize,
    sum: u64,
    squares: u64,
}

/// Phi 8, normal tail, deviation at least 20 ms, confirmed by probes as in Tidegate.
#[derive(Debug, Clone)]
pub(crate) struct Phi(pub(crate) Gaps);

/// Akka's defaults: phi 8, deviation at least 100 ms, a pause of 3 s accepted.
#[derive(Debug, Clone)]
pub(crate) struct Akka(pub(crate) Gaps);

/// Cassandra's defaults: phi 8, exponential tail, gaps above 2 s ignored.
#[derive(Debug, Clone)]
pub(crate) struct Cassandra(pub(crate) Gaps);

/// Tidegate's detector as if losses were always independent.
#[derive(Debug, Clone)]
pub(crate) struct Independent {
    arrivals: Arrivals,
    start: Instant,
}

/// HAProxy's checks: connects every `interval`, `fall` failures in a row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RiseFall {
    pub(crate) interval: Micros,
    pub(crate) rise: u32,
    pub(crate) fall: u32,
}

// === impl Gaps ===

impl Gaps {
    pub(crate) fn new() -> Gaps {
        let gap = INTERVAL as u32;
        let (sum, squares) = (INTERVAL * WINDOW as u64, INTERVAL * INTERVAL * WINDOW as u64);
        Gaps { gaps: vec![gap; WINDOW], next: 0, sum, squares }
    }

    fn push(&mut self, gap: Micros) {
        let gap = gap.min(60 * SECOND);
        let old = u64::from(std::mem::replace(&mut self.gaps[self.next], gap as u32));
        self.next = (self.next + 1) % WINDOW;
        self.sum = self.sum + gap - old;
        self.squares = self.squares + gap * gap - old * old;
    }

    fn mean(&self) -> f64 {
        self.sum as f64 / WINDOW as f64
    }

    fn deviation(&self) -> f64 {
        (self.squares as f64 / WINDOW as f64 - self.mean().powi(2)).max(0.0).sqrt()
    }
}

// === impl Patience ===

impl Patience for Phi {
    const CALM: u32 = 0;
    const PROBES: bool = true;

    fn beat(&mut self, _: u64, gap: Option<Micros>, _: Micros) {
        self.0.push(gap.unwrap_or(INTERVAL));
    }

    fn timeout(&self) -> Micros {
        let deviation = self.0.deviation().max(20_000.0);
        (self.0.mean() + EXACT_8 * deviation) as Micros
    }
}

impl Patience for Akka {
    const CALM: u32 = 20;
    const PROBES: bool = false;

    fn beat(&mut self, _: u64, gap: Option<Micros>, _: Micros) {
        self.0.push(gap.unwrap_or(INTERVAL));
    }

    fn timeout(&self) -> Micros {
        let deviation = self.0.deviation().max(100_000.0);
        (self.0.mean() + 3e6 + LOGISTIC_8 * deviation) as Micros
    }
}

impl Patience for Cassandra {
    const CALM: u32 = 10;
    const PROBES: bool = false;

    fn beat(&mut self, _: u64, gap: Option<Micros>, _: Micros) {
        let gap = gap.unwrap_or(INTERVAL);
        if gap <= 2 * SECOND {
            self.0.push(gap);
        }
    }

    fn timeout(&self) -> Micros {
        (8.0 * std::f64::consts::LN_10 * self.0.mean()) as Micros
    }
}

impl Independent {
    pub(crate) fn new(start: Instant) -> Independent {
        Independent { arrivals: Arrivals::new(Duration::from_micros(INTERVAL)), start }
    }
}

impl Patience for Independent {
    const CALM: u32 = 1;
    const PROBES: bool = true;

    fn beat(&mut self, sequence: u64, _: Option<Micros>, now: Micros) {
        let interval = Duration::from_micros(INTERVAL);
        let beat = BeatInfo { incarnation: 1, sequence, interval };
        self.arrivals.beat(&beat, false, self.start + Duration::from_micros(now));
    }

    fn timeout(&self) -> Micros {
        let missing = (0.1 / 14_400.0_f64).ln() / self.arrivals.loss().ln();
        let missing = missing.ceil().clamp(3.0, 12.0);
        let jitter = 4 * self.arrivals.jitter().as_micros() as Micros;
        ((missing + 0.2) * INTERVAL as f64) as Micros + jitter
    }
}

// === impl Silence ===

impl<P: Patience> Silence<P> {
    pub(crate) fn new(patience: P) -> Silence<P> {
        Silence { patience, last: None, standing: Standing::In, suspicions: 0, ejections: 0 }
    }

    /// Runs the next try, or applies the result of the last.
    fn try_at(&mut self, now: Micros, failed: u32, link: &mut Link) {
        self.standing = if !P::PROBES || failed == 2 {
            self.ejections += 1;
            Standing::Out
        } else if link.connect(now).is_some_and(|at| at <= now + TRY) {
            // The backend answers: probe again after 1 s, as Tidegate does.
            Standing::Trying { failed: 0, at: now + SECOND }
        } else {
            Standing::Trying { failed: failed + 1, at: now + TRY }
        };
    }
}

impl<P: Patience> Judge for Silence<P> {
    const CALM: u32 = P::CALM;

    fn beat(&mut self, sequence: u64, now: Micros, _: &mut Link) {
        let gap = self.last.map(|last| now.saturating_sub(last));
        self.patience.beat(sequence, gap, now);
        self.last = Some(now.max(self.last.unwrap_or(0)));
        self.standing = Standing::In;
    }

    fn due(&self) -> Micros {
        match (self.standing, self.last) {
            (Standing::In, Some(last)) => last + self.patience.timeout(),
            (Standing::Trying { at, .. }, _) => at,
            _ => Micros::MAX,
        }
    }

    fn act(&mut self, now: Micros, link: &mut Link) {
        match self.standing {
            Standing::In => {
                self.suspicions += 1;
                self.try_at(now, 0, link);
            }
            Standing::Trying { failed, .. } => self.try_at(now, failed, link),
            Standing::Out => {}
        }
    }

    fn calm(&self) -> bool {
        self.standing == Standing::In
    }

    fn down(&self) -> bool {
        self.standing == Standing::Out
    }

    fn counts(&self) -> (u64, u64) {
        (self.suspicions, self.ejections)
    }
}

// === impl RiseFall ===

impl RiseFall {
    /// Checks a healthy backend until `end`. Returns false removals and the detection times
    /// of a failure at a random moment after each of `samples` checks.
    pub(crate) fn run(
        self,
        link: &mut Link,
        end: Micros,
        samples: u64,
        rng: &mut fastrand::Rng,
    ) -> (u64, Vec<Micros>) {
        let (mut failures, mut successes, mut up, mut ejections) = (0, 0, true, 0);
        let mut detections = Vec::new();
        let checks = (end / self.interval).max(1);
        let every = (checks / samples.max(1)).max(1);
        for check in 0..checks {
            let at = check * self.interval;
            let answered = link.connect_patiently(at, self.interval);
            if answered.is_some_and(|at_end| at_end <= at + self.interval) {
                failures = 0;
                successes += 1;
                up |= successes >= self.rise;
            } else {
                successes = 0;
                failures += 1;
                if up && failures >= self.fall {
                    up = false;
                    ejections += 1;
                }
            }
            if up && check % every == 0 {
                // All further checks time out.
                let until_next = rng.u64(0..self.interval);
                let left = u64::from(self.fall.saturating_sub(failures));
                detections.push(until_next + left * self.interval);
            }
        }
        (ejections, detections)
    }
}

/// Whether the constants match their definitions. Called by `main`.
pub(crate) fn constants_hold() -> bool {
    use tidegate_core::suspicion::phi;
    let at = Duration::from_secs_f64(1.0 + EXACT_8 * 0.1);
    let exact = phi::normal(at, Duration::from_secs(1), Duration::from_millis(100));
    let y = LOGISTIC_8;
    let logistic = (y * (1.597_6 + 0.070_566 * y * y)).exp().ln_1p() / std::f64::consts::LN_10;
    // The tail of the approximation is 1 / (1 + e^x).
    (exact - 8.0).abs() < 1e-4 && (logistic - 8.0).abs() < 0.01
}
