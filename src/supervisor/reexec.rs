//! Changes the supervisor to the binary of an upgrade: it executes the new program under
//! the same process ID.
//!
//! `parent` calls [`Parent::renew`] on each turn of its loop. `cli::run` calls [`check`]
//! and [`resume`] in the new program. It never blocks, because the trial is a child
//! process.
//!
//! # Steps
//!
//! 1. An upgrade to another file has succeeded, and the old process has closed its sockets,
//!    a second after the new process took over.
//! 2. The *trial*: the new file is started with the arguments of this process and
//!    `--supervisor-check VERSION`. Its standard input is the state (`state`). It reads
//!    and checks the state, and writes its digest to standard output within
//!    [`TRIAL_MAX`].
//! 3. If the state has not changed, the same file is executed (execve(2)) with the bytes
//!    that the trial has read. Otherwise the trial is repeated, up to [`TRIALS_MAX`]
//!    trials in total.
//!
//! If the new program is too old for the option, rejects its arguments or the state, or
//! crashes or hangs in the trial, the supervisor keeps its binary. The same holds if
//! execve(2) fails. The log has one line with the reason. If the new program exits after
//! execve(2), the serving process drains, as after any exit of a supervisor.
//!
//! # Inherited state
//!
//! - Children stay children, because the process ID stays the same.
//! - Descriptors lose close-on-exec only for the call.
//! - Signals are blocked from the first instruction of either program, so signals during
//!   the change stay pending (execve(2), signal(7)).
//! - The new program opens the signal queue and the connection to the service manager
//!   again, from the same mask and environment.

use super::children::{Child, Held, Role, prepare, spawn};
use super::parent::Parent;
use super::pid_file::PidFile;
use super::state::{BYTES_MAX, Described, State, VERSION};
use super::store;
use nix::unistd::execve;
use rustix::fs::{MemfdFlags, memfd_create, stat};
use rustix::io::{FdFlags, fcntl_setfd, ioctl_fionbio};
use rustix::process::{Pid, Signal, WaitStatus, kill_process_group};
use std::convert::Infallible;
use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tidegate_net::clock;
use tidegate_net::fd_channel::take_inherited;
use xxhash_rust::xxh3::xxh3_64;

/// Environment variable with the number of the descriptor of the state.
pub(super) const MARK: &str = "TIDEGATE_SUPERVISOR_STATE";

/// Longest duration of a trial.
pub(super) const TRIAL_MAX: Duration = Duration::from_secs(2);

/// Most trials of a program. A trial is repeated only if the state has changed.
const TRIALS_MAX: u8 = 5;

/// Size of the buffer for the answer, longer than any answer.
const ANSWER_MAX: usize = 128;

/// The identity of a program file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileId {
    device: u64,
    inode: u64,
    size: i64,
    changed: (i64, i64),
}

/// A program that this process may have to execute.
#[derive(Debug)]
pub(super) struct Renewal {
    path: PathBuf,
    file: FileId,
    trials: u8,
    step: Step,
}

#[derive(Debug)]
enum Step {
    /// Waits until no change of the children is in progress.
    Waits,
    Tried(Trial),
    /// The trial has read this state.
    Passed(Vec<u8>),
}

/// A running trial.
#[derive(Debug)]
struct Trial {
    pid: Pid,
    until: Instant,
    answer: io::PipeReader,
    state: Vec<u8>,
    /// It was killed after [`TRIAL_MAX`].
    killed: bool,
    ended: bool,
}

// === the new program ===

/// Runs `--supervisor-check`: reads a state of this version from standard input and writes
/// its digest to standard output.
///
/// # Errors
/// A message: this program cannot take over the state.
pub fn check(version: u32) -> Result<(), String> {
    if version != VERSION {
        return Err(format!(
            "unsupported state version {version}; this binary reads version {VERSION}"
        ));
    }
    let mut bytes = Vec::new();
    let limit = BYTES_MAX as u64 + 1;
    io::stdin().take(limit).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    State::decode(&bytes)?;
    io::stdout().write_all(answer(&bytes).as_bytes()).map_err(|error| error.to_string())
}

fn answer(state: &[u8]) -> String {
    format!("supervisor state {VERSION} {:016x}\n", xxh3_64(state))
}

/// Continues as the supervisor that has executed this program. Returns the exit code.
/// `None`: no supervisor has executed it.
///
/// Call it before other code opens descriptors.
///
/// # Errors
/// The state cannot be taken over.
pub fn resume() -> Option<io::Result<u8>> {
    let number = std::env::var_os(MARK)?;
    let number = number.to_str().and_then(|text| text.parse().ok());
    let number = number.ok_or_else(|| io::Error::other(format!("{MARK} is not a number")));
    Some(number.and_then(taken_over).and_then(Parent::run))
}

fn taken_over(number: RawFd) -> io::Result<Parent> {
    let file = File::from(take_inherited(number)?);
    let length = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
    let mut bytes = vec![0; length.min(BYTES_MAX)];
    file.read_exact_at(&mut bytes, 0)?;
    let state = State::decode(&bytes).map_err(io::Error::other)?;
    if state.descriptors().any(|fd| fd == number) {
        return Err(io::Error::other("the state names its own descriptor"));
    }
    Parent::of_state(state)
}

// === impl FileId ===

impl FileId {
    pub(super) fn of(path: &Path) -> io::Result<FileId> {
        let facts = stat(path)?;
        let changed = (facts.st_mtime, i64::try_from(facts.st_mtime_nsec).unwrap_or_default());
        Ok(FileId { device: facts.st_dev, inode: facts.st_ino, size: facts.st_size, changed })
    }
}

// === impl Trial ===

impl Trial {
    fn start(path: &Path, state: Vec<u8>) -> io::Result<Trial> {
        let input = memory_file(&state)?;
        io::Seek::rewind(&mut &input)?;
        let (answer, output) = io::pipe()?;
        // Processes that the trial starts may keep the other end of the pipe open.
        ioctl_fionbio(&answer, true)?;
        let mut words = std::env::args_os();
        let mut command = Command::new(path);
        command.arg0(words.next().unwrap_or_default()).args(words);
        command.arg("--supervisor-check").arg(VERSION.to_string());
        prepare(&mut command, None);
        command.stdin(input).stdout(output).stderr(Stdio::null());
        let pid = spawn(&mut command)?;
        let until = clock::now() + TRIAL_MAX;
        Ok(Trial { pid, until, answer, state, killed: false, ended: false })
    }

    /// Kills the process group of the trial, which is not reaped yet.
    fn kill(&mut self) {
        self.killed = true;
        let _ = kill_process_group(self.pid, Signal::KILL);
    }

    /// Returns the state that the trial has read, or why it failed.
    fn result(mut self, status: WaitStatus) -> Result<Vec<u8>, String> {
        self.ended = true;
        match (status.exit_status(), status.terminating_signal()) {
            (Some(0), _) => {}
            _ if self.killed => return Err(format!("no answer within {TRIAL_MAX:?}")),
            (Some(code), _) => return Err(format!("exit code {code}")),
            (_, signal) => return Err(format!("killed by signal {}", signal.unwrap_or_default())),
        }
        let mut said = [0; ANSWER_MAX];
        let length = self.answer.read(&mut said).unwrap_or(0);
        if said[..length] != *answer(&self.state).as_bytes() {
            return Err("the answer is not the digest of the state".to_owned());
        }
        Ok(std::mem::take(&mut self.state))
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        if !self.ended {
            self.kill();
        }
    }
}

// === impl Renewal ===

impl Renewal {
    /// Returns the renewal to the program of `child`. `None`: this process runs the same
    /// file.
    pub(super) fn by(child: &Child) -> Option<Renewal> {
        let file = child.file?;
        let own = FileId::of(Path::new("/proc/self/exe")).ok();
        let path = child.program.path().ok().filter(|_| own != Some(file))?;
        Some(Renewal { path, file, trials: 0, step: Step::Waits })
    }

    /// Returns the latest time for the next call of [`Parent::renew`].
    pub(super) fn due(&self) -> Option<Instant> {
        match &self.step {
            Step::Tried(trial) => Some(trial.until).filter(|_| !trial.killed),
            Step::Waits | Step::Passed(_) => None,
        }
    }

    /// Handles the end of a process, if it is the trial.
    ///
    /// # Errors
    /// Why the program must not be executed.
    fn ended(&mut self, pid: Pid, status: WaitStatus) -> Result<(), String> {
        let is_trial = matches!(&self.step, Step::Tried(trial) if trial.pid == pid);
        if is_trial && let Step::Tried(trial) = std::mem::replace(&mut self.step, Step::Waits) {
            self.step = Step::Passed(trial.result(status)?);
        }
        Ok(())
    }
}

// === impl Parent ===

impl Parent {
    /// Takes the next step towards the new program, if one is due.
    pub(super) fn renew(&mut self) {
        let Some(mut renewal) = self.renewal.take() else { return };
        match self.next_step(&mut renewal) {
            Ok(()) => self.renewal = Some(renewal),
            Err(why) => log_old_binary_stays(&renewal.path, &why),
        }
    }

    fn next_step(&self, renewal: &mut Renewal) -> Result<(), String> {
        if let Step::Tried(trial) = &mut renewal.step {
            if !trial.killed && clock::now() >= trial.until {
                trial.kill();
            }
            return Ok(());
        }
        if !self.is_quiet() {
            return Ok(());
        }
        if FileId::of(&renewal.path).ok() != Some(renewal.file) {
            return Err("the file has changed since it was started".to_owned());
        }
        let state = self.state().encode()?;
        if let Step::Passed(read) = &renewal.step
            && *read == state
        {
            let Err(error) = self.execute(&renewal.path, &state);
            return Err(error.to_string());
        }
        renewal.trials += 1;
        if renewal.trials > TRIALS_MAX {
            return Err(format!(
                "the state of the supervisor changed in each of {TRIALS_MAX} trials"
            ));
        }
        let trial = Trial::start(&renewal.path, state).map_err(|error| error.to_string())?;
        renewal.step = Step::Tried(trial);
        Ok(())
    }

    /// Handles the end of a child that is not a process of the service.
    pub(super) fn trial_ended(&mut self, pid: Pid, status: WaitStatus) {
        if let Some(mut renewal) = self.renewal.take() {
            match renewal.ended(pid, status) {
                Ok(()) => self.renewal = Some(renewal),
                Err(why) => log_old_binary_stays(&renewal.path, &why),
            }
        }
    }

    /// Returns whether no change is in progress: one process serves, and all others drain.
    fn is_quiet(&self) -> bool {
        let steady = |child: &Child| match child.role {
            Role::Main => child.ready && child.given.is_empty(),
            Role::Leaving => true,
            Role::Successor(_) | Role::SteppingDown => false,
        };
        let ends = self.stopping || self.exit.is_some();
        let starts = self.start_at.is_some() || !self.kept.is_empty();
        !ends && !starts && self.told_ready && self.children.iter().all(steady)
    }

    fn state(&self) -> State {
        let children = self.children.iter().map(|child| Described {
            pid: child.pid.as_raw_nonzero().get(),
            main: child.role == Role::Main,
            program: child.program.clone(),
            held: child.held.iter().map(|it| (it.name.clone(), numbers(&it.sockets))).collect(),
            link: child.link.as_ref().map(|link| link.as_fd().as_raw_fd()),
        });
        let pid_file = self.pid_file.as_ref().map(|it| (it.path().into(), it.is_written()));
        let stores = numbers(&self.stores);
        State::new(self.program.clone(), stores, children.collect(), pid_file)
    }

    /// Executes the program with the state. Returns only on failure.
    fn execute(&self, path: &Path, state: &[u8]) -> Result<Infallible, io::Error> {
        let file = memory_file(state)?;
        let mark =
            [OsStr::new(MARK), OsStr::new(&file.as_raw_fd().to_string())].join(OsStr::new("="));
        let others = std::env::vars_os().filter(|(name, _)| name != MARK);
        let others = others.map(|(name, value)| [name, value].join(OsStr::new("=")));
        let words = c_strings(std::env::args_os())?;
        let variables = c_strings(others.chain([mark]))?;
        let path = CString::new(path.as_os_str().as_bytes())?;
        self.inherit(&file, FdFlags::empty())?;
        let Err(error) = execve(&path, &words, &variables);
        self.inherit(&file, FdFlags::CLOEXEC)?;
        Err(error.into())
    }

    /// Sets the flags of all descriptors that the state names, so that the executed program
    /// inherits them or not.
    fn inherit(&self, state: &File, flags: FdFlags) -> io::Result<()> {
        let links = self.children.iter().filter_map(|child| child.link.as_ref()).map(AsFd::as_fd);
        let held = self.children.iter().flat_map(|child| &child.held);
        let sockets = held.flat_map(|held| &held.sockets).chain(&self.stores).map(AsFd::as_fd);
        let mut all = links.chain(sockets).chain([state.as_fd()]);
        all.try_for_each(|fd: BorrowedFd<'_>| Ok(fcntl_setfd(fd, flags)?))
    }

    /// Makes the supervisor from a state. It takes over all descriptors before it opens
    /// others, because their numbers are fixed.
    fn of_state(state: State) -> io::Result<Parent> {
        let children: io::Result<Vec<Child>> = state.children.into_iter().map(child_of).collect();
        let (children, mut stores) = (children?, taken(state.stores)?);
        // An older supervisor may have had fewer stores.
        store::complete(&mut stores)?;
        let mut parent = Parent::new(state.program, stores)?;
        let pid_file = state.pid_file.map(|(path, written)| PidFile::at(path.into(), written));
        (parent.children, parent.pid_file) = (children, pid_file);
        (parent.told_ready, parent.served) = (true, true);
        let version = env!("CARGO_PKG_VERSION");
        tracing::info!(version, "the supervisor runs the new binary");
        // Children may have ended during the change, and their SIGCHLD may be lost.
        parent.reap();
        Ok(parent)
    }
}

fn child_of(described: Described) -> io::Result<Child> {
    let pid = described.pid().ok_or_else(|| io::Error::other("a process ID is missing"))?;
    let role = if described.main { Role::Main } else { Role::Leaving };
    let link = described.link.map(take_inherited).transpose()?.map(Into::into);
    let mut child = Child::of(pid, role, described.program, link);
    child.ready = true;
    for (name, sockets) in described.held {
        child.held.push(Held { name, sockets: taken(sockets)? });
    }
    Ok(child)
}

fn taken(numbers: Vec<RawFd>) -> io::Result<Vec<OwnedFd>> {
    numbers.into_iter().map(take_inherited).collect()
}

/// Logs why the supervisor does not execute a program.
fn log_old_binary_stays(path: &Path, why: &str) {
    tracing::warn!(
        program = %path.display(), reason = why,
        "the supervisor keeps running the old binary until a restart or the next upgrade"
    );
}

fn memory_file(bytes: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create("tidegate-state", MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    Ok(file)
}

fn numbers(fds: &[OwnedFd]) -> Vec<RawFd> {
    fds.iter().map(AsRawFd::as_raw_fd).collect()
}

fn c_strings(words: impl Iterator<Item = OsString>) -> io::Result<Vec<CString>> {
    words.map(|word| Ok(CString::new(word.into_vec())?)).collect()
}
