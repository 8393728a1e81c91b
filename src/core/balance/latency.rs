//! Latency of a backend: two peak EWMAs that all workers write.
//!
//! Part of a backend's state, so tables and reloads keep it. Workers write it when a
//! connection is established and when a first byte arrives. Picks of `peak-ewma` read
//! it. It never blocks, never allocates and reads no clock.
//!
//! # The estimate
//!
//! - A sample above the estimate replaces it, so a slow backend is noticed after one
//!   sample.
//! - A sample below it lowers it, weighted by the time since the last sample: `w =
//!   e^(-age / TAU)`, `estimate = estimate * w + sample * (1 - w)`. This is Finagle's
//!   `PeakEwma`, also used by tower and linkerd2-proxy.
//! - A read returns the estimate multiplied by the same `w`. A backend that is not
//!   picked because it was slow looks better with time, until it is picked and measured
//!   again.
//! - Samples are compared with this decayed estimate. A sample above it replaces the
//!   estimate and is not averaged with it.
//! - An estimate below [`KNOWN_MIN`] counts as unknown.
//!
//! Connect and first byte have separate estimates, which are added. With one estimate,
//! the fast connect of a session would lower the value before its slow answer is
//! measured. The duration of a session has no influence.

use crossbeam::utils::CachePadded;
#[cfg(feature = "loom")]
use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(feature = "loom"))]
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Time constant of the decay: after it 37 % of a peak remain. The same value as in
/// linkerd2-proxy. A backend that is 100 times slower than the others is tried again
/// after about 46 s.
pub const TAU: Duration = Duration::from_secs(10);

/// Estimates below this, in microseconds, count as unknown: no connect is that fast.
const KNOWN_MIN: f32 = 1.0;

/// Lower bits of the word: time of the sample in milliseconds. They wrap after two
/// years. In the second of these years an old estimate looks fresh.
const STAMP_BITS: u32 = 36;
const STAMP_MASK: u64 = (1 << STAMP_BITS) - 1;

/// Upper bits of the word: the estimate, a positive `f32` without its sign bit and its
/// last three bits. The rounding error is one in a million.
const DROPPED_BITS: u32 = 3;

/// Latency estimates of a backend; see the module's documentation.
#[derive(Debug)]
pub struct Latency(CachePadded<LatencyCells>);

#[derive(Debug)]
struct LatencyCells {
    connect: Peak,
    first_byte: Peak,
}

/// A peak EWMA: estimate and time in one word.
#[derive(Debug)]
struct Peak(AtomicU64);

// === impl Latency ===

impl Latency {
    /// Creates a latency without estimates.
    pub fn new() -> Latency {
        Latency(CachePadded::new(LatencyCells { connect: Peak::new(), first_byte: Peak::new() }))
    }

    /// Records the duration of a connect. `at` is in milliseconds of a clock that all
    /// callers share (`net::clock::millis`).
    pub fn connected(&self, took: Duration, at: u64) {
        self.0.connect.note(took, at);
    }

    /// Records the time from the client's first byte to the backend's first byte.
    pub fn answered(&self, took: Duration, at: u64) {
        self.0.first_byte.note(took, at);
    }

    /// Returns both estimates at time `at`, in microseconds, for another process:
    /// connect, first byte. `None` if nothing is known or the estimates have decayed.
    pub fn save(&self, at: u64) -> Option<[f32; 2]> {
        self.estimate(at).map(|_| [self.0.connect.read(at), self.0.first_byte.read(at)])
    }

    /// Applies the estimates of another process as samples taken now. A higher local
    /// estimate stays.
    pub fn restore(&self, saved: [f32; 2], at: u64) {
        for (peak, micros) in [&self.0.connect, &self.0.first_byte].into_iter().zip(saved) {
            // Values below `KNOWN_MIN`, not a number, or beyond a `Duration` are
            // ignored.
            let took = Duration::try_from_secs_f64(f64::from(micros) / 1e6);
            if let Ok(took) = took
                && micros >= KNOWN_MIN
            {
                peak.note(took, at);
            }
        }
    }

    /// Returns the estimate at time `at`, in microseconds. `None` if nothing is known
    /// or the estimate has decayed.
    #[inline]
    pub fn estimate(&self, at: u64) -> Option<f32> {
        let sum = self.0.connect.read(at) + self.0.first_byte.read(at);
        (sum >= KNOWN_MIN).then_some(sum)
    }
}

impl Default for Latency {
    fn default() -> Self {
        Latency::new()
    }
}

// === impl Peak ===

impl Peak {
    fn new() -> Peak {
        Peak(AtomicU64::new(0))
    }

    fn note(&self, took: Duration, at: u64) {
        let sample = (took.as_nanos() as f32 / 1e3).max(KNOWN_MIN);
        let mut held = self.0.load(Ordering::Relaxed);
        loop {
            let next = fold(held, sample, at);
            if next == held {
                return;
            }
            // Relaxed: the word holds everything, and no other memory depends on it.
            match self.0.compare_exchange_weak(held, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => held = now,
            }
        }
    }

    #[inline]
    fn read(&self, at: u64) -> f32 {
        let word = self.0.load(Ordering::Relaxed);
        estimate_of(word) * left_after(age(word, at))
    }
}

/// Returns the word after a sample, in microseconds.
fn fold(word: u64, sample: f32, at: u64) -> u64 {
    let held = estimate_of(word);
    // The clock of another worker can be ahead: the later time stays.
    let (age, at) = match age(word, at) {
        0 if word != 0 => (0, word),
        age => (age, at),
    };
    let w = left_after(age);
    let estimate = if sample >= held * w { sample } else { held * w + sample * (1.0 - w) };
    u64::from(estimate.to_bits() >> DROPPED_BITS) << STAMP_BITS | at & STAMP_MASK
}

#[inline]
fn estimate_of(word: u64) -> f32 {
    f32::from_bits(((word >> STAMP_BITS) as u32) << DROPPED_BITS)
}

/// Returns the milliseconds from the word's time to `at`; 0 if `at` is earlier.
#[inline]
fn age(word: u64, at: u64) -> u64 {
    let age = at.wrapping_sub(word) & STAMP_MASK;
    if age > STAMP_MASK / 2 { 0 } else { age }
}

/// Returns the fraction of an estimate that remains at this age.
#[inline]
fn left_after(age: u64) -> f32 {
    if age == 0 { 1.0 } else { (age as f32 * (-1.0 / TAU.as_millis() as f32)).exp() }
}

#[cfg(test)]
#[cfg(not(feature = "loom"))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: f32 = 1000.0;

    fn millis(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn near(a: Option<f32>, b: f32) -> bool {
        a.is_some_and(|a| (a / b - 1.0).abs() < 1e-3)
    }

    #[test]
    fn peak_applies_immediately_and_decays_with_time() {
        let latency = Latency::new();
        assert_eq!(latency.estimate(5), None);
        latency.connected(millis(1), 10);
        latency.connected(millis(50), 10);
        assert!(near(latency.estimate(10), 50.0 * MS));
        assert!(near(latency.estimate(10_010), 50.0 * MS / std::f32::consts::E));
    }

    #[test]
    fn smaller_sample_lowers_the_estimate_by_elapsed_time() {
        let latency = Latency::new();
        latency.answered(millis(50), 0);
        latency.answered(millis(10), 0);
        assert!(near(latency.estimate(0), 50.0 * MS), "no time has passed");
        latency.answered(millis(10), 10_000);
        let w = (-1.0f32).exp();
        assert!(near(latency.estimate(10_000), (50.0 * w + 10.0 * (1.0 - w)) * MS));
    }

    #[test]
    fn fast_connects_do_not_lower_the_estimate_of_slow_answers() {
        let latency = Latency::new();
        latency.answered(millis(50), 0);
        latency.connected(millis(1), 1_000_000);
        latency.answered(millis(50), 1_000_001);
        for at in 1_000_001..1_000_100 {
            latency.connected(millis(1), at);
        }
        assert!(latency.estimate(1_000_100) > Some(50.0 * MS));
    }

    #[test]
    fn estimate_without_samples_decays_to_unknown() {
        let latency = Latency::new();
        latency.answered(Duration::from_secs(1), 0);
        assert!(latency.estimate(46_000) < Some(11.0 * MS), "100 times less after 46 s");
        assert_eq!(latency.estimate(200_000), None);
    }

    #[test]
    fn restored_estimate_equals_the_saved_one_and_continues_to_decay() {
        let (old, new) = (Latency::new(), Latency::new());
        assert_eq!(old.save(5), None);
        old.connected(millis(2), 0);
        old.answered(millis(50), 0);
        new.restore(old.save(10_000).expect("an estimate is known"), 77);
        assert!(near(new.estimate(77), 52.0 * MS / std::f32::consts::E));
        assert!(near(new.estimate(10_077), 52.0 * MS / std::f32::consts::E.powi(2)));
        new.restore([f32::NAN, -1.0], 10_077);
        new.restore([f32::INFINITY, 0.0], 10_077);
        assert!(near(new.estimate(10_077), 52.0 * MS / std::f32::consts::E.powi(2)));
    }

    #[test]
    fn sample_with_an_earlier_time_does_not_decay_the_estimate() {
        let latency = Latency::new();
        latency.connected(millis(8), 1_000);
        latency.connected(millis(2), 900);
        assert!(near(latency.estimate(800), 8.0 * MS));
        latency.connected(millis(9), 900);
        assert!(near(latency.estimate(1_000), 9.0 * MS));
    }

    proptest! {
        #[test]
        fn estimate_matches_the_formula_and_stays_within_its_samples(
            samples in prop::collection::vec((1u64..10_000_000, 0u64..20_000), 1..100),
        ) {
            let peak = Peak::new();
            let (mut at, mut expected) = (0u64, 0f64);
            for (micros, step) in &samples {
                at += step;
                let sample = *micros as f64;
                let w = (-(*step as f64) / 10_000.0).exp();
                let faded = expected * w;
                expected = if sample >= faded { sample } else { faded + sample * (1.0 - w) };
                peak.note(Duration::from_micros(*micros), at);
                let got = f64::from(peak.read(at));
                prop_assert!((got / expected - 1.0).abs() < 1e-3, "{got} for {expected}");
            }
            let all = samples.iter().map(|(micros, _)| *micros as f64);
            let (low, high) = all.fold((f64::MAX, 0f64), |(l, h), s| (l.min(s), h.max(s)));
            let got = f64::from(peak.read(at));
            prop_assert!(got >= low * 0.999 && got <= high * 1.001, "{low} {got} {high}");
        }
    }
}

#[cfg(all(test, feature = "loom"))]
mod loom_models {
    use super::*;
    use loom::thread;
    use std::sync::Arc;

    #[test]
    fn highest_of_concurrent_samples_is_kept() {
        loom::model(|| {
            let peak = Arc::new(Peak::new());
            let others: Vec<_> = [30, 20]
                .map(|n| {
                    let peak = Arc::clone(&peak);
                    thread::spawn(move || peak.note(Duration::from_micros(n), 7))
                })
                .into();
            peak.note(Duration::from_micros(10), 7);
            others.into_iter().for_each(|other| other.join().expect("no panic"));
            assert!((peak.read(7) - 30.0).abs() < 0.01);
        });
    }
}
