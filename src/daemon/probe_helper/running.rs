//! One running command of the probe helper.
//!
//! Owned by the runner. It starts the command in a process group of its own, reads the first line
//! of its output, and kills the whole group at the end. It decides nothing about the backend.

use super::message::{HelperReply, RunCommand, TEXT_BYTES_MAX};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus, kill_process_group, pidfd_open,
    waitid,
};
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Instant;
use tidegate_core::model::CommandSubject;

/// `PATH` of commands.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Output that is read in one turn.
const READ_BYTES: usize = 4 * 1024;

/// Output that is read after the end of a command.
const LAST_BYTES_MAX: usize = 64 * 1024;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct RunningCommand {
    /// Also the number of its process group.
    pid: Pid,
    pidfd: OwnedFd,
    /// `None` after the command has closed its output.
    output: Option<PipeReader>,
    line: FirstLine,
    /// `None` after the reply.
    reply: Option<OwnedFd>,
    deadline: Instant,
}

/// The first line of an output.
#[derive(Debug, Default)]
struct FirstLine {
    bytes: Vec<u8>,
    ended: bool,
}

/// Sends a reply. The pipe is empty, so it takes the reply at once. An error means that the
/// balancer no longer waits.
pub(super) fn answer(pipe: &OwnedFd, reply: &HelperReply) {
    if let Ok(flags) = fcntl_getfl(pipe) {
        let _ = fcntl_setfl(pipe, flags | OFlags::NONBLOCK);
    }
    let _ = rustix::io::write(pipe, &reply.encode());
}

/// Whether the balancer has closed its end of the pipe.
pub(super) fn is_cancelled(pipe: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pipe, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}

fn environment(subject: &CommandSubject) -> [(&'static str, &str); 9] {
    let CommandSubject { pool, backend, address, port } = subject;
    [
        ("PATH", PATH),
        ("TIDEGATE_POOL", pool),
        ("TIDEGATE_BACKEND", backend),
        ("TIDEGATE_ADDRESS", address),
        ("TIDEGATE_PORT", port),
        // Scripts for HAProxy's `external-check` read these.
        ("HAPROXY_PROXY_NAME", pool),
        ("HAPROXY_SERVER_NAME", backend),
        ("HAPROXY_SERVER_ADDR", address),
        ("HAPROXY_SERVER_PORT", port),
    ]
}

// === impl RunningCommand ===

impl RunningCommand {
    /// Starts a command with these words, which must not be empty.
    pub(super) fn start(
        run: &RunCommand,
        words: &[String],
        reply: OwnedFd,
        now: Instant,
    ) -> Option<RunningCommand> {
        let started = spawn(&run.subject, words);
        let (pid, pidfd, output) = match started {
            Ok(started) => started,
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or_default();
                let program = words.first().map_or("", String::as_str);
                let why = format!("cannot start {program}: {error}");
                answer(&reply, &HelperReply::NotStarted { errno, why });
                return None;
            }
        };
        let (output, line, reply) = (Some(output), FirstLine::default(), Some(reply));
        // A timeout beyond any clock is as good as none.
        let deadline = now.checked_add(run.timeout).unwrap_or(now);
        Some(RunningCommand { pid, pidfd, output, line, reply, deadline })
    }

    /// Returns what the runner waits for.
    pub(super) fn sources(&self) -> impl Iterator<Item = PollFd<'_>> {
        let readable = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let pipe = self.reply.iter().map(|pipe| PollFd::new(pipe, PollFlags::empty()));
        let output = self.output.iter().map(AsFd::as_fd);
        let fds: Vec<BorrowedFd<'_>> = output.chain([self.pidfd.as_fd()]).collect();
        fds.into_iter().map(readable).chain(pipe)
    }

    /// Returns when it is killed; `None` if it was killed.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.reply.is_some().then_some(self.deadline)
    }

    /// Makes progress. Returns true once the command has ended and is reaped.
    pub(super) fn turn(&mut self, now: Instant) -> bool {
        self.read(READ_BYTES);
        if let Some(status) = self.ended() {
            self.read(LAST_BYTES_MAX);
            // Other processes of its group can still run. The leader is not reaped yet, so no
            // other group has this number.
            self.kill();
            self.reap();
            let line = std::mem::take(&mut self.line.bytes);
            let reply = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => HelperReply::Exited { code, line },
                (None, signal) => {
                    HelperReply::Signalled { signal: signal.unwrap_or_default(), line }
                }
            };
            self.answer(&reply);
            return true;
        }
        if self.reply.as_ref().is_some_and(is_cancelled) {
            self.kill();
            self.reply = None;
        }
        if self.reply.is_some() && now >= self.deadline {
            self.kill();
            let line = std::mem::take(&mut self.line.bytes);
            self.answer(&HelperReply::TimedOut { line });
        }
        false
    }

    fn answer(&mut self, reply: &HelperReply) {
        if let Some(pipe) = self.reply.take() {
            answer(&pipe, reply);
        }
    }

    /// Reads at most `max` bytes of its output.
    fn read(&mut self, max: usize) {
        let mut buffer = [0; READ_BYTES];
        let mut total = 0;
        while let Some(output) = &mut self.output
            && total < max
        {
            match output.read(&mut buffer) {
                Ok(0) => self.output = None,
                Ok(count) => {
                    total += count;
                    self.line.take(&buffer[..count]);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.output = None,
            }
        }
    }

    /// Returns its status if it has ended. It stays unreaped.
    fn ended(&self) -> Option<WaitIdStatus> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        waitid(WaitId::Pid(self.pid), options).ok().flatten()
    }

    fn kill(&self) {
        let _ = kill_process_group(self.pid, Signal::KILL);
    }

    fn reap(&self) {
        let _ = waitid(WaitId::Pid(self.pid), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
    }

    /// Returns its process ID.
    pub(super) fn pid(&self) -> Pid {
        self.pid
    }
}

impl Drop for RunningCommand {
    /// Kills the command if it still runs. If it is reaped, its number can be that of another
    /// group, so nothing is killed.
    fn drop(&mut self) {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        if waitid(WaitId::Pid(self.pid), options).is_ok() {
            self.kill();
            let _ = waitid(WaitId::Pid(self.pid), WaitIdOptions::EXITED);
        }
    }
}

fn spawn(subject: &CommandSubject, words: &[String]) -> io::Result<(Pid, OwnedFd, PipeReader)> {
    let (program, arguments) = words.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let (output, writer) = io::pipe()?;
    fcntl_setfl(&output, OFlags::NONBLOCK)?;
    let child = Command::new(program)
        .args(arguments)
        .env_clear()
        .envs(environment(subject))
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(Stdio::null())
        .spawn()?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::other("the command has no process ID"))?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).inspect_err(|_| {
        let _ = kill_process_group(pid, Signal::KILL);
        let _ = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED);
    })?;
    Ok((pid, pidfd, output))
}

// === impl FirstLine ===

impl FirstLine {
    fn take(&mut self, bytes: &[u8]) {
        if self.ended {
            return;
        }
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let room = TEXT_BYTES_MAX - self.bytes.len();
        let part = &bytes[..end.unwrap_or(bytes.len()).min(room)];
        self.bytes.extend_from_slice(part);
        self.ended = end.is_some() || self.bytes.len() == TEXT_BYTES_MAX;
        if end.is_some() && self.bytes.last() == Some(&b'\r') {
            self.bytes.pop();
        }
    }
}
