//! Reports and orders: the messages between both processes after *serving*.
//!
//! Used by the old and the new process. Frames are written by a separate thread, so a
//! process that does not read never delays the control loop of the other. Both are
//! optional: without them, the sessions of the old process are unknown until its final
//! counts.
//!
//! - The old process sends an [`OldProcessReport`] with changed session counts, at most
//!   every [`REPORT_INTERVAL`]. It includes the reports of its own old process. For counts
//!   in shared memory it reports only whether there are sessions.
//! - The new process sends an [`OldProcessOrder`] when the old process must act.

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

/// Minimum time between two reports.
pub(super) const REPORT_INTERVAL: Duration = Duration::from_millis(100);

/// Cap on backends in one report, about 400 KB. The next report has the others.
const REPORT_BACKENDS_MAX: usize = 4_096;

/// Cap on frames that wait to be sent. At the cap, reports are postponed and orders are
/// dropped.
const FRAMES_MAX: usize = 64;

/// Timeout for sending one frame.
const FRAME_MAX: Duration = Duration::from_secs(5);

/// *report*: session counts that have changed since the last report.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct OldProcessReport {
    pub(super) backends: Vec<HeldBackend>,
    pub(super) frontends: Vec<HeldFrontend>,
    /// All open sessions.
    pub(super) sessions: u32,
}

/// *order*: the old process executes every field that is set.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct OldProcessOrder {
    /// Reset the sessions of this backend.
    pub(super) cut: Option<HeldBackend>,
    /// Name of the cause.
    pub(super) cut_cause: String,
    /// Set an operator's intent.
    pub(super) intent: Option<OrderedIntent>,
    /// Exit within this time.
    pub(super) end_within_ms: Option<u64>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct OrderedIntent {
    pub(super) pool: String,
    pub(super) backend: String,
    /// Name of the intent.
    pub(super) intent: String,
}

/// Sends frames from its own thread.
#[derive(Debug)]
pub(super) struct ReportWriter {
    frames: SyncSender<ReportFrame>,
    thread: JoinHandle<()>,
}

#[derive(Debug)]
struct ReportFrame {
    kind: u16,
    body: Vec<u8>,
    /// Completes once the kernel has the frame: the other process receives it even if this
    /// process exits. Dropped if the other process has exited.
    sent: oneshot::Sender<()>,
}

/// Sends reports and remembers the counts that the new process has received.
#[derive(Debug)]
pub(super) struct Reporter {
    writer: ReportWriter,
    backends: HashMap<BackendId, u32>,
    frontends: HashMap<FrontendId, u32>,
    sessions: u32,
    /// The new process shares counts with this process.
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
                    // The other process has exited or does not read.
                    return;
                }
                let _ = sent.send(());
            }
        };
        let thread = std::thread::Builder::new().name("upgrade-frames".to_owned()).spawn(write)?;
        Ok(ReportWriter { frames, thread })
    }

    /// Queues a message. The returned receiver completes once it is sent. Returns `None` if
    /// the queue is full because the other process does not read.
    pub(super) fn send<M: UpgradeMessage>(&self, message: &M) -> Option<oneshot::Receiver<()>> {
        let (sent, confirmed) = oneshot::channel();
        let frame = ReportFrame { kind: M::KIND, body: message::encode(message), sent };
        let is_full = matches!(self.frames.try_send(frame), Err(TrySendError::Full(_)));
        (!is_full).then_some(confirmed)
    }

    /// Waits until everything is sent.
    fn finish(self) {
        drop(self.frames);
        // The thread handles its errors.
        let _ = self.thread.join();
    }
}

// === impl Reporter ===

impl Reporter {
    /// `shares`: whether the new process shares counts with this process.
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

    /// Sends the changed counts, if a report is due.
    pub(super) fn report(&mut self, controller: &Controller, sessions: u32, now: Instant) {
        if now < self.next {
            return;
        }
        self.next = now + REPORT_INTERVAL;
        let mut report = OldProcessReport { sessions, ..OldProcessReport::default() };
        let (mut backends, mut frontends) = (Vec::new(), Vec::new());
        for state in controller.every_known() {
            let (open, shared) = self.to_report(&state.in_flight);
            let reported = self.backends.get(&state.id).copied().unwrap_or(0);
            if open == reported {
                continue;
            }
            if backends.len() == REPORT_BACKENDS_MAX {
                // The next report continues with the remaining backends.
                self.next = now;
                break;
            }
            backends.push((state.id, open));
            report.backends.push(HeldBackend { sessions: open, shared, ..held(state) });
        }
        for state in controller.frontends() {
            let (open, shared) = self.to_report(&state.in_flight);
            if open != self.frontends.get(&state.id).copied().unwrap_or(0) {
                frontends.push((state.id, open));
                let name = state.name.to_string();
                report.frontends.push(HeldFrontend { name, sessions: open, shared });
            }
        }
        let changed = sessions != self.sessions || !backends.is_empty() || !frontends.is_empty();
        if changed && self.writer.send(&report).is_some() {
            self.sessions = sessions;
            note(&mut self.backends, backends);
            note(&mut self.frontends, frontends);
        }
    }

    /// Returns the number to report: all sessions, or 0 or 1 if the new process sees the
    /// number in shared memory.
    fn to_report(&self, in_flight: &InFlight) -> (u32, bool) {
        let shared = self.shares && in_flight.is_shareable();
        let open = in_flight.get();
        (if shared { open.min(1) } else { open }, shared)
    }

    /// Waits until everything is sent.
    pub(super) fn finish(self) {
        self.writer.finish();
    }
}

/// Returns a report entry with the names of a backend.
pub(super) fn held(state: &BackendState) -> HeldBackend {
    HeldBackend {
        pool: state.pool.to_string(),
        name: state.name.to_string(),
        address: state.address_text.to_string(),
        ..HeldBackend::default()
    }
}

fn note<K: Eq + std::hash::Hash>(reported: &mut HashMap<K, u32>, changes: Vec<(K, u32)>) {
    for (key, open) in changes {
        match open {
            0 => reported.remove(&key),
            open => reported.insert(key, open),
        };
    }
}
