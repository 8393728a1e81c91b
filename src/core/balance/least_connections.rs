//! `least-connections`: whoever holds the least for its weight.
//!
//! Prepared at table build, picked from by every worker. The count it compares
//! goes up at the pick itself, so workers that race do not all find the same
//! candidate empty; it never compares in floating point.

use super::count::{Count, sum};
use super::scan::LoadRatio;
use super::slow_start::Passed;
use super::two_choices::TwoChoices;
use super::{Candidate, scan};
use crate::balance::random_stream::DrawStream;
#[cfg(tidegate_loom)]
use loom::sync::atomic::Ordering;
#[cfg(not(tidegate_loom))]
use std::sync::atomic::Ordering;

/// Candidates one pick looks at: up to here the least loaded of all is chosen,
/// at a cost of some 100 ns. Beyond, reading every backend's count would cost
/// more than it gains, and the better of two weighted draws takes its place.
/// Equals are kept as the bits of a word, so this is at most 64.
const SCANNED_MAX: usize = 64;

/// Largest common multiple of the weights: with counts below 2^32 the products
/// fit 64 bits.
const MULTIPLE_MAX: u64 = 1 << 31;

/// See the module's documentation.
#[derive(Debug)]
pub(super) enum LeastConnections {
    /// Every candidate is looked at.
    Scan(Box<[ScanPolicy]>),
    /// The weights have no small common multiple; loads are compared crosswise.
    ScanCrosswise,
    /// More than [`SCANNED_MAX`] candidates.
    Large(TwoChoices),
}

/// What a scan reads of a candidate, side by side in memory.
#[derive(Debug)]
pub(super) struct ScanPolicy {
    held: Count,
    /// Times (in-flight + 1) is the load.
    factor: u64,
}

// === impl LeastConnections ===

impl LeastConnections {
    /// Over `candidates` (at least one); `slow` as for [`TwoChoices::new`].
    pub(super) fn new(candidates: &[Candidate], slow: bool) -> LeastConnections {
        if candidates.len() > SCANNED_MAX {
            return LeastConnections::Large(TwoChoices::new(candidates, slow));
        }
        scanned(candidates).map_or(LeastConnections::ScanCrosswise, LeastConnections::Scan)
    }

    /// The least loaded of those that can be used.
    #[inline]
    pub(super) fn pick(
        &self,
        candidates: &[Candidate],
        draw: u64,
        passed: Passed<'_>,
    ) -> Option<usize> {
        let mut draws = DrawStream::new(draw);
        match self {
            LeastConnections::Scan(scanned) => {
                if passed.is_nobody() {
                    let index = lightest(scanned, &mut draws)?;
                    if candidates[index].try_enter() {
                        return Some(index);
                    }
                }
                let load = |index: usize, _: &Candidate| scanned[index].load();
                scan::enter(candidates, passed, || least(candidates, load, passed, &mut draws))
            }
            LeastConnections::ScanCrosswise => {
                let load = |_, candidate: &Candidate| LoadRatio::of(candidate);
                scan::enter(candidates, passed, || least(candidates, load, passed, &mut draws))
            }
            LeastConnections::Large(two) => two.pick(candidates, draw, passed),
        }
    }
}

/// With the least common multiple of the weights over each weight as factors, which
/// makes loads whole numbers that compare as they are. `None` beyond
/// [`MULTIPLE_MAX`].
fn scanned(candidates: &[Candidate]) -> Option<Box<[ScanPolicy]>> {
    let weights = || candidates.iter().map(|candidate| u64::from(candidate.weight.max(1)));
    let multiple = weights().try_fold(1_u64, |multiple, weight| {
        let next = multiple / gcd(multiple, weight) * weight;
        (next <= MULTIPLE_MAX).then_some(next)
    })?;
    let with_factor = candidates.iter().zip(weights()).map(|(candidate, weight)| ScanPolicy {
        held: candidate.in_flight.counter(),
        factor: multiple / weight,
    });
    Some(with_factor.collect())
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The candidate with the least load, usable or not; each of several equals is as
/// likely as the others. Mostly it is usable, and asking that of one is cheaper
/// than of all.
#[inline]
fn lightest(scanned: &[ScanPolicy], draws: &mut DrawStream) -> Option<usize> {
    let (mut least, mut equals) = (u64::MAX, 0);
    for (index, scanned) in scanned.iter().enumerate() {
        let (load, bit) = (scanned.load(), 1_u64 << index);
        // Without a branch: which one is least nobody can predict.
        let before = if load < least { 0 } else { equals };
        equals = before | if load <= least { bit } else { 0 };
        least = least.min(load);
    }
    one_of(equals, draws)
}

/// The usable candidate with the least load; each of several equals is as likely
/// as the others. Whether there is room is asked only of those no worse than the
/// best so far.
#[inline]
fn least<L: Ord + Copy>(
    candidates: &[Candidate],
    load: impl Fn(usize, &Candidate) -> L,
    passed: Passed<'_>,
    draws: &mut DrawStream,
) -> Option<usize> {
    let (mut least, mut equals): (Option<L>, u64) = (None, 0);
    for (index, candidate) in candidates.iter().enumerate() {
        let (load, bit) = (load(index, candidate), 1 << index);
        if least.is_none_or(|least| load <= least)
            && candidate.has_room()
            && !passed.has(index, candidate)
        {
            equals = if least == Some(load) { equals | bit } else { bit };
            least = Some(load);
        }
    }
    one_of(equals, draws)
}

/// The place of one of the bits that are set, each as likely as the others.
#[inline]
fn one_of(bits: u64, draws: &mut DrawStream) -> Option<usize> {
    let several = u64::from(bits.count_ones());
    match several {
        0 => None,
        1 => Some(bits.trailing_zeros() as usize),
        _ => Some(place_of_bit(bits, draws.below(several) as u32) as usize),
    }
}

// === impl ScanPolicy ===

impl ScanPolicy {
    /// Of one session more.
    #[inline]
    fn load(&self) -> u64 {
        (u64::from(sum(self.held.load(Ordering::Relaxed))) + 1) * self.factor
    }
}

/// Where the bit is that has `rank` set ones below it; `rank` is below their
/// number. By halves: six steps whatever the word.
#[inline]
fn place_of_bit(word: u64, mut rank: u32) -> u32 {
    let mut place = 0;
    for half in [32, 16, 8, 4, 2, 1] {
        let low = (word >> place & ((1 << half) - 1)).count_ones();
        if rank >= low {
            rank -= low;
            place += half;
        }
    }
    place
}

#[cfg(test)]
#[cfg(not(tidegate_loom))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_bit_of_a_rank_has_that_many_below_it(word in 1_u64.., rank: u32) {
            let rank = rank % word.count_ones();
            let place = place_of_bit(word, rank);
            prop_assert_eq!(word >> place & 1, 1);
            prop_assert_eq!((word & ((1 << place) - 1)).count_ones(), rank);
        }

        /// The two ways choose from the same equals.
        #[test]
        fn whole_loads_order_candidates_as_fractions_do(
            pool in prop::collection::vec((1_u32..13, 0_u32..6, 0_u32..8), 1..=SCANNED_MAX),
            tried in prop::collection::vec(0_usize..SCANNED_MAX, 0..3),
            draw: u64,
        ) {
            let candidates: Vec<Candidate> =
                pool.iter().map(|(weight, held, max)| candidate(*weight, *held, *max)).collect();
            let scanned = scanned(&candidates).unwrap();
            let whole = |index: usize, _: &Candidate| scanned[index].load();
            let crosswise = |_, candidate: &Candidate| LoadRatio::of(candidate);
            let ours = least(&candidates, whole, Passed::over(&tried), &mut DrawStream::new(draw));
            let theirs = least(&candidates, crosswise, Passed::over(&tried), &mut DrawStream::new(draw));
            prop_assert_eq!(ours, theirs);
        }

        /// The quick way chooses from the same equals as the careful one where
        /// everybody is usable, and gives nobody a session who is not.
        #[test]
        fn the_lightest_is_the_least_loaded_where_all_have_room(
            pool in prop::collection::vec((1_u32..13, 0_u32..6, 0_u32..8), 1..=SCANNED_MAX),
            draw: u64,
        ) {
            let roomy: Vec<Candidate> =
                pool.iter().map(|(weight, held, _)| candidate(*weight, *held, 0)).collect();
            let loads = scanned(&roomy).unwrap();
            let careful = |index: usize, _: &Candidate| loads[index].load();
            prop_assert_eq!(
                lightest(&loads, &mut DrawStream::new(draw)),
                least(&roomy, careful, Passed::over(&[]), &mut DrawStream::new(draw))
            );
            let capped: Vec<Candidate> =
                pool.iter().map(|(weight, held, max)| candidate(*weight, *held, *max)).collect();
            let usable = capped.iter().any(Candidate::has_room);
            match LeastConnections::new(&capped, false).pick(&capped, draw, Passed::over(&[])) {
                Some(index) => {
                    let (_, held, max) = pool[index];
                    prop_assert!(max == 0 || held < max);
                }
                None => prop_assert!(!usable),
            }
        }
    }

    fn candidate(weight: u32, held: u32, connections_max: u32) -> Candidate {
        let candidate = Candidate {
            key: "a".into(),
            weight,
            connections_max,
            slow_start: false,
            in_flight: Default::default(),
            latency: Default::default(),
        };
        (0..held).for_each(|_| assert!(candidate.in_flight.try_enter(0)));
        candidate
    }

    #[test]
    fn weights_without_a_small_common_multiple_are_compared_crosswise() {
        let primes = [65_521, 65_519, 65_497].map(|weight| candidate(weight, 0, 0));
        assert!(scanned(&primes).is_none());
        assert_eq!(
            LeastConnections::new(&primes, false).pick(&primes, 1, Passed::over(&[])),
            Some(0)
        );
    }
}
