//! Runs a scene and compares the result with it.
//!
//! Runs all candidates at the same time, step by step, and then compares both ends with the
//! scene. For Tidegate it asserts the ends, the access log and the leak check. For other programs
//! it reports differences. With `TIDEGATE_PEERS` set it reports all outcomes.

use super::candidate::{self, Candidate};
use super::leaks;
use super::site::Site;
use super::{Ended, STEP_MAX, Scene, Seen, Step};
use crate::common::proxy::TestProxy;
use crate::common::{exclusive, ms, patience, report};
use crate::netns::networks_run;
use std::time::Duration;

/// Time after the last step in which no further bytes or ends must arrive.
const AFTERMATH: Duration = ms(50);

/// The result of one candidate.
struct Outcome {
    client: Seen,
    backend: Seen,
    took: Option<Duration>,
    wrong: Option<String>,
    stuck: Option<String>,
}

pub fn play(name: &str, scene: &Scene) {
    let _share = exclusive::shared();
    if !networks_run() {
        return;
    }
    let site = Site::new(name.bytes().map(u64::from).sum());
    let mut candidates = candidate::all(&site, scene);
    let rss: Vec<u64> = candidates
        .iter()
        .map(|candidate| candidate.tidegate().map_or(0, |p| p.rss_kib()))
        .collect();
    for step in scene.steps.iter().copied().flatten() {
        perform(step, &site, &mut candidates);
    }
    each(&mut candidates, |candidate| settle(candidate, scene));
    let outcomes: Vec<Outcome> = candidates.iter().map(Outcome::of).collect();
    for candidate in &mut candidates {
        candidate.ends.client.close();
        candidate.ends.backend.close();
        candidate.ends.listener = None;
    }
    site.repair();
    for (candidate, outcome) in candidates.iter().zip(&outcomes) {
        check(name, scene, candidate, outcome, &site);
    }
    for (candidate, before) in candidates.iter().zip(rss) {
        leaks::assert_none(candidate, &site, before);
    }
}

fn perform(step: &Step, site: &Site, candidates: &mut [Candidate]) {
    match *step {
        Step::Link(leg, way, change) => site.change(leg, way, change),
        Step::Hosts(act) => act(site),
        Step::Pause(time) => each(candidates, |candidate| candidate.ends.pass(time)),
        Step::Mark => {
            let now = std::time::Instant::now();
            candidates.iter_mut().for_each(|candidate| candidate.ends.marked = now);
        }
        Step::Connect => each(candidates, |candidate| {
            candidate.ends.dial(&site.client);
            candidate.ends.accept();
            candidate.wait_established();
        }),
        Step::Dial => each(candidates, |candidate| candidate.ends.dial(&site.client)),
        Step::Accept => each(candidates, |candidate| candidate.ends.accept()),
        Step::Client(act) => {
            each(candidates, |candidate| candidate.ends.act(|ends| &mut ends.client, act))
        }
        Step::Backend(act) => {
            each(candidates, |candidate| candidate.ends.act(|ends| &mut ends.backend, act))
        }
        Step::Each(act) => each(candidates, |candidate| act(candidate, site)),
    }
}

/// Runs `act` for every candidate at the same time.
fn each(candidates: &mut [Candidate], act: impl Fn(&mut Candidate) + Sync) {
    let name = std::thread::current().name().unwrap_or("?").to_string();
    std::thread::scope(|scope| {
        for candidate in candidates {
            let thread = std::thread::Builder::new().name(name.clone());
            thread.spawn_scoped(scope, || act(candidate)).expect("another thread");
        }
    });
}

/// Waits for the expected ends, and a little longer for unexpected ends.
fn settle(candidate: &mut Candidate, scene: &Scene) {
    let comes = |seen: Seen| matches!(seen.end, Ended::Fin | Ended::Reset);
    let (client, backend) = (comes(scene.client), comes(scene.backend));
    candidate.ends.wait("the end", STEP_MAX, |ends| {
        let there = |end: &super::End| matches!(end.ended(), Ended::Fin | Ended::Reset);
        (!client || there(&ends.client)) && (!backend || there(&ends.backend))
    });
    candidate.ends.pass(AFTERMATH);
}

fn check(name: &str, scene: &Scene, candidate: &Candidate, outcome: &Outcome, site: &Site) {
    let problems = outcome.problems(scene, candidate);
    if let Some(proxy) = candidate.tidegate() {
        let log = proxy.access_log();
        assert!(
            problems.is_empty(),
            "{name} on {}: {problems:#?}, by its log: {log:#?}",
            candidate.name
        );
        if !scene.cause.is_empty() {
            // Some scenes have other sessions before the compared session.
            let sessions = proxy.metric("tidegate_sessions_total", &[]) as usize;
            let lines = proxy.wait_access_log(sessions.max(1));
            assert_metrics(proxy, &lines);
            // Lines are in order only per worker.
            let time = |line: &serde_json::Value| line["time"].as_str().unwrap_or("").to_owned();
            let line = lines.into_iter().max_by_key(time).expect("a line in the access log");
            assert_eq!(line["cause"], scene.cause, "{name} on {}: {line:#}", candidate.name);
            assert_counts(scene, candidate, &line);
        }
    }
    if std::env::var_os("TIDEGATE_PEERS").is_none() {
        return;
    }
    report("OUTCOME", &format!("| {name} | {} | {outcome} |", candidate.name));
    if candidate.tidegate().is_none() {
        let mut problems = problems;
        let left = leaks::sockets_left(candidate, site);
        if !left.is_empty() {
            problems.push(format!("{} sockets left: {}", left.len(), left.join(", ")));
        }
        if !problems.is_empty() {
            report("DIFFERS", &format!("{} {name}: {}", candidate.name, problems.join("; ")));
        }
    }
}

/// Bytes of a segment on Ethernet.
const SEGMENT: u64 = 1460;

/// Checks that the access log line matches the counts of both ends.
#[track_caller]
fn assert_counts(scene: &Scene, candidate: &Candidate, line: &serde_json::Value) {
    let (client, backend) = (&candidate.ends.client, &candidate.ends.backend);
    let count = |field: &str| line[field].as_u64().expect("a count");
    let ends = [
        (scene.backend, client, backend, "bytes_in"),
        (scene.client, backend, client, "bytes_out"),
    ];
    let (mut lost, mut missing) = (0, 0);
    for (seen, from, to, field) in ends {
        let counted = count(field);
        if seen.bytes == super::Bytes::All {
            assert_eq!(counted, from.asked_to_send(), "{field} on {}: {line:#}", candidate.name);
        }
        assert!(counted >= to.received(), "{field} on {}: {line:#}", candidate.name);
        assert!(counted <= from.asked_to_send(), "{field} on {}: {line:#}", candidate.name);
        // An end that has read a FIN has received all bytes that its kernel had.
        match to.ended() {
            Ended::Fin => {
                assert_eq!(counted, to.received(), "{field} on {}: {line:#}", candidate.name)
            }
            Ended::Reset => lost += counted - to.received(),
            _ => {}
        }
        missing += from.asked_to_send() - to.received();
    }
    let undelivered = count("bytes_undelivered");
    assert!(undelivered >= lost, "{lost} B lost on {}: {line:#}", candidate.name);
    // An impaired link can lose only the acknowledgement.
    let spoilt = scene.steps.iter().copied().flatten().any(|step| matches!(step, Step::Link(..)));
    // A peer that resets can owe an acknowledgement for less than two segments (RFC 9293
    // 3.8.6.3), and Linux ignores the acknowledgement in the reset.
    let reset = line["cause"].as_str().is_some_and(|cause| cause.ends_with("-reset"));
    let owed = if reset { 2 * SEGMENT } else { 0 };
    let known = missing + owed;
    assert!(spoilt || undelivered <= known, "{missing} B missing on {}: {line:#}", candidate.name);
    if line["cause"] == "finished" {
        assert_eq!(undelivered, 0, "on {}: {line:#}", candidate.name);
    }
}

/// Checks that the metrics match the sum of all log lines.
#[track_caller]
fn assert_metrics(proxy: &TestProxy, lines: &[serde_json::Value]) {
    for (field, direction) in [("bytes_in", "in"), ("bytes_out", "out")] {
        let logged: u64 = lines.iter().map(|line| line[field].as_u64().expect("a count")).sum();
        let counted = proxy.metric("tidegate_bytes_total", &[("direction", direction)]);
        assert_eq!(counted as u64, logged, "{direction}");
    }
}

// === impl Outcome ===

impl Outcome {
    fn of(candidate: &Candidate) -> Outcome {
        let (client, backend) = (&candidate.ends.client, &candidate.ends.backend);
        let wrong =
            [("client", client), ("backend", backend)].into_iter().find_map(|(name, end)| {
                end.wrong_at().map(|at| format!("the {name}'s byte {at} is wrong"))
            });
        Outcome {
            client: Seen::of(client, backend.asked_to_send()),
            backend: Seen::of(backend, client.asked_to_send()),
            took: candidate.ends.first_end(),
            wrong,
            stuck: candidate.ends.stuck.clone(),
        }
    }

    /// Returns the differences from the scene.
    fn problems(&self, scene: &Scene, candidate: &Candidate) -> Vec<String> {
        let mut problems: Vec<String> =
            [&self.wrong, &self.stuck].into_iter().flatten().cloned().collect();
        let (client, backend) = (&candidate.ends.client, &candidate.ends.backend);
        let ends = [
            ("client", self.client, scene.client, client, backend),
            ("backend", self.backend, scene.backend, backend, client),
        ];
        for (name, seen, wanted, end, other) in ends {
            if !seen.matches(wanted, other.asked_to_send()) {
                let (got, of) = (end.received(), other.asked_to_send());
                problems.push(format!("{name}: {seen} ({got} of {of} B), not: {wanted}"));
            }
        }
        let (least, most) = scene.when;
        if let Some(took) = self.took
            && (took < least || took > patience(most))
        {
            problems.push(format!("ended after {took:.2?}, not {least:?} to {most:?}"));
        }
        problems
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(to, "client: {}; backend: {}", self.client, self.backend)?;
        self.wrong.iter().chain(&self.stuck).try_for_each(|what| write!(to, " ({what})"))
    }
}
