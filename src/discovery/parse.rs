//! Where large answers are parsed.
//!
//! All sources run on one thread. A parse of many megabytes there would delay the answers
//! and timeouts of the others, so it runs on a blocking thread of the runtime.

use crate::client::HttpFailure;
use crate::tasks;

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
    let parsed = tasks::blocking(parse).await;
    parsed.map_err(|_| HttpFailure::protocol("the parser panicked"))
}
