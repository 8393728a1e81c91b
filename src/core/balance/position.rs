//! The position of a round robin: one counter shared by the whole process.
//!
//! Every worker takes places from it. A new table inherits it while the sequence stays
//! the same. Each place is taken exactly once however many workers race; loom checks
//! this. It never blocks.

use crossbeam::utils::CachePadded;
#[cfg(feature = "loom")]
use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(feature = "loom"))]
use std::sync::atomic::{AtomicU64, Ordering};

/// Number of places taken so far. 64 bits last for 584 years at 10^9 picks per second.
#[derive(Debug)]
pub(super) struct Position(CachePadded<AtomicU64>);

impl Position {
    /// Creates a position whose next place is `place`.
    pub(super) fn starting_at(place: u64) -> Position {
        Position(CachePadded::new(AtomicU64::new(place)))
    }

    /// Takes the next place. No other caller gets this place.
    #[inline]
    pub(super) fn take(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }

    /// Makes `place` the next place.
    pub(super) fn move_to(&self, place: u64) {
        self.0.store(place, Ordering::Relaxed);
    }

    /// Returns the next place at some recent moment.
    pub(super) fn peek(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(all(test, feature = "loom"))]
mod loom_models {
    use super::*;
    use loom::thread;
    use std::sync::Arc;

    #[test]
    fn each_place_is_taken_exactly_once() {
        loom::model(|| {
            let position = Arc::new(Position::starting_at(3));
            let takers: Vec<_> = (0..2)
                .map(|_| {
                    let position = Arc::clone(&position);
                    thread::spawn(move || [position.take(), position.take()])
                })
                .collect();
            let mut places = vec![position.take()];
            for taker in takers {
                places.extend(taker.join().expect("a taker panicked"));
            }
            places.sort_unstable();
            assert_eq!(places, [3, 4, 5, 6, 7]);
            assert_eq!(position.peek(), 8);
        });
    }
}
