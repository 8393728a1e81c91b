//! The Grafana dashboard: a real Prometheus scrapes a balancer, and every query of the dashboard
//! returns data. Grafana itself does not run here.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, connect_from};
use crate::common::http;
use crate::common::ports::free_port;
use crate::common::proxy::PROGRAM;
use crate::common::servers::{Running, find};
use crate::common::{eventually, exclusive, have, ms, patience, secs};
use serde_json::Value;
use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

/// Traffic of the balancer: it finishes sessions, retries, rejects by address and reloads.
struct Scene {
    web: SocketAddr,
    dir: tempfile::TempDir,
    prometheus: SocketAddr,
    _backend: ScriptedBackend,
    _running: [Running; 2],
}

fn local() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()))
}

fn start(program: &Path, arguments: &[String], log: &Path) -> Running {
    let log = std::fs::File::create(log).unwrap();
    let mut command = Command::new(program);
    command.args(arguments).stdout(log.try_clone().unwrap()).stderr(Stdio::from(log));
    Running::start(&mut command)
}

// === impl Scene ===

impl Scene {
    fn start() -> Scene {
        let dir = tempfile::Builder::new().prefix("tg-dash-").tempdir_in("/tmp").unwrap();
        let backend = ScriptedBackend::start(backend::greet("a"));
        let (web, admin, prometheus) = (local(), local(), local());
        let file = |name: &str| dir.path().join(name);
        std::fs::write(file("members.json"), format!("[\"{}\"]", backend.address())).unwrap();
        let text = format!(
            "[process]\nworkers = 1\n[admin]\nlisten = \"{admin}\"\n[log]\naccess = \"{}\"\n\
             [frontend.web]\nbind = \"{web}\"\npool = \"web\"\nsources = {{ deny = \"127.0.0.9\" }}\n\
             [pool.web]\nejection = {{ failures = 1, time = \"1s\" }}\n\
             [pool.web.discover]\nkind = \"file\"\npath = \"{}\"\naddresses = [\"127.0.0.0/8\"]\n\
             [[pool.web.backend]]\nname = \"gone\"\naddress = \"{}\"\n",
            file("access.log").display(),
            file("members.json").display(),
            local()
        );
        std::fs::write(file("tidegate.toml"), text).unwrap();
        let scrape = format!(
            "global: {{ scrape_interval: 250ms, scrape_timeout: 200ms }}\n\
             scrape_configs:\n  - job_name: tidegate\n    static_configs:\n      \
             - targets: [\"{admin}\"]\n"
        );
        std::fs::write(file("prometheus.yml"), scrape).unwrap();
        let config = file("tidegate.toml").display().to_string();
        let arguments = ["run", "--single", "--config", &config].map(str::to_owned);
        let balancer = start(Path::new(PROGRAM), &arguments, &file("tidegate.log"));
        let arguments = [
            format!("--config.file={}", file("prometheus.yml").display()),
            format!("--storage.tsdb.path={}", file("data").display()),
            format!("--web.listen-address={prometheus}"),
        ];
        let scraper = start(&find("prometheus").unwrap(), &arguments, &file("prometheus.log"));
        Scene { web, dir, prometheus, _backend: backend, _running: [balancer, scraper] }
    }

    /// One session that is served, and one that is rejected.
    fn traffic(&self) {
        if let Ok(stream) = client::try_connect(self.web) {
            let _ = client::exchange(&stream, b"?");
        }
        let _ = connect_from([127, 0, 0, 9].into(), self.web).map(|s| client::read_to_end(&s));
    }

    /// Changes the file, so that Tidegate reloads.
    fn change(&self, number: usize) {
        let path = self.dir.path().join("tidegate.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(path, format!("{text}# {number}\n")).unwrap();
    }

    /// Whether a query has a result now.
    fn has_data(&self, query: &str) -> bool {
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let Ok(answer) = http::over_tcp(self.prometheus, &format!("/api/v1/query?query={encoded}"))
        else {
            return false;
        };
        let Ok(answer) = serde_json::from_str::<Value>(&answer.body) else { return false };
        assert_eq!(answer["status"], "success", "{query}: {answer}");
        answer["data"]["result"].as_array().is_some_and(|result| !result.is_empty())
    }
}

/// The queries of all panels, with values for the variables.
fn queries() -> BTreeSet<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/grafana/tidegate.json");
    let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    let queries = targets.map(|target| target["expr"].as_str().unwrap());
    let values = [("$__rate_interval", "5s"), ("$job", ".*"), ("$instance", ".*"), ("$pool", ".*")];
    queries
        .map(|query| {
            values.iter().fold(query.to_owned(), |text, (name, to)| text.replace(name, to))
        })
        .collect()
}

#[test]
fn every_query_of_the_dashboard_returns_data_from_prometheus() {
    let _share = exclusive::shared();
    if !have(&["prometheus"]) {
        return;
    }
    let mut missing = queries();
    assert!(missing.len() > 30, "{missing:?}");
    assert!(missing.iter().all(|query| !query.contains('$')), "{missing:?}");
    let scene = Scene::start();
    eventually(secs(10), "the balancer serves", || client::try_connect(scene.web).is_ok());
    assert!(!scene.has_data("tidegate_no_such_metric"));
    let began = Instant::now();
    for number in 0.. {
        scene.traffic();
        scene.change(number);
        missing.retain(|query| !scene.has_data(query));
        if missing.is_empty() || began.elapsed() > patience(secs(20)) {
            break;
        }
        std::thread::sleep(ms(100));
    }
    assert!(missing.is_empty(), "no data: {missing:#?}");
}
