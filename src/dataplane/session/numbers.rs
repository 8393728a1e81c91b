//! Numbers for sessions: one sequence for all workers, and for the processes that an
//! upgrade makes of one.
//!
//! `WorkerContext` takes blocks from it, so that workers rarely share a cache line; `daemon`
//! carries it over an upgrade. It is no count: blocks are left unfinished.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Numbers that a worker takes at once.
const BLOCK: u64 = 64;

/// Left to a process that has handed over: sessions that it accepts until the next one
/// serves, and blocks that its workers hold.
const LEFT: u64 = 1_000_000;

/// See the module's documentation. Starts at 1.
#[derive(Debug)]
pub struct Numbers {
    next: AtomicU64,
}

// === impl Numbers ===

impl Numbers {
    /// The next block.
    pub(crate) fn block(&self) -> Range<u64> {
        let start = self.next.fetch_add(BLOCK, Ordering::Relaxed);
        start..start + BLOCK
    }

    /// Where the next process starts, so that no number is given out twice.
    pub fn for_next_process(&self) -> u64 {
        self.next.load(Ordering::Relaxed).saturating_add(LEFT)
    }

    /// Goes on where the process before said.
    pub fn continue_from(&self, start: u64) {
        self.next.fetch_max(start, Ordering::Relaxed);
    }
}

impl Default for Numbers {
    fn default() -> Numbers {
        Numbers { next: AtomicU64::new(1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_follow_each_other_and_the_next_process_is_ahead_of_them() {
        let numbers = Numbers::default();
        assert_eq!((numbers.block(), numbers.block()), (1..65, 65..129));
        let next = Numbers::default();
        next.continue_from(numbers.for_next_process());
        assert_eq!(next.block().start, 129 + LEFT);
        // An older process that does not say changes nothing.
        next.continue_from(0);
        assert_eq!(next.block().start, 129 + LEFT + BLOCK);
    }
}
