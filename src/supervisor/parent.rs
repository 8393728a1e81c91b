//! The loop of the supervisor: handles messages and signals, reaps and starts processes.
//!
//! Called by `cli::run` while the process has one thread. It logs its own errors (`log`);
//! the serving process logs everything else. It never exits because of an error of a
//! child, except after [`FAILED_STARTS_MAX`] failed starts.

use super::children::{Child, ChildPipes, Held, Role, permitted};
use super::manager::{Manager, ServiceNotice};
use super::message::{ChildReport, SuccessorChanges, SupervisorOrder};
use super::pid_file::PidFile;
use super::program::Program;
use super::reexec::Renewal;
use super::{log, store};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, wait};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tidegate_net::clock;
use tidegate_net::fd_channel::FDS_MAX;
use tidegate_net::limits;
use tidegate_net::packets::Packet;
use tidegate_net::signals::{SignalQueue, Taken};

/// Starts in a row that may fail before the supervisor exits.
const FAILED_STARTS_MAX: u8 = 5;

/// Pause before the second start in a row. It doubles before each further start.
const PAUSE: Duration = Duration::from_millis(100);

/// Time between attempts to write the PID file.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);

/// Most messages of a child per turn of the loop.
const TURN_MAX: usize = 256;

/// Exit code of a runtime failure.
const FAILED: u8 = 3;

/// The state of the supervisor.
#[derive(Debug)]
pub(super) struct Parent {
    /// The program of the next process.
    pub(super) program: Program,
    signals: SignalQueue,
    manager: Manager,
    /// The service manager was notified that the service is ready.
    pub(super) told_ready: bool,
    pub(super) stores: Vec<OwnedFd>,
    pub(super) children: Vec<Child>,
    /// Sockets of a process that has ended, for the next process.
    pub(super) kept: Vec<Held>,
    /// How the previous process ended, for the log of the next.
    before: String,
    /// Failed starts in a row.
    failed_starts: u8,
    pub(super) start_at: Option<Instant>,
    pub(super) served: bool,
    /// The service is shutting down.
    pub(super) stopping: bool,
    /// Signals that were passed on during an upgrade. They are repeated to the new main
    /// process, because the old one may have ignored them.
    repeat: Vec<Signal>,
    /// The exit code, after all children have ended.
    pub(super) exit: Option<u8>,
    pub(super) pid_file: Option<PidFile>,
    /// The program of an upgrade, while this process may have to execute it.
    pub(super) renewal: Option<Renewal>,
}

/// Runs the service until it ends. Returns the exit code.
///
/// `activated` are sockets that a service manager has passed.
///
/// # Errors
/// The signal queue or a memory file cannot be made, or waiting fails.
pub fn run(
    program: Program,
    pid_file: Option<PathBuf>,
    activated: Vec<(String, OwnedFd)>,
) -> io::Result<u8> {
    limits::raise_descriptor_limit();
    let mut stores = Vec::new();
    store::complete(&mut stores)?;
    let mut parent = Parent::new(program, stores)?;
    let kept = activated.into_iter().map(|(name, fd)| Held { name, sockets: vec![fd] });
    parent.kept = kept.collect();
    parent.start_at = Some(clock::now());
    parent.pid_file = pid_file.map(|path| PidFile::at(path, false));
    parent.run()
}

impl Parent {
    /// Makes the state of a service without a process.
    pub(super) fn new(program: Program, stores: Vec<OwnedFd>) -> io::Result<Parent> {
        log::install();
        Ok(Parent {
            program,
            signals: SignalQueue::open()?,
            manager: Manager::from_environment(),
            told_ready: false,
            stores,
            children: Vec::new(),
            kept: Vec::new(),
            before: String::new(),
            failed_starts: 0,
            start_at: None,
            served: false,
            stopping: false,
            repeat: Vec::new(),
            exit: None,
            pid_file: None,
            renewal: None,
        })
    }

    /// Runs the loop until the service ends.
    pub(super) fn run(mut self) -> io::Result<u8> {
        loop {
            self.start_if_due();
            if let (Some(code), true) = (self.exit, self.children.is_empty()) {
                return Ok(code);
            }
            self.renew();
            self.wait()?;
            for at in 0..self.children.len() {
                self.take_messages(at);
            }
            while let Some(taken) = self.signals.take()? {
                if let Taken::Signal(signal) = taken {
                    self.pass_on(signal);
                }
            }
            self.reap();
            if let (true, Some(file)) = (self.served, &mut self.pid_file) {
                file.write();
            }
        }
    }

    // --- waiting ---

    fn wait(&self) -> io::Result<()> {
        let links = self.children.iter().filter_map(|child| child.link.as_ref());
        let fds = std::iter::once(self.signals.as_fd()).chain(links.map(AsFd::as_fd));
        let mut fds: Vec<PollFd<'_>> =
            fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        let times = self.start_at.into_iter().chain(self.renewal.as_ref().and_then(Renewal::due));
        let times = times.map(|at| at.saturating_duration_since(clock::now()));
        let unwritten = self.pid_file.as_ref().is_some_and(|file| !file.is_written());
        let retry = (self.served && unwritten).then_some(RETRY_INTERVAL);
        let timeout = times.chain(retry).min().map(|time| Timespec {
            tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: time.subsec_nanos().into(),
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn main(&self) -> Option<&Child> {
        self.children.iter().find(|child| child.role == Role::Main)
    }

    fn of(&mut self, role: impl Fn(Role) -> bool) -> Option<&mut Child> {
        self.children.iter_mut().find(|child| role(child.role))
    }

    // --- signals ---

    /// Passes a signal on to the main process, where it stays pending until it is handled.
    fn pass_on(&mut self, signal: Signal) {
        let stop = matches!(signal, Signal::TERM | Signal::INT);
        self.stopping |= stop;
        let upgrading = self.children.iter().any(|one| matches!(one.role, Role::Successor(_)));
        if upgrading && signal != Signal::USR2 && !self.repeat.contains(&signal) {
            self.repeat.push(signal);
        }
        match self.main() {
            Some(main) => main.signal(signal),
            // The supervisor is between two starts, or the last children drain.
            None if stop && self.exit.is_none() => self.end(0),
            None if stop => self.end(FAILED),
            None => {}
        }
    }

    /// Ends the service. With code 0, draining children may finish; else they are killed.
    fn end(&mut self, code: u8) {
        (self.exit, self.start_at, self.renewal) = (Some(code), None, None);
        let orderly = code == 0;
        for child in &self.children {
            if !orderly || matches!(child.role, Role::Successor(_)) {
                child.signal(Signal::KILL);
            }
        }
    }

    // --- starting ---

    fn start_if_due(&mut self) {
        if self.start_at.is_none_or(|at| clock::now() < at) {
            return;
        }
        self.start_at = None;
        match Child::start(&self.program, Role::Main, None) {
            Ok(mut child) => {
                let kept = std::mem::take(&mut self.kept);
                child.begin(kept, &self.stores, self.failed_starts + 1, &self.before);
                self.children.push(child);
            }
            Err(error) => {
                tracing::error!(%error, "cannot start the serving process");
                self.start_failed();
            }
        }
    }

    fn start_failed(&mut self) {
        self.failed_starts += 1;
        if self.failed_starts >= FAILED_STARTS_MAX {
            tracing::error!(
                starts = FAILED_STARTS_MAX,
                "serving processes exited before they were ready; exiting"
            );
            self.end(FAILED);
        } else {
            let pause = PAUSE * (1 << (self.failed_starts - 1));
            self.start_at = Some(clock::now() + pause);
        }
    }

    fn start_successor(
        &mut self,
        of: Pid,
        changes: &SuccessorChanges,
        fds: Vec<OwnedFd>,
    ) -> Result<Pid, String> {
        let mut fds = fds.into_iter();
        let (Some(channel), Some(stderr)) = (fds.next(), fds.next()) else {
            return Err("descriptors are missing".to_owned());
        };
        if self.of(|role| matches!(role, Role::Successor(_))).is_some() || self.stopping {
            return Err("the supervisor is already starting a process, or is stopping".to_owned());
        }
        if !changes.is_empty() {
            let asked_over = fds.next().ok_or("the connection of the requester is missing")?;
            permitted(&asked_over, &self.children)?;
        }
        let program =
            self.program.with_changes(changes.binary.as_deref(), changes.config.as_deref());
        let mut child =
            Child::start(&program, Role::Successor(of), Some(ChildPipes { channel, stderr }))
                .map_err(|error| error.to_string())?;
        child.begin(Vec::new(), &self.stores, 1, "");
        let pid = child.pid;
        self.children.push(child);
        Ok(pid)
    }

    // --- messages ---

    fn take_messages(&mut self, at: usize) {
        for _ in 0..TURN_MAX {
            let child = &mut self.children[at];
            let Some(link) = &child.link else { return };
            match link.try_receive() {
                Ok(Some(packet)) => self.take_message(at, packet),
                Ok(None) => child.link = None,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // The child ended without reading all orders. Its messages are still
                // readable.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
                Err(error) => {
                    tracing::warn!(pid = %child.pid, %error, "cannot read a message of a process");
                }
            }
        }
    }

    fn take_message(&mut self, at: usize, Packet { bytes, fds }: Packet) {
        let Some(report) = ChildReport::decode(&bytes) else { return };
        if let Role::Successor(of) = self.children[at].role
            && let Some(before) = self.children.iter().position(|child| child.pid == of)
        {
            // An earlier message of the old process may have made this child the main one.
            self.take_messages(before);
        }
        let child = &mut self.children[at];
        let (pid, is_main) = (child.pid, child.role == Role::Main);
        match report {
            ChildReport::Hold(name) => self.hold(at, name, fds),
            ChildReport::Release(name) => child.held.retain(|held| held.name != name),
            ChildReport::Ready => {
                child.ready = true;
                child.given.clear();
                if is_main {
                    (self.served, self.failed_starts) = (true, 0);
                    self.tell_ready();
                }
            }
            ChildReport::Reloading if is_main => {
                self.told_ready = false;
                self.manager.tell(ServiceNotice::Reloading);
            }
            ChildReport::Stopping if is_main => {
                self.stopping = true;
                self.manager.tell(ServiceNotice::Stopping);
            }
            ChildReport::Alive if is_main => self.manager.tell(ServiceNotice::Alive),
            ChildReport::Start(changes) => self.answer_start(at, &changes, fds),
            ChildReport::End if is_main => {
                if let Some(successor) = self.of(|role| role == Role::Successor(pid)) {
                    successor.signal(Signal::KILL);
                }
            }
            ChildReport::Serves if is_main => self.change_over(at),
            ChildReport::SocketsClosed => self.sockets_closed(at),
            ChildReport::Resumed => self.kept.clear(),
            _ => {}
        }
    }

    fn hold(&mut self, at: usize, name: String, fds: Vec<OwnedFd>) {
        let total: usize = self.children.iter().map(Child::sockets).sum();
        if total + fds.len() <= FDS_MAX {
            self.children[at].hold(name, fds);
        } else {
            tracing::warn!(
                name,
                max = FDS_MAX,
                "cannot keep another socket in the supervisor; a crash closes it"
            );
        }
    }

    fn answer_start(&mut self, at: usize, changes: &SuccessorChanges, fds: Vec<OwnedFd>) {
        let started = match self.children[at].role {
            Role::Main => self.start_successor(self.children[at].pid, changes, fds),
            _ => Err("the requesting process is not the serving process".to_owned()),
        };
        let order = match started {
            Ok(pid) => SupervisorOrder::Started(pid.as_raw_nonzero().get().unsigned_abs()),
            Err(why) => SupervisorOrder::Refused(why),
        };
        self.children[at].tell(&order);
    }

    /// Handles that an old process has closed its sockets.
    fn sockets_closed(&mut self, at: usize) {
        let (stopping, child) = (self.stopping, &mut self.children[at]);
        child.held.clear();
        match child.role {
            // The supervisor ordered it to resume, but it had already closed its sockets.
            Role::Main if !stopping => {
                (child.role, child.ready) = (Role::Leaving, false);
                self.start_at = Some(clock::now());
            }
            Role::Main => {}
            _ => child.role = Role::Leaving,
        }
    }

    /// Notifies the service manager that the service is ready. The main process of the
    /// service manager is always the supervisor.
    fn tell_ready(&mut self) {
        if !std::mem::replace(&mut self.told_ready, true) {
            self.manager.tell(ServiceNotice::Ready);
        }
    }

    /// Makes the new process that a child requested the main process.
    fn change_over(&mut self, at: usize) {
        let pid = self.children[at].pid;
        let Some(successor) = self.of(|role| role == Role::Successor(pid)) else { return };
        successor.role = Role::Main;
        let (program, renewal) = (successor.program.clone(), Renewal::by(successor));
        (self.program, self.renewal) = (program, renewal);
        self.children[at].role = Role::SteppingDown;
        for signal in std::mem::take(&mut self.repeat) {
            self.pass_on(signal);
        }
    }

    // --- ends ---

    /// Reaps all ended processes, including orphans if this is process 1.
    pub(super) fn reap(&mut self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let Some(at) = self.children.iter().position(|child| child.pid == pid) else {
                self.trial_ended(pid, status);
                continue;
            };
            // Messages that it sent before it ended are handled first.
            while self.children[at].link.is_some() && self.has_messages(at) {
                self.take_messages(at);
            }
            let child = self.children.swap_remove(at);
            self.ended(child, status);
        }
    }

    fn has_messages(&self, at: usize) -> bool {
        let Some(link) = &self.children[at].link else { return false };
        let mut fd = [PollFd::new(link, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fd, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    fn ended(&mut self, mut child: Child, status: WaitStatus) {
        match child.role {
            Role::Successor(of) => {
                self.repeat.clear();
                if let Some(old) = self.children.iter().find(|one| one.pid == of) {
                    old.tell(&SupervisorOrder::Ended(status.as_raw()));
                }
            }
            Role::SteppingDown | Role::Leaving if status.exit_status() == Some(0) => {}
            Role::SteppingDown | Role::Leaving => {
                tracing::warn!(
                    reason = outcome(child.pid, status),
                    "draining process failed; its open sessions ended"
                );
            }
            Role::Main => self.main_ended(&mut child, status),
        }
    }

    fn main_ended(&mut self, child: &mut Child, status: WaitStatus) {
        // The new program has crashed, so the supervisor does not execute it.
        self.renewal = None;
        let code = status.exit_status().map(|code| u8::try_from(code).unwrap_or(FAILED));
        if self.stopping || code == Some(0) || (code.is_some() && !self.served) {
            return self.end(code.unwrap_or(FAILED));
        }
        self.kept.extend(child.take_sockets());
        self.before = outcome(child.pid, status);
        let old = self.of(|role| role == Role::SteppingDown);
        if let Some(old) = old
            && old.tell(&SupervisorOrder::Resume(status.as_raw()))
        {
            old.role = Role::Main;
            self.program = old.program.clone();
            return;
        }
        if let Some(next) = self.of(|role| role == Role::Successor(child.pid)) {
            if next.ready {
                // The old process ended before it reported that the new process serves.
                next.role = Role::Main;
                self.program = next.program.clone();
                self.kept.clear();
                return;
            }
            next.signal(Signal::KILL);
        }
        if child.ready {
            self.start_at = Some(clock::now());
        } else {
            self.start_failed();
        }
    }
}

/// Returns how a process ended, as text.
fn outcome(pid: Pid, status: WaitStatus) -> String {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("process {pid} exited with code {code}"),
        (_, Some(signal)) => format!("process {pid} was killed by signal {signal}"),
        _ => format!("process {pid} exited"),
    }
}
