//! A ring of the newest decisions: written by one worker, read by any thread.
//!
//! Written by the data plane at each pick, read by `daemon`. A writer never waits and never
//! allocates; a reader never makes it wait. A reader that meets a slot while it is written
//! looks again a few times, then takes the slot as empty.
//!
//! Each slot is a sequence lock over atomics (Boehm, "Can seqlocks get along with
//! programming language memory models?", 2012): an odd version means that the slot is being
//! written. A worker that panics in the middle leaves an odd version; the next write to the
//! slot mends it.

use super::words::{self, DecisionWords, OUTCOME, WORDS};
use super::{Decision, Outcome};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// Attempts to read a slot that is being written.
const READS_MAX: usize = 16;

/// See the module's documentation.
#[derive(Debug)]
pub struct DecisionRing {
    slots: Box<[Slot]>,
    /// Decisions written so far, modulo 2^32.
    written: AtomicU32,
}

/// Position of a decision in its ring, below the ring's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingPlace(u32);

#[derive(Debug)]
struct Slot {
    version: AtomicU64,
    words: [AtomicU64; WORDS],
}

// === impl RingPlace ===

impl RingPlace {
    /// The place of that number.
    pub fn new(number: u32) -> RingPlace {
        RingPlace(number)
    }

    /// Its number.
    pub fn number(self) -> u32 {
        self.0
    }
}

// === impl DecisionRing ===

impl DecisionRing {
    /// Bytes of one decision.
    pub const SLOT_BYTES: usize = size_of::<Slot>();

    /// A ring of `size` decisions; at least one.
    pub fn new(size: usize) -> DecisionRing {
        let slots = (0..size.max(1)).map(|_| Slot::default()).collect();
        DecisionRing { slots, written: AtomicU32::new(0) }
    }

    /// Keeps a decision in the place of the oldest. One thread at a time may call it.
    pub fn push(&self, decision: &Decision) -> RingPlace {
        let written = self.written.load(Ordering::Relaxed);
        let place = written % self.slots.len() as u32;
        self.slots[place as usize].write(0, &words::encode(decision));
        self.written.store(written.wrapping_add(1), Ordering::Relaxed);
        RingPlace(place)
    }

    /// Replaces the outcome of a session's decision; false if another session's decision is
    /// in that place. One thread at a time may call it, the one that pushes.
    pub fn set_outcome(&self, place: RingPlace, session: u64, outcome: &Outcome) -> bool {
        let slot = self.slots.get(place.0 as usize);
        let Some(slot) = slot.filter(|slot| slot.session() == session) else { return false };
        slot.write(OUTCOME, &words::encode_outcome(outcome));
        true
    }

    /// The decision in that place, if it is the session's.
    pub fn get(&self, place: RingPlace, session: u64) -> Option<Decision> {
        let slot = self.slots.get(place.0 as usize)?;
        slot.read().filter(|decision| decision.session == session)
    }

    /// The decisions of a session, in no order.
    pub fn of_session(&self, session: u64) -> Vec<Decision> {
        let slots = self.slots.iter().filter(|slot| slot.session() == session);
        let decisions = slots.filter_map(Slot::read);
        decisions.filter(|decision| decision.session == session).collect()
    }

    /// All decisions that the ring holds, in no order.
    pub fn all(&self) -> impl Iterator<Item = Decision> {
        self.slots.iter().filter(|slot| slot.session() != 0).filter_map(Slot::read)
    }
}

// === impl Slot ===

impl Slot {
    /// Replaces the words from `first` on.
    fn write(&self, first: usize, words: &[u64]) {
        let writing = self.version.load(Ordering::Relaxed) | 1;
        self.version.store(writing, Ordering::Relaxed);
        fence(Ordering::Release);
        for (word, value) in self.words[first..].iter().zip(words) {
            word.store(*value, Ordering::Relaxed);
        }
        self.version.store(writing + 1, Ordering::Release);
    }

    /// Number of the session whose decision it holds, perhaps half written; 0: empty.
    fn session(&self) -> u64 {
        self.words[0].load(Ordering::Relaxed)
    }

    fn read(&self) -> Option<Decision> {
        (0..READS_MAX).find_map(|_| self.try_read()).and_then(|words| words::decode(&words))
    }

    fn try_read(&self) -> Option<DecisionWords> {
        let before = self.version.load(Ordering::Acquire);
        let words = std::array::from_fn(|place| self.words[place].load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        let after = self.version.load(Ordering::Relaxed);
        (before == after && before.is_multiple_of(2)).then_some(words)
    }
}

impl Default for Slot {
    fn default() -> Slot {
        Slot { version: AtomicU64::new(0), words: std::array::from_fn(|_| AtomicU64::new(0)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::{Cause, Phase};
    use crate::testing::decision;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn ring_keeps_the_newest_decisions() {
        let ring = DecisionRing::new(4);
        for session in 1..=6 {
            ring.push(&decision(session));
        }
        let mut held: Vec<u64> = ring.all().map(|d| d.session).collect();
        held.sort_unstable();
        assert_eq!(held, [3, 4, 5, 6]);
        assert_eq!(ring.of_session(2), []);
        assert_eq!(ring.of_session(5), [decision(5)]);
    }

    #[test]
    fn outcome_is_not_written_into_the_decision_of_another_session() {
        let ring = DecisionRing::new(1);
        let place = ring.push(&decision(1));
        let end = Some((Cause::Finished, Phase::Closed));
        let outcome = Outcome { connect_micros: Some(7), end, ..Outcome::default() };
        assert!(ring.set_outcome(place, 1, &outcome));
        assert_eq!(ring.get(place, 1).map(|d| d.outcome), Some(outcome));
        ring.push(&decision(2));
        assert!(!ring.set_outcome(place, 1, &outcome));
        assert_eq!(ring.of_session(2)[0].outcome, Outcome::default());
        assert!(!ring.set_outcome(RingPlace::new(9), 2, &outcome));
    }

    #[test]
    fn reader_never_sees_half_of_a_decision() {
        let (ring, stop) = (DecisionRing::new(2), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut session = 1;
                while !stop.load(Ordering::Relaxed) {
                    ring.push(&decision(session));
                    session += 1;
                }
            });
            for _ in 0..20_000 {
                for read in ring.all() {
                    assert_eq!(read, decision(read.session));
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn slot_that_a_panicked_writer_left_is_mended_by_the_next_write() {
        let ring = DecisionRing::new(1);
        ring.push(&decision(1));
        ring.slots[0].version.fetch_add(1, Ordering::Relaxed);
        assert_eq!(ring.all().count(), 0);
        ring.push(&decision(2));
        assert_eq!(ring.of_session(2), [decision(2)]);
    }
}
