//! Problems of a configuration: collected with their places, sorted, and rendered with
//! the source line and a caret.
//!
//! Called by `validate`, which reports problems, and by the code that shows them:
//! `check`, the log and the admin API. It never reads the file again, because a problem
//! holds its own excerpt.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use annotate_snippets::renderer::{DEFAULT_ERROR_STYLE, DEFAULT_WARNING_STYLE, Effects, Style};
use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet};
use serde::Serialize;

use super::file::Field;
use super::origin::{Origin, Spot};
use super::source::{Excerpt, SourceText};
use super::value::ValueError;

/// Most errors, and most warnings, that are kept for one file. The rest is counted.
///
/// The bound keeps a hostile file from filling memory.
pub const PROBLEMS_MAX: usize = 1_000;

/// An error or a warning at one place of a file.
///
/// Serialises as `{file, line, column, message, help}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The file as the operator named it.
    pub file: Arc<str>,
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    /// One line, no full stop.
    pub message: String,
    /// An error rejects the file; a warning does not.
    #[serde(skip)]
    pub severity: Severity,
    /// The correction, on one line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
    /// Absent if the file could not be read.
    #[serde(skip)]
    excerpt: Option<Excerpt>,
}

/// How much a problem matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// The file is rejected.
    Error,
    /// The file is accepted, but a key in it has no effect or a surprising one.
    Warning,
}

/// The problems of one file, ordered by place. Never empty.
///
/// Serialises as the list alone. Displays as [`Problems::render`] without colour.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Problems {
    /// The file as the operator named it.
    #[serde(skip)]
    pub file: Arc<str>,
    /// At most [`PROBLEMS_MAX`].
    pub list: Vec<Problem>,
    /// Number of problems beyond [`PROBLEMS_MAX`].
    #[serde(skip)]
    pub omitted: usize,
}

/// Collects problems while a file is validated.
///
/// Shared by reference, so that several sections can report to it at the same time.
#[derive(Debug)]
pub(super) struct ProblemCollector<'s> {
    pub(super) source: &'s SourceText<'s>,
    errors: RefCell<CollectedProblems>,
    warnings: RefCell<CollectedProblems>,
    spots: RefCell<HashMap<Spot, Range<usize>>>,
    /// The caps on sessions that the file sets: place, name and value.
    limits: RefCell<Vec<(Range<usize>, &'static str, u32)>>,
}

#[derive(Debug, Default)]
struct CollectedProblems {
    /// Invariant: at most [`PROBLEMS_MAX`].
    list: Vec<(Range<usize>, ValueError)>,
    omitted: usize,
}

// === impl Problem ===

impl Problem {
    pub(super) fn new(
        source: &SourceText<'_>,
        place: &Range<usize>,
        severity: Severity,
        what: ValueError,
    ) -> Self {
        let (file, line, column) = source.locate(place.start);
        Problem {
            file,
            line,
            column,
            message: what.message,
            severity,
            help: what.help,
            excerpt: Some(source.excerpt(place)),
        }
    }

    /// Makes a problem of the file as a whole, shown at its first character.
    pub fn of_file(
        file: &Arc<str>,
        severity: Severity,
        message: String,
        help: Option<String>,
    ) -> Self {
        let (file, excerpt) = (Arc::clone(file), None);
        Problem { file, line: 1, column: 1, message, severity, help, excerpt }
    }

    /// Renders `FILE:LINE:COLUMN: error: message`, the source line with a caret, and the
    /// help, without a final line end.
    ///
    /// `colour` adds terminal escapes.
    pub fn render(&self, colour: bool) -> String {
        let (bold, style) = match (colour, self.severity) {
            (false, _) => (Style::new(), Style::new()),
            (true, Severity::Error) => (Style::new().effects(Effects::BOLD), DEFAULT_ERROR_STYLE),
            (true, Severity::Warning) => {
                (Style::new().effects(Effects::BOLD), DEFAULT_WARNING_STYLE)
            }
        };
        let Problem { file, line, column, message, severity, .. } = self;
        let mut text = format!(
            "{bold}{file}:{line}:{column}:{bold:#} {style}{severity}:{style:#} {bold}{message}{bold:#}"
        );
        let details = self.render_details(colour);
        if !details.is_empty() {
            text.push('\n');
            text.push_str(&details);
        }
        text
    }

    fn render_details(&self, colour: bool) -> String {
        let level = match self.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let Some(excerpt) = &self.excerpt else {
            return self.help.as_ref().map_or(String::new(), |help| format!("   = help: {help}"));
        };
        let mark = AnnotationKind::Primary.span(excerpt.mark.clone());
        let snippet = Snippet::source(excerpt.text.as_str())
            .line_start(self.line)
            .fold(false)
            .annotation(mark);
        let mut group = Group::with_level(level).element(snippet);
        if let Some(help) = &self.help {
            group = group.element(Level::HELP.message(help.as_str()));
        }
        let renderer = if colour { Renderer::styled() } else { Renderer::plain() };
        // The excerpt is already cut; at this width the renderer does not cut it again.
        let details = renderer.term_width(1_000).render(&[group]);
        // The renderer pads empty gutters with blanks.
        let lines: Vec<&str> = details.lines().map(str::trim_end).collect();
        lines.join("\n")
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(false))
    }
}

// === impl Severity ===

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Severity::Error => "error",
            Severity::Warning => "warning",
        })
    }
}

// === impl Problems ===

impl Problems {
    /// Makes an error of the file as a whole, shown at its first character.
    pub(super) fn of_file(file: &str, message: impl Into<String>) -> Self {
        Problem::of_file(&file.into(), Severity::Error, message.into(), None).into()
    }

    /// Makes the only error of a file, for an error that ends the reading.
    pub(super) fn one(source: &SourceText<'_>, place: &Range<usize>, what: ValueError) -> Self {
        let problem = Problem::new(source, place, Severity::Error, what);
        Problems { file: Arc::clone(&source.file), list: vec![problem], omitted: 0 }
    }

    /// Renders every problem with [`Problem::render`], with an empty line between two.
    pub fn render(&self, colour: bool) -> String {
        let mut blocks: Vec<String> =
            self.list.iter().map(|problem| problem.render(colour) + "\n").collect();
        if self.omitted > 0 {
            blocks.push(format!("{}: {} more problems are not shown\n", self.file, self.omitted));
        }
        blocks.join("\n")
    }
}

impl From<Problem> for Problems {
    fn from(problem: Problem) -> Problems {
        Problems { file: Arc::clone(&problem.file), list: vec![problem], omitted: 0 }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.render(false).trim_end())
    }
}

impl std::error::Error for Problems {}

// === impl ProblemCollector ===

impl<'s> ProblemCollector<'s> {
    pub(super) fn new(source: &'s SourceText<'s>) -> Self {
        let (errors, warnings) = (RefCell::default(), RefCell::default());
        let (spots, limits) = (RefCell::default(), RefCell::default());
        ProblemCollector { source, errors, warnings, spots, limits }
    }

    /// Reports an error at `place`.
    pub(super) fn error(&self, place: Range<usize>, what: ValueError) {
        self.errors.borrow_mut().push(place, || what);
    }

    /// Reports an error at `place`. Calls `what` only if the list is not full.
    pub(super) fn error_with(&self, place: Range<usize>, what: impl FnOnce() -> ValueError) {
        self.errors.borrow_mut().push(place, what);
    }

    /// Returns the number of errors reported until now.
    pub(super) fn errors(&self) -> usize {
        let errors = self.errors.borrow();
        errors.list.len() + errors.omitted
    }

    /// Reports a warning at `place`.
    pub(super) fn warning(&self, place: Range<usize>, what: ValueError) {
        self.warnings.borrow_mut().push(place, || what);
    }

    /// Reports a warning at `place`. Calls `what` only if the list is not full.
    pub(super) fn warning_with(&self, place: Range<usize>, what: impl FnOnce() -> ValueError) {
        self.warnings.borrow_mut().push(place, what);
    }

    /// Stores the place of a value for problems that are found after reading.
    pub(super) fn keep(&self, spot: Spot, place: Option<Range<usize>>) {
        if let Some(place) = place {
            self.spots.borrow_mut().entry(spot).or_insert(place);
        }
    }

    /// Stores a cap on sessions, if the file sets it and it is not 0.
    pub(super) fn limit(&self, name: &'static str, field: &Field<u32>) {
        if let Field::Good(value) = field
            && *value.get_ref() > 0
        {
            self.limits.borrow_mut().push((value.span(), name, *value.get_ref()));
        }
    }

    /// Warns of each cap that is above the cap of the process.
    pub(super) fn warn_of_idle_limits(&self, process: u32) {
        for (place, name, value) in self.limits.take() {
            if value > process {
                let message =
                    format!("{name} is never reached: connections_max of [process] is {process}");
                self.warning(place, ValueError::new(message));
            }
        }
    }

    /// Returns `FILE:LINE:COLUMN`, which names another place in a message.
    pub(super) fn place_name(&self, place: &Range<usize>) -> String {
        self.source.place_name(place.start)
    }

    /// Returns the warnings and the places of values, or the errors if any was reported.
    pub(super) fn finish(self) -> Result<(Vec<Problem>, Origin), Problems> {
        let errors = self.errors.into_inner();
        if errors.list.is_empty() {
            let warnings = self.warnings.into_inner().into_problems(self.source, Severity::Warning);
            return Ok((warnings, Origin::new(self.source, self.spots.into_inner())));
        }
        let omitted = errors.omitted;
        let list = errors.into_problems(self.source, Severity::Error);
        Err(Problems { file: Arc::clone(&self.source.file), list, omitted })
    }
}

// === impl CollectedProblems ===

impl CollectedProblems {
    fn push(&mut self, place: Range<usize>, what: impl FnOnce() -> ValueError) {
        if self.list.len() < PROBLEMS_MAX {
            self.list.push((place, what()));
        } else {
            self.omitted += 1;
        }
    }

    fn into_problems(mut self, source: &SourceText<'_>, severity: Severity) -> Vec<Problem> {
        self.list.sort_by_key(|(place, _)| place.start);
        // Each section that takes a wrong default reports it.
        self.list.dedup();
        let list = self.list.into_iter();
        list.map(|(place, what)| Problem::new(source, &place, severity, what)).collect()
    }
}
