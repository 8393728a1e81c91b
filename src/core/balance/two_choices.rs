//! `two-choices`: picks the less loaded of two weighted draws.
//!
//! Prepared at table build, used by every worker. `least-connections` also uses it in
//! pools that are too large to scan. See Mitzenmacher, "The power of two choices in
//! randomized load balancing", 1996. A pick looks at all candidates only if the two
//! drawn are not usable.

use super::Candidate;
use super::alias::AliasTable;
use super::recorder::{PickRecorder, loads, runner_up};
use super::scan::LoadRatio;
use super::slow_start::Excluded;
use crate::balance::random_stream::DrawStream;
use crate::balance::scan;

/// Pairs drawn before all candidates are scanned.
const PAIRS_MAX: usize = 4;

/// Draws for a second candidate that differs from the first. After these, one candidate
/// holds most of the weight, and any other candidate is used.
const SECOND_DRAWS_MAX: usize = 4;

/// The prepared policy.
#[derive(Debug)]
pub(super) struct TwoChoices {
    alias: AliasTable,
}

impl TwoChoices {
    /// Prepares the policy for `candidates` (at least one). `slow` tells whether some
    /// of them are in slow start. The alias table never draws these. A pick compares
    /// one of them only if its slow-start draw admitted it.
    pub(super) fn new(candidates: &[Candidate], slow: bool) -> TwoChoices {
        let weight = |c: &Candidate| if slow && c.slow_start { 0 } else { c.weight };
        TwoChoices { alias: AliasTable::new(candidates.iter().map(weight)) }
    }

    /// Picks the less loaded of two usable candidates, or the usable one of the two.
    #[inline]
    pub(super) fn pick(
        &self,
        candidates: &[Candidate],
        draw: u64,
        excluded: Excluded<'_>,
        recorder: &mut impl PickRecorder,
    ) -> Option<usize> {
        let no_price = |_: &Candidate| None;
        self.pick_by(candidates, draw, excluded, recorder, no_price, |(_, a), (_, b)| a < b)
    }

    /// Picks as [`TwoChoices::pick`] does, with another comparison: `prefers(a, b)`
    /// returns whether `a` is better than `b`.
    #[inline]
    pub(super) fn pick_by(
        &self,
        candidates: &[Candidate],
        draw: u64,
        excluded: Excluded<'_>,
        recorder: &mut impl PickRecorder,
        price: impl Fn(&Candidate) -> Option<f32>,
        prefers: impl Fn((&Candidate, LoadRatio), (&Candidate, LoadRatio)) -> bool,
    ) -> Option<usize> {
        let mut draws = DrawStream::new(draw);
        for _ in 0..PAIRS_MAX {
            let (first, second) = self.pair(candidates.len(), excluded.admitted(), &mut draws);
            let lower = less_loaded(candidates, excluded, first, second, recorder, &prefers);
            if let Some(index) = lower
                && recorder.enter(&candidates[index])
            {
                let other = if index == first { second } else { first };
                recorder.decided(|slots| {
                    let usable = scan::usable(&candidates[other], other, excluded).is_some();
                    let compared = (usable && other != index).then_some(other);
                    loads(candidates, index, compared, slots, &price)
                });
                return Some(index);
            }
        }
        let choose = || scan::least_loaded(candidates, excluded, &mut draws);
        let index = scan::enter(candidates, excluded, recorder, choose)?;
        recorder.decided(|slots| {
            loads(candidates, index, runner_up(candidates, index, excluded), slots, &price)
        });
        Some(index)
    }

    /// Draws two candidates by weight, different ones if the pool has two. `first`
    /// replaces the first draw if it is given.
    #[inline]
    fn pair(&self, count: usize, first: Option<usize>, draws: &mut DrawStream) -> (usize, usize) {
        let first = first.unwrap_or_else(|| self.alias.draw(draws));
        for _ in 0..SECOND_DRAWS_MAX {
            let second = self.alias.draw(draws);
            if second != first {
                return (first, second);
            }
        }
        if count == 1 {
            return (first, first);
        }
        let step = 1 + draws.below(count as u64 - 1) as usize;
        (first, (first + step) % count)
    }
}

#[inline]
fn less_loaded(
    candidates: &[Candidate],
    excluded: Excluded<'_>,
    first: usize,
    second: usize,
    recorder: &mut impl PickRecorder,
    prefers: impl Fn((&Candidate, LoadRatio), (&Candidate, LoadRatio)) -> bool,
) -> Option<usize> {
    let loads = (
        scan::usable(&candidates[first], first, excluded),
        scan::usable(&candidates[second], second, excluded),
    );
    if loads.0.is_none() {
        recorder.passed_over(first, &candidates[first], excluded);
    }
    if loads.1.is_none() {
        recorder.passed_over(second, &candidates[second], excluded);
    }
    match loads {
        (Some(a), Some(b)) if prefers((&candidates[second], b), (&candidates[first], a)) => {
            Some(second)
        }
        (Some(_), _) => Some(first),
        (None, Some(_)) => Some(second),
        (None, None) => None,
    }
}
