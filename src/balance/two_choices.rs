//! `two-choices`: the less loaded of two weighted draws.
//!
//! Prepared at table build, picked from by every worker, and what
//! `least-connections` does in pools too large to scan (Mitzenmacher, "The
//! power of two choices in randomized load balancing", 1996). It looks at two
//! in-flight counts a pick, never at all of them unless those two are no use.

use super::Candidate;
use super::alias::AliasTable;
use super::draw::Draws;
use super::scan::{self, Load};

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
    /// Over `candidates` (at least one).
    pub(super) fn new(candidates: &[Candidate]) -> TwoChoices {
        TwoChoices { alias: AliasTable::new(candidates.iter().map(|c| c.weight)) }
    }

    /// The better of two that can be used; the only one if one of them cannot.
    #[inline]
    pub(super) fn pick(
        &self,
        candidates: &[Candidate],
        draw: u64,
        tried: &[usize],
    ) -> Option<usize> {
        self.pick_by(candidates, draw, tried, |(_, a), (_, b)| a < b)
    }

    /// The same with another idea of better: `prefers(a, b)` says whether `a`
    /// is to be taken rather than `b`.
    #[inline]
    pub(super) fn pick_by(
        &self,
        candidates: &[Candidate],
        draw: u64,
        tried: &[usize],
        prefers: impl Fn((&Candidate, Load), (&Candidate, Load)) -> bool,
    ) -> Option<usize> {
        let mut draws = Draws::new(draw);
        for _ in 0..PAIRS_MAX {
            let (first, second) = self.pair(candidates.len(), &mut draws);
            if let Some(index) = better(candidates, tried, first, second, &prefers)
                && candidates[index].try_enter()
            {
                return Some(index);
            }
        }
        scan::enter(candidates, tried, || scan::least_loaded(candidates, tried, &mut draws))
    }

    /// Two drawn by weight, different ones where there are two.
    #[inline]
    fn pair(&self, count: usize, draws: &mut Draws) -> (usize, usize) {
        let first = self.alias.draw(draws);
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
fn better(
    candidates: &[Candidate],
    tried: &[usize],
    first: usize,
    second: usize,
    prefers: impl Fn((&Candidate, Load), (&Candidate, Load)) -> bool,
) -> Option<usize> {
    let loads = (
        scan::usable(&candidates[first], first, tried),
        scan::usable(&candidates[second], second, tried),
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
