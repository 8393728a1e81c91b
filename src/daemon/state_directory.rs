//! The directory of `[process] state`: stores operators' intents (drain, maintenance) for
//! the next start.
//!
//! Opened by `start`, owned by the control loop, which passes it every change of intents.
//! A separate thread writes the newest intents. An invalid file never prevents a start.
//!
//! - Intents from the supervisor or the old process of an upgrade are newer than the file
//!   and take precedence.
//! - A file that is damaged, belongs to another user or has another version is renamed
//!   and not used.

use super::sandbox::make_directory;
use super::saved_intents::{decode, encode};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tidegate_core::control::handover::Saved;
use tidegate_net::clock;
use tidegate_net::privileges::UserIdentity;
use tokio::sync::oneshot;

/// The file in the directory.
const FILE: &str = "intents.json";

/// New name of a file that cannot be used. Replaces such a file of an earlier start.
const REJECTED: &str = "intents.json.rejected";

/// Size limit of the file: several times the size that the bounds on backends and
/// removed intents allow with usual names.
const BYTES_MAX: u64 = 64 << 20;

/// How long the process waits at its end for the last intents to be written.
const FLUSH_MAX: Duration = Duration::from_secs(1);

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct StateDirectory {
    /// `None` with `state = "off"`.
    writer: Option<IntentWriter>,
    failures: Arc<AtomicU64>,
}

/// The thread that writes.
#[derive(Debug)]
struct IntentWriter {
    path: PathBuf,
    newest: Arc<Mutex<UnwrittenIntents>>,
    /// Wakes the thread. Dropped to end the thread.
    wake: Option<SyncSender<()>>,
    ended: Receiver<()>,
}

/// The newest intents, and the requests that wait until they are on disk.
#[derive(Debug, Default)]
struct UnwrittenIntents {
    intents: Option<Saved>,
    waiting: Vec<oneshot::Sender<()>>,
}

/// Creates the directory for the user, if its parent exists.
///
/// # Errors
/// The directory cannot be created, or the path is not a directory.
pub(super) fn prepare(directory: &Path, identity: Option<&UserIdentity>) -> io::Result<()> {
    match std::fs::metadata(directory) {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => Err(io::Error::from_raw_os_error(libc::ENOTDIR)),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Err(_) => make_directory(directory, DirBuilder::new().mode(0o700), identity),
    }
}

/// Returns the error message for a directory that cannot be used.
pub(super) fn refusal(directory: &Path, error: &io::Error) -> String {
    format!("cannot use the state directory {}: {error}", directory.display())
}

// === impl StateDirectory ===

impl StateDirectory {
    /// Opens `directory` for writing.
    ///
    /// # Errors
    /// No file can be created in it, or the thread cannot be started.
    pub(super) fn open(directory: Option<&Path>) -> io::Result<StateDirectory> {
        let mut state = StateDirectory::default();
        if let Some(directory) = directory {
            prepare(directory, None)?;
            let temporary = temporary(directory);
            create(&temporary)?;
            std::fs::remove_file(&temporary)?;
            let failures = Arc::clone(&state.failures);
            state.writer = Some(IntentWriter::start(directory.to_owned(), failures)?);
        }
        Ok(state)
    }

    /// Reads the stored intents. A file that cannot be used is renamed and logged.
    pub(super) fn read(&self) -> Option<Saved> {
        let directory = &self.writer.as_ref()?.path;
        let path = directory.join(FILE);
        let read = read_file(&path).and_then(|text| {
            decode(&text, clock::wall())
                .map_err(|why| io::Error::new(io::ErrorKind::InvalidData, why))
        });
        match read {
            Ok(saved) => Some(saved),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                let rejected = directory.join(REJECTED);
                let kept = std::fs::rename(&path, &rejected).map(|()| rejected);
                let kept = kept.as_ref().map_or(&path, |rejected| rejected).display();
                tracing::error!(
                    path = %path.display(), %error, %kept,
                    "cannot read operator intents; every backend starts undrained"
                );
                None
            }
        }
    }

    /// Schedules a write of `intents`. The receiver resolves when these or newer intents
    /// are on disk or the write failed. Returns `None` with `state = "off"`.
    pub(super) fn write(&self, intents: impl FnOnce() -> Saved) -> Option<oneshot::Receiver<()>> {
        let writer = self.writer.as_ref()?;
        let (done, written) = oneshot::channel();
        let mut newest = lock(&writer.newest);
        newest.intents = Some(intents());
        newest.waiting.push(done);
        drop(newest);
        // A full queue means that the thread has already been woken.
        let _ = writer.wake.as_ref()?.try_send(());
        Some(written)
    }

    /// Returns the number of failed writes.
    pub(super) fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }
}

// === impl IntentWriter ===

impl IntentWriter {
    fn start(path: PathBuf, failures: Arc<AtomicU64>) -> io::Result<IntentWriter> {
        let (wake, woken) = sync_channel(1);
        let (end, ended) = sync_channel(1);
        let newest: Arc<Mutex<UnwrittenIntents>> = Arc::default();
        let (directory, shared) = (path.clone(), Arc::clone(&newest));
        let run = move || {
            while woken.recv().is_ok() {
                write_newest(&directory, &shared, &failures);
            }
            // Fails if the control thread does not wait any more.
            let _ = end.send(());
        };
        std::thread::Builder::new().name("intents".to_owned()).spawn(run)?;
        Ok(IntentWriter { path, newest, wake: Some(wake), ended })
    }
}

impl Drop for IntentWriter {
    fn drop(&mut self) {
        self.wake = None;
        if self.ended.recv_timeout(FLUSH_MAX) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!(
                "cannot confirm that the last operator intents are on disk; a restart can lose them"
            );
        }
    }
}

fn write_newest(directory: &Path, shared: &Mutex<UnwrittenIntents>, failures: &AtomicU64) {
    let UnwrittenIntents { intents, waiting } = std::mem::take(&mut *lock(shared));
    let Some(intents) = intents else { return };
    if let Err(error) = replace(directory, &encode(&intents, clock::wall())) {
        let path = directory.join(FILE);
        let failed = failures.fetch_add(1, Ordering::Relaxed) + 1;
        tracing::warn!(path = %path.display(), %error, failed, "cannot write operator intents; a restart loses them");
    }
    for one in waiting {
        // Fails if the client has closed its connection.
        let _ = one.send(());
    }
}

fn lock(newest: &Mutex<UnwrittenIntents>) -> MutexGuard<'_, UnwrittenIntents> {
    // Each field is replaced in one step, so the value is valid after a panic.
    newest.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns a file name for this process only, because two processes can write at the
/// same time.
fn temporary(directory: &Path) -> PathBuf {
    directory.join(format!("{FILE}.{}", std::process::id()))
}

fn create(path: &Path) -> io::Result<File> {
    // Left by an earlier process with the same pid.
    let _ = std::fs::remove_file(path);
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// Replaces the file atomically: a reader gets the complete old or new file.
fn replace(directory: &Path, text: &[u8]) -> io::Result<()> {
    let temporary = temporary(directory);
    let written = create(&temporary).and_then(|mut file| {
        file.write_all(text)?;
        file.sync_all()?;
        std::fs::rename(&temporary, directory.join(FILE))?;
        File::open(directory)?.sync_all()
    });
    written.inspect_err(|_| {
        let _ = std::fs::remove_file(&temporary);
    })
}

/// Reads a file that only this user or root can write.
fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let found = file.metadata()?;
    let refused = |why: String| Err(io::Error::new(io::ErrorKind::InvalidData, why));
    let own = rustix::process::geteuid().as_raw();
    if !found.is_file() {
        return refused("not a regular file".to_owned());
    }
    if found.uid() != own && found.uid() != 0 {
        return refused(format!("owned by user {}; expected user {own} or root", found.uid()));
    }
    if found.mode() & 0o022 != 0 {
        return refused("writable by other users".to_owned());
    }
    if found.len() > BYTES_MAX {
        return refused(format!("too large: {} bytes, at most {BYTES_MAX}", found.len()));
    }
    let mut text = Vec::new();
    file.take(BYTES_MAX).read_to_end(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use tidegate_core::control::handover::{SavedBackend, SavedPool};

    fn drained(name: &str) -> Saved {
        let backend = SavedBackend {
            name: name.to_owned(),
            address: "10.0.0.1:80".to_owned(),
            intent: "draining".to_owned(),
            ..SavedBackend::default()
        };
        let pool =
            SavedPool { name: "web".into(), backends: vec![backend], ..SavedPool::default() };
        Saved { pools: vec![pool], ..Saved::default() }
    }

    fn names(saved: Option<Saved>) -> Vec<String> {
        let pools = saved.into_iter().flat_map(|saved| saved.pools);
        pools.flat_map(|pool| pool.backends).map(|backend| backend.name).collect()
    }

    #[test]
    fn newest_intents_are_stored_without_access_for_other_users() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("state");
        let state = StateDirectory::open(Some(&own)).unwrap();
        assert_eq!(names(state.read()), [""; 0]);
        for name in ["a", "b", "c"] {
            let written = state.write(|| drained(name));
            assert!(written.is_some());
        }
        drop(state);
        assert_eq!(names(StateDirectory::open(Some(&own)).unwrap().read()), ["c"]);
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&own), mode(&own.join(FILE))), (0o700, 0o600));
        let left = std::fs::read_dir(&own).unwrap().count();
        assert_eq!(left, 1, "a temporary file remains");
    }

    #[test]
    fn drain_answer_waits_until_the_intent_is_on_disk() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDirectory::open(Some(dir.path())).unwrap();
        state.write(|| drained("a")).unwrap().blocking_recv().unwrap();
        let text = std::fs::read(dir.path().join(FILE)).unwrap();
        assert_eq!(names(Some(decode(&text, clock::wall()).unwrap())), ["a"]);
    }

    #[test]
    fn unusable_file_is_renamed_and_written_again() {
        let dir = tempfile::tempdir().unwrap();
        let (file, rejected) = (dir.path().join(FILE), dir.path().join(REJECTED));
        let spoil: [fn(&Path); 3] = [
            |file| std::fs::write(file, "{\"version\":1").unwrap(),
            |file| std::fs::write(file, "{\"version\":2,\"intents\":[]}").unwrap(),
            |file| std::fs::set_permissions(file, PermissionsExt::from_mode(0o666)).unwrap(),
        ];
        for spoil in spoil {
            let state = StateDirectory::open(Some(dir.path())).unwrap();
            state.write(|| drained("a")).unwrap().blocking_recv().unwrap();
            spoil(&file);
            assert_eq!(names(state.read()), [""; 0]);
            assert!(rejected.exists() && !file.exists());
            std::fs::remove_file(&rejected).unwrap();
        }
    }

    #[test]
    fn failed_write_is_counted_and_answered() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("state");
        let state = StateDirectory::open(Some(&own)).unwrap();
        std::fs::remove_dir(&own).unwrap();
        state.write(|| drained("a")).unwrap().blocking_recv().unwrap();
        assert_eq!(state.failures(), 1);
    }

    #[test]
    fn directory_without_parent_or_at_the_path_of_a_file_is_rejected() {
        let dir = tempfile::tempdir().unwrap();
        assert!(StateDirectory::open(Some(&dir.path().join("no/such"))).is_err());
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert!(StateDirectory::open(Some(&dir.path().join("file"))).is_err());
        assert!(StateDirectory::open(None).unwrap().write(|| drained("a")).is_none());
    }
}
