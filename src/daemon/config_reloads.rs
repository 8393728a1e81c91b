//! State of reloads: the configuration in force, the watcher of its file, and waiting
//! reload requests.
//!
//! Owned by the control loop. It does not read the file: `reload` reads it and puts it
//! in force.
//!
//! - A request waits until no writer has the file, or a file that it names, open. The
//!   watcher reports when that is the case.
//! - A request that has waited for [`HELD_MAX`] is rejected. The changed file is read
//!   later, when its writer closes it.

use super::due;
use super::include_watch::IncludeWatch;
use super::session_cap::SessionCap;
use crate::admin::{ReloadCounts, ReloadDoc, ReloadError};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::model::Config;
use tidegate_dataplane::local_errors;
use tidegate_net::clock;
use tidegate_net::file_watch::FileWatcher;
use tokio::sync::{Notify, oneshot};

/// How long a reload request waits for a writer of the file.
pub(super) const HELD_MAX: Duration = Duration::from_secs(6);

/// Requests that wait at the same time. For a further request, the file is read
/// without waiting.
const WAITING_MAX: usize = 64;

/// Time until a reload is retried after a local error. Well below the one second in
/// which Tidegate recovers from local errors.
const RETRY: Duration = Duration::from_millis(500);

/// A request for a reload.
#[derive(Debug)]
pub(super) struct ReloadRequest {
    /// The originator, as events name it.
    pub(super) who: String,
    /// Where the result is sent; `None` for SIGHUP and changed files, which get no answer.
    pub(super) reply: Option<oneshot::Sender<Result<ReloadDoc, ReloadError>>>,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct ConfigReloads {
    path: PathBuf,
    digest: u64,
    /// The configuration at the start. Settings that need a restart still have its
    /// values.
    started_with: Arc<Config>,
    config: Arc<Config>,
    session_cap: SessionCap,
    restart_needed: Vec<String>,
    /// The problem of the file, if the last reload rejected it.
    rejected: Option<String>,
    counts: ReloadCounts,
    /// `None` until the loop runs, or if the file cannot be watched.
    watcher: Option<FileWatcher>,
    /// Signalled by the watcher.
    changed: Arc<Notify>,
    /// `None` until the configuration includes files.
    includes: Option<IncludeWatch>,
    /// Signalled by `includes`.
    includes_changed: Arc<Notify>,
    waiting: Vec<ReloadRequest>,
    /// Since when the oldest request waits.
    waiting_since: Option<Instant>,
    /// When a reload is retried after a local error.
    retry_at: Option<Instant>,
}

/// What the control loop must do.
#[derive(Debug)]
pub(super) enum ReloadEvent {
    /// The file is complete. It has changed, or a request waits for it.
    FileComplete,
    /// An included file was changed, added or removed.
    IncludesChanged,
    /// A request has waited for [`HELD_MAX`].
    WaitTimeout,
    /// A retry after a local error is due.
    Retry,
}

// === impl ReloadRequest ===

impl ReloadRequest {
    /// A request that gets no answer.
    pub(super) fn by(who: &str) -> ReloadRequest {
        ReloadRequest { who: who.to_owned(), reply: None }
    }
}

// === impl ConfigReloads ===

impl ConfigReloads {
    /// Creates the state of a process that started with `config`, read from `path`.
    pub(super) fn new(path: PathBuf, digest: u64, config: Arc<Config>, descriptors: u64) -> Self {
        ConfigReloads {
            path,
            digest,
            started_with: Arc::clone(&config),
            config,
            session_cap: SessionCap::new(descriptors),
            restart_needed: Vec::new(),
            rejected: None,
            counts: ReloadCounts::default(),
            watcher: None,
            changed: Arc::default(),
            includes: None,
            includes_changed: Arc::default(),
            waiting: Vec::new(),
            waiting_since: None,
            retry_at: None,
        }
    }

    /// Waits for the next event.
    pub(super) async fn wake(&mut self) -> ReloadEvent {
        let held_until = self.waiting_since.map(|since| since + HELD_MAX);
        tokio::select! {
            () = self.changed.notified() => ReloadEvent::FileComplete,
            () = self.includes_changed.notified() => ReloadEvent::IncludesChanged,
            () = due::reached(held_until) => ReloadEvent::WaitTimeout,
            () = due::reached(self.retry_at) => ReloadEvent::Retry,
        }
    }

    /// Starts to watch the file.
    pub(super) fn watch(&mut self) {
        let notify = Arc::clone(&self.changed);
        match FileWatcher::start(&self.path, move || notify.notify_one()) {
            Ok(watcher) => self.watcher = Some(watcher),
            Err(error) => {
                tracing::warn!(%error, "cannot watch the configuration file; reload with SIGHUP or tidegate reload");
            }
        }
        self.watch_named_files();
    }

    /// Also waits for writers of the files that the configuration names, and watches included
    /// files.
    fn watch_named_files(&mut self) {
        let includes = &self.config.includes;
        match &self.includes {
            Some(watch) => watch.set(includes),
            None if includes.patterns.is_empty() => {}
            None => {
                let notify = Arc::clone(&self.includes_changed);
                match IncludeWatch::start(includes.clone(), move || notify.notify_one()) {
                    Ok(watch) => self.includes = Some(watch),
                    Err(error) => {
                        tracing::warn!(%error, "cannot watch included configuration files; reload with SIGHUP or tidegate reload");
                    }
                }
            }
        }
        if let Some(watcher) = &self.watcher {
            watcher.wait_for_writers_of(self.config.named_files());
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the XXH3 digest of the file in force.
    pub(super) fn digest(&self) -> u64 {
        self.digest
    }

    /// Returns the configuration in force, with the values of the file.
    pub(super) fn config(&self) -> &Arc<Config> {
        &self.config
    }

    /// Returns the configuration that this process started with.
    pub(super) fn started_with(&self) -> &Arc<Config> {
        &self.started_with
    }

    /// Returns the configuration in force, with the session cap lowered to what the file
    /// descriptor limit allows in addition to this number of `listeners`.
    pub(super) fn within_limits(&mut self, listeners: usize) -> Arc<Config> {
        self.session_cap.apply(&self.config, listeners)
    }

    /// Returns the warnings for status and for answers to reload requests.
    pub(super) fn warnings(&self) -> Vec<String> {
        self.restart_needed.clone()
    }

    /// Returns a warning if the file is rejected, so that it differs from the configuration in
    /// force.
    pub(super) fn rejected(&self) -> Option<String> {
        let problem = self.rejected.as_ref()?;
        Some(format!("configuration file rejected; the previous one stays in effect: {problem}"))
    }

    pub(super) fn counts(&self) -> ReloadCounts {
        self.counts
    }

    /// Sets the counts of the old process.
    pub(super) fn restore_counts(&mut self, before: ReloadCounts) {
        self.counts = before;
    }

    /// Counts a reload that has ended.
    pub(super) fn count(&mut self, result: &Result<ReloadDoc, ReloadError>) {
        match result {
            Ok(ReloadDoc { changed: true, .. }) => self.counts.changed += 1,
            Ok(_) => self.counts.unchanged += 1,
            Err(_) => self.counts.refused += 1,
        }
        self.rejected = match result {
            Err(ReloadError::Problems(problems)) => problems.first().map(|first| {
                format!("{}:{}:{}: {}", first.file, first.line, first.column, first.message)
            }),
            _ => None,
        };
    }

    /// Counts a reload that was rejected before it started.
    pub(super) fn count_refused(&mut self) {
        self.counts.refused += 1;
    }

    /// Sets the digest of a file that has changed but has the same meaning.
    pub(super) fn set_digest(&mut self, digest: u64) {
        self.digest = digest;
    }

    /// Sets the configuration in force. `restart_needed` lists its settings that need a
    /// restart.
    pub(super) fn adopt(&mut self, config: Arc<Config>, digest: u64, restart_needed: Vec<String>) {
        (self.config, self.digest, self.restart_needed) = (config, digest, restart_needed);
        self.watch_named_files();
    }

    // --- requests that wait for the file ---

    /// Queues a request until the file is complete. Returns the request if it cannot
    /// wait.
    pub(super) fn hold(&mut self, request: ReloadRequest) -> Option<ReloadRequest> {
        match &self.watcher {
            Some(watcher) if self.waiting.len() < WAITING_MAX => {
                self.waiting.push(request);
                self.waiting_since.get_or_insert(clock::now());
                watcher.request();
                None
            }
            _ => Some(request),
        }
    }

    /// Takes the waiting requests. Returns `None` if a file is being written again; the
    /// requests then continue to wait.
    pub(super) fn take_waiting(&mut self) -> Option<Vec<ReloadRequest>> {
        let held_until = self.waiting_since.map(|since| since + HELD_MAX);
        // A writer has opened a file since the notification.
        if self.file_being_written().is_some()
            && held_until.is_none_or(|until| clock::now() < until)
        {
            if let (Some(_), Some(watcher)) = (self.waiting_since, &self.watcher) {
                watcher.request();
            }
            return None;
        }
        Some(self.drain_waiting())
    }

    /// Takes the waiting requests without another check for writers.
    pub(super) fn drain_waiting(&mut self) -> Vec<ReloadRequest> {
        self.waiting_since = None;
        std::mem::take(&mut self.waiting)
    }

    /// Returns a file that is being written.
    pub(super) fn file_being_written(&self) -> Option<PathBuf> {
        self.watcher.as_ref().and_then(FileWatcher::being_written)
    }

    // --- retries after a local error ---

    /// Schedules a retry after [`RETRY`].
    pub(super) fn retry_later(&mut self) {
        self.retry_at = Some(clock::now() + RETRY);
    }

    /// Ends the wait of a due retry. Returns whether the file can be opened without a
    /// local error; otherwise schedules another retry.
    pub(super) fn take_retry(&mut self) -> bool {
        self.retry_at = None;
        let can_read = match File::open(&self.path) {
            Ok(_) => true,
            Err(error) => local_errors::local_error_kind(&error).is_none(),
        };
        if !can_read {
            self.retry_later();
        }
        can_read
    }

    /// Cancels the retry.
    pub(super) fn cancel_retry(&mut self) {
        self.retry_at = None;
    }
}

/// Returns the local error whose text is in `message`. Reload problems come from many
/// places as text, so the text is searched for the kernel's error texts.
pub(super) fn local_error(message: &str) -> Option<io::Error> {
    let message = message.to_lowercase();
    // The text of EMFILE is a prefix of the text of ENFILE, so ENFILE comes first.
    let all = [libc::ENFILE, libc::EMFILE, libc::ENOMEM, libc::ENOBUFS, libc::ENOSPC];
    all.into_iter().map(io::Error::from_raw_os_error).find(|error| {
        let text = error.to_string().to_lowercase();
        let text = text.split(" (os error").next().unwrap_or_default();
        message.contains(text)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_errors_are_distinguished_from_bad_files() {
        let errno = |message| local_error(message).and_then(|error| error.raw_os_error());
        assert_eq!(errno("cannot open the file: too many open files"), Some(libc::EMFILE));
        assert_eq!(errno("x: Too many open files in system (os error 23)"), Some(libc::ENFILE));
        assert_eq!(errno("cannot open the file: no such file or directory"), None);
        assert_eq!(errno("unknown key \"pols\" in [frontend.web]"), None);
    }
}
