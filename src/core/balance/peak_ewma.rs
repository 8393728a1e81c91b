//! `peak-ewma`: picks the cheaper of two weighted draws.
//!
//! Prepared at table build, used by every worker. The cost of a candidate is its
//! latency estimate x (in-flight + 1) / weight, as in Finagle and linkerd2-proxy. A
//! slow backend gets few sessions, and a hanging backend gets almost none, before any
//! probe has failed. A pick looks at more than two candidates only if those two are not
//! usable.
//!
//! If one of the two has no estimate, only the loads are compared. A new or long unused
//! backend therefore gets sessions immediately, but not all of them.

use super::recorder::PickRecorder;
use super::slow_start::Excluded;
use super::two_choices::TwoChoices;
use super::{Candidate, scan::LoadRatio};

/// The prepared policy.
#[derive(Debug)]
pub(super) struct PeakEwma(TwoChoices);

impl PeakEwma {
    /// Prepares the policy for `candidates` (at least one); `slow` as in
    /// [`TwoChoices::new`].
    pub(super) fn new(candidates: &[Candidate], slow: bool) -> PeakEwma {
        PeakEwma(TwoChoices::new(candidates, slow))
    }

    /// Picks the cheaper of two usable candidates at time `at` (milliseconds).
    #[inline]
    pub(super) fn pick(
        &self,
        candidates: &[Candidate],
        draw: u64,
        at: u64,
        excluded: Excluded<'_>,
        recorder: &mut impl PickRecorder,
    ) -> Option<usize> {
        let price = |candidate: &Candidate| candidate.latency.estimate(at);
        self.0.pick_by(candidates, draw, excluded, recorder, price, |(a, load_a), (b, load_b)| {
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
