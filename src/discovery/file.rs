//! The file source: a JSON list of members on this host.
//!
//! `thread` runs one [`run`] per question. The file is read after each change, once no writer
//! keeps it open, and every 10 s. Each file costs two idle threads. A file that is unreadable or
//! is not a whole list changes nothing: a missing file is not an empty list.

use crate::backoff::Pause;
use crate::client::{ANSWER_BYTES_MAX, HttpFailure};
use crate::http::whole;
use crate::listing::decode_list;
use crate::tasks;
use crate::tell::Teller;
use rustix::fs::OFlags;
use std::convert::Infallible;
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tidegate_core::discovery::{SourceFailure, Told};
use tidegate_net::file_watch::FileWatcher;
use tokio::sync::Notify;

/// Time between two reads of a file that is not seen to change.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// A change is complete after this time without events. A part of a list is never a list, so
/// a read that is too early only counts as a failure.
const SETTLE: Duration = Duration::from_millis(30);

/// Reads the file forever. Tells each change, and a sign of life for each read without one.
pub async fn run(path: PathBuf, teller: Teller) -> Infallible {
    let changed = Arc::new(Notify::new());
    let watcher = watch(&path, Arc::clone(&changed)).await;
    let (mut pause, mut last) = (Pause::new(), None);
    loop {
        pause.begin();
        let file = path.clone();
        let read = tasks::blocking(move || read_list(&file, last)).await;
        let panicked = |_| Err(HttpFailure::protocol("the parser panicked"));
        let good = match read.unwrap_or_else(panicked) {
            Ok(ListFile { told, digest }) => {
                last = Some(digest);
                teller.tell(told);
                true
            }
            Err(failure) => {
                teller.tell(failure.told());
                false
            }
        };
        wait(&changed, watcher.as_ref(), &mut pause, good).await;
    }
}

/// Waits for a change, or for the time of the next read. A file with a writer is not read
/// for a mere check: its list is incomplete.
async fn wait(changed: &Notify, watcher: Option<&FileWatcher>, pause: &mut Pause, good: bool) {
    loop {
        let next_check = async {
            match good {
                true => pause.interval(CHECK_INTERVAL).await,
                false => pause.failed().await,
            }
        };
        if tokio::select! { () = changed.notified() => true, () = next_check => false } {
            return;
        }
        if watcher.is_none_or(|watcher| watcher.being_written().is_none()) {
            return;
        }
        pause.begin();
    }
}

/// `None`: this host has no thread left; the file is read on time only.
async fn watch(path: &Path, changed: Arc<Notify>) -> Option<FileWatcher> {
    let path = path.to_owned();
    let notify = move || changed.notify_one();
    let start = move || FileWatcher::start_settling(&path, SETTLE, notify);
    let started = tasks::blocking(start).await;
    match started.unwrap_or_else(|_| Err(io::Error::other("the watcher panicked"))) {
        Ok(watcher) => Some(watcher),
        Err(error) => {
            tracing::warn!(%error, "cannot watch a list of members; reading it every 10 s");
            None
        }
    }
}

/// A file that was read.
#[derive(Debug)]
struct ListFile {
    told: Told,
    digest: u64,
}

/// `last` is the digest of the list that was told last.
fn read_list(path: &Path, last: Option<u64>) -> Result<ListFile, HttpFailure> {
    let bytes = read(path)?;
    let digest = xxhash_rust::xxh3::xxh3_64(&bytes);
    if last == Some(digest) {
        return Ok(ListFile { told: Told::Alive, digest });
    }
    let members = decode_list(&bytes)
        .map_err(|problem| HttpFailure::protocol(format_args!("{}: {problem}", path.display())))?;
    let told = whole(members, format!("digest {digest:016x}"));
    Ok(ListFile { told, digest })
}

fn read(path: &Path) -> Result<Vec<u8>, HttpFailure> {
    let cannot = |error: io::Error| {
        let why = match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => SourceFailure::NotFound,
            _ => SourceFailure::Local,
        };
        HttpFailure::new(why, format_args!("cannot read {}: {error}", path.display()))
    };
    // O_NONBLOCK: the open of a FIFO does not wait for its writer (open(2)).
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(cannot)?;
    if !file.metadata().map_err(cannot)?.is_file() {
        let text = format_args!("{} is not a regular file", path.display());
        return Err(HttpFailure::local(text));
    }
    let mut bytes = Vec::new();
    file.take(ANSWER_BYTES_MAX as u64 + 1).read_to_end(&mut bytes).map_err(cannot)?;
    if bytes.len() > ANSWER_BYTES_MAX {
        let text = format_args!("{} is larger than {ANSWER_BYTES_MAX} bytes", path.display());
        return Err(HttpFailure::protocol(text));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;
