//! What goes between the two processes after the new one serves: how many
//! sessions the old one still has, and what it is to do with them.
//!
//! Used by the upgrade on both sides. The old process sends a [`OldProcessReport`] of what
//! has changed (of what both count in the same memory: whether there are any) at most every [`REPORT_INTERVAL`], and passes on what the process
//! before it reports; the new one sends an [`OldProcessOrder`] now and then. Frames are
//! written by a thread of their own, so that a process that does not read holds
//! up nobody. Neither side needs them: without them, the old process's sessions are unknown
//! until its farewell.

use super::message::UpgradeMessage;
use crate::upgrade::message;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tidegate_core::balance::in_flight::InFlight;
use tidegate_core::control::Controller;
use tidegate_core::control::sessions_elsewhere::{HeldBackend, HeldFrontend};
use tidegate_core::table::state::{BackendId, BackendState, FrontendId};
use tidegate_net::clock;
use tidegate_net::fd_channel::HandoverChannel;
use tokio::sync::oneshot;

/// How long the counts of the old process may be behind.
pub(super) const REPORT_INTERVAL: Duration = Duration::from_millis(100);

/// Backends in one report: some 400 KB. Further ones are in the next.
const REPORT_BACKENDS_MAX: usize = 4_096;

/// Frames that wait for a process that does not read; while there are so many,
/// reports wait and orders are dropped.
const FRAMES_MAX: usize = 64;

/// How long one frame may take.
const FRAME_MAX: Duration = Duration::from_secs(5);

/// *So many sessions are left*: what has changed since the last report.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct OldProcessReport {
    pub(super) backends: Vec<HeldBackend>,
    pub(super) frontends: Vec<HeldFrontend>,
    /// All of them.
    pub(super) sessions: u32,
}

/// *Do this*: what is set.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct OldProcessOrder {
    /// Reset that backend's sessions: its removal grace is over.
    pub(super) cut: Option<HeldBackend>,
    /// An operator's word on a backend.
    pub(super) intent: Option<OrderedIntent>,
    /// End within so many milliseconds.
    pub(super) end_within_ms: Option<u64>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct OrderedIntent {
    pub(super) pool: String,
    pub(super) backend: String,
    /// Its name.
    pub(super) intent: String,
}

/// Sends frames from a thread of its own.
#[derive(Debug)]
pub(super) struct ReportWriter {
    frames: SyncSender<ReportFrame>,
    thread: JoinHandle<()>,
}

#[derive(Debug)]
struct ReportFrame {
    kind: u16,
    body: Vec<u8>,
    /// Told once the kernel has it: from then on the receiver gets it, even if this
    /// process ends. Dropped where the receiver is gone.
    sent: oneshot::Sender<()>,
}

/// What the next process has been told.
#[derive(Debug)]
pub(super) struct Reporter {
    writer: ReportWriter,
    backends: HashMap<BackendId, u32>,
    frontends: HashMap<FrontendId, u32>,
    sessions: u32,
    /// The next process counts where this one counts.
    shares: bool,
    next: Instant,
}

// === impl ReportWriter ===

impl ReportWriter {
    pub(super) fn start(channel: HandoverChannel) -> std::io::Result<ReportWriter> {
        let (frames, waiting) = mpsc::sync_channel::<ReportFrame>(FRAMES_MAX);
        let write = move || {
            while let Ok(ReportFrame { kind, body, sent }) = waiting.recv() {
                if channel.send(kind, &body, &[], clock::now() + FRAME_MAX).is_err() {
                    // The other process is gone, and nothing is left to be told.
                    return;
                }
                let _ = sent.send(());
            }
        };
        let thread = std::thread::Builder::new().name("upgrade-words".to_owned()).spawn(write)?;
        Ok(ReportWriter { frames, thread })
    }

    /// What tells that it is sent; `None` where the other process does not read at the
    /// moment.
    pub(super) fn send<M: UpgradeMessage>(&self, message: &M) -> Option<oneshot::Receiver<()>> {
        let (sent, told) = oneshot::channel();
        let frame = ReportFrame { kind: M::KIND, body: message::encode(message), sent };
        let is_full = matches!(self.frames.try_send(frame), Err(TrySendError::Full(_)));
        (!is_full).then_some(told)
    }

    /// Waits until everything is sent.
    fn finish(self) {
        drop(self.frames);
        // It catches its own errors.
        let _ = self.thread.join();
    }
}

// === impl Reporter ===

impl Reporter {
    /// `shares`: the next process counts where this one counts.
    pub(super) fn start(channel: HandoverChannel, shares: bool) -> std::io::Result<Reporter> {
        Ok(Reporter {
            writer: ReportWriter::start(channel)?,
            backends: HashMap::new(),
            frontends: HashMap::new(),
            sessions: 0,
            shares,
            next: clock::now(),
        })
    }

    /// Tells what has changed, where it is time to.
    pub(super) fn report(&mut self, controller: &Controller, sessions: u32, now: Instant) {
        if now < self.next {
            return;
        }
        self.next = now + REPORT_INTERVAL;
        let mut report = OldProcessReport { sessions, ..OldProcessReport::default() };
        let (mut backends, mut frontends) = (Vec::new(), Vec::new());
        for state in controller.every_known() {
            let (open, shared) = self.to_tell(&state.in_flight);
            let told = self.backends.get(&state.id).copied().unwrap_or(0);
            if open == told {
                continue;
            }
            if backends.len() == REPORT_BACKENDS_MAX {
                // The next one goes on from here.
                self.next = now;
                break;
            }
            backends.push((state.id, open));
            report.backends.push(HeldBackend { sessions: open, shared, ..held(state) });
        }
        for state in controller.frontends() {
            let (open, shared) = self.to_tell(&state.in_flight);
            if open != self.frontends.get(&state.id).copied().unwrap_or(0) {
                frontends.push((state.id, open));
                let name = state.name.to_string();
                report.frontends.push(HeldFrontend { name, sessions: open, shared });
            }
        }
        let news = sessions != self.sessions || !backends.is_empty() || !frontends.is_empty();
        if news && self.writer.send(&report).is_some() {
            self.sessions = sessions;
            note(&mut self.backends, backends);
            note(&mut self.frontends, frontends);
        }
    }

    /// Sessions, or only whether there are any, where the next process sees how many.
    fn to_tell(&self, in_flight: &InFlight) -> (u32, bool) {
        let shared = self.shares && in_flight.is_shareable();
        let open = in_flight.get();
        (if shared { open.min(1) } else { open }, shared)
    }

    /// Waits until everything is sent.
    pub(super) fn finish(self) {
        self.writer.finish();
    }
}

/// A backend by its names.
pub(super) fn held(state: &BackendState) -> HeldBackend {
    HeldBackend {
        pool: state.pool.to_string(),
        name: state.name.to_string(),
        address: state.address_text.to_string(),
        ..HeldBackend::default()
    }
}

fn note<K: Eq + std::hash::Hash>(told: &mut HashMap<K, u32>, news: Vec<(K, u32)>) {
    for (who, open) in news {
        match open {
            0 => told.remove(&who),
            open => told.insert(who, open),
        };
    }
}
