//! Terminal output: tables that drop the least important columns to fit, wrapped lines,
//! and values as text.
//!
//! Used by `status` and `explain`. It does not know the meaning of the columns.

use std::fmt::Display;
use std::io::IsTerminal;

/// A column: its name, the alignment of its cells, and its rank.
#[derive(Debug, Clone, Copy)]
pub(super) struct TextColumn {
    name: &'static str,
    right: bool,
    /// The column with the highest rank is dropped first; rank 0 is never dropped.
    rank: u8,
}

/// A table. Each column is as wide as its widest cell.
#[derive(Debug)]
pub(super) struct TextTable {
    columns: Vec<TextColumn>,
    rows: Vec<Vec<String>>,
    /// A note per row: the last cell if it fits, else lines below the row.
    notes: Vec<String>,
    heading: &'static str,
}

const GAP: usize = 2;

/// Indentation of continuation lines and of notes below a row.
const INDENT: &str = "    ";

/// Upper limit on the length of a label at the start of a line.
const LABEL_MAX: usize = 14;

// === impl TextColumn ===

impl TextColumn {
    pub(super) fn left(name: &'static str, rank: u8) -> TextColumn {
        TextColumn { name, right: false, rank }
    }

    pub(super) fn right(name: &'static str, rank: u8) -> TextColumn {
        TextColumn { name, right: true, rank }
    }
}

// === impl TextTable ===

impl TextTable {
    pub(super) fn new(columns: impl Into<Vec<TextColumn>>) -> TextTable {
        TextTable { columns: columns.into(), rows: Vec::new(), notes: Vec::new(), heading: "" }
    }

    /// Returns a table with a note per row, and the heading of the notes.
    pub(super) fn noted(columns: impl Into<Vec<TextColumn>>, heading: &'static str) -> TextTable {
        TextTable { heading, ..TextTable::new(columns) }
    }

    pub(super) fn row(&mut self, cells: Vec<String>, note: String) {
        self.rows.push(cells);
        self.notes.push(note);
    }

    /// Returns the text, in `width` columns if possible. `None`: without a limit.
    pub(super) fn finish(mut self, width: Option<usize>) -> String {
        let limit = width.unwrap_or(usize::MAX);
        let notes = self.notes.iter().map(|note| note.chars().count()).max().unwrap_or(0);
        let in_row = self.width() + GAP + notes.max(self.heading.len()) <= limit;
        while !in_row && self.width() > limit && self.drop_one() {}
        let widths = self.widths();
        let names: Vec<String> = self.columns.iter().map(|column| column.name.to_owned()).collect();
        let mut text = String::new();
        self.line(&mut text, &widths, &names, if in_row { self.heading } else { "" });
        for (cells, note) in self.rows.iter().zip(&self.notes) {
            self.line(&mut text, &widths, cells, if in_row { note } else { "" });
            if !in_row && !note.is_empty() {
                let below = format!("{INDENT}{note}");
                text.push_str(&wrap(&below, width));
                text.push('\n');
            }
        }
        text
    }

    fn line(&self, text: &mut String, widths: &[usize], cells: &[String], note: &str) {
        let mut line = String::new();
        for ((cell, width), column) in cells.iter().zip(widths).zip(&self.columns) {
            let fill = " ".repeat(width.saturating_sub(cell.chars().count()));
            let (before, after) = if column.right { (fill, "".into()) } else { ("".into(), fill) };
            line.push_str(&format!("{before}{cell}{after}{}", " ".repeat(GAP)));
        }
        line.push_str(note);
        text.push_str(line.trim_end());
        text.push('\n');
    }

    fn widths(&self) -> Vec<usize> {
        let cells = |at: usize| self.rows.iter().map(move |row| row[at].chars().count()).max();
        let widest = |(at, column): (usize, &TextColumn)| {
            cells(at).unwrap_or(0).max(column.name.chars().count())
        };
        self.columns.iter().enumerate().map(widest).collect()
    }

    fn width(&self) -> usize {
        let widths = self.widths();
        widths.iter().sum::<usize>() + GAP * widths.len().saturating_sub(1)
    }

    /// Drops the least important column. Returns false if no column can be dropped.
    fn drop_one(&mut self) -> bool {
        let ranked = self.columns.iter().enumerate().filter(|(_, column)| column.rank > 0);
        let Some((at, _)) = ranked.max_by_key(|(_, column)| column.rank) else { return false };
        self.columns.remove(at);
        self.rows.iter_mut().for_each(|row| drop(row.remove(at)));
        true
    }
}

/// Returns the columns of the terminal; `None` if standard output is not a terminal.
pub(super) fn terminal_width() -> Option<usize> {
    let out = std::io::stdout();
    let size = out.is_terminal().then(|| rustix::termios::tcgetwinsize(&out).ok())??;
    (size.ws_col > 0).then_some(size.ws_col.into())
}

/// Returns the text as one line without control characters, or `-` if it is empty.
pub(super) fn cell_text(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.replace(char::is_control, " ") }
}

/// Returns the value as text, or `-`.
pub(super) fn or_dash(value: Option<impl Display>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// Returns `1 worker` or `2 workers`.
pub(super) fn plural(count: impl Into<u64>, what: &str) -> String {
    let count = count.into();
    let s = if count == 1 { "" } else { "s" };
    format!("{count} {what}{s}")
}

/// Formats an age in its two largest units: `1m 15s`.
pub(super) fn age(seconds: f64) -> String {
    if seconds < 1.0 {
        return format!("{:.0}ms", (seconds * 1e3).floor());
    }
    let whole = seconds as u64;
    let (days, hours, minutes) = (whole / 86_400, whole / 3600 % 24, whole / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{whole}s"),
        (0, 0, _) => format!("{minutes}m {}s", whole % 60),
        (0, _, _) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

/// Returns a size with one decimal and a binary unit.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let (mut value, mut unit) = (bytes as f64 / 1024.0, 0);
    while value >= 1023.95 {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// Breaks lines longer than `width` between words. Continuation lines are aligned with the
/// first word, or with the text after a label such as `State       up`.
pub(super) fn wrap(text: &str, width: Option<usize>) -> String {
    let Some(width) = width else { return text.to_owned() };
    let lines: Vec<String> = text.lines().map(|line| wrap_line(line, width)).collect();
    lines.join("\n")
}

fn wrap_line(line: &str, width: usize) -> String {
    let indent = " ".repeat(hanging(line));
    let (mut text, mut rest) = (String::new(), line.to_owned());
    while rest.chars().count() > width {
        let Some(at) = break_at(&rest, width) else { break };
        text.push_str(rest[..at].trim_end());
        text.push('\n');
        rest = format!("{indent}{}", rest[at..].trim_start());
    }
    text + &rest
}

/// Returns the indentation of continuation lines.
fn hanging(line: &str) -> usize {
    let own = line.chars().take_while(|c| *c == ' ').count();
    let label = line.find("  ").filter(|at| (1..LABEL_MAX).contains(at));
    match label {
        _ if own > 0 => own,
        Some(at) => at + line[at..].chars().take_while(|c| *c == ' ').count(),
        None => INDENT.len(),
    }
}

/// Returns the last space after at most `width` characters, else the first space. Spaces
/// before the first word are ignored.
fn break_at(line: &str, width: usize) -> Option<usize> {
    let first = line.len() - line.trim_start().len();
    let spaces = || line.char_indices().enumerate().filter(|(_, (at, c))| *c == ' ' && *at > first);
    let fits = spaces().filter(|(column, _)| *column <= width).last();
    fits.or_else(|| spaces().next()).map(|(_, (at, _))| at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    fn example() -> TextTable {
        let columns = [
            TextColumn::left("NAME", 0),
            TextColumn::right("P50", 2),
            TextColumn::right("ACTIVE", 1),
        ];
        let mut table = TextTable::noted(columns, "WHY");
        let cells = |name: &str| vec![name.to_owned(), "213 us".to_owned(), "7".to_owned()];
        table.row(cells("a"), "3 probes failed in a row".to_owned());
        table.row(cells("long name"), String::new());
        table
    }

    #[test]
    fn notes_are_in_the_row_if_they_fit_else_below() {
        let wide = expect![[r#"
            NAME          P50  ACTIVE  WHY
            a          213 us       7  3 probes failed in a row
            long name  213 us       7
        "#]];
        wide.assert_eq(&example().finish(None));
        wide.assert_eq(&example().finish(Some(60)));
        expect![[r#"
            NAME          P50  ACTIVE
            a          213 us       7
                3 probes failed in a row
            long name  213 us       7
        "#]]
        .assert_eq(&example().finish(Some(40)));
        expect![[r#"
            NAME       ACTIVE
            a               7
                3 probes failed
                in a row
            long name       7
        "#]]
        .assert_eq(&example().finish(Some(20)));
    }

    #[test]
    fn table_without_droppable_columns_exceeds_the_width() {
        assert!(example().finish(Some(3)).starts_with("NAME\n"));
    }

    #[test]
    fn ages_have_two_units() {
        let ages = [0.0, 0.325, 0.9999, 1.9, 59.0, 61.0, 3600.0, 90_000.0].map(age);
        assert_eq!(ages, ["0ms", "325ms", "999ms", "1s", "59s", "1m 1s", "1h 0m", "1d 1h"]);
    }

    #[test]
    fn sizes_have_one_decimal_and_a_binary_unit() {
        let sizes = [0, 1023, 1024, 1_048_575, u64::MAX].map(size);
        assert_eq!(sizes, ["0 B", "1023 B", "1.0 KiB", "1.0 MiB", "16.0 EiB"]);
    }

    #[test]
    fn lines_are_broken_between_words() {
        assert_eq!(wrap("one two three", Some(9)), "one two\n    three");
        assert_eq!(wrap("  one two", Some(6)), "  one\n  two");
        assert_eq!(wrap("State  up for 3s", Some(13)), "State  up for\n       3s");
        assert_eq!(wrap("unbreakable", Some(3)), "unbreakable");
        assert_eq!(wrap("as it is", None), "as it is");
    }
}
