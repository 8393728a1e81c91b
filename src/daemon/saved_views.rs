//! Format of the file in which the views of member sources survive a restart.
//!
//! Used by `state_directory`. Pure: it opens no file, and the caller passes the time. The
//! views have ages, so the file also has the time at which it was written.

use super::saved_file::{self, unix};
use serde::{Deserialize, Serialize};
use std::time::{Duration, SystemTime};
use tidegate_core::control::SavedViews;

/// Version of the format. Must be incremented with each change of the format.
const VERSION: u32 = 1;

/// The whole file.
#[derive(Debug, Serialize, Deserialize)]
struct ViewFile {
    version: u32,
    /// Seconds since 1970.
    written: u64,
    views: SavedViews,
}

/// Encodes `views`, whose ages are relative to `now`.
pub(super) fn encode(views: &SavedViews, now: SystemTime) -> Vec<u8> {
    let file = ViewFile { version: VERSION, written: unix(now), views: views.clone() };
    let mut text =
        serde_json::to_vec(&file).expect("plain data with string keys always serialises");
    text.push(b'\n');
    text
}

/// Decodes a file. The ages of the result are relative to `now`.
///
/// # Errors
/// The file is damaged or has another version. The error is the text for the log.
pub(super) fn decode(text: &[u8], now: SystemTime) -> Result<SavedViews, String> {
    let ViewFile { written, mut views, .. } = saved_file::read(text, VERSION)?;
    views.add_age(Duration::from_secs(unix(now).saturating_sub(written)));
    Ok(views)
}
