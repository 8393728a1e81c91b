//! What a probe sends and expects: `send`, `expect` and `steps`.
//!
//! Called by `probe`. It never sends anything.

use regex::bytes::RegexBuilder;
use toml::Spanned;
use toml::de::DeValue;

use crate::file::{Field, Section, ValueNode};
use crate::value::{ValueError, shown};
use tidegate_core::model::{Expect, ProbeBytes, ProbePattern, ProbeStep};

/// Longest `send` and `expect`. Each fits into the first segments of a connection, so a
/// probe never waits for a window update.
const SEND_BYTES_MAX: usize = 4_096;
const EXPECT_BYTES_MAX: usize = 1_024;

/// Most entries of `steps`.
const STEPS_MAX: usize = 32;

/// Largest compiled regular expression, in bytes.
const REGEX_BYTES_MAX: usize = 256 * 1024;

/// The forms of `expect`, for messages.
const EXPECT_FORMS: &str = "a string, or a table such as { contains = \"...\" }";

/// Reads the bytes to send: `"..."` or `{ hex = "..." }`.
pub(super) fn send(section: &Section<'_, '_>) -> Field<ProbeBytes> {
    let Some(node) = section.node("send") else { return Field::Absent };
    let max = |bytes: &[u8]| at_most(bytes.len(), SEND_BYTES_MAX);
    match node.get_ref() {
        DeValue::Table(table) => {
            let label = "the table of send".to_owned();
            let table = Section::new(section.report, table, label, node.span());
            let bytes = table.text("hex", "a string of hex digits", |text| {
                let bytes = hex(text)?;
                max(&bytes).map(|()| ProbeBytes(bytes))
            });
            if bytes.is_absent() {
                table.missing("hex", "\"0a0b\"");
            }
            table.finish();
            placed(node, bytes.value())
        }
        DeValue::String(_) => section
            .text("send", "a string", |text| max(text.as_bytes()).map(|()| ProbeBytes::from(text))),
        _ => section.wrong_type("send", node, "a string, or a table { hex = \"...\" }"),
    }
}

/// Reads what the answer must be: `"..."` or a table with one of `starts`, `contains`,
/// `regex` and `hex`.
pub(super) fn expect(section: &Section<'_, '_>) -> Field<Expect> {
    let Some(node) = section.node("expect") else { return Field::Absent };
    match node.get_ref() {
        DeValue::Table(table) => {
            let label = "the table of expect".to_owned();
            let table = Section::new(section.report, table, label, node.span());
            let form = expect_form(&table);
            table.finish();
            placed(node, form)
        }
        DeValue::String(_) => section.text("expect", "a string", text).map(Expect::Starts),
        _ => section.wrong_type("expect", node, EXPECT_FORMS),
    }
}

fn expect_form(table: &Section<'_, '_>) -> Option<Expect> {
    let forms = [
        table.text("starts", "a string", text).map(Expect::Starts),
        table.text("contains", "a string", text).map(Expect::Contains),
        table.text("regex", "a regular expression", regex).map(Expect::Regex),
        table.text("hex", "a string of hex digits", expected_hex).map(Expect::Contains),
    ];
    let bad = forms.iter().any(Field::is_bad);
    let mut given: Vec<Expect> = forms.into_iter().filter_map(Field::value).collect();
    if given.len() != 1 && !bad {
        let message = "expect needs exactly one of starts, contains, regex and hex";
        let complaint = ValueError::new(message).help("write expect = { contains = \"...\" }");
        table.report.error(table.header.clone(), complaint);
    }
    given.pop().filter(|_| given.is_empty())
}

/// Reads `steps = [{ send = "..." }, { expect = "..." }]`.
pub(super) fn steps(section: &Section<'_, '_>) -> Field<Vec<ProbeStep>> {
    let Some(node) = section.node("steps") else { return Field::Absent };
    let DeValue::Array(entries) = node.get_ref() else {
        return section.wrong_type(
            "steps",
            node,
            "a list such as [{ send = \"...\" }, { expect = \"...\" }]",
        );
    };
    let read: Vec<Option<ProbeStep>> =
        entries.iter().take(STEPS_MAX).map(|entry| step(section, entry)).collect();
    let steps: Option<Vec<ProbeStep>> = read.into_iter().collect();
    let wrong = match &steps {
        _ if entries.len() > STEPS_MAX => {
            Some(format!("{} steps, at most {STEPS_MAX} are allowed", entries.len()))
        }
        Some(steps) if !steps.iter().any(|step| matches!(step, ProbeStep::Expect(_))) => {
            Some("no step has an expect, so any answer would pass".to_owned())
        }
        _ => None,
    };
    if let Some(message) = wrong {
        section.report.error(node.span(), ValueError::new(message).named("steps"));
        return Field::Bad;
    }
    placed(node, steps)
}

fn step(section: &Section<'_, '_>, entry: &ValueNode<'_>) -> Option<ProbeStep> {
    let DeValue::Table(table) = entry.get_ref() else {
        let wants = "tables such as { send = \"...\" } and { expect = \"...\" }";
        let _: Field<()> = section.wrong_type("steps", entry, wants);
        return None;
    };
    let table = Section::new(section.report, table, "a step".to_owned(), entry.span());
    let (send, expect) = (send(&table), expect(&table));
    let bad = send.is_bad() || expect.is_bad();
    let step = match (send.value(), expect.value()) {
        (Some(send), None) => Some(ProbeStep::Send(send)),
        (None, Some(expect)) => Some(ProbeStep::Expect(expect)),
        _ => None,
    };
    if step.is_none() && !bad {
        let complaint = ValueError::new("a step needs exactly one of send and expect");
        section.report.error(entry.span(), complaint);
    }
    table.finish();
    step
}

fn placed<T>(node: &ValueNode<'_>, value: Option<T>) -> Field<T> {
    value.map_or(Field::Bad, |value| Field::Good(Spanned::new(node.span(), value)))
}

fn text(text: &str) -> Result<ProbeBytes, ValueError> {
    some(text.len())?;
    at_most(text.len(), EXPECT_BYTES_MAX).map(|()| ProbeBytes::from(text))
}

fn expected_hex(text: &str) -> Result<ProbeBytes, ValueError> {
    let bytes = hex(text)?;
    some(bytes.len())?;
    at_most(bytes.len(), EXPECT_BYTES_MAX).map(|()| ProbeBytes(bytes))
}

fn regex(text: &str) -> Result<ProbePattern, ValueError> {
    some(text.len())?;
    at_most(text.len(), EXPECT_BYTES_MAX)?;
    let built = RegexBuilder::new(text).size_limit(REGEX_BYTES_MAX).build();
    let pattern = built.map_err(|error| match error {
        regex::Error::CompiledTooBig(_) => ValueError::new("the regular expression is too large"),
        other => {
            let text = other.to_string();
            let last = text.lines().last().unwrap_or_default().trim_start_matches("error: ");
            ValueError::new(format!("it is not a regular expression: {last}"))
        }
    })?;
    if pattern.is_match(b"") {
        return Err(ValueError::new("it matches an empty answer, so any answer would pass"));
    }
    Ok(ProbePattern(pattern))
}

/// Parses pairs of hex digits. Spaces between pairs are allowed.
fn hex(text: &str) -> Result<Vec<u8>, ValueError> {
    let wrong = || {
        ValueError::new(format!("{} is not a list of bytes", shown(text)))
            .help("write two hex digits for each byte, such as \"300c 0201\"")
    };
    let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b' ').collect();
    let pairs = digits.chunks(2).map(|pair| {
        let pair = std::str::from_utf8(pair).ok().filter(|pair| pair.len() == 2)?;
        u8::from_str_radix(pair, 16).ok().filter(|_| !pair.starts_with('+'))
    });
    pairs.collect::<Option<Vec<u8>>>().ok_or_else(wrong)
}

fn some(length: usize) -> Result<(), ValueError> {
    match length {
        0 => Err(ValueError::new("it is empty, so any answer would pass")
            .help("to check only that a connection is accepted, use kind = \"tcp\"")),
        _ => Ok(()),
    }
}

fn at_most(length: usize, max: usize) -> Result<(), ValueError> {
    match length > max {
        true => Err(ValueError::new(format!("{length} bytes, at most {max} are allowed"))),
        false => Ok(()),
    }
}
