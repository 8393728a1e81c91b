//! Metrics, `status` and the access log, compared with the counts of clients and backends.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, End, connect};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, on_every_engine, secs};
use serde_json::Value;
use std::net::Shutdown;
use std::sync::atomic::Ordering;

on_every_engine!(
    counters_match_clients_and_backends,
    access_log_lines_have_every_documented_field,
    sessions_active_counts_open_sessions,
    every_sample_has_a_declared_type_and_closed_labels,
    wrong_path_gives_404_and_wrong_method_405,
    access_log_is_reopened_after_a_rename,
    session_numbers_are_unique_across_an_upgrade,
);

/// Runs one session that sends `up` bytes and receives them back.
fn echo_session(proxy: &TestProxy, up: usize) {
    let client = connect(proxy.addr("web"));
    client::exchange(&client, &vec![5; up]).expect("an echo");
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client::read_to_end(&client), End::Fin(0));
}

fn echo_proxy(engine: Engine) -> (ScriptedBackend, TestProxy) {
    let backend = ScriptedBackend::start(backend::echo());
    let conf = Conf::simple(engine, Pool::new("web").backend("a", backend.address()));
    (backend, TestProxy::start(conf))
}

fn counters_match_clients_and_backends(engine: Engine) {
    let (backend, proxy) = echo_proxy(engine);
    let sizes: Vec<usize> = (0..30).map(|n| n * 1000 + 1).collect();
    let bytes: usize = sizes.iter().sum();
    sizes.iter().for_each(|up| echo_session(&proxy, *up));
    let log = proxy.wait_access_log(30);
    eventually(secs(5), "every session is counted", || {
        proxy.metric("tidegate_session_end_total", &[]) == 30.0
    });
    assert_eq!(backend.counts().bytes_read.load(Ordering::Relaxed), bytes as u64);
    let metric = |name: &str, labels: &[(&str, &str)]| proxy.metric(name, labels) as usize;
    assert_eq!(metric("tidegate_sessions_total", &[]), 30);
    assert_eq!(metric("tidegate_sessions_active", &[]), 0);
    let finished = [("cause", "finished"), ("phase", "closed")];
    assert_eq!(metric("tidegate_session_end_total", &finished), 30);
    for direction in ["in", "out"] {
        let labels = [("direction", direction)];
        assert_eq!(metric("tidegate_bytes_total", &labels), bytes, "{direction}");
    }
    assert_eq!(metric("tidegate_connect_seconds_count", &[]), 30);
    assert_eq!(metric("tidegate_session_seconds_count", &[]), 30);
    let (front, back) = (proxy.frontend("web"), proxy.backend("web", "a"));
    for place in [&front, &back] {
        assert_eq!(place["sessions_total"], 30, "{place:#}");
        assert_eq!(place["bytes_in_total"], bytes, "{place:#}");
        assert_eq!(place["bytes_out_total"], bytes, "{place:#}");
    }
    let logged = |field: &str| log.iter().map(|line| line[field].as_u64().unwrap()).sum::<u64>();
    assert_eq!((logged("bytes_in"), logged("bytes_out")), (bytes as u64, bytes as u64));
}

fn access_log_lines_have_every_documented_field(engine: Engine) {
    let (backend, proxy) = echo_proxy(engine);
    let client = connect(proxy.addr("web"));
    let from = client.local_addr().unwrap().to_string();
    client::exchange(&client, b"hello").unwrap();
    drop(client);
    let line = &proxy.wait_access_log(1)[0];
    for (field, value) in [
        ("frontend", Value::from("web")),
        ("pool", "web".into()),
        ("backend", "a".into()),
        ("backend_address", backend.address().into()),
        ("client", from.into()),
        ("cause", "finished".into()),
        ("phase", "closed".into()),
        ("code", "--".into()),
        ("closed_first", "client".into()),
        ("attempts", 1.into()),
        ("generation", 1.into()),
        ("bytes_in", 5.into()),
        ("bytes_out", 5.into()),
    ] {
        assert_eq!(line[field], value, "{field} in {line:#}");
    }
    for field in ["time", "session", "worker", "timer", "errno"] {
        assert!(line.get(field).is_some(), "{field} in {line:#}");
    }
    let seconds = ["connect_seconds", "first_byte_seconds", "duration_seconds"]
        .map(|field| line[field].as_f64().unwrap_or_else(|| panic!("{field} in {line:#}")));
    assert!(seconds[0] <= seconds[2] && seconds[1] <= seconds[2], "{line:#}");
}

fn session_numbers_are_unique_across_an_upgrade(engine: Engine) {
    let (_backend, mut proxy) = echo_proxy(engine);
    let numbers = |proxy: &TestProxy, count: usize| {
        let lines = proxy.wait_access_log(count);
        lines.iter().map(|line| line["session"].as_u64().unwrap()).collect::<Vec<u64>>()
    };
    (0..100).for_each(|_| echo_session(&proxy, 1));
    let before = numbers(&proxy, 100);
    assert!(before.iter().all(|number| (1..1000).contains(number)), "{before:?}");
    let old = proxy.upgrade();
    proxy.wait_gone(old, secs(10));
    (0..100).for_each(|_| echo_session(&proxy, 1));
    let mut all = numbers(&proxy, 200);
    all.sort_unstable();
    assert!(all.windows(2).all(|pair| pair[0] < pair[1]), "a number is used twice: {all:?}");
    assert!(all[100] > before[99] && all[199] < 2_000_000, "{all:?}");
}

fn sessions_active_counts_open_sessions(engine: Engine) {
    let (_backend, proxy) = echo_proxy(engine);
    let open: Vec<_> = (0..7)
        .map(|_| {
            let client = connect(proxy.addr("web"));
            client::exchange(&client, b"x").unwrap();
            client
        })
        .collect();
    assert_eq!(proxy.metric("tidegate_sessions_active", &[]), 7.0);
    assert_eq!(proxy.frontend("web")["sessions_active"], 7);
    assert_eq!(proxy.backend("web", "a")["sessions_active"], 7);
    drop(open);
    eventually(secs(5), "the gauge is back at 0", || {
        proxy.metric("tidegate_sessions_active", &[]) == 0.0
    });
}

/// Labels that the documentation allows.
const LABELS: [&str; 15] = [
    "frontend",
    "pool",
    "backend",
    "worker",
    "cause",
    "layer",
    "phase",
    "direction",
    "reason",
    "result",
    "engine",
    "version",
    "le",
    "at",
    "source",
];

fn every_sample_has_a_declared_type_and_closed_labels(engine: Engine) {
    let (_backend, proxy) = echo_proxy(engine);
    echo_session(&proxy, 10);
    let answer = proxy.admin_request("GET", "/metrics");
    assert_eq!(answer.status, 200);
    let declared: Vec<&str> = answer
        .body
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .collect();
    for line in answer.body.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let name = line.split(['{', ' ']).next().unwrap();
        let family = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|suffix| name.strip_suffix(suffix))
            .filter(|family| declared.contains(family))
            .unwrap_or(name);
        assert!(declared.contains(&family), "no # TYPE for {line}");
        // `process_` is the prefix that Prometheus defines for values of any process.
        assert!(name.starts_with("tidegate_") || name.starts_with("process_"), "{line}");
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap_or_else(|_| panic!("{line}"));
        let Some((_, rest)) = line.split_once('{') else { continue };
        let (set, _) = rest.rsplit_once('}').expect("a closing brace");
        for label in set.split("\",").filter(|label| !label.is_empty()) {
            let key = label.split('=').next().unwrap();
            assert!(LABELS.contains(&key), "label {key:?} in {line}");
        }
    }
}

fn wrong_path_gives_404_and_wrong_method_405(engine: Engine) {
    let (_backend, proxy) = echo_proxy(engine);
    for (method, path, status) in [
        ("GET", "/nowhere", 404),
        ("POST", "/metrics", 405),
        ("GET", "/v1/reload", 405),
        ("POST", "/v1/pools/web/backends/unknown/drain", 404),
        ("GET", "/live", 200),
        ("GET", "/ready", 200),
    ] {
        let answer = proxy.admin_request(method, path);
        assert_eq!(answer.status, status, "{method} {path}: {}", answer.body);
        if status >= 400 {
            assert!(answer.json()["error"].is_string(), "{method} {path}: {}", answer.body);
        }
    }
}

fn access_log_is_reopened_after_a_rename(engine: Engine) {
    let (_backend, proxy) = echo_proxy(engine);
    echo_session(&proxy, 1);
    proxy.wait_access_log(1);
    let (current, moved) = (proxy.dir().join("access.log"), proxy.dir().join("access.log.1"));
    std::fs::rename(&current, &moved).unwrap();
    // One line can still go to the old file before the new file exists.
    eventually(secs(10), "lines go to a new file", || {
        echo_session(&proxy, 1);
        current.exists() && !proxy.access_log().is_empty()
    });
}
