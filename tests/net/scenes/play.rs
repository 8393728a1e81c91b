//! Plays a scene and judges what came of it.
//!
//! Step by step, every candidate at once; then each one's ends are held against
//! the scene. Ours is asserted, with its account of the session and what it left
//! behind; peers that differ are reported, and all outcomes are where the
//! comparison was asked for. It knows no scene.

use super::candidate::{self, Candidate};
use super::leaks;
use super::site::Site;
use super::{Ended, STEP_MAX, Scene, Seen, Step};
use crate::common::proxy::TestProxy;
use crate::common::{exclusive, ms, patience, report};
use crate::netns::networks_run;
use std::time::Duration;

/// What the runner waits after the last word for words too many.
const AFTERMATH: Duration = ms(50);

/// What came of it at one candidate.
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
    let rss: Vec<u64> =
        candidates.iter().map(|one| one.ours().map_or(0, |p| p.rss_kib())).collect();
    for step in scene.steps.iter().copied().flatten() {
        perform(step, &site, &mut candidates);
    }
    each(&mut candidates, |one| settle(one, scene));
    let outcomes: Vec<Outcome> = candidates.iter().map(Outcome::of).collect();
    for one in &mut candidates {
        one.duet.client.close();
        one.duet.backend.close();
        one.duet.listener = None;
    }
    site.mend();
    for (one, outcome) in candidates.iter().zip(&outcomes) {
        judge(name, scene, one, outcome, &site);
    }
    for (one, before) in candidates.iter().zip(rss) {
        leaks::assert_none(one, &site, before);
    }
}

fn perform(step: &Step, site: &Site, candidates: &mut [Candidate]) {
    match *step {
        Step::Link(leg, way, change) => site.change(leg, way, change),
        Step::Hosts(act) => act(site),
        Step::Pause(time) => each(candidates, |one| one.duet.pass(time)),
        Step::Mark => {
            let now = std::time::Instant::now();
            candidates.iter_mut().for_each(|one| one.duet.marked = now);
        }
        Step::Connect => each(candidates, |one| {
            one.duet.dial(&site.client);
            one.duet.accept();
            one.wait_established();
        }),
        Step::Dial => each(candidates, |one| one.duet.dial(&site.client)),
        Step::Accept => each(candidates, |one| one.duet.accept()),
        Step::Client(act) => each(candidates, |one| one.duet.act(|duet| &mut duet.client, act)),
        Step::Backend(act) => each(candidates, |one| one.duet.act(|duet| &mut duet.backend, act)),
        Step::Each(act) => each(candidates, |one| act(one, site)),
    }
}

/// At every candidate at once.
fn each(candidates: &mut [Candidate], act: impl Fn(&mut Candidate) + Sync) {
    let name = std::thread::current().name().unwrap_or("?").to_string();
    std::thread::scope(|scope| {
        for one in candidates {
            let thread = std::thread::Builder::new().name(name.clone());
            thread.spawn_scoped(scope, || act(one)).expect("one more thread");
        }
    });
}

/// Waits for the ends that are to come, and a little for any that are not.
fn settle(one: &mut Candidate, scene: &Scene) {
    let comes = |seen: Seen| matches!(seen.end, Ended::Fin | Ended::Reset);
    let (client, backend) = (comes(scene.client), comes(scene.backend));
    one.duet.wait("the end", STEP_MAX, |duet| {
        let there = |end: &super::End| matches!(end.ended(), Ended::Fin | Ended::Reset);
        (!client || there(&duet.client)) && (!backend || there(&duet.backend))
    });
    one.duet.pass(AFTERMATH);
}

fn judge(name: &str, scene: &Scene, one: &Candidate, outcome: &Outcome, site: &Site) {
    let problems = outcome.problems(scene, one);
    if let Some(proxy) = one.ours() {
        let log = proxy.access_log();
        assert!(problems.is_empty(), "{name} on {}: {problems:#?}, by its log: {log:#?}", one.name);
        if !scene.cause.is_empty() {
            // Some scenes have a session before the one that is judged.
            let sessions = proxy.metric("tidegate_sessions_total", &[]) as usize;
            let lines = proxy.wait_access_log(sessions.max(1));
            assert_metrics(proxy, &lines);
            // Each worker writes its own in order.
            let time = |line: &serde_json::Value| line["time"].as_str().unwrap_or("").to_owned();
            let line = lines.into_iter().max_by_key(time).expect("there is one");
            assert_eq!(line["cause"], scene.cause, "{name} on {}: {line:#}", one.name);
            assert_counts(scene, one, &line);
        }
    }
    if std::env::var_os("TIDEGATE_PEERS").is_none() {
        return;
    }
    report("OUTCOME", &format!("| {name} | {} | {outcome} |", one.name));
    if one.ours().is_none() {
        let mut problems = problems;
        let left = leaks::sockets_left(one, site);
        if !left.is_empty() {
            problems.push(format!("{} sockets left: {}", left.len(), left.join(", ")));
        }
        if !problems.is_empty() {
            report("DIFFERS", &format!("{} {name}: {}", one.name, problems.join("; ")));
        }
    }
}

/// Bytes of a segment on Ethernet.
const SEGMENT: u64 = 1460;

/// The account says what the ends know.
#[track_caller]
fn assert_counts(scene: &Scene, one: &Candidate, line: &serde_json::Value) {
    let (client, backend) = (&one.duet.client, &one.duet.backend);
    let count = |field: &str| line[field].as_u64().expect("a count");
    let ends = [
        (scene.backend, client, backend, "bytes_in"),
        (scene.client, backend, client, "bytes_out"),
    ];
    let (mut lost, mut missing) = (0, 0);
    for (seen, from, to, field) in ends {
        let counted = count(field);
        if seen.bytes == super::Bytes::All {
            assert_eq!(counted, from.asked_to_send(), "{field} on {}: {line:#}", one.name);
        }
        assert!(counted >= to.received(), "{field} on {}: {line:#}", one.name);
        assert!(counted <= from.asked_to_send(), "{field} on {}: {line:#}", one.name);
        // Who has read up to an end has all that its kernel had.
        match to.ended() {
            Ended::Fin => assert_eq!(counted, to.received(), "{field} on {}: {line:#}", one.name),
            Ended::Reset => lost += counted - to.received(),
            _ => {}
        }
        missing += from.asked_to_send() - to.received();
    }
    let undelivered = count("bytes_undelivered");
    assert!(undelivered >= lost, "{lost} B lost on {}: {line:#}", one.name);
    // A bad cable may have lost the acknowledgement alone.
    let spoilt = scene.steps.iter().copied().flatten().any(|step| matches!(step, Step::Link(..)));
    // So may a peer that resets: it owes one for less than two segments (RFC 9293 3.8.6.3),
    // and the one that its reset carries is not taken in Linux.
    let reset = line["cause"].as_str().is_some_and(|cause| cause.ends_with("-reset"));
    let owed = if reset { 2 * SEGMENT } else { 0 };
    let known = missing + owed;
    assert!(spoilt || undelivered <= known, "{missing} B missing on {}: {line:#}", one.name);
    if line["cause"] == "finished" {
        assert_eq!(undelivered, 0, "on {}: {line:#}", one.name);
    }
}

/// The metrics say what the log says, all its lines together.
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
    fn of(one: &Candidate) -> Outcome {
        let (client, backend) = (&one.duet.client, &one.duet.backend);
        let wrong =
            [("client", client), ("backend", backend)].into_iter().find_map(|(name, end)| {
                end.wrong_at().map(|at| format!("the {name}'s byte {at} is wrong"))
            });
        Outcome {
            client: Seen::of(client, backend.asked_to_send()),
            backend: Seen::of(backend, client.asked_to_send()),
            took: one.duet.first_end(),
            wrong,
            stuck: one.duet.stuck.clone(),
        }
    }

    /// Where it is not as the scene says.
    fn problems(&self, scene: &Scene, one: &Candidate) -> Vec<String> {
        let mut problems: Vec<String> =
            [&self.wrong, &self.stuck].into_iter().flatten().cloned().collect();
        let (client, backend) = (&one.duet.client, &one.duet.backend);
        let ends = [
            ("client", self.client, scene.client, client, backend),
            ("backend", self.backend, scene.backend, backend, client),
        ];
        for (name, seen, wanted, end, other) in ends {
            if !seen.is_as(wanted, other.asked_to_send()) {
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
