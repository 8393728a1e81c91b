//! The word behind an in-flight count, which the processes of an upgrade may share.
//!
//! Used by `in_flight` for every session and by the policies that compare loads. It
//! knows the layout of a word, not where the word is: the caller gives shared words in.
//!
//! A count is one 64-bit word: the sum of [`COLUMNS`] columns in the upper 22 bits, and
//! below it the first two columns of 21 bits each; the third is the rest of the sum. A
//! process adds to the sum and its own column by one addition of its [`unit`], and a cap
//! is compared with the sum: taking a slot is one compare-and-swap and giving it back
//! one subtraction, so there is no moment at which a process that is killed could have
//! done half of it. What a killed process held is its column, which another process
//! takes off the word.

#[cfg(tidegate_loom)]
use loom::sync::atomic::AtomicU64;
use std::ops::Deref;
use std::sync::Arc;
#[cfg(not(tidegate_loom))]
use std::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(tidegate_loom))]
use std::sync::{Mutex, PoisonError};

/// Columns of a count.
pub const COLUMNS: u32 = 3;
/// Bits of a column.
const COLUMN_BITS: u32 = 21;
/// Most that all columns together may hold, or one could run into the next.
pub const COUNT_MAX: u32 = (1 << COLUMN_BITS) - 1;
/// The lowest bit of the sum.
const SUM_AT: u32 = COLUMN_BITS * (COLUMNS - 1);

/// What a process of that column adds to a word for each slot.
pub const fn unit(column: u32) -> u64 {
    let own = if column + 1 < COLUMNS { 1 << (COLUMN_BITS * column) } else { 0 };
    (1 << SUM_AT) + own
}

/// All columns of that word together.
#[inline]
pub const fn sum(word: u64) -> u32 {
    (word >> SUM_AT) as u32
}

/// One column of that word.
pub const fn column(word: u64, column: u32) -> u32 {
    let first = word as u32 & COUNT_MAX;
    let second = (word >> COLUMN_BITS) as u32 & COUNT_MAX;
    match column {
        0 => first,
        1 => second,
        _ => sum(word).saturating_sub(first).saturating_sub(second),
    }
}

/// The word without what that column holds. No process may add to that column any more.
pub const fn cleared(word: u64, of: u32) -> u64 {
    word - column(word, of) as u64 * unit(of)
}

/// One count: the word, and what keeps it from being used for another.
#[cfg(not(tidegate_loom))]
#[derive(Debug, Clone)]
pub struct Count {
    word: &'static AtomicU64,
    shareable: bool,
    _hold: Arc<dyn CountHold>,
}

/// Keeps a word for the count that has it, until it is dropped.
pub trait CountHold: std::fmt::Debug + Send + Sync {}

impl<T: std::fmt::Debug + Send + Sync> CountHold for T {}

/// A word of this process alone, on cache lines of its own.
#[cfg(not(tidegate_loom))]
#[derive(Debug)]
#[repr(C, align(128))]
struct OwnWord(AtomicU64);

/// Words that no count has at the moment. They are never freed: as many as were ever in
/// use at a time.
#[cfg(not(tidegate_loom))]
static FREE: Mutex<Vec<&'static OwnWord>> = Mutex::new(Vec::new());

#[cfg(not(tidegate_loom))]
#[derive(Debug)]
struct OwnHold(&'static OwnWord);

// === impl Count ===

#[cfg(not(tidegate_loom))]
impl Count {
    /// One that this process shares with no other.
    pub fn own() -> Count {
        let free = FREE.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let own = free.unwrap_or_else(|| Box::leak(Box::new(OwnWord(AtomicU64::new(0)))));
        own.0.store(0, Ordering::Relaxed);
        Count { word: &own.0, shareable: false, _hold: Arc::new(OwnHold(own)) }
    }

    /// One in memory that other processes may have; `hold` keeps it for this count.
    pub fn shared(word: &'static AtomicU64, hold: Arc<dyn CountHold>) -> Count {
        Count { word, shareable: true, _hold: hold }
    }

    /// Whether another process may count here.
    pub fn is_shareable(&self) -> bool {
        self.shareable
    }
}

#[cfg(not(tidegate_loom))]
impl Deref for Count {
    type Target = AtomicU64;

    #[inline]
    fn deref(&self) -> &AtomicU64 {
        self.word
    }
}

#[cfg(not(tidegate_loom))]
impl Drop for OwnHold {
    fn drop(&mut self) {
        FREE.lock().unwrap_or_else(PoisonError::into_inner).push(self.0);
    }
}

/// Stands in for shared memory in the models: loom follows only atomics of its own.
#[cfg(tidegate_loom)]
#[derive(Debug, Clone)]
pub struct Count(Arc<AtomicU64>);

#[cfg(tidegate_loom)]
impl Count {
    /// A count.
    pub fn own() -> Count {
        Count(Arc::new(AtomicU64::new(0)))
    }

    /// A count that is not shared: no model has a second process.
    pub fn shared(_: &'static std::sync::atomic::AtomicU64, _: Arc<dyn CountHold>) -> Count {
        Count::own()
    }

    /// Never.
    pub fn is_shareable(&self) -> bool {
        false
    }
}

#[cfg(tidegate_loom)]
impl Deref for Count {
    type Target = AtomicU64;

    fn deref(&self) -> &AtomicU64 {
        &self.0
    }
}

#[cfg(all(test, not(tidegate_loom)))]
mod tests {
    use super::*;

    #[test]
    fn every_column_of_a_word_is_read_and_cleared_by_itself() {
        let most = COUNT_MAX / 3;
        for held in [[0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3], [5, 6, 7], [most; 3]] {
            let word = (0..COLUMNS).zip(held).map(|(n, held)| u64::from(held) * unit(n)).sum();
            assert_eq!([0, 1, 2].map(|n| column(word, n)), held);
            assert_eq!(sum(word), held.iter().sum::<u32>());
            for of in 0..COLUMNS {
                let mut left = held;
                left[of as usize] = 0;
                assert_eq!([0, 1, 2].map(|n| column(cleared(word, of), n)), left);
            }
        }
    }

    #[test]
    fn word_that_is_used_again_starts_at_zero() {
        for _ in 0..3 {
            let count = Count::own();
            assert_eq!(count.load(Ordering::Relaxed), 0);
            count.fetch_add(unit(0), Ordering::Relaxed);
        }
    }
}
