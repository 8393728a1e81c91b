//! Problems of a configuration: collected with their places, ordered, and
//! rendered with the source line and a caret. Called by the validation, which
//! reports, and by whoever shows the outcome (`check`, the log, the admin
//! API). Never reads the file again: a problem carries all it needs.

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

/// Most errors, and most warnings, kept for one file; the rest is counted.
/// Nobody reads the thousand and first, and a hostile file cannot fill memory.
pub const PROBLEMS_MAX: usize = 1_000;

/// One thing wrong at one place.
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
    /// Whether the file is refused for it.
    #[serde(skip)]
    pub severity: Severity,
    /// What would be right, on one line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
    /// Absent where the file itself could not be read.
    #[serde(skip)]
    excerpt: Option<Excerpt>,
}

/// How much a problem matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// The file is refused.
    Error,
    /// The file is taken; it may not mean what it seems to.
    Warning,
}

/// Everything wrong with one file, ordered by place; never empty.
///
/// Serialises as the list alone. Displays as [`Problems::render`] without
/// colour.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Problems {
    /// The file as the operator named it.
    #[serde(skip)]
    pub file: Arc<str>,
    /// At most [`PROBLEMS_MAX`].
    pub list: Vec<Problem>,
    /// How many more there were.
    #[serde(skip)]
    pub omitted: usize,
}

/// Collects problems while a file is being validated. Shared by reference, so
/// that the readers of a section need no exclusive access to it.
#[derive(Debug)]
pub(super) struct ProblemCollector<'s> {
    pub(super) source: &'s SourceText<'s>,
    errors: RefCell<CollectedProblems>,
    warnings: RefCell<CollectedProblems>,
    spots: RefCell<HashMap<Spot, Range<usize>>>,
    /// Caps that stand in the file: place, name and value.
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
        let (line, column) = source.locate(place.start);
        Problem {
            file: Arc::clone(&source.file),
            line,
            column,
            message: what.message,
            severity,
            help: what.help,
            excerpt: Some(source.excerpt(place)),
        }
    }

    /// One with the file as a whole, shown at its first character.
    pub fn of_file(
        file: &Arc<str>,
        severity: Severity,
        message: String,
        help: Option<String>,
    ) -> Self {
        let (file, excerpt) = (Arc::clone(file), None);
        Problem { file, line: 1, column: 1, message, severity, help, excerpt }
    }

    /// `FILE:LINE:COLUMN: error: message`, the source line with a caret, then
    /// the help; no final line end. `colour` adds terminal escapes.
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
        // Wide enough that the renderer never cuts what the excerpt already did.
        let details = renderer.term_width(1_000).render(&[group]);
        // The renderer pads empty gutters; trailing blanks help nobody.
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
    /// Trouble with the file as a whole, shown at its first character.
    pub(super) fn of_file(file: &str, message: impl Into<String>) -> Self {
        Problem::of_file(&file.into(), Severity::Error, message.into(), None).into()
    }

    /// One error that ends the reading.
    pub(super) fn one(source: &SourceText<'_>, place: &Range<usize>, what: ValueError) -> Self {
        let problem = Problem::new(source, place, Severity::Error, what);
        Problems { file: Arc::clone(&source.file), list: vec![problem], omitted: 0 }
    }

    /// Every problem as [`Problem::render`] shows it, each ended by a line
    /// end, with an empty line between two.
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

    /// Notes an error at `place`.
    pub(super) fn error(&self, place: Range<usize>, what: ValueError) {
        self.errors.borrow_mut().push(place, || what);
    }

    /// The same where making the message costs something: not asked once the
    /// list is full.
    pub(super) fn error_with(&self, place: Range<usize>, what: impl FnOnce() -> ValueError) {
        self.errors.borrow_mut().push(place, what);
    }

    /// Errors noted so far.
    pub(super) fn errors(&self) -> usize {
        let errors = self.errors.borrow();
        errors.list.len() + errors.omitted
    }

    /// Notes a warning at `place`.
    pub(super) fn warning(&self, place: Range<usize>, what: ValueError) {
        self.warnings.borrow_mut().push(place, || what);
    }

    /// The same where making the message costs something.
    pub(super) fn warning_with(&self, place: Range<usize>, what: impl FnOnce() -> ValueError) {
        self.warnings.borrow_mut().push(place, what);
    }

    /// Keeps where something stands, for problems found later.
    pub(super) fn keep(&self, spot: Spot, place: Option<Range<usize>>) {
        if let Some(place) = place {
            self.spots.borrow_mut().entry(spot).or_insert(place);
        }
    }

    /// Notes a cap on sessions, where one is given.
    pub(super) fn limit(&self, name: &'static str, field: &Field<u32>) {
        if let Field::Good(value) = field
            && *value.get_ref() > 0
        {
            self.limits.borrow_mut().push((value.span(), name, *value.get_ref()));
        }
    }

    /// Warns of the caps that the whole process's keeps from being reached.
    pub(super) fn warn_of_idle_limits(&self, process: u32) {
        for (place, name, value) in self.limits.take() {
            if value > process {
                let message =
                    format!("{name} is never reached: connections_max of [process] is {process}");
                self.warning(place, ValueError::new(message));
            }
        }
    }

    /// `FILE:LINE:COLUMN`, to name another place in a message.
    pub(super) fn place_name(&self, place: &Range<usize>) -> String {
        let (line, column) = self.source.locate(place.start);
        format!("{}:{line}:{column}", self.source.file)
    }

    /// The warnings and where things stand, or the errors if there was any.
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
        let list = self.list.into_iter();
        list.map(|(place, what)| Problem::new(source, &place, severity, what)).collect()
    }
}
