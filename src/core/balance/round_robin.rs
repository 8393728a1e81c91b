//! `weighted-round-robin`: a precomputed smooth sequence and one shared position in it.
//!
//! Prepared at table build, used by every worker. It never locks. While no candidate is
//! skipped, the distribution is exact over the whole process with any number of
//! workers, because each place is taken exactly once. Very long periods are rounded
//! first (see `smooth_sequence::places`). A reload does not restart the sequence.

use super::position::Position;
use super::recorder::PickRecorder;
use super::{Candidate, RoundRobinPosition, scan};
use crate::balance::random_stream::DrawStream;
use crate::balance::smooth_sequence;
use crate::decision::Figures;
use std::sync::Arc;

/// Maximum number of places that a pick takes while their candidates are unusable.
/// Taking a place, instead of looking ahead, leaves the place after a skipped one to
/// the next pick, so no single successor gets the whole share of the skipped candidate.
/// A higher limit would use up places of other candidates on retries.
const TAKES_MAX: usize = 4;

/// The prepared policy.
#[derive(Debug)]
pub(super) struct RoundRobin {
    /// Number of places of each candidate per period.
    places: Arc<[u32]>,
    /// The candidate of each place in one period. Invariant: never empty.
    sequence: Arc<[u32]>,
    /// Shared with earlier tables that have the same sequence.
    position: Arc<Position>,
    /// Sum of all weights.
    total: u64,
}

impl RoundRobin {
    /// Prepares the policy for `candidates` (at least one). `previous` is the replaced
    /// round robin and its candidates. If keys and proportions are the same, both share
    /// the sequence and the position. Otherwise the new round robin starts at the same
    /// relative position.
    pub(super) fn new(
        candidates: &[Candidate],
        previous: Option<(&RoundRobin, &[Candidate])>,
    ) -> RoundRobin {
        let total = scan::total_weight(candidates);
        let places = smooth_sequence::places(candidates.iter().map(|c| c.weight));
        if let Some((before, old)) = previous
            && *before.places == *places
            && old.iter().map(|c| &c.key).eq(candidates.iter().map(|c| &c.key))
        {
            return RoundRobin {
                places: Arc::clone(&before.places),
                sequence: Arc::clone(&before.sequence),
                position: Arc::clone(&before.position),
                total,
            };
        }
        let sequence: Arc<[u32]> = smooth_sequence::sequence(&places).into();
        let start = previous.map_or(0, |(before, _)| before.scaled_to(sequence.len()));
        RoundRobin {
            places: places.into(),
            sequence,
            position: Arc::new(Position::starting_at(start)),
            total,
        }
    }

    /// Picks the candidate of the next place that has a usable candidate.
    #[inline]
    pub(super) fn pick(
        &self,
        candidates: &[Candidate],
        draw: u64,
        tried: &[usize],
        recorder: &mut impl PickRecorder,
    ) -> Option<usize> {
        for _ in 0..TAKES_MAX {
            let place = recorder.take(&self.position);
            let index = self.at(place);
            if recorder.try_use(candidates, index, tried) {
                let period = self.sequence.len() as u64;
                recorder.decided(|_| Figures::Turn { position: place % period, period });
                return Some(index);
            }
        }
        self.pick_by_weight(candidates, draw, tried, recorder)
    }

    /// Picks a usable candidate by weight after [`TAKES_MAX`] places without one.
    #[cold]
    fn pick_by_weight(
        &self,
        candidates: &[Candidate],
        draw: u64,
        tried: &[usize],
        recorder: &mut impl PickRecorder,
    ) -> Option<usize> {
        let mut draws = DrawStream::new(draw);
        // A random place is a draw by weight.
        let draw = |draws: &mut DrawStream| self.at(draws.below(self.sequence.len() as u64));
        scan::enter_drawn(candidates, tried, self.total, &mut draws, recorder, draw)
    }

    /// Returns the position in the period and the period.
    pub(super) fn position(&self) -> RoundRobinPosition {
        let period = self.sequence.len() as u64;
        RoundRobinPosition { place: self.position.peek() % period, period }
    }

    /// Moves to the same relative position as `other`, scaled to this period.
    pub(super) fn resume_at(&self, other: RoundRobinPosition) {
        let (place, period) = (u128::from(other.place), u128::from(other.period.max(1)));
        let scaled = place % period * self.sequence.len() as u128 / period;
        self.position.move_to(scaled as u64);
    }

    #[inline]
    fn at(&self, place: u64) -> usize {
        self.sequence[(place % self.sequence.len() as u64) as usize] as usize
    }

    /// Returns the relative position scaled to a period of `length` places.
    fn scaled_to(&self, length: usize) -> u64 {
        let period = self.sequence.len() as u128;
        (u128::from(self.position.peek()) % period * length as u128 / period) as u64
    }
}
