//! Scans over all candidates.
//!
//! Policies call it when their quick pick found no usable candidate.
//! `least-connections` calls it in small pools. It raises an in-flight count only
//! through `InFlight::try_enter`, so a cap is never exceeded.

use super::Candidate;
use super::recorder::PickRecorder;
use super::slow_start::Excluded;
use crate::balance::random_stream::DrawStream;
use crate::decision::Figures;
use std::cmp::Ordering;

/// Maximum number of scans if the chosen candidate reaches its cap before the session
/// takes a slot. Each repetition means that another session took that slot. After the
/// last scan the first candidate with a free slot is taken.
const SCANS_MAX: u32 = 8;

/// Draws before all candidates are scanned. If candidates with half of the weight are
/// not usable, one pick in 256 scans.
const DRAWS_MAX: usize = 8;

/// Calls `choose` until the chosen candidate admits the session. `choose` returns a
/// usable candidate, or `None` if there is none.
#[inline]
pub(super) fn enter(
    candidates: &[Candidate],
    excluded: Excluded<'_>,
    recorder: &mut impl PickRecorder,
    mut choose: impl FnMut() -> Option<usize>,
) -> Option<usize> {
    for _ in 0..SCANS_MAX {
        recorder.scan(candidates, excluded);
        let index = choose()?;
        if recorder.enter(&candidates[index]) {
            return Some(index);
        }
    }
    let enters = |index: &usize| {
        let candidate = &candidates[*index];
        !excluded.contains(*index, candidate) && recorder.enter(candidate)
    };
    (0..candidates.len()).find(enters)
}

/// Enters a usable candidate by weight: tries [`DRAWS_MAX`] candidates that `draw` gives,
/// then draws among all usable ones. `total` is the sum of all weights, from [`total_weight`].
#[inline]
pub(super) fn enter_drawn(
    candidates: &[Candidate],
    tried: &[usize],
    total: u64,
    draws: &mut DrawStream,
    recorder: &mut impl PickRecorder,
    draw: impl Fn(&mut DrawStream) -> usize,
) -> Option<usize> {
    let quick = (0..DRAWS_MAX).find_map(|_| {
        let index = draw(draws);
        recorder.try_use(candidates, index, tried).then_some(index)
    });
    let index = quick.or_else(|| {
        let excluded = Excluded::tried(tried);
        enter(candidates, excluded, recorder, || by_weight(candidates, excluded, draws))
    })?;
    recorder.decided(|_| Figures::Share { weight: candidates[index].weight, total });
    Some(index)
}

/// Returns the sum of all weights. Policies compute it once, not in each pick.
pub(super) fn total_weight(candidates: &[Candidate]) -> u64 {
    candidates.iter().map(|candidate| u64::from(candidate.weight)).sum()
}

/// Returns the usable candidate with the lowest (in-flight + 1) / weight, chosen at
/// random among equals.
#[inline]
pub(super) fn least_loaded(
    candidates: &[Candidate],
    excluded: Excluded<'_>,
    draws: &mut DrawStream,
) -> Option<usize> {
    let mut best: Option<(usize, LoadRatio)> = None;
    let mut equals = 1;
    for (index, candidate) in candidates.iter().enumerate() {
        let Some(load) = usable(candidate, index, excluded) else { continue };
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

/// Returns a random usable candidate, with a probability in proportion to its weight.
fn by_weight(
    candidates: &[Candidate],
    excluded: Excluded<'_>,
    draws: &mut DrawStream,
) -> Option<usize> {
    let mut chosen = None;
    let mut total = 0;
    for (index, candidate) in candidates.iter().enumerate() {
        if usable(candidate, index, excluded).is_some() {
            total += u64::from(candidate.weight);
            if draws.below(total) < u64::from(candidate.weight) {
                chosen = Some(index);
            }
        }
    }
    chosen
}

/// Returns the load of a candidate that is not excluded and below its cap.
#[inline]
pub(super) fn usable(
    candidate: &Candidate,
    index: usize,
    excluded: Excluded<'_>,
) -> Option<LoadRatio> {
    let load = LoadRatio::of(candidate);
    (candidate.has_room() && !excluded.contains(index, candidate)).then_some(load)
}

/// (in-flight + 1) / weight. The 1 is the session to be added.
#[derive(Debug, Clone, Copy)]
pub(super) struct LoadRatio {
    held: u64,
    weight: u64,
}

impl LoadRatio {
    /// Returns the load with one more session.
    #[inline]
    pub(super) fn of(candidate: &Candidate) -> LoadRatio {
        let held = u64::from(candidate.in_flight.get()) + 1;
        LoadRatio { held, weight: u64::from(candidate.weight) }
    }

    /// Compares loads that are multiplied by a price per session.
    #[inline]
    pub(super) fn costs_less(self, price: f32, other: LoadRatio, other_price: f32) -> bool {
        let (mine, theirs) = (self.held * other.weight, other.held * self.weight);
        f64::from(price) * (mine as f64) < f64::from(other_price) * (theirs as f64)
    }
}

impl Ord for LoadRatio {
    /// Compares by cross multiplication: no division, no rounding. `held` is at most
    /// 2^32 and weights are lower, so the products fit.
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
