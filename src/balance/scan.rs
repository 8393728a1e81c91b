//! Looking at every candidate: what policies do where their quick way found
//! nobody, and what `least-connections` does in small pools.
//!
//! Called by the policies of this module. It raises an in-flight count only
//! through `InFlight::try_enter`, so a cap is never overshot.

use super::Candidate;
use super::draw::Draws;
use std::cmp::Ordering;

/// Scans repeated because the chosen one filled up meanwhile. Each repeat means
/// that another session got in, so the pool is moving; after these, whoever
/// lets us in first is good enough.
const SCANS_MAX: u32 = 8;

/// Equally loaded candidates that are remembered one by one: all of them in the
/// pools that are scanned by choice.
const EQUALS_MAX: usize = 64;

/// Chooses until the chosen one lets us in. `choose` gives a usable candidate,
/// or nobody if there is none.
#[inline]
pub(super) fn enter(
    candidates: &[Candidate],
    tried: &[usize],
    mut choose: impl FnMut() -> Option<usize>,
) -> Option<usize> {
    for _ in 0..SCANS_MAX {
        let index = choose()?;
        if candidates[index].try_enter() {
            return Some(index);
        }
    }
    (0..candidates.len()).find(|&index| !tried.contains(&index) && candidates[index].try_enter())
}

/// The usable candidate with the least (in-flight + 1) / weight; each of
/// several equals is as likely as the others.
#[inline]
pub(super) fn least_loaded(
    candidates: &[Candidate],
    tried: &[usize],
    draws: &mut Draws,
) -> Option<usize> {
    let mut best: Option<Load> = None;
    let mut equals = Equals { places: [0; EQUALS_MAX], seen: 0 };
    for (index, candidate) in candidates.iter().enumerate() {
        let Some(load) = usable(candidate, index, tried) else { continue };
        match best.map_or(Ordering::Less, |least| load.compare(least)) {
            Ordering::Greater => {}
            Ordering::Equal => equals.add(index, draws),
            Ordering::Less => {
                best = Some(load);
                equals.seen = 0;
                equals.add(index, draws);
            }
        }
    }
    equals.draw(draws)
}

/// Equally loaded candidates: one random number at the end instead of one for
/// each, which in an idle pool is most of a pick's cost.
struct Equals {
    places: [usize; EQUALS_MAX],
    seen: usize,
}

impl Equals {
    /// Beyond [`EQUALS_MAX`], a fair sample of them is kept (Vitter's algorithm R,
    /// 1985).
    #[inline]
    fn add(&mut self, index: usize, draws: &mut Draws) {
        let place = match self.seen {
            seen if seen < EQUALS_MAX => seen,
            seen => draws.below(seen as u64 + 1) as usize,
        };
        if let Some(kept) = self.places.get_mut(place) {
            *kept = index;
        }
        self.seen += 1;
    }

    #[inline]
    fn draw(&self, draws: &mut Draws) -> Option<usize> {
        match self.seen.min(EQUALS_MAX) {
            0 => None,
            1 => Some(self.places[0]),
            several => Some(self.places[draws.below(several as u64) as usize]),
        }
    }
}

/// A usable candidate, with probability in proportion to its weight among the
/// usable ones.
pub(super) fn by_weight(
    candidates: &[Candidate],
    tried: &[usize],
    draws: &mut Draws,
) -> Option<usize> {
    let mut chosen = None;
    let mut total = 0;
    for (index, candidate) in candidates.iter().enumerate() {
        if usable(candidate, index, tried).is_some() {
            total += u64::from(candidate.weight);
            if draws.below(total) < u64::from(candidate.weight) {
                chosen = Some(index);
            }
        }
    }
    chosen
}

/// The load of a candidate that is untried and below its cap.
#[inline]
pub(super) fn usable(candidate: &Candidate, index: usize, tried: &[usize]) -> Option<Load> {
    let held = u64::from(candidate.in_flight.get()) + 1;
    (candidate.has_room() && (tried.is_empty() || !tried.contains(&index)))
        .then_some(Load { held, weight: u64::from(candidate.weight) })
}

/// (in-flight + 1) / weight; the 1 is the session about to be added.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    held: u64,
    weight: u64,
}

impl Load {
    /// Compares by multiplying crosswise: no division, no rounding. Held is at
    /// most 2^32 and weights are below it, so the products fit.
    #[inline]
    fn compare(self, other: Load) -> Ordering {
        (self.held * other.weight).cmp(&(other.held * self.weight))
    }

    /// Whether it is the lesser load.
    #[inline]
    pub(super) fn is_below(self, other: Load) -> bool {
        self.compare(other) == Ordering::Less
    }

    /// The same with a price for each session.
    #[inline]
    pub(super) fn costs_less(self, price: f32, other: Load, other_price: f32) -> bool {
        let (mine, theirs) = (self.held * other.weight, other.held * self.weight);
        f64::from(price) * (mine as f64) < f64::from(other_price) * (theirs as f64)
    }
}
