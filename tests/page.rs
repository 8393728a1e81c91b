//! The operator page in Chromium: runs tests/page/suite.mjs with node, playwright-core and axe-core.
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
    if PACKAGES.iter().all(there) {
        return Some(folder);
    }
    std::fs::create_dir_all(folder).ok()?;
    let quiet = ["install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix"];
    let npm = Command::new("npm").args(quiet).arg(folder).args(PACKAGES).output().ok()?;
    npm.status.success().then_some(folder)
}

fn browser() -> Option<PathBuf> {
    let named = std::env::var_os("CHROMIUM").map(PathBuf::from);
    named.into_iter().chain(BROWSERS.map(PathBuf::from)).find(|path| path.is_file())
}

#[test]
fn operator_page_works_in_chromium() {
    let (Some(folder), Some(browser)) = (installed(), browser()) else {
        assert!(std::env::var_os("CI").is_none(), "chromium, npm or its registry is missing");
        eprintln!("skipped: chromium, npm or its registry is missing");
        return;
    };
    let suite = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/page/suite.mjs");
    let status = Command::new("node")
        .args(["--test-reporter", "spec", "--test-concurrency", "1"])
        .arg(suite)
        .env("TIDEGATE", env!("CARGO_BIN_EXE_tidegate"))
        .env("CHROMIUM", browser)
        .env("TIDEGATE_NODE_MODULES", folder.join("node_modules"))
        .status()
        .unwrap();
    assert!(status.success(), "{status}");
}
