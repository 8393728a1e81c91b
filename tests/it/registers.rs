//! `tidegate register` as a sidecar: it registers a service in a registry, reports a check
//! that fails, and removes the registration at SIGTERM.
//!
//! Consul is a double. etcd and ZooKeeper are real servers, if they are installed.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::proxy::PROGRAM;
use crate::common::{eventually, exclusive, http, patience, proc, secs, within};
use rustix::process::Signal;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tempfile::TempDir;
use tidegate_discovery::testing::consul::{ConsulDouble, DoubleRights};
use tidegate_discovery::testing::etcd::{self, EtcdCluster};
use tidegate_discovery::testing::zookeeper::ZookeeperServer;

/// A service whose HTTP check a test can let fail.
struct CheckedService {
    healthy: Arc<AtomicBool>,
    server: ScriptedBackend,
}

/// A running `tidegate register`. It is killed when it is dropped.
struct RunningRegister {
    child: Child,
    output: PathBuf,
}

// === impl CheckedService ===

impl CheckedService {
    fn start() -> CheckedService {
        let healthy = Arc::new(AtomicBool::new(true));
        let read = Arc::clone(&healthy);
        let (good, bad) = (backend::http("web", 200), backend::http("web", 503));
        let answer = backend::script(move |conn| match read.load(Ordering::Relaxed) {
            true => good(conn),
            false => bad(conn),
        });
        CheckedService { healthy, server: ScriptedBackend::start(answer) }
    }

    fn address(&self) -> String {
        self.server.address().to_owned()
    }

    fn set_healthy(&self, healthy: bool) {
        self.healthy.store(healthy, Ordering::Relaxed);
    }
}

// === impl RunningRegister ===

impl RunningRegister {
    /// Registers the service as `web/a` in the registry of these arguments.
    fn start(dir: &TempDir, service: &CheckedService, registry: &[&str]) -> RunningRegister {
        let output = dir.path().join("output");
        let file = File::create(&output).unwrap();
        let child = Command::new(PROGRAM)
            .arg("register")
            .args(registry)
            .args(["--service", "web", "--id", "a", "--weight", "3", "--label", "zone=b"])
            .args(["--address", &service.address(), "--check", "http:/health", "--ttl", "3s"])
            .args(["--check-interval", "50ms", "--fall", "2", "--rise", "2"])
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap();
        RunningRegister { child, output }
    }

    fn output(&self) -> String {
        std::fs::read_to_string(&self.output).unwrap()
    }

    /// Waits until the registry has what `found` looks for.
    #[track_caller]
    fn wait_until(&self, what: &str, mut found: impl FnMut() -> bool) {
        let done = within(secs(20), || found().then_some(()));
        assert!(done.is_some(), "not {what}: {}", self.output());
    }

    /// Sends SIGTERM and expects a removal and exit code 0.
    fn stop(mut self) {
        proc::signal(self.child.id(), Signal::TERM);
        let mut code = None;
        eventually(secs(10), "the command ends", || {
            code = self.child.try_wait().unwrap();
            code.is_some()
        });
        assert_eq!(code.unwrap().code(), Some(0), "{}", self.output());
        assert!(self.output().contains("removed from the registry"), "{}", self.output());
    }
}

impl Drop for RunningRegister {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Lets the check fail and succeed again, and expects both in the registry, which `state`
/// reads: `None` is an absence.
fn expect_states(
    register: RunningRegister,
    service: &CheckedService,
    state: impl Fn() -> Option<&'static str>,
) {
    register.wait_until("ready", || state() == Some("ready"));
    service.set_healthy(false);
    register.wait_until("critical", || state() == Some("critical"));
    service.set_healthy(true);
    register.wait_until("ready again", || state() == Some("ready"));
    // Longer than the TTL: renewals keep it.
    std::thread::sleep(patience(secs(4)));
    assert_eq!(state(), Some("ready"), "{}", register.output());
    register.stop();
    assert_eq!(state(), None);
}

#[test]
fn a_service_is_in_consul_until_sigterm() {
    let _share = exclusive::shared();
    let (double, dir) = (ConsulDouble::start().unwrap(), TempDir::new().unwrap());
    double.create_token("writer", DoubleRights { read: true, write: true });
    let token = dir.path().join("token");
    std::fs::write(&token, "writer").unwrap();
    set_private(&token);
    let service = CheckedService::start();
    let server = double.address().to_string();
    let registry = ["--consul", &server, "--token-file", token.to_str().unwrap()];
    let register = RunningRegister::start(&dir, &service, &registry);
    let address = double.address();
    expect_states(register, &service, || {
        let answer = http::over_tcp(address, "/v1/health/service/web?token=writer").unwrap();
        let body = answer.body;
        if !body.contains(r#""ID":"a""#) {
            assert_eq!(body, "[]");
            return None;
        }
        assert!(body.contains(r#""zone":"b""#) && body.contains(r#""Passing":3"#), "{body}");
        Some(if body.contains(r#""Status":"critical""#) { "critical" } else { "ready" })
    });
    let requests = double.requests();
    let deregistered = |line: &String| line.contains("/v1/agent/service/deregister/a");
    assert!(requests.iter().any(deregistered), "{requests:?}");
}

#[test]
fn a_service_is_in_etcd_until_sigterm() {
    if !etcd::is_installed() {
        return;
    }
    let _share = exclusive::shared();
    let (cluster, dir) = (EtcdCluster::start(1), TempDir::new().unwrap());
    let service = CheckedService::start();
    let server = cluster.servers()[0].to_string();
    let register = RunningRegister::start(&dir, &service, &["--etcd", &server]);
    let address = service.address();
    expect_states(register, &service, || {
        let value = cluster.get("/tidegate/services/web/a")?;
        assert!(value.contains(&address) && value.contains(r#""zone":"b""#), "{value}");
        Some(if value.contains(r#""critical""#) { "critical" } else { "ready" })
    });
}

#[test]
fn a_service_is_in_zookeeper_until_sigterm() {
    if !ZookeeperServer::is_available() {
        return;
    }
    let _share = exclusive::shared();
    let (dir, own) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let server = ZookeeperServer::start(dir.path());
    let service = CheckedService::start();
    let address = server.address().to_string();
    let registry = ["--zookeeper", &address, "--path", "/services/web"];
    let register = RunningRegister::start(&own, &service, &registry);
    let output = register.output.clone();
    expect_states(register, &service, || {
        // The server lists ephemeral nodes, not their content.
        if !server.ask("dump").unwrap().contains("/services/web/a\n") {
            return None;
        }
        let output = std::fs::read_to_string(&output).unwrap();
        let mut states =
            output.lines().filter_map(|line| line.strip_prefix("web/a: registered as "));
        Some(if states.next_back() == Some("critical") { "critical" } else { "ready" })
    });
}

#[test]
fn a_token_for_another_host_needs_tls() {
    let _share = exclusive::shared();
    let run = Command::new(PROGRAM)
        .args(["register", "--consul", "192.0.2.1:8500", "--token-file", "/nowhere"])
        .args(["--service", "web", "--address", "127.0.0.1:80"])
        .output()
        .unwrap();
    assert_eq!(run.status.code(), Some(2), "{run:?}");
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(said.contains("the token would be sent unencrypted to 192.0.2.1:8500"), "{said}");
}

fn set_private(file: &std::path::Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o600)).unwrap();
}
