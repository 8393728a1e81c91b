//! Limits the rate of datagrams that are verified.
//!
//! Used by [`super::Verifier`] before it computes a hash. It identifies sources by IP
//! address and never reads the content of a datagram.
//!
//! # Rate limits
//!
//! | sources | limit per second |
//! |---|---|
//! | all known sources together | [`KNOWN_PER_SECOND_MAX`] |
//! | all unknown sources together | [`UNKNOWN_PER_SECOND_MAX`] |
//! | one unknown source | [`UNKNOWN_PER_SOURCE_MAX`] |
//!
//! A source is known after an accepted heartbeat. A source address can be forged, so a
//! known source has no limit of its own: forged datagrams would use it up. The limit for
//! all known sources costs a few percent of a CPU core and is above a usual flood of
//! small datagrams. The limit per unknown source leaves capacity for a backend that has
//! just started.
//!
//! # Above a limit
//!
//! Datagrams pass at random. The probability is chosen so that the flood of the last
//! second would have fit below the limit. With F forged datagrams per second, a limit of W
//! per second and R heartbeats per second, a new backend is first accepted after about
//! F / (W·R) seconds. Example: 100,000 forged datagrams with its address against a limit
//! of 5,000, at 10 heartbeats per second: 2 s. After that its source is known.

use super::RejectReason;
use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Datagrams of all known sources that are verified per second.
pub const KNOWN_PER_SECOND_MAX: u32 = 200_000;

/// Datagrams of all unknown sources that are verified per second.
pub const UNKNOWN_PER_SECOND_MAX: u32 = 50_000;

/// Datagrams of one unknown source, or of sources that share its slot, that are verified
/// per second.
pub const UNKNOWN_PER_SOURCE_MAX: u32 = 5_000;

/// Slots for unknown sources: enough that two senders rarely share one.
pub const SLOTS: usize = 4096;

/// Known sources at most: one per sender.
pub const KNOWN_MAX: usize = super::SENDERS_MAX;

/// How long a source stays known after its last accepted heartbeat. During this time, a
/// restarted sender is not limited as an unknown source.
pub const KNOWN_FOR: Duration = Duration::from_secs(300);

/// Rates are counted in steps of 100 ms.
const STEP: Duration = Duration::from_millis(100);
const STEPS_PER_SECOND: u32 = 10;

/// Steps for which the peak of a flood is remembered. A flood with shorter pauses is
/// treated as continuous.
const PEAK_STEPS: u64 = 10;

/// Shortest time between two sweeps for expired sources. A sweep visits all sources.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// The rate limits of known and unknown sources.
#[derive(Debug)]
pub(super) struct Limiter {
    known: HashMap<IpAddr, Instant>,
    known_limit: RateLimit,
    unknown_limit: RateLimit,
    slots: Box<[RateLimit]>,
    random: fastrand::Rng,
    hash_seed: u64,
    /// Time of the first datagram. Steps are counted from this time.
    epoch: Option<Instant>,
    swept: Option<Instant>,
}

/// One rate limit.
#[derive(Debug, Clone)]
struct RateLimit {
    /// Datagrams that pass per step at most.
    width: u32,
    step: u64,
    arrived: u32,
    passed: u32,
    /// Largest number of datagrams in a recent step, and the number of that step.
    peak: u32,
    peak_step: u64,
}

// === impl Limiter ===

impl Limiter {
    pub(super) fn new(seed: u64) -> Limiter {
        let mut random = fastrand::Rng::with_seed(seed);
        let hash_seed = random.u64(..);
        Limiter {
            known: HashMap::new(),
            known_limit: RateLimit::new(KNOWN_PER_SECOND_MAX),
            unknown_limit: RateLimit::new(UNKNOWN_PER_SECOND_MAX),
            slots: vec![RateLimit::new(UNKNOWN_PER_SOURCE_MAX); SLOTS].into(),
            random,
            hash_seed,
            epoch: None,
            swept: None,
        }
    }

    /// Checks whether another datagram of `source` can be verified.
    pub(super) fn pass(&mut self, source: IpAddr, now: Instant) -> Result<(), RejectReason> {
        let epoch = *self.epoch.get_or_insert(now);
        let step = (now.saturating_duration_since(epoch).as_millis() / STEP.as_millis()) as u64;
        if self.is_known(source, now) {
            let passes = self.known_limit.pass(step, &mut self.random);
            return if passes { Ok(()) } else { Err(RejectReason::Overload) };
        }
        let slot = self.slot(source);
        let passes = self.slots[slot].pass(step, &mut self.random)
            && self.unknown_limit.pass(step, &mut self.random);
        if passes { Ok(()) } else { Err(RejectReason::Limited) }
    }

    /// Makes `source` known after an accepted heartbeat.
    pub(super) fn set_known(&mut self, source: IpAddr, now: Instant) {
        if let Some(last) = self.known.get_mut(&source) {
            *last = now;
            return;
        }
        if self.known.len() >= KNOWN_MAX {
            self.sweep(now);
        }
        if self.known.len() < KNOWN_MAX {
            self.known.insert(source, now);
        }
    }

    fn is_known(&self, source: IpAddr, now: Instant) -> bool {
        let last = self.known.get(&source);
        last.is_some_and(|last| now.saturating_duration_since(*last) < KNOWN_FOR)
    }

    fn sweep(&mut self, now: Instant) {
        let due = self.swept.is_none_or(|at| now.saturating_duration_since(at) >= SWEEP_EVERY);
        if due {
            self.swept = Some(now);
            self.known.retain(|_, last| now.saturating_duration_since(*last) < KNOWN_FOR);
        }
    }

    /// Returns the slot of an unknown source. All addresses of an IPv6 /64 share a slot,
    /// because a single host usually owns the whole /64.
    fn slot(&self, source: IpAddr) -> usize {
        let hash = match source {
            IpAddr::V4(ip) => xxh3_64_with_seed(&ip.octets(), self.hash_seed),
            IpAddr::V6(ip) => xxh3_64_with_seed(&ip.octets()[..8], self.hash_seed),
        };
        (hash % SLOTS as u64) as usize
    }
}

// === impl RateLimit ===

impl RateLimit {
    fn new(per_second: u32) -> RateLimit {
        RateLimit {
            width: per_second / STEPS_PER_SECOND,
            step: 0,
            arrived: 0,
            passed: 0,
            peak: 0,
            peak_step: 0,
        }
    }

    /// Returns whether a datagram passes. At most `width` datagrams pass per step. During a
    /// flood, each datagram has the same probability.
    fn pass(&mut self, step: u64, random: &mut fastrand::Rng) -> bool {
        if step > self.step {
            if self.arrived >= self.peak || step - self.peak_step > PEAK_STEPS {
                (self.peak, self.peak_step) = (self.arrived, self.step);
            }
            (self.step, self.arrived, self.passed) = (step, 0, 0);
        }
        self.arrived = self.arrived.saturating_add(1);
        // The probability is an eighth below `width`. At the full width, random variation
        // would reach the limit before the end of every second step.
        let drawn = self.peak <= self.width
            || random.u32(..self.peak) < self.width.saturating_sub(self.width / 8);
        let passes = drawn && self.passed < self.width;
        self.passed += u32::from(passes);
        passes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(limit: &mut RateLimit, step: u64, count: u32, random: &mut fastrand::Rng) -> u32 {
        (0..count).map(|_| u32::from(limit.pass(step, random))).sum()
    }

    #[test]
    fn everything_passes_below_the_limit() {
        let (mut limit, mut random) = (RateLimit::new(1_000), fastrand::Rng::with_seed(1));
        for step in 0..50 {
            assert_eq!(passed(&mut limit, step, 100, &mut random), 100);
        }
    }

    #[test]
    fn flood_is_limited_to_the_width() {
        let (mut limit, mut random) = (RateLimit::new(1_000), fastrand::Rng::with_seed(1));
        for step in 0..50 {
            let passed = passed(&mut limit, step, 10_000, &mut random);
            assert!(passed <= 100 && (step == 0 || passed > 60), "step {step}: {passed}");
        }
    }

    #[test]
    fn first_and_last_datagram_of_a_step_have_the_same_probability() {
        let (mut limit, mut random) = (RateLimit::new(1_000), fastrand::Rng::with_seed(1));
        passed(&mut limit, 0, 1_000, &mut random);
        let (mut first, mut last) = (0, 0);
        for step in 1..2_000 {
            first += u32::from(limit.pass(step, &mut random));
            passed(&mut limit, step, 998, &mut random);
            last += u32::from(limit.pass(step, &mut random));
        }
        for count in [first, last] {
            assert!((130..220).contains(&count), "about 175 of 2,000: {first} and {last}");
        }
    }

    #[test]
    fn flood_in_every_second_step_is_also_limited_at_random() {
        let (mut limit, mut random) = (RateLimit::new(1_000), fastrand::Rng::with_seed(1));
        let mut last = 0;
        for step in (0..2_000).step_by(2) {
            passed(&mut limit, step, 999, &mut random);
            last += u32::from(limit.pass(step, &mut random));
        }
        assert!((50..150).contains(&last), "about 87 of 1,000: {last}");
    }

    #[test]
    fn full_width_is_available_one_second_after_a_flood() {
        let (mut limit, mut random) = (RateLimit::new(1_000), fastrand::Rng::with_seed(1));
        passed(&mut limit, 0, 10_000, &mut random);
        passed(&mut limit, 11, 1, &mut random);
        assert_eq!(passed(&mut limit, 12, 100, &mut random), 100);
    }
}
