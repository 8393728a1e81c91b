//! Session numbers: one sequence for all workers, continued across upgrades.
//!
//! `WorkerContext` takes blocks of numbers, so that workers rarely touch the shared counter.
//! `daemon` hands the sequence over in an upgrade. The sequence is not a count of sessions:
//! workers leave blocks unfinished.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Session numbers in one block.
const BLOCK: u64 = 64;

/// Numbers reserved for the old process of an upgrade: for sessions that it accepts before the
/// new process serves, and for blocks that its workers hold.
const RESERVED: u64 = 1_000_000;

/// The next unused session number. Starts at 1.
#[derive(Debug)]
pub struct Numbers {
    /// The first number of this process.
    first: AtomicU64,
    next: AtomicU64,
}

// === impl Numbers ===

impl Numbers {
    /// Takes the next block.
    pub(crate) fn block(&self) -> Range<u64> {
        let start = self.next.fetch_add(BLOCK, Ordering::Relaxed);
        start..start + BLOCK
    }

    /// Returns the first number of the new process in an upgrade. No number is used twice.
    pub fn for_next_process(&self) -> u64 {
        self.next.load(Ordering::Relaxed).saturating_add(RESERVED)
    }

    /// Continues at `start`, the number from the old process. A smaller number than the next
    /// unused one has no effect.
    pub fn continue_from(&self, start: u64) {
        if self.next.fetch_max(start, Ordering::Relaxed) < start {
            self.first.store(start, Ordering::Relaxed);
        }
    }

    /// Returns the numbers of this process: of its sessions, and of blocks whose rest is
    /// unused.
    pub fn given_out(&self) -> Range<u64> {
        self.first.load(Ordering::Relaxed)..self.next.load(Ordering::Relaxed)
    }
}

impl Default for Numbers {
    fn default() -> Numbers {
        Numbers { first: AtomicU64::new(1), next: AtomicU64::new(1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_process_starts_above_all_numbers_of_the_old_process() {
        let numbers = Numbers::default();
        assert_eq!((numbers.block(), numbers.block()), (1..65, 65..129));
        let next = Numbers::default();
        next.continue_from(numbers.for_next_process());
        assert_eq!(next.given_out(), 129 + RESERVED..129 + RESERVED);
        assert_eq!(next.block().start, 129 + RESERVED);
        // An old process that sends no number changes nothing.
        next.continue_from(0);
        assert_eq!(next.block().start, 129 + RESERVED + BLOCK);
    }
}
