//! Slow start: a candidate that warms up gets at most its share of the picks.
//!
//! Called by `Balancer::pick` for the policies that compare loads. To them a
//! candidate without sessions is the best one however small its weight is, so
//! the weight alone slows nothing down. Each pick therefore draws by weight which
//! one of the candidates in their slow start may take part, mostly none, and
//! passes over the others. Loads then decide as ever. So the share of each is at
//! most its weight over the sum of all weights, whatever the loads are.
//!
//! A pick that finds no room among the rest is made among all: a slow start never
//! refuses a session. Where no candidate is in its slow start, nothing is prepared
//! and nothing is drawn.

use super::Candidate;
use crate::balance::random_stream::DrawStream;

/// The candidates in their slow start, in a pool that has others as well.
#[derive(Debug)]
pub(super) struct SlowStarts {
    /// Ascending by `below`.
    starting: Box<[Starting]>,
    /// Sum of the weights of all candidates.
    total: u64,
}

#[derive(Debug)]
struct Starting {
    index: usize,
    /// The draws below this, and not below that of the one before, let it in.
    below: u64,
}

/// Whom a pick passes over.
#[derive(Debug, Clone, Copy)]
pub(super) struct Passed<'a> {
    tried: &'a [usize],
    /// Whether the candidates in their slow start are, too.
    slow: bool,
    /// All but this one.
    let_in: Option<usize>,
}

// === impl SlowStarts ===

impl SlowStarts {
    /// `None` where no candidate is in its slow start, or all are: shares are
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

    /// Whom a pick passes over besides those `tried`.
    pub(super) fn draw<'a>(&self, draws: &mut DrawStream, tried: &'a [usize]) -> Passed<'a> {
        let drawn = draws.below(self.total);
        let at = self.starting.partition_point(|starting| starting.below <= drawn);
        let let_in = self.starting.get(at).map(|starting| starting.index);
        Passed { tried, slow: true, let_in }
    }
}

// === impl Passed ===

impl<'a> Passed<'a> {
    /// Those and nobody else.
    #[inline]
    pub(super) fn over(tried: &'a [usize]) -> Passed<'a> {
        Passed { tried, slow: false, let_in: None }
    }

    /// Those that were tried.
    #[inline]
    pub(super) fn tried(self) -> &'a [usize] {
        self.tried
    }

    /// Whether it passes over nobody.
    #[inline]
    pub(super) fn is_nobody(self) -> bool {
        self.tried.is_empty() && !self.slow
    }

    /// Whether it passes over that candidate.
    #[inline]
    pub(super) fn has(self, index: usize, candidate: &Candidate) -> bool {
        !self.is_nobody()
            && (self.tried.contains(&index)
                || (self.slow && candidate.slow_start && self.let_in != Some(index)))
    }

    /// The one candidate in its slow start that may take part.
    #[inline]
    pub(super) fn let_in(self) -> Option<usize> {
        self.let_in
    }
}

#[cfg(test)]
#[cfg(not(tidegate_loom))]
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
        fn each_is_let_in_for_as_many_draws_as_its_weight(
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
    fn of_those_in_their_slow_start_one_at_most_takes_part() {
        let candidates = candidates(&[(100, false), (10, true), (30, true), (60, false)]);
        let starts = SlowStarts::new(&candidates).unwrap();
        let mut let_in = [0_u32; 4];
        let mut draws = DrawStream::new(1);
        for _ in 0..20_000 {
            let passed = starts.draw(&mut draws, &[3]);
            assert!(!passed.has(0, &candidates[0]) && passed.has(3, &candidates[3]));
            let both = [1, 2].map(|index| !passed.has(index, &candidates[index]));
            assert_ne!(both, [true, true]);
            assert_eq!(passed.let_in().is_some(), both != [false, false]);
            (1..3).for_each(|index| let_in[index] += u32::from(both[index - 1]));
        }
        assert!((900..1_100).contains(&let_in[1]), "{let_in:?}");
        assert!((2_800..3_200).contains(&let_in[2]), "{let_in:?}");
    }
}
