//! The configuration file: what is in force of it, when it has to be read again, and the
//! requests that wait for that.
//!
//! Owned by the control loop; `reload` reads the file and puts it in force. A request
//! waits until the file and the files that it names are written to their end: the
//! watcher says when that is so, at once where nothing is being written. One that has
//! waited for [`HELD_MAX`] is refused, and the file is read by itself once it is
//! complete.

use super::due;
use super::session_cap::SessionCap;
use crate::admin::{ReloadCounts, ReloadDoc, ReloadError};
use crate::config_watch::ConfigWatcher;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::model::Config;
use tidegate_dataplane::local_errors;
use tidegate_net::clock;
use tokio::sync::{Notify, oneshot};

/// How long a request for a reload waits for a writer of the file.
pub(super) const HELD_MAX: Duration = Duration::from_secs(6);

/// Requests that wait at once; the next is answered by reading the file as it is.
const ASKED_MAX: usize = 64;

/// How soon a reload that a local error has put off is tried again: well within the
/// second in which everything is to be back.
const RETRY: Duration = Duration::from_millis(500);

/// Who gets the result of a reload; `None` is a signal, which gets no answer.
pub(super) type RequestReply = Option<oneshot::Sender<Result<ReloadDoc, ReloadError>>>;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct ConfigReloads {
    path: PathBuf,
    digest: u64,
    /// What cannot change without a restart is as it was in this one.
    started_with: Arc<Config>,
    config: Arc<Config>,
    session_cap: SessionCap,
    restart_needed: Vec<String>,
    counts: ReloadCounts,
    /// `None` until the loop runs, or where the file cannot be watched.
    watcher: Option<ConfigWatcher>,
    /// The watcher has something to say.
    changed: Arc<Notify>,
    waiting: Vec<RequestReply>,
    /// Since when the first of them waits.
    waiting_since: Option<Instant>,
    /// When a changed file is read that could not be read for a local error.
    retry_at: Option<Instant>,
}

/// What there is to do.
#[derive(Debug)]
pub(super) enum ReloadEvent {
    /// The file is complete, and has changed or is asked for.
    FileComplete,
    /// A reload that was asked for has waited too long for the file.
    AskedTooLong,
    /// A reload that was put off is due.
    Retry,
}

// === impl ConfigReloads ===

impl ConfigReloads {
    /// Starts with `config`, read from `path`.
    pub(super) fn new(path: PathBuf, digest: u64, config: Arc<Config>, descriptors: u64) -> Self {
        ConfigReloads {
            path,
            digest,
            started_with: Arc::clone(&config),
            config,
            session_cap: SessionCap::new(descriptors),
            restart_needed: Vec::new(),
            counts: ReloadCounts::default(),
            watcher: None,
            changed: Arc::default(),
            waiting: Vec::new(),
            waiting_since: None,
            retry_at: None,
        }
    }

    /// What there is to do next.
    pub(super) async fn wake(&mut self) -> ReloadEvent {
        let held_until = self.waiting_since.map(|since| since + HELD_MAX);
        tokio::select! {
            () = self.changed.notified() => ReloadEvent::FileComplete,
            () = due::reached(held_until) => ReloadEvent::AskedTooLong,
            () = due::reached(self.retry_at) => ReloadEvent::Retry,
        }
    }

    /// Watches the file from now on.
    pub(super) fn watch(&mut self) {
        let notify = Arc::clone(&self.changed);
        match ConfigWatcher::start(&self.path, move || notify.notify_one()) {
            Ok(watcher) => self.watcher = Some(watcher),
            Err(error) => {
                tracing::warn!(%error, "cannot watch the configuration file; reload with SIGHUP or tidegate reload");
            }
        }
        self.watch_named_files();
    }

    /// Waits for writers of the files that the configuration names, too.
    fn watch_named_files(&self) {
        if let Some(watcher) = &self.watcher {
            watcher.wait_for_writers_of(self.config.named_files());
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// XXH3 of the file in force.
    pub(super) fn digest(&self) -> u64 {
        self.digest
    }

    /// The configuration in force, as the file has it.
    pub(super) fn config(&self) -> &Arc<Config> {
        &self.config
    }

    /// What this process was started with.
    pub(super) fn started_with(&self) -> &Arc<Config> {
        &self.started_with
    }

    /// The configuration in force, with no more sessions than the limit on descriptors
    /// allows beside so many `listeners`.
    pub(super) fn within_limits(&mut self, listeners: usize) -> Arc<Config> {
        self.session_cap.apply(&self.config, listeners)
    }

    /// What status and reload answers warn of.
    pub(super) fn warnings(&self) -> Vec<String> {
        self.restart_needed.clone()
    }

    pub(super) fn counts(&self) -> ReloadCounts {
        self.counts
    }

    /// Counts on from the process before.
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
    }

    /// Counts a reload that was refused before it began.
    pub(super) fn count_refused(&mut self) {
        self.counts.refused += 1;
    }

    /// A file with the same content is in force, in other words.
    pub(super) fn set_digest(&mut self, digest: u64) {
        self.digest = digest;
    }

    /// `config` is in force from now on; `restart_needed` names what is not.
    pub(super) fn adopt(&mut self, config: Arc<Config>, digest: u64, restart_needed: Vec<String>) {
        (self.config, self.digest, self.restart_needed) = (config, digest, restart_needed);
        self.watch_named_files();
    }

    // --- requests that wait for the file ---

    /// Has a request wait until the file is complete; gives it back where it cannot
    /// wait.
    pub(super) fn hold(&mut self, reply: RequestReply) -> Option<RequestReply> {
        match &self.watcher {
            Some(watcher) if self.waiting.len() < ASKED_MAX => {
                self.waiting.push(reply);
                self.waiting_since.get_or_insert(clock::now());
                watcher.ask();
                None
            }
            _ => Some(reply),
        }
    }

    /// The requests that have waited; `None` where the file is being written again and
    /// they wait on.
    pub(super) fn take_waiting(&mut self) -> Option<Vec<RequestReply>> {
        let held_until = self.waiting_since.map(|since| since + HELD_MAX);
        // A writer that has begun since then is waited for in turn.
        if self.writer().is_some() && held_until.is_none_or(|until| clock::now() < until) {
            if let (Some(_), Some(watcher)) = (self.waiting_since, &self.watcher) {
                watcher.ask();
            }
            return None;
        }
        Some(self.drop_waiting())
    }

    /// The requests that have waited, to be refused.
    pub(super) fn drop_waiting(&mut self) -> Vec<RequestReply> {
        self.waiting_since = None;
        std::mem::take(&mut self.waiting)
    }

    /// A file that is being written.
    pub(super) fn writer(&self) -> Option<PathBuf> {
        self.watcher.as_ref().and_then(ConfigWatcher::being_written)
    }

    // --- a reload that a local error has put off ---

    /// Reads the file again a little later.
    pub(super) fn retry_later(&mut self) {
        self.retry_at = Some(clock::now() + RETRY);
    }

    /// A reload that was put off is due: whether it can be done now, as far as opening
    /// the file shows. Where it cannot, it stays put off.
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

    /// It is not to be done any more.
    pub(super) fn drop_retry(&mut self) {
        self.retry_at = None;
    }
}

/// The local error that a refusal speaks of, by the kernel's words for it: what comes
/// from many places comes as text.
pub(super) fn local_error(message: &str) -> Option<io::Error> {
    let message = message.to_lowercase();
    // One's words begin with another's: the longer first.
    let all = [libc::ENFILE, libc::EMFILE, libc::ENOMEM, libc::ENOBUFS, libc::ENOSPC];
    all.into_iter().map(io::Error::from_raw_os_error).find(|error| {
        let text = error.to_string().to_lowercase();
        let words = text.split(" (os error").next().unwrap_or_default();
        message.contains(words)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_local_error_is_told_from_a_bad_file() {
        let errno = |message| local_error(message).and_then(|error| error.raw_os_error());
        assert_eq!(errno("cannot open the file: too many open files"), Some(libc::EMFILE));
        assert_eq!(errno("x: Too many open files in system (os error 23)"), Some(libc::ENFILE));
        assert_eq!(errno("cannot open the file: no such file or directory"), None);
        assert_eq!(errno("unknown key \"pols\" in [frontend.web]"), None);
    }
}
