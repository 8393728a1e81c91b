//! The in-flight count of a backend, a frontend or the process: one shared
//! atomic that balances and caps at once.
//!
//! Raised at selection by the compare-and-swap that enforces the cap, so the
//! cap is never overshot however many workers race; lowered exactly once by
//! whoever raised it. A backend on trial lets a single session in, whatever its
//! cap. Model-checked with loom. Never blocks.
//!
//! # Sessions of a backend that died
//!
//! One count serves caps and loads, so a session that outlives its backend (the
//! backend has sent its FIN, the client has not closed) is load of whatever starts at
//! that address next. This is on purpose. A second count, of the sessions begun since
//! the backend last came up, would be wrong where the backend never died: one that
//! was `down` because it was too slow for its probes, or out of reach for a moment,
//! still serves its old sessions and would get all new ones on top, just when it
//! recovers. `down` does not tell the two apart, and the end a backend has sent does
//! so only at the price of two more shared writes in each session that the backend
//! ends first. The error left is on the safe side and bounded: a reset ends a
//! session at once, a FIN within `half_closed_timeout` (where that is off, when the
//! client closes), silence within `user_timeout` or keepalive. Until then a restarted
//! backend gets fewer sessions.

use super::trial::{Trial, TrialId, TrialPhase};
use crossbeam::utils::CachePadded;
#[cfg(tidegate_loom)]
use loom::sync::atomic::{AtomicU32, Ordering};
#[cfg(not(tidegate_loom))]
use std::sync::atomic::{AtomicU32, Ordering};

/// Sessions held at this moment.
#[derive(Debug)]
pub struct InFlight(CachePadded<Cells>);

/// What every entry looks at, on one cache line.
#[derive(Debug)]
struct Cells {
    held: AtomicU32,
    /// Held by the processes before this one; counts towards caps.
    elsewhere: AtomicU32,
    trial: Trial,
}

impl InFlight {
    /// Nothing held.
    pub fn new() -> InFlight {
        InFlight(CachePadded::new(Cells {
            held: AtomicU32::new(0),
            elsewhere: AtomicU32::new(0),
            trial: Trial::new(),
        }))
    }

    /// Takes a slot unless `max` are held; a `max` of 0 means no cap. During a
    /// trial only one session gets in until it is decided.
    #[inline]
    pub fn try_enter(&self, max: u32) -> bool {
        if self.0.trial.is_none() { self.try_hold(max) } else { self.try_enter_trial(max) }
    }

    #[inline]
    fn try_hold(&self, max: u32) -> bool {
        let cell = &self.0.held;
        if max == 0 {
            cell.fetch_add(1, Ordering::Relaxed);
            return true;
        }
        let max = max.saturating_sub(self.elsewhere());
        let mut held = cell.load(Ordering::Relaxed);
        while held < max {
            match cell.compare_exchange_weak(held, held + 1, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => held = now,
            }
        }
        false
    }

    #[cold]
    fn try_enter_trial(&self, max: u32) -> bool {
        if !self.0.trial.try_take() {
            // It may be over meanwhile.
            return self.0.trial.is_none() && self.try_hold(max);
        }
        let held = self.try_hold(max);
        if !held {
            self.0.trial.untake();
        }
        held
    }

    /// Whether [`InFlight::try_enter`] with that `max` would let somebody in.
    #[inline]
    pub fn has_room(&self, max: u32) -> bool {
        (max == 0 || self.total() < max) && self.0.trial.has_room()
    }

    /// Gives a slot back. Every successful `try_enter` is left exactly once.
    #[inline]
    pub fn leave(&self) {
        let held = self.0.held.fetch_sub(1, Ordering::AcqRel);
        assert!(held > 0, "an in-flight slot was given back twice");
    }

    /// Slots held, as of some recent moment.
    #[inline]
    pub fn get(&self) -> u32 {
        self.0.held.load(Ordering::Relaxed)
    }

    /// Sessions that the processes before this one hold, as they last said.
    #[inline]
    pub fn elsewhere(&self) -> u32 {
        self.0.elsewhere.load(Ordering::Relaxed)
    }

    /// Notes what the processes before hold. For the controller.
    pub fn set_elsewhere(&self, sessions: u32) {
        self.0.elsewhere.store(sessions, Ordering::Relaxed);
    }

    /// Sessions held by this process and those before.
    #[inline]
    pub fn total(&self) -> u32 {
        self.get().saturating_add(self.elsewhere())
    }
}

// === impl InFlight: the trial ===

impl InFlight {
    /// From now on a single session gets in. For the controller.
    pub fn begin_trial(&self) {
        self.0.trial.begin();
    }

    /// Everybody gets in again. For the controller.
    pub fn end_trial(&self) {
        self.0.trial.end();
    }

    /// Lets nobody in from now on, by whatever table, until [`InFlight::reopen`] or the
    /// next trial. False during a trial, which has its own say. For the controller.
    pub fn shut(&self) -> bool {
        self.0.trial.shut()
    }

    /// Ends what [`InFlight::shut`] began. For the controller.
    pub fn reopen(&self) {
        self.0.trial.reopen();
    }

    /// How far the trial has come.
    pub fn trial(&self) -> TrialPhase {
        self.0.trial.phase()
    }

    /// The trial that whoever has just entered is to decide, if there is one.
    /// (A session that entered right before the trial began may get it in place
    /// of the one that entered it: both are there, and either will do.)
    #[inline]
    pub fn claim_trial(&self) -> Option<TrialId> {
        if self.0.trial.is_none() { None } else { self.0.trial.claim() }
    }

    /// The session of that trial has come so far. [`TrialPhase::Open`] gives the
    /// place to the next session, as nothing was learnt from this one.
    pub fn advance_trial(&self, id: TrialId, phase: TrialPhase) {
        self.0.trial.advance(id, phase);
    }
}

impl Default for InFlight {
    fn default() -> Self {
        InFlight::new()
    }
}

#[cfg(test)]
#[cfg(not(tidegate_loom))]
mod tests {
    use super::*;

    #[test]
    fn cap_holds_and_a_slot_given_back_can_be_taken_again() {
        let in_flight = InFlight::new();
        assert!(in_flight.try_enter(2) && in_flight.try_enter(2));
        assert!(!in_flight.try_enter(2));
        in_flight.leave();
        assert!(in_flight.try_enter(2));
        assert_eq!(in_flight.get(), 2);
    }

    #[test]
    fn what_another_process_holds_counts_towards_the_cap() {
        let in_flight = InFlight::new();
        in_flight.set_elsewhere(2);
        assert!(!in_flight.try_enter(2) && !in_flight.has_room(2));
        assert!(in_flight.try_enter(3) && !in_flight.try_enter(3));
        assert_eq!((in_flight.get(), in_flight.total()), (1, 3));
        in_flight.set_elsewhere(0);
        assert!(in_flight.has_room(2) && in_flight.try_enter(2));
    }

    #[test]
    fn nobody_gets_into_what_is_shut_until_it_is_reopened() {
        let in_flight = InFlight::new();
        assert!(in_flight.try_enter(0) && in_flight.shut());
        assert!(!in_flight.try_enter(0) && !in_flight.try_enter(5) && !in_flight.has_room(0));
        assert!(in_flight.claim_trial().is_none(), "the session before is on no trial");
        in_flight.leave();
        in_flight.reopen();
        assert!(in_flight.has_room(0) && in_flight.try_enter(0));
        in_flight.begin_trial();
        assert!(!in_flight.shut());
        in_flight.reopen();
        assert_eq!(in_flight.trial(), TrialPhase::Open, "a trial has its own say");
    }

    #[test]
    fn lowered_cap_admits_nobody_until_enough_have_left() {
        let in_flight = InFlight::new();
        (0..5).for_each(|_| assert!(in_flight.try_enter(0)));
        (0..4).for_each(|_| {
            assert!(!in_flight.try_enter(2));
            in_flight.leave();
        });
        assert!(in_flight.try_enter(2));
    }

    #[test]
    #[should_panic(expected = "given back twice")]
    fn slot_given_back_twice_is_a_broken_invariant() {
        let in_flight = InFlight::new();
        assert!(in_flight.try_enter(1));
        in_flight.leave();
        in_flight.leave();
    }
}

#[cfg(all(test, tidegate_loom))]
mod loom_models {
    use super::*;
    use loom::sync::atomic::AtomicU32 as Count;
    use loom::thread;
    use std::sync::Arc;

    /// Three sessions at a cap: never more inside than it allows, each freed
    /// slot can be taken, nothing stays behind.
    fn three_sessions_at_a_cap_of(cap: u32) {
        let in_flight = Arc::new(InFlight::new());
        let inside = Arc::new(Count::new(0));
        let session = move |in_flight: &InFlight, inside: &Count| {
            let entered = in_flight.try_enter(cap);
            if entered {
                assert!(inside.fetch_add(1, Ordering::SeqCst) < cap, "cap overshot");
                inside.fetch_sub(1, Ordering::SeqCst);
                in_flight.leave();
            }
            entered
        };
        let others: Vec<_> = (0..2)
            .map(|_| {
                let (in_flight, inside) = (Arc::clone(&in_flight), Arc::clone(&inside));
                thread::spawn(move || session(&in_flight, &inside))
            })
            .collect();
        let mut entered = vec![session(&in_flight, &inside)];
        for other in others {
            entered.push(other.join().expect("a session panicked"));
        }
        assert!(entered.into_iter().filter(|&e| e).count() >= cap as usize);
        assert_eq!(in_flight.get(), 0);
    }

    #[test]
    fn cap_of_one_is_never_overshot() {
        bounded().check(|| three_sessions_at_a_cap_of(1));
    }

    #[test]
    fn cap_of_two_is_never_overshot() {
        bounded().check(|| three_sessions_at_a_cap_of(2));
    }

    /// Every interleaving with up to three pre-emptions: the compare-and-swap
    /// loop has too many with any number.
    fn bounded() -> loom::model::Builder {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder
    }
}
