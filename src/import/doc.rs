//! Documents in YAML or TOML as a tree with source lines.
//!
//! Called by `envoy` and `traefik`. The YAML reader gives no places, so this module finds them: it
//! follows the tree in the order of the text and searches each key after the one before.

use crate::report::{ImportReport, LineVerdict, SourceLine};
use serde_norway::Value as Yaml;
use toml::de::{DeTable, DeValue};

/// Deepest nesting of a document. Deeper parts are left out.
const DEPTH_MAX: usize = 64;

/// A node with its line.
#[derive(Debug, Clone)]
pub(crate) struct DocNode {
    pub(crate) at: SourceLine,
    value: DocValue,
}

/// The value of a node. Every scalar is text.
#[derive(Debug, Clone)]
enum DocValue {
    Text(String),
    List(Vec<DocNode>),
    Table(Vec<(String, DocNode)>),
}

/// A key that has no counterpart: name, verdict, reason.
pub(crate) type KeyReason = (&'static str, LineVerdict, &'static str);

/// Reads a document and adds its lines to the report. An unreadable text is not understood.
pub(crate) fn read(name: &str, text: &str, report: &mut ImportReport) -> DocNode {
    let file = report.add_file(name);
    let clean = without_comments(text);
    for (line, content) in (1..).zip(clean.lines()) {
        let shown = content.trim();
        let structure = shown.chars().all(|c| "-[]{}(),.".contains(c));
        if !structure {
            report.add_line(SourceLine { file, line }, shown.trim_end_matches(':'));
        }
    }
    let first = SourceLine { file, line: 1 };
    let mut finder = Finder { text: &clean, at: 0, line: 1, file };
    let root = match name.ends_with(".toml") {
        true => DeTable::parse(text)
            .map(|table| toml_table(table.get_ref(), &Lines::new(text, file), first, 0))
            .map_err(|error| (error.message().to_owned(), error.span().map(|span| span.start))),
        false => {
            serde_norway::from_str::<Yaml>(text).map(|yaml| finder.node(&yaml, 0)).map_err(|e| {
                let place = e.location().map(|location| location.index());
                (e.to_string(), place)
            })
        }
    };
    root.unwrap_or_else(|(why, place)| {
        let at = place.map_or(first, |place| Lines::new(text, file).at(place));
        report.add_line(at, "");
        let why: String = why.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        report.note(at, LineVerdict::NotUnderstood, why);
        DocNode { at, value: DocValue::Table(Vec::new()) }
    })
}

/// Replaces comments by spaces, so that places stay.
fn without_comments(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        let (mut quote, mut comment, mut before) = (None, false, ' ');
        for c in line.chars() {
            match (quote, c) {
                (None, '"' | '\'') if !before.is_alphanumeric() => quote = Some(c),
                (Some(open), c) if c == open => quote = None,
                (None, '#') if before.is_whitespace() => comment = true,
                _ => {}
            }
            before = c;
            // A blank has as many bytes as the character.
            match comment && c != '\n' {
                true => (0..c.len_utf8()).for_each(|_| clean.push(' ')),
                false => clean.push(c),
            }
        }
    }
    clean
}

/// Offsets of lines.
struct Lines {
    starts: Vec<usize>,
    file: usize,
}

impl Lines {
    fn new(text: &str, file: usize) -> Self {
        let starts = text.match_indices('\n').map(|(at, _)| at + 1).collect();
        Lines { starts, file }
    }

    fn at(&self, offset: usize) -> SourceLine {
        let line = self.starts.partition_point(|start| *start <= offset) + 1;
        SourceLine { file: self.file, line }
    }
}

fn toml_table(table: &DeTable<'_>, lines: &Lines, at: SourceLine, depth: usize) -> DocNode {
    let mut entries = Vec::new();
    for (key, value) in table {
        let at = lines.at(key.span().start);
        entries.push((key.get_ref().to_string(), toml_value(value.get_ref(), lines, at, depth)));
    }
    DocNode { at, value: DocValue::Table(entries) }
}

fn toml_value(value: &DeValue<'_>, lines: &Lines, at: SourceLine, depth: usize) -> DocNode {
    if depth > DEPTH_MAX {
        return DocNode { at, value: DocValue::Text(String::new()) };
    }
    let text = |text: String| DocNode { at, value: DocValue::Text(text) };
    match value {
        DeValue::Table(table) => toml_table(table, lines, at, depth + 1),
        DeValue::Array(array) => {
            let one = |value: &toml::Spanned<DeValue<'_>>| {
                toml_value(value.get_ref(), lines, lines.at(value.span().start), depth + 1)
            };
            DocNode { at, value: DocValue::List(array.iter().map(one).collect()) }
        }
        DeValue::String(value) => text(value.to_string()),
        DeValue::Integer(value) => text(value.as_str().to_owned()),
        DeValue::Float(value) => text(value.as_str().to_owned()),
        DeValue::Boolean(value) => text(value.to_string()),
        DeValue::Datetime(value) => text(value.to_string()),
    }
}

/// Finds the lines of a YAML document.
struct Finder<'t> {
    text: &'t str,
    at: usize,
    line: usize,
    file: usize,
}

impl Finder<'_> {
    fn here(&self) -> SourceLine {
        SourceLine { file: self.file, line: self.line }
    }

    /// Continues after the next `word`, if `fits` accepts what follows it.
    fn find(&mut self, word: &str, fits: fn(&str) -> bool) {
        if word.is_empty() {
            return;
        }
        let mut from = self.at;
        while let Some(found) = self.text[from..].find(word) {
            let (start, end) = (from + found, from + found + word.len());
            let before = self.text[..start].chars().next_back();
            let whole = before.is_none_or(|c| c.is_whitespace() || "'\"[{,-(&!".contains(c));
            if whole && fits(&self.text[end..]) {
                self.line += self.text[self.at..end].matches('\n').count();
                self.at = end;
                return;
            }
            from = end;
        }
    }

    fn node(&mut self, yaml: &Yaml, depth: usize) -> DocNode {
        if depth > DEPTH_MAX {
            return DocNode { at: self.here(), value: DocValue::Text(String::new()) };
        }
        match yaml {
            Yaml::Mapping(mapping) => {
                let mut entries = Vec::new();
                for (key, value) in mapping {
                    let key = scalar(key);
                    self.find(&key, |rest| {
                        let rest = rest.trim_start_matches(['"', '\'']).trim_start_matches(' ');
                        rest.starts_with(':')
                    });
                    let at = self.here();
                    let mut node = self.node(value, depth + 1);
                    node.at = at;
                    entries.push((key, node));
                }
                let at = entries.first().map_or(self.here(), |(_, node)| node.at);
                DocNode { at, value: DocValue::Table(entries) }
            }
            Yaml::Sequence(items) => {
                let items: Vec<DocNode> =
                    items.iter().map(|item| self.node(item, depth + 1)).collect();
                let at = items.first().map_or(self.here(), |node| node.at);
                DocNode { at, value: DocValue::List(items) }
            }
            Yaml::Tagged(tagged) => self.node(&tagged.value, depth + 1),
            other => {
                let text = scalar(other);
                // The first line of the value, as far as it is written like this.
                let first = text.lines().next().unwrap_or_default().to_owned();
                let near = self.text[self.at..].find(&first).is_some_and(|found| {
                    self.text[self.at..self.at + found].matches('\n').count() <= 2
                });
                if near {
                    self.find(&first, |_| true);
                }
                DocNode { at: self.here(), value: DocValue::Text(text) }
            }
        }
    }
}

fn scalar(yaml: &Yaml) -> String {
    match yaml {
        Yaml::String(text) => text.clone(),
        Yaml::Bool(flag) => flag.to_string(),
        Yaml::Number(number) => number.to_string(),
        _ => String::new(),
    }
}

// === impl DocNode ===

impl DocNode {
    /// Returns the value of a key.
    pub(crate) fn get(&self, name: &str) -> Option<&DocNode> {
        self.entries().iter().find(|(key, _)| key == name).map(|(_, node)| node)
    }

    /// Follows keys, and the first element of lists.
    pub(crate) fn path(&self, names: &[&str]) -> Option<&DocNode> {
        names.iter().try_fold(self, |node, name| node.get(name))
    }

    pub(crate) fn entries(&self) -> &[(String, DocNode)] {
        match &self.value {
            DocValue::Table(entries) => entries,
            _ => &[],
        }
    }

    pub(crate) fn items(&self) -> &[DocNode] {
        match &self.value {
            DocValue::List(items) => items,
            _ => &[],
        }
    }

    /// Returns a scalar as text, empty for lists and tables.
    pub(crate) fn text(&self) -> &str {
        match &self.value {
            DocValue::Text(text) => text,
            _ => "",
        }
    }

    /// Returns the text of a key.
    pub(crate) fn text_of(&self, name: &str) -> &str {
        self.get(name).map_or("", DocNode::text)
    }

    /// Notes one verdict for this node and everything in it.
    pub(crate) fn note_all(&self, verdict: LineVerdict, why: &str, report: &mut ImportReport) {
        let mut stack = vec![self];
        while let Some(node) = stack.pop() {
            report.note(node.at, verdict, why);
            stack.extend(node.items());
            stack.extend(node.entries().iter().map(|(_, node)| node));
        }
    }

    /// Notes the keys that have no counterpart: those of `reasons`, and unknown ones. `known` are
    /// the keys that something has translated.
    pub(crate) fn rest(&self, known: &[&str], reasons: &[KeyReason], report: &mut ImportReport) {
        for (key, node) in self.entries() {
            if known.contains(&&**key) {
                continue;
            }
            match reasons.iter().find(|reason| reason.0 == key) {
                Some((_, verdict, why)) => node.note_all(*verdict, why, report),
                None => node.note_all(LineVerdict::NotUnderstood, "the key is not known", report),
            }
        }
    }
}

/// Decides the lines that no node has: they continue the line before.
pub(crate) fn continued(report: &mut ImportReport) {
    for at in report.undecided() {
        let verdict = report.verdict_before(at).unwrap_or(LineVerdict::NotUnderstood);
        report.note(at, verdict, "it continues the line before");
    }
}
