//! Where large answers are parsed, and how many entries their lists can have.
//!
//! All sources run on one thread. A parse of many megabytes there would delay the answers
//! and timeouts of the others, so it runs on a blocking thread of the runtime. An entry of
//! two bytes (`{}`) can become a value of a hundred, so the bound of a body does not bound
//! the memory: lists have bounds of their own.

use crate::client::HttpFailure;
use serde::Deserialize;
use serde::de::{Deserializer, Error, SeqAccess, Visitor};
use std::fmt;
use std::marker::PhantomData;

/// Larger input is parsed on another thread, in bytes. Typed JSON is parsed at 100 MB/s or
/// more, so this is at most about 10 ms.
pub const PARSE_HERE_BYTES_MAX: usize = 1 << 20;

/// Runs `parse` here if its input is small, else on a blocking thread.
///
/// # Errors
/// `Protocol`: the parser panicked.
pub async fn off_runtime<T: Send + 'static>(
    input_bytes: usize,
    parse: impl FnOnce() -> T + Send + 'static,
) -> Result<T, HttpFailure> {
    if input_bytes <= PARSE_HERE_BYTES_MAX {
        return Ok(parse());
    }
    let parsed = tokio::task::spawn_blocking(parse).await;
    parsed.map_err(|_| HttpFailure::protocol("the parser panicked"))
}

/// A list of at most `N` entries. A longer one is an error, and its further entries are not
/// read.
#[derive(Debug)]
pub(crate) struct AtMost<T, const N: usize>(pub(crate) Vec<T>);

struct BoundedList<T, const N: usize>(PhantomData<T>);

/// Reads a field as [`AtMost`].
///
/// # Errors
/// It is no list, or a longer one.
pub(crate) fn at_most<'de, D: Deserializer<'de>, T: Deserialize<'de>, const N: usize>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    AtMost::<T, N>::deserialize(deserializer).map(|list| list.0)
}

// === impl AtMost ===

impl<'de, T: Deserialize<'de>, const N: usize> Deserialize<'de> for AtMost<T, N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<AtMost<T, N>, D::Error> {
        deserializer.deserialize_seq(BoundedList::<T, N>(PhantomData)).map(AtMost)
    }
}

impl<'de, T: Deserialize<'de>, const N: usize> Visitor<'de> for BoundedList<T, N> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {N} entries")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = list.next_element()? {
            if entries.len() == N {
                return Err(A::Error::invalid_length(N + 1, &self));
            }
            entries.push(entry);
        }
        Ok(entries)
    }
}
