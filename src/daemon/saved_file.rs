//! What the files of the state directory have in common: JSON with a version, and times in
//! seconds since 1970.
//!
//! Used by `saved_intents` and `saved_views`. Pure: it opens no file, and the caller passes
//! the time.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::time::{Duration, SystemTime};

/// The part of a file that every version has.
#[derive(Debug, Deserialize)]
struct VersionedFile {
    version: u32,
}

/// Reads a file of `version`.
///
/// # Errors
/// The file is damaged or has another version. The error is the text for the log.
pub(super) fn read<T: DeserializeOwned>(text: &[u8], version: u32) -> Result<T, String> {
    let damaged = |error: serde_json::Error| format!("damaged: {error}");
    let VersionedFile { version: found } = serde_json::from_slice(text).map_err(damaged)?;
    if found != version {
        return Err(format!("unsupported version {found}; this binary reads version {version}"));
    }
    serde_json::from_slice(text).map_err(damaged)
}

/// Returns the seconds since 1970; 0 for an earlier time.
pub(super) fn unix(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}
