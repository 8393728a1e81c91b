//! Facts of the operators' pages against the program: defaults, constants and words that
//! stand in prose.

use crate::pages::{blocks, column, page, pages, prose, table};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::sync::Arc;
use tidegate_core::balance::{Balancer, Candidate, PickKey};
use tidegate_core::limits::client_sources::SOURCES_MAX;
use tidegate_core::model::Policy;

/// Every key of config/full.toml with the values it has there. tests/config.rs compares
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
fn every_default_in_prose_is_the_default() {
    let (known, mut wrong, mut seen) = (defaults(), String::new(), 0);
    for name in pages() {
        let text = prose(&page(&name)).replace('\n', " ");
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

#[test]
fn every_table_of_defaults_is_right() {
    let (known, mut wrong, mut seen) = (defaults(), String::new(), 0);
    for name in pages().iter().filter(|name| name.starts_with("docs/")) {
        for line in page(name).lines().filter(|line| line.starts_with("| `")) {
            let cells: Vec<&str> = line.split(" | ").collect();
            let key = cells[0].trim_start_matches("| ").trim_matches('`');
            let value = cells.get(1).map(|cell| cell.trim_matches('`')).unwrap_or_default();
            let is_value = cells.get(1).is_some_and(|cell| cell.starts_with('`'));
            let head = page(name).contains("| default |");
            let Some(values) = known.get(key).filter(|_| is_value && head) else { continue };
            seen += 1;
            if !values.contains(value) {
                let _ = writeln!(wrong, "{name}: {key} = {value}: {values:?}");
            }
        }
    }
    assert!(wrong.is_empty(), "\n{wrong}");
    assert!(seen > 3, "{seen}");
}

// === balancing.md, sources.md ===

#[test]
fn every_policy_can_be_chosen() {
    let known: BTreeSet<&str> = Policy::ALL.iter().map(|policy| policy.name()).collect();
    let chosen = column(&page("docs/balancing.md"), "| your sessions |", 1);
    assert_eq!(chosen.iter().map(String::as_str).collect::<BTreeSet<_>>(), known);
}

#[test]
fn the_round_robin_shown_is_the_one_made() {
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
fn the_sources_tracked_are_as_many_as_the_page_says() {
    let number = format!("{},{:03}", SOURCES_MAX / 1000, SOURCES_MAX % 1000);
    let text = prose(&page("docs/sources.md"));
    assert!(text.contains(&format!("{number} sources per frontend")), "{number}");
    assert!(!blocks(&page("docs/sources.md"), "toml").is_empty());
    assert_eq!(table(&text, "| key |").len(), 6);
}
