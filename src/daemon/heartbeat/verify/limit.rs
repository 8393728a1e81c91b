//! How many datagrams may be verified: the narrow gate and the wide one.
//!
//! Used by [`super::Verifier`] before it hashes anything. It knows sources by their
//! IP address and judges nothing but numbers.
//!
//! # Why two gates
//!
//! A source address can be forged, and its real owner must not suffer for it.
//! So no source has a quota that forgeries in its name could use up: all known
//! sources together pass [`KNOWN_PER_SECOND_MAX`] a second, which costs a few
//! percent of a core and is more than a flood of small datagrams usually
//! brings. What proves nothing yet passes [`UNKNOWN_PER_SECOND_MAX`], and
//! [`UNKNOWN_PER_SOURCE_MAX`] from one source, so that one noisy source leaves
//! room for a backend that has just started.
//!
//! Beyond a gate's width datagrams pass by lot, with the chance that would have
//! made the last second's flood fit. Under a flood of F a second against a width
//! of W a new backend that sends R a second is first heard after about F / (W·R)
//! seconds: 100,000 forged in its own name against 5,000, at 10 heartbeats a
//! second, two seconds. From then on it is known and passes freely.

use super::RejectReason;
use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Datagrams of all known sources together that are verified in a second.
pub const KNOWN_PER_SECOND_MAX: u32 = 200_000;

/// The same for all unknown sources together.
pub const UNKNOWN_PER_SECOND_MAX: u32 = 50_000;

/// The same for one unknown source (or those that share its place).
pub const UNKNOWN_PER_SOURCE_MAX: u32 = 5_000;

/// Places for unknown sources: enough that two real ones seldom share one.
pub const SLOTS: usize = 4096;

/// Known sources: as many as there may be senders, each with its own.
pub const KNOWN_MAX: usize = super::SENDERS_MAX;

/// How long a source stays known after its last proven heartbeat: it may be
/// restarted without having to pass the narrow gate again.
pub const KNOWN_FOR: Duration = Duration::from_secs(300);

/// The rates are kept in steps of a tenth of a second.
const STEP: Duration = Duration::from_millis(100);
const STEPS_PER_SECOND: u32 = 10;

/// How many steps a peak counts: a flood that pauses for less is still one.
const PEAK_STEPS: u64 = 10;

/// Looking for sources to forget costs a walk over all; once a second is often
/// enough.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// Both gates.
#[derive(Debug)]
pub(super) struct Limiter {
    known: HashMap<IpAddr, Instant>,
    known_lane: RateGate,
    unknown_lane: RateGate,
    slots: Box<[RateGate]>,
    random: fastrand::Rng,
    hash_seed: u64,
    /// When the first datagram came: steps are counted from there.
    epoch: Option<Instant>,
    swept: Option<Instant>,
}

/// A gate of a certain width.
#[derive(Debug, Clone)]
struct RateGate {
    /// Datagrams a step.
    width: u32,
    step: u64,
    arrived: u32,
    passed: u32,
    /// The most that arrived in a step lately, and in which.
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
            known_lane: RateGate::new(KNOWN_PER_SECOND_MAX),
            unknown_lane: RateGate::new(UNKNOWN_PER_SECOND_MAX),
            slots: vec![RateGate::new(UNKNOWN_PER_SOURCE_MAX); SLOTS].into(),
            random,
            hash_seed,
            epoch: None,
            swept: None,
        }
    }

    /// Whether one more datagram of `source` may be verified.
    pub(super) fn pass(&mut self, source: IpAddr, now: Instant) -> Result<(), RejectReason> {
        let epoch = *self.epoch.get_or_insert(now);
        let step = (now.saturating_duration_since(epoch).as_millis() / STEP.as_millis()) as u64;
        if self.is_known(source, now) {
            let passes = self.known_lane.pass(step, &mut self.random);
            return if passes { Ok(()) } else { Err(RejectReason::Overload) };
        }
        let slot = self.slot(source);
        let passes = self.slots[slot].pass(step, &mut self.random)
            && self.unknown_lane.pass(step, &mut self.random);
        if passes { Ok(()) } else { Err(RejectReason::Limited) }
    }

    /// `source` has sent a heartbeat that was believed.
    pub(super) fn is_proven(&mut self, source: IpAddr, now: Instant) {
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

    /// Sources of one IPv6 /64 share a place: whoever has one address there has
    /// them all.
    fn slot(&self, source: IpAddr) -> usize {
        let hash = match source {
            IpAddr::V4(ip) => xxh3_64_with_seed(&ip.octets(), self.hash_seed),
            IpAddr::V6(ip) => xxh3_64_with_seed(&ip.octets()[..8], self.hash_seed),
        };
        (hash % SLOTS as u64) as usize
    }
}

// === impl RateGate ===

impl RateGate {
    fn new(per_second: u32) -> RateGate {
        RateGate {
            width: per_second / STEPS_PER_SECOND,
            step: 0,
            arrived: 0,
            passed: 0,
            peak: 0,
            peak_step: 0,
        }
    }

    /// Never more than `width` a step, and with a flood under way each datagram
    /// by the same chance.
    fn pass(&mut self, step: u64, random: &mut fastrand::Rng) -> bool {
        if step > self.step {
            if self.arrived >= self.peak || step - self.peak_step > PEAK_STEPS {
                (self.peak, self.peak_step) = (self.arrived, self.step);
            }
            (self.step, self.arrived, self.passed) = (step, 0, 0);
        }
        self.arrived = self.arrived.saturating_add(1);
        // An eighth less than fits: were all places drawn for, chance would
        // fill them before the end of every other step.
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

    fn passed(lane: &mut RateGate, step: u64, count: u32, random: &mut fastrand::Rng) -> u32 {
        (0..count).map(|_| u32::from(lane.pass(step, random))).sum()
    }

    #[test]
    fn a_quiet_lane_lets_everything_pass() {
        let (mut lane, mut random) = (RateGate::new(1_000), fastrand::Rng::with_seed(1));
        for step in 0..50 {
            assert_eq!(passed(&mut lane, step, 100, &mut random), 100);
        }
    }

    #[test]
    fn a_flood_never_gets_more_than_the_width() {
        let (mut lane, mut random) = (RateGate::new(1_000), fastrand::Rng::with_seed(1));
        for step in 0..50 {
            let passed = passed(&mut lane, step, 10_000, &mut random);
            assert!(passed <= 100 && (step == 0 || passed > 60), "step {step}: {passed}");
        }
    }

    #[test]
    fn the_last_of_a_step_has_the_chance_of_the_first() {
        let (mut lane, mut random) = (RateGate::new(1_000), fastrand::Rng::with_seed(1));
        passed(&mut lane, 0, 1_000, &mut random);
        let (mut first, mut last) = (0, 0);
        for step in 1..2_000 {
            first += u32::from(lane.pass(step, &mut random));
            passed(&mut lane, step, 998, &mut random);
            last += u32::from(lane.pass(step, &mut random));
        }
        for count in [first, last] {
            assert!((130..220).contains(&count), "about 175 of 2,000: {first} and {last}");
        }
    }

    #[test]
    fn a_flood_every_other_step_is_met_by_lot_as_well() {
        let (mut lane, mut random) = (RateGate::new(1_000), fastrand::Rng::with_seed(1));
        let mut last = 0;
        for step in (0..2_000).step_by(2) {
            passed(&mut lane, step, 999, &mut random);
            last += u32::from(lane.pass(step, &mut random));
        }
        assert!((50..150).contains(&last), "about 87 of 1,000: {last}");
    }

    #[test]
    fn a_lane_is_wide_again_a_second_after_a_flood() {
        let (mut lane, mut random) = (RateGate::new(1_000), fastrand::Rng::with_seed(1));
        passed(&mut lane, 0, 10_000, &mut random);
        passed(&mut lane, 11, 1, &mut random);
        assert_eq!(passed(&mut lane, 12, 100, &mut random), 100);
    }
}
