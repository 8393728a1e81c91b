//! `two-choices`: the less loaded of two weighted draws.
//!
//! Prepared at table build, picked from by every worker, and what
//! `least-connections` does in pools too large to scan (Mitzenmacher, "The
//! power of two choices in randomized load balancing", 1996). It looks at two
//! in-flight counts a pick, never at all of them unless those two are no use.

use super::Candidate;
use super::alias::AliasTable;
use super::scan::LoadRatio;
use super::slow_start::Passed;
use crate::balance::random_stream::DrawStream;
use crate::balance::scan;

/// Pairs drawn before every candidate is looked at.
const PAIRS_MAX: usize = 4;

/// Draws for a second candidate other than the first; after these (one
/// candidate holds most of the weight) any other is as good.
const SECOND_DRAWS_MAX: usize = 4;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct TwoChoices {
    alias: AliasTable,
}

impl TwoChoices {
    /// Over `candidates` (at least one). Where `slow` says that some of them are
    /// in their slow start, each of those is one of the two only when it is let in:
    /// the other is never drawn among them.
    pub(super) fn new(candidates: &[Candidate], slow: bool) -> TwoChoices {
        let weight = |c: &Candidate| if slow && c.slow_start { 0 } else { c.weight };
        TwoChoices { alias: AliasTable::new(candidates.iter().map(weight)) }
    }

    /// The better of two that can be used; the only one if one of them cannot.
    #[inline]
    pub(super) fn pick(
        &self,
        candidates: &[Candidate],
        draw: u64,
        passed: Passed<'_>,
    ) -> Option<usize> {
        self.pick_by(candidates, draw, passed, |(_, a), (_, b)| a < b)
    }

    /// The same with another idea of better: `prefers(a, b)` says whether `a`
    /// is to be taken rather than `b`.
    #[inline]
    pub(super) fn pick_by(
        &self,
        candidates: &[Candidate],
        draw: u64,
        passed: Passed<'_>,
        prefers: impl Fn((&Candidate, LoadRatio), (&Candidate, LoadRatio)) -> bool,
    ) -> Option<usize> {
        let mut draws = DrawStream::new(draw);
        for _ in 0..PAIRS_MAX {
            let (first, second) = self.pair(candidates.len(), passed.let_in(), &mut draws);
            if let Some(index) = less_loaded(candidates, passed, first, second, &prefers)
                && candidates[index].try_enter()
            {
                return Some(index);
            }
        }
        scan::enter(candidates, passed, || scan::least_loaded(candidates, passed, &mut draws))
    }

    /// Two drawn by weight, different ones where there are two; `first` has been
    /// drawn already where it is given.
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
    passed: Passed<'_>,
    first: usize,
    second: usize,
    prefers: impl Fn((&Candidate, LoadRatio), (&Candidate, LoadRatio)) -> bool,
) -> Option<usize> {
    let loads = (
        scan::usable(&candidates[first], first, passed),
        scan::usable(&candidates[second], second, passed),
    );
    match loads {
        (Some(a), Some(b)) if prefers((&candidates[second], b), (&candidates[first], a)) => {
            Some(second)
        }
        (Some(_), _) => Some(first),
        (None, Some(_)) => Some(second),
        (None, None) => None,
    }
}
