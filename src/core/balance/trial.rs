//! The trial of a backend that comes back from an ejection: one session at a
//! time may enter, and it decides.
//!
//! Part of a backend's `InFlight`, so that every pick of every worker and of
//! every table, old ones too, goes by it at the price of a load next to one it
//! makes anyway. The controller begins and ends trials; the session that
//! entered says how far it has come. Model-checked with loom. Never blocks.

#[cfg(tidegate_loom)]
use loom::sync::atomic::{AtomicU32, Ordering};
use std::num::NonZeroU32;
#[cfg(not(tidegate_loom))]
use std::sync::atomic::{AtomicU32, Ordering};

/// Bits of the word that hold the phase; the number of the trial is above.
const PHASE_BITS: u32 = 3;
const PHASE_MASK: u32 = (1 << PHASE_BITS) - 1;

/// How far a trial has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum TrialPhase {
    /// No trial: everybody may enter.
    None,
    /// The next session to come may enter.
    Open,
    /// A session has entered and is about to say so.
    Entered,
    /// That session is connecting.
    Claimed,
    /// Its connection stands; nobody has said anything.
    Connected,
    /// Its client has spoken; the backend has not answered.
    ClientSpoke,
    /// It had what it came for.
    Passed,
    /// The backend failed it, or is shut ([`super::in_flight::InFlight::shut`]).
    Failed,
}

/// Names a trial, so that a session of an earlier one has no say in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrialId(NonZeroU32);

/// See the module's documentation. The number goes around after 2^29 trials of
/// one backend, which at one a millisecond is six days of a single session.
#[derive(Debug)]
pub(super) struct TrialCell(AtomicU32);

// === impl TrialCell ===

impl TrialCell {
    pub(super) fn new() -> TrialCell {
        TrialCell(AtomicU32::new(1 << PHASE_BITS))
    }

    pub(super) fn phase(&self) -> TrialPhase {
        TrialPhase::of(self.0.load(Ordering::Acquire))
    }

    /// Whether there is no trial, or it takes a session.
    #[inline]
    pub(super) fn has_room(&self) -> bool {
        matches!(
            TrialPhase::of(self.0.load(Ordering::Relaxed)),
            TrialPhase::None | TrialPhase::Open
        )
    }

    /// Whether there is no trial.
    #[inline]
    pub(super) fn is_none(&self) -> bool {
        TrialPhase::of(self.0.load(Ordering::Relaxed)) == TrialPhase::None
    }

    /// Takes the one place there is; true for whoever got it.
    pub(super) fn try_take(&self) -> bool {
        let word = self.0.load(Ordering::Acquire);
        TrialPhase::of(word) == TrialPhase::Open && self.swap(word, TrialPhase::Entered)
    }

    /// Gives the place back that [`TrialCell::try_take`] gave.
    pub(super) fn release(&self) {
        let word = self.0.load(Ordering::Acquire);
        if TrialPhase::of(word) == TrialPhase::Entered {
            self.swap(word, TrialPhase::Open);
        }
    }

    /// Makes the caller, who has just entered, the session that decides; `None`
    /// where there is no trial, or another session's.
    #[inline]
    pub(super) fn claim(&self) -> Option<TrialId> {
        let word = self.0.load(Ordering::Acquire);
        if TrialPhase::of(word) != TrialPhase::Entered || !self.swap(word, TrialPhase::Claimed) {
            return None;
        }
        NonZeroU32::new(word >> PHASE_BITS).map(TrialId)
    }

    /// The session of that trial has come so far, unless the trial is over or
    /// decided.
    pub(super) fn advance(&self, id: TrialId, phase: TrialPhase) {
        let mut word = self.0.load(Ordering::Acquire);
        while word >> PHASE_BITS == id.0.get() && TrialPhase::of(word).is_under_way() {
            let to = word & !PHASE_MASK | phase as u32;
            match self.0.compare_exchange(word, to, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return,
                Err(now) => word = now,
            }
        }
    }

    /// Starts a trial under a new number. The controller alone does this.
    pub(super) fn begin(&self) {
        self.replace(|word| {
            let number = (word >> PHASE_BITS).wrapping_add(1) << PHASE_BITS;
            // Zero is no number.
            let number = if number == 0 { 1 << PHASE_BITS } else { number };
            number | TrialPhase::Open as u32
        });
    }

    /// Lets everybody in. The controller alone does this.
    pub(super) fn end(&self) {
        self.replace(|word| word & !PHASE_MASK | TrialPhase::None as u32);
    }

    /// Lets nobody in, as after a trial that failed. False during a trial. The
    /// controller alone does this.
    pub(super) fn shut(&self) -> bool {
        let word = self.0.load(Ordering::Acquire);
        TrialPhase::of(word) == TrialPhase::None && self.swap(word, TrialPhase::Failed)
    }

    /// Lets everybody in where nobody may enter. The controller alone does this.
    pub(super) fn reopen(&self) {
        let word = self.0.load(Ordering::Acquire);
        if TrialPhase::of(word) == TrialPhase::Failed {
            self.swap(word, TrialPhase::None);
        }
    }

    fn replace(&self, next: impl Fn(u32) -> u32) {
        let mut word = self.0.load(Ordering::Acquire);
        while let Err(now) =
            self.0.compare_exchange(word, next(word), Ordering::AcqRel, Ordering::Acquire)
        {
            word = now;
        }
    }

    fn swap(&self, from: u32, phase: TrialPhase) -> bool {
        let to = from & !PHASE_MASK | phase as u32;
        self.0.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }
}

// === impl TrialPhase ===

impl TrialPhase {
    const ALL: [TrialPhase; 8] = [
        TrialPhase::None,
        TrialPhase::Open,
        TrialPhase::Entered,
        TrialPhase::Claimed,
        TrialPhase::Connected,
        TrialPhase::ClientSpoke,
        TrialPhase::Passed,
        TrialPhase::Failed,
    ];

    #[inline]
    fn of(word: u32) -> TrialPhase {
        TrialPhase::ALL[(word & PHASE_MASK) as usize]
    }

    /// A session has claimed it, and it is not decided.
    fn is_under_way(self) -> bool {
        matches!(self, TrialPhase::Claimed | TrialPhase::Connected | TrialPhase::ClientSpoke)
    }
}

#[cfg(test)]
#[cfg(not(tidegate_loom))]
mod tests {
    use super::*;

    #[test]
    fn trial_admits_one_session() {
        let trial = TrialCell::new();
        assert!(trial.is_none() && trial.claim().is_none() && !trial.try_take());
        trial.begin();
        assert!(trial.has_room() && trial.try_take());
        assert!(!trial.has_room() && !trial.try_take());
        assert!(trial.claim().is_some());
        assert!(trial.claim().is_none());
    }

    #[test]
    fn place_given_back_undecided_is_the_next_ones() {
        let trial = TrialCell::new();
        trial.begin();
        assert!(trial.try_take());
        let id = trial.claim().unwrap();
        trial.advance(id, TrialPhase::Connected);
        trial.advance(id, TrialPhase::Open);
        assert!(trial.try_take());
    }

    #[test]
    fn what_is_decided_stays_and_an_earlier_trial_has_no_say() {
        let trial = TrialCell::new();
        trial.begin();
        assert!(trial.try_take());
        let id = trial.claim().unwrap();
        trial.advance(id, TrialPhase::Failed);
        trial.advance(id, TrialPhase::Passed);
        assert_eq!(trial.phase(), TrialPhase::Failed);
        trial.end();
        trial.begin();
        assert!(trial.try_take() && trial.claim().is_some());
        trial.advance(id, TrialPhase::Passed);
        assert_eq!(trial.phase(), TrialPhase::Claimed);
    }
}

#[cfg(all(test, tidegate_loom))]
mod loom_models {
    use super::*;
    use loom::thread;
    use std::sync::Arc;

    #[test]
    fn of_racing_sessions_exactly_one_enters_a_trial_and_decides_it() {
        loom::model(|| {
            let trial = Arc::new(TrialCell::new());
            trial.begin();
            let session = |trial: &TrialCell| {
                let entered = trial.try_take();
                if entered {
                    let id = trial.claim().expect("nobody else may claim it");
                    trial.advance(id, TrialPhase::Passed);
                }
                entered
            };
            let others: Vec<_> = (0..2)
                .map(|_| {
                    let trial = Arc::clone(&trial);
                    thread::spawn(move || session(&trial))
                })
                .collect();
            let mut entered = vec![session(&trial)];
            entered.extend(others.into_iter().map(|other| other.join().expect("no panic")));
            assert_eq!(entered.into_iter().filter(|&e| e).count(), 1);
            assert_eq!(trial.phase(), TrialPhase::Passed);
        });
    }

    #[test]
    fn trial_ended_meanwhile_is_not_touched_by_its_session() {
        loom::model(|| {
            let trial = Arc::new(TrialCell::new());
            trial.begin();
            assert!(trial.try_take());
            let id = trial.claim().expect("it entered");
            let controller = {
                let trial = Arc::clone(&trial);
                thread::spawn(move || {
                    trial.end();
                    trial.begin();
                })
            };
            trial.advance(id, TrialPhase::Failed);
            controller.join().expect("no panic");
            assert_eq!(trial.phase(), TrialPhase::Open);
        });
    }
}
