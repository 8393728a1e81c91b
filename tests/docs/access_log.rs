//! Generates the table of access-log fields in `docs/observability.md`. The names come from a
//! real line, the meanings from the comments of the record in the source.

use crate::balancer::Balancer;
use crate::generated::cell;
use crate::pages::root;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;

pub(crate) fn text() -> String {
    let meanings = meanings(&source());
    let mut out = "| field | meaning |\n|---|---|\n".to_owned();
    for field in fields() {
        let meaning = meanings.get(&field).unwrap_or_else(|| panic!("no comment on {field:?}"));
        let _ = writeln!(out, "| `{field}` | {} |", cell(meaning));
    }
    out
}

/// The fields of the line of a session, in order.
fn fields() -> Vec<String> {
    let line = Balancer::after_one_session().access_log_line();
    let names = line.trim().trim_matches(['{', '}']).split(",\"");
    names.map(|pair| pair.trim_start_matches('"').split_once("\":").unwrap().0.to_owned()).collect()
}

/// The definition of the record.
fn source() -> String {
    let folder = root().join("src/dataplane/access_log");
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let texts = files.map(|path| fs::read_to_string(path).unwrap());
    let found = texts.filter_map(|text| {
        let (_, rest) = text.split_once("pub struct AccessLogRecord {")?;
        Some(rest.split_once("\n}")?.0.to_owned())
    });
    found.into_iter().next().expect("the record of the access log")
}

/// The comment of each field, by the name of the field in a line.
fn meanings(source: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let (mut comment, mut renamed) = (String::new(), None);
    for line in source.lines().map(str::trim) {
        if let Some(text) = line.strip_prefix("/// ") {
            comment = [comment.as_str(), text].join(" ").trim().to_owned();
        } else if let Some((_, rest)) = line.split_once("rename = \"") {
            renamed = rest.split_once('"').map(|(name, _)| name.to_owned());
        } else if let Some((name, _)) =
            line.strip_prefix("pub ").and_then(|rest| rest.split_once(':'))
        {
            let name = renamed.take().unwrap_or_else(|| name.to_owned());
            found.insert(name, std::mem::take(&mut comment));
        }
    }
    found
}

#[test]
fn comments_belong_to_the_names_of_the_line() {
    let source =
        "/// One\n/// thing.\n#[serde(rename = \"a_seconds\")]\npub a: u8,\n/// B.\npub b: u8,";
    let meanings = meanings(source);
    assert_eq!(meanings["a_seconds"], "One thing.");
    assert_eq!(meanings["b"], "B.");
}
