//! The two processes of the probe helper: how they start, and the keeper.
//!
//! `sandbox` starts the keeper, and `cli` runs both. The helper keeps the user of the balancer and
//! gives up everything else: capabilities, inherited descriptors and the right to gain privileges.

use super::runner::CommandRunner;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tidegate_net::packets::Packets;
use tidegate_net::privileges::{self, CapabilitySet};
use tidegate_net::{children, clock, fd_channel, signals};

/// The file of this program, also after it was replaced.
const PROGRAM: &str = "/proc/self/exe";

/// First message of a keeper that has given up its rights. Any other text says why it has not.
const STARTED: &str = "started";

/// Time for the first message.
const START_SECONDS_MAX: i64 = 10;

/// Pause before the keeper starts another runner.
const RESTART_PAUSE: Duration = Duration::from_secs(1);

/// The balancer never waits for space in the socket.
const SEND_TIMEOUT: Duration = Duration::from_millis(1);

/// Which process of the helper this one is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HelperRole {
    /// It starts the runner.
    Keeper,
    /// It runs the commands.
    Runner,
}

/// The balancer's end of the socket.
#[derive(Debug)]
pub(crate) struct HelperSocket {
    requests: Packets,
    /// `None` if another process has started it.
    keeper: Option<Child>,
}

/// Runs a process of the helper until the balancer ends. Its standard input is the socket.
///
/// # Errors
/// The process has no socket, or the kernel rejects a step.
pub fn run_helper(role: HelperRole, config: &Path) -> io::Result<()> {
    let requests = fd_channel::take_stdin()?;
    let prepared = give_up_rights(&requests);
    let requests = Packets::from(requests);
    if role == HelperRole::Keeper {
        let text = prepared.as_ref().map_or_else(ToString::to_string, |()| STARTED.to_owned());
        requests.try_send(text.as_bytes())?;
    }
    prepared?;
    match role {
        HelperRole::Keeper => keep(&requests, config),
        HelperRole::Runner => {
            children::adopt_orphans()?;
            CommandRunner::new(requests, config, true).run()
        }
    }
}

fn give_up_rights(requests: &OwnedFd) -> io::Result<()> {
    // A signal to the whole control group must not end the probes of a balancer that drains. The
    // end of the socket ends this process.
    signals::outlive()?;
    // Listening sockets in a helper would keep clients waiting after the balancer has ended.
    children::keep_only(requests)?;
    privileges::set_no_new_privs()?;
    privileges::reduce(CapabilitySet::empty())?;
    privileges::hide_memory()
}

fn keep(requests: &Packets, config: &Path) -> io::Result<()> {
    loop {
        let socket = requests.as_fd().try_clone_to_owned()?;
        let status = command(HelperRole::Runner, config).stdin(Stdio::from(socket)).status();
        if status.is_ok_and(|status| status.success()) {
            return Ok(());
        }
        clock::pause(RESTART_PAUSE);
    }
}

fn command(role: HelperRole, config: &Path) -> Command {
    let mut command = Command::new(PROGRAM);
    command
        .arg0("tidegate")
        .args(["run", "--probe-helper", role.word(), "--config"])
        .arg(config)
        .env_clear()
        .stdout(Stdio::null())
        // In an upgrade, standard error is a pipe to the old process.
        .stderr(Stdio::null());
    command
}

// === impl HelperRole ===

impl HelperRole {
    /// Returns the role with this name in a command line.
    pub fn named(word: &str) -> Option<HelperRole> {
        [HelperRole::Keeper, HelperRole::Runner].into_iter().find(|role| role.word() == word)
    }

    fn word(self) -> &'static str {
        match self {
            HelperRole::Keeper => "keeper",
            HelperRole::Runner => "runner",
        }
    }
}

// === impl HelperSocket ===

impl HelperSocket {
    /// Starts a helper for this configuration file, and waits until it has given up its rights.
    ///
    /// # Errors
    /// Out of descriptors or processes, `/proc` is not mounted, or the helper cannot give up its
    /// rights.
    pub(crate) fn start(config: &Path) -> io::Result<HelperSocket> {
        let (requests, other) = Packets::pair(SEND_TIMEOUT)?;
        // A group of its own, so that signals of a terminal do not reach it.
        let keeper = command(HelperRole::Keeper, config)
            .process_group(0)
            .stdin(Stdio::from(OwnedFd::from(other)))
            .spawn()?;
        let socket = HelperSocket { requests, keeper: Some(keeper) };
        match socket.first_message()? {
            Some(text) if text == STARTED => Ok(socket),
            text => {
                let ended = || "it ended at its start".to_owned();
                Err(io::Error::other(text.unwrap_or_else(ended)))
            }
        }
    }

    fn first_message(&self) -> io::Result<Option<String>> {
        let timeout = Timespec { tv_sec: START_SECONDS_MAX, tv_nsec: 0 };
        let mut fds = [PollFd::new(&self.requests, PollFlags::IN)];
        if poll(&mut fds, Some(&timeout))? == 0 {
            let why = format!("it was not ready within {START_SECONDS_MAX} s");
            return Err(io::Error::new(io::ErrorKind::TimedOut, why));
        }
        let packet = self.requests.try_receive()?;
        Ok(packet.map(|packet| String::from_utf8_lossy(&packet.bytes).into_owned()))
    }

    /// Takes the socket of a helper that the old process of an upgrade uses.
    pub(crate) fn inherited(socket: OwnedFd) -> HelperSocket {
        HelperSocket { requests: Packets::from(socket), keeper: None }
    }

    /// Sends a message without waiting.
    pub(super) fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.requests.try_send_with(bytes, fds)
    }

    /// Reaps the keeper if it has ended.
    pub(super) fn reap(&mut self) {
        if let Some(keeper) = &mut self.keeper {
            // An error means that it is no child any more.
            let _ = keeper.try_wait();
        }
    }

    /// Returns a copy of the socket for the new process of an upgrade.
    pub(crate) fn share(&self) -> io::Result<OwnedFd> {
        self.requests.as_fd().try_clone_to_owned()
    }
}
