//! The balancer's end of the probe helper: sends requests and waits for replies.
//!
//! Called by probes of kind `exec` on the control thread. It bounds how many commands run. Every
//! failure of the helper is a local error of the probe.

use super::message::{HelperReply, HelperRequest, NoMessage, REPLY_BYTES_MAX, RunCommand};
use super::process::HelperSocket;
use super::{COMMAND_WAIT_MAX, COMMANDS_RUNNING_MAX};
use crate::event_log::{EventLog, NewEvent};
use rustix::pipe::{PipeFlags, pipe_with};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tidegate_api::names::EventLevelName;
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::model::CommandSubject;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::{Semaphore, SemaphorePermit};

/// Time that the helper has for the reply after the timeout of a command.
const REPLY_GRACE: Duration = Duration::from_secs(1);

/// Without a helper.
const ABSENT: &str = "no probe helper runs; probe_helper = true takes effect with `tidegate \
                      upgrade`, with --single at a restart";

/// What to do if the helper has ended.
const GONE: &str = "run `tidegate upgrade`, with --single restart Tidegate";

/// The probe helper of this process, if it has one. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct ProbeHelper(Arc<HelperState>);

#[derive(Debug)]
struct HelperState {
    socket: Option<Mutex<HelperSocket>>,
    slots: Semaphore,
    /// The helper has answered the last request, or no request was sent.
    answers: AtomicBool,
    /// Counters of the control thread.
    counters: Arc<WorkerCounters>,
    events: EventLog,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum CommandResult {
    /// It exited with this code, and with this first line of output.
    Exited(i32, Vec<u8>),
    /// A signal ended it.
    Signalled(i32),
    /// It was killed at its timeout.
    TimedOut(Vec<u8>),
    /// It was not examined: an errno or 0, and the reason.
    NotRun(i32, String),
}

// === impl ProbeHelper ===

impl ProbeHelper {
    pub(crate) fn new(
        socket: Option<HelperSocket>,
        counters: Arc<WorkerCounters>,
        events: EventLog,
    ) -> ProbeHelper {
        ProbeHelper(Arc::new(HelperState {
            socket: socket.map(Mutex::new),
            slots: Semaphore::new(COMMANDS_RUNNING_MAX),
            answers: AtomicBool::new(true),
            counters,
            events,
        }))
    }

    /// Returns whether the helper has ended and not answered since.
    pub(crate) fn has_ended(&self) -> bool {
        !self.0.answers.load(Ordering::Relaxed)
    }

    /// Tells the helper that this process has applied its configuration file.
    pub(crate) fn reread(&self) {
        if let Some(bytes) = HelperRequest::Reread.encode()
            && self.0.socket.is_some()
            && let Err(error) = self.0.send(&bytes, None)
        {
            self.0.is_gone(&error);
        }
    }

    /// Returns a copy of the socket for the new process of an upgrade.
    ///
    /// # Errors
    /// Out of descriptors.
    pub(crate) fn share(&self) -> io::Result<Option<OwnedFd>> {
        let socket = self.0.socket.as_ref();
        socket.map(|socket| lock(socket).share()).transpose()
    }

    /// Runs a command. Dropping the future kills the command.
    pub(crate) async fn run(
        &self,
        subject: CommandSubject,
        command: &[String],
        timeout: Duration,
    ) -> CommandResult {
        let not_run = |why: String| CommandResult::NotRun(0, why);
        if self.0.socket.is_none() {
            return not_run(ABSENT.to_owned());
        }
        let _slot = match self.slot().await {
            Ok(slot) => slot,
            Err(why) => return not_run(why),
        };
        let run = RunCommand { timeout, subject, command: command.to_vec() };
        let Some(request) = HelperRequest::Run(run).encode() else {
            return not_run("the command is too long".to_owned());
        };
        let reply = match self.0.ask(&request) {
            Ok(pipe) => pipe,
            Err(result) => return result,
        };
        match tokio::time::timeout(timeout + REPLY_GRACE, received(reply)).await {
            Ok(Ok(bytes)) => self.0.result_of(&bytes),
            Ok(Err(error)) => {
                not_run(format!("cannot read the reply of the probe helper: {error}"))
            }
            Err(_) => not_run("the probe helper does not answer in time".to_owned()),
        }
    }

    /// Waits for a slot, at most [`COMMAND_WAIT_MAX`].
    async fn slot(&self) -> Result<SemaphorePermit<'_>, String> {
        if let Ok(slot) = self.0.slots.try_acquire() {
            return Ok(slot);
        }
        self.0.counters.commands_waited.add(1);
        let slot = tokio::time::timeout(COMMAND_WAIT_MAX, self.0.slots.acquire()).await;
        slot.ok().and_then(Result::ok).ok_or_else(|| {
            let waited = humantime::format_duration(COMMAND_WAIT_MAX);
            format!("not examined: {COMMANDS_RUNNING_MAX} other commands ran for {waited}")
        })
    }
}

// === impl HelperState ===

impl HelperState {
    /// Sends a request to run a command. Returns the pipe for the reply.
    fn ask(&self, request: &[u8]) -> Result<Receiver, CommandResult> {
        let not_run = |error: &io::Error| {
            let errno = error.raw_os_error().unwrap_or_default();
            CommandResult::NotRun(errno, format!("cannot ask the probe helper: {error}"))
        };
        let pipe = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(io::Error::from);
        let (reader, writer) = pipe.map_err(|error| not_run(&error))?;
        let reader = Receiver::from_owned_fd(reader).map_err(|error| not_run(&error))?;
        self.send(request, Some(&writer)).map_err(|error| {
            match error.kind() {
                // The socket is full: the helper is stopped, or it waits for its commands.
                io::ErrorKind::WouldBlock => {
                    CommandResult::NotRun(0, "the probe helper does not read its requests".into())
                }
                _ => {
                    self.is_gone(&error);
                    CommandResult::NotRun(0, format!("the probe helper has ended; {GONE}"))
                }
            }
        })?;
        Ok(reader)
    }

    fn send(&self, bytes: &[u8], pipe: Option<&OwnedFd>) -> io::Result<()> {
        let Some(socket) = &self.socket else { return Ok(()) };
        let fds: Vec<_> = pipe.iter().map(|pipe| pipe.as_fd()).collect();
        lock(socket).send(bytes, &fds)
    }

    fn result_of(&self, bytes: &[u8]) -> CommandResult {
        let result = match HelperReply::decode(bytes) {
            Ok(HelperReply::Exited { code, line }) => CommandResult::Exited(code, line),
            Ok(HelperReply::Signalled { signal, .. }) => CommandResult::Signalled(signal),
            Ok(HelperReply::TimedOut { line }) => CommandResult::TimedOut(line),
            Ok(HelperReply::NotStarted { errno, why }) => CommandResult::NotRun(errno, why),
            Ok(HelperReply::Rejected { why }) => CommandResult::NotRun(0, why),
            Ok(HelperReply::Version(version)) | Err(NoMessage::Version(version)) => {
                let why =
                    format!("the probe helper has version {version} of its messages; restart");
                CommandResult::NotRun(0, why)
            }
            Err(NoMessage::Malformed) => {
                self.has_failed();
                let why = "the probe helper ended before its reply; another one starts within 1 s";
                return CommandResult::NotRun(0, why.to_owned());
            }
        };
        if !self.answers.swap(true, Ordering::Relaxed) {
            tracing::info!("probe helper answers again");
        }
        result
    }

    /// Notes that the runner has ended without a reply. The keeper starts another one.
    fn has_failed(&self) {
        if self.answers.swap(false, Ordering::Relaxed) {
            tracing::warn!("probe helper ended unexpectedly; another one starts within 1 s");
            self.note("probe helper ended unexpectedly; another one starts within 1 s");
        }
    }

    /// Notes that no process has the other end of the socket.
    fn is_gone(&self, error: &io::Error) {
        if error.kind() == io::ErrorKind::WouldBlock {
            return;
        }
        if let Some(socket) = &self.socket {
            lock(socket).reap();
        }
        if self.answers.swap(false, Ordering::Relaxed) {
            tracing::error!(%error, help = GONE, "probe helper has ended; exec probes do not run");
            self.note(&format!("probe helper has ended; exec probes do not run: {GONE}"));
        }
    }

    fn note(&self, text: &str) {
        self.counters.helper_failures.add(1);
        self.events.record(NewEvent::of_process(EventLevelName::Bad, text.to_owned()));
    }
}

async fn received(pipe: Receiver) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(REPLY_BYTES_MAX);
    pipe.take(REPLY_BYTES_MAX as u64).read_to_end(&mut bytes).await?;
    Ok(bytes)
}

fn lock(socket: &Mutex<HelperSocket>) -> std::sync::MutexGuard<'_, HelperSocket> {
    socket.lock().unwrap_or_else(PoisonError::into_inner)
}
