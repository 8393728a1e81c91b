//! The memory budget: bytes that the process holds for its sessions, and their cap.
//!
//! One instance per process. A relay engine takes a share before it stores bytes that
//! cannot be sent yet, in memory or in a pipe. It never holds bytes and never stops a
//! session. If no share is left, the engine leaves bytes in the receive buffer of the
//! kernel, and TCP flow control stops the sender.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// The memory budget of the process.
#[derive(Debug)]
pub struct MemoryBudget {
    used: AtomicUsize,
    max: AtomicUsize,
    refused: AtomicU64,
}

/// Bytes taken from a budget. Returns them on drop.
#[derive(Debug)]
pub struct BudgetShare {
    budget: Arc<MemoryBudget>,
    bytes: usize,
}

// === impl MemoryBudget ===

impl MemoryBudget {
    /// Makes a budget of `max` bytes with no byte taken.
    pub fn new(max: usize) -> MemoryBudget {
        MemoryBudget {
            used: AtomicUsize::new(0),
            max: AtomicUsize::new(max),
            refused: AtomicU64::new(0),
        }
    }

    /// Changes the cap. Taken shares stay taken.
    pub fn set_max(&self, max: usize) {
        self.max.store(max, Ordering::Relaxed);
    }

    /// Returns the bytes that are taken.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Returns the cap.
    pub fn max(&self) -> usize {
        self.max.load(Ordering::Relaxed)
    }

    /// Returns how often a request did not fit below the cap.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Returns whether `bytes` are left. Counts a refusal if they are not.
    #[inline]
    pub fn has(&self, bytes: usize) -> bool {
        let fits = self.used().saturating_add(bytes) <= self.max();
        if !fits {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        fits
    }

    /// Takes `bytes` if they are left. Counts a refusal if they are not.
    pub fn try_take(self: &Arc<MemoryBudget>, bytes: usize) -> Option<BudgetShare> {
        let share = self.take(bytes);
        if self.used() <= self.max() {
            return Some(share);
        }
        self.refused.fetch_add(1, Ordering::Relaxed);
        None
    }

    /// Takes `bytes` even above the cap, for bytes that were already received.
    ///
    /// If callers check [`MemoryBudget::has`] before they receive, the budget exceeds its
    /// cap by at most one read per thread.
    pub fn take(self: &Arc<MemoryBudget>, bytes: usize) -> BudgetShare {
        self.used.fetch_add(bytes, Ordering::Relaxed);
        BudgetShare { budget: Arc::clone(self), bytes }
    }
}

impl Default for MemoryBudget {
    /// Makes a budget without a cap.
    fn default() -> Self {
        MemoryBudget::new(usize::MAX)
    }
}

// === impl BudgetShare ===

impl Drop for BudgetShare {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn share_returns_on_drop_and_requests_above_the_cap_are_counted() {
        let budget = Arc::new(MemoryBudget::new(100));
        let first = budget.try_take(60).unwrap();
        assert!(budget.try_take(41).is_none() && !budget.has(41) && budget.has(40));
        assert_eq!((budget.used(), budget.refused()), (60, 2));
        let beyond = budget.take(100);
        assert_eq!(budget.used(), 160);
        drop((first, beyond));
        assert_eq!(budget.used(), 0);
        budget.set_max(10);
        assert!(!budget.has(11) && budget.has(10));
    }
}
