//! What a backend's answers take: two peak EWMAs that all workers write.
//!
//! Lives with a backend's state, so that tables and reloads keep it; written by
//! workers when a connection stands and when a first byte comes, read by the
//! picks of `peak-ewma`. Never blocks, never allocates, reads no clock.
//!
//! # The estimate
//!
//! A sample above the estimate becomes the estimate (a backend that gets slow
//! is known to be at once); one below it pulls it down by as much as time has
//! passed: `w = e^(-age / TAU)`, `estimate = estimate * w + sample * (1 - w)`
//! (Finagle's `PeakEwma`, which tower and linkerd2-proxy took over). Read later,
//! it has faded by the same `w`: a backend that nobody chose because it once was
//! slow looks better with time, until it is chosen again and says how it is now.
//! (So it is the faded estimate that a sample is above or below of: one that has
//! faded below how things are is replaced, not averaged with.) Below
//! [`KNOWN_MIN`] nothing is left of it, and nothing is known.
//!
//! Connect and first byte are kept apart and added up: in one estimate, the
//! quick connect of a session would pull down what its slow answer is about to
//! say. The length of a session never counts.

use crossbeam::utils::CachePadded;
#[cfg(tidegate_loom)]
use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(tidegate_loom))]
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How long what was seen stays of weight: after it 37 % of a peak are left. As
/// long as in linkerd2-proxy; a backend 100 times slower than the others is
/// tried again after some 46 seconds.
pub const TAU: Duration = Duration::from_secs(10);

/// Estimates below this, in microseconds, are as good as none: no connect is
/// that quick.
const KNOWN_MIN: f32 = 1.0;

/// The word's lower bits: milliseconds of the sample's time. They go around
/// after two years; an estimate is taken for fresh again in the second of them.
const STAMP_BITS: u32 = 36;
const STAMP_MASK: u64 = (1 << STAMP_BITS) - 1;

/// The upper bits: the estimate, a positive `f32` without its sign and its last
/// three bits, which leaves it good to one in a million.
const DROPPED_BITS: u32 = 3;

/// See the module's documentation.
#[derive(Debug)]
pub struct Latency(CachePadded<LatencyCells>);

#[derive(Debug)]
struct LatencyCells {
    connect: Peak,
    first_byte: Peak,
}

/// One peak EWMA: estimate and time in one word.
#[derive(Debug)]
struct Peak(AtomicU64);

// === impl Latency ===

impl Latency {
    /// Nothing known.
    pub fn new() -> Latency {
        Latency(CachePadded::new(LatencyCells { connect: Peak::new(), first_byte: Peak::new() }))
    }

    /// A connect took that long. `at` is in milliseconds on a clock that all
    /// callers share (`net::clock::millis`).
    pub fn connected(&self, took: Duration, at: u64) {
        self.0.connect.note(took, at);
    }

    /// A backend's first byte came that long after the client's.
    pub fn answered(&self, took: Duration, at: u64) {
        self.0.first_byte.note(took, at);
    }

    /// Both estimates at that time, in microseconds, for another process: to
    /// connect, and to the first byte. `None` where nothing is known (any more).
    pub fn save(&self, at: u64) -> Option<[f32; 2]> {
        self.estimate(at).map(|_| [self.0.connect.read(at), self.0.first_byte.read(at)])
    }

    /// Goes on with what another process knew, as if it had been seen now: a worse
    /// one seen here meanwhile stays.
    pub fn restore(&self, saved: [f32; 2], at: u64) {
        for (peak, micros) in [&self.0.connect, &self.0.first_byte].into_iter().zip(saved) {
            // Of less nothing is left; beyond a `Duration`, or no number, nothing is meant.
            let took = Duration::try_from_secs_f64(f64::from(micros) / 1e6);
            if let Ok(took) = took
                && micros >= KNOWN_MIN
            {
                peak.note(took, at);
            }
        }
    }

    /// The estimate at that time, in microseconds; `None` where nothing is
    /// known (any more).
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
            // The word carries all there is: no other memory hangs on it.
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

/// The word after one more sample, in microseconds.
fn fold(word: u64, sample: f32, at: u64) -> u64 {
    let held = estimate_of(word);
    // Another worker's clock may be ahead: its time stays.
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

/// Milliseconds from the word's time to `at`; 0 where that is before it.
#[inline]
fn age(word: u64, at: u64) -> u64 {
    let age = at.wrapping_sub(word) & STAMP_MASK;
    if age > STAMP_MASK / 2 { 0 } else { age }
}

/// What is left of an estimate of that age.
#[inline]
fn left_after(age: u64) -> f32 {
    if age == 0 { 1.0 } else { (age as f32 * (-1.0 / TAU.as_millis() as f32)).exp() }
}

#[cfg(test)]
#[cfg(not(tidegate_loom))]
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
    fn peak_counts_at_once_and_fades_with_time() {
        let latency = Latency::new();
        assert_eq!(latency.estimate(5), None);
        latency.connected(millis(1), 10);
        latency.connected(millis(50), 10);
        assert!(near(latency.estimate(10), 50.0 * MS));
        assert!(near(latency.estimate(10_010), 50.0 * MS / std::f32::consts::E));
    }

    #[test]
    fn smaller_sample_pulls_by_as_much_as_time_has_passed() {
        let latency = Latency::new();
        latency.answered(millis(50), 0);
        latency.answered(millis(10), 0);
        assert!(near(latency.estimate(0), 50.0 * MS), "no time has passed");
        latency.answered(millis(10), 10_000);
        let w = (-1.0f32).exp();
        assert!(near(latency.estimate(10_000), (50.0 * w + 10.0 * (1.0 - w)) * MS));
    }

    #[test]
    fn connect_and_first_byte_add_up_and_a_quick_connect_hides_no_slow_answer() {
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
    fn slow_one_that_is_left_alone_is_forgotten() {
        let latency = Latency::new();
        latency.answered(Duration::from_secs(1), 0);
        assert!(latency.estimate(46_000) < Some(11.0 * MS), "100 times less after 46 s");
        assert_eq!(latency.estimate(200_000), None);
    }

    #[test]
    fn what_is_restored_elsewhere_is_what_was_saved_and_fades_on() {
        let (old, new) = (Latency::new(), Latency::new());
        assert_eq!(old.save(5), None);
        old.connected(millis(2), 0);
        old.answered(millis(50), 0);
        new.restore(old.save(10_000).expect("something is known"), 77);
        assert!(near(new.estimate(77), 52.0 * MS / std::f32::consts::E));
        assert!(near(new.estimate(10_077), 52.0 * MS / std::f32::consts::E.powi(2)));
        new.restore([f32::NAN, -1.0], 10_077);
        new.restore([f32::INFINITY, 0.0], 10_077);
        assert!(near(new.estimate(10_077), 52.0 * MS / std::f32::consts::E.powi(2)));
    }

    #[test]
    fn time_that_seems_to_run_backwards_changes_nothing() {
        let latency = Latency::new();
        latency.connected(millis(8), 1_000);
        latency.connected(millis(2), 900);
        assert!(near(latency.estimate(800), 8.0 * MS));
        latency.connected(millis(9), 900);
        assert!(near(latency.estimate(1_000), 9.0 * MS));
    }

    proptest! {
        #[test]
        fn estimate_follows_the_plain_formula_and_stays_among_its_samples(
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

#[cfg(all(test, tidegate_loom))]
mod loom_models {
    use super::*;
    use loom::thread;
    use std::sync::Arc;

    #[test]
    fn highest_of_simultaneous_samples_is_kept() {
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
