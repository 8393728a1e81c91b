//! Reloads that an operator asks for: each waits until the configuration file
//! and the files that it names are written to their end.
//!
//! Called by the control loop. The watcher says when that is so, at once where
//! nothing is being written; a request that has waited for [`HELD_MAX`] is
//! refused, and the file is read by itself once it is complete.

use super::control_loop::Control;
use crate::admin::{ReloadDoc, ReloadError};
use std::time::{Duration, Instant};
use tidegate_net::clock;
use tokio::sync::oneshot;

/// How long a request for a reload waits for a writer of the file.
const HELD_MAX: Duration = Duration::from_secs(6);

/// Requests that wait at once; the next is answered by reading the file as it is.
const ASKED_MAX: usize = 64;

type RequestReply = oneshot::Sender<Result<ReloadDoc, ReloadError>>;

/// Requests that wait for the file; `None` is a signal, which gets no answer.
#[derive(Debug, Default)]
pub(super) struct Asked {
    waiting: Vec<Option<RequestReply>>,
    since: Option<Instant>,
}

impl Asked {
    /// When the first of them is refused.
    pub(super) fn due(&self) -> Option<Instant> {
        self.since.map(|since| since + HELD_MAX)
    }

    fn take(&mut self) -> Vec<Option<RequestReply>> {
        self.since = None;
        std::mem::take(&mut self.waiting)
    }
}

impl Control {
    /// SIGHUP: the same as a request, without an answer.
    pub(super) async fn reload_by_signal(&mut self) {
        if !self.drains_instead("SIGHUP") && !self.upgrades.postpones_reload() {
            self.ask_for_reload(None).await;
        }
    }

    /// Reloads on request, as soon as the file is complete.
    pub(super) async fn ask_for_reload(&mut self, reply: Option<RequestReply>) {
        match &self.watcher {
            Some(watcher) if self.draining.is_none() && self.asked.waiting.len() < ASKED_MAX => {
                self.asked.waiting.push(reply);
                self.asked.since.get_or_insert(clock::now());
                watcher.ask();
            }
            _ => self.reload_for(vec![reply]).await,
        }
    }

    /// The file is complete: reads it for the requests that have waited, or because
    /// it has changed.
    pub(super) async fn file_is_complete(&mut self) {
        // A writer that has begun since then is waited for in turn.
        let writer = self.watcher.as_ref().and_then(|watcher| watcher.being_written());
        if writer.is_some() && self.asked.due().is_none_or(|due| clock::now() < due) {
            if let (Some(_), Some(watcher)) = (self.asked.since, &self.watcher) {
                watcher.ask();
            }
            return;
        }
        let waiting = self.asked.take();
        if waiting.iter().any(Option::is_some) {
            return self.reload_for(waiting).await;
        }
        self.reload_asked_by("a change of the file").await;
    }

    async fn reload_for(&mut self, waiting: Vec<Option<RequestReply>>) {
        let result = self.reload_on_request().await;
        for reply in waiting.into_iter().flatten() {
            // A client that has left needs no answer.
            let _ = reply.send(result.clone());
        }
    }

    /// Refuses what has waited too long for a writer of the file.
    pub(super) fn refuse_asked(&mut self) {
        let writer = self.watcher.as_ref().and_then(|watcher| watcher.being_written());
        let file = writer.unwrap_or_else(|| self.path.clone());
        let why = format!(
            "{} is still being written; nothing was changed; Tidegate reads it once its writer has closed it",
            file.display()
        );
        tracing::error!(held_for = ?HELD_MAX, "reload refused: {why}");
        let refused = self.refuse(why);
        self.reloads.refused += 1;
        self.notifier.reloading();
        self.notifier.ready();
        for reply in self.asked.take().into_iter().flatten() {
            let _ = reply.send(Err(refused.clone()));
        }
    }
}
