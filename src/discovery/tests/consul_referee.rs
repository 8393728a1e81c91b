//! The npm package `consul`, which other people wrote for real agents, works with the
//! Consul double.
//!
//! Needs `node`, `npm` and the npm registry. The package is kept in the target directory.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;
use tidegate_discovery::testing::consul::ConsulDouble;

const PACKAGE: &str = "consul@2.0.1";

/// Installs the package; `None` without npm or its registry.
fn installed() -> Option<&'static Path> {
    let folder = Path::new(concat!(env!("CARGO_TARGET_TMPDIR"), "/consul-referee"));
    if folder.join("node_modules/consul/package.json").exists() {
        return Some(folder);
    }
    std::fs::create_dir_all(folder).ok()?;
    let quiet = ["install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix"];
    let npm = Command::new("npm").args(quiet).arg(folder).arg(PACKAGE).output().ok()?;
    npm.status.success().then_some(folder)
}

#[test]
fn an_independent_client_sees_register_change_and_deregister() {
    let Some(folder) = installed() else {
        assert!(std::env::var_os("CI").is_none(), "cannot install the npm package {PACKAGE}");
        eprintln!("skipped: cannot install the npm package {PACKAGE}");
        return;
    };
    let double = ConsulDouble::start().unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/consul_referee.js");
    let output = Command::new("node")
        .arg(script)
        .arg(folder)
        .arg(double.address().port().to_string())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said} {:#?}", double.requests());
    print!("{}", String::from_utf8_lossy(&output.stdout));
}
