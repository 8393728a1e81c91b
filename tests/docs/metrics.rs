//! Generates the tables of `docs/metrics.md` from the metrics of a balancer that has served one
//! session: name, type, labels and HELP, by area.

use crate::balancer::Balancer;
use crate::generated::cell;
use crate::pages::{page, pages};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

#[derive(Default)]
struct Metric {
    name: String,
    kind: String,
    help: String,
    /// The values of each label, in order of appearance.
    labels: BTreeMap<String, Vec<String>>,
}

/// Labels with values from a fixed set. Every value has a sample from the start.
const FIXED: [&str; 8] =
    ["reason", "result", "at", "direction", "layer", "state", "task", "transport"];

const AREAS: [&str; 8] = [
    "Process",
    "Frontends",
    "Pools",
    "Backends",
    "Heartbeats",
    "Names and discovery",
    "Workers",
    "Standard process metrics",
];

pub(crate) fn text() -> String {
    let balancer = Balancer::after_one_session();
    let text = balancer.metrics_with(&[
        "tidegate_session_seconds_count",
        "tidegate_backend_heartbeat_phi{",
        "tidegate_discovery_view_age_seconds{",
        "tidegate_discovery_failures_total{",
    ]);
    let all = parse(&text);
    assert!(all.len() > 60, "the metrics are found");
    let mut out = String::new();
    for area in AREAS {
        let own: Vec<&Metric> = all.iter().filter(|metric| metric.area() == area).collect();
        assert!(!own.is_empty(), "{area}");
        let _ = writeln!(out, "## {area}\n\n| metric | type | labels | HELP |\n|---|---|---|---|");
        for metric in own {
            let Metric { name, kind, help, .. } = metric;
            let _ = writeln!(out, "| `{name}` | {kind} | {} | {} |", metric.labels(), cell(help));
        }
        let _ = writeln!(out);
    }
    out
}

fn parse(text: &str) -> Vec<Metric> {
    let mut all: Vec<Metric> = Vec::new();
    for line in text.lines() {
        if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|l| l.split_once(' ')) {
            let (name, help) = (name.to_owned(), help.to_owned());
            all.push(Metric { name, help, ..Metric::default() });
        } else if let Some((_, kind)) =
            line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            kind.clone_into(&mut all.last_mut().unwrap().kind);
        } else {
            let last = all.last_mut().unwrap();
            for (name, value) in sample_labels(line) {
                let values = last.labels.entry(name).or_default();
                if !values.contains(&value) {
                    values.push(value);
                }
            }
        }
    }
    all
}

/// Names and values of the labels of a sample, without `le`.
fn sample_labels(line: &str) -> Vec<(String, String)> {
    let inner = line.split_once('{').and_then(|(_, rest)| rest.rsplit_once('}'));
    let all = inner.map_or("", |(inner, _)| inner).split("\",");
    all.filter_map(|label| label.split_once("=\""))
        .filter(|(name, _)| *name != "le")
        .map(|(name, value)| (name.to_owned(), value.trim_end_matches('"').to_owned()))
        .collect()
}

// === impl Metric ===

impl Metric {
    /// The area to which its series belong.
    fn area(&self) -> &'static str {
        let labels: BTreeSet<&str> = self.labels.keys().map(String::as_str).collect();
        let has = |label: &str| labels.contains(label);
        match self.name.as_str() {
            name if name.starts_with("process_") => "Standard process metrics",
            name if name.contains("heartbeat") => "Heartbeats",
            name if ["discovery", "members", "resolver"].iter().any(|part| name.contains(part)) => {
                "Names and discovery"
            }
            _ if has("backend") => "Backends",
            _ if has("pool") => "Pools",
            _ if has("frontend") => "Frontends",
            _ if has("worker") => "Workers",
            _ => "Process",
        }
    }

    /// Its labels. Labels of fixed sets have their values.
    fn labels(&self) -> String {
        let order = |name: &str| match name {
            "frontend" | "pool" => 0,
            "backend" | "worker" => 1,
            _ => 2,
        };
        let mut labels: Vec<(&String, &Vec<String>)> = self.labels.iter().collect();
        labels.sort_by_key(|(name, _)| order(name));
        let one = |(name, values): (&String, &Vec<String>)| match FIXED.contains(&name.as_str()) {
            true => format!("`{name}`: {}", values.join(", ")),
            false => format!("`{name}`"),
        };
        labels.into_iter().map(one).collect::<Vec<_>>().join("; ")
    }
}

#[test]
fn metrics_parse_with_their_labels() {
    let all =
        parse("# HELP a_total A.\n# TYPE a_total counter\na_total{at=\"x\",pool=\"p,q\"} 1\n");
    let metric = &all[0];
    assert_eq!((metric.name.as_str(), metric.kind.as_str()), ("a_total", "counter"));
    assert_eq!((metric.area(), metric.labels().as_str()), ("Pools", "`pool`; `at`: x"));
}

#[test]
fn every_metric_named_in_the_tree_exists() {
    let known: BTreeSet<String> = page("docs/metrics.md")
        .lines()
        .filter_map(|line| line.strip_prefix("| `"))
        .filter_map(|rest| Some(rest.split_once("` | ")?.0.to_owned()))
        .collect();
    let mut files = pages();
    // These files also name compiler flags with this prefix.
    files.retain(|file| !file.starts_with("docs/contributing"));
    files.push("examples/prometheus/alerts.yml".to_owned());
    let mut named = 0;
    for file in files {
        for name in names(&page(&file)) {
            let series = ["_bucket", "_sum", "_count"];
            let family = series.iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
            named += 1;
            assert!(known.contains(name) || known.contains(family), "{file}: {name}");
        }
    }
    assert!(named > 100, "names are found");
}

/// Words that are names of metrics. Names of Rust packages have `::` after them.
fn names(text: &str) -> Vec<&str> {
    let is_word = |c: char| c.is_ascii_lowercase() || c == '_';
    let starts = text.match_indices("tidegate_");
    starts
        .map(|(at, _)| {
            let end = text[at..].find(|c| !is_word(c)).map_or(text.len(), |end| at + end);
            (&text[at..end], &text[end..])
        })
        .filter(|(_, rest)| !rest.starts_with("::"))
        .map(|(name, _)| name)
        .collect()
}
