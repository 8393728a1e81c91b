//! The balancer of the demo: `tidegate run` in a separate process, controlled through
//! its admin API.
//!
//! Used by the demo only. All its data comes from status and metrics, which any client
//! can read with curl.
//!
//! The demo adopts the processes that an upgrade leaves behind, and waits for all of
//! them.

use super::backends::DemoBackend;
use super::place::{DemoDirectory, NAME};
use hyper::Method;
use rustix::process::{
    Pid, Signal, WaitOptions, getpid, kill_process, set_child_subreaper, waitpid,
};
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;
use tidegate_api::answers::UpgradeDoc;
use tidegate_api::decision::{ForecastDocument, SessionExplanation};
use tidegate_api::explain::ExplainDoc;
use tidegate_api::status::{BackendDoc, StatusDoc};
use tidegate_client::http::{Address, Answer, ClientArgs, ask_within, backend_path};
use tidegate_net::clock;

/// Maximum number of attempts to start: another process can take a port between its
/// choice and its use.
const STARTS_MAX: usize = 5;

/// Maximum time until a process is ready, and until it exits after its sessions have
/// ended.
const START_MAX: Duration = Duration::from_secs(20);
const END_MAX: Duration = Duration::from_secs(20);
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Timeout of a request to the admin API; longer than the API's timeout for an upgrade.
const ANSWER_MAX: Duration = Duration::from_secs(70);

/// The running balancer and its addresses.
#[derive(Debug)]
pub(crate) struct DemoBalancer {
    /// The first process and its successors after upgrades.
    processes: std::cell::RefCell<Vec<Pid>>,
    client: ClientArgs,
    log: std::path::PathBuf,
    pub(crate) frontend: SocketAddr,
    pub(crate) admin: SocketAddr,
}

/// How the processes of the balancer ended.
#[derive(Debug, Default)]
pub(crate) struct DemoEnded {
    /// Sessions that the drain reset.
    pub(crate) cut: u64,
    /// Failed checks.
    pub(crate) broken: Vec<String>,
}

/// The status at one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct DemoStatus {
    pub(crate) engine: String,
    pub(crate) engine_reason: String,
    pub(crate) workers: u64,
    pub(crate) generation: u64,
    /// Serial of the table: it changes with the state of any backend.
    pub(crate) serial: u64,
    /// Connections that the frontend accepted.
    pub(crate) sessions: u64,
    /// Open sessions.
    pub(crate) open: u64,
    pub(crate) backends: Vec<DemoBackendStatus>,
}

/// The status of one backend.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct DemoBackendStatus {
    pub(crate) name: String,
    pub(crate) weight: u64,
    /// Effective weight; 0 while the backend is not eligible.
    pub(crate) effective: u64,
    pub(crate) intent: String,
    /// The last change: new state, reason, age in seconds.
    pub(crate) changed: Option<(String, String, f64)>,
}

/// The metrics text.
#[derive(Debug)]
pub(crate) struct Metrics(String);

// === impl DemoBalancer ===

impl DemoBalancer {
    /// Starts the balancer on free loopback ports in front of `backends`.
    pub(crate) fn start(
        place: &DemoDirectory,
        backends: &[DemoBackend],
    ) -> Result<DemoBalancer, String> {
        // So that the processes that an upgrade leaves behind become children of the
        // demo (prctl(2)).
        set_child_subreaper(Some(getpid()))
            .map_err(|error| format!("cannot become a subreaper: {error}"))?;
        let mut why = String::new();
        for _ in 0..STARTS_MAX {
            let ports = free_addresses().map_err(|error| format!("no free port: {error}"))?;
            place
                .write_config(ports, backends)
                .map_err(|error| format!("cannot write the configuration: {error}"))?;
            match DemoBalancer::try_start(place, ports) {
                Ok(balancer) => return Ok(balancer),
                Err(error) => why = error,
            }
        }
        Err(format!("the balancer does not start: {why}"))
    }

    fn try_start(
        place: &DemoDirectory,
        [frontend, admin]: [SocketAddr; 2],
    ) -> Result<DemoBalancer, String> {
        let log = place.log();
        let program =
            std::env::current_exe().map_err(|error| format!("cannot find the program: {error}"))?;
        let stderr = File::create(&log).map_err(|error| format!("cannot open the log: {error}"))?;
        let mut run = Command::new(&program);
        run.args(["run", "--config"]).arg(place.config());
        // A separate process group: an interrupt from the terminal reaches only the
        // demo.
        run.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr).process_group(0);
        let child = run.spawn().map_err(|error| format!("{}: {error}", program.display()))?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let token_file = Some(place.token());
        let client =
            ClientArgs { admin: Some(Address::Tcp(admin)), config: None, json: true, token_file };
        let processes = std::cell::RefCell::new(pid.into_iter().collect());
        let balancer = DemoBalancer { processes, client, log, frontend, admin };
        let deadline = clock::now() + START_MAX;
        while ask_within(&balancer.client, Method::GET, "/ready", START_MAX).is_err() {
            let ended = waitpid(pid, WaitOptions::NOHANG).is_ok_and(|end| end.is_some());
            if ended || clock::now() > deadline {
                return Err(balancer.log_text());
            }
            clock::pause(POLL_INTERVAL);
        }
        Ok(balancer)
    }

    /// Returns the status; `None` if the balancer does not answer.
    pub(crate) async fn seen(&self) -> Option<DemoStatus> {
        let answer = self.ask(Method::GET, "/v1/status".to_owned()).await.ok()?;
        answer.document().ok().map(DemoStatus::of)
    }

    /// Returns the metrics.
    pub(crate) async fn metrics(&self) -> Option<Metrics> {
        let answer = self.ask(Method::GET, "/metrics".to_owned()).await.ok()?;
        Some(Metrics(answer.text))
    }

    /// Returns the explanation of a backend.
    pub(crate) async fn explained(&self, backend: &str) -> Result<ExplainDoc, String> {
        let answer = self.ask(Method::GET, backend_path(NAME, backend, "explain")).await?;
        answer.document().map_err(|error| error.to_string())
    }

    /// Returns the explanation of a session.
    pub(crate) async fn explained_session(
        &self,
        session: u64,
    ) -> Result<SessionExplanation, String> {
        let answer = self.ask(Method::GET, format!("/v1/explain?session={session}")).await?;
        answer.document().map_err(|error| error.to_string())
    }

    /// Returns what would happen to a new connection of this client.
    pub(crate) async fn forecast(&self, client: IpAddr) -> Result<ForecastDocument, String> {
        let path = format!("/v1/explain?client={client}&frontend={NAME}");
        let answer = self.ask(Method::GET, path).await?;
        answer.document().map_err(|error| error.to_string())
    }

    /// Reloads the configuration.
    pub(crate) async fn reload(&self) -> Result<(), String> {
        self.ask(Method::POST, "/v1/reload".to_owned()).await.map(drop)
    }

    /// Upgrades the balancer to the same binary. Returns the process ID of the new
    /// process.
    pub(crate) async fn upgrade(&self) -> Result<u32, String> {
        let answer = self.ask(Method::POST, "/v1/upgrade".to_owned()).await?;
        let UpgradeDoc { pid, .. } = answer.document().map_err(|error| error.to_string())?;
        self.processes.borrow_mut().extend(i32::try_from(pid).ok().and_then(Pid::from_raw));
        Ok(pid)
    }

    /// Requests a drain and shutdown; returns when the drain has started.
    pub(crate) async fn shut_down(&self) {
        // An error means that it has already exited.
        let _ = self.ask(Method::POST, "/v1/shutdown".to_owned()).await;
    }

    /// Waits until every process has exited.
    pub(crate) fn wait(self) -> DemoEnded {
        let mut ended = DemoEnded::default();
        let deadline = clock::now() + END_MAX;
        loop {
            match waitpid(None, WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    self.processes.borrow_mut().retain(|one| *one != pid);
                    if status.exit_status() != Some(0) {
                        ended
                            .broken
                            .push(format!("a process of the balancer exited with {status:?}"));
                    }
                }
                Ok(None) if clock::now() < deadline => clock::pause(POLL_INTERVAL),
                Ok(None) => {
                    ended.broken.push(format!("the balancer did not exit within {END_MAX:?}"));
                    break;
                }
                // No process is left.
                Err(_) => {
                    self.processes.borrow_mut().clear();
                    break;
                }
            }
        }
        let log = self.log_text();
        let cut = |line: &str| line.split_once("drained sessions_reset=")?.1.parse::<u64>().ok();
        ended.cut = log.lines().filter_map(cut).sum();
        if !ended.broken.is_empty() {
            ended.broken.extend(log.lines().rev().take(3).map(str::to_owned));
        }
        ended
    }

    /// Returns the log.
    fn log_text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    async fn ask(&self, method: Method, path: String) -> Result<Answer, String> {
        let client = self.client.clone();
        let asked = move || ask_within(&client, method, &path, ANSWER_MAX);
        match tokio::task::spawn_blocking(asked).await {
            Ok(answer) => answer.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }
}

impl Drop for DemoBalancer {
    fn drop(&mut self) {
        for pid in self.processes.borrow_mut().drain(..) {
            let _ = kill_process(pid, Signal::KILL);
            let _ = waitpid(Some(pid), WaitOptions::empty());
        }
    }
}

/// Returns two addresses that are not in use.
fn free_addresses() -> std::io::Result<[SocketAddr; 2]> {
    let one = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let other = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    Ok([one.local_addr()?, other.local_addr()?])
}

// === impl DemoStatus ===

impl DemoStatus {
    fn of(status: StatusDoc) -> DemoStatus {
        let pools = status.pools.into_iter().filter(|pool| pool.name == NAME);
        let frontends = status.frontends.iter().filter(|frontend| frontend.name == NAME);
        DemoStatus {
            engine: status.engine.to_string(),
            engine_reason: status.engine_reason,
            workers: status.workers,
            generation: status.generation,
            serial: status.table_serial,
            sessions: frontends.map(|frontend| frontend.sessions_total).sum(),
            open: status.connections_active.into(),
            backends: pools.flat_map(|pool| pool.backends).map(DemoBackendStatus::of).collect(),
        }
    }

    /// Returns the backend with this name.
    pub(crate) fn backend(&self, name: &str) -> Option<&DemoBackendStatus> {
        self.backends.iter().find(|backend| backend.name == name)
    }

    /// Returns whether all backends receive sessions at their full weight.
    pub(crate) fn all_serve(&self) -> bool {
        !self.backends.is_empty() && self.backends.iter().all(DemoBackendStatus::serves)
    }
}

// === impl DemoBackendStatus ===

impl DemoBackendStatus {
    fn of(backend: BackendDoc) -> DemoBackendStatus {
        let changed = backend.last_transition;
        DemoBackendStatus {
            name: backend.name,
            weight: backend.weight.into(),
            // Rounded up, so that a suspect backend with a small weight does not show
            // as 0.
            effective: backend.effective_weight.ceil() as u64,
            intent: backend.intent.to_string(),
            changed: changed
                .map(|change| (change.to.to_string(), change.reason, change.seconds_ago)),
        }
    }

    /// Returns whether it has its full weight.
    pub(crate) fn serves(&self) -> bool {
        self.weight > 0 && self.effective == self.weight
    }
}

// === impl Metrics ===

impl Metrics {
    /// Returns the value of a series, given as in the text; 0 if it is absent.
    pub(crate) fn count(&self, series: &str) -> u64 {
        let value = |line: &str| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok();
        self.0.lines().find_map(value).unwrap_or_default()
    }

    /// Returns the ended sessions as `cause (phase)` and count, without zeros.
    pub(crate) fn session_ends(&self) -> Vec<(String, u64)> {
        let cell = |line: &str| {
            let labels = line.strip_prefix("tidegate_session_end_total{cause=\"")?;
            let (cause, rest) = labels.split_once("\",phase=\"")?;
            let (phase, count) = rest.split_once("\"} ")?;
            let count = count.parse().ok().filter(|count| *count > 0)?;
            Some((format!("{cause} ({phase})"), count))
        };
        self.0.lines().filter_map(cell).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn session_ends_are_parsed_without_zeros() {
        let metrics = Metrics(
            "tidegate_session_end_total{cause=\"finished\",phase=\"closed\"} 12\n\
             tidegate_session_end_total{cause=\"no-backend\",phase=\"admit\"} 0\n\
             tidegate_connect_retries_total 3\ntidegate_connect_retries_total_x 9\n"
                .to_owned(),
        );
        assert_eq!(metrics.session_ends(), [("finished (closed)".to_owned(), 12)]);
        assert_eq!(metrics.count("tidegate_connect_retries_total"), 3);
        assert_eq!(metrics.count("tidegate_absent"), 0);
    }
}
