//! The place a round robin has come to: one shared counter for the whole
//! process.
//!
//! Taken from by every worker, handed on from table to table while the
//! sequence stays the same. Model-checked with loom: however many workers
//! race, each place is given exactly once. Never blocks.

use crossbeam::utils::CachePadded;
#[cfg(tidegate_loom)]
use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(tidegate_loom))]
use std::sync::atomic::{AtomicU64, Ordering};

/// Places given so far. 64 bits outlast any process: a thousand million picks
/// a second for 584 years.
#[derive(Debug)]
pub(super) struct Position(CachePadded<AtomicU64>);

impl Position {
    /// The next place to be given is `place`.
    pub(super) fn starting_at(place: u64) -> Position {
        Position(CachePadded::new(AtomicU64::new(place)))
    }

    /// Takes the next place; nobody else gets it.
    #[inline]
    pub(super) fn take(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }

    /// Goes on from `place`.
    pub(super) fn move_to(&self, place: u64) {
        self.0.store(place, Ordering::Relaxed);
    }

    /// The next place as of some recent moment.
    pub(super) fn peek(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(all(test, tidegate_loom))]
mod loom_models {
    use super::*;
    use loom::thread;
    use std::sync::Arc;

    #[test]
    fn each_place_is_given_exactly_once() {
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
