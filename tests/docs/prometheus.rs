//! Checks a scrape and the files for Prometheus with `promtool`.

use crate::balancer::Balancer;
use crate::pages::root;
use std::io::Write;
use std::process::{Command, Output, Stdio};

/// Runs `promtool` in the folder of the examples; `None` if this host has no `promtool`. In CI
/// a missing `promtool` fails the test.
fn promtool(arguments: &[&str], input: &str) -> Option<Output> {
    let started = Command::new("promtool")
        .args(arguments)
        .current_dir(root().join("examples/prometheus"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut child) = started else {
        assert!(std::env::var_os("CI").is_none(), "no promtool");
        eprintln!("skipped: no promtool");
        return None;
    };
    // This fails if the program exits without reading its input.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    Some(child.wait_with_output().unwrap())
}

#[track_caller]
fn assert_accepted(arguments: &[&str], input: &str) {
    if let Some(checked) = promtool(arguments, input) {
        let said = String::from_utf8_lossy(&checked.stderr);
        assert!(checked.status.success(), "promtool {arguments:?}: {said}");
    }
}

#[test]
fn promtool_accepts_the_rules_and_the_scrape_configuration() {
    assert_accepted(&["check", "rules", "alerts.yml"], "");
    assert_accepted(&["check", "config", "scrape.yml"], "");
}

#[test]
fn every_alert_is_silent_at_first_and_fires_later() {
    assert_accepted(&["test", "rules", "alerts_test.yml"], "");
    let read = |name: &str| {
        std::fs::read_to_string(root().join("examples/prometheus").join(name)).unwrap()
    };
    let tests = read("alerts_test.yml");
    for line in read("alerts.yml").lines() {
        if let Some((_, alert)) = line.split_once("- alert: ") {
            let tested = tests.matches(&format!("alertname: {alert}\n")).count();
            assert_eq!(tested, 2, "{alert}");
        }
    }
}

#[test]
fn promtool_accepts_a_scrape_of_a_balancer() {
    let balancer = Balancer::after_one_session();
    // These histograms and series exist only after a session and a heartbeat.
    balancer.metrics_with(&["tidegate_session_seconds_count", "tidegate_backend_heartbeat_phi{"]);
    let scrape = balancer.scrape();
    assert!(scrape.lines().count() > 200, "{scrape}");
    assert_accepted(&["check", "metrics"], &scrape);
}

#[test]
fn promtool_finds_an_error_in_metrics() {
    let checked = promtool(&["check", "metrics"], "# TYPE a_total counter\na_total{ 1\n");
    assert!(checked.is_none_or(|checked| !checked.status.success()));
}
