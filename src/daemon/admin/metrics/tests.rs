//! Tests of the metrics text with a strict parser of the format.

use super::*;
use crate::admin::process::ProcessFacts;
use crate::admin::snapshot::ReloadCounts;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tidegate_core::control::{ControlStatus, PoolStatus, PublishReason};
use tidegate_core::metrics::histograms::{MergedHistograms, Recorder};
use tidegate_core::model::BackendAddr;
use tidegate_core::table::state::{BackendId, BackendState, FrontendId, FrontendState};
use tidegate_net::clock;

const WORKERS: usize = 2;

fn backend(id: u32, pool: &str, name: &str) -> BackendStatus {
    let address = BackendAddr::Tcp("10.0.0.1:80".parse().unwrap());
    let state = BackendState::new(BackendId(id), pool.into(), name.into(), address, WORKERS);
    state.counters.of(0).sessions.add(3);
    state.counters.of(1).sessions.add(4);
    state.counters.of(1).bytes_out.add(100);
    BackendStatus::plain(state, clock::now())
}

fn control() -> ControlStatus {
    let frontend =
        FrontendState::new(FrontendId(0), "we\"b\\\n".into(), WORKERS, RefusedReason::COUNT);
    frontend.counters.of(1).refused.cell(RefusedReason::QueueTimeout as usize, 0).add(2);
    let mut down = backend(2, "web", "b");
    down.observation = Observation::Down;
    down.eligible = false;
    ControlStatus {
        generation: 5,
        frontends: vec![FrontendStatus {
            state: Arc::new(frontend),
            binds: vec![],
            pool: "web".into(),
            connections_max: 0,
        }],
        pools: vec![
            PoolStatus::plain("web", vec![backend(1, "web", "a"), down]),
            PoolStatus::plain("api", vec![backend(3, "api", "a")]),
        ],
        published: PublishReason::ALL.map(|reason| (reason, 3)).to_vec(),
        heartbeat: None,
        // The same pool and name as a configured backend, whose series must not repeat.
        leaving: vec![Arc::clone(&backend(9, "web", "a").state)],
    }
}

fn latency() -> MergedHistograms {
    let (mut recorder, mut merged) = (Recorder::new(), MergedHistograms::new());
    for micros in [20, 300, 4_000, 5_000_000_000] {
        recorder.record(1, Series::Connect, Duration::from_micros(micros));
        recorder.record(3, Series::Session, Duration::from_micros(micros));
    }
    merged.absorb(recorder.take().unwrap());
    merged
}

fn text() -> String {
    text_of(100)
}

fn text_of(backend_metrics_max: usize) -> String {
    let workers: Vec<_> =
        (0..WORKERS).map(|_| Arc::new(WorkerCounters::new(Cause::COUNT, Phase::COUNT))).collect();
    workers[0].accepted.add(9);
    workers[0].ended.add(4);
    workers[1].session_end.cell(Cause::ClientReset as usize, Phase::Connect as usize).add(1);
    workers[1].count_local_error(LocalErrorKind::Ports, LocalErrorPlace::Connect);
    workers[1]
        .local_errors
        .cell(LocalErrorKind::Ports as usize, LocalErrorPlace::Connect as usize)
        .add(6);
    workers[1].ring_events.cell(RingEvent::Resumed as usize, 0).add(3);
    let snapshot = AdminSnapshot {
        workers,
        reloads: ReloadCounts { changed: 1, unchanged: 2, refused: 3 },
        transitions_unlogged: 5,
        upgrades: crate::admin::UpgradeCounts { done: 4, failed: 5, refused: 6 },
        warnings: Vec::new(),
        backend_metrics_max,
        ..AdminSnapshot::plain(control(), clock::now())
    };
    let process = ProcessFacts { open_fds: Some(7), ..ProcessFacts::default() };
    render(&snapshot, &latency(), &process)
}

type Labels = BTreeMap<String, String>;

/// Parsed metrics. The parser panics on text that the format does not allow.
#[derive(Default)]
struct Parsed {
    kinds: HashMap<String, String>,
    samples: HashMap<(String, Labels), f64>,
}

impl Parsed {
    fn parse(text: &str) -> Parsed {
        assert!(text.ends_with('\n'));
        let mut parsed = Parsed::default();
        let (mut helped, mut open) = (String::new(), String::new());
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').expect(line);
                assert!(!help.is_empty() && !parsed.kinds.contains_key(name), "{line}");
                helped = name.to_owned();
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').expect(line);
                assert_eq!(name, helped, "TYPE follows its HELP");
                assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
                parsed.kinds.insert(name.to_owned(), kind.to_owned());
                open = name.to_owned();
            } else {
                parsed.sample(line, &open);
            }
        }
        parsed
    }

    fn sample(&mut self, line: &str, open: &str) {
        let (series, value) = line.rsplit_once(' ').expect(line);
        let value: f64 = value.parse().expect(line);
        let (name, labels) = match series.split_once('{') {
            Some((name, rest)) => (name, labels(rest.strip_suffix('}').expect(line))),
            None => (series, Labels::new()),
        };
        let suffix = name.strip_prefix(open).expect("samples follow their family");
        match self.kinds[open].as_str() {
            "histogram" => assert!(["_bucket", "_sum", "_count"].contains(&suffix), "{line}"),
            _ => assert!(suffix.is_empty(), "{line}"),
        }
        let before = self.samples.insert((name.to_owned(), labels), value);
        assert!(before.is_none(), "repeated series: {line}");
    }

    fn get(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let labels = labels.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect();
        *self.samples.get(&(name.to_owned(), labels)).unwrap_or_else(|| panic!("no {name}"))
    }
}

fn labels(mut text: &str) -> Labels {
    let mut labels = Labels::new();
    while !text.is_empty() {
        let (name, rest) = text.split_once("=\"").expect(text);
        assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{name}");
        let (mut value, mut characters) = (String::new(), rest.char_indices());
        let end = loop {
            match characters.next().expect("a closing quote") {
                (at, '"') => break at,
                (_, '\\') => value.push(match characters.next().expect("an escaped character").1 {
                    'n' => '\n',
                    escaped @ ('\\' | '"') => escaped,
                    other => panic!("unknown escape {other}"),
                }),
                (_, other) => value.push(other),
            }
        };
        assert!(labels.insert(name.to_owned(), value).is_none(), "label {name} twice");
        text = &rest[end + 1..];
        text = text.strip_prefix(',').unwrap_or(text);
    }
    labels
}

#[test]
fn text_is_well_formed_and_has_only_known_labels() {
    let parsed = Parsed::parse(&text());
    let known = [
        "frontend",
        "pool",
        "backend",
        "worker",
        "cause",
        "layer",
        "phase",
        "direction",
        "reason",
        "at",
        "source",
        "result",
        "engine",
        "version",
        "le",
    ];
    for (name, labels) in parsed.samples.keys() {
        assert!(labels.keys().all(|label| known.contains(&label.as_str())), "{name} {labels:?}");
    }
}

#[test]
fn backends_above_backend_metrics_max_have_no_series_and_are_counted() {
    let (whole, cut) = (Parsed::parse(&text_of(3)), Parsed::parse(&text_of(2)));
    let of_backends = |parsed: &Parsed| {
        let labels = parsed.samples.keys().filter(|(_, labels)| labels.contains_key("backend"));
        labels.count()
    };
    assert_eq!(whole.get("tidegate_backend_metrics_omitted", &[]), 0.0);
    assert_eq!(cut.get("tidegate_backend_metrics_omitted", &[]), 3.0);
    assert!(of_backends(&whole) > 0);
    assert_eq!(of_backends(&cut), 0);
    let others = |parsed: &Parsed| -> Vec<(String, Labels)> {
        let all = parsed.samples.keys().filter(|(_, labels)| !labels.contains_key("backend"));
        let mut all: Vec<_> = all.cloned().collect();
        all.sort();
        all
    };
    assert_eq!(others(&whole), others(&cut), "other series stay");
}

#[test]
fn histograms_are_cumulative_and_end_with_their_count() {
    let parsed = Parsed::parse(&text());
    let labels = [("pool", "web"), ("backend", "a")];
    let mut buckets: Vec<(f64, f64)> = parsed
        .samples
        .iter()
        .filter(|((name, _), _)| name == "tidegate_connect_seconds_bucket")
        .map(|((_, labels), count)| (labels["le"].parse().unwrap(), *count))
        .collect();
    buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
    assert_eq!(buckets.len(), BOUNDS_SECONDS.len() + 1);
    assert!(buckets.is_sorted_by(|a, b| a.1 <= b.1), "{buckets:?}");
    assert_eq!(buckets[0], (0.00005, 1.0));
    assert_eq!(buckets[buckets.len() - 1], (f64::INFINITY, 4.0));
    assert_eq!(parsed.get("tidegate_connect_seconds_count", &labels), 4.0);
    assert_eq!(parsed.get("tidegate_connect_seconds_sum", &labels), 5000.00432);
}

#[test]
fn counters_are_summed_and_leaving_backends_repeat_no_series() {
    let parsed = Parsed::parse(&text());
    let a = [("pool", "web"), ("backend", "a")];
    assert_eq!(parsed.get("tidegate_backend_sessions_total", &a), 7.0);
    let out = [("pool", "web"), ("backend", "a"), ("direction", "out")];
    assert_eq!(parsed.get("tidegate_backend_bytes_total", &out), 100.0);
    assert_eq!(parsed.get("tidegate_leaving_backends", &[]), 1.0);
    let refused = [("frontend", "we\"b\\\n"), ("reason", "queue-timeout")];
    assert_eq!(parsed.get("tidegate_refused_total", &refused), 2.0);
    assert_eq!(parsed.get("tidegate_worker_active", &[("worker", "0")]), 5.0);
    assert_eq!(
        parsed.get("tidegate_local_errors_total", &[("reason", "ports"), ("at", "connect")]),
        7.0
    );
    let resumed = |worker| [("worker", worker), ("reason", "resumed")];
    assert_eq!(parsed.get("tidegate_ring_events_total", &resumed("1")), 3.0);
    assert_eq!(parsed.get("tidegate_ring_events_total", &resumed("0")), 0.0);
}

#[test]
fn up_shows_observation_and_eligible_shows_the_result() {
    let parsed = Parsed::parse(&text());
    for (name, up) in [("a", 1.0), ("b", 0.0)] {
        let labels = [("pool", "web"), ("backend", name)];
        assert_eq!(parsed.get("tidegate_backend_up", &labels), up);
        assert_eq!(parsed.get("tidegate_backend_eligible", &labels), up);
    }
}

#[test]
fn session_ends_have_usual_phases_and_counted_phases() {
    let parsed = Parsed::parse(&text());
    let cells = || parsed.samples.keys().filter(|(name, _)| name == "tidegate_session_end_total");
    assert_eq!(cells().count(), Cause::COUNT + 1);
    let unusual = [("cause", "client-reset"), ("phase", "connect")];
    assert_eq!(parsed.get("tidegate_session_end_total", &unusual), 1.0);
    let usual = [("cause", "finished"), ("phase", "closed")];
    assert_eq!(parsed.get("tidegate_session_end_total", &usual), 0.0);
}

#[test]
fn missing_kernel_facts_have_no_series() {
    let text = text();
    assert!(text.contains("\nprocess_open_fds 7\n"));
    assert!(!text.contains("process_max_fds") && !text.contains("process_cpu"));
}
