//! `peak-ewma`: of two weighted draws, the one that promises to be done sooner.
//!
//! Prepared at table build, picked from by every worker. The cost of a
//! candidate is its latency estimate x (in-flight + 1) / weight (Finagle's and
//! linkerd2-proxy's balancer), so a backend that answers slowly gets little and
//! one that hangs gets next to nothing, long before anybody has judged it.
//! It never looks at more than two candidates unless those two are no use.
//!
//! Where nothing is known of one of the two (it is new, or nobody asked it for
//! long) load alone is compared. So a new backend is tried at once, and not by
//! everybody at once.

use super::slow_start::Passed;
use super::two_choices::TwoChoices;
use super::{Candidate, scan::LoadRatio};

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct PeakEwma(TwoChoices);

impl PeakEwma {
    /// Over `candidates` (at least one); `slow` as for [`TwoChoices::new`].
    pub(super) fn new(candidates: &[Candidate], slow: bool) -> PeakEwma {
        PeakEwma(TwoChoices::new(candidates, slow))
    }

    /// The cheaper of two that can be used, as of `at` (milliseconds).
    #[inline]
    pub(super) fn pick(
        &self,
        candidates: &[Candidate],
        draw: u64,
        at: u64,
        passed: Passed<'_>,
    ) -> Option<usize> {
        self.0.pick_by(candidates, draw, passed, |(a, load_a), (b, load_b)| {
            is_cheaper((a, load_a), (b, load_b), at)
        })
    }
}

#[inline]
fn is_cheaper(
    (a, load_a): (&Candidate, LoadRatio),
    (b, load_b): (&Candidate, LoadRatio),
    at: u64,
) -> bool {
    match (a.latency.estimate(at), b.latency.estimate(at)) {
        (Some(sooner), Some(later)) => load_a.costs_less(sooner, load_b, later),
        _ => load_a < load_b,
    }
}
