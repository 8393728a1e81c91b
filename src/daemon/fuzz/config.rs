//! Any bytes as a configuration file.
//!
//! Called by the fuzzer and by the mutation test. Nothing may panic; a file that
//! is refused is refused at a place that is in it, in words that fit one line;
//! a file that is taken means the same once it is written anew.

use std::fmt::Write;
use tidegate_config::{Problems, parse};
use tidegate_core::model::Config;
use toml::{Table, Value};

/// More takes the validator too long to learn much in a minute.
const LEN_MAX: usize = 64 * 1024;

/// See the module's documentation.
pub fn check(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(&data[..data.len().min(LEN_MAX)]) else { return };
    match parse(text, "a file") {
        Ok(config) => check_rewritten(text, &config),
        Err(problems) => check_problems(text, &problems),
    }
}

fn check_problems(text: &str, problems: &Problems) {
    assert!(!problems.list.is_empty(), "refused for nothing");
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut before = (0, 0);
    for problem in &problems.list {
        let place = (problem.line, problem.column);
        assert!(place >= before, "{place:?} after {before:?}");
        before = place;
        let line = text.split('\n').nth(problem.line.wrapping_sub(1));
        let line = line.unwrap_or_else(|| panic!("no line {}", problem.line));
        let columns = 1..=line.chars().count() + 1;
        assert!(columns.contains(&problem.column), "no column {place:?}: {}", problem.message);
        for said in [Some(&problem.message), problem.help.as_ref()].into_iter().flatten() {
            assert!(!said.is_empty() && !said.contains(char::is_control), "{said:?}");
        }
        problem.render(true);
    }
    assert!(problems.render(false).contains("error"), "{problems:?}");
}

/// The same tables and keys, each on one line and in the order of their names.
fn check_rewritten(text: &str, config: &Config) {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let table: Table = text.parse().expect("it was taken a moment ago");
    let again = parse(&rewritten(&table), "a file");
    let mut again = again.unwrap_or_else(|problems| panic!("{}", problems.render(false)));
    let mut config = config.clone();
    for one in [&mut config, &mut again] {
        one.frontends.sort_by(|a, b| a.name.cmp(&b.name));
        one.pools.sort_by(|a, b| a.name.cmp(&b.name));
    }
    assert!(again == config, "{again:#?}\nis not {config:#?}");
}

fn rewritten(table: &Table) -> String {
    let mut text = String::new();
    for (key, value) in table {
        write!(text, "{} = ", quoted(key)).expect("a string takes everything");
        write_value(&mut text, value);
        text.push('\n');
    }
    text
}

fn write_value(text: &mut String, value: &Value) {
    match value {
        Value::String(string) => text.push_str(&quoted(string)),
        Value::Integer(integer) => text.push_str(&integer.to_string()),
        Value::Float(float) => write!(text, "{float:?}").expect("a string takes everything"),
        Value::Boolean(boolean) => text.push_str(&boolean.to_string()),
        Value::Datetime(time) => text.push_str(&time.to_string()),
        Value::Array(values) => {
            text.push('[');
            for value in values {
                write_value(text, value);
                text.push(',');
            }
            text.push(']');
        }
        Value::Table(table) => {
            text.push('{');
            for (index, (key, value)) in table.iter().enumerate() {
                text.push_str(if index == 0 { "" } else { "," });
                write!(text, "{} = ", quoted(key)).expect("a string takes everything");
                write_value(text, value);
            }
            text.push('}');
        }
    }
}

/// As a basic string (TOML 1.0, "String"): nothing in it has a meaning.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for char in text.chars() {
        match char {
            ' ' | '!' | '#'..='[' | ']'..='~' => quoted.push(char),
            other => {
                write!(quoted, "\\U{:08X}", u32::from(other)).expect("a string takes everything");
            }
        }
    }
    quoted.push('"');
    quoted
}
