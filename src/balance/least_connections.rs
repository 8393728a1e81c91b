//! `least-connections`: whoever holds the least for its weight.
//!
//! Prepared at table build, picked from by every worker. The count it compares
//! goes up at the pick itself, so workers that race do not all find the same
//! candidate empty; it never compares in floating point.

use super::draw::Draws;
use super::two_choices::TwoChoices;
use super::{Candidate, scan};

/// Candidates one pick looks at: up to here the least loaded of all is chosen,
/// at a cost of some 100 ns. Beyond, reading every backend's count would cost
/// more than it gains, and the better of two weighted draws takes its place.
const SCANNED_MAX: usize = 64;

/// See the module's documentation.
#[derive(Debug)]
pub(super) enum LeastConnections {
    /// Every candidate is looked at.
    Scan,
    /// More than [`SCANNED_MAX`] candidates.
    Large(TwoChoices),
}

impl LeastConnections {
    /// Over `candidates` (at least one).
    pub(super) fn new(candidates: &[Candidate]) -> LeastConnections {
        if candidates.len() <= SCANNED_MAX {
            LeastConnections::Scan
        } else {
            LeastConnections::Large(TwoChoices::new(candidates))
        }
    }

    /// The least loaded of those that can be used.
    #[inline]
    pub(super) fn pick(
        &self,
        candidates: &[Candidate],
        draw: u64,
        tried: &[usize],
    ) -> Option<usize> {
        match self {
            LeastConnections::Scan => {
                let mut draws = Draws::new(draw);
                scan::enter(candidates, tried, || scan::least_loaded(candidates, tried, &mut draws))
            }
            LeastConnections::Large(two) => two.pick(candidates, draw, tried),
        }
    }
}
