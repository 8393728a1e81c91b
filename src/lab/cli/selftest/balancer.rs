//! The balancer under test: a supervisor and the processes that it starts, all of this
//! program.
//!
//! Used by the self-test only. It controls the balancer as an operator does: with a
//! file, the admin API and signals. Dropping it ends all processes.

use super::SelftestError;
use hyper::Method;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tidegate_client::http::{Address, ClientArgs, ask, ask_within};
use tidegate_net::clock;

/// Maximum time until a process is ready.
const START_MAX: Duration = Duration::from_secs(20);
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Time between two SIGTERM; the second ends the process immediately.
const SECOND_SIGNAL_AFTER: Duration = Duration::from_millis(250);

/// Timeout of an upgrade request; longer than the timeout of the API.
const UPGRADE_MAX: Duration = Duration::from_secs(70);

/// Maximum number of bytes of the log that are printed after a failure.
const LOG_BYTES_SHOWN: usize = 4000;

/// The supervisor, and the client of the admin API.
#[derive(Debug)]
pub(crate) struct SelftestProcesses {
    /// `None` after it was waited for.
    service: Option<Pid>,
    client: ClientArgs,
    log: PathBuf,
}

// === impl SelftestProcesses ===

impl SelftestProcesses {
    /// Starts the first process and waits until it is ready.
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
            clock::pause(POLL_INTERVAL);
        }
        Ok(balancer)
    }

    /// Reloads the configuration.
    pub(crate) fn reload(&self) -> Result<(), String> {
        match ask(&self.client, Method::POST, "/v1/reload") {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("reload failed: {}", error)),
        }
    }

    /// Upgrades it to the same binary.
    pub(crate) fn upgrade(&self) -> Result<(), String> {
        let answer = ask_within(&self.client, Method::POST, "/v1/upgrade", UPGRADE_MAX);
        answer.map(|_| ()).map_err(|error| format!("upgrade failed: {}", error))
    }

    /// Stops it and returns failures. The supervisor ends with the last of its
    /// processes.
    pub(crate) fn stop(mut self, limit: Duration) -> Vec<String> {
        let Some(service) = self.service else { return Vec::new() };
        // If it has already exited, its exit status is reported below.
        let _ = kill_process(service, Signal::TERM);
        let deadline = clock::now() + limit;
        while clock::now() < deadline {
            if let Ok(Some((_, status))) = waitpid(Some(service), WaitOptions::NOHANG) {
                self.service = None;
                let in_order = status.exit_status() == Some(0);
                let broken = (!in_order).then(|| format!("the balancer exited with {status:?}"));
                return broken.into_iter().collect();
            }
            clock::pause(POLL_INTERVAL);
        }
        vec![format!("the balancer did not exit within {limit:?}")]
    }

    /// Returns the end of its log.
    pub(crate) fn last_lines(&self) -> String {
        last_lines(&self.log)
    }

    /// Returns the path of its log.
    pub(crate) fn log(&self) -> PathBuf {
        self.log.clone()
    }
}

impl Drop for SelftestProcesses {
    fn drop(&mut self) {
        if let Some(service) = self.service {
            // The pause is needed: signals in quick succession count as one.
            let _ = kill_process(service, Signal::TERM);
            clock::pause(SECOND_SIGNAL_AFTER);
            let _ = kill_process(service, Signal::TERM);
            let _ = waitpid(Some(service), WaitOptions::empty());
        }
    }
}

/// Returns the end of a log.
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
