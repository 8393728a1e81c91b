//! `random`: each pick is an independent weighted draw.
//!
//! Prepared at table build, used by every worker. The only shared data that it writes
//! are the in-flight counts. It ignores load, but skips candidates at their caps.

use super::alias::AliasTable;
use super::recorder::PickRecorder;
use super::{Candidate, scan};
use crate::balance::random_stream::DrawStream;

/// The prepared policy.
#[derive(Debug)]
pub(super) struct Random {
    alias: AliasTable,
    /// Sum of all weights.
    total: u64,
}

impl Random {
    /// Prepares the policy for `candidates` (at least one).
    pub(super) fn new(candidates: &[Candidate]) -> Random {
        let alias = AliasTable::new(candidates.iter().map(|c| c.weight));
        Random { alias, total: scan::total_weight(candidates) }
    }

    /// Picks a usable candidate at random, in proportion to the weights.
    #[inline]
    pub(super) fn pick(
        &self,
        candidates: &[Candidate],
        draw: u64,
        tried: &[usize],
        recorder: &mut impl PickRecorder,
    ) -> Option<usize> {
        let mut draws = DrawStream::new(draw);
        let draw = |draws: &mut DrawStream| self.alias.draw(draws);
        scan::enter_drawn(candidates, tried, self.total, &mut draws, recorder, draw)
    }
}
