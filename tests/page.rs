//! The operator page in Chromium: runs the suites of tests/page with node, playwright-core and
//! axe-core.
//!
//! Needs chromium, node, npm and the npm registry. The packages are kept in the target directory.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;

/// Versions are fixed, so that a new rule of axe-core fails no unrelated change.
const PACKAGES: [&str; 2] = ["playwright-core@1.65.1", "axe-core@4.14.1"];

const BROWSERS: [&str; 2] = ["/usr/bin/chromium", "/usr/bin/chromium-browser"];

/// Installs the packages; `None` without npm or its registry.
fn installed() -> Option<&'static Path> {
    let folder = Path::new(concat!(env!("CARGO_TARGET_TMPDIR"), "/page"));
    let there = |package: &&str| {
        let name = package.split('@').next().unwrap_or_default();
        folder.join("node_modules").join(name).join("package.json").exists()
    };
    std::fs::create_dir_all(folder).ok()?;
    // The tests are processes of their own and start at the same time.
    let lock = std::fs::File::create(folder.join("lock")).ok()?;
    lock.lock().ok()?;
    if PACKAGES.iter().all(there) {
        return Some(folder);
    }
    let quiet = ["install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix"];
    let npm = Command::new("npm").args(quiet).arg(folder).args(PACKAGES).output().ok()?;
    npm.status.success().then_some(folder)
}

fn browser() -> Option<PathBuf> {
    let named = std::env::var_os("CHROMIUM").map(PathBuf::from);
    named.into_iter().chain(BROWSERS.map(PathBuf::from)).find(|path| path.is_file())
}

/// Runs the tests of one file.
fn suite(name: &str) {
    let (Some(folder), Some(browser)) = (installed(), browser()) else {
        assert!(std::env::var_os("CI").is_none(), "chromium, npm or its registry is missing");
        eprintln!("skipped: chromium, npm or its registry is missing");
        return;
    };
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/page").join(name);
    let status = Command::new("node")
        .args(["--test-reporter", "spec", "--test-concurrency", "1"])
        .arg(file)
        .env("TIDEGATE", env!("CARGO_BIN_EXE_tidegate"))
        .env("CHROMIUM", browser)
        .env("TIDEGATE_NODE_MODULES", folder.join("node_modules"))
        .status()
        .unwrap();
    assert!(status.success(), "{status}");
}

#[test]
fn page_shows_what_is_wrong_and_changes_it() {
    suite("operating.mjs");
}

#[test]
fn page_is_used_by_keys_and_shows_hostile_text_as_text() {
    suite("reading.mjs");
}

#[test]
fn page_is_accessible_at_every_size() {
    suite("looks.mjs");
}

#[test]
fn page_of_many_backends_is_drawn_in_time() {
    suite("cost.mjs");
}

#[test]
fn incident_is_solved_by_the_page_alone_and_by_commands_alone() {
    suite("incident.mjs");
}
