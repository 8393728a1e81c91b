//! The new process's part of an upgrade: takes over sockets and state.
//!
//! Called by `start` in the order of the messages. If a step fails, this process exits and
//! the old process continues to serve. This process accepts no connection before it has
//! sent *serving*.

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
use tidegate_net::fd_channel::{ChannelError, HandoverChannel};
use tokio::sync::{mpsc, oneshot};

/// Timeout for each message of the old process. The old process kills this process at its
/// own timeout.
const MESSAGE_MAX: Duration = Duration::from_secs(30);

/// Cap on messages of the old process that wait for the control loop.
const MESSAGES_MAX: usize = 16;

/// Timeout for sending the final counts: the old process must exit by its drain timeout.
const FINAL_COUNTS_MAX: Duration = Duration::from_secs(2);

/// Timeout for messages during a drain. It is longer than any drain, because the
/// connection closes when the other process exits.
pub(super) const DRAIN_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// The connection to the old process, with the sockets and the offer received from it.
#[derive(Debug)]
pub struct OldProcess {
    channel: HandoverChannel,
    stderr: OwnedFd,
    given: GivenSockets,
    counts: Option<OwnedFd>,
    helper: Option<OwnedFd>,
    offer: Offer,
}

/// The connection to an old process that drains.
#[derive(Debug)]
pub(crate) struct OldProcessLink {
    messages: mpsc::Receiver<OldProcessMessage>,
    /// `None` if its thread could not be started.
    orders: Option<ReportWriter>,
}

/// A message of an old process that drains.
#[derive(Debug)]
pub(crate) enum OldProcessMessage {
    Report(OldProcessReport),
    /// The last message: the process exits.
    FinalCounts(Box<Commit>),
}

// === impl OldProcess ===

impl OldProcess {
    /// Sends *hello* to the old process and receives its offer. Returns `None` if no old
    /// process started this one. Must be called before any code reads standard input.
    ///
    /// # Errors
    /// The exchange with the old process failed.
    pub fn connect() -> Result<Option<OldProcess>, Failure> {
        if std::env::var_os(tidegate_net::fd_channel::MARK).is_none() {
            return Ok(None);
        }
        let channel = HandoverChannel::from_stdin().map_err(|error| handover_error(&error))?;
        send_hello(channel).map(Some).map_err(|error| handover_error(&error))
    }

    /// Returns the sockets of the old process.
    pub(crate) fn take_sockets(&mut self) -> GivenSockets {
        std::mem::take(&mut self.given)
    }

    /// Returns the file of the shared counts.
    pub(crate) fn take_counts(&mut self) -> Option<OwnedFd> {
        self.counts.take()
    }

    /// Takes the socket of the probe helper.
    pub fn take_helper(&mut self) -> Option<OwnedFd> {
        self.helper.take()
    }

    /// Returns the admin address of the old process.
    pub fn admin_listen(&self) -> Option<&str> {
        Some(self.offer.admin.as_ref()?.listen.as_str())
    }

    /// Returns the sandbox layers of the old process, which this process has inherited.
    pub fn confined(&self) -> &[String] {
        &self.offer.confined
    }

    /// Returns the state for the first table.
    pub(crate) fn state(&self) -> &tidegate_core::control::handover::Saved {
        &self.offer.state
    }

    /// Returns the generation of a configuration with this digest: that of the old process
    /// if the digest is the same, else the next.
    pub(crate) fn generation_of(&self, digest: u64) -> u64 {
        let before = self.offer.state.generation;
        if digest == self.offer.digest { before } else { before.saturating_add(1) }
    }

    /// Sends *ready* and waits for *commit*, which contains the state of the old process.
    pub(crate) fn ready(
        &self,
        not_taken: Vec<BindKey>,
        admin_taken: bool,
        generation: u64,
        shares: bool,
    ) -> Result<Commit, Failure> {
        let ready = Ready { not_taken, admin_taken, generation, shares };
        tracing::debug!(generation, admin_taken, "ready to take over from the old process");
        let deadline = clock::now() + MESSAGE_MAX;
        message::send(&self.channel, &ready, &[], deadline)
            .map_err(|error| handover_error(&error))?;
        let known = || {
            let frame = self.channel.receive(deadline)?;
            message::receive_known(&self.channel, &frame, deadline)
        };
        known().map_err(|error: MessageError| handover_error(&error))
    }

    /// Receives the final counts without sending *serving* and without a thread.
    #[cfg(any(test, fuzzing))]
    pub(super) fn wait_for_final_counts(
        self,
        deadline: Instant,
    ) -> Result<FinalCounts, MessageError> {
        let frame = self.channel.receive(deadline)?;
        message::receive_known(&self.channel, &frame, deadline)
    }

    /// Sends *serving*, takes over the standard error of the old process, and starts to
    /// receive its reports and final counts.
    pub(crate) fn serving(self) -> Result<OldProcessLink, Failure> {
        let deadline = clock::now() + MESSAGE_MAX;
        message::send(&self.channel, &Serving {}, &[], deadline)
            .map_err(|error| handover_error(&error))?;
        tracing::debug!("this process serves; the old process stops accepting");
        // If this fails, the log ends when the old process exits. Serving matters more.
        let _ = rustix::stdio::dup2_stderr(&self.stderr);
        let (tell, messages) = mpsc::channel(MESSAGES_MAX);
        let channel = self.channel;
        let orders = channel.try_clone().and_then(ReportWriter::start).ok();
        let wait = move || while forward_message(&channel, &tell).is_some() {};
        let named = std::thread::Builder::new().name("old-process".to_owned());
        if let Err(error) = named.spawn(wait) {
            tracing::warn!(%error, "cannot receive the final counters of the old process; its last sessions are missing from the totals");
        }
        Ok(OldProcessLink { messages, orders })
    }
}

/// Receives one message and forwards it. Returns `None` after the final counts, or if
/// either process is exiting.
fn forward_message(
    channel: &HandoverChannel,
    tell: &mpsc::Sender<OldProcessMessage>,
) -> Option<()> {
    let frame = channel.receive(clock::now() + DRAIN_MAX).ok()?;
    if frame.kind == OldProcessReport::KIND {
        return tell.blocking_send(OldProcessMessage::Report(message::decode(&frame).ok()?)).ok();
    }
    let deadline = clock::now() + MESSAGE_MAX;
    let FinalCounts(last) = message::receive_known(channel, &frame, deadline).ok()?;
    let _ = tell.blocking_send(OldProcessMessage::FinalCounts(Box::new(last)));
    None
}

pub(super) fn send_hello(channel: HandoverChannel) -> Result<OldProcess, MessageError> {
    let deadline = clock::now() + MESSAGE_MAX;
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
    let lost = |announced: usize| tidegate_net::fd_channel::ChannelError::LostDescriptors {
        received: announced.saturating_sub(1),
        announced,
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
    let helper = if offer.helper { fds.next() } else { None };
    Ok(OldProcess { channel, stderr, given, counts, helper, offer })
}

fn handover_error(error: &dyn std::fmt::Display) -> Failure {
    Failure::Runtime(format!("cannot take over from the old process: {error}"))
}

// === impl OldProcessLink ===

impl OldProcessLink {
    /// Waits for the next message. `None`: the old process has exited without final counts.
    pub(crate) async fn next(&mut self) -> Option<OldProcessMessage> {
        self.messages.recv().await
    }

    /// Sends an order. The returned receiver completes once the kernel has the order.
    /// Drops the order and returns `None` if the old process does not read.
    pub(super) fn order(&self, order: &OldProcessOrder) -> Option<oneshot::Receiver<()>> {
        let sent = self.orders.as_ref()?.send(order);
        if sent.is_none() {
            tracing::warn!("the old process does not read its orders; dropping one");
        }
        sent
    }
}

/// Sends the final counts to the new process.
pub(super) fn send_final_counts(channel: &HandoverChannel, last: Commit) {
    let deadline: Instant = clock::now() + FINAL_COUNTS_MAX;
    let sent = message::send_known(channel, FinalCounts(last), deadline);
    if let Err(MessageError::Channel(ChannelError::Closed)) = sent {
        // The totals ended with the new process.
        tracing::debug!("new process has exited; the final counters are not needed");
    } else if let Err(error) = sent {
        tracing::warn!(%error, "cannot send the final counters to the new process; its totals miss the last sessions");
    }
}

/// Returns the recorded histograms by pool, backend and address.
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
