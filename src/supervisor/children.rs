//! The processes the supervisor starts: how it starts them, and what it knows of each.
//!
//! Owned by `parent`, which decides.

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

/// How long a child that does not read its messages may hold the supervisor up. It has a
/// thread for that.
const PATIENCE: Duration = Duration::from_secs(2);

/// What one child is at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// It is the service.
    Main,
    /// Started at the word of that process, to take its place.
    Successor(Pid),
    /// Its successor is the service, for less than a second.
    SteppingDown,
    /// It drains.
    Leaving,
}

/// Sockets kept under a name.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) name: String,
    pub(super) sockets: Vec<OwnedFd>,
}

/// One process.
#[derive(Debug)]
pub(super) struct Child {
    pub(super) pid: Pid,
    pub(super) role: Role,
    /// It has served.
    pub(super) ready: bool,
    /// Which program it is, and with which arguments.
    pub(super) program: Program,
    /// The file of that program, where this process has started it.
    pub(super) file: Option<FileId>,
    /// Its own sockets.
    pub(super) held: Vec<Held>,
    /// Those it was started with; kept until it has its own.
    pub(super) given: Vec<Held>,
    /// `None` once it is closed.
    pub(super) link: Option<Packets>,
}

/// Standard input and standard error of a successor.
#[derive(Debug)]
pub(super) struct ChildPipes {
    pub(super) channel: OwnedFd,
    pub(super) stderr: OwnedFd,
}

// === impl Child ===

impl Child {
    /// Starts one.
    pub(super) fn start(
        program: &Program,
        role: Role,
        pipes: Option<ChildPipes>,
    ) -> io::Result<Child> {
        let (link, other) = Packets::pair(PATIENCE)?;
        let mut command = program.command().map_err(io::Error::other)?;
        prepare(&mut command, pipes);
        // There is one thread: no other child can get it meanwhile.
        fcntl_setfd(&other, FdFlags::empty())?;
        command.env(link::MARK, other.as_fd().as_raw_fd().to_string());
        let file = FileId::of(Path::new(command.get_program())).ok();
        let pid = spawn(&mut command)?;
        Ok(Child { file, ..Child::of(pid, role, program.clone(), Some(link)) })
    }

    /// One that runs.
    pub(super) fn of(pid: Pid, role: Role, program: Program, link: Option<Packets>) -> Child {
        let (held, given) = (Vec::new(), Vec::new());
        Child { pid, role, ready: false, program, file: None, held, given, link }
    }

    /// Has it begin with `given` and the stores.
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
            // It has ended, or does not read what it waits for.
            self.signal(rustix::process::Signal::KILL);
        }
    }

    pub(super) fn tell(&self, order: &SupervisorOrder) -> bool {
        self.link.as_ref().is_some_and(|link| link.try_send(&order.encode()).is_ok())
    }

    /// A process that has ended is not reaped yet, so that the number is its own.
    pub(super) fn signal(&self, signal: rustix::process::Signal) {
        let _ = tidegate_net::signals::send(self.pid, signal);
    }

    pub(super) fn hold(&mut self, name: String, sockets: Vec<OwnedFd>) {
        match self.held.iter_mut().find(|held| held.name == name) {
            Some(held) => held.sockets.extend(sockets),
            None => self.held.push(Held { name, sockets }),
        }
    }

    /// How many there are kept of it.
    pub(super) fn sockets(&self) -> usize {
        self.held.iter().chain(&self.given).map(|held| held.sockets.len()).sum()
    }

    /// What another process is to go on with.
    pub(super) fn take_sockets(&mut self) -> Vec<Held> {
        let began = self.ready || self.given.is_empty();
        std::mem::take(if began { &mut self.held } else { &mut self.given })
    }
}

/// Starts it; it is reaped with all others.
pub(super) fn spawn(command: &mut Command) -> io::Result<Pid> {
    let pid = i32::try_from(command.spawn()?.id()).ok().and_then(Pid::from_raw);
    pid.ok_or_else(|| io::Error::other("the new process has no process ID"))
}

/// What every process that the supervisor starts has, and has not.
pub(super) fn prepare(command: &mut Command, pipes: Option<ChildPipes>) {
    // A signal of the terminal reaches the supervisor alone, which passes it on once.
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

/// Whether root, or the user this process runs as, is at the other end of that
/// connection; no child of this process is.
///
/// It separates a process that serves as another user. One of the same user passes it by
/// a process that it forks, and could do whatever that user can in other ways as well.
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
