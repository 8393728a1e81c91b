//! The word behind an in-flight count. The processes of an upgrade can share it.
//!
//! Used by `in_flight` for every session, and by the policies that compare loads. This
//! module knows the layout of a word. It does not know where shared words are: the
//! caller passes them in.
//!
//! # Layout
//!
//! A count is one 64-bit word. The upper 22 bits hold the sum of [`COLUMNS`] columns.
//! The first two columns are below it, 21 bits each. The third column is the rest of
//! the sum.
//!
//! A process changes the sum and its own column with one addition of its [`unit`], and
//! a cap is compared with the sum. Taking a slot is one compare-and-swap. Giving it
//! back is one subtraction. A process that is killed therefore never leaves a half-done
//! change. Its column holds the slots it had, and another process subtracts that column
//! from the word.

#[cfg(feature = "loom")]
use loom::sync::atomic::AtomicU64;
use std::ops::Deref;
use std::sync::Arc;
#[cfg(not(feature = "loom"))]
use std::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(feature = "loom"))]
use std::sync::{Mutex, PoisonError};

/// Number of columns of a count.
pub const COLUMNS: u32 = 3;
/// Bits per column.
const COLUMN_BITS: u32 = 21;
/// Maximum sum of all columns. Beyond it, one column could overflow into the next.
pub const COUNT_MAX: u32 = (1 << COLUMN_BITS) - 1;
/// Lowest bit of the sum.
const SUM_AT: u32 = COLUMN_BITS * (COLUMNS - 1);

/// Returns the value that a process with this column adds to a word per slot.
pub const fn unit(column: u32) -> u64 {
    let own = if column + 1 < COLUMNS { 1 << (COLUMN_BITS * column) } else { 0 };
    (1 << SUM_AT) + own
}

/// Returns the sum of all columns of `word`.
#[inline]
pub const fn sum(word: u64) -> u32 {
    (word >> SUM_AT) as u32
}

/// Returns one column of `word`.
pub const fn column(word: u64, column: u32) -> u32 {
    let first = word as u32 & COUNT_MAX;
    let second = (word >> COLUMN_BITS) as u32 & COUNT_MAX;
    match column {
        0 => first,
        1 => second,
        _ => sum(word).saturating_sub(first).saturating_sub(second),
    }
}

/// Returns `word` with the column `of` set to 0. The process of that column must have
/// ended.
pub const fn cleared(word: u64, of: u32) -> u64 {
    word - column(word, of) as u64 * unit(of)
}

/// A count: the word, and a guard that reserves the word for this count.
#[cfg(not(feature = "loom"))]
#[derive(Debug, Clone)]
pub struct Count {
    word: &'static AtomicU64,
    shareable: bool,
    _hold: Arc<dyn CountHold>,
}

/// Reserves a word for its count until it is dropped.
pub trait CountHold: std::fmt::Debug + Send + Sync {}

impl<T: std::fmt::Debug + Send + Sync> CountHold for T {}

/// A word that belongs to this process only, on separate cache lines.
#[cfg(not(feature = "loom"))]
#[derive(Debug)]
#[repr(C, align(128))]
struct OwnWord(AtomicU64);

/// Words that no count uses at the moment. They are never freed, so their number is the
/// maximum that was ever in use at the same time.
#[cfg(not(feature = "loom"))]
static FREE: Mutex<Vec<&'static OwnWord>> = Mutex::new(Vec::new());

#[cfg(not(feature = "loom"))]
#[derive(Debug)]
struct OwnHold(&'static OwnWord);

// === impl Count ===

#[cfg(not(feature = "loom"))]
impl Count {
    /// Creates a count that is not shared with other processes.
    pub fn own() -> Count {
        let free = FREE.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let own = free.unwrap_or_else(|| Box::leak(Box::new(OwnWord(AtomicU64::new(0)))));
        own.0.store(0, Ordering::Relaxed);
        Count { word: &own.0, shareable: false, _hold: Arc::new(OwnHold(own)) }
    }

    /// Creates a count in memory that other processes can map. `hold` reserves the word
    /// for this count.
    pub fn shared(word: &'static AtomicU64, hold: Arc<dyn CountHold>) -> Count {
        Count { word, shareable: true, _hold: hold }
    }

    /// Returns whether another process can count here.
    pub fn is_shareable(&self) -> bool {
        self.shareable
    }
}

#[cfg(not(feature = "loom"))]
impl Deref for Count {
    type Target = AtomicU64;

    #[inline]
    fn deref(&self) -> &AtomicU64 {
        self.word
    }
}

#[cfg(not(feature = "loom"))]
impl Drop for OwnHold {
    fn drop(&mut self) {
        FREE.lock().unwrap_or_else(PoisonError::into_inner).push(self.0);
    }
}

/// Replaces shared memory in loom models, because loom tracks only its own atomics.
#[cfg(feature = "loom")]
#[derive(Debug, Clone)]
pub struct Count(Arc<AtomicU64>);

#[cfg(feature = "loom")]
impl Count {
    /// Creates a count.
    pub fn own() -> Count {
        Count(Arc::new(AtomicU64::new(0)))
    }

    /// Creates a count that is not shared: no model has a second process.
    pub fn shared(_: &'static std::sync::atomic::AtomicU64, _: Arc<dyn CountHold>) -> Count {
        Count::own()
    }

    /// Returns false.
    pub fn is_shareable(&self) -> bool {
        false
    }
}

#[cfg(feature = "loom")]
impl Deref for Count {
    type Target = AtomicU64;

    fn deref(&self) -> &AtomicU64 {
        &self.0
    }
}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use super::*;

    #[test]
    fn columns_of_a_word_are_read_and_cleared_independently() {
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
    fn reused_word_starts_at_zero() {
        for _ in 0..3 {
            let count = Count::own();
            assert_eq!(count.load(Ordering::Relaxed), 0);
            count.fetch_add(unit(0), Ordering::Relaxed);
        }
    }
}
