//! Imports: every configuration of another balancer in `tests/import` gives exactly the expected
//! report and output next to it. `UPDATE_EXPECT=1` rewrites them. Review them afterwards.

use super::{ImportRequest, Imported};
use std::path::{Path, PathBuf};

fn cases() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/import");
    let mut cases: Vec<PathBuf> = std::fs::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    cases.sort();
    cases
}

/// The source in a folder.
fn source(case: &Path) -> PathBuf {
    let names = ["haproxy.cfg"];
    names.iter().map(|name| case.join(name)).find(|path| path.exists()).unwrap_or_default()
}

fn imported(case: &Path) -> Imported {
    let path = source(case);
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    let text = std::fs::read_to_string(&path).unwrap();
    let kind = super::guess(&name, &text).unwrap();
    let request = ImportRequest { name: &name, text: &text, ..Default::default() };
    super::import(kind, &request)
}

/// Compares a text with a file, or writes the file.
fn compare(path: &Path, actual: &str, differences: &mut String) {
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        return std::fs::write(path, actual).unwrap();
    }
    let kept = std::fs::read_to_string(path).unwrap_or_default();
    if kept != actual {
        *differences += &format!("=== {} has now:\n{actual}\n", path.display());
    }
}

#[test]
fn every_source_gives_its_report_and_its_output() {
    let mut differences = String::new();
    let cases = cases();
    assert!(cases.len() >= 11, "{cases:?}");
    for case in &cases {
        if !source(case).exists() {
            continue;
        }
        let imported = imported(case);
        compare(&case.join("report.expected"), &imported.report.text(), &mut differences);
        let output = imported.toml.unwrap_or_default();
        compare(&case.join("output.toml"), &output, &mut differences);
    }
    assert!(differences.is_empty(), "run with UPDATE_EXPECT=1 and review:\n{differences}");
}
