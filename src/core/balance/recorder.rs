//! What a pick does to counts and positions, and what it notes on its way.
//!
//! Every policy runs against a [`PickRecorder`]. [`Unrecorded`] is the plain pick and costs
//! nothing. [`PickRecord`] is a real pick that also notes figures and the candidates that
//! were passed over. [`Rehearsal`] notes the same and changes nothing: no slot is taken, no
//! round robin advances. All three run the same code of a policy.

use super::position::Position;
use super::scan::LoadRatio;
use super::slow_start::Excluded;
use super::trial::TrialPhase;
use super::{Candidate, scan};
use crate::decision::{Figures, Load, SkipReason};

/// Candidates passed over that a record holds. The quick looks of a pick are fewer; a full
/// scan notes the first and counts the rest.
const NOTED_MAX: usize = 24;

/// Effects and notes of a pick.
pub(super) trait PickRecorder {
    /// Takes a slot on the candidate.
    #[inline]
    fn enter(&mut self, candidate: &Candidate) -> bool {
        candidate.try_enter()
    }

    /// Takes the next place of a round robin.
    #[inline]
    fn take(&mut self, position: &Position) -> u64 {
        position.take()
    }

    /// A candidate was looked at and passed over.
    #[inline]
    fn passed_over(&mut self, _index: usize, _candidate: &Candidate, _excluded: Excluded<'_>) {}

    /// A scan over all candidates begins: its notes replace those of the quick looks.
    #[inline]
    fn scan(&mut self, _candidates: &[Candidate], _excluded: Excluded<'_>) {}

    /// The pick begins again among all candidates.
    #[inline]
    fn restart(&mut self) {}

    /// What the pick was decided by.
    #[inline]
    fn decided(&mut self, _figures: impl FnOnce(Slots) -> Figures<usize>) {}

    /// Takes a slot on candidate `index` unless it is in `tried`.
    #[inline]
    fn try_use(&mut self, candidates: &[Candidate], index: usize, tried: &[usize]) -> bool {
        let candidate = &candidates[index];
        let used = !tried.contains(&index) && self.enter(candidate);
        if !used {
            self.passed_over(index, candidate, Excluded::tried(tried));
        }
        used
    }
}

/// Slots that the pick itself holds on the chosen candidate: 1 after a real pick.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slots(u32);

/// The plain pick.
#[derive(Debug)]
pub(super) struct Unrecorded;

/// The notes of a pick.
#[derive(Debug, Default)]
pub struct PickRecord {
    figures: Option<Figures<usize>>,
    /// At most [`NOTED_MAX`], without repetitions.
    noted: Vec<(usize, SkipReason)>,
    /// Passed over beyond those.
    more: u32,
}

/// A pick that changes nothing; a round robin's places advance within it alone.
#[derive(Debug, Default)]
pub(super) struct Rehearsal {
    record: PickRecord,
    taken: u64,
}

// === impl Slots ===

impl Slots {
    /// The load of the chosen candidate before the pick, at `answer_micros` per session.
    pub(super) fn chosen(self, candidate: &Candidate, answer_micros: Option<f32>) -> Load {
        let load = Slots(0).other(candidate, answer_micros);
        Load { sessions: load.sessions.saturating_sub(self.0), ..load }
    }

    /// The load of another candidate.
    pub(super) fn other(self, candidate: &Candidate, answer_micros: Option<f32>) -> Load {
        Load {
            sessions: candidate.in_flight.get(),
            weight: candidate.weight,
            answer_micros: answer_micros.map_or(0, |micros| micros as u32),
        }
    }
}

// === impl PickRecorder for Unrecorded ===

impl PickRecorder for Unrecorded {}

// === impl PickRecord ===

impl PickRecord {
    /// What the policy decided by.
    pub fn figures(&self) -> Figures<usize> {
        self.figures.unwrap_or(Figures::None)
    }

    /// Candidates passed over, by their indices, in the order they were looked at; at most
    /// 24.
    pub fn noted(&self) -> &[(usize, SkipReason)] {
        &self.noted
    }

    /// Candidates passed over, all of them.
    pub fn passed_over_total(&self) -> u32 {
        self.more + self.noted.len() as u32
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.figures = None;
        self.noted.clear();
        self.more = 0;
    }

    /// Adds the notes of a later pick among candidates whose indices begin at `first`. Its
    /// figures replace those before.
    pub(super) fn append(&mut self, other: PickRecord, first: usize) {
        let figures = other.figures.map(|figures| figures.named(|index| Some(first + index)));
        self.figures = figures.or(self.figures);
        self.more = self.more.saturating_add(other.more);
        for (index, reason) in other.noted {
            self.note(first + index, reason);
        }
    }

    /// The pick has ended. A chosen candidate was not passed over, whatever an earlier look
    /// found. Tried candidates were, also if the pick met none of them.
    pub(super) fn finish(&mut self, chosen: Option<usize>, tried: impl Iterator<Item = usize>) {
        self.noted.retain(|(index, _)| Some(*index) != chosen);
        for index in tried {
            let known = self.more > 0 || self.noted.iter().any(|(noted, _)| *noted == index);
            if !known {
                self.note(index, SkipReason::Tried);
            }
        }
    }

    fn note(&mut self, index: usize, reason: SkipReason) {
        if self.noted.len() < NOTED_MAX {
            self.noted.push((index, reason));
        } else {
            self.more = self.more.saturating_add(1);
        }
    }
}

impl PickRecorder for PickRecord {
    fn passed_over(&mut self, index: usize, candidate: &Candidate, excluded: Excluded<'_>) {
        if self.noted.iter().all(|(noted, _)| *noted != index) {
            self.note(index, reason(index, candidate, excluded));
        }
    }

    fn scan(&mut self, candidates: &[Candidate], excluded: Excluded<'_>) {
        self.clear();
        for (index, candidate) in candidates.iter().enumerate() {
            if scan::usable(candidate, index, excluded).is_none() {
                self.note(index, reason(index, candidate, excluded));
            }
        }
    }

    fn restart(&mut self) {
        self.clear();
    }

    fn decided(&mut self, figures: impl FnOnce(Slots) -> Figures<usize>) {
        self.figures = Some(figures(Slots(1)));
    }
}

// === impl Rehearsal ===

impl Rehearsal {
    /// Returns the notes of the pick.
    pub(super) fn into_record(self) -> PickRecord {
        self.record
    }
}

impl PickRecorder for Rehearsal {
    fn enter(&mut self, candidate: &Candidate) -> bool {
        candidate.has_room()
    }

    fn take(&mut self, position: &Position) -> u64 {
        self.taken += 1;
        position.peek().wrapping_add(self.taken - 1)
    }

    fn passed_over(&mut self, index: usize, candidate: &Candidate, excluded: Excluded<'_>) {
        self.record.passed_over(index, candidate, excluded);
    }

    fn scan(&mut self, candidates: &[Candidate], excluded: Excluded<'_>) {
        self.record.scan(candidates, excluded);
    }

    fn restart(&mut self) {
        self.record.clear();
    }

    fn decided(&mut self, figures: impl FnOnce(Slots) -> Figures<usize>) {
        self.record.figures = Some(figures(Slots(0)));
    }
}

/// Why a candidate cannot be used.
fn reason(index: usize, candidate: &Candidate, excluded: Excluded<'_>) -> SkipReason {
    if excluded.is_tried(index) {
        SkipReason::Tried
    } else if candidate.in_flight.trial() != TrialPhase::None {
        SkipReason::TrialOpen
    } else if excluded.contains(index, candidate) {
        SkipReason::SlowStart
    } else {
        SkipReason::AtCap
    }
}

/// The loads that decided for `chosen`, compared with `other`; `price` is the expected time
/// to answer, if the policy compares it.
pub(super) fn loads(
    candidates: &[Candidate],
    chosen: usize,
    other: Option<usize>,
    slots: Slots,
    price: impl Fn(&Candidate) -> Option<f32>,
) -> Figures<usize> {
    let of = |index: usize| slots.other(&candidates[index], price(&candidates[index]));
    Figures::Loads {
        chosen: slots.chosen(&candidates[chosen], price(&candidates[chosen])),
        other: other.map(|index| (index, of(index))),
    }
}

/// Returns the index of the lowest load among the usable candidates other than `chosen`.
pub(super) fn runner_up(
    candidates: &[Candidate],
    chosen: usize,
    excluded: Excluded<'_>,
) -> Option<usize> {
    let others = candidates.iter().enumerate().filter(|(index, _)| *index != chosen);
    let usable =
        others.filter_map(|(index, one)| Some((index, scan::usable(one, index, excluded)?)));
    usable.min_by(|(_, a), (_, b)| LoadRatio::cmp(a, b)).map(|(index, _)| index)
}
