//! The report of an import: one verdict for every directive line of the source.
//!
//! Filled by the readers, printed by the command line. It never reads a file.

use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;

/// Most characters of a directive that the report repeats.
const SHOWN_MAX: usize = 56;

/// A line of a source file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceLine {
    /// Position in the list of files; 0 is the file that was named.
    pub file: usize,
    /// From 1.
    pub line: usize,
}

/// What the import did with a line, the mildest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum LineVerdict {
    /// The line changes nothing for TCP, or nothing uses it.
    #[serde(rename = "without effect")]
    WithoutEffect,
    /// The output does the same.
    #[serde(rename = "translated")]
    Translated,
    /// The output does nearly the same; the text has the difference.
    #[serde(rename = "approximated")]
    Approximated,
    /// The output has nothing for it; the text has the reason.
    #[serde(rename = "dropped")]
    Dropped,
    /// The reader does not know the directive.
    #[serde(rename = "not understood")]
    NotUnderstood,
    /// Tidegate has no key for it.
    #[serde(rename = "NOT POSSIBLE")]
    NotPossible,
}

/// All verdicts of one import.
#[derive(Debug, Default)]
pub struct ImportReport {
    files: Vec<String>,
    lines: BTreeMap<SourceLine, LineNotes>,
}

/// One directive line and what was noted about it.
#[derive(Debug, Default)]
struct LineNotes {
    shown: String,
    notes: Vec<(LineVerdict, String)>,
    lost: bool,
}

/// One row of the report: a line, or neighbouring lines with the same verdict and text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReportRow {
    /// The file.
    pub file: String,
    /// The first line.
    pub line: usize,
    /// The last line.
    pub line_end: usize,
    /// Number of directive lines that this row is about.
    pub lines: usize,
    /// The verdict.
    pub verdict: LineVerdict,
    /// The directive, its result, and the reason.
    pub text: String,
    /// True if the line decides which clients or backends are served, and that is lost.
    pub lost: bool,
}

/// Number of directive lines with each verdict.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct VerdictCounts {
    /// Directive lines of all files.
    pub lines: usize,
    /// Lines that the output keeps.
    pub translated: usize,
    /// Lines that the output keeps with a difference.
    pub approximated: usize,
    /// Lines that the output leaves out.
    pub dropped: usize,
    /// Lines that change nothing.
    pub without_effect: usize,
    /// Lines that the reader does not know.
    pub not_understood: usize,
    /// Lines that Tidegate cannot express.
    pub not_possible: usize,
    /// Lines that decide which clients or backends are served, and are lost.
    pub lost: usize,
}

/// The JSON form of a report.
#[derive(Debug, Serialize)]
struct ReportDocument<'r> {
    counts: VerdictCounts,
    rows: &'r [ReportRow],
}

// === impl LineVerdict ===

impl LineVerdict {
    /// Returns the word of the report.
    pub fn word(self) -> &'static str {
        match self {
            LineVerdict::WithoutEffect => "without effect",
            LineVerdict::Translated => "translated",
            LineVerdict::Approximated => "approximated",
            LineVerdict::Dropped => "dropped",
            LineVerdict::NotUnderstood => "not understood",
            LineVerdict::NotPossible => "NOT POSSIBLE",
        }
    }
}

// === impl ImportReport ===

impl ImportReport {
    /// Adds a file and returns its number.
    pub fn add_file(&mut self, name: &str) -> usize {
        self.files.push(name.to_owned());
        self.files.len() - 1
    }

    /// Adds a directive line. A second call for the same line changes nothing.
    pub fn add_line(&mut self, at: SourceLine, shown: &str) {
        self.lines
            .entry(at)
            .or_insert_with(|| LineNotes { shown: cut(shown), ..Default::default() });
    }

    /// Notes a verdict. The worst one of a line counts.
    pub fn note(&mut self, at: SourceLine, verdict: LineVerdict, text: impl Into<String>) {
        let text = text.into();
        let line = self.lines.entry(at).or_default();
        line.lost |= verdict >= LineVerdict::NotUnderstood;
        if !line.notes.iter().any(|(known, said)| *known == verdict && *said == text) {
            line.notes.push((verdict, text));
        }
    }

    /// Notes that a line is left out although it decides which clients or backends are served.
    pub fn lose(&mut self, at: SourceLine, verdict: LineVerdict, text: impl Into<String>) {
        self.note(at, verdict, text);
        self.mark_lost(at);
    }

    /// Marks a line as one that decides which clients or backends are served, and is lost.
    pub fn mark_lost(&mut self, at: SourceLine) {
        self.lines.entry(at).or_default().lost = true;
    }

    /// Returns the lines without a verdict.
    pub fn undecided(&self) -> Vec<SourceLine> {
        let open = self.lines.iter().filter(|(_, line)| line.notes.is_empty());
        open.map(|(at, _)| *at).collect()
    }

    /// Returns true if the line has no verdict yet.
    pub fn is_undecided(&self, at: SourceLine) -> bool {
        self.lines.get(&at).is_some_and(|line| line.notes.is_empty())
    }

    /// Returns the verdict of the last line before this one, in the same file.
    pub(crate) fn verdict_before(&self, at: SourceLine) -> Option<LineVerdict> {
        let first = SourceLine { file: at.file, line: 0 };
        self.lines.range(first..at).next_back().map(|(_, line)| line.verdict())
    }

    /// Returns `FILE:LINE`.
    pub fn place(&self, at: SourceLine) -> String {
        format!("{}:{}", self.files.get(at.file).map_or("?", String::as_str), at.line)
    }

    /// Counts the verdicts. Their sum is the number of directive lines.
    pub fn counts(&self) -> VerdictCounts {
        let mut counts = VerdictCounts { lines: self.lines.len(), ..Default::default() };
        for line in self.lines.values() {
            counts.lost += usize::from(line.lost);
            *match line.verdict() {
                LineVerdict::WithoutEffect => &mut counts.without_effect,
                LineVerdict::Translated => &mut counts.translated,
                LineVerdict::Approximated => &mut counts.approximated,
                LineVerdict::Dropped => &mut counts.dropped,
                LineVerdict::NotUnderstood => &mut counts.not_understood,
                LineVerdict::NotPossible => &mut counts.not_possible,
            } += 1;
        }
        counts
    }

    /// Returns the rows, in the order of the source.
    pub fn rows(&self) -> Vec<ReportRow> {
        let mut rows: Vec<(usize, ReportRow)> = Vec::new();
        for (at, line) in &self.lines {
            let (verdict, text) = (line.verdict(), line.text());
            if let Some((file, last)) = rows.last_mut()
                && (*file, last.verdict, last.lost) == (at.file, verdict, line.lost)
                && last.text == text
            {
                last.line_end = at.line;
                last.lines += 1;
                continue;
            }
            let file = self.files.get(at.file).cloned().unwrap_or_default();
            let (line_end, lost) = (at.line, line.lost);
            let row = ReportRow { file, line: at.line, line_end, lines: 1, verdict, text, lost };
            rows.push((at.file, row));
        }
        rows.into_iter().map(|(_, row)| row).collect()
    }

    /// Returns the report as text: one line a row, and the counts.
    pub fn text(&self) -> String {
        let rows = self.rows();
        let places: Vec<String> = rows.iter().map(ReportRow::place).collect();
        let width = places.iter().map(|place| place.len()).max().unwrap_or(0).min(48);
        let mut text = String::new();
        for (row, place) in rows.iter().zip(&places) {
            let verdict = row.verdict.word();
            let _ = writeln!(text, "{place:width$}  {verdict:14}  {}", row.text);
        }
        let _ = writeln!(text, "{}", self.counts());
        text
    }

    /// Returns the report as one JSON object.
    pub fn json(&self) -> String {
        let rows = self.rows();
        let document = ReportDocument { counts: self.counts(), rows: &rows };
        serde_json::to_string_pretty(&document).unwrap_or_default() + "\n"
    }
}

impl LineNotes {
    /// A line that no reader decided is not understood.
    fn verdict(&self) -> LineVerdict {
        self.notes.iter().map(|note| note.0).max().unwrap_or(LineVerdict::NotUnderstood)
    }

    /// The directive and its notes. Of a line with a difference, only the differences.
    fn text(&self) -> String {
        let verdict = self.verdict();
        let least =
            if verdict > LineVerdict::Translated { LineVerdict::Approximated } else { verdict };
        let mut kept: Vec<_> = self.notes.iter().filter(|note| note.0 >= least).collect();
        kept.sort_by_key(|note| std::cmp::Reverse(note.0));
        let texts: Vec<&str> = kept.iter().map(|note| &*note.1).filter(|t| !t.is_empty()).collect();
        let kept = texts.join("; ");
        // A section that is left out as a whole has one text for all of its lines.
        if let Some(whole) = kept.strip_prefix(WHOLE) {
            return whole.to_owned();
        }
        match (verdict, kept.is_empty()) {
            (_, true) => self.shown.clone(),
            (LineVerdict::Translated, _) => format!("{} -> {kept}", self.shown),
            _ => format!("{}: {kept}", self.shown),
        }
    }
}

/// Marks a text that is about a whole section and not about a line of it.
pub(crate) const WHOLE: &str = "\u{1}";

// === impl ReportRow ===

impl ReportRow {
    /// Returns `FILE:LINE` or `FILE:LINE-LINE`.
    pub fn place(&self) -> String {
        match self.line == self.line_end {
            true => format!("{}:{}", self.file, self.line),
            false => format!("{}:{}-{}", self.file, self.line, self.line_end),
        }
    }
}

impl std::fmt::Display for VerdictCounts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} lines: {} translated, {} approximated, {} dropped, {} without effect, \
             {} not understood, {} NOT POSSIBLE",
            self.lines,
            self.translated,
            self.approximated,
            self.dropped,
            self.without_effect,
            self.not_understood,
            self.not_possible
        )
    }
}

/// Shortens a directive for the report, and replaces control characters.
fn cut(text: &str) -> String {
    let clean = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    let mut cut: String = clean.clone().take(SHOWN_MAX).collect();
    if clean.count() > SHOWN_MAX {
        cut.push('…');
    }
    cut
}
