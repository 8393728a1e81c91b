//! Detects changes of a file: writes in place, renames over it, and swaps of symbolic
//! links.
//!
//! Started by `config_reloads`, which rereads the file after each notification and
//! compares digests. The watcher never parses the file, and a notification does not
//! mean that the content differs.
//!
//! # How
//! - inotify watches directories, not the file. A watch on a file ends with the first
//!   rename over it. A watch on a symbolic link ends with the first swap of a
//!   Kubernetes ConfigMap, which renames `..data`.
//! - The watched directories are those that contain a symbolic link of the path or the
//!   file itself (see [`WatchedPath`]). Each event resolves the path again.
//! - A periodic check of the file detects what inotify(7) does not report: changes on
//!   network file systems and a replaced directory. If inotify is not available, this
//!   check runs alone and also compares the content.
//!
//! # Incomplete files
//! A part of a TOML file is often valid, so validation does not detect an incomplete
//! file. The watcher notifies only after every writer has closed the file and the files
//! that the watched file names (see [`settle`]). A reload that an operator requests
//! waits in the same way ([`FileWatcher::request`]).

mod settle;
mod watched_path;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode, ModifyKind};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use rustix::fs::OFlags;

use self::settle::{FileEvent, FileSettling, Times, Verdict, WatchWarning};
use self::watched_path::WatchedPath;
use crate::clock;

/// A change is complete after this time without events. Editors write a file twice, and
/// a directory swap consists of several renames.
const SETTLE: Duration = Duration::from_millis(200);

/// Longest delay of a complete change by further events that write nothing.
const SETTLE_MAX: Duration = Duration::from_secs(3);

/// After this time without a write, an open file is read although it is not closed.
const SILENCE: Duration = Duration::from_secs(15);

/// Time between two warnings about a writer that never stops.
const WARN: Duration = Duration::from_secs(60);

/// Time between two checks of the file without an event.
const POLL: Duration = Duration::from_secs(2);

/// Time between two checks if inotify is not available. Each check also tries to set
/// up inotify again.
const POLL_ALONE: Duration = Duration::from_secs(1);

/// Files named by the watched file that are watched for writers. Further files are read
/// without waiting for their writers.
pub const NAMED_MAX: usize = 256;

/// How often in a row the set of watched directories is corrected while links change.
/// The next event or check continues.
const SETUP_ROUNDS_MAX: usize = 8;

/// Watches one file until dropped. Drop waits for a running call of `on_change`.
#[derive(Debug)]
pub struct FileWatcher {
    shared: Arc<WatchShared>,
    thread: Option<JoinHandle<()>>,
}

/// State shared by the owner, the watching thread and the thread of `notify`.
#[derive(Debug)]
struct WatchShared {
    state: Mutex<WatchState>,
    wake: Condvar,
    times: Times,
}

#[derive(Debug, Default)]
struct WatchState {
    /// An event arrived since the last check.
    dirty: bool,
    /// The file may have changed since the last notification.
    changed: bool,
    /// The owner requested a notification.
    requested: bool,
    /// The owner requested it since the last check.
    woken: bool,
    stop: bool,
    settling: FileSettling,
    /// Relevant paths (see [`WatchedPath`]). The value is true for paths that lead to
    /// the watched file itself.
    relevant: HashMap<PathBuf, bool>,
    /// The watched directories.
    directories: HashSet<PathBuf>,
    /// A watched directory was removed or renamed. A new directory can have the same
    /// name and even the same inode.
    lost: bool,
    /// Files that the watched file names.
    named: Vec<PathBuf>,
    /// Why inotify is not used; only the periodic check runs.
    polling_reason: Option<String>,
}

/// How a watcher works. Tests disable inotify or the periodic check.
#[derive(Debug, Clone, Copy)]
struct WatchSettings {
    poll: Duration,
    notify: bool,
    silence: Duration,
    settle: Duration,
}

/// Metadata of a file, to detect changes.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
struct FileStamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
    /// Set only if inotify is not available.
    digest: Option<u64>,
}

/// State of the watching thread.
struct WatchThread {
    /// The watched file.
    path: PathBuf,
    shared: Arc<WatchShared>,
    settings: WatchSettings,
    notifier: Option<RecommendedWatcher>,
    /// Watched directories with device and inode, to detect a replaced directory.
    directories: HashMap<PathBuf, (u64, u64)>,
    /// The file and the files it names, at the last check. `None`: the
    /// file does not exist.
    stamps: Vec<(PathBuf, Option<FileStamp>)>,
    /// The file at the last notification.
    notified: Option<FileStamp>,
    /// The files were completely written when `stamps` was taken.
    complete: bool,
}

// === impl FileWatcher ===

impl FileWatcher {
    /// Watches `path`, which does not need to exist yet. A separate thread calls
    /// `on_change`. A call means that the file may have changed and is completely
    /// written.
    ///
    /// # Errors
    /// The path is relative and the working directory does not exist, or the thread
    /// cannot be started. Missing inotify is not an error: see
    /// [`FileWatcher::polling_reason`].
    pub fn start(path: &Path, on_change: impl Fn() + Send + 'static) -> io::Result<FileWatcher> {
        Self::start_settling(path, SETTLE, on_change)
    }

    /// As [`start`](FileWatcher::start), but a change is complete after `settle` without
    /// events (default 200 ms). For files in which a part is never valid.
    ///
    /// # Errors
    /// As [`start`](FileWatcher::start).
    pub fn start_settling(
        path: &Path,
        settle: Duration,
        on_change: impl Fn() + Send + 'static,
    ) -> io::Result<FileWatcher> {
        let settings = WatchSettings { poll: POLL, notify: true, silence: SILENCE, settle };
        Self::start_with(path, settings, on_change)
    }

    /// Returns why the file is polled every second; `None` while inotify works. The
    /// text does not end with a full stop.
    pub fn polling_reason(&self) -> Option<String> {
        self.shared.lock().polling_reason.clone()
    }

    /// Requests a call of `on_change` as soon as no writer has the file, or a file that
    /// the watched file names, open.
    pub fn request(&self) {
        let mut state = self.shared.lock();
        (state.requested, state.woken) = (true, true);
        self.shared.wake.notify_all();
    }

    /// Also waits for writers of these files, at most [`NAMED_MAX`]. They are read
    /// together with the watched file. A change of these files alone causes no call of
    /// `on_change`.
    pub fn wait_for_writers_of(&self, mut named: Vec<PathBuf>) {
        named.truncate(NAMED_MAX);
        let mut state = self.shared.lock();
        if state.named != named {
            state.named = named;
            state.dirty = true;
            self.shared.wake.notify_all();
        }
    }

    /// Returns a file that a writer has open, as far as inotify reports it.
    pub fn being_written(&self) -> Option<PathBuf> {
        self.shared.lock().settling.open_file().map(Path::to_owned)
    }

    fn start_with(
        path: &Path,
        settings: WatchSettings,
        on_change: impl Fn() + Send + 'static,
    ) -> io::Result<FileWatcher> {
        let times = Times {
            settle: settings.settle,
            settle_max: SETTLE_MAX,
            confirm: POLL_ALONE.min(settings.poll),
            silence: settings.silence,
            warn: WARN,
        };
        let (state, wake) = (Mutex::default(), Condvar::new());
        let shared = Arc::new(WatchShared { state, wake, times });
        let mut watch = WatchThread {
            path: std::path::absolute(path)?,
            shared: Arc::clone(&shared),
            settings,
            notifier: None,
            directories: HashMap::new(),
            stamps: Vec::new(),
            notified: None,
            complete: true,
        };
        // Before the thread starts, so that a change right after `start` is detected.
        watch.update_watches();
        watch.stamps = watch.stamp();
        watch.notified = watch.stamps.first().and_then(|(_, stamp)| *stamp);
        let thread = thread::Builder::new()
            .name("file-watch".to_owned())
            .spawn(move || watch.run(&on_change))?;
        Ok(FileWatcher { shared, thread: Some(thread) })
    }
}

impl Drop for FileWatcher {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            // The panic hook has already logged a panic of `on_change`.
            let _ = thread.join();
        }
    }
}

// === impl WatchShared ===

impl WatchShared {
    fn lock(&self) -> MutexGuard<'_, WatchState> {
        // The state consists of plain values, so it is valid after a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Called by the thread of `notify`.
    fn notice(&self, event: &notify::Result<notify::Event>) {
        let mut state = self.lock();
        if state.notice(event, clock::now(), &self.times) {
            state.dirty = true;
            self.wake.notify_all();
        }
    }

    /// Waits for an event or a request, until `due` at most. Returns false to stop.
    fn wait(&self, due: Instant) -> bool {
        let idle = |state: &mut WatchState| !state.stop && !state.dirty && !state.woken;
        let left = due.saturating_duration_since(clock::now());
        let state = self.lock();
        let (state, _) =
            self.wake.wait_timeout_while(state, left, idle).unwrap_or_else(PoisonError::into_inner);
        !state.stop
    }
}

// === impl WatchState ===

impl WatchState {
    /// Sets the relevant paths. Returns whether a watched directory was lost since the
    /// last call.
    fn watch(&mut self, paths: &[WatchedPath], directories: impl Iterator<Item = PathBuf>) -> bool {
        self.relevant.clear();
        // The watched file is the first path, so it is inserted last and overrides.
        for (index, path) in paths.iter().enumerate().rev() {
            self.relevant.extend(path.names.iter().map(|name| (name.clone(), index == 0)));
        }
        let WatchState { relevant, settling, .. } = self;
        settling.keep_only(|path| relevant.contains_key(path));
        self.directories = directories.collect();
        std::mem::take(&mut self.lost)
    }

    /// Records an event. Returns whether it is relevant.
    fn notice(
        &mut self,
        event: &notify::Result<notify::Event>,
        now: Instant,
        times: &Times,
    ) -> bool {
        let Ok(event) = event else {
            self.changed = true;
            return true;
        };
        let lost =
            leaves(event.kind) && event.paths.iter().any(|path| self.directories.contains(path));
        self.lost |= lost;
        let everything = lost || event.need_rescan();
        self.changed |= everything;
        let mut matters = everything;
        if changes(event.kind) {
            for path in &event.paths {
                let Some(of_watched) = self.relevant.get(path) else { continue };
                self.changed |= of_watched;
                self.settling.event(path, file_event(event.kind, path), now, times);
                matters = true;
            }
        }
        matters
    }
}

/// Returns whether an event can be a change. Reading the file, as each reload does, is
/// not a change.
fn changes(kind: EventKind) -> bool {
    match kind {
        EventKind::Access(access) => access == AccessKind::Close(AccessMode::Write),
        _ => true,
    }
}

fn leaves(kind: EventKind) -> bool {
    matches!(kind, EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(_)))
}

/// Returns what an event means for the file `path`.
fn file_event(kind: EventKind, path: &Path) -> FileEvent {
    // The writer of a new, empty file writes next. A new link is complete.
    let empty = || fs::symlink_metadata(path).is_ok_and(|data| data.is_file() && data.len() == 0);
    match kind {
        EventKind::Modify(ModifyKind::Data(_)) => FileEvent::Written,
        EventKind::Create(_) if empty() => FileEvent::Written,
        EventKind::Modify(ModifyKind::Metadata(_)) => FileEvent::Touched,
        _ => FileEvent::Complete,
    }
}

// === impl WatchThread ===

impl WatchThread {
    fn run(mut self, on_change: &impl Fn()) {
        let mut due = clock::now() + self.poll();
        while self.shared.wait(due) {
            due = self.check(on_change);
        }
    }

    fn poll(&self) -> Duration {
        let alone = self.shared.lock().polling_reason.is_some();
        if alone { self.settings.poll.min(POLL_ALONE) } else { self.settings.poll }
    }

    /// Checks all files once and calls `on_change` if that is due. Returns the time of
    /// the next check.
    fn check(&mut self, on_change: &impl Fn()) -> Instant {
        let by_event = {
            let mut state = self.shared.lock();
            state.woken = false;
            std::mem::take(&mut state.dirty)
        };
        self.update_watches();
        let stamps = self.stamp();
        let differs = stamps != self.stamps;
        self.stamps = stamps;
        let now = clock::now();
        let next_poll = now + self.poll();
        let current = self.stamps.first().and_then(|(_, stamp)| *stamp);

        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        if differs && !by_event {
            state.settling.differs(now, &shared.times);
        }
        self.complete = match (by_event, differs) {
            (true, _) => state.settling.open_file().is_none(),
            (false, true) => false,
            (false, false) => self.complete,
        };
        let verdict = state.settling.verdict(now, &shared.times, &mut warn);
        self.complete |= verdict == Verdict::Settled;
        state.changed |= current != self.notified;
        // An event arrived during this check. The next check decides.
        if state.dirty {
            return now;
        }
        let notify = match verdict {
            Verdict::Settled => state.changed || state.requested,
            Verdict::Wait(_) => state.requested && self.complete,
        };
        if notify {
            (state.changed, state.requested) = (false, false);
            self.notified = current;
            drop(state);
            on_change();
        }
        match verdict {
            Verdict::Settled => next_poll,
            Verdict::Wait(until) => until.min(next_poll),
        }
    }

    /// Reads the metadata of all files.
    fn stamp(&self) -> Vec<(PathBuf, Option<FileStamp>)> {
        let (polling, named) = {
            let state = self.shared.lock();
            (state.polling_reason.is_some(), state.named.clone())
        };
        let all = std::iter::once(self.path.clone()).chain(named);
        all.map(|path| {
            let stamp = FileStamp::at(&path, polling);
            (path, stamp)
        })
        .collect()
    }

    /// Resolves the path of each file and watches its directories. Repeats this if a
    /// path changed before its directories were watched.
    fn update_watches(&mut self) {
        let mut paths = self.walk();
        for _ in 0..SETUP_ROUNDS_MAX {
            let outcome = self.watch(&paths);
            self.set_polling_reason(outcome.err());
            let again = self.walk();
            if again == paths {
                return;
            }
            paths = again;
        }
    }

    fn walk(&self) -> Vec<WatchedPath> {
        let named = self.shared.lock().named.clone();
        std::iter::once(&self.path).chain(&named).map(|path| WatchedPath::walk(path)).collect()
    }

    /// Records whether inotify works, and logs a change of that.
    fn set_polling_reason(&self, reason: Option<String>) {
        let before = std::mem::replace(&mut self.shared.lock().polling_reason, reason.clone());
        match (before, reason) {
            (before, Some(reason)) if before.as_ref() != Some(&reason) => {
                tracing::warn!(
                    file = %self.path.display(),
                    reason,
                    "cannot watch a file; checking it every second"
                );
            }
            (Some(_), None) => {
                tracing::info!(file = %self.path.display(), "watching the file again");
            }
            _ => {}
        }
    }

    fn watch(&mut self, paths: &[WatchedPath]) -> Result<(), String> {
        if !self.settings.notify {
            return Err("notification is disabled".to_owned());
        }
        let wanted: HashMap<_, _> = paths.iter().flat_map(WatchedPath::directories).collect();
        let lost = self.shared.lock().watch(paths, wanted.keys().cloned());
        if self.notifier.is_none() {
            self.notifier = Some(new_notifier(&self.shared)?);
        }
        let WatchThread { notifier: Some(notifier), directories, .. } = self else {
            return Ok(());
        };
        directories.retain(|directory, id| {
            let keep = !lost && wanted.get(directory) == Some(id);
            if !keep {
                // Fails if the kernel has already removed the watch with its directory.
                let _ = notifier.unwatch(directory);
            }
            keep
        });
        let mut outcome = Ok(());
        for (directory, id) in wanted {
            if directories.contains_key(&directory) {
                continue;
            }
            match notifier.watch(&directory, RecursiveMode::NonRecursive) {
                Ok(()) => drop(directories.insert(directory, id)),
                Err(error) => outcome = outcome.and(Err(reason(&directory, &error))),
            }
        }
        outcome
    }
}

fn warn(warning: WatchWarning) {
    match warning {
        WatchWarning::StillOpen(path) => tracing::warn!(
            file = %path.display(),
            idle_for = ?SILENCE,
            "a writer keeps a file open without writing; reading the file as it is"
        ),
        WatchWarning::StillWritten(path, time) => tracing::warn!(
            file = %path.display(),
            written_for = ?Duration::from_secs(time.as_secs()),
            "a file is still being written; waiting until the writer closes it"
        ),
    }
}

// === impl FileStamp ===

impl FileStamp {
    fn at(path: &Path, with_digest: bool) -> Option<FileStamp> {
        let data = fs::metadata(path).ok()?;
        let digest = if with_digest { digest(path) } else { None };
        Some(FileStamp {
            device: data.dev(),
            inode: data.ino(),
            size: data.size(),
            modified: (data.mtime(), data.mtime_nsec()),
            changed: (data.ctime(), data.ctime_nsec()),
            digest,
        })
    }
}

/// Returns a digest of a regular file's content.
fn digest(path: &Path) -> Option<u64> {
    // O_NONBLOCK: a FIFO has no content to wait for.
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let mut file =
        fs::OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path).ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut hasher = xxhash_rust::xxh3::Xxh3::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match file.read(&mut buffer).ok()? {
            0 => return Some(hasher.digest()),
            read => hasher.update(&buffer[..read]),
        }
    }
}

fn new_notifier(shared: &Arc<WatchShared>) -> Result<RecommendedWatcher, String> {
    let shared = Arc::clone(shared);
    notify::recommended_watcher(move |event| shared.notice(&event))
        .map_err(|error| format!("inotify is not available: {error}"))
}

fn reason(directory: &Path, error: &notify::Error) -> String {
    match error.kind {
        notify::ErrorKind::MaxFilesWatch => {
            format!(
                "cannot watch {}: the limit fs.inotify.max_user_watches is reached",
                directory.display()
            )
        }
        _ => format!("cannot watch {}: {error}", directory.display()),
    }
}

#[cfg(test)]
mod tests;
