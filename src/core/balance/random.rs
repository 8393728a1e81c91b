//! `random`: each pick is a weighted draw of its own.
//!
//! Prepared at table build, picked from by every worker. It shares nothing
//! that is written but the in-flight counts, and does not look at load except
//! to skip whoever is at its cap.

use super::alias::AliasTable;
use super::slow_start::Passed;
use super::{Candidate, scan};
use crate::balance::random_stream::DrawStream;

/// Draws before every candidate is looked at; with half of the weight out of
/// reach, one pick in 256 gets there.
const DRAWS_MAX: usize = 8;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Random {
    alias: AliasTable,
}

impl Random {
    /// Over `candidates` (at least one).
    pub(super) fn new(candidates: &[Candidate]) -> Random {
        Random { alias: AliasTable::new(candidates.iter().map(|c| c.weight)) }
    }

    /// Drawn by weight among those that can be used.
    #[inline]
    pub(super) fn pick(
        &self,
        candidates: &[Candidate],
        draw: u64,
        tried: &[usize],
    ) -> Option<usize> {
        let mut draws = DrawStream::new(draw);
        for _ in 0..DRAWS_MAX {
            let index = self.alias.draw(&mut draws);
            if !tried.contains(&index) && candidates[index].try_enter() {
                return Some(index);
            }
        }
        let passed = Passed::over(tried);
        scan::enter(candidates, passed, || scan::by_weight(candidates, passed, &mut draws))
    }
}
