//! What a sender's heartbeats teach: how many get lost, how much they are
//! delayed, and how long a silence may last.
//!
//! Each detector owns one. It believes whatever it is given (signatures and
//! replays are checked before), never reads a clock, and judges nobody.
//!
//! Losses come from gaps in the sequence numbers alone, delays from arrivals
//! against the time expected for their sequence number, so neither spoils the
//! other. The expected time follows an alpha-beta filter: it settles on the
//! true phase and the true interval, also of a sender whose clock is off.

mod saved;

pub use saved::SavedArrivals;

use super::{BeatInfo, INTERVAL_MAX, INTERVAL_MIN};
use std::time::{Duration, Instant};

/// Wanted time between two false suspicions of one backend.
const SUSPICION_EVERY: Duration = Duration::from_secs(4 * 3600);

/// Heartbeats that may be missing, whatever was measured: fewer than three is
/// two lost packets, more than twelve breaks the bound on detection.
const MISSING_MIN: u32 = 3;
const MISSING_MAX: u32 = 12;

/// A silence is never allowed to last longer, in intervals.
const TIMEOUT_MAX: f64 = 12.5;

/// Added to the missing intervals, as a share of one: timers and queues here.
const SLACK: f64 = 0.1;

/// Deviations added to the missing intervals. Three are plenty: the last of
/// several heartbeats has to be late after all others were lost.
const DEVIATIONS: f64 = 3.0;

/// Weight of the newest datagram in the share of losses: a memory of a
/// thousand, 100 s at 100 ms.
const LOSS_GAIN: f64 = 0.001;

/// The same for how often runs of losses begin: on a good link that is so rare
/// that a hundred seconds without are no news.
const SLOW_LOSS_GAIN: f64 = 0.000_33;

/// The share before the first datagram, and the datagrams it counts for. High
/// enough to allow four missing at first; a minute of heartbeats outweighs it.
const LOSS_PRIOR: f64 = 0.02;
const LOSS_PRIOR_COUNT: u32 = 100;

/// Bounds of the share: one loss in ten thousand is as good as none, and above
/// 60 % no number of heartbeats within the bound would do.
const LOSS_MIN: f64 = 0.0001;
const LOSS_MAX: f64 = 0.6;

/// Memory of how often one loss follows another, in losses and in heartbeats
/// (half a day at 100 ms: on a good link bursts are rare, and each would be
/// news).
const RUN_MEMORY_LOSSES: f64 = 500.0;
const RUN_MEMORY_BEATS: f64 = 500_000.0;

/// Losses that speak for independence before any have been seen: a lone pair
/// of losses is no burst.
const RUN_PRIOR: f64 = 30.0;

/// Gains of the filter for the expected time (alpha) and the interval (beta).
/// Slow enough to average delays away, fast enough to follow a clock that is
/// 1 % off within a few ten heartbeats.
const PHASE_GAIN: f64 = 0.125;
const SPACING_GAIN: f64 = 0.004;

/// Weight of the newest delay in the variance, once there are that many.
const JITTER_MEMORY: u32 = 128;

/// The deviation before the first delay, as a share of the interval, and the
/// delays it counts for.
const JITTER_PRIOR: f64 = 0.1;
const JITTER_PRIOR_COUNT: u32 = 8;

/// The learned interval stays within these multiples of the declared one: a
/// sender that is slower than that breaks its word, and is suspected.
const SPACING_MIN: f64 = 0.5;
const SPACING_MAX: f64 = 3.0;

/// Delays beyond that many intervals teach only so much.
const DELAY_MAX: f64 = 2.0;

/// Longer gaps are outages, not losses.
const LEARNED_GAP_MAX: u64 = 16;

/// What one heartbeat was, as far as its order goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArrivalOrder {
    /// The first of its sender, or of its sender's new incarnation.
    First,
    /// Newer than all before, with that many missing in between.
    Next {
        /// Sequence numbers skipped.
        missing: u64,
    },
    /// Late, repeated, or of an incarnation that is over: says nothing.
    Old,
}

/// See the module's documentation.
#[derive(Debug, Clone)]
pub struct Arrivals {
    newest: Option<NewestBeat>,
    /// As declared, in seconds, within [`INTERVAL_MIN`]..=[`INTERVAL_MAX`].
    interval: f64,
    /// As learned, in seconds.
    spacing: f64,
    /// Of delays, in seconds squared.
    variance: f64,
    delays: u32,
    loss: f64,
    /// The same with a longer memory.
    slow_loss: f64,
    datagrams: u32,
    /// Losses remembered, and how many of them followed a loss.
    losses: f64,
    repeats: f64,
    since_loss: f64,
    /// Until then heartbeats set the phase and teach nothing.
    unlearning_until: Option<Instant>,
    /// The next gap is not the path's doing.
    gap_excused: bool,
    beats_total: u64,
    lost_total: u64,
}

#[derive(Debug, Clone, Copy)]
struct NewestBeat {
    incarnation: u64,
    sequence: u64,
    arrived: Instant,
    /// How much later than expected it came, in seconds, smoothed.
    lag: f64,
}

/// `at`, as much later as was lost, but not later than `now`.
pub(super) fn later(at: Instant, lost: Duration, now: Instant) -> Instant {
    at.checked_add(lost).map_or(now, |later| later.min(now)).max(at)
}

// === impl Arrivals ===

impl Arrivals {
    /// Nothing received yet; `interval` is what the pool expects.
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

    /// Takes one heartbeat. `ends_outage`: the silence before it was no mere
    /// loss (the backend was down), so it teaches nothing.
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

    /// We, not the sender or the path, were the cause of what is missing (a
    /// stall, a full socket buffer): the next gap teaches nothing, nor do
    /// heartbeats that had queued up and come all at once, and the time `lost`
    /// does not count as silence. What was silence before stays silence.
    pub fn skip_gap(&mut self, lost: Duration, now: Instant) {
        self.gap_excused = true;
        self.unlearning_until = Some(now + Duration::from_secs_f64(2.0 * self.interval));
        if let Some(newest) = &mut self.newest {
            newest.arrived = later(newest.arrived, lost, now);
        }
    }

    /// How many heartbeats may be missing in a row: the fewest that make a
    /// false suspicion rarer than one in four hours, if losses go on as
    /// measured.
    pub fn missing_allowed(&self) -> u32 {
        let wanted = self.interval / SUSPICION_EVERY.as_secs_f64();
        let (loss, again) = (self.loss(), self.loss_after_loss());
        let independent = wanted.ln() / loss.ln();
        // A run of k losses begins with one after a heartbeat that came, and
        // goes on k - 1 times.
        let starts = loss.max(self.slow_loss) * (1.0 - again);
        let in_runs = 1.0 + ((wanted / starts).ln() / again.ln()).max(0.0).ceil();
        let missing = independent.ceil().max(in_runs);
        (missing as u32).clamp(MISSING_MIN, MISSING_MAX)
    }

    /// How long a silence may last, from the expected time of the newest
    /// heartbeat.
    pub fn timeout(&self) -> Duration {
        let missing = f64::from(self.missing_allowed()) + SLACK;
        let timeout = missing * self.spacing + DEVIATIONS * self.variance.sqrt();
        Duration::from_secs_f64(timeout.min(TIMEOUT_MAX * self.interval))
    }

    /// When the silence becomes suspicious; `None` before the first heartbeat.
    pub fn deadline(&self) -> Option<Instant> {
        let newest = self.newest?;
        let timeout = self.timeout().as_secs_f64() - newest.lag;
        let timeout = timeout.clamp(self.interval, TIMEOUT_MAX * self.interval);
        Some(newest.arrived + Duration::from_secs_f64(timeout))
    }

    /// Share of heartbeats lost, as a fraction.
    pub fn loss(&self) -> f64 {
        self.loss.clamp(LOSS_MIN, LOSS_MAX)
    }

    /// Share of losses followed by another, as a fraction; [`Arrivals::loss`]
    /// where losses are independent.
    pub fn loss_after_loss(&self) -> f64 {
        let measured = (self.repeats + RUN_PRIOR * self.loss) / (self.losses + RUN_PRIOR);
        // Below one, for its logarithm is divided by.
        measured.clamp(self.loss(), 0.95)
    }

    /// Deviation of arrivals from their expected times.
    pub fn jitter(&self) -> Duration {
        Duration::from_secs_f64(self.variance.sqrt())
    }

    /// The interval as declared.
    pub fn interval(&self) -> Duration {
        Duration::from_secs_f64(self.interval)
    }

    /// The interval as learned.
    pub fn mean_interval(&self) -> Duration {
        Duration::from_secs_f64(self.spacing)
    }

    /// When the newest heartbeat came (or silence began to count, after
    /// [`Arrivals::skip_gap`]).
    pub fn newest_at(&self) -> Option<Instant> {
        self.newest.map(|newest| newest.arrived)
    }

    /// Incarnation and sequence number of the newest heartbeat.
    pub fn newest(&self) -> Option<(u64, u64)> {
        self.newest.map(|newest| (newest.incarnation, newest.sequence))
    }

    /// Heartbeats that counted, of all incarnations.
    pub fn beats_total(&self) -> u64 {
        self.beats_total
    }

    /// Sequence numbers skipped, of all incarnations, for whatever reason.
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

    /// Takes over the sender's interval; true if it is another one. Losses stay
    /// known: they are the path's.
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

    /// Learns from `missing` losses followed by a heartbeat that came.
    fn learn_loss(&mut self, missing: u64) {
        self.since_loss += 1.0;
        for lost in (0..=missing).map(|index| if index < missing { 1.0 } else { 0.0 }) {
            self.datagrams = self.datagrams.saturating_add(1);
            // A plain mean at first, a moving one once there are enough.
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

    /// Learns from one arrival, `steps` sequence numbers after `before`, and
    /// gives its lag.
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
