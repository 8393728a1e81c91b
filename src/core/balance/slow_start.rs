//! Slow start: a candidate that warms up gets at most its share of the picks.
//!
//! Called by `Balancer::pick` for the policies that compare loads. These policies
//! prefer a candidate without sessions however small its weight is, so a reduced weight
//! alone would not slow it down. Each pick therefore draws by weight at most one
//! candidate in slow start that may take part, and excludes the others. Usually it
//! draws none. The loads decide among the rest. The share of each candidate in slow
//! start is at most its weight divided by the sum of all weights.
//!
//! If all other candidates are at their caps, the pick is repeated without exclusions:
//! a slow start never causes a rejected session. If no candidate is in slow start,
//! nothing is prepared and nothing is drawn.

use super::Candidate;
use crate::balance::random_stream::DrawStream;

/// The candidates in slow start, in a pool that also has other candidates.
#[derive(Debug)]
pub(super) struct SlowStarts {
    /// In ascending order of `below`.
    starting: Box<[Starting]>,
    /// Sum of the weights of all candidates.
    total: u64,
}

#[derive(Debug)]
struct Starting {
    index: usize,
    /// Draws less than this, and at least `below` of the previous entry, admit the
    /// candidate.
    below: u64,
}

/// The candidates that a pick excludes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Excluded<'a> {
    tried: &'a [usize],
    /// Whether candidates in slow start are also excluded.
    slow: bool,
    /// The candidate in slow start that is not excluded.
    admitted: Option<usize>,
}

// === impl SlowStarts ===

impl SlowStarts {
    /// Returns `None` if no candidate is in slow start, or if all are: shares are
    /// relative.
    pub(super) fn new(candidates: &[Candidate]) -> Option<SlowStarts> {
        let mut below = 0;
        let starting: Box<[Starting]> = candidates
            .iter()
            .enumerate()
            .filter(|(_, candidate)| candidate.slow_start)
            .map(|(index, candidate)| {
                below += u64::from(candidate.weight);
                Starting { index, below }
            })
            .collect();
        let total = candidates.iter().map(|candidate| u64::from(candidate.weight)).sum();
        (!starting.is_empty() && starting.len() < candidates.len())
            .then_some(SlowStarts { starting, total })
    }

    /// Draws which candidate in slow start may take part. The result also excludes
    /// `tried`.
    pub(super) fn draw<'a>(&self, draws: &mut DrawStream, tried: &'a [usize]) -> Excluded<'a> {
        let drawn = draws.below(self.total);
        let at = self.starting.partition_point(|starting| starting.below <= drawn);
        let admitted = self.starting.get(at).map(|starting| starting.index);
        Excluded { tried, slow: true, admitted }
    }
}

// === impl Excluded ===

impl<'a> Excluded<'a> {
    /// Excludes `tried` only.
    #[inline]
    pub(super) fn tried(tried: &'a [usize]) -> Excluded<'a> {
        Excluded { tried, slow: false, admitted: None }
    }

    /// Returns the excluded candidates that were tried.
    #[inline]
    pub(super) fn tried_list(self) -> &'a [usize] {
        self.tried
    }

    /// Returns whether this candidate was tried.
    pub(super) fn is_tried(self, index: usize) -> bool {
        self.tried.contains(&index)
    }

    /// Returns whether no candidate is excluded.
    #[inline]
    pub(super) fn is_empty(self) -> bool {
        self.tried.is_empty() && !self.slow
    }

    /// Returns whether this candidate is excluded.
    #[inline]
    pub(super) fn contains(self, index: usize, candidate: &Candidate) -> bool {
        !self.is_empty()
            && (self.tried.contains(&index)
                || (self.slow && candidate.slow_start && self.admitted != Some(index)))
    }

    /// Returns the candidate in slow start that may take part.
    #[inline]
    pub(super) fn admitted(self) -> Option<usize> {
        self.admitted
    }
}

#[cfg(test)]
#[cfg(not(feature = "loom"))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn candidates(pool: &[(u32, bool)]) -> Vec<Candidate> {
        let candidate = |&(weight, slow_start): &(u32, bool)| Candidate {
            key: "a".into(),
            weight,
            connections_max: 0,
            slow_start,
            in_flight: Default::default(),
            latency: Default::default(),
        };
        pool.iter().map(candidate).collect()
    }

    proptest! {
        #[test]
        fn candidate_is_admitted_for_as_many_draws_as_its_weight(
            pool in prop::collection::vec((1u32.., any::<bool>()), 1..80),
        ) {
            let candidates = candidates(&pool);
            let slow = pool.iter().filter(|(_, slow)| *slow).count();
            match SlowStarts::new(&candidates) {
                None => prop_assert!(slow == 0 || slow == pool.len()),
                Some(starts) => {
                    prop_assert_eq!(starts.starting.len(), slow);
                    prop_assert_eq!(starts.total, pool.iter().map(|(w, _)| u64::from(*w)).sum::<u64>());
                    let mut before = 0;
                    for starting in &starts.starting {
                        prop_assert!(pool[starting.index].1);
                        prop_assert_eq!(starting.below - before, u64::from(pool[starting.index].0));
                        before = starting.below;
                    }
                }
            }
        }
    }

    #[test]
    fn at_most_one_candidate_in_slow_start_takes_part() {
        let candidates = candidates(&[(100, false), (10, true), (30, true), (60, false)]);
        let starts = SlowStarts::new(&candidates).unwrap();
        let mut admitted = [0_u32; 4];
        let mut draws = DrawStream::new(1);
        for _ in 0..20_000 {
            let excluded = starts.draw(&mut draws, &[3]);
            assert!(!excluded.contains(0, &candidates[0]) && excluded.contains(3, &candidates[3]));
            let both = [1, 2].map(|index| !excluded.contains(index, &candidates[index]));
            assert_ne!(both, [true, true]);
            assert_eq!(excluded.admitted().is_some(), both != [false, false]);
            (1..3).for_each(|index| admitted[index] += u32::from(both[index - 1]));
        }
        assert!((900..1_100).contains(&admitted[1]), "{admitted:?}");
        assert!((2_800..3_200).contains(&admitted[2]), "{admitted:?}");
    }
}
