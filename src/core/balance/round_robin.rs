//! `weighted-round-robin`: a smooth sequence made ahead of time and one shared
//! position in it.
//!
//! Prepared at table build, picked from by every worker. While nobody is
//! skipped it is exact over the whole process at any number of workers, since
//! each place is given exactly once; it never locks and never starts over at
//! the heaviest because of a reload. (Exact in the weights as `smooth::places`
//! leaves them: only very long periods are rounded.)

use super::position::Position;
use super::slow_start::Passed;
use super::{Candidate, RoundRobinPosition, scan};
use crate::balance::random_stream::DrawStream;
use crate::balance::smooth_sequence;
use std::sync::Arc;

/// Places one pick may take when those it got belong to somebody it cannot
/// use. Taking (rather than looking ahead) hands the place after a skipped one
/// to whoever comes next in turn, so that no single successor gets it all; a
/// few suffice, more would burn the skipped one's share on retries.
const TAKES_MAX: usize = 4;

/// Random places looked at after that (a random place is a draw by weight),
/// before the choice is made over all candidates.
const DRAWS_MAX: usize = 8;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct RoundRobin {
    /// Places of each candidate in one period.
    places: Arc<[u32]>,
    /// One period; invariant: never empty.
    sequence: Arc<[u32]>,
    /// Shared with the tables before this one that had the same sequence.
    position: Arc<Position>,
}

impl RoundRobin {
    /// Over `candidates` (at least one). `previous` is the round robin it
    /// replaces and its candidates: with the same keys in the same proportions
    /// both go on through one sequence, sharing the position; otherwise this
    /// one starts as far into its period as the other has come.
    pub(super) fn new(
        candidates: &[Candidate],
        previous: Option<(&RoundRobin, &[Candidate])>,
    ) -> RoundRobin {
        let places = smooth_sequence::places(candidates.iter().map(|c| c.weight));
        if let Some((before, old)) = previous
            && *before.places == *places
            && old.iter().map(|c| &c.key).eq(candidates.iter().map(|c| &c.key))
        {
            return RoundRobin {
                places: Arc::clone(&before.places),
                sequence: Arc::clone(&before.sequence),
                position: Arc::clone(&before.position),
            };
        }
        let sequence: Arc<[u32]> = smooth_sequence::sequence(&places).into();
        let start = previous.map_or(0, |(before, _)| before.scaled_to(sequence.len()));
        RoundRobin {
            places: places.into(),
            sequence,
            position: Arc::new(Position::starting_at(start)),
        }
    }

    /// The candidate of the next place whose candidate can be used.
    #[inline]
    pub(super) fn pick(
        &self,
        candidates: &[Candidate],
        draw: u64,
        tried: &[usize],
    ) -> Option<usize> {
        for _ in 0..TAKES_MAX {
            let index = self.at(self.position.take());
            if !tried.contains(&index) && candidates[index].try_enter() {
                return Some(index);
            }
        }
        self.skip(candidates, draw, tried)
    }

    /// A usable candidate by weight: the turn came to nobody who can be used.
    #[cold]
    fn skip(&self, candidates: &[Candidate], draw: u64, tried: &[usize]) -> Option<usize> {
        let mut draws = DrawStream::new(draw);
        for _ in 0..DRAWS_MAX {
            let index = self.at(draws.below(self.sequence.len() as u64));
            if !tried.contains(&index) && candidates[index].try_enter() {
                return Some(index);
            }
        }
        let passed = Passed::over(tried);
        scan::enter(candidates, passed, || scan::by_weight(candidates, passed, &mut draws))
    }

    /// How far into its period it has come, and the period.
    pub(super) fn position(&self) -> RoundRobinPosition {
        let period = self.sequence.len() as u64;
        RoundRobinPosition { place: self.position.peek() % period, period }
    }

    /// Goes on as far into its period as another has come in its.
    pub(super) fn resume_at(&self, turn: RoundRobinPosition) {
        let (place, period) = (u128::from(turn.place), u128::from(turn.period.max(1)));
        let scaled = place % period * self.sequence.len() as u128 / period;
        self.position.move_to(scaled as u64);
    }

    #[inline]
    fn at(&self, place: u64) -> usize {
        self.sequence[(place % self.sequence.len() as u64) as usize] as usize
    }

    /// The place as far into a period of `length` as this one has come in its.
    fn scaled_to(&self, length: usize) -> u64 {
        let period = self.sequence.len() as u128;
        (u128::from(self.position.peek()) % period * length as u128 / period) as u64
    }
}
