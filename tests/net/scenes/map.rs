//! Compares `tests/net/README.md` with the tests: every named test exists, every case has a row,
//! and the close orders match the scenes.
//!
//! It reads source files and runs no program.

use super::close_orders::ALL;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn readme() -> String {
    fs::read_to_string(root().join("tests/net/README.md")).expect("the suite's README")
}

/// Returns the rows of the tables of cases: the number and the cell with the tests.
fn cases(readme: &str) -> Vec<(u32, String)> {
    let row = |line: &str| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let &["", number, _, tests, ""] = &cells[..] else { return None };
        Some((number.parse().ok()?, tests.to_string()))
    };
    readme.lines().filter_map(row).collect()
}

/// Returns the names in backquotes.
fn names(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

/// Returns true if the test exists.
fn exists(name: &str) -> bool {
    if name.starts_with("config_cases/") {
        return root().join("tests").join(name).with_extension("toml").is_file();
    }
    let mut parts: Vec<&str> = name.split("::").collect();
    let test = parts.pop().expect("a name has a last part");
    let base = match parts.first() {
        Some(&"lib") => {
            parts[0] = "src";
            root().join(parts.join("/"))
        }
        _ => root().join("tests").join(parts.join("/")),
    };
    let with = |end: &str| PathBuf::from(format!("{}{end}", base.display()));
    let files = [with(".rs"), with("/main.rs"), with("/mod.rs"), with("/tests.rs")];
    files.iter().filter_map(|file| fs::read_to_string(file).ok()).any(|text| {
        text.contains(&format!("fn {test}(")) || text.contains(&format!(" {test}: Scene {{"))
    })
}

#[test]
fn every_case_names_existing_tests() {
    let cases = cases(&readme());
    let numbers: Vec<u32> = cases.iter().map(|(number, _)| *number).collect();
    assert_eq!(numbers, Vec::from_iter(1..=72));
    let mut missing = Vec::new();
    for (number, tests) in &cases {
        let unnamed = names(tests).is_empty() && !tests.starts_with("no test");
        assert!(!unnamed, "case {number} names no test and no reason: {tests}");
        missing.extend(names(tests).into_iter().filter(|name| !exists(name)));
    }
    assert!(missing.is_empty(), "no such tests: {missing:#?}");
    assert!(!exists("net::faults::a_missing_test"));
}

#[test]
fn table_of_close_orders_matches_the_scenes() {
    let readme = readme();
    assert_eq!(ALL.len(), 16);
    for (name, scene) in ALL {
        let expected = format!("client: {}; backend: {}", scene.client, scene.backend);
        let row = readme.lines().find(|line| line.contains(&name.replace('_', " ")));
        let row = row.unwrap_or_else(|| panic!("no row for {name}"));
        let cell = row.split('|').nth(2).expect("the column of Tidegate").trim();
        assert_eq!(cell, expected, "{name}");
    }
}
