//! The balancer under test: a supervisor and the processes it starts, of this program.
//!
//! Used by the self-test alone, which talks to it as an operator would: a file, the admin
//! API, signals. Whatever happens, dropping it ends them all.

use super::SelftestError;
use hyper::Method;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tidegate_client::http::{Address, ClientArgs, ask, ask_within};
use tidegate_net::clock;

/// How long a process may take to serve.
const START_MAX: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(10);

/// Between two signals to stop, the second of which ends it at once.
const END_AT_ONCE: Duration = Duration::from_millis(250);

/// The API gives an upgrade less.
const UPGRADE_MAX: Duration = Duration::from_secs(70);

/// Shown of the log where something went wrong.
const LOG_BYTES_SHOWN: usize = 4000;

/// The supervisor, and the way to the process that serves.
#[derive(Debug)]
pub(crate) struct SelftestProcesses {
    /// `None` once it was waited for.
    service: Option<Pid>,
    client: ClientArgs,
    log: PathBuf,
}

// === impl SelftestProcesses ===

impl SelftestProcesses {
    /// Starts the first process; returns once it serves.
    pub(crate) fn start(
        directory: &Path,
        config: &Path,
    ) -> Result<SelftestProcesses, SelftestError> {
        let log = directory.join("log");
        let admin = Address::Unix(directory.join("admin.sock"));
        let client = ClientArgs { admin: Some(admin), config: None, json: true, token_file: None };
        let program =
            std::env::current_exe().map_err(|error| format!("cannot find the program: {error}"))?;
        let stderr = File::create(&log).map_err(|error| format!("cannot open the log: {error}"))?;
        let child = Command::new(&program)
            .args(["run", "--config"])
            .arg(config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .map_err(|error| format!("cannot start {}: {error}", program.display()))?;
        let pid = pid_of(u64::from(child.id()))?;
        let balancer = SelftestProcesses { service: Some(pid), client, log };
        let deadline = clock::now() + START_MAX;
        while ask(&balancer.client, Method::GET, "/ready").is_err() {
            let ended = waitpid(Some(pid), WaitOptions::NOHANG).is_ok_and(|end| end.is_some());
            if ended || clock::now() > deadline {
                return Err(format!("the balancer does not start:\n{}", balancer.last_lines()));
            }
            clock::pause(LOOK);
        }
        Ok(balancer)
    }

    /// Has it read its configuration again.
    pub(crate) fn reload(&self) -> Result<(), String> {
        match ask(&self.client, Method::POST, "/v1/reload") {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("reload failed: {}", error)),
        }
    }

    /// Upgrades it to itself.
    pub(crate) fn upgrade(&self) -> Result<(), String> {
        let answer = ask_within(&self.client, Method::POST, "/v1/upgrade", UPGRADE_MAX);
        answer.map(|_| ()).map_err(|error| format!("upgrade failed: {}", error))
    }

    /// Ends it in order; gives what was not as it should be. The supervisor ends with the
    /// last of its processes.
    pub(crate) fn stop(mut self, limit: Duration) -> Vec<String> {
        let Some(service) = self.service else { return Vec::new() };
        // It may have died; then its end says so.
        let _ = kill_process(service, Signal::TERM);
        let deadline = clock::now() + limit;
        while clock::now() < deadline {
            if let Ok(Some((_, status))) = waitpid(Some(service), WaitOptions::NOHANG) {
                self.service = None;
                let in_order = status.exit_status() == Some(0);
                let broken = (!in_order).then(|| format!("the balancer exited with {status:?}"));
                return broken.into_iter().collect();
            }
            clock::pause(LOOK);
        }
        vec![format!("the balancer did not exit within {limit:?}")]
    }

    /// The end of what it has logged.
    pub(crate) fn last_lines(&self) -> String {
        last_lines(&self.log)
    }

    /// Where it logs.
    pub(crate) fn log(&self) -> PathBuf {
        self.log.clone()
    }
}

impl Drop for SelftestProcesses {
    fn drop(&mut self) {
        if let Some(service) = self.service {
            // A second signal within the time of a repetition would not count.
            let _ = kill_process(service, Signal::TERM);
            clock::pause(END_AT_ONCE);
            let _ = kill_process(service, Signal::TERM);
            let _ = waitpid(Some(service), WaitOptions::empty());
        }
    }
}

/// The end of that log.
pub(crate) fn last_lines(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let from = text.len().saturating_sub(LOG_BYTES_SHOWN);
    let from = (from..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or_default();
    text[from..].trim_end().to_owned()
}

fn pid_of(number: u64) -> Result<Pid, String> {
    let pid = i32::try_from(number).ok().and_then(Pid::from_raw);
    pid.ok_or_else(|| format!("{number} is not a process ID"))
}
