//! Finds, awaits and ends the processes to which a Tidegate process is upgraded.
//!
//! Used by the proxy handle. A supervisor reaps these processes. Without a supervisor
//! the test process adopts them (prctl(2), PR_SET_CHILD_SUBREAPER) after the process
//! that started them has ended. The test then gets their exit codes, and no process is
//! left behind.

use super::http::Answer;
use super::proxy::{PROGRAM, TestProxy};
use super::{eventually, patience, proc, secs, within};
use rustix::process::{Pid, Signal, WaitOptions, getpid, set_child_subreaper, waitpid};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

/// The process that serves and the process that receives signals.
#[derive(Debug, Default)]
pub struct Serving {
    /// No supervisor exists, and the serving process receives the signals.
    single: bool,
    /// The supervisor, or the serving process without a supervisor. 0 before it is known.
    service: u32,
    pid: u32,
    before: Vec<u32>,
}

/// Direct children of a process, without its probe helper.
fn serving_children(pid: u32) -> Vec<u32> {
    let mut all = proc::children(pid);
    all.retain(|child| !proc::is_probe_helper(*child));
    all
}

// === impl Serving ===

impl Serving {
    pub fn new(single: bool) -> Serving {
        Serving { single, ..Serving::default() }
    }

    /// Finds the processes below the child that the test started. That child can be a wrapper
    /// that keeps running.
    pub fn find(&mut self, child: &Child) {
        let mut line = vec![child.id()];
        while let [one] = serving_children(line[line.len() - 1])[..] {
            line.push(one);
        }
        self.pid = line[line.len() - 1];
        self.service = if self.single { self.pid } else { line[line.len().saturating_sub(2)] };
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    pub fn service(&self, child: &Child) -> u32 {
        if self.service == 0 { child.id() } else { self.service }
    }

    pub fn before(&self) -> Vec<u32> {
        self.before.clone()
    }

    /// Processes of the service other than the serving process.
    pub fn others(&self) -> Vec<u32> {
        let mut all = serving_children(self.service);
        all.retain(|pid| *pid != self.pid);
        all
    }

    pub fn becomes(&mut self, new: u32) {
        self.before.push(self.pid);
        self.pid = new;
        if self.single {
            self.service = new;
        }
    }

    /// Returns the service's exit status after it has ended. Also reaps earlier processes.
    pub fn try_wait(&self, child: &mut Child) -> Option<ExitStatus> {
        let first = child.try_wait().expect("wait for the child");
        if !self.single || self.before.is_empty() {
            return first;
        }
        for old in self.before.iter().skip(1) {
            let _ = reap(*old);
        }
        // The process that started it can have reaped it, together with its status.
        let gone = !std::path::Path::new(&format!("/proc/{}", self.pid)).exists();
        reap(self.pid).or(gone.then(|| ExitStatus::from_raw(0)))
    }

    /// Kills every process of the service.
    pub fn kill(&self, child: &mut Child) -> Option<ExitStatus> {
        proc::kill_with_all_below(child.id());
        for pid in self.before().into_iter().chain([self.pid]) {
            if pid != 0 && pid != child.id() && !proc::is_dead(pid) {
                proc::signal(pid, Signal::KILL);
            }
        }
        let _ = child.kill();
        let status = child.wait().ok();
        if self.single && !self.before.is_empty() {
            return within(secs(2), || self.try_wait(child)).or(status);
        }
        status
    }
}

/// Returns the exit status of a process that this process has adopted and that has ended.
fn reap(pid: u32) -> Option<ExitStatus> {
    let pid = Pid::from_raw(pid as i32)?;
    // It is no child yet while the process that started it drains.
    let (_, status) = waitpid(Some(pid), WaitOptions::NOHANG).ok().flatten()?;
    Some(ExitStatus::from_raw(status.as_raw()))
}

/// Makes this process the parent of orphaned descendants.
pub fn adopt_orphans() {
    set_child_subreaper(Some(getpid())).expect("PR_SET_CHILD_SUBREAPER");
}

// === impl TestProxy ===

impl TestProxy {
    /// Upgrades to the same program, which must succeed. Returns the old process.
    #[track_caller]
    pub fn upgrade(&mut self) -> u32 {
        self.upgrade_with("")
    }

    /// Upgrades to another program, which must succeed. Returns the old process.
    #[track_caller]
    pub fn upgrade_to(&mut self, program: &Path) -> u32 {
        self.upgrade_with(&format!("?binary={}", program.display()))
    }

    /// Returns another build of the program: the file that `TIDEGATE_OTHER_BUILD` names, or a
    /// copy of this program with a few bytes appended. The copy is in a new directory next to
    /// the program, because the sandbox allows Tidegate to execute files only there.
    pub fn other_build(&self) -> (PathBuf, Option<tempfile::TempDir>) {
        if let Some(path) = std::env::var_os("TIDEGATE_OTHER_BUILD") {
            return (PathBuf::from(path), None);
        }
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let path = dir.path().join("other-build");
        // Another process copies, because a file that is open for writing cannot be executed.
        let script = format!("cp '{PROGRAM}' '{0}' && printf other >> '{0}'", path.display());
        let status = Command::new("sh").args(["-c", &script]).status().expect("a shell");
        assert!(status.success(), "{script}");
        (path, Some(dir))
    }

    /// Upgrades with a query, which must succeed. Returns the old process.
    #[track_caller]
    pub fn upgrade_with(&mut self, query: &str) -> u32 {
        let answer = self.try_upgrade(query);
        assert_eq!(answer.status, 200, "{}\n{}", answer.body, self.log());
        let before = self.pid();
        let pid = answer.json()["pid"].as_u64().expect("a pid") as u32;
        assert_ne!(pid, before);
        self.serve_by(pid);
        before
    }

    /// Requests an upgrade with a query.
    pub fn try_upgrade(&self, query: &str) -> Answer {
        adopt_orphans();
        self.admin_request("POST", &format!("/v1/upgrade{query}"))
    }

    /// Waits until the process has ended.
    #[track_caller]
    pub fn wait_gone(&self, pid: u32, limit: Duration) {
        eventually(patience(limit), &format!("process {pid} ends"), || proc::is_dead(pid));
    }
}
