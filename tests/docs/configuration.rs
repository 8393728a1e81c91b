//! Generates the tables of `docs/configuration.md` from the table of keys, and compares
//! `config/full.toml` with it. `tidegate-config` compares the table of keys with the reader.

use crate::generated::cell;
use crate::pages::{blocks, page, sources};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use tidegate_config::keys::{Applies, DefaultValue, KeyTable, TABLES};

/// One Markdown table per table of a configuration file.
pub(crate) fn text() -> String {
    let mut out = String::new();
    for KeyTable { header, about, keys } in TABLES {
        let _ = write!(
            out,
            "### `{header}`\n\n{about}\n\n\
             | key | default | values | applies on | meaning |\n|---|---|---|---|---|\n"
        );
        for key in *keys {
            let applies = match key.applies {
                Applies::Reload => "reload",
                Applies::Restart => "restart or upgrade",
            };
            let (default, values) = (key.default.describe(), key.values.describe());
            let (values, about) = (cell(&values), cell(key.about));
            let _ =
                writeln!(out, "| `{}` | {default} | {values} | {applies} | {about} |", key.name);
        }
        let _ = writeln!(out);
    }
    out
}

/// A key of a file: its header, its name and its value.
type FileKey = (String, String, String);

/// Every key of config/full.toml, set or commented out.
fn keys_of_the_full_file() -> Vec<FileKey> {
    let (mut header, mut keys) = (String::new(), Vec::new());
    for line in page("config/full.toml").lines() {
        let line = line.trim_start_matches("# ");
        if line.starts_with('[') && line.ends_with(']') {
            header = line.replace(".web", ".NAME").replace(".main", ".NAME");
            continue;
        }
        let Some((name, value)) = line.split_once(" = ") else { continue };
        if !name.bytes().all(|byte| byte.is_ascii_lowercase() || b"_46".contains(&byte)) {
            continue;
        }
        let value = value.split(" #").next().unwrap_or_default().trim();
        keys.push((header.clone(), name.to_owned(), value.to_owned()));
        // An inline table has its own keys.
        if let Some(inner) = value.strip_prefix("{ ").and_then(|rest| rest.split_once(" }")) {
            let pairs = inner.0.split(", ").filter_map(|pair| pair.split_once(" = "));
            let own = pairs.map(|(key, value)| (name.to_owned(), key.to_owned(), value.to_owned()));
            // The keys of `headers` are names of the user.
            keys.extend(own.filter(|(table, ..)| table != "headers"));
        }
    }
    keys
}

#[test]
fn full_file_has_every_key_and_no_other() {
    let mut named: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (header, name, _) in keys_of_the_full_file() {
        named.entry(header).or_default().insert(name);
    }
    // `ejection` is a key and a table. The file shows the table.
    named.get_mut("[pool.NAME]").unwrap().insert("ejection".to_owned());
    for table in TABLES {
        let known: BTreeSet<String> = table.keys.iter().map(|key| key.name.to_owned()).collect();
        assert_eq!(named.remove(table.header).unwrap_or_default(), known, "{}", table.header);
    }
    assert!(named.is_empty(), "{named:?}");
}

#[test]
fn full_file_has_the_default_of_every_key() {
    let shown = keys_of_the_full_file();
    for table in TABLES {
        for key in table.keys {
            let (DefaultValue::Value(value) | DefaultValue::Derived(value, _)) = key.default else {
                continue;
            };
            let of = |(header, name, _): &&FileKey| header == table.header && name == key.name;
            let values: Vec<&str> = shown.iter().filter(of).map(|(.., value)| &**value).collect();
            // For these keys the file shows an example instead of the default.
            let example = ["bind", "proxy_protocol"].contains(&table.header) || key.name == "send";
            assert!(
                values.contains(&value) || example,
                "{} {}: {values:?}, not {value}",
                table.header,
                key.name
            );
        }
    }
}

#[test]
fn keys_that_need_a_restart_are_those_that_a_reload_reports() {
    // `("[process] workers", old.workers != new.workers),`
    let setting = |line: &str| {
        let (name, compared) = line.trim().strip_prefix("(\"[")?.split_once("\", ")?;
        compared.contains(" != ").then(|| format!("[{name}"))
    };
    let mut reported = BTreeSet::new();
    sources("src/daemon", &mut |text| reported.extend(text.lines().filter_map(setting)));
    let mut stated = BTreeSet::new();
    for table in TABLES {
        let keys = table.keys.iter().filter(|key| key.applies == Applies::Restart);
        stated.extend(keys.map(|key| format!("{} {}", table.header, key.name)));
    }
    assert_eq!(stated, reported);
}

#[test]
fn page_has_three_complete_examples() {
    let text = page("docs/configuration.md");
    // tests/docs.rs parses every TOML block of every page.
    assert_eq!(blocks(&text, "toml").len(), 3);
}

#[test]
fn every_description_is_short() {
    for table in TABLES {
        for key in table.keys {
            let sentences = key.about.matches(". ").count() + 1;
            assert!(sentences <= 2 && key.about.ends_with('.'), "{}: {}", key.name, key.about);
        }
    }
}
