//! The new process's side: takes what the old one offers, and its place.
//!
//! Called by `start` in the order of the messages. Every step may wait, and does
//! so before anything is served; if any fails, this process ends and the old one
//! goes on. It accepts nothing before it has said that it serves.

use super::message::{
    Commit, FinalCounts, Hello, LEVEL, MessageError, Offer, PROTOCOL, Ready, SavedLatency, Serving,
    UpgradeMessage,
};
use super::reports::{OldProcessOrder, OldProcessReport, ReportWriter};
use crate::Failure;
use crate::binds::BindSockets;
use crate::given_sockets::GivenSockets;
use crate::upgrade::message;
use socket2::Socket;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::model::BindKey;
use tidegate_net::clock;
use tidegate_net::fd_channel::HandoverChannel;
use tokio::sync::{mpsc, oneshot};

/// How long the old process may take for each of its messages; it has them at
/// hand, and kills this one at its own deadline.
const WORD_MAX: Duration = Duration::from_secs(30);

/// Words of the old process that may wait for the control loop.
const WORDS_MAX: usize = 16;

/// How long a farewell may take: the old process is to be gone by its deadline.
const FAREWELL_MAX: Duration = Duration::from_secs(2);

/// How long an old process may drain: it hangs up when it ends, in whatever way,
/// so this only has to be longer than any drain.
pub(super) const DRAIN_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// What this process was given by another of its kind.
#[derive(Debug)]
pub struct OldProcess {
    channel: HandoverChannel,
    stderr: OwnedFd,
    given: GivenSockets,
    counts: Option<OwnedFd>,
    offer: Offer,
}

/// The way to a process that still drains.
#[derive(Debug)]
pub(crate) struct OldProcessLink {
    words: mpsc::Receiver<Word>,
    /// `None` where no thread was available to write them.
    orders: Option<ReportWriter>,
}

/// What a process that drains says.
#[derive(Debug)]
pub(crate) enum Word {
    Report(OldProcessReport),
    /// It ends now, and says nothing more.
    Farewell(Box<Commit>),
}

// === impl OldProcess ===

impl OldProcess {
    /// Greets the old process, if there is one that has started this one, and
    /// takes its offer. To be called before anything reads standard input.
    ///
    /// # Errors
    /// There is one and it is not to be understood.
    pub fn connect() -> Result<Option<OldProcess>, Failure> {
        if std::env::var_os(tidegate_net::fd_channel::MARK).is_none() {
            return Ok(None);
        }
        let channel = HandoverChannel::from_stdin().map_err(|error| handover_error(&error))?;
        send_hello(channel).map(Some).map_err(|error| handover_error(&error))
    }

    /// Its sockets.
    pub(crate) fn take_sockets(&mut self) -> GivenSockets {
        std::mem::take(&mut self.given)
    }

    /// The file of the counts it shares.
    pub(crate) fn take_counts(&mut self) -> Option<OwnedFd> {
        self.counts.take()
    }

    /// Where its admin API listens.
    pub fn admin_listen(&self) -> Option<&str> {
        Some(self.offer.admin.as_ref()?.listen.as_str())
    }

    /// What confines that process, and so this one.
    pub fn confined(&self) -> &[String] {
        &self.offer.confined
    }

    /// What is known, for the first table.
    pub(crate) fn state(&self) -> &tidegate_core::control::handover::Saved {
        &self.offer.state
    }

    /// The number of a configuration with that digest.
    pub(crate) fn generation_of(&self, digest: u64) -> u64 {
        let before = self.offer.state.generation;
        if digest == self.offer.digest { before } else { before.saturating_add(1) }
    }

    /// Says that everything is built, and waits for the word to take over, with
    /// what is known by then.
    pub(crate) fn ready(
        &self,
        not_taken: Vec<BindKey>,
        admin_taken: bool,
        generation: u64,
        shares: bool,
    ) -> Result<Commit, Failure> {
        let ready = Ready { not_taken, admin_taken, generation, shares };
        tracing::debug!(generation, admin_taken, "ready to take over from the old process");
        let deadline = clock::now() + WORD_MAX;
        message::send(&self.channel, &ready, &[], deadline)
            .map_err(|error| handover_error(&error))?;
        let known = || {
            let frame = self.channel.receive(deadline)?;
            message::receive_known(&self.channel, &frame, deadline)
        };
        known().map_err(|error: MessageError| handover_error(&error))
    }

    /// As [`OldProcess::serving`], but in here and without a word.
    #[cfg(any(test, fuzzing))]
    pub(super) fn wait_for_final_counts(
        self,
        deadline: Instant,
    ) -> Result<FinalCounts, MessageError> {
        let frame = self.channel.receive(deadline)?;
        message::receive_known(&self.channel, &frame, deadline)
    }

    /// Says that this process serves from now on, takes over the old one's
    /// standard error, and listens for its farewell.
    pub(crate) fn serving(self) -> Result<OldProcessLink, Failure> {
        let deadline = clock::now() + WORD_MAX;
        message::send(&self.channel, &Serving {}, &[], deadline)
            .map_err(|error| handover_error(&error))?;
        tracing::debug!("this process serves; the old process stops accepting");
        // On failure the log ends with the old process, which is no reason not
        // to serve.
        let _ = rustix::stdio::dup2_stderr(&self.stderr);
        let (tell, words) = mpsc::channel(WORDS_MAX);
        let channel = self.channel;
        let orders = channel.try_clone().and_then(ReportWriter::start).ok();
        // Nobody to be told: this process is ending itself.
        let wait = move || while listen(&channel, &tell).is_some() {};
        let named = std::thread::Builder::new().name("predecessor".to_owned());
        if let Err(error) = named.spawn(wait) {
            tracing::warn!(%error, "cannot receive the final counters of the old process; its last sessions are missing from the totals");
        }
        Ok(OldProcessLink { words, orders })
    }
}

/// Passes one word on; `None` after the last.
fn listen(channel: &HandoverChannel, tell: &mpsc::Sender<Word>) -> Option<()> {
    let frame = channel.receive(clock::now() + DRAIN_MAX).ok()?;
    if frame.kind == OldProcessReport::KIND {
        return tell.blocking_send(Word::Report(message::decode(&frame).ok()?)).ok();
    }
    let deadline = clock::now() + WORD_MAX;
    let FinalCounts(last) = message::receive_known(channel, &frame, deadline).ok()?;
    let _ = tell.blocking_send(Word::Farewell(Box::new(last)));
    None
}

pub(super) fn send_hello(channel: HandoverChannel) -> Result<OldProcess, MessageError> {
    let deadline = clock::now() + WORD_MAX;
    let hello = Hello {
        protocols: (PROTOCOL, PROTOCOL),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        level: LEVEL,
    };
    message::send(&channel, &hello, &[], deadline)?;
    let frame = channel.receive(deadline)?;
    let offer: Offer = message::decode(&frame)?;
    let mut fds = frame.fds.into_iter();
    let lost = |wanted: usize| tidegate_net::fd_channel::ChannelError::LostDescriptors {
        came: wanted.saturating_sub(1),
        wanted,
    };
    let stderr = fds.next().ok_or(lost(1))?;
    let mut given = GivenSockets::default();
    if let Some(admin) = &offer.admin {
        given.admin = Some((admin.clone(), fds.next().ok_or(lost(2))?));
    }
    for bind in &offer.listeners {
        let mut group = BindSockets { sockets: Vec::new(), holder: bind.holder };
        for _ in 0..bind.sockets {
            let fd = fds.next().ok_or(lost(bind.sockets as usize))?;
            group.sockets.push(Arc::new(Socket::from(fd)));
        }
        given.binds.insert(bind.address.clone(), group);
    }
    given.heartbeats = offer.heartbeats.iter().copied().zip(fds.by_ref()).collect();
    let counts = if offer.counts { fds.next() } else { None };
    Ok(OldProcess { channel, stderr, given, counts, offer })
}

fn handover_error(error: &dyn std::fmt::Display) -> Failure {
    Failure::Runtime(format!("cannot take over from the old process: {error}"))
}

// === impl OldProcessLink ===

impl OldProcessLink {
    /// What the old process says next; `None`: it has ended without a farewell.
    pub(crate) async fn next(&mut self) -> Option<Word> {
        self.words.recv().await
    }

    /// Has it do something; gives what tells that the order is sent. A process that does
    /// not read has missed it.
    pub(super) fn order(&self, order: &OldProcessOrder) -> Option<oneshot::Receiver<()>> {
        let sent = self.orders.as_ref()?.send(order);
        if sent.is_none() {
            tracing::warn!("the old process does not read its orders; dropping one");
        }
        sent
    }
}

/// Says farewell to the process that took over.
pub(super) fn send_final_counts(channel: &HandoverChannel, last: Commit) {
    let deadline: Instant = clock::now() + FAREWELL_MAX;
    if let Err(error) = message::send_known(channel, FinalCounts(last), deadline) {
        tracing::warn!(%error, "cannot send the final counters to the new process; its totals miss the last sessions");
    }
}

/// What was recorded, by the names the next process knows.
pub(super) fn saved_latency(
    saved: &tidegate_core::control::handover::Saved,
    find: impl Fn(&str, &str, &str) -> Option<u32>,
    latency: &tidegate_core::metrics::histograms::MergedHistograms,
) -> Vec<SavedLatency> {
    let mut all = Vec::new();
    for pool in &saved.pools {
        for backend in &pool.backends {
            let Some(id) = find(&pool.name, &backend.name, &backend.address) else { continue };
            let series = latency.save(id);
            if series.iter().any(|one| !one.values.is_empty()) {
                all.push(SavedLatency {
                    pool: pool.name.clone(),
                    backend: backend.name.clone(),
                    address: backend.address.clone(),
                    series,
                });
            }
        }
    }
    all
}
