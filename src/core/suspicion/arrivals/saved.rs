//! Handover of a backend's heartbeat statistics in an upgrade.
//!
//! Called by `detector::saved`. Restored values are clamped: no value can make the
//! detector panic or ignore failures.

use super::{
    Arrivals, INTERVAL_MAX, INTERVAL_MIN, JITTER_MEMORY, JITTER_PRIOR, JITTER_PRIOR_COUNT,
    LOSS_PRIOR, NewestBeat, SPACING_MAX, SPACING_MIN,
};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// [`Arrivals`] in a handover. Times are relative to the moment of saving.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SavedArrivals {
    /// Incarnation and sequence number of the newest heartbeat.
    pub newest: Option<(u64, u64)>,
    /// Age of the newest heartbeat, in milliseconds.
    pub newest_ms: u64,
    /// Declared interval, in seconds.
    pub interval: f64,
    /// Learned interval, in seconds.
    pub spacing: f64,
    /// Variance of delays, in seconds squared.
    pub variance: f64,
    /// Number of delays in the variance.
    pub delays: u32,
    /// Loss rate.
    pub loss: f64,
    /// Loss rate with a longer memory.
    pub slow_loss: f64,
    /// Datagrams in both loss rates.
    pub datagrams: u32,
    /// Losses in memory.
    pub losses: f64,
    /// Of `losses`, those that followed a loss.
    pub repeats: f64,
    /// Heartbeats since the last loss.
    pub since_loss: f64,
    /// Heartbeats counted.
    pub beats_total: u64,
    /// Sequence numbers skipped.
    pub lost_total: u64,
}

/// Upper bounds for restored values; the memory never holds as many.
const LOSSES_MAX: f64 = 1e6;
const BEATS_MAX: f64 = 1e12;

// === impl Arrivals ===

impl Arrivals {
    pub(in crate::suspicion) fn save(&self, now: Instant) -> SavedArrivals {
        let ago = |then: Instant| {
            u64::try_from(now.saturating_duration_since(then).as_millis()).unwrap_or(u64::MAX)
        };
        SavedArrivals {
            newest: self.newest(),
            newest_ms: self.newest_at().map_or(0, ago),
            interval: self.interval,
            spacing: self.spacing,
            variance: self.variance,
            delays: self.delays,
            loss: self.loss,
            slow_loss: self.slow_loss,
            datagrams: self.datagrams,
            losses: self.losses,
            repeats: self.repeats,
            since_loss: self.since_loss,
            beats_total: self.beats_total,
            lost_total: self.lost_total,
        }
    }

    /// Restores statistics that the old process handed over at `now`. The next gap is not
    /// learned, because this process received no heartbeats during the handover.
    pub(in crate::suspicion) fn restore(saved: &SavedArrivals, now: Instant) -> Arrivals {
        let within = |value: f64, from: f64, to: f64, other: f64| {
            if value.is_finite() { value.clamp(from, to) } else { other }
        };
        let (least, most) = (INTERVAL_MIN.as_secs_f64(), INTERVAL_MAX.as_secs_f64());
        let interval = within(saved.interval, least, most, most);
        let losses = within(saved.losses, 0.0, LOSSES_MAX, 0.0);
        let before = |ms| now.checked_sub(Duration::from_millis(ms)).unwrap_or(now);
        let newest = saved.newest.map(|(incarnation, sequence)| NewestBeat {
            incarnation,
            sequence,
            arrived: before(saved.newest_ms),
            lag: 0.0,
        });
        let usual = (JITTER_PRIOR * interval).powi(2);
        let mut arrivals = Arrivals {
            newest,
            interval,
            spacing: within(
                saved.spacing,
                SPACING_MIN * interval,
                SPACING_MAX * interval,
                interval,
            ),
            variance: within(saved.variance, 0.0, interval * interval, usual),
            delays: saved.delays.min(JITTER_MEMORY - JITTER_PRIOR_COUNT),
            loss: within(saved.loss, 0.0, 1.0, LOSS_PRIOR),
            slow_loss: within(saved.slow_loss, 0.0, 1.0, LOSS_PRIOR),
            datagrams: saved.datagrams,
            losses,
            repeats: within(saved.repeats, 0.0, losses, 0.0),
            since_loss: within(saved.since_loss, 0.0, BEATS_MAX, 0.0),
            unlearning_until: None,
            gap_excused: false,
            beats_total: saved.beats_total.min(u64::MAX / 2),
            lost_total: saved.lost_total.min(u64::MAX / 2),
        };
        arrivals.skip_gap(Duration::MAX, now);
        arrivals
    }
}
