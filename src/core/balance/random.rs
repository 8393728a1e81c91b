//! `random`: each pick is an independent weighted draw.
//!
//! Prepared at table build, used by every worker. The only shared data that it writes
//! are the in-flight counts. It ignores load, but skips candidates at their caps.

use super::alias::AliasTable;
use super::recorder::PickRecorder;
use super::scan::share;
use super::{Candidate, scan};
use crate::balance::random_stream::DrawStream;

/// Draws before all candidates are scanned. If candidates with half of the weight are
/// not usable, one pick in 256 scans.
const DRAWS_MAX: usize = 8;

/// The prepared policy.
#[derive(Debug)]
pub(super) struct Random {
    alias: AliasTable,
}

impl Random {
    /// Prepares the policy for `candidates` (at least one).
    pub(super) fn new(candidates: &[Candidate]) -> Random {
        Random { alias: AliasTable::new(candidates.iter().map(|c| c.weight)) }
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
        for _ in 0..DRAWS_MAX {
            let index = self.alias.draw(&mut draws);
            if recorder.try_use(candidates, index, tried) {
                recorder.decided(|_| share(candidates, index));
                return Some(index);
            }
        }
        scan::enter_by_weight(candidates, tried, &mut draws, recorder)
    }
}
