//! The old process's part of an upgrade: starts the new process and hands over to it.
//!
//! Runs on its own thread per upgrade, because every step waits. It reports to the control
//! loop with [`UpgradeProgress`]. If a step fails before *serving*, it kills the new
//! process and reports the reason. This process serves without interruption until then.

use super::message::{Commit, Hello, LEVEL, MessageError, Offer, PROTOCOL, Ready, Serving};
use super::process::{NotStarted, Start, UpgradeProcess};
use crate::upgrade::message;
use socket2::Socket;
use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, PoisonError, mpsc as sync};
use std::time::{Duration, Instant};
use tidegate_net::cells::Memory;
use tidegate_net::clock;
use tidegate_net::fd_channel::{ChannelError, HandoverChannel};
use tidegate_net::signals;
use tokio::sync::{mpsc, oneshot};

/// Last lines kept of the new process's standard error, and bytes kept per line.
const LINES_KEPT: usize = 10;
const LINE_BYTES_MAX: usize = 500;

/// Time for a process that closed the connection to exit and to close its standard error,
/// so that its exit status and last lines can be reported.
const END_MAX: Duration = Duration::from_millis(500);

/// Interval for polling the end of standard error.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Messages to the control loop.
#[derive(Debug)]
pub(crate) enum UpgradeProgress {
    /// The supervisor rejected the start; the reason.
    Refused(String),
    /// The new process waits for *commit*.
    Ready(Box<ReadyProcess>),
    /// The upgrade failed; the reason.
    Failed(String),
}

/// A new process that waits for *commit*.
#[derive(Debug)]
pub(crate) struct ReadyProcess {
    pub(super) hello: Hello,
    pub(super) ready: Ready,
    /// Receives the *commit* message. Dropping it cancels the upgrade.
    pub(super) commit: sync::SyncSender<Commit>,
    /// The result: the new process serves, or the reason of the failure.
    pub(super) served: oneshot::Receiver<Result<HandoverChannel, String>>,
    /// Its exit status, if it exits later and this process is its parent.
    pub(super) ended: oneshot::Receiver<ExitStatus>,
}

/// Input of one upgrade.
#[derive(Debug)]
pub(super) struct UpgradeAttempt {
    pub(super) start: Start,
    pub(super) offered: OfferedState,
    /// Timeout from the start of the program to *serving*.
    pub(super) timeout: Duration,
}

/// The offer with its descriptors.
#[derive(Debug)]
pub(super) struct OfferedState {
    pub(super) offer: Offer,
    pub(super) admin: Option<OwnedFd>,
    /// In the order of the offer.
    pub(super) sockets: Vec<Arc<Socket>>,
    pub(super) heartbeats: Vec<OwnedFd>,
    pub(super) counts: Option<Arc<Memory>>,
    pub(super) helper: Option<OwnedFd>,
}

/// An upgrade in progress.
#[derive(Debug)]
pub(super) struct UpgradeHandle {
    channel: HandoverChannel,
    progress: mpsc::UnboundedReceiver<UpgradeProgress>,
}

/// The last lines of the new process's standard error, which is copied to this process's.
#[derive(Debug, Clone, Default)]
struct StderrTail(Arc<Mutex<StderrTailState>>);

#[derive(Debug, Default)]
struct StderrTailState {
    lines: VecDeque<String>,
    ended: bool,
}

/// Why a step failed.
enum UpgradeStepError {
    Message(MessageError),
    /// The new process's lowest and highest protocol, and its level.
    Protocols((u16, u16), u16),
    Cancelled,
}

// === impl UpgradeHandle ===

impl UpgradeHandle {
    /// Starts the upgrade on its own thread.
    pub(super) fn start(attempt: UpgradeAttempt) -> io::Result<UpgradeHandle> {
        let (channel, other) = HandoverChannel::pair()?;
        let own = channel.try_clone()?;
        let (to_control, progress) = mpsc::unbounded_channel();
        std::thread::Builder::new()
            .name("upgrade".to_owned())
            .spawn(move || run(attempt, own, other, &to_control))?;
        Ok(UpgradeHandle { channel, progress })
    }

    /// Waits for the next message.
    pub(super) async fn next(&mut self) -> UpgradeProgress {
        let ended = || UpgradeProgress::Failed("upgrade thread exited unexpectedly".to_owned());
        self.progress.recv().await.unwrap_or_else(ended)
    }

    /// Cancels the upgrade. The new process is killed.
    pub(super) fn cancel(&self) {
        self.channel.hang_up();
    }
}

fn run(
    attempt: UpgradeAttempt,
    channel: HandoverChannel,
    other: OwnedFd,
    to_control: &mpsc::UnboundedSender<UpgradeProgress>,
) {
    // The new process inherits the mask. No signal can end it before it handles signals.
    signals::block();
    let deadline = clock::now() + attempt.timeout;
    let tail = StderrTail::default();
    let (mut process, stderr) = match attempt.start.start(other) {
        Ok(started) => started,
        Err(not_started) => {
            let _ = to_control.send(not_started.into());
            return;
        }
    };
    tail.follow(stderr);
    // Errors of `to_control` are ignored: this process is exiting then, and the new one
    // exits when the connection closes.
    let (hello, ready) = match until_ready(attempt.offered, &channel, deadline) {
        Ok(ready) => ready,
        Err(error) => {
            let why = explain(&mut process, &tail, error);
            let _ = to_control.send(UpgradeProgress::Failed(why));
            return;
        }
    };
    let (commit, to_send) = sync::sync_channel(1);
    let (tell, served) = oneshot::channel();
    let (tell_end, ended) = oneshot::channel();
    let at = ReadyProcess { hello, ready, commit, served, ended };
    let _ = to_control.send(UpgradeProgress::Ready(Box::new(at)));
    if let Err(error) = until_serving(&channel, &to_send, deadline) {
        let _ = tell.send(Err(explain(&mut process, &tail, error)));
        return;
    }
    let _ = tell.send(Ok(channel));
    process.reap_new_process(tell_end);
}

fn until_ready(
    offered: OfferedState,
    channel: &HandoverChannel,
    deadline: Instant,
) -> Result<(Hello, Ready), UpgradeStepError> {
    let hello: Hello = message::receive(channel, deadline)?;
    tracing::debug!(pid = hello.pid, version = %hello.version, "new process started");
    let (lowest, highest) = hello.protocols;
    if !(lowest..=highest).contains(&PROTOCOL) || hello.level < LEVEL {
        return Err(UpgradeStepError::Protocols(hello.protocols, hello.level));
    }
    let stderr = io::stderr();
    let mut fds: Vec<BorrowedFd<'_>> = vec![stderr.as_fd()];
    fds.extend(offered.admin.iter().map(AsFd::as_fd));
    fds.extend(offered.sockets.iter().map(|socket| socket.as_fd()));
    fds.extend(offered.heartbeats.iter().map(AsFd::as_fd));
    fds.extend(offered.counts.iter().map(|memory| memory.as_fd()));
    fds.extend(offered.helper.iter().map(AsFd::as_fd));
    message::send(channel, &offered.offer, &fds, deadline)?;
    tracing::debug!(descriptors = fds.len(), "sockets and state sent to the new process");
    // The new process and the control loop hold the descriptors from here on.
    drop(offered);
    let ready = message::receive(channel, deadline)?;
    tracing::debug!("new process is ready");
    Ok((hello, ready))
}

fn until_serving(
    channel: &HandoverChannel,
    commit: &sync::Receiver<Commit>,
    deadline: Instant,
) -> Result<(), UpgradeStepError> {
    let commit = commit.recv().map_err(|_| UpgradeStepError::Cancelled)?;
    message::send_known(channel, commit, deadline)?;
    tracing::debug!("state sent; waiting until the new process serves");
    let Serving {} = message::receive(channel, deadline)?;
    Ok(())
}

/// Kills the new process and returns the reason, with its last log lines.
fn explain(process: &mut UpgradeProcess, tail: &StderrTail, error: UpgradeStepError) -> String {
    let hung_up = matches!(
        error,
        UpgradeStepError::Message(MessageError::Channel(
            ChannelError::Closed | ChannelError::Io(_)
        ))
    );
    let status = if hung_up { process.wait(END_MAX) } else { None };
    if status.is_none() {
        process.kill();
    }
    let what = match (error, status) {
        (_, Some(status)) => format!("the new process exited before it was ready: {status}"),
        (UpgradeStepError::Message(MessageError::Channel(ChannelError::TimedOut)), _) => {
            "the new process was not ready within upgrade_timeout".to_owned()
        }
        (UpgradeStepError::Message(MessageError::Channel(ChannelError::Closed)), _) => {
            "the new process closed the handover connection".to_owned()
        }
        (UpgradeStepError::Message(error), _) => {
            format!("unexpected message from the new process: {error}")
        }
        (UpgradeStepError::Protocols((lowest, highest), level), _) => format!(
            "the new process supports upgrade protocols {lowest} to {highest} at level {level}; \
             this process needs {PROTOCOL} at level {LEVEL}"
        ),
        (UpgradeStepError::Cancelled, _) => "upgrade cancelled".to_owned(),
    };
    match tail.last_lines() {
        lines if lines.is_empty() => what,
        lines => format!("{what}; its last log lines:\n{lines}"),
    }
}

// === impl UpgradeProgress ===

impl From<NotStarted> for UpgradeProgress {
    fn from(not_started: NotStarted) -> UpgradeProgress {
        match not_started {
            NotStarted::Refused(why) => UpgradeProgress::Refused(why),
            NotStarted::Failed(why) => UpgradeProgress::Failed(why),
        }
    }
}

// === impl StderrTail ===

impl StderrTail {
    /// Copies and keeps lines until the pipe is closed, on its own thread: other processes
    /// can inherit the pipe from the new process and keep it open.
    fn follow(&self, stderr: io::PipeReader) {
        let tail = self.clone();
        let follow = move || {
            let mut reader = BufReader::new(stderr);
            let mut line = Vec::new();
            while matches!(reader.read_until(b'\n', &mut line), Ok(1..)) {
                // An error means that standard error is closed.
                let _ = io::stderr().write_all(&line);
                tail.keep(&line);
                line.clear();
            }
            tail.state().ended = true;
        };
        let named = std::thread::Builder::new().name("upgrade-stderr".to_owned());
        if named.spawn(follow).is_err() {
            self.state().ended = true;
        }
    }

    fn keep(&self, line: &[u8]) {
        let mut state = self.state();
        if state.lines.len() == LINES_KEPT {
            state.lines.pop_front();
        }
        let text = String::from_utf8_lossy(&line[..line.len().min(LINE_BYTES_MAX)]);
        state.lines.push_back(text.trim_end().to_owned());
    }

    fn last_lines(&self) -> String {
        let deadline = clock::now() + END_MAX;
        while !self.state().ended && clock::now() < deadline {
            clock::pause(POLL_INTERVAL);
        }
        let state = self.state();
        state.lines.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }

    fn state(&self) -> std::sync::MutexGuard<'_, StderrTailState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl UpgradeStepError ===

impl From<MessageError> for UpgradeStepError {
    fn from(error: MessageError) -> UpgradeStepError {
        UpgradeStepError::Message(error)
    }
}
