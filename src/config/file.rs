//! A typed walk over the parsed TOML document. Every table becomes a [`Section`], which
//! returns each key with its place.
//!
//! Called only by `validate`. It never stops at the first problem and never decides what
//! a value means.
//!
//! # Why not serde
//! A derived reader stops at the first wrong type or unknown key. Here a wrong type
//! affects its own key only. A key that was not read when its section is
//! [finished](Section::finish) is unknown, so the list of known keys needs no second
//! copy.

use std::cell::RefCell;
use std::fmt;
use std::ops::{Range, RangeInclusive};
use std::sync::LazyLock;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::defaults::SectionDefaults;
use super::diagnose::ProblemCollector;
use super::value::{DurationRange, ValueError, did_you_mean_or, shown};
use crate::{keys, value};
use tidegate_core::model::Words;

/// One value with its place.
pub(super) type ValueNode<'a> = Spanned<DeValue<'a>>;

/// Most dots within one run of bare key parts, and most dots next to a quote, on one
/// line.
///
/// The deepest key has four parts. The TOML parser limits nested brackets but not dotted
/// keys. Dropping a tree that is a million levels deep overflows the stack.
const DOTS_MAX: usize = 16;

/// A table of the document.
pub(super) struct Section<'r, 'a> {
    pub(super) report: &'r ProblemCollector<'r>,
    table: &'r DeTable<'a>,
    /// Its name in messages, such as `[pool.web]`.
    pub(super) label: String,
    /// Place of the table's header. Messages about missing keys point at it.
    pub(super) header: Range<usize>,
    known: RefCell<Vec<&'static str>>,
    /// Values of keys that the table does not have.
    defaults: Option<&'r SectionDefaults<'r, 'a>>,
    /// The keys whose value is a default.
    defaulted: RefCell<Vec<&'static str>>,
}

/// A named table inside a section: `[frontend.NAME]`.
pub(super) struct NamedSection<'r, 'a> {
    pub(super) name: &'r str,
    /// Place of the name.
    pub(super) place: Range<usize>,
    pub(super) section: Section<'r, 'a>,
}

/// The result of reading one key.
#[derive(Debug)]
pub(super) enum Field<T> {
    /// The key is not in the file.
    Absent,
    /// The value is wrong, and the error is reported.
    Bad,
    /// The value is right.
    Good(Spanned<T>),
}

/// Returns the offset of the first dotted key with more than [`DOTS_MAX`] dots.
pub(super) fn too_deep_key(text: &str) -> Option<usize> {
    let mut line_start = 0;
    for line in text.split_inclusive('\n') {
        if !line.trim_start().starts_with('#')
            && let Some(at) = too_many_dots(line.as_bytes())
        {
            return Some(line_start + at);
        }
        line_start += line.len();
    }
    None
}

fn too_many_dots(line: &[u8]) -> Option<usize> {
    let (mut run, mut beside_quotes) = (0, 0);
    let mut previous = b' ';
    for (at, byte) in line.iter().copied().enumerate() {
        match byte {
            b' ' | b'\t' => continue,
            b'.' if matches!(previous, b'"' | b'\'') => beside_quotes += 1,
            b'.' if is_bare(previous) => run += 1,
            b'"' | b'\'' if previous == b'.' => beside_quotes += 1,
            _ if is_bare(byte) => {}
            _ => run = 0,
        }
        if run > DOTS_MAX || beside_quotes > DOTS_MAX {
            return Some(at);
        }
        previous = byte;
    }
    None
}

fn is_bare(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-')
}

/// Returns the nearest known key, else the tables that the unknown key `name` belongs to,
/// else all known keys.
fn suggestion(name: &str, known: &[&str]) -> String {
    did_you_mean_or(name, known.iter().copied(), || match &*keys::headers_of(name) {
        [] => format!("known here: {}", known.join(", ")),
        [tables @ .., last] if !tables.is_empty() => {
            format!("{name} belongs to {} or {last}", tables.join(", "))
        }
        [table, ..] if table.contains(&format!(".{name}]")) => format!("write {table}"),
        [table, ..] => format!("{name} belongs to {table}"),
    })
}

/// Returns the name of a value's type.
fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a float",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "an array",
        DeValue::Table(_) => "a table",
    }
}

// === impl Section ===

impl<'r, 'a> Section<'r, 'a> {
    pub(super) fn new(
        report: &'r ProblemCollector<'r>,
        table: &'r DeTable<'a>,
        label: String,
        header: Range<usize>,
    ) -> Self {
        let (known, defaulted) = (RefCell::default(), RefCell::default());
        Section { report, table, label, header, known, defaults: None, defaulted }
    }

    /// Returns the same section, with defaults for keys that it does not have.
    pub(super) fn with_defaults(self, defaults: &'r SectionDefaults<'r, 'a>) -> Self {
        Section { defaults: Some(defaults), ..self }
    }

    /// Returns the raw keys and values.
    pub(super) fn keys(&self) -> &'r DeTable<'a> {
        self.table
    }

    /// Returns the raw value of a key, or its default in the file, and adds the key to the
    /// known keys.
    pub(super) fn node(&self, key: &'static str) -> Option<&'r ValueNode<'a>> {
        let mut known = self.known.borrow_mut();
        if !known.contains(&key) {
            known.push(key);
        }
        self.table.get(key).or_else(|| {
            let default = self.defaults.and_then(|defaults| defaults.node(key))?;
            self.defaulted.borrow_mut().push(key);
            Some(default)
        })
    }

    /// Notes that the default of a key has no effect in this section.
    pub(super) fn ignore_default(&self, key: &str) {
        self.defaulted.borrow_mut().retain(|one| *one != key);
    }

    /// Returns the place of the key's value, or of its default in the file.
    pub(super) fn value_place(&self, key: &'static str) -> Option<Range<usize>> {
        let default = || self.defaults.and_then(|defaults| defaults.node(key));
        self.table.get(key).or_else(default).map(Spanned::span)
    }

    /// Returns the place of the key's name, if the key is in this section.
    pub(super) fn key_place(&self, key: &str) -> Option<Range<usize>> {
        self.table.get_key_value(key).map(|(key, _)| key.span())
    }

    /// Reads a string and converts it with `read`. `wants` names what the key takes.
    pub(super) fn text<T>(
        &self,
        key: &'static str,
        wants: &str,
        read: impl FnOnce(&str) -> Result<T, ValueError>,
    ) -> Field<T> {
        let Some(node) = self.node(key) else {
            return Field::Absent;
        };
        let DeValue::String(text) = node.get_ref() else {
            return self.wrong_type(key, node, wants);
        };
        // The admin API shows the message without the source line, so it names the key.
        let named = |complaint: ValueError| complaint.named(key);
        self.taken(node, read(text).map_err(named))
    }

    /// Reads a word of a closed set.
    pub(super) fn choice<T: Words>(&self, key: &'static str) -> Field<T> {
        self.text(key, "a string", value::choice)
    }

    /// Reads `true` or `false`.
    pub(super) fn boolean(&self, key: &'static str) -> Field<bool> {
        let Some(node) = self.node(key) else {
            return Field::Absent;
        };
        match node.get_ref() {
            DeValue::Boolean(value) => Field::Good(Spanned::new(node.span(), *value)),
            _ => self.wrong_type(key, node, "true or false"),
        }
    }

    /// Reads an integer within `range`.
    pub(super) fn integer<T>(&self, key: &'static str, range: RangeInclusive<T>) -> Field<T>
    where
        T: TryFrom<i128> + PartialOrd + fmt::Display,
    {
        let Some(node) = self.node(key) else {
            return Field::Absent;
        };
        let DeValue::Integer(number) = node.get_ref() else {
            let wants = format!("an integer from {} to {}", range.start(), range.end());
            return self.wrong_type(key, node, &wants);
        };
        let value = i128::from_str_radix(number.as_str(), number.radix()).ok();
        let value = value.and_then(|v| T::try_from(v).ok()).filter(|v| range.contains(v));
        self.taken(
            node,
            value.ok_or_else(|| {
                ValueError::new(format!(
                    "{key} must be from {} to {}, not {number}",
                    range.start(),
                    range.end()
                ))
            }),
        )
    }

    /// Reads a duration within a range. Messages show `example`.
    pub(super) fn duration(
        &self,
        key: &'static str,
        example: &str,
        range: DurationRange,
    ) -> Field<Duration> {
        let wants = format!("a duration such as \"{example}\"");
        self.text(key, &wants, |text| value::duration(text, range))
    }

    /// Reads a duration within a range, or `off`. Messages show `example`.
    pub(super) fn timer(
        &self,
        key: &'static str,
        example: &str,
        range: DurationRange,
    ) -> Field<Option<Duration>> {
        let wants = format!("a duration such as \"{example}\", or \"off\"");
        self.text(key, &wants, |text| value::duration_or_off(text, range))
    }

    fn taken<T>(&self, node: &ValueNode<'a>, outcome: Result<T, ValueError>) -> Field<T> {
        match outcome {
            Ok(value) => Field::Good(Spanned::new(node.span(), value)),
            Err(complaint) => {
                self.report.error(node.span(), complaint);
                Field::Bad
            }
        }
    }

    /// Reports a value of the wrong type.
    pub(super) fn wrong_type<T>(&self, key: &str, node: &ValueNode<'a>, wants: &str) -> Field<T> {
        let found = kind(node.get_ref());
        let message = format!("{key} takes {wants}, not {found}");
        self.report.error(node.span(), ValueError::new(message));
        Field::Bad
    }

    /// Reports that a key is missing, at the table's header.
    pub(super) fn missing(&self, key: &str, example: &str) {
        let complaint = ValueError::new(format!("missing key \"{key}\" in {}", self.label));
        self.report.error(self.header.clone(), complaint.help(format!("add {key} = {example}")));
    }

    /// Returns the table under a key. A value of another type is reported and gives
    /// `None`.
    pub(super) fn table(&self, key: &'static str, label: String) -> Option<Section<'r, 'a>> {
        let node = self.node(key)?;
        match node.get_ref() {
            DeValue::Table(table) => Some(Section::new(self.report, table, label, node.span())),
            other => {
                let place = self.key_place(key).unwrap_or_else(|| node.span());
                let double = matches!(other, DeValue::Array(array) if array.iter().all(|e| e.get_ref().is_table()));
                let complaint = if double {
                    ValueError::new(format!("{label} is a single table, in single brackets"))
                } else {
                    ValueError::new(format!("{label} is a table, not {}", kind(other)))
                };
                self.report.error(place, complaint);
                None
            }
        }
    }

    /// Returns the table under a key, or an empty table, so that the reader of a key also
    /// sets its default.
    pub(super) fn table_or_empty(&self, key: &'static str, label: String) -> Section<'r, 'a> {
        static EMPTY: LazyLock<DeTable<'static>> = LazyLock::new(DeTable::new);
        let empty = || Section::new(self.report, &EMPTY, label.clone(), self.header.clone());
        self.table(key, label.clone()).unwrap_or_else(empty)
    }

    /// Returns the named tables under `[key.NAME]`, in file order.
    pub(super) fn named_tables(&self, key: &'static str) -> Vec<NamedSection<'r, 'a>> {
        let Some(node) = self.node(key) else {
            return Vec::new();
        };
        let place = self.key_place(key).unwrap_or_else(|| node.span());
        let DeValue::Table(tables) = node.get_ref() else {
            let complaint = ValueError::new(format!("{key} takes tables with a name"));
            self.report.error(place, complaint.help(format!("write [{key}.NAME]")));
            return Vec::new();
        };
        let mut named: Vec<_> = tables.iter().collect();
        named.sort_by_key(|(name, _)| name.span().start);
        named.into_iter().filter_map(|(name, node)| self.named_table(key, name, node)).collect()
    }

    fn named_table(
        &self,
        key: &str,
        name: &'r Spanned<toml::de::DeString<'a>>,
        node: &'r ValueNode<'a>,
    ) -> Option<NamedSection<'r, 'a>> {
        let DeValue::Table(table) = node.get_ref() else {
            self.report.error_with(name.span(), || {
                let header = format!("[{key}.{}]", value::cut(name.get_ref()));
                let help = match node.get_ref() {
                    DeValue::Array(all) if all.iter().all(|one| one.get_ref().is_table()) => {
                        format!("write {header}, with single brackets")
                    }
                    _ => format!("write [{key}.NAME], then its keys below"),
                };
                ValueError::new(format!("{header} must be a table")).help(help)
            });
            return None;
        };
        if let Err(complaint) = value::name(name.get_ref()) {
            self.report.error(name.span(), complaint);
        }
        let label = format!("[{key}.{}]", value::cut(name.get_ref()));
        let section = Section::new(self.report, table, label, node.span());
        Some(NamedSection { name: name.get_ref(), place: name.span(), section })
    }

    /// Returns the tables of `[[...key]]`, in file order. `label` has no brackets.
    pub(super) fn array_of_tables(&self, key: &'static str, label: &str) -> Vec<Section<'r, 'a>> {
        let Some(node) = self.node(key) else {
            return Vec::new();
        };
        let label = format!("[[{label}]]");
        let DeValue::Array(array) = node.get_ref() else {
            let place = self.key_place(key).unwrap_or_else(|| node.span());
            let complaint = ValueError::new(format!("{key} takes a list of tables"));
            self.report.error(
                place,
                complaint.help(format!("write {label}, with double brackets, before each")),
            );
            return Vec::new();
        };
        let mut sections = Vec::with_capacity(array.len());
        for element in array.iter() {
            match element.get_ref() {
                DeValue::Table(table) => {
                    sections.push(Section::new(self.report, table, label.clone(), element.span()));
                }
                other => self.report.error_with(element.span(), || {
                    ValueError::new(format!("{key} takes a list of tables, not {}", kind(other)))
                        .help(format!("write {label}, then its keys below"))
                }),
            }
        }
        sections
    }

    /// Returns whether an unknown key or table has nearly the name `key`: a misspelling,
    /// which [`Section::finish`] reports. A second error about the missing `key` would only
    /// distract.
    pub(super) fn misspells(&self, key: &str) -> bool {
        let known = self.known.borrow();
        let mut unknown = self.table.keys().map(|name| name.get_ref().as_ref());
        unknown
            .any(|name| !known.contains(&name) && value::nearest(name, [key].into_iter()).is_some())
    }

    /// Returns whether every entry of `[key.NAME]` is a table, and no misspelled `key` exists.
    pub(super) fn has_all_named_tables(&self, key: &'static str) -> bool {
        let tables = self.node(key).and_then(|node| node.get_ref().as_table());
        let whole = tables.is_none_or(|all| all.values().all(|one| one.get_ref().is_table()));
        whole && !self.misspells(key)
    }

    /// Reports every key that was not read.
    pub(super) fn finish(self) {
        let known = self.known.into_inner();
        if let Some(defaults) = self.defaults {
            defaults.note(&known, &self.defaulted.into_inner());
        }
        for (key, node) in self.table.iter() {
            let name = key.get_ref().as_ref();
            if known.contains(&name) {
                continue;
            }
            self.report.error_with(key.span(), || {
                let what = match node.get_ref() {
                    DeValue::Table(_) => "table",
                    DeValue::Array(array)
                        if array.iter().all(|e| e.get_ref().is_table()) && !array.is_empty() =>
                    {
                        "table"
                    }
                    _ => "key",
                };
                let complaint =
                    ValueError::new(format!("unknown {what} {} in {}", shown(name), self.label));
                complaint.help(suggestion(name, &known))
            });
        }
    }
}

// === impl Field ===

impl<T> Field<T> {
    /// Returns the value, or `default` if the value is absent or wrong.
    pub(super) fn or(self, default: T) -> T {
        self.value().unwrap_or(default)
    }

    /// Returns the value without its place.
    pub(super) fn value(self) -> Option<T> {
        self.good().map(Spanned::into_inner)
    }

    /// Converts the value and keeps its place.
    pub(super) fn map<U>(self, change: impl FnOnce(T) -> U) -> Field<U> {
        match self {
            Field::Absent => Field::Absent,
            Field::Bad => Field::Bad,
            Field::Good(value) => {
                Field::Good(Spanned::new(value.span(), change(value.into_inner())))
            }
        }
    }

    /// Returns the value with its place, if the value is right.
    pub(super) fn good(self) -> Option<Spanned<T>> {
        match self {
            Field::Good(value) => Some(value),
            Field::Absent | Field::Bad => None,
        }
    }

    /// Returns the value's place, if the value is right.
    pub(super) fn place(&self) -> Option<Range<usize>> {
        match self {
            Field::Good(value) => Some(value.span()),
            Field::Absent | Field::Bad => None,
        }
    }

    /// Returns true if the value is wrong. Checks that depend on it must then be skipped.
    pub(super) fn is_bad(&self) -> bool {
        matches!(self, Field::Bad)
    }

    pub(super) fn is_absent(&self) -> bool {
        matches!(self, Field::Absent)
    }
}
