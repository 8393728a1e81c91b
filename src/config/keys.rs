//! The keys of a configuration file as data: values, default, and when a change applies.
//!
//! `docs/configuration.md` is generated from [`TABLES`]. The reader uses only the names, to
//! say where an unknown key belongs.
//! Tests compare each entry with the reader: the set of keys, every default, and the first
//! value outside of every range.

mod discovery_tables;
mod frontend_tables;
mod heartbeat_tables;
mod pool_tables;
mod tables;

#[cfg(test)]
mod tests;

use tidegate_core::model::Words;

pub use tables::TABLES;

/// One table of a configuration file.
#[derive(Debug)]
pub struct KeyTable {
    /// `[pool.NAME.probe]`, or `bind` for the inline tables of a key.
    pub header: &'static str,
    /// What the table is for, in one or two sentences.
    pub about: &'static str,
    /// In the order of `config/full.toml`.
    pub keys: &'static [ConfigKey],
}

/// One key of a [`KeyTable`].
#[derive(Debug)]
pub struct ConfigKey {
    /// Unique in its table.
    pub name: &'static str,
    /// What the key accepts.
    pub values: Values,
    /// What a file without the key means.
    pub default: DefaultValue,
    /// What makes a changed value take effect.
    pub applies: Applies,
    /// What the key does, in one or two sentences of Markdown.
    pub about: &'static str,
}

/// The values of a key. Bounds are inclusive. Texts are as a file writes them, without
/// quotes.
#[derive(Debug, Clone, Copy)]
pub enum Values {
    /// `true` or `false`.
    Flag,
    /// One of these words.
    Words(fn() -> Vec<&'static str>),
    /// An integer from the first to the second.
    Integer(u64, u64),
    /// A word, or an integer from the first to the second.
    WordOrInteger(&'static str, u64, u64),
    /// A duration from the first to the second.
    Time(&'static str, &'static str),
    /// A word, or a prefix and a duration from the first to the second.
    WordOrTime(&'static str, &'static str, &'static str, &'static str),
    /// A size from the first to the second.
    Size(&'static str, &'static str),
    /// `0%` to `100%`.
    Share,
    /// Described in Markdown.
    Form(&'static str),
}

/// The default of a key.
#[derive(Debug, Clone, Copy)]
pub enum DefaultValue {
    /// A value as TOML.
    Value(&'static str),
    /// The value as TOML while the keys that it follows have their defaults, and the rule in
    /// Markdown.
    Derived(&'static str, &'static str),
    /// Described in Markdown.
    Described(&'static str),
    /// The file must have the key.
    Required,
}

/// What makes a changed value take effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applies {
    /// A reload.
    Reload,
    /// A restart or an upgrade.
    Restart,
}

/// Returns the headers of the tables that have this key, and of the tables of this name.
pub(super) fn headers_of(name: &str) -> Vec<&'static str> {
    let table = format!(".{name}]");
    let has = |table: &&KeyTable| table.keys.iter().any(|key| key.name == name);
    let is = |header: &str| header.trim_start_matches('[').len() < header.len();
    TABLES
        .iter()
        .filter(|one| is(one.header) && (has(one) || one.header.contains(&table)))
        .map(|one| one.header)
        .collect()
}

fn words<T: Words>() -> Vec<&'static str> {
    T::WORDS.iter().map(|(word, _)| *word).collect()
}

// === impl Values ===

impl Values {
    /// The values in Markdown.
    pub fn describe(self) -> String {
        match self {
            Values::Flag => "`true`, `false`".to_owned(),
            Values::Words(words) => {
                let words: Vec<String> =
                    words().iter().map(|word| format!("`\"{word}\"`")).collect();
                words.join(", ")
            }
            Values::Integer(min, max) => format!("{} to {}", grouped(min), grouped(max)),
            Values::WordOrInteger(word, min, max) => {
                format!("`\"{word}\"` or {} to {}", grouped(min), grouped(max))
            }
            Values::Time(min, max) | Values::Size(min, max) => {
                format!("`\"{min}\"` to `\"{max}\"`")
            }
            Values::WordOrTime(word, prefix, min, max) => {
                format!("`\"{word}\"` or `\"{prefix}{min}\"` to `\"{prefix}{max}\"`")
            }
            Values::Share => "`\"0%\"` to `\"100%\"`".to_owned(),
            Values::Form(text) => text.to_owned(),
        }
    }
}

/// Markdown without the targets of links, which are relative to the pages.
pub fn plain(markdown: &str) -> String {
    let mut text = String::with_capacity(markdown.len());
    let mut rest = markdown;
    while let Some((before, after)) = rest.split_once('[') {
        let link = after.split_once("](").and_then(|(label, target)| {
            let (_, end) = target.split_once(')')?;
            (!label.contains(['[', '\n', '`']) && !target.starts_with(')')).then_some((label, end))
        });
        text.push_str(before);
        match link {
            Some((label, end)) => {
                text.push_str(label);
                rest = end;
            }
            None => {
                text.push('[');
                rest = after;
            }
        }
    }
    text + rest
}

/// `65,537`
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

// === impl DefaultValue ===

impl DefaultValue {
    /// The default in Markdown.
    pub fn describe(self) -> String {
        match self {
            DefaultValue::Value(value) => format!("`{value}`"),
            DefaultValue::Derived(_, rule) | DefaultValue::Described(rule) => rule.to_owned(),
            DefaultValue::Required => "required".to_owned(),
        }
    }
}
