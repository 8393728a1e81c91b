//! The in-flight count of a backend, a frontend or the process: one shared
//! atomic that balances and caps at once.
//!
//! Raised at selection by the compare-and-swap that enforces the cap, so the
//! cap is never overshot however many workers race; lowered exactly once by
//! the session that raised it. The processes of an upgrade share the atomic, each with a column
//! of its own (`count`): a cap holds for their sum. A backend on trial lets a
//! single session in, whatever its cap; trials belong to one process. Model-checked
//! with loom. Never blocks.
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

use super::count::{COUNT_MAX, Count, sum, unit};
use super::trial::{TrialCell, TrialId, TrialPhase};
#[cfg(tidegate_loom)]
use loom::sync::atomic::{AtomicU32, Ordering};
#[cfg(not(tidegate_loom))]
use std::sync::atomic::{AtomicU32, Ordering};

/// Most sessions of another process that are added to one count; with as many of this
/// one's own they still fit its column.
const ELSEWHERE_MAX: u32 = COUNT_MAX / 2;

/// Sessions held at this moment.
#[derive(Debug)]
pub struct InFlight {
    held: Count,
    /// What one session adds.
    unit: u64,
    /// Sessions of processes that do not count here themselves, as they last said;
    /// `held` has them in this process's column.
    elsewhere: AtomicU32,
    trial: TrialCell,
}

/// What an [`InFlight`] counts the sessions of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted<'a> {
    /// All of them.
    Process,
    /// Those of the frontend of that name.
    Frontend(&'a str),
    /// Those on one backend.
    Backend {
        /// Of its pool.
        pool: &'a str,
        /// In the pool.
        name: &'a str,
        /// As text.
        address: &'a str,
    },
}

/// Where counts come from. Asked by the controller, for what it has no count of yet.
pub trait Counts: std::fmt::Debug + Send + Sync {
    /// The count of that; the same one again while anybody holds it.
    fn count(&self, whose: Counted<'_>) -> InFlight;
}

/// Counts that no other process has.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unshared;

impl Counts for Unshared {
    fn count(&self, _: Counted<'_>) -> InFlight {
        InFlight::new()
    }
}

impl InFlight {
    /// Nothing held, and shared with no other process.
    pub fn new() -> InFlight {
        InFlight::counting(Count::own(), unit(0))
    }

    /// Counts in `held`, to which each session of this process adds `unit`.
    pub fn counting(held: Count, unit: u64) -> InFlight {
        let (elsewhere, trial) = (AtomicU32::new(0), TrialCell::new());
        InFlight { held, unit, elsewhere, trial }
    }

    /// Takes a slot unless `max` are held; a `max` of 0 means no cap. During a
    /// trial only one session gets in until it is decided.
    #[inline]
    pub fn try_enter(&self, max: u32) -> bool {
        if self.trial.is_none() { self.try_hold(max) } else { self.try_enter_trial(max) }
    }

    #[inline]
    fn try_hold(&self, max: u32) -> bool {
        let InFlight { held: cell, unit, .. } = self;
        if max == 0 {
            cell.fetch_add(*unit, Ordering::Relaxed);
            return true;
        }
        let mut held = cell.load(Ordering::Relaxed);
        while sum(held) < max {
            let more = held + unit;
            match cell.compare_exchange_weak(held, more, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => held = now,
            }
        }
        false
    }

    #[cold]
    fn try_enter_trial(&self, max: u32) -> bool {
        if !self.trial.try_take() {
            // It may be over meanwhile.
            return self.trial.is_none() && self.try_hold(max);
        }
        let held = self.try_hold(max);
        if !held {
            self.trial.release();
        }
        held
    }

    /// Whether [`InFlight::try_enter`] with that `max` would let somebody in.
    #[inline]
    pub fn has_room(&self, max: u32) -> bool {
        (max == 0 || self.get() < max) && self.trial.has_room()
    }

    /// Gives a slot back. Every successful `try_enter` is left exactly once.
    #[inline]
    pub fn leave(&self) {
        let InFlight { held: cell, unit, .. } = self;
        let held = cell.fetch_sub(*unit, Ordering::AcqRel);
        assert!(sum(held) > 0, "an in-flight slot was given back twice");
    }

    /// Slots held by this process and all that share the count, as of some recent
    /// moment.
    #[inline]
    pub fn get(&self) -> u32 {
        sum(self.held.load(Ordering::Relaxed))
    }

    /// Adds what processes hold that count by themselves, in the place of what they
    /// held before; at most [`COUNT_MAX`] / 2. For the controller.
    pub fn set_elsewhere(&self, sessions: u32) {
        let sessions = sessions.min(ELSEWHERE_MAX);
        let before = self.elsewhere.swap(sessions, Ordering::Relaxed);
        let unit = self.unit;
        match sessions >= before {
            true => self.held.fetch_add(unit * u64::from(sessions - before), Ordering::AcqRel),
            false => self.held.fetch_sub(unit * u64::from(before - sessions), Ordering::AcqRel),
        };
    }

    /// Whether another process may count here.
    pub fn is_shareable(&self) -> bool {
        self.held.is_shareable()
    }

    /// The count itself, for who looks at many of them.
    pub(super) fn counter(&self) -> Count {
        self.held.clone()
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        // What others share does not end with this.
        self.set_elsewhere(0);
    }
}

// === impl InFlight: the trial ===

impl InFlight {
    /// From now on a single session gets in. For the controller.
    pub fn begin_trial(&self) {
        self.trial.begin();
    }

    /// Everybody gets in again. For the controller.
    pub fn end_trial(&self) {
        self.trial.end();
    }

    /// Lets nobody in from now on, by whatever table, until [`InFlight::reopen`] or the
    /// next trial. False during a trial, which has its own say. For the controller.
    pub fn shut(&self) -> bool {
        self.trial.shut()
    }

    /// Ends what [`InFlight::shut`] began. For the controller.
    pub fn reopen(&self) {
        self.trial.reopen();
    }

    /// How far the trial has come.
    pub fn trial(&self) -> TrialPhase {
        self.trial.phase()
    }

    /// The trial that whoever has just entered is to decide, if there is one.
    /// (A session that entered right before the trial began may get it in place
    /// of the one that entered it: both are there, and either will do.)
    #[inline]
    pub fn claim_trial(&self) -> Option<TrialId> {
        if self.trial.is_none() { None } else { self.trial.claim() }
    }

    /// The session of that trial has come so far. [`TrialPhase::Open`] gives the
    /// place to the next session, as nothing was learnt from this one.
    pub fn advance_trial(&self, id: TrialId, phase: TrialPhase) {
        self.trial.advance(id, phase);
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
    fn what_another_process_reports_counts_towards_the_cap() {
        let in_flight = InFlight::new();
        in_flight.set_elsewhere(2);
        assert!(!in_flight.try_enter(2) && !in_flight.has_room(2));
        assert!(in_flight.try_enter(3) && !in_flight.try_enter(3));
        assert_eq!(in_flight.get(), 3);
        in_flight.set_elsewhere(0);
        assert!(in_flight.has_room(2) && in_flight.try_enter(2));
    }

    #[test]
    fn shut_backend_gets_no_session_until_it_is_reopened() {
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
    fn a_cap_is_one_over_processes_that_share_the_count() {
        let word = Count::own();
        let processes = [0, 1, 2].map(|n| InFlight::counting(word.clone(), unit(n)));
        for round in 0..10 {
            let entered = processes.iter().filter(|one| one.try_enter(2)).count();
            assert_eq!(entered, 2, "round {round}");
            assert!(processes.iter().all(|one| one.get() == 2 && !one.has_room(2)));
            processes[..2].iter().for_each(InFlight::leave);
        }
        processes[2].set_elsewhere(5);
        assert_eq!(processes[0].get(), 5);
        drop(processes);
        assert_eq!(word.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn lowered_cap_admits_no_session_until_enough_have_left() {
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
    use crate::balance::count::cleared;
    use loom::sync::atomic::AtomicU32 as Inside;
    use loom::thread;
    use std::sync::Arc;

    /// Three sessions at a cap, each of a process of its own: never more inside than it
    /// allows, each freed slot can be taken, nothing stays behind.
    fn three_sessions_at_a_cap_of(cap: u32) {
        let word = Count::own();
        let in_flights =
            [0, 1, 2].map(|column| Arc::new(InFlight::counting(word.clone(), unit(column))));
        let inside = Arc::new(Inside::new(0));
        let session = move |in_flight: &InFlight, inside: &Inside| {
            let entered = in_flight.try_enter(cap);
            if entered {
                assert!(inside.fetch_add(1, Ordering::SeqCst) < cap, "cap overshot");
                inside.fetch_sub(1, Ordering::SeqCst);
                in_flight.leave();
            }
            entered
        };
        let others: Vec<_> = in_flights[1..]
            .iter()
            .map(|in_flight| {
                let (in_flight, inside) = (Arc::clone(in_flight), Arc::clone(&inside));
                thread::spawn(move || session(&in_flight, &inside))
            })
            .collect();
        let mut entered = vec![session(&in_flights[0], &inside)];
        for other in others {
            entered.push(other.join().expect("a session panicked"));
        }
        assert!(entered.into_iter().filter(|&e| e).count() >= cap as usize);
        assert_eq!(in_flights[0].get(), 0);
    }

    #[test]
    fn cap_of_one_is_never_overshot() {
        bounded().check(|| three_sessions_at_a_cap_of(1));
    }

    #[test]
    fn cap_of_two_is_never_overshot() {
        bounded().check(|| three_sessions_at_a_cap_of(2));
    }

    /// A process is killed while it holds one of two slots, and its column is zeroed
    /// while another process's sessions come and go.
    #[test]
    fn what_a_dead_process_held_comes_back_once() {
        bounded().check(|| {
            let word = Count::own();
            let [dead, own] = [1, 0].map(|n| InFlight::counting(word.clone(), unit(n)));
            assert!(dead.try_enter(2));
            let cleaner = {
                let word = word.clone();
                thread::spawn(move || {
                    let clear = |word| Some(cleared(word, 1));
                    word.fetch_update(Ordering::AcqRel, Ordering::Acquire, clear).is_ok()
                })
            };
            assert!(own.try_enter(2), "one slot is free in any case");
            let second = own.try_enter(2);
            own.leave();
            assert!(cleaner.join().expect("no panic"));
            assert_eq!(own.get(), u32::from(second));
            assert!(own.try_enter(1) != second);
        });
    }

    /// Every interleaving with up to three pre-emptions: the compare-and-swap
    /// loop has too many with any number.
    fn bounded() -> loom::model::Builder {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder
    }
}
