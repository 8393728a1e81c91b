//! Notices that the configuration file may have changed: written in place,
//! replaced by rename, or swapped behind symbolic links. Started by the
//! application, which reloads when told and compares digests itself. Never
//! parses the file and never decides whether it changed.
//!
//! # How
//! The directories are watched, never the file: a watch on a file dies with
//! the first rename over it, one on a symbolic link with the first swap of a
//! Kubernetes ConfigMap (`..data` is replaced by rename). Watched is each
//! directory in which a name on the way from the path to the final file stands
//! that could be swapped: every symbolic link met, and the file itself. After
//! each event the way is walked again.
//!
//! A slow look at the file catches what inotify(7) cannot see: network file
//! systems, a directory replaced as a whole. Where inotify is refused, that
//! look is all there is, and it compares contents too.
//!
//! # Never a half-written file
//! A valid prefix of a TOML file is common, so validation does not protect
//! against reading too early. The application is told only once every writer of
//! the file, and of the files that the configuration names, has closed it (see
//! [`settle`]). The same holds for a reload that an operator asks for
//! ([`ConfigWatcher::ask`]), which is told at once where nothing is being
//! written.

mod settle;
mod way;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode, ModifyKind};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};

use self::settle::{FileSettling, Happening, Times, Verdict, WatchWarning};
use self::way::WatchedPath;
use tidegate_config::source;
use tidegate_net::clock;

/// How long nothing may happen before a change counts as complete: editors write
/// a file twice, and a directory swap is several renames.
const SETTLE: Duration = Duration::from_millis(200);

/// The same in all while events keep coming.
const SETTLE_MAX: Duration = Duration::from_secs(3);

/// How long an open writer may be silent before the file is read as it stands.
const SILENCE: Duration = Duration::from_secs(15);

/// How often a writer that never stops is warned of.
const WARN: Duration = Duration::from_secs(60);

/// How often the file is looked at without being told.
const POLL: Duration = Duration::from_secs(2);

/// The same where the kernel reports nothing: that look is all there is then, and
/// the kernel is asked for reports again each time.
const POLL_ALONE: Duration = Duration::from_secs(1);

/// Files named by a configuration that are watched for writers; those beyond are
/// read as they stand.
pub const NAMED_MAX: usize = 256;

/// How often the set of watched directories is corrected in a row while links
/// move under our feet; the next event or look continues.
const SETUP_ROUNDS_MAX: usize = 8;

/// Watches one file until dropped. Dropping waits for a call of `on_change`
/// under way to return.
#[derive(Debug)]
pub struct ConfigWatcher {
    shared: Arc<WatchShared>,
    thread: Option<JoinHandle<()>>,
}

/// What the notifier's thread, ours and the owner share.
#[derive(Debug)]
struct WatchShared {
    state: Mutex<WatchState>,
    wake: Condvar,
    times: Times,
}

#[derive(Debug, Default)]
struct WatchState {
    /// An event since the last look.
    dirty: bool,
    /// One of the configuration file's since it was last told of.
    changed: bool,
    /// The owner wants to be told, changed or not.
    asked: bool,
    /// It has asked since the last look.
    woken: bool,
    stop: bool,
    settling: FileSettling,
    /// Paths whose events matter (see [`WatchedPath`]), and whether the configuration
    /// file itself is reached by them.
    relevant: HashMap<PathBuf, bool>,
    /// The watched directories.
    directories: HashSet<PathBuf>,
    /// One of them went away; a new one may bear its name and even its inode.
    lost: bool,
    /// What the configuration names.
    named: Vec<PathBuf>,
    /// Why there is no notification, only the slow look.
    polling_reason: Option<String>,
}

/// How a watcher works; tests turn each half off.
#[derive(Debug, Clone, Copy)]
struct WatchSettings {
    poll: Duration,
    notify: bool,
    silence: Duration,
}

/// What a look at a file shows; `None` where there is none.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
struct FileStamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
    /// Only where nothing else would tell.
    digest: Option<u64>,
}

/// The watching thread's own state.
struct WatchThread {
    /// The configuration file.
    path: PathBuf,
    shared: Arc<WatchShared>,
    settings: WatchSettings,
    notifier: Option<RecommendedWatcher>,
    /// Watched directories with device and inode, to notice a replaced one.
    directories: HashMap<PathBuf, (u64, u64)>,
    /// The configuration file, then what it names, at the last look.
    looks: Vec<(PathBuf, Option<FileStamp>)>,
    /// The configuration file when its owner was last told.
    told: Option<FileStamp>,
    /// What `looks` shows is known to be written to its end.
    complete: bool,
}

// === impl ConfigWatcher ===

impl ConfigWatcher {
    /// Watches `path`, which need not exist yet. `on_change` is called on a
    /// thread of its own, at most ten times a second, and means only that the
    /// file may have changed, and is written to its end.
    ///
    /// # Errors
    /// The working directory of a relative path is gone, or no thread can be
    /// started. That inotify is refused is no error: see
    /// [`ConfigWatcher::polling_reason`].
    pub fn start(path: &Path, on_change: impl Fn() + Send + 'static) -> io::Result<ConfigWatcher> {
        let settings = WatchSettings { poll: POLL, notify: true, silence: SILENCE };
        Self::start_with(path, settings, on_change)
    }

    /// Why changes are only polled for every second; `None` while the
    /// kernel reports them. Never ends with a full stop.
    pub fn polling_reason(&self) -> Option<String> {
        self.shared.lock().polling_reason.clone()
    }

    /// Has `on_change` called as soon as the file and those it names are written
    /// to their end: at once where nothing is being written.
    pub fn ask(&self) {
        let mut state = self.shared.lock();
        (state.asked, state.woken) = (true, true);
        self.shared.wake.notify_all();
    }

    /// Also waits for writers of these files, which are read together with the
    /// watched one; at most [`NAMED_MAX`] of them. A change of theirs alone calls
    /// nothing.
    pub fn wait_for_writers_of(&self, mut named: Vec<PathBuf>) {
        named.truncate(NAMED_MAX);
        let mut state = self.shared.lock();
        if state.named != named {
            state.named = named;
            state.dirty = true;
            self.shared.wake.notify_all();
        }
    }

    /// A file that a writer has open right now, as far as the kernel reports it.
    pub fn being_written(&self) -> Option<PathBuf> {
        self.shared.lock().settling.open_file().map(Path::to_owned)
    }

    fn start_with(
        path: &Path,
        settings: WatchSettings,
        on_change: impl Fn() + Send + 'static,
    ) -> io::Result<ConfigWatcher> {
        let times = Times {
            settle: SETTLE,
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
            looks: Vec::new(),
            told: None,
            complete: true,
        };
        // Before the thread starts: a change right after `start` is noticed.
        watch.follow();
        watch.looks = watch.stamp();
        watch.told = watch.looks.first().and_then(|(_, look)| *look);
        let thread = thread::Builder::new()
            .name("config-watch".to_owned())
            .spawn(move || watch.run(&on_change))?;
        Ok(ConfigWatcher { shared, thread: Some(thread) })
    }
}

impl Drop for ConfigWatcher {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            // A panic of `on_change` was already printed by its thread.
            let _ = thread.join();
        }
    }
}

// === impl WatchShared ===

impl WatchShared {
    fn lock(&self) -> MutexGuard<'_, WatchState> {
        // The state is plain values, whole at any time.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Called on the notifier's thread.
    fn notice(&self, event: &notify::Result<notify::Event>) {
        let mut state = self.lock();
        if state.notice(event, clock::now(), &self.times) {
            state.dirty = true;
            self.wake.notify_all();
        }
    }

    /// Waits for an event or a question, until `due` at most; false to stop.
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
    /// From now on events on these ways matter. Whether a watched directory has been
    /// lost since the last time.
    fn watch(&mut self, ways: &[WatchedPath], directories: impl Iterator<Item = PathBuf>) -> bool {
        self.relevant.clear();
        // The configuration file comes first, and so is inserted last.
        for (index, way) in ways.iter().enumerate().rev() {
            self.relevant.extend(way.names.iter().map(|name| (name.clone(), index == 0)));
        }
        let WatchState { relevant, settling, .. } = self;
        settling.keep_only(|path| relevant.contains_key(path));
        self.directories = directories.collect();
        std::mem::take(&mut self.lost)
    }

    /// Whether the event matters.
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
                let Some(of_configuration) = self.relevant.get(path) else { continue };
                self.changed |= of_configuration;
                self.settling.event(path, happening(event.kind, path), now, times);
                matters = true;
            }
        }
        matters
    }
}

/// Reading the file, as each reload does, must not look like a change.
fn changes(kind: EventKind) -> bool {
    match kind {
        EventKind::Access(access) => access == AccessKind::Close(AccessMode::Write),
        _ => true,
    }
}

fn leaves(kind: EventKind) -> bool {
    matches!(kind, EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(_)))
}

/// What an event says of the file of that name.
fn happening(kind: EventKind, path: &Path) -> Happening {
    // Who creates a file by opening it writes next; a link arrives whole.
    let begun = || fs::symlink_metadata(path).is_ok_and(|data| data.is_file() && data.len() == 0);
    match kind {
        EventKind::Modify(ModifyKind::Data(_)) => Happening::Written,
        EventKind::Create(_) if begun() => Happening::Written,
        EventKind::Modify(ModifyKind::Metadata(_)) => Happening::Touched,
        _ => Happening::Whole,
    }
}

// === impl WatchThread ===

impl WatchThread {
    fn run(mut self, on_change: &impl Fn()) {
        let mut due = clock::now() + self.poll();
        while self.shared.wait(due) {
            due = self.turn(on_change);
        }
    }

    fn poll(&self) -> Duration {
        let alone = self.shared.lock().polling_reason.is_some();
        if alone { self.settings.poll.min(POLL_ALONE) } else { self.settings.poll }
    }

    /// Looks at everything once and tells what is to be told; returns when to look
    /// again.
    fn turn(&mut self, on_change: &impl Fn()) -> Instant {
        let explained = {
            let mut state = self.shared.lock();
            state.woken = false;
            std::mem::take(&mut state.dirty)
        };
        self.follow();
        let looks = self.stamp();
        let differs = looks != self.looks;
        self.looks = looks;
        let now = clock::now();
        let next_poll = now + self.poll();
        let seen = self.looks.first().and_then(|(_, look)| *look);

        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        if differs && !explained {
            state.settling.looks_different(now, &shared.times);
        }
        self.complete = match (explained, differs) {
            (true, _) => state.settling.open_file().is_none(),
            (false, true) => false,
            (false, false) => self.complete,
        };
        let verdict = state.settling.verdict(now, &shared.times, &mut warn);
        self.complete |= verdict == Verdict::Settled;
        state.changed |= seen != self.told;
        // An event since the look: it decides, in the next turn.
        if state.dirty {
            return now;
        }
        let tell = match verdict {
            Verdict::Settled => state.changed || state.asked,
            Verdict::Wait(_) => state.asked && self.complete,
        };
        if tell {
            (state.changed, state.asked) = (false, false);
            self.told = seen;
            drop(state);
            on_change();
        }
        match verdict {
            Verdict::Settled => next_poll,
            Verdict::Wait(until) => until.min(next_poll),
        }
    }

    /// Every file that matters, as it is now.
    fn stamp(&self) -> Vec<(PathBuf, Option<FileStamp>)> {
        let (polling, named) = {
            let state = self.shared.lock();
            (state.polling_reason.is_some(), state.named.clone())
        };
        let all = std::iter::once(self.path.clone()).chain(named);
        all.map(|path| {
            let look = FileStamp::at(&path, polling);
            (path, look)
        })
        .collect()
    }

    /// Walks the way to each file and watches its directories; repeats while
    /// a way changes between the walk and the watch.
    fn follow(&mut self) {
        let mut ways = self.walk();
        for _ in 0..SETUP_ROUNDS_MAX {
            let outcome = self.watch(&ways);
            self.told_of(outcome.err());
            let again = self.walk();
            if again == ways {
                return;
            }
            ways = again;
        }
    }

    fn walk(&self) -> Vec<WatchedPath> {
        let named = self.shared.lock().named.clone();
        std::iter::once(&self.path).chain(&named).map(|path| WatchedPath::walk(path)).collect()
    }

    /// Notes whether the kernel reports changes, and tells when that changes.
    fn told_of(&self, reason: Option<String>) {
        let before = std::mem::replace(&mut self.shared.lock().polling_reason, reason.clone());
        match (before, reason) {
            (before, Some(reason)) if before.as_ref() != Some(&reason) => {
                tracing::warn!(
                    reason,
                    "cannot watch the configuration file; checking it every second"
                );
            }
            (Some(_), None) => tracing::info!("watching the configuration file again"),
            _ => {}
        }
    }

    fn watch(&mut self, ways: &[WatchedPath]) -> Result<(), String> {
        if !self.settings.notify {
            return Err("notification is disabled".to_owned());
        }
        let wanted: HashMap<_, _> = ways.iter().flat_map(WatchedPath::directories).collect();
        let lost = self.shared.lock().watch(ways, wanted.keys().cloned());
        if self.notifier.is_none() {
            self.notifier = Some(new_notifier(&self.shared)?);
        }
        let WatchThread { notifier: Some(notifier), directories, .. } = self else {
            return Ok(());
        };
        directories.retain(|directory, id| {
            let keep = !lost && wanted.get(directory) == Some(id);
            if !keep {
                // Fails where the kernel dropped the watch with its directory.
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
            "a writer keeps a configuration file open without writing; reading the file as it is"
        ),
        WatchWarning::StillWritten(path, time) => tracing::warn!(
            file = %path.display(),
            for_seconds = time.as_secs(),
            "a configuration file is still being written; waiting until the writer closes it"
        ),
    }
}

// === impl FileStamp ===

impl FileStamp {
    fn at(path: &Path, with_digest: bool) -> Option<FileStamp> {
        let data = fs::metadata(path).ok()?;
        let bytes = if with_digest { source::read_file(path).ok() } else { None };
        Some(FileStamp {
            device: data.dev(),
            inode: data.ino(),
            size: data.size(),
            modified: (data.mtime(), data.mtime_nsec()),
            changed: (data.ctime(), data.ctime_nsec()),
            digest: bytes.map(|bytes| xxhash_rust::xxh3::xxh3_64(&bytes)),
        })
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
