//! The runner of the probe helper: one thread that starts, kills and reaps commands.
//!
//! Called by `process`. It ends when the other end of its socket is closed, and kills the commands
//! that still run. It runs only commands that the configuration file has.

use super::COMMANDS_RUNNING_MAX;
use super::message::{HelperReply, HelperRequest, NoMessage, RunCommand, VERSION};
use super::named_commands::NamedCommands;
use super::running::{RunningCommand, answer, is_cancelled};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{WaitId, WaitIdOptions, waitid};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};
use tidegate_net::packets::{Packet, Packets};
use tidegate_net::{children, clock};

/// How often processes are reaped that a command has left behind.
const ORPHANS_INTERVAL: Duration = Duration::from_secs(1);

/// Requests that are taken in one turn.
const TURN_MAX: usize = 64;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct CommandRunner {
    requests: Packets,
    named: NamedCommands,
    running: Vec<RunningCommand>,
    /// Processes that commands leave behind become children of this process.
    adopts: bool,
}

// === impl CommandRunner ===

impl CommandRunner {
    pub(super) fn new(requests: Packets, config: &Path, adopts: bool) -> CommandRunner {
        CommandRunner { requests, named: NamedCommands::of(config), running: Vec::new(), adopts }
    }

    /// Runs commands until the other end of the socket is closed.
    ///
    /// # Errors
    /// Waiting fails, which is not expected.
    pub(super) fn run(mut self) -> io::Result<()> {
        loop {
            self.wait()?;
            let now = clock::now();
            self.running.retain_mut(|command| !command.turn(now));
            if !self.take_requests(now) {
                return Ok(());
            }
            self.reap_orphans();
        }
    }

    fn is_full(&self) -> bool {
        self.running.len() >= COMMANDS_RUNNING_MAX
    }

    fn wait(&self) -> io::Result<()> {
        // At the cap, requests wait in the socket. Its end is still noticed.
        let wanted = if self.is_full() { PollFlags::empty() } else { PollFlags::IN };
        let requests = PollFd::new(&self.requests, wanted);
        let commands = self.running.iter().flat_map(RunningCommand::sources);
        let mut fds: Vec<PollFd<'_>> = std::iter::once(requests).chain(commands).collect();
        let deadline = self.running.iter().filter_map(RunningCommand::deadline).min();
        let orphans = self.has_orphans().then_some(ORPHANS_INTERVAL);
        let left = deadline.map(|at| at.saturating_duration_since(clock::now()));
        let timeout = left.into_iter().chain(orphans).min().map(|time| Timespec {
            tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: time.subsec_nanos().into(),
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes waiting requests. Returns false if the other end is closed.
    fn take_requests(&mut self, now: Instant) -> bool {
        for _ in 0..TURN_MAX {
            if self.is_full() {
                return !self.is_closed();
            }
            match self.requests.try_receive() {
                Ok(Some(packet)) => self.take(packet, now),
                Ok(None) => return false,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                // A message without its descriptor: the request gets no reply.
                Err(_) => {}
            }
        }
        true
    }

    fn is_closed(&self) -> bool {
        let mut fds = [PollFd::new(&self.requests, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok()
            && fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }

    fn take(&mut self, Packet { bytes, fds }: Packet, now: Instant) {
        let pipe = fds.into_iter().next();
        match (HelperRequest::decode(&bytes), pipe) {
            (Ok(HelperRequest::Run(run)), Some(pipe)) => self.start(&run, pipe, now),
            (Ok(HelperRequest::Reread), _) => self.named.reread(),
            (Err(NoMessage::Version(_)), Some(pipe)) => {
                answer(&pipe, &HelperReply::Version(VERSION));
            }
            _ => {}
        }
    }

    fn start(&mut self, run: &RunCommand, pipe: OwnedFd, now: Instant) {
        if is_cancelled(&pipe) {
            return;
        }
        match self.named.words(run, now) {
            Ok(words) => self.running.extend(RunningCommand::start(run, &words, pipe, now)),
            Err(why) => answer(&pipe, &HelperReply::Rejected { why }),
        }
    }

    /// Whether this process has children that are no running commands.
    fn has_orphans(&self) -> bool {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        self.adopts && waitid(WaitId::All, options).is_ok()
    }

    /// Reaps ended processes that commands have left behind.
    fn reap_orphans(&self) {
        while self.adopts
            && let Some(pid) = children::ended_child()
        {
            // A running command is reaped in its turn, after its group was killed.
            if self.running.iter().any(|command| command.pid() == pid) {
                return;
            }
            let _ = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
        }
    }
}
