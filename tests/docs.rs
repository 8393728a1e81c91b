//! Checks the pages: links resolve, the index lists every page, and every configuration is valid.
//! The modules compare tables and texts with the program. `scripts/docs` writes the generated
//! parts.

// Outside of test functions too, a failed step of a test is a failed test.
#![allow(clippy::unwrap_used)]

#[path = "common/pages.rs"]
mod pages;

#[path = "docs/access_log.rs"]
mod access_log;
#[path = "docs/admin_api.rs"]
mod admin_api;
#[path = "docs/balancer.rs"]
mod balancer;
#[path = "docs/cli.rs"]
mod cli;
#[path = "docs/commands.rs"]
mod commands;
#[path = "docs/configuration.rs"]
mod configuration;
#[path = "docs/examples.rs"]
mod examples;
#[path = "docs/explain.rs"]
mod explain;
#[path = "docs/generated.rs"]
mod generated;
#[path = "docs/limits.rs"]
mod limits;
#[path = "docs/metrics.rs"]
mod metrics;
#[path = "docs/operators.rs"]
mod operators;
#[path = "docs/prometheus.rs"]
mod prometheus;
#[path = "docs/reference.rs"]
mod reference;
#[path = "docs/session_ends.rs"]
mod session_ends;

use pages::{anchors, blocks, links, page, pages, prose, root};
use std::fmt::Write;
use std::path::Path;

#[test]
fn every_link_resolves() {
    let mut broken = String::new();
    for name in pages() {
        let text = page(&name);
        for link in links(&text).iter().filter(|link| !link.contains("://")) {
            let (target, anchor) = link.split_once('#').unwrap_or((link, ""));
            let directory = Path::new(&name).parent().unwrap();
            let path = if target.is_empty() { name.clone().into() } else { directory.join(target) };
            let full = root().join(&path);
            let there = full.exists()
                && (anchor.is_empty()
                    || anchors(&std::fs::read_to_string(&full).unwrap())
                        .iter()
                        .any(|known| known == anchor));
            if !there {
                let _ = writeln!(broken, "{name}: {link}");
            }
        }
    }
    assert!(broken.is_empty(), "\n{broken}");
}

#[test]
fn index_lists_every_page() {
    let mut listed = links(&page("docs/README.md"));
    listed.retain(|link| !link.contains("://") && !link.contains("..") && !link.contains('#'));
    listed.sort();
    listed.dedup();
    let mut there: Vec<String> =
        pages().iter().filter_map(|name| name.strip_prefix("docs/")).map(str::to_owned).collect();
    there.retain(|name| name != "README.md");
    assert_eq!(listed, there);
}

#[test]
fn pages_are_short_and_open_with_a_title() {
    for name in pages().iter().filter(|name| name.starts_with("docs/")) {
        let text = page(name);
        let first = text.lines().find(|line| !line.starts_with("<!--")).unwrap();
        assert!(first.starts_with("# "), "{name}: {first}");
        let decision = name.starts_with("docs/decisions/");
        assert!(
            decision || text.contains("\nAfter this page "),
            "{name} does not say what it is for"
        );
        let lines = generated::hand_written(&text).lines().count();
        assert!(lines < 300, "{name}: {lines}");
    }
}

/// Words that the style guide replaces.
const REPLACED: [&str; 20] = [
    "whom",
    "whoever",
    "nobody",
    "somebody",
    "everybody",
    "anew",
    "ours",
    "our",
    "we",
    "meanwhile",
    "thereof",
    "whereby",
    "wherever",
    "trouble",
    "beside",
    "besides",
    "bequest",
    "farewell",
    "fall",
    "fell",
];

#[test]
fn pages_use_no_word_that_the_style_guide_replaces() {
    let mut found = String::new();
    for name in pages() {
        // The guide itself quotes them.
        if name == "docs/contributing/style.md" {
            continue;
        }
        let text = page(&name);
        let text = generated::hand_written(&text);
        // Without text in code marks, which is quoted.
        let prose = prose(&text).split('`').step_by(2).collect::<Vec<_>>().join(" ");
        for word in prose.split(|c: char| !c.is_alphanumeric()) {
            if REPLACED.contains(&word.to_lowercase().as_str()) {
                let _ = writeln!(found, "{name}: {word}");
            }
        }
    }
    assert!(found.is_empty(), "\n{found}");
}

#[test]
fn every_configuration_in_the_pages_is_valid() {
    let mut accepted = 0;
    for name in pages() {
        for block in blocks(&page(&name), "toml") {
            if let Err(problems) = tidegate_config::parse(block, &name) {
                panic!("{}", problems.render(false));
            }
            accepted += 1;
        }
    }
    assert!(accepted > 2, "{accepted}");
}
