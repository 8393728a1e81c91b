//! The directory of `[process] state`: stores operators' intents (drain, maintenance) and
//! the views of member sources for the next start.
//!
//! Opened by `start`, owned by the control loop, which passes it every change. A separate
//! thread encodes and writes the newest value of each file. An invalid file never prevents a
//! start.
//!
//! - Intents from the supervisor or the old process of an upgrade are newer than the file
//!   and take precedence.
//! - A file that is damaged, belongs to another user or has another version is renamed
//!   and not used.

use super::sandbox::make_directory;
use super::{saved_intents, saved_views};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tidegate_core::control::SavedViews;
use tidegate_core::control::handover::Saved;
use tidegate_net::clock;
use tidegate_net::privileges::UserIdentity;
use tokio::sync::oneshot;

/// Size limit of a file: several times the size that the bounds on backends and removed
/// intents allow with usual names.
const BYTES_MAX: u64 = 64 << 20;

/// New extension of a file that cannot be used. Replaces such a file of an earlier start.
const REJECTED: &str = "json.rejected";

/// How long the process waits at its end for the last values to be written.
const FLUSH_MAX: Duration = Duration::from_secs(1);

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct StateDirectory {
    /// `None` with `state = "off"`.
    writer: Option<StateWriter>,
    failures: Arc<AtomicU64>,
}

/// A file in the directory.
#[derive(Debug, Clone, Copy)]
enum StateFile {
    Intents,
    Views,
}

/// The thread that writes.
#[derive(Debug)]
struct StateWriter {
    path: PathBuf,
    newest: Arc<Mutex<UnwrittenState>>,
    /// Wakes the thread. Dropped to end the thread.
    wake: Option<SyncSender<()>>,
    ended: Receiver<()>,
}

/// The newest values, and the requests that wait until the intents are on disk.
#[derive(Debug, Default)]
struct UnwrittenState {
    intents: Option<Saved>,
    views: Option<SavedViews>,
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
            let temporary = temporary(directory, "test");
            create(&temporary)?;
            std::fs::remove_file(&temporary)?;
            let failures = Arc::clone(&state.failures);
            state.writer = Some(StateWriter::start(directory.to_owned(), failures)?);
        }
        Ok(state)
    }

    /// Reads the stored intents. A file that cannot be used is renamed and logged.
    pub(super) fn read_intents(&self) -> Option<Saved> {
        self.read(StateFile::Intents, saved_intents::decode)
    }

    /// Reads the stored views. A file that cannot be used is renamed and logged.
    pub(super) fn read_views(&self) -> Option<SavedViews> {
        self.read(StateFile::Views, saved_views::decode)
    }

    fn read<T>(
        &self,
        file: StateFile,
        decode: fn(&[u8], SystemTime) -> Result<T, String>,
    ) -> Option<T> {
        let path = self.writer.as_ref()?.path.join(file.name());
        let read = read_file(&path).and_then(|text| {
            decode(&text, clock::wall())
                .map_err(|why| io::Error::new(io::ErrorKind::InvalidData, why))
        });
        match read {
            Ok(saved) => Some(saved),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                let rejected = path.with_extension(REJECTED);
                let kept = std::fs::rename(&path, &rejected).map(|()| rejected);
                let kept = kept.as_ref().map_or(&path, |rejected| rejected).display();
                match file {
                    StateFile::Intents => tracing::error!(
                        path = %path.display(), %error, %kept,
                        "cannot read operator intents; every backend starts undrained"
                    ),
                    StateFile::Views => tracing::error!(
                        path = %path.display(), %error, %kept,
                        "cannot read the views of member sources; pools wait for their sources"
                    ),
                }
                None
            }
        }
    }

    /// Schedules a write of `intents`. The receiver resolves when these or newer intents
    /// are on disk or the write failed. Returns `None` with `state = "off"`.
    pub(super) fn write_intents(
        &self,
        intents: impl FnOnce() -> Saved,
    ) -> Option<oneshot::Receiver<()>> {
        let writer = self.writer.as_ref()?;
        let (done, written) = oneshot::channel();
        let mut newest = lock(&writer.newest);
        newest.intents = Some(intents());
        newest.waiting.push(done);
        drop(newest);
        writer.wake();
        Some(written)
    }

    /// Schedules a write of `views`. Does nothing with `state = "off"`.
    pub(super) fn write_views(&self, views: impl FnOnce() -> SavedViews) {
        let Some(writer) = self.writer.as_ref() else { return };
        lock(&writer.newest).views = Some(views());
        writer.wake();
    }

    /// Whether values are written.
    pub(super) fn is_open(&self) -> bool {
        self.writer.is_some()
    }

    /// Returns the number of failed writes.
    pub(super) fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }
}

// === impl StateFile ===

impl StateFile {
    fn name(self) -> &'static str {
        match self {
            StateFile::Intents => "intents.json",
            StateFile::Views => "views.json",
        }
    }
}

// === impl StateWriter ===

impl StateWriter {
    fn start(path: PathBuf, failures: Arc<AtomicU64>) -> io::Result<StateWriter> {
        let (wake, woken) = sync_channel(1);
        let (end, ended) = sync_channel(1);
        let newest: Arc<Mutex<UnwrittenState>> = Arc::default();
        let (directory, shared) = (path.clone(), Arc::clone(&newest));
        let run = move || {
            while woken.recv().is_ok() {
                write_newest(&directory, &shared, &failures);
            }
            // Fails if the control thread does not wait any more.
            let _ = end.send(());
        };
        std::thread::Builder::new().name("state".to_owned()).spawn(run)?;
        Ok(StateWriter { path, newest, wake: Some(wake), ended })
    }

    fn wake(&self) {
        if let Some(wake) = &self.wake {
            // A full queue means that the thread has already been woken.
            let _ = wake.try_send(());
        }
    }
}

impl Drop for StateWriter {
    fn drop(&mut self) {
        self.wake = None;
        if self.ended.recv_timeout(FLUSH_MAX) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!(
                "cannot confirm that the last operator intents are on disk; a restart can lose them"
            );
        }
    }
}

fn write_newest(directory: &Path, shared: &Mutex<UnwrittenState>, failures: &AtomicU64) {
    let UnwrittenState { intents, views, waiting } = std::mem::take(&mut *lock(shared));
    let written = |file: StateFile, text: Vec<u8>| {
        let result = replace(directory, file.name(), &text);
        result.map_err(|error| {
            let failed = failures.fetch_add(1, Ordering::Relaxed) + 1;
            (directory.join(file.name()), error, failed)
        })
    };
    if let Some(intents) = intents
        && let Err((path, error, failed)) =
            written(StateFile::Intents, saved_intents::encode(&intents, clock::wall()))
    {
        tracing::warn!(path = %path.display(), %error, failed, "cannot write operator intents; a restart loses them");
    }
    if let Some(views) = views
        && let Err((path, error, failed)) =
            written(StateFile::Views, saved_views::encode(&views, clock::wall()))
    {
        tracing::warn!(path = %path.display(), %error, failed, "cannot write the views of member sources; a restart waits for the sources");
    }
    for one in waiting {
        // Fails if the client has closed its connection.
        let _ = one.send(());
    }
}

fn lock(newest: &Mutex<UnwrittenState>) -> MutexGuard<'_, UnwrittenState> {
    // Each field is replaced in one step, so the value is valid after a panic.
    newest.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns a file name for this process only, because two processes can write at the
/// same time.
fn temporary(directory: &Path, file: &str) -> PathBuf {
    directory.join(format!("{file}.{}", std::process::id()))
}

fn create(path: &Path) -> io::Result<File> {
    // Left by an earlier process with the same pid.
    let _ = std::fs::remove_file(path);
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// Replaces the file atomically: a reader gets the complete old or new file.
fn replace(directory: &Path, file: &str, text: &[u8]) -> io::Result<()> {
    let temporary = temporary(directory, file);
    let written = create(&temporary).and_then(|mut open| {
        open.write_all(text)?;
        open.sync_all()?;
        std::fs::rename(&temporary, directory.join(file))?;
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
        assert_eq!(names(state.read_intents()), [""; 0]);
        for name in ["a", "b", "c"] {
            let written = state.write_intents(|| drained(name));
            assert!(written.is_some());
        }
        drop(state);
        assert_eq!(names(StateDirectory::open(Some(&own)).unwrap().read_intents()), ["c"]);
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&own), mode(&own.join(StateFile::Intents.name()))), (0o700, 0o600));
        let left = std::fs::read_dir(&own).unwrap().count();
        assert_eq!(left, 1, "a temporary file remains");
    }

    #[test]
    fn drain_answer_waits_until_the_intent_is_on_disk() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDirectory::open(Some(dir.path())).unwrap();
        state.write_intents(|| drained("a")).unwrap().blocking_recv().unwrap();
        let text = std::fs::read(dir.path().join(StateFile::Intents.name())).unwrap();
        assert_eq!(names(Some(saved_intents::decode(&text, clock::wall()).unwrap())), ["a"]);
    }

    #[test]
    fn unusable_file_is_renamed_and_written_again() {
        let dir = tempfile::tempdir().unwrap();
        let (file, rejected) =
            (dir.path().join("intents.json"), dir.path().join("intents.json.rejected"));
        let spoil: [fn(&Path); 3] = [
            |file| std::fs::write(file, "{\"version\":1").unwrap(),
            |file| std::fs::write(file, "{\"version\":2,\"intents\":[]}").unwrap(),
            |file| std::fs::set_permissions(file, PermissionsExt::from_mode(0o666)).unwrap(),
        ];
        for spoil in spoil {
            let state = StateDirectory::open(Some(dir.path())).unwrap();
            state.write_intents(|| drained("a")).unwrap().blocking_recv().unwrap();
            spoil(&file);
            assert_eq!(names(state.read_intents()), [""; 0]);
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
        state.write_intents(|| drained("a")).unwrap().blocking_recv().unwrap();
        assert_eq!(state.failures(), 1);
    }

    #[test]
    fn directory_without_parent_or_at_the_path_of_a_file_is_rejected() {
        let dir = tempfile::tempdir().unwrap();
        assert!(StateDirectory::open(Some(&dir.path().join("no/such"))).is_err());
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert!(StateDirectory::open(Some(&dir.path().join("file"))).is_err());
        assert!(StateDirectory::open(None).unwrap().write_intents(|| drained("a")).is_none());
    }
}
