//! Starts and ends the new process of an upgrade, directly or through the supervisor.
//!
//! Called by `outgoing` on the upgrade thread. Its functions can block.

use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tidegate_net::clock;
use tidegate_net::fd_channel::MARK;
use tidegate_supervisor::link::Successor;
use tidegate_supervisor::program::Program;
use tidegate_supervisor::{Link, SuccessorChanges};
use tokio::sync::oneshot;

/// Environment variables that the new process must not inherit.
const NOT_INHERITED: [&str; 5] =
    ["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID", "WATCHDOG_PID"];

/// Interval for polling the exit of a process.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// What starts the new process.
#[derive(Debug)]
pub(crate) enum Starter {
    /// This process.
    Own(Program),
    /// The supervisor.
    Supervisor(Arc<Link>),
}

/// A prepared start.
#[derive(Debug)]
pub(super) enum Start {
    Own { command: Box<Command>, path: PathBuf },
    Supervisor { link: Arc<Link>, changes: SuccessorChanges, asked_over: Option<Arc<OwnedFd>> },
}

/// A new process.
#[derive(Debug)]
pub(super) enum UpgradeProcess {
    Own(Child),
    Supervised(Successor),
}

/// Why no process was started.
#[derive(Debug)]
pub(super) enum NotStarted {
    /// The supervisor rejected the start.
    Refused(String),
    /// The start failed.
    Failed(String),
}

/// Returns whether a child of this process has exited, reaped or not.
pub(super) fn has_ended(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    pid.is_some_and(|pid| !matches!(waitid(WaitId::Pid(pid), options), Ok(None)))
}

// === impl Starter ===

impl Starter {
    /// Returns `None` if the balancer is embedded in another program.
    pub(crate) fn of(link: Option<&Arc<Link>>, program: Option<Program>) -> Option<Starter> {
        let supervisor = link.map(|link| Starter::Supervisor(Arc::clone(link)));
        supervisor.or(program.map(Starter::Own))
    }

    /// Prepares a start.
    ///
    /// # Errors
    /// The program was not found, or this process is process 1. The supervisor makes its
    /// own checks when it starts the program.
    pub(super) fn prepare(
        &self,
        changes: SuccessorChanges,
        asked_over: Option<Arc<OwnedFd>>,
    ) -> Result<Start, String> {
        Ok(match self {
            Starter::Own(_) if std::process::id() == 1 => {
                return Err(
                    "process 1 cannot be replaced, because its exit ends all other processes; \
                            run without --single or under an init process"
                        .to_owned(),
                );
            }
            Starter::Own(program) => {
                let program =
                    program.with_changes(changes.binary.as_deref(), changes.config.as_deref());
                let command = Box::new(program.command()?);
                Start::Own { command, path: program.path()? }
            }
            Starter::Supervisor(link) => {
                Start::Supervisor { link: Arc::clone(link), changes, asked_over }
            }
        })
    }
}

// === impl Start ===

impl Start {
    /// Starts the process with `channel` as its standard input. Returns it and its standard
    /// error.
    pub(super) fn start(
        self,
        channel: OwnedFd,
    ) -> Result<(UpgradeProcess, io::PipeReader), NotStarted> {
        let failed = |error: io::Error| NotStarted::Failed(error.to_string());
        let (reader, writer) = io::pipe().map_err(failed)?;
        let process = match self {
            Start::Own { mut command, path } => {
                for name in NOT_INHERITED {
                    command.env_remove(name);
                }
                // Passed as standard input, because any other descriptor would have to be
                // inheritable, and every other child would inherit it too.
                let started = command
                    .env(MARK, super::message::PROTOCOL.to_string())
                    .stdin(Stdio::from(channel))
                    .stderr(Stdio::from(writer))
                    .spawn();
                UpgradeProcess::Own(started.map_err(|error| {
                    NotStarted::Failed(format!("cannot start {}: {error}", path.display()))
                })?)
            }
            Start::Supervisor { link, changes, asked_over } => {
                let started = link.start(&channel, &writer.into(), changes, asked_over.as_deref());
                UpgradeProcess::Supervised(
                    started.map_err(|error| NotStarted::Refused(error.to_string()))?,
                )
            }
        };
        Ok((process, reader))
    }
}

// === impl UpgradeProcess ===

impl UpgradeProcess {
    /// Waits up to `limit` for the exit status.
    pub(super) fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let child = match self {
            UpgradeProcess::Own(child) => child,
            UpgradeProcess::Supervised(process) => return process.wait(limit),
        };
        let deadline = clock::now() + limit;
        loop {
            match child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if clock::now() < deadline => clock::pause(POLL_INTERVAL),
                _ => return None,
            }
        }
    }

    /// Kills the process.
    pub(super) fn kill(&mut self) {
        match self {
            UpgradeProcess::Own(child) => {
                // Both fail only if the process has exited.
                let _ = child.kill();
                let _ = child.wait();
            }
            UpgradeProcess::Supervised(process) => process.kill(),
        }
    }

    /// Waits for the exit of a child and sends its status. The supervisor reports the exit
    /// of a supervised process to the control loop itself.
    pub(super) fn reap_new_process(self, tell: oneshot::Sender<ExitStatus>) {
        if let UpgradeProcess::Own(mut child) = self
            && let Ok(status) = child.wait()
        {
            tracing::error!(%status, "the new process exited before this process finished draining");
            let _ = tell.send(status);
        }
    }
}
