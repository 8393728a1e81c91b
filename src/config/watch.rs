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
//! each event the way is walked anew.
//!
//! A slow look at the file catches what inotify(7) cannot see: network file
//! systems, a directory replaced as a whole. Where inotify is refused, that
//! look is all there is, and it compares contents too.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode, ModifyKind};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};

use super::source;

/// How long after a first event more are awaited: a file is written in
/// several steps, and a directory swap is several renames.
const SETTLE: Duration = Duration::from_millis(100);

/// How often the file is looked at without being told.
const POLL: Duration = Duration::from_secs(2);

/// The same where the kernel reports nothing: that look is all there is then, and
/// the kernel is asked for reports again each time.
const POLL_ALONE: Duration = Duration::from_secs(1);

/// Symbolic links followed before giving up, as the kernel does (path_resolution(7)).
const LINKS_MAX: usize = 40;

/// How often the set of watched directories is corrected in a row while links
/// move under our feet; the next event or look goes on.
const SETUP_ROUNDS_MAX: usize = 8;

/// Watches one file until dropped. Dropping waits for a call of `on_change`
/// under way to return.
#[derive(Debug)]
pub struct ConfigWatcher {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the notifier's thread, ours and the owner share.
#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// An event since the last look.
    dirty: bool,
    stop: bool,
    /// Paths whose events matter: see [`Way`].
    relevant: HashSet<PathBuf>,
    /// The watched directories.
    directories: HashSet<PathBuf>,
    /// One of them went away; a new one may bear its name and even its inode.
    lost: bool,
    /// Why there is no notification, only the slow look.
    polling_reason: Option<String>,
}

/// How a watcher works; tests turn each half off.
#[derive(Debug, Clone, Copy)]
struct Settings {
    poll: Duration,
    notify: bool,
}

/// The names on the way from the configured path to the final file whose
/// replacement changes what is read.
#[derive(Debug, PartialEq, Eq, Default)]
struct Way {
    /// Full paths, each below a directory free of symbolic links.
    names: Vec<PathBuf>,
}

/// What a look at the file shows; `None` where there is none.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
struct Look {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
    /// Only where nothing else would tell.
    digest: Option<u64>,
}

/// The watching thread's own state.
struct Watch {
    path: PathBuf,
    shared: Arc<Shared>,
    settings: Settings,
    notifier: Option<RecommendedWatcher>,
    /// Watched directories with device and inode, to notice a replaced one.
    directories: HashMap<PathBuf, (u64, u64)>,
}

// === impl ConfigWatcher ===

impl ConfigWatcher {
    /// Watches `path`, which need not exist yet. `on_change` is called on a
    /// thread of its own, at most ten times a second, and means only that the
    /// file may have changed.
    ///
    /// # Errors
    /// The working directory of a relative path is gone, or no thread can be
    /// started. That inotify is refused is no error: see
    /// [`ConfigWatcher::polling_reason`].
    pub fn start(path: &Path, on_change: impl Fn() + Send + 'static) -> io::Result<ConfigWatcher> {
        Self::start_with(path, Settings { poll: POLL, notify: true }, on_change)
    }

    /// Why changes are only polled for every second; `None` while the
    /// kernel reports them. Never ends with a full stop.
    pub fn polling_reason(&self) -> Option<String> {
        self.shared.lock().polling_reason.clone()
    }

    fn start_with(
        path: &Path,
        settings: Settings,
        on_change: impl Fn() + Send + 'static,
    ) -> io::Result<ConfigWatcher> {
        let shared = Arc::new(Shared::default());
        let mut watch = Watch {
            path: std::path::absolute(path)?,
            shared: Arc::clone(&shared),
            settings,
            notifier: None,
            directories: HashMap::new(),
        };
        // Before the thread starts: a change right after `start` is noticed.
        watch.follow();
        let seen = watch.look();
        let thread = thread::Builder::new()
            .name("config-watch".to_owned())
            .spawn(move || watch.run(seen, &on_change))?;
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

// === impl Shared ===

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is plain values, whole at any time.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Called on the notifier's thread.
    fn notice(&self, event: &notify::Result<notify::Event>) {
        let mut state = self.lock();
        let matters = match event {
            Ok(event) => {
                let lost = leaves(event.kind)
                    && event.paths.iter().any(|path| state.directories.contains(path));
                state.lost |= lost;
                lost || event.need_rescan()
                    || (changes(event.kind)
                        && event.paths.iter().any(|path| state.relevant.contains(path)))
            }
            Err(_) => true,
        };
        if matters {
            state.dirty = true;
            self.wake.notify_all();
        }
    }

    /// Waits for an event at most `poll`; returns whether to go on.
    fn wait(&self, poll: Duration) -> Wake {
        let idle = |state: &mut State| !state.stop && !state.dirty;
        let state = self.lock();
        let (state, _) =
            self.wake.wait_timeout_while(state, poll, idle).unwrap_or_else(PoisonError::into_inner);
        if !state.dirty && !state.stop {
            return Wake::Look;
        }
        let running = |state: &mut State| !state.stop;
        let (mut state, _) = self
            .wake
            .wait_timeout_while(state, SETTLE, running)
            .unwrap_or_else(PoisonError::into_inner);
        state.dirty = false;
        if state.stop { Wake::Stop } else { Wake::Event }
    }
}

/// Why the thread woke.
enum Wake {
    Stop,
    Event,
    Look,
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

// === impl Watch ===

impl Watch {
    fn run(mut self, mut seen: Option<Look>, on_change: &impl Fn()) {
        loop {
            let alone = self.shared.lock().polling_reason.is_some();
            let poll = self.settings.poll;
            let wake = self.shared.wait(if alone { poll.min(POLL_ALONE) } else { poll });
            if matches!(wake, Wake::Stop) {
                return;
            }
            self.follow();
            let now = self.look();
            if matches!(wake, Wake::Event) || now != seen {
                on_change();
            }
            seen = now;
        }
    }

    fn look(&self) -> Option<Look> {
        let data = fs::metadata(&self.path).ok()?;
        let polling = self.shared.lock().polling_reason.is_some();
        let bytes = if polling { source::read_file(&self.path).ok() } else { None };
        Some(Look {
            device: data.dev(),
            inode: data.ino(),
            size: data.size(),
            modified: (data.mtime(), data.mtime_nsec()),
            changed: (data.ctime(), data.ctime_nsec()),
            digest: bytes.map(|bytes| xxhash_rust::xxh3::xxh3_64(&bytes)),
        })
    }

    /// Walks the way to the file and watches its directories; repeats while
    /// the way changes between the walk and the watch.
    fn follow(&mut self) {
        let mut way = Way::walk(&self.path);
        for _ in 0..SETUP_ROUNDS_MAX {
            let outcome = self.watch(&way);
            self.told(outcome.err());
            let again = Way::walk(&self.path);
            if again == way {
                return;
            }
            way = again;
        }
    }

    /// Notes whether the kernel reports changes, and tells when that changes.
    fn told(&self, reason: Option<String>) {
        let before = std::mem::replace(&mut self.shared.lock().polling_reason, reason.clone());
        match (before, reason) {
            (before, Some(reason)) if before.as_ref() != Some(&reason) => {
                tracing::warn!(reason, "the configuration file is polled");
            }
            (Some(_), None) => tracing::info!("the configuration file is watched again"),
            _ => {}
        }
    }

    fn watch(&mut self, way: &Way) -> Result<(), String> {
        if !self.settings.notify {
            return Err("notification is switched off".to_owned());
        }
        let wanted = way.directories();
        let lost = {
            let mut state = self.shared.lock();
            state.relevant = way.names.iter().cloned().collect();
            state.directories = wanted.keys().cloned().collect();
            std::mem::take(&mut state.lost)
        };
        if self.notifier.is_none() {
            self.notifier = Some(new_notifier(&self.shared)?);
        }
        let Watch { notifier: Some(notifier), directories, .. } = self else {
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

fn new_notifier(shared: &Arc<Shared>) -> Result<RecommendedWatcher, String> {
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

// === impl Way ===

impl Way {
    /// Follows `path`, which is absolute, link by link. Ends at the file, at
    /// the first missing name or at [`LINKS_MAX`].
    fn walk(path: &Path) -> Way {
        let mut names = Vec::new();
        let mut links = 0;
        let mut at = PathBuf::from("/");
        let mut ahead: VecDeque<OsString> = parts(path).collect();
        while let Some(part) = ahead.pop_front() {
            if part == ".." {
                at.pop();
                continue;
            }
            let here = at.join(&part);
            let kind = fs::symlink_metadata(&here).map(|data| data.file_type());
            let target = match kind {
                Ok(kind) if kind.is_symlink() => fs::read_link(&here).ok(),
                Ok(_) => None,
                Err(_) => {
                    names.push(here);
                    break;
                }
            };
            let Some(target) = target else {
                if ahead.is_empty() {
                    names.push(here);
                    break;
                }
                at = here;
                continue;
            };
            names.push(here);
            links += 1;
            if links > LINKS_MAX {
                break;
            }
            if target.is_absolute() {
                at = PathBuf::from("/");
            }
            parts(&target).rev().for_each(|part| ahead.push_front(part));
        }
        Way { names }
    }

    /// The directories the names stand in, with device and inode.
    fn directories(&self) -> HashMap<PathBuf, (u64, u64)> {
        let parents = self.names.iter().filter_map(|name| name.parent());
        parents
            .filter_map(|parent| {
                let data = fs::metadata(parent).ok()?;
                Some((parent.to_owned(), (data.dev(), data.ino())))
            })
            .collect()
    }
}

/// The parts of a path that lead somewhere.
fn parts(path: &Path) -> impl DoubleEndedIterator<Item = OsString> {
    path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    })
}

#[cfg(test)]
mod tests;
