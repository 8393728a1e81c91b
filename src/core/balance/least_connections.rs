//! `least-connections`: picks the candidate with the lowest load for its weight.
//!
//! Prepared at table build, used by every worker. The pick itself raises the count that
//! is compared, so racing workers do not all see the same candidate as empty. It never
//! compares in floating point.

use super::count::{Count, sum};
use super::recorder::{PickRecorder, loads, runner_up};
use super::scan::LoadRatio;
use super::slow_start::Excluded;
use super::two_choices::TwoChoices;
use super::{Candidate, scan};
use crate::balance::random_stream::DrawStream;
#[cfg(feature = "loom")]
use loom::sync::atomic::Ordering;
#[cfg(not(feature = "loom"))]
use std::sync::atomic::Ordering;

/// Maximum number of candidates that a pick scans; at most 64, because equals are bits
/// of a word. Up to here the least loaded of all is picked, at a cost of about 100 ns.
/// In larger pools reading every count costs more than it gains, and the better of two
/// weighted draws is picked instead.
const SCANNED_MAX: usize = 64;

/// Largest common multiple of the weights. Counts are below 2^32, so the products fit
/// 64 bits.
const MULTIPLE_MAX: u64 = 1 << 31;

/// The prepared policy.
#[derive(Debug)]
pub(super) enum LeastConnections {
    /// Scans every candidate.
    Scan(Box<[ScanPolicy]>),
    /// Scans every candidate and compares loads by cross multiplication, because the
    /// weights have no small common multiple.
    ScanCrosswise,
    /// Used with more than [`SCANNED_MAX`] candidates.
    Large(TwoChoices),
}

/// The part of a candidate that a scan reads, contiguous in memory.
#[derive(Debug)]
pub(super) struct ScanPolicy {
    held: Count,
    /// The load is (in-flight + 1) times this.
    factor: u64,
}

// === impl LeastConnections ===

impl LeastConnections {
    /// Prepares the policy for `candidates` (at least one); `slow` as in
    /// [`TwoChoices::new`].
    pub(super) fn new(candidates: &[Candidate], slow: bool) -> LeastConnections {
        if candidates.len() > SCANNED_MAX {
            return LeastConnections::Large(TwoChoices::new(candidates, slow));
        }
        scanned(candidates).map_or(LeastConnections::ScanCrosswise, LeastConnections::Scan)
    }

    /// Picks the least loaded usable candidate.
    #[inline]
    pub(super) fn pick(
        &self,
        candidates: &[Candidate],
        draw: u64,
        excluded: Excluded<'_>,
        recorder: &mut impl PickRecorder,
    ) -> Option<usize> {
        let index = match self {
            LeastConnections::Scan(scanned) => {
                pick_scanned(scanned, candidates, draw, excluded, recorder)
            }
            LeastConnections::ScanCrosswise => {
                let mut draws = DrawStream::new(draw);
                let load = |_, candidate: &Candidate| LoadRatio::of(candidate);
                let choose = || least(candidates, load, excluded, &mut draws);
                scan::enter(candidates, excluded, recorder, choose)
            }
            LeastConnections::Large(two) => {
                return two.pick(candidates, draw, excluded, recorder);
            }
        }?;
        recorder.decided(|slots| {
            loads(candidates, index, runner_up(candidates, index, excluded), slots, |_| None)
        });
        Some(index)
    }
}

#[inline]
fn pick_scanned(
    scanned: &[ScanPolicy],
    candidates: &[Candidate],
    draw: u64,
    excluded: Excluded<'_>,
    recorder: &mut impl PickRecorder,
) -> Option<usize> {
    let mut draws = DrawStream::new(draw);
    if excluded.is_empty() {
        let index = lightest(scanned, &mut draws)?;
        if recorder.enter(&candidates[index]) {
            return Some(index);
        }
    }
    let load = |index: usize, _: &Candidate| scanned[index].load();
    scan::enter(candidates, excluded, recorder, || least(candidates, load, excluded, &mut draws))
}

/// Computes the factors of all candidates: the least common multiple of the weights
/// divided by each weight. Loads are then whole numbers that can be compared directly.
/// Returns `None` if the multiple exceeds [`MULTIPLE_MAX`].
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

/// Returns the candidate with the lowest load, usable or not, chosen at random among
/// equals. It is usually usable, and checking one candidate is cheaper than checking
/// all.
#[inline]
fn lightest(scanned: &[ScanPolicy], draws: &mut DrawStream) -> Option<usize> {
    let (mut least, mut equals) = (u64::MAX, 0);
    for (index, scanned) in scanned.iter().enumerate() {
        let (load, bit) = (scanned.load(), 1_u64 << index);
        // No branch, because it would be unpredictable.
        let before = if load < least { 0 } else { equals };
        equals = before | if load <= least { bit } else { 0 };
        least = least.min(load);
    }
    one_of(equals, draws)
}

/// Returns the usable candidate with the lowest load, chosen at random among equals.
/// Checks the cap only of candidates that are at least as good as the best so far.
#[inline]
fn least<L: Ord + Copy>(
    candidates: &[Candidate],
    load: impl Fn(usize, &Candidate) -> L,
    excluded: Excluded<'_>,
    draws: &mut DrawStream,
) -> Option<usize> {
    let (mut least, mut equals): (Option<L>, u64) = (None, 0);
    for (index, candidate) in candidates.iter().enumerate() {
        let (load, bit) = (load(index, candidate), 1 << index);
        if least.is_none_or(|least| load <= least)
            && candidate.has_room()
            && !excluded.contains(index, candidate)
        {
            equals = if least == Some(load) { equals | bit } else { bit };
            least = Some(load);
        }
    }
    one_of(equals, draws)
}

/// Returns the index of a random set bit.
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
    /// Returns the load with one more session.
    #[inline]
    fn load(&self) -> u64 {
        (u64::from(sum(self.held.load(Ordering::Relaxed))) + 1) * self.factor
    }
}

/// Returns the index of the set bit that has `rank` set bits below it. `rank` must be
/// less than the number of set bits. A binary search: six steps for any word.
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
#[cfg(not(feature = "loom"))]
mod tests {
    use super::*;
    use crate::balance::recorder::Unrecorded;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bit_of_a_rank_has_rank_set_bits_below_it(word in 1_u64.., rank: u32) {
            let rank = rank % word.count_ones();
            let place = place_of_bit(word, rank);
            prop_assert_eq!(word >> place & 1, 1);
            prop_assert_eq!((word & ((1 << place) - 1)).count_ones(), rank);
        }

        /// Both comparisons choose from the same equals.
        #[test]
        fn whole_loads_and_fractions_order_candidates_alike(
            pool in prop::collection::vec((1_u32..13, 0_u32..6, 0_u32..8), 1..=SCANNED_MAX),
            tried in prop::collection::vec(0_usize..SCANNED_MAX, 0..3),
            draw: u64,
        ) {
            let candidates: Vec<Candidate> =
                pool.iter().map(|(weight, held, max)| candidate(*weight, *held, *max)).collect();
            let scanned = scanned(&candidates).unwrap();
            let whole = |index: usize, _: &Candidate| scanned[index].load();
            let crosswise = |_, candidate: &Candidate| LoadRatio::of(candidate);
            let by_whole = least(&candidates, whole, Excluded::tried(&tried), &mut DrawStream::new(draw));
            let by_fraction = least(&candidates, crosswise, Excluded::tried(&tried), &mut DrawStream::new(draw));
            prop_assert_eq!(by_whole, by_fraction);
        }

        /// The quick scan chooses from the same equals as the full scan if all
        /// candidates are usable. A pick never returns an unusable candidate.
        #[test]
        fn quick_scan_finds_the_least_loaded_candidate_below_caps(
            pool in prop::collection::vec((1_u32..13, 0_u32..6, 0_u32..8), 1..=SCANNED_MAX),
            draw: u64,
        ) {
            let roomy: Vec<Candidate> =
                pool.iter().map(|(weight, held, _)| candidate(*weight, *held, 0)).collect();
            let loads = scanned(&roomy).unwrap();
            let careful = |index: usize, _: &Candidate| loads[index].load();
            prop_assert_eq!(
                lightest(&loads, &mut DrawStream::new(draw)),
                least(&roomy, careful, Excluded::tried(&[]), &mut DrawStream::new(draw))
            );
            let capped: Vec<Candidate> =
                pool.iter().map(|(weight, held, max)| candidate(*weight, *held, *max)).collect();
            let usable = capped.iter().any(Candidate::has_room);
            match LeastConnections::new(&capped, false).pick(&capped, draw, Excluded::tried(&[]), &mut Unrecorded) {
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
    fn weights_without_a_small_common_multiple_use_cross_multiplication() {
        let primes = [65_521, 65_519, 65_497].map(|weight| candidate(weight, 0, 0));
        assert!(scanned(&primes).is_none());
        assert_eq!(
            LeastConnections::new(&primes, false).pick(
                &primes,
                1,
                Excluded::tried(&[]),
                &mut Unrecorded
            ),
            Some(0)
        );
    }
}
