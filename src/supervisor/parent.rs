//! The supervisor's loop: takes messages and signals, reaps, starts.
//!
//! Called by `cli::run` while there is one thread. What goes wrong here is told on
//! standard error; all else the process that serves tells in its log.

use super::children::{Child, Held, Pipes, Role, permitted, wished};
use super::manager::Manager;
use super::message::{Order, Report, Wish};
use super::pid_file::PidFile;
use super::program::Program;
use super::store;
use crate::clock;
use crate::net::handover::FDS_MAX;
use crate::net::limits;
use crate::net::packets::Packet;
use crate::net::signals::{SignalQueue, Taken};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, wait};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Processes in a row that may end before they serve.
const FAILED_STARTS_MAX: u8 = 5;

/// Before the second start in a row; twice that before each further one.
const PAUSE: Duration = Duration::from_millis(100);

/// How often the pid file is tried again.
const TRY_AGAIN: Duration = Duration::from_millis(500);

/// Messages taken from one child before the others get their turn.
const TURN_MAX: usize = 256;

/// As of a failure while running.
const FAILED: u8 = 3;

/// What the supervisor knows.
struct Parent {
    /// What the next process is to be.
    program: Program,
    signals: SignalQueue,
    manager: Manager,
    /// The manager knows that the service is ready.
    told_ready: bool,
    stores: Vec<OwnedFd>,
    children: Vec<Child>,
    /// Sockets of a process that has ended, for the next.
    kept: Vec<Held>,
    /// What became of the process before, for the next one's log.
    before: String,
    /// Starts in a row that came to nothing.
    failed_starts: u8,
    start_at: Option<Instant>,
    served: bool,
    /// The service is to end.
    stopping: bool,
    /// Passed on while a successor was being started: the process that was the main one
    /// then may have had no use for them any more.
    unsettled: Vec<Signal>,
    /// With this code, once all children have ended.
    exit: Option<u8>,
    pid_path: Option<PathBuf>,
    pid_file: Option<PidFile>,
    pid_told: bool,
}

/// Runs the service until it ends; gives the exit code. `activated` are sockets that a
/// service manager has passed.
///
/// # Errors
/// There is nothing to wait for signals with, or no memory file.
pub fn run(
    program: Program,
    pid_file: Option<PathBuf>,
    activated: Vec<(String, OwnedFd)>,
) -> io::Result<u8> {
    limits::raise_descriptor_limit();
    let kept = activated.into_iter().map(|(name, fd)| Held { name, sockets: vec![fd] }).collect();
    let mut parent = Parent {
        program,
        signals: SignalQueue::open()?,
        manager: Manager::from_environment(),
        told_ready: false,
        stores: store::memory_files()?,
        children: Vec::new(),
        kept,
        before: String::new(),
        failed_starts: 0,
        start_at: Some(clock::now()),
        served: false,
        stopping: false,
        unsettled: Vec::new(),
        exit: None,
        pid_path: pid_file,
        pid_file: None,
        pid_told: false,
    };
    loop {
        parent.start_if_due();
        if let (Some(code), true) = (parent.exit, parent.children.is_empty()) {
            return Ok(code);
        }
        parent.wait()?;
        for at in 0..parent.children.len() {
            parent.take_messages(at);
        }
        while let Some(taken) = parent.signals.take()? {
            if let Taken::Signal(signal) = taken {
                parent.pass_on(signal);
            }
        }
        parent.reap();
        parent.write_pid_file();
    }
}

impl Parent {
    // --- waiting ---

    fn wait(&self) -> io::Result<()> {
        let links = self.children.iter().filter_map(|child| child.link.as_ref());
        let fds = std::iter::once(self.signals.as_fd()).chain(links.map(AsFd::as_fd));
        let mut fds: Vec<PollFd<'_>> =
            fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        let start = self.start_at.map(|at| at.saturating_duration_since(clock::now()));
        let retry = (self.served && self.pid_path.is_some()).then_some(TRY_AGAIN);
        // Rounded up by no less than what the poll takes of it.
        let timeout = start.into_iter().chain(retry).min().map(|time| Timespec {
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

    /// Passes a signal on to the process that serves; it waits there until it is taken.
    fn pass_on(&mut self, signal: Signal) {
        let stop = matches!(signal, Signal::TERM | Signal::INT);
        self.stopping |= stop;
        let upgrading = self.children.iter().any(|one| matches!(one.role, Role::Successor(_)));
        if upgrading && signal != Signal::USR2 && !self.unsettled.contains(&signal) {
            self.unsettled.push(signal);
        }
        match self.main() {
            Some(main) => main.signal(signal),
            // Between two starts, or while the last ones drain.
            None if stop && self.exit.is_none() => self.end(0),
            None if stop => self.end(FAILED),
            None => {}
        }
    }

    /// Ends the service; what still drains may do so where all is in order.
    fn end(&mut self, code: u8) {
        (self.exit, self.start_at) = (Some(code), None);
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
                say(format_args!("cannot start the process that serves: {error}"));
                self.start_failed();
            }
        }
    }

    fn start_failed(&mut self) {
        self.failed_starts += 1;
        if self.failed_starts >= FAILED_STARTS_MAX {
            say(format_args!("{FAILED_STARTS_MAX} processes in a row ended before they served"));
            self.end(FAILED);
        } else {
            let pause = PAUSE * (1 << (self.failed_starts - 1));
            self.start_at = Some(clock::now() + pause);
        }
    }

    fn start_successor(&mut self, of: Pid, wish: &Wish, fds: Vec<OwnedFd>) -> Result<Pid, String> {
        let mut fds = fds.into_iter();
        let (Some(channel), Some(stderr)) = (fds.next(), fds.next()) else {
            return Err("descriptors are missing".to_owned());
        };
        if self.of(|role| matches!(role, Role::Successor(_))).is_some() || self.stopping {
            return Err("the supervisor is starting another one, or stopping".to_owned());
        }
        if !wish.is_usual() {
            let asked_over = fds.next().ok_or("who asks is not shown to the supervisor")?;
            permitted(&asked_over, &self.children)?;
        }
        let (program, role) = (wished(&self.program, wish), Role::Successor(of));
        let mut child = Child::start(&program, role, Some(Pipes { channel, stderr }))
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
                Err(error) => {
                    say(format_args!("a message of process {}: {error}", child.pid));
                }
            }
        }
    }

    fn take_message(&mut self, at: usize, Packet { bytes, fds }: Packet) {
        let Some(report) = Report::decode(&bytes) else { return };
        if let Role::Successor(of) = self.children[at].role
            && let Some(before) = self.children.iter().position(|child| child.pid == of)
        {
            // It may have said, on its own way, that this one is the service.
            self.take_messages(before);
        }
        let total: usize = self.children.iter().map(Child::sockets).sum();
        let (stopping, child) = (self.stopping, &mut self.children[at]);
        let (pid, is_main) = (child.pid, child.role == Role::Main);
        match report {
            Report::Hold(name) if total + fds.len() <= FDS_MAX => child.hold(name, fds),
            Report::Hold(name) => say(format_args!("too many sockets to keep {name}")),
            Report::Release(name) => child.held.retain(|held| held.name != name),
            Report::Ready => {
                child.ready = true;
                child.given.clear();
                if is_main {
                    (self.served, self.failed_starts) = (true, 0);
                    self.tell_ready();
                }
            }
            Report::Reloading if is_main => {
                self.told_ready = false;
                self.manager.reloading();
            }
            Report::Stopping if is_main => {
                self.stopping = true;
                self.manager.stopping();
            }
            Report::Beat if is_main => self.manager.beat(),
            Report::Start(wish) => {
                let started = match is_main {
                    true => self.start_successor(pid, &wish, fds),
                    false => Err("the process that is asked is not the service".to_owned()),
                };
                let order = match started {
                    Ok(pid) => Order::Started(pid.as_raw_nonzero().get().unsigned_abs()),
                    Err(why) => Order::Refused(why),
                };
                self.children[at].tell(&order);
            }
            Report::End if is_main => {
                if let Some(successor) = self.of(|role| role == Role::Successor(pid)) {
                    successor.signal(Signal::KILL);
                }
            }
            Report::Serves if is_main => self.change_over(at),
            Report::LetGo if is_main && !stopping => {
                // It was told to go on when it could not any more.
                (child.role, child.ready) = (Role::Leaving, false);
                child.held.clear();
                self.start_at = Some(clock::now());
            }
            Report::LetGo => {
                child.role = if is_main { Role::Main } else { Role::Leaving };
                child.held.clear();
            }
            Report::GoesOn => self.kept.clear(),
            _ => {}
        }
    }

    /// Of the service; which process it is, is none of the manager's business.
    fn tell_ready(&mut self) {
        if !std::mem::replace(&mut self.told_ready, true) {
            self.manager.ready();
        }
    }

    /// The successor is the service from now on.
    fn change_over(&mut self, at: usize) {
        let pid = self.children[at].pid;
        let Some(successor) = self.of(|role| role == Role::Successor(pid)) else { return };
        successor.role = Role::Main;
        self.program = successor.program.clone();
        self.children[at].role = Role::SteppingDown;
        for signal in std::mem::take(&mut self.unsettled) {
            self.pass_on(signal);
        }
    }

    // --- ends ---

    /// Takes every end there is: also of orphans, where this is process 1.
    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let Some(at) = self.children.iter().position(|child| child.pid == pid) else {
                continue;
            };
            // What it has said before it ended comes first.
            while self.children[at].link.is_some() && self.has_words(at) {
                self.take_messages(at);
            }
            let child = self.children.swap_remove(at);
            self.ended(child, status);
        }
    }

    fn has_words(&self, at: usize) -> bool {
        let Some(link) = &self.children[at].link else { return false };
        let mut fd = [PollFd::new(link, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fd, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    fn ended(&mut self, mut child: Child, status: WaitStatus) {
        match child.role {
            Role::Successor(of) => {
                self.unsettled.clear();
                if let Some(old) = self.children.iter().find(|one| one.pid == of) {
                    old.tell(&Order::Ended(status.as_raw()));
                }
            }
            Role::SteppingDown | Role::Leaving if status.exit_status() == Some(0) => {}
            Role::SteppingDown | Role::Leaving => {
                say(format_args!("{}, which was draining", in_words(child.pid, status)));
            }
            Role::Main => self.main_ended(&mut child, status),
        }
    }

    fn main_ended(&mut self, child: &mut Child, status: WaitStatus) {
        let code = status.exit_status().map(|code| u8::try_from(code).unwrap_or(FAILED));
        if self.stopping || code == Some(0) || (code.is_some() && !self.served) {
            return self.end(code.unwrap_or(FAILED));
        }
        self.kept.extend(child.take_sockets());
        self.before = in_words(child.pid, status);
        let old = self.of(|role| role == Role::SteppingDown);
        if let Some(old) = old
            && old.tell(&Order::GoOn(status.as_raw()))
        {
            old.role = Role::Main;
            self.program = old.program.clone();
            return;
        }
        if let Some(next) = self.of(|role| role == Role::Successor(child.pid)) {
            if next.ready {
                // The word that it serves was not said any more.
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

    // --- the pid file ---

    fn write_pid_file(&mut self) {
        let Some(path) = self.pid_path.as_ref().filter(|_| self.served) else { return };
        match PidFile::write(path) {
            Ok(written) => (self.pid_file, self.pid_path) = (Some(written), None),
            Err(error) if !std::mem::replace(&mut self.pid_told, true) => {
                say(format_args!("cannot write {}, it is tried again: {error}", path.display()));
            }
            Err(_) => {}
        }
    }
}

/// Says something on standard error, if that can be written.
fn say(what: std::fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "tidegate: {what}");
}

/// What became of a process.
fn in_words(pid: Pid, status: WaitStatus) -> String {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("process {pid} ended with code {code}"),
        (_, Some(signal)) => format!("process {pid} was ended by signal {signal}"),
        _ => format!("process {pid} has ended"),
    }
}
