//! The in-flight count of a backend, a frontend or the process. One shared atomic
//! serves as load and enforces the cap.
//!
//! - Selection raises the count with the compare-and-swap that enforces the cap. The
//!   cap holds however many workers race.
//! - The session that raised the count lowers it exactly once.
//! - The processes of an upgrade share the atomic. Each process has its own column (see
//!   `count`), and a cap applies to their sum.
//! - A backend on trial admits one session at a time, even if its cap is higher. Trials
//!   belong to one process.
//! - Nothing here blocks. The code is model-checked with loom.
//!
//! # Sessions that outlive their backend process
//!
//! One count serves caps and loads. A session can outlive its backend process: the
//! backend has sent its FIN and the client has not closed. Such a session counts as
//! load of the next process at that address. This is intended.
//!
//! The alternative is a second count of the sessions that started since the backend
//! last came up. That count is wrong if the backend never exited. A backend can be
//! `down` because it answered probes too slowly or was unreachable for a moment. It
//! still serves its old sessions, and would receive all new sessions in addition, just
//! as it recovers. `down` does not distinguish the two cases. The backend's FIN does,
//! but using it costs two more shared writes in each session that the backend ends
//! first.
//!
//! The remaining error is bounded and on the safe side: a restarted backend gets fewer
//! sessions at first. A reset ends an old session immediately. A FIN ends it within
//! `half_closed_timeout` (if that is off, when the client closes). Silence ends it
//! within `user_timeout` or the keepalive timeout.

use super::count::{COUNT_MAX, Count, sum, unit};
use super::trial::{TrialCell, TrialId, TrialPhase};
#[cfg(feature = "loom")]
use loom::sync::atomic::{AtomicU32, Ordering};
#[cfg(not(feature = "loom"))]
use std::sync::atomic::{AtomicU32, Ordering};

/// Maximum number of sessions of other processes that are added to one count. With the
/// same number of local sessions they still fit the column of this process.
const ELSEWHERE_MAX: u32 = COUNT_MAX / 2;

/// Sessions that hold a slot now.
#[derive(Debug)]
pub struct InFlight {
    held: Count,
    /// The value that one session adds to the word.
    unit: u64,
    /// Sessions of processes that do not count here themselves, as last reported.
    /// `held` includes them in the column of this process.
    elsewhere: AtomicU32,
    trial: TrialCell,
}

/// What an [`InFlight`] counts sessions of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted<'a> {
    /// The whole process.
    Process,
    /// The frontend with this name.
    Frontend(&'a str),
    /// One backend.
    Backend {
        /// Name of its pool.
        pool: &'a str,
        /// Name in the pool.
        name: &'a str,
        /// Address as text.
        address: &'a str,
    },
}

/// Provides counts. The controller calls it for objects that have no count yet.
pub trait Counts: std::fmt::Debug + Send + Sync {
    /// Returns the count of `counted`. Counts of the same object that are in use at
    /// the same time share one word, if their processes share counts.
    fn count(&self, counted: Counted<'_>) -> InFlight;
}

/// Provides counts that are not shared with other processes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unshared;

impl Counts for Unshared {
    fn count(&self, _: Counted<'_>) -> InFlight {
        InFlight::new()
    }
}

impl InFlight {
    /// Creates a count of 0 that is not shared with other processes.
    pub fn new() -> InFlight {
        InFlight::counting(Count::own(), unit(0))
    }

    /// Creates a count in `held`. Each session of this process adds `unit`.
    pub fn counting(held: Count, unit: u64) -> InFlight {
        let (elsewhere, trial) = (AtomicU32::new(0), TrialCell::new());
        InFlight { held, unit, elsewhere, trial }
    }

    /// Takes a slot unless `max` slots are held. A `max` of 0 means no cap. During a
    /// trial only one session is admitted until the trial is decided.
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
            // The trial may have ended since the caller checked.
            return self.trial.is_none() && self.try_hold(max);
        }
        let held = self.try_hold(max);
        if !held {
            self.trial.release();
        }
        held
    }

    /// Returns whether [`InFlight::try_enter`] with this `max` would succeed.
    #[inline]
    pub fn has_room(&self, max: u32) -> bool {
        (max == 0 || self.get() < max) && self.trial.has_room()
    }

    /// Gives a slot back. Must be called exactly once per successful `try_enter`.
    #[inline]
    pub fn leave(&self) {
        let InFlight { held: cell, unit, .. } = self;
        let held = cell.fetch_sub(*unit, Ordering::AcqRel);
        assert!(sum(held) > 0, "an in-flight slot was released twice");
    }

    /// Returns the slots held by this process and by all processes that share the
    /// count. The value is a recent one.
    #[inline]
    pub fn get(&self) -> u32 {
        sum(self.held.load(Ordering::Relaxed))
    }

    /// Sets the number of sessions of processes that do not count here themselves; at
    /// most [`COUNT_MAX`] / 2. Replaces the previous number. Called by the controller.
    pub fn set_elsewhere(&self, sessions: u32) {
        let sessions = sessions.min(ELSEWHERE_MAX);
        let before = self.elsewhere.swap(sessions, Ordering::Relaxed);
        let unit = self.unit;
        match sessions >= before {
            true => self.held.fetch_add(unit * u64::from(sessions - before), Ordering::AcqRel),
            false => self.held.fetch_sub(unit * u64::from(before - sessions), Ordering::AcqRel),
        };
    }

    /// Returns whether another process can count here.
    pub fn is_shareable(&self) -> bool {
        self.held.is_shareable()
    }

    /// Returns the count itself, for policies that read many counts per pick.
    pub(super) fn counter(&self) -> Count {
        self.held.clone()
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        // The word of a shared count outlives this instance.
        self.set_elsewhere(0);
    }
}

// === impl InFlight: the trial ===

impl InFlight {
    /// Starts a trial: one session is admitted. Called by the controller.
    pub fn begin_trial(&self) {
        self.trial.begin();
    }

    /// Ends the trial: all sessions are admitted again. Called by the controller.
    pub fn end_trial(&self) {
        self.trial.end();
    }

    /// Admits no session, through any table, until [`InFlight::reopen`] or the next
    /// trial. Returns false and does nothing during a trial. Called by the controller.
    pub fn shut(&self) -> bool {
        self.trial.shut()
    }

    /// Reverts [`InFlight::shut`]. Called by the controller.
    pub fn reopen(&self) {
        self.trial.reopen();
    }

    /// Returns whether the next session would decide a trial.
    pub fn has_open_trial(&self) -> bool {
        self.trial.phase() == TrialPhase::Open
    }

    /// Returns the phase of the trial.
    pub fn trial(&self) -> TrialPhase {
        self.trial.phase()
    }

    /// Returns the trial that the session of the caller must decide, if a trial is
    /// waiting for a session. Call it right after `try_enter`.
    ///
    /// A session that entered just before the trial began can claim it in place of the
    /// session that entered the trial. Both hold a slot, and either can decide the
    /// trial.
    #[inline]
    pub fn claim_trial(&self) -> Option<TrialId> {
        if self.trial.is_none() { None } else { self.trial.claim() }
    }

    /// Records the phase that the session of trial `id` has reached.
    /// [`TrialPhase::Open`] leaves the trial to the next session because this session
    /// gave no result.
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
#[cfg(not(feature = "loom"))]
mod tests {
    use super::*;

    #[test]
    fn cap_holds_and_a_freed_slot_can_be_taken_again() {
        let in_flight = InFlight::new();
        assert!(in_flight.try_enter(2) && in_flight.try_enter(2));
        assert!(!in_flight.try_enter(2));
        in_flight.leave();
        assert!(in_flight.try_enter(2));
        assert_eq!(in_flight.get(), 2);
    }

    #[test]
    fn sessions_reported_by_another_process_count_towards_the_cap() {
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
        assert!(in_flight.claim_trial().is_none(), "a session that entered before claims no trial");
        in_flight.leave();
        in_flight.reopen();
        assert!(in_flight.has_room(0) && in_flight.try_enter(0));
        in_flight.begin_trial();
        assert!(!in_flight.shut());
        in_flight.reopen();
        assert_eq!(in_flight.trial(), TrialPhase::Open, "reopening does not affect a trial");
    }

    #[test]
    fn cap_applies_to_the_sum_of_processes_that_share_the_count() {
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
    #[should_panic(expected = "released twice")]
    fn slot_that_is_given_back_twice_panics() {
        let in_flight = InFlight::new();
        assert!(in_flight.try_enter(1));
        in_flight.leave();
        in_flight.leave();
    }
}

#[cfg(all(test, feature = "loom"))]
mod loom_models {
    use super::*;
    use crate::balance::count::cleared;
    use loom::sync::atomic::AtomicU32 as Inside;
    use loom::thread;
    use std::sync::Arc;

    /// Runs three sessions at a cap, each in its own process. At most `cap` sessions
    /// are inside, every freed slot can be taken, and the count returns to 0.
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

    /// A process is killed while it holds one of two slots. Its column is cleared while
    /// sessions of another process come and go.
    #[test]
    fn slots_of_a_killed_process_are_freed_once() {
        bounded().check(|| {
            let word = Count::own();
            let [killed, own] = [1, 0].map(|n| InFlight::counting(word.clone(), unit(n)));
            assert!(killed.try_enter(2));
            let cleaner = {
                let word = word.clone();
                thread::spawn(move || {
                    let clear = |word| Some(cleared(word, 1));
                    word.fetch_update(Ordering::AcqRel, Ordering::Acquire, clear).is_ok()
                })
            };
            assert!(own.try_enter(2), "one of two slots is free");
            let second = own.try_enter(2);
            own.leave();
            assert!(cleaner.join().expect("no panic"));
            assert_eq!(own.get(), u32::from(second));
            assert!(own.try_enter(1) != second);
        });
    }

    /// Explores every interleaving with up to three pre-emptions. Without a bound the
    /// compare-and-swap loops have too many interleavings.
    fn bounded() -> loom::model::Builder {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder
    }
}
