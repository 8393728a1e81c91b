//! Compares facts in the pages for operators with the program: defaults, constants and words.

use crate::generated::hand_written;
use crate::pages::{blocks, column, page, pages, prose, sources, table};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;
use tidegate_config::{BACKENDS_MAX, BINDS_MAX, FILE_BYTES_MAX, FRONTENDS_MAX, POOLS_MAX};
use tidegate_core::balance::{Balancer, Candidate, PickKey};
use tidegate_core::control::HeartbeatIgnored;
use tidegate_core::health::{HeartbeatHealth, Observation, combine_observations};
use tidegate_core::limits::client_sources::SOURCES_MAX;
use tidegate_core::model::{Policy, Words};
use tidegate_daemon::heartbeat::verify::RejectReason;
use tidegate_heartbeat::SenderState;
use tidegate_heartbeat::keys::Secret;
use tidegate_heartbeat::wire::{HeartbeatFields, SenderIdentity, encode};

/// Every key of config/full.toml with its values. tests/config.rs compares
/// that file with the built-in defaults.
fn defaults() -> BTreeMap<String, BTreeSet<String>> {
    let mut known: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in page("config/full.toml").lines() {
        let line = line.trim_start_matches(['#', ' ']);
        let Some((key, value)) = line.split_once(" = ") else { continue };
        let value = value.split(" #").next().unwrap_or_default().trim();
        known.entry(key.to_owned()).or_default().insert(value.to_owned());
    }
    known
}

#[test]
fn defaults_in_prose_are_the_defaults() {
    let (known, mut wrong, mut seen) = (defaults(), String::new(), 0);
    for name in pages() {
        let text = prose(&page(&name)).split_whitespace().collect::<Vec<_>>().join(" ");
        for rest in text.split("default `").skip(1) {
            let Some((key, value)) = rest.split('`').next().unwrap().split_once(" = ") else {
                continue;
            };
            seen += 1;
            if !known.get(key).is_some_and(|values| values.contains(value)) {
                let _ = writeln!(wrong, "{name}: {key} = {value}: {:?}", known.get(key));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{wrong}");
    assert!(seen > 5, "{seen}");
}

/// configuration.md has the tables of defaults. The test above checks defaults in prose.
#[test]
fn hand_written_text_has_no_table_of_defaults() {
    for name in pages().iter().filter(|name| name.starts_with("docs/")) {
        assert!(!hand_written(&page(name)).contains("| default |"), "{name}");
    }
}

// === balancing.md, sources.md ===

#[test]
fn every_policy_has_a_use_in_the_balancing_page() {
    let known: BTreeSet<&str> = Policy::all().map(|policy| policy.word()).collect();
    let chosen = column(&page("docs/balancing.md"), "| your sessions |", 1);
    assert_eq!(chosen.iter().map(String::as_str).collect::<BTreeSet<_>>(), known);
}

#[test]
fn balancing_page_shows_the_round_robin_sequence() {
    let candidate = |(name, weight): (&str, u32)| Candidate {
        key: Arc::from(name),
        weight,
        connections_max: 0,
        slow_start: false,
        in_flight: Arc::default(),
        latency: Arc::default(),
    };
    let candidates = [("a", 5), ("b", 3), ("c", 2)].map(candidate).to_vec();
    let balancer = Balancer::new(Policy::WeightedRoundRobin, candidates, None);
    let key = PickKey { client: [127, 0, 0, 1].into(), draw: 0, at: 0 };
    let made: Vec<&str> =
        (0..10).map(|_| ["a", "b", "c"][balancer.pick(key, &[]).unwrap()]).collect();
    let shown = format!("`{}`", made.join(" "));
    assert!(page("docs/balancing.md").contains(&shown), "{shown}");
}

#[test]
fn sources_page_has_the_cap_on_tracked_sources() {
    let number = format!("{},{:03}", SOURCES_MAX / 1000, SOURCES_MAX % 1000);
    let text = prose(&page("docs/sources.md"));
    assert!(text.contains(&format!("{number} sources per frontend")), "{number}");
    assert!(!blocks(&page("docs/sources.md"), "toml").is_empty());
}

// === health.md, heartbeats.md ===

#[test]
fn health_page_has_the_table_of_probes_and_heartbeats() {
    let rows = table(&page("docs/health.md"), "| heartbeats (`pulse`) |");
    let pulses = [
        HeartbeatHealth::Absent,
        HeartbeatHealth::Waiting,
        HeartbeatHealth::OnTime,
        HeartbeatHealth::Suspect,
        HeartbeatHealth::SilentButAnswering,
        HeartbeatHealth::Silent,
        HeartbeatHealth::Expired,
    ];
    let probes = [None, Some(Observation::Unknown), Some(Observation::Up), Some(Observation::Down)];
    assert_eq!(rows.len() - 1, pulses.len());
    for (pulse, row) in pulses.into_iter().zip(&rows[1..]) {
        assert!(row[0].ends_with(&format!("({})", pulse.name())), "{}: {row:?}", pulse.name());
        for (probed, cell) in probes.into_iter().zip(&row[1..]) {
            let together = combine_observations(pulse, probed).name();
            assert_eq!(cell.split(',').next(), Some(together), "{} {probed:?}", pulse.name());
        }
    }
}

#[test]
fn heartbeats_page_lists_every_reject_reason() {
    let built: BTreeSet<String> = RejectReason::ALL
        .iter()
        .map(|reason| reason.name())
        .chain(HeartbeatIgnored::ALL.iter().map(|reason| reason.name()))
        .map(str::to_owned)
        .collect();
    let listed: BTreeSet<String> = column(&page("docs/heartbeats.md"), "| reason |", 0)
        .iter()
        .flat_map(|cell| cell.split(", "))
        .map(str::to_owned)
        .collect();
    assert_eq!(listed, built);
}

#[test]
fn heartbeats_page_has_the_layout_of_the_datagram() {
    let identity = SenderIdentity::new("web", "a", "10.0.0.1:80".parse().unwrap()).unwrap();
    let secret = Secret::new(&[7; 32]).unwrap();
    let fields = HeartbeatFields {
        identity: &identity,
        key_id: 1,
        incarnation: 2,
        sequence: 3,
        sent: 4,
        interval: Duration::from_millis(5),
        state: SenderState::Draining,
        weight: 7,
        in_flight: 6,
        load: 8,
    };
    let sent = encode(&fields, &secret);
    let expected = [
        ("magic", u64::from(u32::from_be_bytes(*b"TGHB"))),
        ("version", 1),
        ("flags", 0),
        ("state", 3),
        ("address family", 4),
        ("key id", 1),
        ("incarnation", 2),
        ("sequence", 3),
        ("time", 4),
        ("interval", 5),
        ("in flight", 6),
        ("weight", 7),
        ("load", 8),
        ("port", 80),
    ];
    let rows = table(&page("docs/heartbeats.md"), "| at | bytes |");
    for ((field, value), row) in expected.into_iter().zip(&rows[1..]) {
        let (at, bytes) = (row[0].parse::<usize>().unwrap(), row[1].parse::<usize>().unwrap());
        let read = sent[at..at + bytes].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        assert_eq!((row[2].as_str(), read), (field, value));
    }
    assert_eq!(sent.len(), 50 + 4 + (1 + 3) + (1 + 1) + 16, "names and tag follow the address");
}

// === change.md ===

#[test]
fn change_page_lists_the_settings_that_need_a_restart() {
    // `("[process] workers", old.workers != new.workers),`
    let setting = |line: &str| {
        let rest = line.trim().strip_prefix("(\"[")?;
        let (name, compared) = rest.split_once("\", ")?;
        compared.contains(" != ").then(|| format!("[{name}"))
    };
    let mut built = BTreeSet::new();
    sources("src/daemon", &mut |text| built.extend(text.lines().filter_map(setting)));
    let mut listed = BTreeSet::new();
    for cell in column(&page("docs/change.md"), "| setting |", 0) {
        let (section, keys) = cell.split_once(' ').unwrap();
        listed.extend(keys.split(", ").map(|key| format!("{section} {key}")));
    }
    assert_eq!(listed, built);
}

// === troubleshooting.md ===

#[test]
fn every_quoted_log_line_is_in_the_source() {
    let mut program = String::new();
    sources("src", &mut |text| {
        // Strings that continue in the next line.
        let joined = text.split("\\\n").map(str::trim_start).collect::<Vec<_>>().concat();
        program.push_str(&joined);
    });
    let text = page("docs/troubleshooting.md");
    let (_, lines) = text.split_once("\n## Log lines\n").unwrap();
    let (lines, _) = lines.split_once("\n## More evidence\n").unwrap();
    let mut quoted = 0;
    for row in lines.lines().filter(|line| line.starts_with("| `")) {
        let message = row.split('`').nth(1).unwrap();
        assert!(program.contains(message), "{message:?} is in no source file");
        quoted += 1;
    }
    assert!(quoted > 20, "{quoted}");
}

// === glossary.md, contributing/style.md ===

#[test]
fn glossary_and_style_guide_have_the_same_words() {
    let terms = |cell: &str| -> Vec<String> {
        cell.split([',', ';']).map(|term| term.trim().to_owned()).collect()
    };
    let rows = column(&page("docs/glossary.md"), "| term |", 0);
    let mut sorted = rows.clone();
    sorted.sort();
    assert_eq!(rows, sorted, "the glossary is in alphabetical order");
    let known: BTreeSet<String> = rows.iter().flat_map(|cell| terms(cell)).collect();
    for cell in column(&page("docs/contributing/style.md"), "| we write |", 0) {
        assert!(known.contains(&terms(&cell)[0]), "{cell} is not in the glossary");
    }
}

// === what commands print ===

/// Constant parts of the output shown in pages.
const PRINTED: [(&str, &[&str]); 4] = [
    (
        "README.md",
        &[
            "draining: no new sessions; open sessions continue",
            "has no sessions",
            "LAST CHANGE",
            "operator: drain; open sessions: ",
            "first probe succeeded",
            "ready: gets new sessions if it is healthy",
            "is in effect",
            "the old process drains",
            "All backends are up",
            "is killed: its port refuses connections and its connections are reset",
            "requests before and after",
            "is upgraded in place, to itself",
        ],
    ),
    (
        "docs/health.md",
        &[
            "no probes",
            "not heard",
            "in a row, last: ",
            "ejected for ",
            "(ejection ",
            "NO BACKEND ELIGIBLE",
            "FROZEN",
            "connection refused",
            "NOT IN ROTATION",
            "EJECTED for ",
            "so far, ",
            "prevented by a guard",
            "trial session failed",
            "ejection ended after its time; admitting one trial session",
        ],
    ),
    ("docs/heartbeats.md", &["NO HEARTBEATS RECEIVED", "FROZEN", "HELD"]),
    ("docs/balancing.md", &["% health x ", "% slow start ", "% load"]),
];

#[test]
fn quoted_output_is_in_the_source() {
    let mut program = String::new();
    sources("src", &mut |text| program.push_str(text));
    for (name, parts) in PRINTED {
        let text = page(name);
        for part in parts {
            assert!(program.contains(part), "the program does not print {part:?} of {name}");
            assert!(text.contains(part), "{name} does not show {part:?}");
        }
    }
}

#[test]
fn readme_has_the_caps_of_a_configuration() {
    let grouped = |number: usize| format!("{},{:03}", number / 1000, number % 1000);
    let text = prose(&page("README.md")).split_whitespace().collect::<Vec<_>>().join(" ");
    for (number, what) in [
        (FRONTENDS_MAX, "frontends"),
        (BINDS_MAX, "bind addresses"),
        (POOLS_MAX, "pools"),
        (BACKENDS_MAX, "backends"),
    ] {
        let words = format!("{} {what}", grouped(number));
        assert!(text.contains(&words), "{words}");
    }
    let mebibytes = format!("{} MiB of text", FILE_BYTES_MAX >> 20);
    assert!(text.contains(&mebibytes), "{mebibytes}");
}

#[test]
fn readme_is_short_and_has_figures_of_the_performance_page() {
    let text = page("README.md");
    assert!(text.lines().count() <= 240, "{}", text.lines().count());
    let all = table(&page("docs/performance.md"), "| workload |");
    let few = table(&text, "| workload |");
    for row in &few[1..] {
        let whole = all.iter().find(|other| other[0] == row[0]).expect(&row[0]);
        for (head, cell) in few[0].iter().zip(row) {
            let at = all[0].iter().position(|other| other == head).expect(head);
            assert_eq!(cell, &whole[at], "{} of {}", head, row[0]);
        }
    }
}
