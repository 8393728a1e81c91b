//! The in-flight count of a backend, a frontend or the process: one shared
//! atomic that balances and caps at once.
//!
//! Raised at selection by the compare-and-swap that enforces the cap, so the
//! cap is never overshot however many workers race; lowered exactly once by
//! whoever raised it. Model-checked with loom. Never blocks.

use crossbeam::utils::CachePadded;
#[cfg(tidegate_loom)]
use loom::sync::atomic::{AtomicU32, Ordering};
#[cfg(not(tidegate_loom))]
use std::sync::atomic::{AtomicU32, Ordering};

/// Sessions held at this moment.
#[derive(Debug)]
pub struct InFlight(CachePadded<AtomicU32>);

impl InFlight {
    /// Nothing held.
    pub fn new() -> InFlight {
        InFlight(CachePadded::new(AtomicU32::new(0)))
    }

    /// Takes a slot unless `max` are held; a `max` of 0 means no cap.
    #[inline]
    pub fn try_enter(&self, max: u32) -> bool {
        if max == 0 {
            self.0.fetch_add(1, Ordering::Relaxed);
            return true;
        }
        let mut held = self.0.load(Ordering::Relaxed);
        while held < max {
            match self.0.compare_exchange_weak(held, held + 1, Ordering::AcqRel, Ordering::Relaxed)
            {
                Ok(_) => return true,
                Err(now) => held = now,
            }
        }
        false
    }

    /// Gives a slot back. Every successful `try_enter` is left exactly once.
    #[inline]
    pub fn leave(&self) {
        let held = self.0.fetch_sub(1, Ordering::AcqRel);
        assert!(held > 0, "an in-flight slot was given back twice");
    }

    /// Slots held, as of some recent moment.
    #[inline]
    pub fn get(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Default for InFlight {
    fn default() -> Self {
        InFlight::new()
    }
}
