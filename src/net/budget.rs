//! How many bytes the process holds for its sessions, and how many it may.
//!
//! One for the whole process; the relay engines take a share before they keep
//! bytes that cannot be sent yet, in memory or in a pipe, and dropping the share
//! gives it back. It holds no bytes itself and stops nobody: at its end the
//! engines leave bytes where they are, in the kernel's receive buffers, and so
//! TCP holds the sender back.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// See the module's documentation.
#[derive(Debug)]
pub struct MemoryBudget {
    used: AtomicUsize,
    max: AtomicUsize,
    refused: AtomicU64,
}

/// Bytes taken from a budget; dropping it gives them back.
#[derive(Debug)]
pub struct BudgetShare {
    budget: Arc<MemoryBudget>,
    bytes: usize,
}

// === impl MemoryBudget ===

impl MemoryBudget {
    /// `max` bytes, all of them left.
    pub fn new(max: usize) -> MemoryBudget {
        MemoryBudget {
            used: AtomicUsize::new(0),
            max: AtomicUsize::new(max),
            refused: AtomicU64::new(0),
        }
    }

    /// Another limit from now on; what is taken stays taken.
    pub fn set_max(&self, max: usize) {
        self.max.store(max, Ordering::Relaxed);
    }

    /// Bytes taken now.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// The limit.
    pub fn max(&self) -> usize {
        self.max.load(Ordering::Relaxed)
    }

    /// Times somebody was refused.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Whether `bytes` are left; counts where they are not.
    #[inline]
    pub fn has(&self, bytes: usize) -> bool {
        let fits = self.used().saturating_add(bytes) <= self.max();
        if !fits {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        fits
    }

    /// Takes `bytes` where they are left; counts where they are not.
    pub fn try_take(self: &Arc<MemoryBudget>, bytes: usize) -> Option<BudgetShare> {
        let share = self.take(bytes);
        if self.used() <= self.max() {
            return Some(share);
        }
        self.refused.fetch_add(1, Ordering::Relaxed);
        None
    }

    /// Takes `bytes` in any case: for what has been received already. Who asks
    /// [`MemoryBudget::has`] before it receives goes beyond the limit by no more than
    /// one read a thread.
    pub fn take(self: &Arc<MemoryBudget>, bytes: usize) -> BudgetShare {
        self.used.fetch_add(bytes, Ordering::Relaxed);
        BudgetShare { budget: Arc::clone(self), bytes }
    }
}

impl Default for MemoryBudget {
    /// Without a limit.
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
    fn a_share_is_given_back_and_what_does_not_fit_is_refused_and_counted() {
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
