//! Reference tables against the program: commands, policies, routes, session ends. Metrics
//! and access log are compared with a balancer that served one session.

use crate::pages::{column, page, root, table};
use clap::CommandFactory;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;
use tidegate_cli::Cli;
use tidegate_core::model::Policy;
use tidegate_core::outcome::{Cause, Phase, code};
use tidegate_daemon::admin::AdminRequest;
use tidegate_daemon::{self as daemon, Options, RunningBalancer};
use tidegate_heartbeat::SenderState;
use tidegate_heartbeat::keys::Secret;
use tidegate_heartbeat::sender::{Sender, SenderSettings};
use tidegate_heartbeat::wire::SenderIdentity;
use tokio::sync::oneshot;

/// Longest wait for something that is about to happen.
const SOON: Duration = Duration::from_secs(10);

fn readme() -> String {
    page("README.md")
}

#[test]
fn every_command_is_listed_and_no_other() {
    let listed: BTreeSet<String> = column(&readme(), "| command |", 0)
        .iter()
        .map(|call| call.split(' ').nth(1).expect("tidegate and a command").to_owned())
        .collect();
    let built: BTreeSet<String> =
        Cli::command().get_subcommands().map(|command| command.get_name().to_owned()).collect();
    assert_eq!(listed, built);
}

#[test]
fn every_policy_is_listed() {
    let known: Vec<&str> = Policy::ALL.iter().map(|policy| policy.name()).collect();
    assert_eq!(column(&page("docs/balancing.md"), "| `balance` |", 0), known);
}

#[test]
fn every_route_of_the_admin_api_is_listed_and_no_other() {
    let routes = fs::read_to_string(root().join("src/daemon/admin/routes.rs")).unwrap();
    let route = |line: &str| {
        let (path, rest) = line.trim().strip_prefix(".route(\"")?.split_once("\", ")?;
        let method = rest.split('(').next()?.to_uppercase();
        Some(format!("{method} {path}"))
    };
    let built: BTreeSet<String> = routes.lines().filter_map(route).collect();
    let listed: BTreeSet<String> = column(&readme(), "| request |", 0).into_iter().collect();
    assert_eq!(listed, built);
}

#[test]
fn causes_and_phases_are_all_there_with_their_letters() {
    let rows = table(&readme(), "| cause |");
    let phases: Vec<&str> = Phase::ALL.iter().map(|phase| phase.name()).collect();
    assert_eq!(rows[0][1..=Phase::COUNT], phases);
    assert_eq!(rows.len() - 1, Cause::COUNT);
    for (cause, row) in Cause::ALL.into_iter().zip(&rows[1..]) {
        assert_eq!(row[0], cause.name());
        for (phase, cell) in Phase::ALL.into_iter().zip(&row[1..]) {
            let letters = code(cause, phase);
            let right = cell.is_empty() || cell.as_bytes() == letters;
            assert!(right, "{} in {}: {cell}", cause.name(), phase.name());
        }
    }
}

#[test]
fn every_metric_is_listed_with_its_type_and_labels_and_no_other() {
    let balancer = Balancer::after_one_session();
    let text = balancer
        .metrics_with(&["tidegate_session_seconds_count", "tidegate_backend_heartbeat_phi{"]);
    let mut built: BTreeMap<String, (String, BTreeSet<String>)> = BTreeMap::new();
    let mut open = String::new();
    for line in text.lines() {
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|l| l.split_once(' ')) {
            name.clone_into(&mut open);
            built.insert(open.clone(), (kind.to_owned(), BTreeSet::new()));
        } else if !line.starts_with('#') {
            built.get_mut(&open).unwrap().1.extend(labels(line));
        }
    }
    let listed: BTreeMap<String, (String, BTreeSet<String>)> = table(&readme(), "| metric |")[1..]
        .iter()
        .map(|row| {
            let labels = row[2].split(", ").filter(|label| !label.is_empty());
            (row[0].clone(), (row[1].clone(), labels.map(str::to_owned).collect()))
        })
        .collect();
    assert_eq!(listed, built);
}

/// Names of a sample's labels, without a histogram's `le`.
fn labels(line: &str) -> Vec<String> {
    let inner = line.split_once('{').and_then(|(_, rest)| rest.rsplit_once('}'));
    let all = inner.map_or("", |(inner, _)| inner).split("\",");
    all.filter_map(|label| label.split_once("=\""))
        .map(|(name, _)| name.to_owned())
        .filter(|name| name != "le")
        .collect()
}

#[test]
fn every_field_of_the_access_log_is_listed_in_order() {
    let balancer = Balancer::after_one_session();
    let line = balancer.access_log_line();
    let built: Vec<String> = line
        .trim()
        .trim_matches(['{', '}'])
        .split(",\"")
        .map(|pair| pair.trim_start_matches('"').split_once("\":").unwrap().0.to_owned())
        .collect();
    assert_eq!(column(&readme(), "| field |", 0), built);
}

/// A balancer in this process that has served one session.
struct Balancer {
    running: Option<RunningBalancer>,
    directory: tempfile::TempDir,
    _sender: Sender,
}

impl Balancer {
    fn after_one_session() -> Balancer {
        let directory = tempfile::tempdir().unwrap();
        let backend = TcpListener::bind("127.0.0.1:0").unwrap();
        let frontend = free_address();
        let path = directory.path().join("tidegate.toml");
        let file = |name: &str| directory.path().join(name).display().to_string();
        let (socket, access) = (file("admin.sock"), file("access.log"));
        let to = backend.local_addr().unwrap();
        let key = directory.path().join("hb.key");
        fs::write(&key, [7; 32]).unwrap();
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        let heartbeats = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let text = format!(
            "[process]\nworkers = 1\npin = false\n\
             [admin]\nlisten = \"unix:{socket}\"\n\
             [log]\naccess = \"{access}\"\n\
             [frontend.web]\nbind = [\"{frontend}\"]\npool = \"web\"\n\
             [heartbeat]\nlisten = \"{heartbeats}\"\n\
             [[heartbeat.key]]\nid = 1\nfile = \"{}\"\npools = [\"web\"]\n\
             addresses = [\"127.0.0.0/8\"]\n\
             [pool.web.heartbeat]\n\
             [[pool.web.backend]]\naddress = \"{to}\"\n",
            key.display()
        );
        fs::write(&path, text).unwrap();
        std::thread::spawn(move || serve_one(&backend));
        let options = Options { config: path, signals: false, logging: false };
        let running = daemon::start(options).unwrap();
        let identity = SenderIdentity::new("web", &to.to_string(), to).unwrap();
        let secret = Secret::new(&[7; 32]).unwrap();
        let interval = Duration::from_millis(100);
        let settings =
            SenderSettings { to: vec![heartbeats], identity, key_id: 1, secret, interval };
        talk_once(frontend);
        // Only then: its first heartbeat has the backend asked whether it is there.
        let sender = Sender::start(settings).unwrap();
        sender.set_state(SenderState::Ready);
        Balancer { running: Some(running), directory, _sender: sender }
    }

    /// The metrics, once they hold those series.
    fn metrics_with(&self, series: &[&str]) -> String {
        let requests = self.running.as_ref().unwrap().requests();
        eventually(|| {
            let (reply, answer) = oneshot::channel();
            requests.blocking_send(AdminRequest::Metrics(reply)).unwrap();
            Some(answer.blocking_recv().unwrap())
                .filter(|text| series.iter().all(|series| text.contains(series)))
        })
    }

    fn access_log_line(&self) -> String {
        let path: &Path = &self.directory.path().join("access.log");
        eventually(|| fs::read_to_string(path).ok().filter(|text| text.ends_with('\n')))
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            let (reply, _) = oneshot::channel();
            // It may have failed already, and the test with it.
            let _ = running.requests().blocking_send(AdminRequest::Shutdown(reply));
            running.wait();
        }
    }
}

fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// Answers the first connection that says something.
fn serve_one(listener: &TcpListener) {
    let (mut client, _) = listener.accept().unwrap();
    let mut word = [0u8; 4];
    client.read_exact(&mut word).unwrap();
    client.write_all(b"pong").unwrap();
}

fn talk_once(frontend: SocketAddr) {
    let mut stream = TcpStream::connect(frontend).unwrap();
    stream.write_all(b"ping").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "pong");
}

fn eventually<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    let (_keep, never) = mpsc::channel::<()>();
    let deadline = tidegate_net::clock::now() + SOON;
    loop {
        if let Some(result) = attempt() {
            return result;
        }
        assert!(tidegate_net::clock::now() < deadline, "it did not come within {SOON:?}");
        let _ = never.recv_timeout(Duration::from_millis(10));
    }
}
