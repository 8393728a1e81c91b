//! The JSON Schema against files: it accepts every valid file, and rejects the invalid files
//! whose faults it can describe. The crate `jsonschema` judges.

use super::{bare_name, root, toml_files};
use serde_json::Value;
use std::path::Path;

fn judge() -> jsonschema::Validator {
    let schema = tidegate_config::schema();
    jsonschema::draft202012::meta::validate(&schema).unwrap();
    jsonschema::draft202012::new(&schema).unwrap()
}

/// The document; `None` if the text is not TOML.
fn document(path: &Path) -> Option<Value> {
    let text = std::fs::read_to_string(path).ok()?;
    let table: toml::Table = toml::from_str(text.trim_start_matches('\u{feff}')).ok()?;
    Some(serde_json::to_value(table).unwrap())
}

#[test]
fn schema_accepts_every_valid_file() {
    let judge = judge();
    let mut findings = String::new();
    let mut count = 0;
    for directory in ["config", "tests/config_cases/valid", "examples/systemd", "examples/consul"] {
        for path in toml_files(directory) {
            let document = document(&path).expect("TOML");
            for error in judge.iter_errors(&document) {
                findings += &format!("{}: {}: {error}\n", bare_name(&path), error.instance_path());
            }
            count += 1;
        }
    }
    assert!(findings.is_empty(), "{findings}");
    assert!(count > 30, "{count}");
}

/// Whether a message is about a fault that the schema describes: an unknown key or table, a
/// missing key, a wrong type, a word that does not exist, an integer out of range.
fn is_structural(message: &str) -> bool {
    let starts = ["unknown key ", "unknown table ", "missing key "];
    starts.iter().any(|start| message.starts_with(start))
        || message.ends_with(" is not a known value")
        || [
            ", not an integer",
            ", not a string",
            ", not a boolean",
            ", not a float",
            ", not a list",
        ]
        .iter()
        .any(|end| message.ends_with(end))
        || message.contains(" must be from ") && !message.contains("bytes")
}

/// Files that the schema accepts: whether their missing key is required depends on another key.
const NOT_DESCRIBED: [&str; 4] = [
    "discover_missing_keys.toml",
    "probe_expect_missing.toml",
    "probe_steps_missing.toml",
    "registry_servers.toml",
];

#[test]
fn schema_rejects_files_with_unknown_keys_wrong_types_and_wrong_words() {
    let judge = judge();
    let (mut findings, mut count) = (String::new(), 0);
    for path in toml_files("tests/config_cases/invalid") {
        let expected = std::fs::read_to_string(path.with_extension("expected")).unwrap();
        let messages = expected.lines().filter_map(|line| line.split_once(": error: "));
        let fault = messages.map(|(_, message)| message).find(|message| is_structural(message));
        let (Some(document), Some(fault)) = (document(&path), fault) else { continue };
        let name = bare_name(&path);
        if judge.is_valid(&document) != NOT_DESCRIBED.contains(&&*name) {
            findings += &format!("{name}: {fault}\n");
        }
        count += 1;
    }
    assert!(findings.is_empty(), "{findings}");
    assert!(count > 40, "{count}");
}

#[test]
fn command_prints_the_schema() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_tidegate"))
        .arg("schema")
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(printed, tidegate_config::schema());
    let format = &printed["properties"]["log"]["properties"]["format"];
    assert_eq!(format["enum"], serde_json::json!(["text", "json"]));
    assert_eq!(format["default"], "text");
    assert!(format["description"].as_str().unwrap().contains("Format of the log lines."));
    let table = &printed["properties"]["frontend"]["patternProperties"];
    assert_eq!(table.as_object().unwrap().len(), 1);
}
