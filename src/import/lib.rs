//! Translates configurations of other balancers to Tidegate's, with a verdict for every line.
//!
//! Called by `tidegate import`. Pure: text in, text and report out. Steps:
//!
//! 1. A reader (`haproxy`) fills the common model of `draft` and notes a verdict for each
//!    directive line in the report.
//! 2. `write` converts the model to TOML that passes `tidegate check`.
//!
//! A part is never left out silently: a line without a verdict counts as not understood.

mod available;
mod draft;
mod haproxy;
mod prefix;
mod report;
#[cfg(test)]
mod tests;
mod times;
mod write;

pub use report::{ImportReport, LineVerdict, ReportRow, SourceLine, VerdictCounts};

use draft::Draft;
use std::collections::BTreeMap;

/// Largest file that an import reads, in bytes.
pub const SOURCE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// The balancer that a configuration is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImportKind {
    /// `haproxy.cfg`.
    Haproxy,
}

/// What to translate.
#[derive(Debug, Clone, Default)]
pub struct ImportRequest<'s> {
    /// Name of the file in places.
    pub name: &'s str,
    /// Its text.
    pub text: &'s str,
    /// Variables that the text can use.
    pub environment: BTreeMap<String, String>,
    /// Translate sections for HTTP as if they were for TCP.
    pub http_as_tcp: bool,
}

/// The result of an import.
#[derive(Debug)]
pub struct Imported {
    /// The configuration; it passes `tidegate check`. `None` if no frontend is left.
    pub toml: Option<String>,
    /// A verdict for every directive line.
    pub report: ImportReport,
}

/// Returns the balancer that a configuration is probably for, from its name and its text.
pub fn guess(name: &str, text: &str) -> Option<ImportKind> {
    let word = |word: &str| text.lines().any(|line| line.split_whitespace().next() == Some(word));
    let haproxy = name.contains("haproxy")
        || word("defaults") && (word("listen") || word("frontend"))
        || word("backend") && word("frontend");
    haproxy.then_some(ImportKind::Haproxy)
}

/// Translates a configuration.
pub fn import(kind: ImportKind, request: &ImportRequest<'_>) -> Imported {
    let mut report = ImportReport::default();
    let draft = match kind {
        ImportKind::Haproxy => haproxy::read(request, &mut report),
    };
    finish(&draft, report)
}

/// Writes the draft and completes the report.
fn finish(draft: &Draft, mut report: ImportReport) -> Imported {
    let toml = write::write(draft, &mut report);
    for at in report.undecided() {
        report.note(at, LineVerdict::NotUnderstood, "no part of the output is from this line");
    }
    let toml = toml.map(|text| headed(&report, &text));
    Imported { toml, report }
}

/// Puts a comment with everything that is lost before the text.
fn headed(report: &ImportReport, text: &str) -> String {
    let mut head = String::from("# Made by `tidegate import`. Each part names its source lines.\n");
    let lost = report.lost();
    if !lost.is_empty() {
        head.push_str("# LOST, and it decides which clients or backends are served:\n");
        for (at, what) in lost {
            let line = format!("{}: {what}", report.place(at));
            head.push_str("#   ");
            head.extend(line.chars().map(|c| if c.is_control() { ' ' } else { c }));
            head.push('\n');
        }
    }
    format!("{head}\n{text}")
}
