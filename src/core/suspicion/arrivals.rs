//! Statistics of one sender's heartbeats: loss, delay, and the timeout that follows.
//!
//! Each detector owns one. The caller has checked signatures and replays. This code reads
//! no clock and decides no state.
//!
//! - Loss is measured from gaps in the sequence numbers only.
//! - Delay is measured against the time expected for a sequence number, so losses do not
//!   affect it.
//! - An alpha-beta filter estimates the expected time. It converges to the sender's phase
//!   and interval, even if the sender's clock runs at a different speed.

mod saved;

pub use saved::SavedArrivals;

use super::{BeatInfo, INTERVAL_MAX, INTERVAL_MIN};
use std::time::{Duration, Instant};

/// Target time between two false suspicions of one backend.
const SUSPICION_EVERY: Duration = Duration::from_secs(4 * 3600);

/// Bounds of the missing heartbeats allowed. Two lost packets must not cause a suspicion;
/// more than 12 would exceed the bound on detection time.
const MISSING_MIN: u32 = 3;
const MISSING_MAX: u32 = 12;

/// Longest timeout, in intervals.
const TIMEOUT_MAX: f64 = 12.5;

/// Added to the missing intervals, as a share of one: local timers and queues.
const SLACK: f64 = 0.1;

/// Standard deviations added to the missing intervals. Three are sufficient, because a
/// false suspicion needs several losses and then a late heartbeat.
const DEVIATIONS: f64 = 3.0;

/// Weight of the newest datagram in the loss rate: a memory of 1,000 datagrams, 100 s at
/// 100 ms.
const LOSS_GAIN: f64 = 0.001;

/// Weight of the newest datagram in the slow loss rate, which estimates how often runs of
/// losses begin. On a good link they are too rare for a memory of 100 s.
const SLOW_LOSS_GAIN: f64 = 0.000_33;

/// Initial loss rate, and the number of datagrams it counts for. It allows four missing
/// heartbeats at first. After a minute of heartbeats, the measurement dominates.
const LOSS_PRIOR: f64 = 0.02;
const LOSS_PRIOR_COUNT: u32 = 100;

/// Bounds of the loss rate. Below, a loss is negligible. Above, no number of heartbeats
/// within the bound on detection time is sufficient.
const LOSS_MIN: f64 = 0.0001;
const LOSS_MAX: f64 = 0.6;

/// Memory of how often one loss follows another, in losses and in heartbeats. Half a day
/// at 100 ms, because bursts are rare on a good link.
const RUN_MEMORY_LOSSES: f64 = 500.0;
const RUN_MEMORY_BEATS: f64 = 500_000.0;

/// Initial number of independent losses, so that a single pair of losses is no burst.
const RUN_PRIOR: f64 = 30.0;

/// Gains of the filter for the expected time (alpha) and the interval (beta). Small enough
/// to average delays, large enough to follow a clock that is 1 % off within tens of
/// heartbeats.
const PHASE_GAIN: f64 = 0.125;
const SPACING_GAIN: f64 = 0.004;

/// Memory of the variance, in delays.
const JITTER_MEMORY: u32 = 128;

/// Initial deviation, as a share of the interval, and the number of delays it counts for.
const JITTER_PRIOR: f64 = 0.1;
const JITTER_PRIOR_COUNT: u32 = 8;

/// Bounds of the learned interval, in declared intervals. A slower sender becomes suspect.
const SPACING_MIN: f64 = 0.5;
const SPACING_MAX: f64 = 3.0;

/// Longest delay that is learned, in intervals.
const DELAY_MAX: f64 = 2.0;

/// Longest gap that counts as loss, in heartbeats. A longer gap is an outage.
const LEARNED_GAP_MAX: u64 = 16;

/// Order of a heartbeat relative to the earlier ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArrivalOrder {
    /// The first of its sender, or of its sender's new incarnation.
    First,
    /// Newer than all before.
    Next {
        /// Sequence numbers skipped.
        missing: u64,
    },
    /// Late, repeated, or of an earlier incarnation. Does not count.
    Old,
}

/// See the module documentation.
#[derive(Debug, Clone)]
pub struct Arrivals {
    newest: Option<NewestBeat>,
    /// Declared interval in seconds, within [`INTERVAL_MIN`]..=[`INTERVAL_MAX`].
    interval: f64,
    /// Learned interval in seconds.
    spacing: f64,
    /// Variance of delays, in seconds squared.
    variance: f64,
    delays: u32,
    loss: f64,
    /// Loss rate with a longer memory.
    slow_loss: f64,
    datagrams: u32,
    /// Losses in memory.
    losses: f64,
    /// Of `losses`, those that followed a loss.
    repeats: f64,
    since_loss: f64,
    /// Until this time heartbeats set the phase and are not learned.
    unlearning_until: Option<Instant>,
    /// The next gap has a local cause and is not learned.
    gap_excused: bool,
    beats_total: u64,
    lost_total: u64,
}

#[derive(Debug, Clone, Copy)]
struct NewestBeat {
    incarnation: u64,
    sequence: u64,
    arrived: Instant,
    /// How much later than expected it arrived, in seconds, smoothed.
    lag: f64,
}

/// Returns `at` plus `lost`, but at most `now`.
pub(super) fn later(at: Instant, lost: Duration, now: Instant) -> Instant {
    at.checked_add(lost).map_or(now, |later| later.min(now)).max(at)
}

// === impl Arrivals ===

impl Arrivals {
    /// Returns statistics without a heartbeat. `interval` is the one the pool expects.
    pub fn new(interval: Duration) -> Arrivals {
        let interval = seconds(interval);
        Arrivals {
            newest: None,
            interval,
            spacing: interval,
            variance: (JITTER_PRIOR * interval).powi(2),
            delays: 0,
            loss: LOSS_PRIOR,
            slow_loss: LOSS_PRIOR,
            datagrams: 0,
            losses: 0.0,
            repeats: 0.0,
            since_loss: 0.0,
            unlearning_until: None,
            gap_excused: false,
            beats_total: 0,
            lost_total: 0,
        }
    }

    /// Records a heartbeat. `ends_outage`: the backend was down before it, so the gap is
    /// not learned as loss.
    pub fn beat(&mut self, beat: &BeatInfo, ends_outage: bool, now: Instant) -> ArrivalOrder {
        let Some(newest) = self.newest else { return self.first(beat, now) };
        if (beat.incarnation, beat.sequence) <= (newest.incarnation, newest.sequence) {
            return ArrivalOrder::Old;
        }
        if beat.incarnation != newest.incarnation {
            *self = Arrivals {
                beats_total: self.beats_total,
                lost_total: self.lost_total,
                ..Arrivals::new(beat.interval)
            };
            return self.first(beat, now);
        }
        let missing = beat.sequence - newest.sequence - 1;
        self.beats_total += 1;
        self.lost_total = self.lost_total.saturating_add(missing);
        let excused = std::mem::take(&mut self.gap_excused)
            || ends_outage
            || missing > LEARNED_GAP_MAX
            || self.unlearning_until.is_some_and(|until| now < until);
        let redeclared = self.redeclare(beat.interval);
        let lag = if excused || redeclared {
            0.0
        } else {
            self.unlearning_until = None;
            self.learn_loss(missing);
            self.learn_delay(&newest, missing + 1, now)
        };
        let BeatInfo { incarnation, sequence, .. } = *beat;
        self.newest = Some(NewestBeat { incarnation, sequence, arrived: now, lag });
        ArrivalOrder::Next { missing }
    }

    /// Excludes the time `lost` before `now`, because heartbeats were lost or delayed on
    /// this host (a stall, a full socket buffer). The next gap and the heartbeats of the
    /// next two intervals are not learned. `lost` does not count as silence; earlier
    /// silence still does.
    pub fn skip_gap(&mut self, lost: Duration, now: Instant) {
        self.gap_excused = true;
        self.unlearning_until = Some(now + Duration::from_secs_f64(2.0 * self.interval));
        if let Some(newest) = &mut self.newest {
            newest.arrived = later(newest.arrived, lost, now);
        }
    }

    /// Returns how many heartbeats may be missing in a row: the smallest number for which
    /// a false suspicion is rarer than one in four hours at the measured loss.
    pub fn missing_allowed(&self) -> u32 {
        let wanted = self.interval / SUSPICION_EVERY.as_secs_f64();
        let (loss, again) = (self.loss(), self.loss_after_loss());
        let independent = wanted.ln() / loss.ln();
        // A run of k losses begins with a loss after a received heartbeat and continues
        // k - 1 times.
        let starts = loss.max(self.slow_loss) * (1.0 - again);
        let in_runs = 1.0 + ((wanted / starts).ln() / again.ln()).max(0.0).ceil();
        let missing = independent.ceil().max(in_runs);
        (missing as u32).clamp(MISSING_MIN, MISSING_MAX)
    }

    /// Returns how long a silence may last, from the expected time of the newest
    /// heartbeat.
    pub fn timeout(&self) -> Duration {
        let missing = f64::from(self.missing_allowed()) + SLACK;
        let timeout = missing * self.spacing + DEVIATIONS * self.variance.sqrt();
        Duration::from_secs_f64(timeout.min(TIMEOUT_MAX * self.interval))
    }

    /// Returns when the next heartbeat is overdue; `None` before the first heartbeat.
    pub fn deadline(&self) -> Option<Instant> {
        let newest = self.newest?;
        let timeout = self.timeout().as_secs_f64() - newest.lag;
        let timeout = timeout.clamp(self.interval, TIMEOUT_MAX * self.interval);
        Some(newest.arrived + Duration::from_secs_f64(timeout))
    }

    /// Returns the share of heartbeats lost, as a fraction.
    pub fn loss(&self) -> f64 {
        self.loss.clamp(LOSS_MIN, LOSS_MAX)
    }

    /// Returns the share of losses followed by another, as a fraction. Equals
    /// [`Arrivals::loss`] if losses are independent.
    pub fn loss_after_loss(&self) -> f64 {
        let measured = (self.repeats + RUN_PRIOR * self.loss) / (self.losses + RUN_PRIOR);
        // Less than 1, because its logarithm is a divisor.
        measured.clamp(self.loss(), 0.95)
    }

    /// Returns the standard deviation of arrivals from their expected times.
    pub fn jitter(&self) -> Duration {
        Duration::from_secs_f64(self.variance.sqrt())
    }

    /// Returns the declared interval.
    pub fn interval(&self) -> Duration {
        Duration::from_secs_f64(self.interval)
    }

    /// Returns the learned interval.
    pub fn mean_interval(&self) -> Duration {
        Duration::from_secs_f64(self.spacing)
    }

    /// Returns when the newest heartbeat arrived, moved forward by
    /// [`Arrivals::skip_gap`].
    pub fn newest_at(&self) -> Option<Instant> {
        self.newest.map(|newest| newest.arrived)
    }

    /// Returns incarnation and sequence number of the newest heartbeat.
    pub fn newest(&self) -> Option<(u64, u64)> {
        self.newest.map(|newest| (newest.incarnation, newest.sequence))
    }

    /// Returns the heartbeats counted, of all incarnations.
    pub fn beats_total(&self) -> u64 {
        self.beats_total
    }

    /// Returns the sequence numbers skipped, of all incarnations and for any reason.
    pub fn lost_total(&self) -> u64 {
        self.lost_total
    }

    fn first(&mut self, beat: &BeatInfo, now: Instant) -> ArrivalOrder {
        self.redeclare(beat.interval);
        self.beats_total += 1;
        let BeatInfo { incarnation, sequence, .. } = *beat;
        self.newest = Some(NewestBeat { incarnation, sequence, arrived: now, lag: 0.0 });
        ArrivalOrder::First
    }

    /// Adopts the sender's interval. Returns true if it changed. The loss rate stays,
    /// because it belongs to the path.
    fn redeclare(&mut self, interval: Duration) -> bool {
        let interval = seconds(interval);
        if interval == self.interval {
            return false;
        }
        self.interval = interval;
        self.spacing = interval;
        self.variance = (JITTER_PRIOR * interval).powi(2);
        self.delays = 0;
        true
    }

    /// Learns from `missing` losses followed by a received heartbeat.
    fn learn_loss(&mut self, missing: u64) {
        self.since_loss += 1.0;
        for lost in (0..=missing).map(|index| if index < missing { 1.0 } else { 0.0 }) {
            self.datagrams = self.datagrams.saturating_add(1);
            // A plain mean at first, later a moving mean.
            let first = 1.0 / f64::from(self.datagrams.saturating_add(LOSS_PRIOR_COUNT));
            self.loss += first.max(LOSS_GAIN) * (lost - self.loss);
            self.slow_loss += first.max(SLOW_LOSS_GAIN) * (lost - self.slow_loss);
        }
        if missing > 0 {
            let missing = missing as f64;
            let kept = (-self.since_loss / RUN_MEMORY_BEATS - missing / RUN_MEMORY_LOSSES).exp();
            self.losses = self.losses * kept + missing;
            self.repeats = self.repeats * kept + missing - 1.0;
            self.since_loss = 0.0;
        }
    }

    /// Learns from one arrival, `steps` sequence numbers after `before`, and returns its
    /// lag.
    fn learn_delay(&mut self, before: &NewestBeat, steps: u64, now: Instant) -> f64 {
        let steps = steps as f64;
        let gap = now.saturating_duration_since(before.arrived).as_secs_f64();
        let worst = DELAY_MAX * self.interval;
        let delay = (gap + before.lag - steps * self.spacing).clamp(-worst, worst);
        let spacing = self.spacing + SPACING_GAIN * delay / steps;
        self.spacing = spacing.clamp(SPACING_MIN * self.interval, SPACING_MAX * self.interval);
        self.delays = (self.delays + 1).min(JITTER_MEMORY - JITTER_PRIOR_COUNT);
        let gain = 1.0 / f64::from(self.delays + JITTER_PRIOR_COUNT);
        self.variance += gain * (delay * delay - self.variance);
        (1.0 - PHASE_GAIN) * delay
    }
}

fn seconds(interval: Duration) -> f64 {
    interval.clamp(INTERVAL_MIN, INTERVAL_MAX).as_secs_f64()
}
