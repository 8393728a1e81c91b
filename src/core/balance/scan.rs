//! Looking at every candidate: what policies do where their quick way found
//! nobody, and what `least-connections` does in small pools.
//!
//! Called by the policies of this module. It raises an in-flight count only
//! through `InFlight::try_enter`, so a cap is never overshot.

use super::Candidate;
use super::slow_start::Passed;
use crate::balance::random_stream::DrawStream;
use std::cmp::Ordering;

/// Scans repeated because the chosen one filled up meanwhile. Each repeat means
/// that another session got in, so the pool is moving; after these, whoever
/// lets us in first is good enough.
const SCANS_MAX: u32 = 8;

/// Chooses until the chosen one lets us in. `choose` gives a usable candidate,
/// or nobody if there is none.
#[inline]
pub(super) fn enter(
    candidates: &[Candidate],
    passed: Passed<'_>,
    mut choose: impl FnMut() -> Option<usize>,
) -> Option<usize> {
    for _ in 0..SCANS_MAX {
        let index = choose()?;
        if candidates[index].try_enter() {
            return Some(index);
        }
    }
    let enters = |index: &usize| {
        let candidate = &candidates[*index];
        !passed.has(*index, candidate) && candidate.try_enter()
    };
    (0..candidates.len()).find(enters)
}

/// The usable candidate with the least (in-flight + 1) / weight; each of
/// several equals is as likely as the others.
#[inline]
pub(super) fn least_loaded(
    candidates: &[Candidate],
    passed: Passed<'_>,
    draws: &mut DrawStream,
) -> Option<usize> {
    let mut best: Option<(usize, LoadRatio)> = None;
    let mut equals = 1;
    for (index, candidate) in candidates.iter().enumerate() {
        let Some(load) = usable(candidate, index, passed) else { continue };
        match best.map_or(Ordering::Less, |(_, least)| load.cmp(&least)) {
            Ordering::Greater => {}
            Ordering::Equal => {
                equals += 1;
                if draws.below(equals) == 0 {
                    best = Some((index, load));
                }
            }
            Ordering::Less => {
                best = Some((index, load));
                equals = 1;
            }
        }
    }
    best.map(|(index, _)| index)
}

/// A usable candidate, with probability in proportion to its weight among the
/// usable ones.
pub(super) fn by_weight(
    candidates: &[Candidate],
    passed: Passed<'_>,
    draws: &mut DrawStream,
) -> Option<usize> {
    let mut chosen = None;
    let mut total = 0;
    for (index, candidate) in candidates.iter().enumerate() {
        if usable(candidate, index, passed).is_some() {
            total += u64::from(candidate.weight);
            if draws.below(total) < u64::from(candidate.weight) {
                chosen = Some(index);
            }
        }
    }
    chosen
}

/// The load of a candidate that is not passed over and below its cap.
#[inline]
pub(super) fn usable(candidate: &Candidate, index: usize, passed: Passed<'_>) -> Option<LoadRatio> {
    let load = LoadRatio::of(candidate);
    (candidate.has_room() && !passed.has(index, candidate)).then_some(load)
}

/// (in-flight + 1) / weight; the 1 is the session about to be added.
#[derive(Debug, Clone, Copy)]
pub(super) struct LoadRatio {
    held: u64,
    weight: u64,
}

impl LoadRatio {
    /// Of one session more.
    #[inline]
    pub(super) fn of(candidate: &Candidate) -> LoadRatio {
        let held = u64::from(candidate.in_flight.get()) + 1;
        LoadRatio { held, weight: u64::from(candidate.weight) }
    }

    /// Compares loads with a price for each session.
    #[inline]
    pub(super) fn costs_less(self, price: f32, other: LoadRatio, other_price: f32) -> bool {
        let (mine, theirs) = (self.held * other.weight, other.held * self.weight);
        f64::from(price) * (mine as f64) < f64::from(other_price) * (theirs as f64)
    }
}

impl Ord for LoadRatio {
    /// Compares by multiplying crosswise: no division, no rounding. Held is at
    /// most 2^32 and weights are below it, so the products fit.
    #[inline]
    fn cmp(&self, other: &LoadRatio) -> Ordering {
        (self.held * other.weight).cmp(&(other.held * self.weight))
    }
}

impl PartialOrd for LoadRatio {
    #[inline]
    fn partial_cmp(&self, other: &LoadRatio) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for LoadRatio {
    #[inline]
    fn eq(&self, other: &LoadRatio) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for LoadRatio {}
