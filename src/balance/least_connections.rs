//! `least-connections`: whoever holds the least for its weight.
//!
//! Prepared at table build, picked from by every worker. The count it compares
//! goes up at the pick itself, so workers that race do not all find the same
//! candidate empty; it never compares in floating point.

use super::draw::Draws;
use super::scan::Load;
use super::two_choices::TwoChoices;
use super::{Candidate, scan};

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
    /// Every candidate is looked at; (in-flight + 1) times its factor is its load.
    Scan(Box<[u64]>),
    /// The weights have no small common multiple; loads are compared crosswise.
    ScanCrosswise,
    /// More than [`SCANNED_MAX`] candidates.
    Large(TwoChoices),
}

// === impl LeastConnections ===

impl LeastConnections {
    /// Over `candidates` (at least one).
    pub(super) fn new(candidates: &[Candidate]) -> LeastConnections {
        if candidates.len() > SCANNED_MAX {
            return LeastConnections::Large(TwoChoices::new(candidates));
        }
        factors(candidates).map_or(LeastConnections::ScanCrosswise, LeastConnections::Scan)
    }

    /// The least loaded of those that can be used.
    #[inline]
    pub(super) fn pick(
        &self,
        candidates: &[Candidate],
        draw: u64,
        tried: &[usize],
    ) -> Option<usize> {
        let mut draws = Draws::new(draw);
        match self {
            LeastConnections::Scan(factors) => {
                let load = |index: usize, candidate: &Candidate| whole(candidate, factors[index]);
                scan::enter(candidates, tried, || least(candidates, load, tried, &mut draws))
            }
            LeastConnections::ScanCrosswise => {
                let load = |_, candidate: &Candidate| Load::of(candidate);
                scan::enter(candidates, tried, || least(candidates, load, tried, &mut draws))
            }
            LeastConnections::Large(two) => two.pick(candidates, draw, tried),
        }
    }
}

/// The least common multiple of the weights over each weight: what makes loads
/// whole numbers that compare as they are. `None` beyond [`MULTIPLE_MAX`].
fn factors(candidates: &[Candidate]) -> Option<Box<[u64]>> {
    let weights = || candidates.iter().map(|candidate| u64::from(candidate.weight.max(1)));
    let multiple = weights().try_fold(1_u64, |multiple, weight| {
        let next = multiple / gcd(multiple, weight) * weight;
        (next <= MULTIPLE_MAX).then_some(next)
    })?;
    Some(weights().map(|weight| multiple / weight).collect())
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[inline]
fn whole(candidate: &Candidate, factor: u64) -> u64 {
    (u64::from(candidate.in_flight.get()) + 1) * factor
}

/// The usable candidate with the least load; each of several equals is as likely
/// as the others. Whether there is room is asked only of those no worse than the
/// best so far.
#[inline]
fn least<L: Ord + Copy>(
    candidates: &[Candidate],
    load: impl Fn(usize, &Candidate) -> L,
    tried: &[usize],
    draws: &mut Draws,
) -> Option<usize> {
    let (mut least, mut equals): (Option<L>, u64) = (None, 0);
    for (index, candidate) in candidates.iter().enumerate() {
        let (load, bit) = (load(index, candidate), 1 << index);
        if least.is_none_or(|least| load <= least)
            && candidate.has_room()
            && (tried.is_empty() || !tried.contains(&index))
        {
            equals = if least == Some(load) { equals | bit } else { bit };
            least = Some(load);
        }
    }
    let several = u64::from(equals.count_ones());
    match several {
        0 => None,
        1 => Some(equals.trailing_zeros() as usize),
        _ => Some(place_of_bit(equals, draws.below(several) as u32) as usize),
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
            let factors = factors(&candidates).unwrap();
            let whole = |index: usize, candidate: &Candidate| whole(candidate, factors[index]);
            let crosswise = |_, candidate: &Candidate| Load::of(candidate);
            let ours = least(&candidates, whole, &tried, &mut Draws::new(draw));
            let theirs = least(&candidates, crosswise, &tried, &mut Draws::new(draw));
            prop_assert_eq!(ours, theirs);
        }
    }

    fn candidate(weight: u32, held: u32, connections_max: u32) -> Candidate {
        let candidate = Candidate {
            key: "a".into(),
            weight,
            connections_max,
            in_flight: Default::default(),
            latency: Default::default(),
        };
        (0..held).for_each(|_| assert!(candidate.in_flight.try_enter(0)));
        candidate
    }

    #[test]
    fn weights_without_a_small_common_multiple_are_compared_crosswise() {
        let primes = [65_521, 65_519, 65_497].map(|weight| candidate(weight, 0, 0));
        assert!(factors(&primes).is_none());
        assert_eq!(LeastConnections::new(&primes).pick(&primes, 1, &[]), Some(0));
    }
}
