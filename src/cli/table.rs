//! Text for a terminal: tables that leave out what matters least, and lines that are
//! wrapped.
//!
//! Used by `status` and `explain`. It knows columns and widths, not what is in them.

/// A column: its name, where its cells stand, and how early it is left out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Column {
    name: &'static str,
    right: bool,
    /// 0: never; the highest goes first.
    rank: u8,
}

/// Columns as wide as their widest cell.
#[derive(Debug)]
pub(super) struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
    /// What else a row says: the last cell where there is room, else lines below it.
    notes: Vec<String>,
    heading: &'static str,
}

const GAP: usize = 2;

/// Of lines that go on in the next.
const INDENT: &str = "    ";

// === impl Column ===

impl Column {
    pub(super) fn left(name: &'static str, rank: u8) -> Column {
        Column { name, right: false, rank }
    }

    pub(super) fn right(name: &'static str, rank: u8) -> Column {
        Column { name, right: true, rank }
    }
}

// === impl Table ===

impl Table {
    pub(super) fn new(columns: impl Into<Vec<Column>>) -> Table {
        Table { columns: columns.into(), rows: Vec::new(), notes: Vec::new(), heading: "" }
    }

    /// The same with a note to each row, and what stands above the notes.
    pub(super) fn noted(columns: impl Into<Vec<Column>>, heading: &'static str) -> Table {
        Table { heading, ..Table::new(columns) }
    }

    pub(super) fn row(&mut self, cells: Vec<String>, note: String) {
        self.rows.push(cells);
        self.notes.push(note);
    }

    /// The text, in `width` columns if that is possible; `None`: as wide as it is.
    pub(super) fn finish(mut self, width: Option<usize>) -> String {
        let limit = width.unwrap_or(usize::MAX);
        let notes = self.notes.iter().map(|note| note.chars().count()).max().unwrap_or(0);
        let beside = self.width() + GAP + notes.max(self.heading.len()) <= limit;
        while !beside && self.width() > limit && self.drop_one() {}
        let widths = self.widths();
        let names: Vec<String> = self.columns.iter().map(|column| column.name.to_owned()).collect();
        let mut text = String::new();
        self.line(&mut text, &widths, &names, if beside { self.heading } else { "" });
        for (cells, note) in self.rows.iter().zip(&self.notes) {
            self.line(&mut text, &widths, cells, if beside { note } else { "" });
            if !beside && !note.is_empty() {
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
        let widest = |(at, column): (usize, &Column)| {
            cells(at).unwrap_or(0).max(column.name.chars().count())
        };
        self.columns.iter().enumerate().map(widest).collect()
    }

    fn width(&self) -> usize {
        let widths = self.widths();
        widths.iter().sum::<usize>() + GAP * widths.len().saturating_sub(1)
    }

    /// Leaves out the column that matters least, if there is one to leave out.
    fn drop_one(&mut self) -> bool {
        let ranked = self.columns.iter().enumerate().filter(|(_, column)| column.rank > 0);
        let Some((at, _)) = ranked.max_by_key(|(_, column)| column.rank) else { return false };
        self.columns.remove(at);
        self.rows.iter_mut().for_each(|row| drop(row.remove(at)));
        true
    }
}

/// Breaks lines that are longer than `width` between words. The indentation of a
/// line is kept for those it is broken into, and deeper.
pub(super) fn wrap(text: &str, width: Option<usize>) -> String {
    let Some(width) = width else { return text.to_owned() };
    let lines: Vec<String> = text.lines().map(|line| wrap_line(line, width)).collect();
    lines.join("\n")
}

fn wrap_line(line: &str, width: usize) -> String {
    if line.chars().count() <= width {
        return line.to_owned();
    }
    let own: String = line.chars().take_while(|c| *c == ' ').collect();
    let (mut text, mut used) = (String::new(), 0);
    for word in line.split(' ').filter(|word| !word.is_empty()) {
        let length = word.chars().count();
        if used == 0 {
            text.push_str(&own);
            used = own.chars().count();
        } else if used + 1 + length > width {
            text.push('\n');
            let indent = if own.is_empty() { INDENT } else { &own };
            text.push_str(indent);
            used = indent.chars().count();
        } else {
            text.push(' ');
            used += 1;
        }
        text.push_str(word);
        used += length;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    fn example() -> Table {
        let columns =
            [Column::left("NAME", 0), Column::right("P50", 2), Column::right("ACTIVE", 1)];
        let mut table = Table::noted(columns, "WHY");
        let cells = |name: &str| vec![name.to_owned(), "213 us".to_owned(), "7".to_owned()];
        table.row(cells("a"), "3 probes failed in a row".to_owned());
        table.row(cells("long name"), String::new());
        table
    }

    #[test]
    fn notes_stand_beside_where_there_is_room_and_below_otherwise() {
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
    fn a_table_that_has_nothing_left_to_leave_out_stays_too_wide() {
        assert!(example().finish(Some(3)).starts_with("NAME\n"));
    }

    #[test]
    fn lines_are_broken_between_words_and_no_word_is_lost() {
        assert_eq!(wrap("one two three", Some(9)), "one two\n    three");
        assert_eq!(wrap("  one two", Some(6)), "  one\n  two");
        assert_eq!(wrap("unbreakable", Some(3)), "unbreakable");
        assert_eq!(wrap("as it is", None), "as it is");
    }
}
