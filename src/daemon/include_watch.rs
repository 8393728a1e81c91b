//! Detects changes of included configuration files: changed, new and removed files.
//!
//! Started by `config_reloads`, which then requests a reload. It compares the metadata of the
//! files once per second, on a thread of its own, because a network file system can block it.
//! It never reads a file.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;
use tidegate_core::model::Includes;

/// Time between two checks.
const STEP: Duration = Duration::from_secs(1);

/// Most entries of a directory that are compared.
const ENTRIES_MAX: usize = 10_000;

/// Watches included files until dropped.
#[derive(Debug)]
pub(super) struct IncludeWatch {
    files: mpsc::Sender<Includes>,
}

/// A path with the metadata that a change of the file changes: inode, size, and times of the
/// content and of the inode.
type FileState = (PathBuf, Option<(u64, u64, (i64, i64), (i64, i64))>);

// === impl IncludeWatch ===

impl IncludeWatch {
    /// Starts the thread. It calls `on_change` after each change.
    pub(super) fn start(
        includes: Includes,
        on_change: impl Fn() + Send + 'static,
    ) -> std::io::Result<IncludeWatch> {
        let (files, updates) = mpsc::channel();
        let known = look(&includes);
        let watch = move || run(includes, known, &updates, &on_change);
        std::thread::Builder::new().name("include-watch".to_owned()).spawn(watch)?;
        Ok(IncludeWatch { files })
    }

    /// Watches other files from now on.
    pub(super) fn set(&self, includes: &Includes) {
        // Fails only after the thread has panicked. The panic is logged.
        let _ = self.files.send(includes.clone());
    }
}

fn run(
    mut includes: Includes,
    mut known: Vec<FileState>,
    updates: &mpsc::Receiver<Includes>,
    on_change: &impl Fn(),
) {
    loop {
        match updates.recv_timeout(STEP) {
            Ok(newer) if newer.patterns == includes.patterns => {}
            Ok(newer) => {
                includes = newer;
                known = look(&includes);
            }
            Err(RecvTimeoutError::Timeout) => {
                let now = look(&includes);
                if now != known {
                    known = now;
                    on_change();
                }
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// Returns the state of every file that a pattern can match.
fn look(includes: &Includes) -> Vec<FileState> {
    let mut all: Vec<FileState> = Vec::new();
    for pattern in &includes.patterns {
        let name = pattern.file_name().unwrap_or_default().to_string_lossy();
        if !name.contains('*') {
            all.push(state(pattern.clone()));
            continue;
        }
        let directory = match pattern.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
        all.extend(entries.take(ENTRIES_MAX).map(|entry| state(entry.path())));
    }
    all.sort();
    all
}

fn state(path: PathBuf) -> FileState {
    let data = std::fs::metadata(&path).ok();
    let data = data.map(|data| {
        let (modified, changed) =
            ((data.mtime(), data.mtime_nsec()), (data.ctime(), data.ctime_nsec()));
        (data.ino(), data.size(), modified, changed)
    });
    (path, data)
}
