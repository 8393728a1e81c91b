//! The child processes of the supervisor: their start and the state of each.
//!
//! Used by `parent`, which decides when to start and stop them. It never waits for a
//! child, except for a full message buffer, at most [`SEND_TIMEOUT`].

use super::message::SupervisorOrder;
use super::program::Program;
use super::reexec::FileId;
use super::{link, manager, store};
use crate::reexec;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::Pid;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use tidegate_net::fd_channel;
use tidegate_net::packets::{FDS_MAX, Packets};

/// Longest wait to send to a child that does not read its messages. Children read them on
/// a separate thread.
const SEND_TIMEOUT: Duration = Duration::from_secs(2);

/// The role of a child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// It provides the service.
    Main,
    /// The main process with this ID has requested it, as its replacement.
    Successor(Pid),
    /// The new process has provided the service for less than a second.
    SteppingDown,
    /// It drains.
    Leaving,
}

/// Sockets that the supervisor holds under a name.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) name: String,
    pub(super) sockets: Vec<OwnedFd>,
}

/// A child process.
#[derive(Debug)]
pub(super) struct Child {
    pub(super) pid: Pid,
    pub(super) role: Role,
    /// It has reported that it serves.
    pub(super) ready: bool,
    /// Its program and arguments.
    pub(super) program: Program,
    /// The file of the program, if this process has started the child.
    pub(super) file: Option<FileId>,
    /// Copies of its sockets.
    pub(super) held: Vec<Held>,
    /// The sockets that it was started with, until it reports that it serves.
    pub(super) given: Vec<Held>,
    /// `None` after the link was closed.
    pub(super) link: Option<Packets>,
}

/// Standard input and standard error of a new process.
#[derive(Debug)]
pub(super) struct ChildPipes {
    pub(super) channel: OwnedFd,
    pub(super) stderr: OwnedFd,
}

// === impl Child ===

impl Child {
    /// Starts a child.
    pub(super) fn start(
        program: &Program,
        role: Role,
        pipes: Option<ChildPipes>,
    ) -> io::Result<Child> {
        let (link, other) = Packets::pair(SEND_TIMEOUT)?;
        let mut command = program.command().map_err(io::Error::other)?;
        prepare(&mut command, pipes);
        // The supervisor has one thread, so no other child can inherit the descriptor.
        fcntl_setfd(&other, FdFlags::empty())?;
        command.env(link::MARK, other.as_fd().as_raw_fd().to_string());
        let file = FileId::of(Path::new(command.get_program())).ok();
        let pid = spawn(&mut command)?;
        Ok(Child { file, ..Child::of(pid, role, program.clone(), Some(link)) })
    }

    /// Makes the state of a child that already runs.
    pub(super) fn of(pid: Pid, role: Role, program: Program, link: Option<Packets>) -> Child {
        let (held, given) = (Vec::new(), Vec::new());
        Child { pid, role, ready: false, program, file: None, held, given, link }
    }

    /// Sends the child the sockets in `given`, the stores and the order to begin.
    pub(super) fn begin(
        &mut self,
        given: Vec<Held>,
        stores: &[OwnedFd],
        attempt: u8,
        before: &str,
    ) {
        self.given = given;
        let Some(link) = &self.link else { return };
        let order = SupervisorOrder::Begin(attempt, before.to_owned()).encode();
        let sent = self
            .given
            .iter()
            .flat_map(|held| held.sockets.chunks(FDS_MAX).map(move |some| (held, some)))
            .try_for_each(|(held, some)| {
                link.send(
                    &SupervisorOrder::Held(held.name.clone()).encode(),
                    &store::borrowed(some),
                )
            })
            .and_then(|()| link.send(&order, &store::borrowed(stores)));
        if sent.is_err() {
            // The child has ended, or it does not read its messages.
            self.signal(rustix::process::Signal::KILL);
        }
    }

    /// Sends an order without waiting. Returns whether it was sent.
    pub(super) fn tell(&self, order: &SupervisorOrder) -> bool {
        self.link.as_ref().is_some_and(|link| link.try_send(&order.encode()).is_ok())
    }

    /// Sends a signal to the child. An ended child is not reaped yet, so no other process
    /// has its process ID.
    pub(super) fn signal(&self, signal: rustix::process::Signal) {
        let _ = tidegate_net::signals::send(self.pid, signal);
    }

    pub(super) fn hold(&mut self, name: String, sockets: Vec<OwnedFd>) {
        match self.held.iter_mut().find(|held| held.name == name) {
            Some(held) => held.sockets.extend(sockets),
            None => self.held.push(Held { name, sockets }),
        }
    }

    /// Returns the number of sockets that the supervisor holds for the child.
    pub(super) fn sockets(&self) -> usize {
        self.held.iter().chain(&self.given).map(|held| held.sockets.len()).sum()
    }

    /// Takes the sockets for a process that replaces this child.
    pub(super) fn take_sockets(&mut self) -> Vec<Held> {
        let began = self.ready || self.given.is_empty();
        std::mem::take(if began { &mut self.held } else { &mut self.given })
    }
}

/// Starts a process. The loop of `parent` reaps it.
pub(super) fn spawn(command: &mut Command) -> io::Result<Pid> {
    let pid = i32::try_from(command.spawn()?.id()).ok().and_then(Pid::from_raw);
    pid.ok_or_else(|| io::Error::other("the new process has no process ID"))
}

/// Sets the process group, environment and pipes of a process that the supervisor starts.
pub(super) fn prepare(command: &mut Command, pipes: Option<ChildPipes>) {
    // In a separate group, the child gets no signal of the terminal. The supervisor passes
    // each signal on once.
    command.process_group(0);
    for name in ["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID"] {
        command.env_remove(name);
    }
    command.env_remove(manager::NOTIFY_SOCKET).env_remove(manager::WATCHDOG_PID);
    command.env_remove(reexec::MARK);
    if manager::watchdog().is_none() {
        command.env_remove(manager::WATCHDOG_USEC);
    }
    match pipes {
        None => command.env_remove(fd_channel::MARK),
        Some(ChildPipes { channel, stderr }) => command
            .env(fd_channel::MARK, "1")
            .stdin(Stdio::from(channel))
            .stderr(Stdio::from(stderr)),
    };
}

/// Checks that the peer of the connection is root or the user of the supervisor, and no
/// child of the supervisor.
///
/// It stops a serving process that runs as another user. A serving process of the same
/// user can evade the check with a process that it forks. It gains nothing, because it
/// already has all rights of that user.
pub(super) fn permitted(asked_over: &OwnedFd, children: &[Child]) -> Result<(), String> {
    let peer = getsockopt(asked_over, PeerCredentials).map_err(|error| {
        format!("the supervisor cannot read the user of the requester: {error}")
    })?;
    let own = rustix::process::geteuid().as_raw();
    let is_child = children.iter().any(|child| child.pid.as_raw_nonzero().get() == peer.pid());
    if is_child || !(peer.uid() == 0 || peer.uid() == own) {
        let uid = peer.uid();
        return Err(format!(
            "only root and the user of the supervisor can start another binary or \
             configuration; the request is from user {uid}"
        ));
    }
    Ok(())
}
