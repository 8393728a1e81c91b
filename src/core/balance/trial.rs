//! The trial of a backend that returns from an ejection: one session at a time is
//! admitted, and its result decides.
//!
//! Part of a backend's `InFlight`. Every pick of every worker checks it, through old
//! tables too. The check costs one load next to a load that the pick makes anyway. The
//! controller starts and ends trials. The admitted session reports its phase. Nothing
//! here blocks. The code is model-checked with loom.

#[cfg(feature = "loom")]
use loom::sync::atomic::{AtomicU32, Ordering};
use std::num::NonZeroU32;
#[cfg(not(feature = "loom"))]
use std::sync::atomic::{AtomicU32, Ordering};

/// Bits of the word that hold the phase. The bits above them hold the number of the
/// trial.
const PHASE_BITS: u32 = 3;
const PHASE_MASK: u32 = (1 << PHASE_BITS) - 1;

/// Phase of a trial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum TrialPhase {
    /// No trial: all sessions are admitted.
    None,
    /// The next session is admitted.
    Open,
    /// A session was admitted and has not yet claimed the trial.
    Entered,
    /// The session claimed the trial and is connecting.
    Claimed,
    /// The backend connection is established. Neither side has sent data.
    Connected,
    /// The client has sent data. The backend has not answered.
    ClientSpoke,
    /// The session succeeded.
    Passed,
    /// The backend failed the trial, or is shut ([`super::in_flight::InFlight::shut`]).
    Failed,
}

/// Identifies a trial, so that a session of an earlier trial has no effect on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrialId(NonZeroU32);

/// Phase and number of a backend's current trial. The number wraps after 2^29 trials of
/// one backend. At one trial per millisecond that takes six days, and only a session of
/// that age could affect a wrong trial.
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

    /// Returns whether a session would be admitted: no trial is active, or the trial is
    /// open.
    #[inline]
    pub(super) fn has_room(&self) -> bool {
        matches!(
            TrialPhase::of(self.0.load(Ordering::Relaxed)),
            TrialPhase::None | TrialPhase::Open
        )
    }

    /// Returns whether no trial is active.
    #[inline]
    pub(super) fn is_none(&self) -> bool {
        TrialPhase::of(self.0.load(Ordering::Relaxed)) == TrialPhase::None
    }

    /// Takes the only slot of the trial. Returns true for exactly one caller.
    pub(super) fn try_take(&self) -> bool {
        let word = self.0.load(Ordering::Acquire);
        TrialPhase::of(word) == TrialPhase::Open && self.swap(word, TrialPhase::Entered)
    }

    /// Gives the slot of [`TrialCell::try_take`] back.
    pub(super) fn release(&self) {
        let word = self.0.load(Ordering::Acquire);
        if TrialPhase::of(word) == TrialPhase::Entered {
            self.swap(word, TrialPhase::Open);
        }
    }

    /// Makes the caller, which was just admitted, the deciding session. Returns `None`
    /// if no trial is active or another session has claimed it.
    #[inline]
    pub(super) fn claim(&self) -> Option<TrialId> {
        let word = self.0.load(Ordering::Acquire);
        if TrialPhase::of(word) != TrialPhase::Entered || !self.swap(word, TrialPhase::Claimed) {
            return None;
        }
        NonZeroU32::new(word >> PHASE_BITS).map(TrialId)
    }

    /// Records the phase that the session of trial `id` has reached. Does nothing if
    /// that trial has ended or is decided.
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

    /// Starts a trial with a new number. Only the controller calls this.
    pub(super) fn begin(&self) {
        self.replace(|word| {
            let number = (word >> PHASE_BITS).wrapping_add(1) << PHASE_BITS;
            // `TrialId` has no 0.
            let number = if number == 0 { 1 << PHASE_BITS } else { number };
            number | TrialPhase::Open as u32
        });
    }

    /// Ends the trial: all sessions are admitted. Only the controller calls this.
    pub(super) fn end(&self) {
        self.replace(|word| word & !PHASE_MASK | TrialPhase::None as u32);
    }

    /// Admits no session, as after a failed trial. Returns false and does nothing
    /// during a trial. Only the controller calls this.
    pub(super) fn shut(&self) -> bool {
        let word = self.0.load(Ordering::Acquire);
        TrialPhase::of(word) == TrialPhase::None && self.swap(word, TrialPhase::Failed)
    }

    /// Admits all sessions again if the cell is shut or the trial has failed. Only the
    /// controller calls this.
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

    /// Returns whether a session has claimed the trial and has not decided it.
    fn is_under_way(self) -> bool {
        matches!(self, TrialPhase::Claimed | TrialPhase::Connected | TrialPhase::ClientSpoke)
    }
}

#[cfg(test)]
#[cfg(not(feature = "loom"))]
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
    fn undecided_trial_goes_to_the_next_session() {
        let trial = TrialCell::new();
        trial.begin();
        assert!(trial.try_take());
        let id = trial.claim().unwrap();
        trial.advance(id, TrialPhase::Connected);
        trial.advance(id, TrialPhase::Open);
        assert!(trial.try_take());
    }

    #[test]
    fn decided_trial_keeps_its_result_and_ignores_earlier_sessions() {
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

#[cfg(all(test, feature = "loom"))]
mod loom_models {
    use super::*;
    use loom::thread;
    use std::sync::Arc;

    #[test]
    fn exactly_one_of_several_racing_sessions_enters_and_decides_a_trial() {
        loom::model(|| {
            let trial = Arc::new(TrialCell::new());
            trial.begin();
            let session = |trial: &TrialCell| {
                let entered = trial.try_take();
                if entered {
                    let id = trial.claim().expect("only the admitted session claims the trial");
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
    fn session_of_an_ended_trial_does_not_affect_the_next_trial() {
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
