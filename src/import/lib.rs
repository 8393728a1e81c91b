//! Translates configurations of other balancers to Tidegate's, with a verdict for every line.
//!
//! Called by `tidegate import`. Pure: text in, text and report out. Steps:
//!
//! 1. A reader (`haproxy`, `nginx`, `envoy`, `traefik`) fills the common model of `draft` and notes a verdict for each
//!    directive line in the report.
//! 2. `defaults` moves what all sections have alike to `[defaults]`.
//! 3. `write` converts the model to TOML that passes `tidegate check`.
//!
//! A part is never left out silently: a line without a verdict counts as not understood.

mod available;
mod defaults;
mod doc;
mod draft;
mod envoy;
mod envoy_cluster;
mod haproxy;
mod nginx;
mod prefix;
mod report;
#[cfg(test)]
mod tests;
mod times;
mod traefik;
mod write;

pub use report::{ImportReport, LineVerdict, ReportRow, SourceLine, VerdictCounts};

use draft::Draft;
use std::collections::{BTreeMap, BTreeSet};

/// Largest file that an import reads, in bytes.
pub const SOURCE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// The balancer that a configuration is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImportKind {
    /// `haproxy.cfg`.
    Haproxy,
    /// `nginx.conf` with `stream` blocks.
    Nginx,
    /// A static configuration of Envoy in YAML.
    Envoy,
    /// A configuration of Traefik in YAML or TOML.
    Traefik,
}

/// All kinds.
pub const KINDS: [ImportKind; 4] =
    [ImportKind::Haproxy, ImportKind::Nginx, ImportKind::Envoy, ImportKind::Traefik];

/// A file that another one includes.
#[derive(Debug, Clone)]
pub struct IncludedFile {
    /// Name of the file in places.
    pub name: String,
    /// Its text.
    pub text: String,
}

/// Reads the files that match the pattern of an `include`.
pub type IncludeReader<'s> = &'s dyn Fn(&str) -> Result<Vec<IncludedFile>, String>;

/// What to translate.
#[derive(Clone, Default)]
pub struct ImportRequest<'s> {
    /// Name of the file in places.
    pub name: &'s str,
    /// Its text.
    pub text: &'s str,
    /// Variables that the text can use.
    pub environment: BTreeMap<String, String>,
    /// Reads included files. Without it, an `include` is not understood.
    pub include: Option<IncludeReader<'s>>,
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
    let key = |key: &str| {
        let whole = |rest: &str| rest.is_empty() || rest.starts_with([':', '.', ']', ' ']);
        text.lines().any(|line| {
            let line = line.trim_start_matches('[');
            line.strip_prefix(key).is_some_and(whole)
        })
    };
    let document = [".yaml", ".yml", ".toml"].iter().any(|ending| name.ends_with(ending));
    if document && key("static_resources") {
        return Some(ImportKind::Envoy);
    }
    if document && ["entryPoints", "tcp", "http", "providers"].iter().any(|one| key(one)) {
        return Some(ImportKind::Traefik);
    }
    let haproxy = name.contains("haproxy")
        || word("defaults") && (word("listen") || word("frontend"))
        || word("backend") && word("frontend");
    let block = |name: &str| {
        text.lines().any(|line| {
            let rest = line.trim_start().strip_prefix(name);
            rest.is_some_and(|rest| rest.trim_start().starts_with('{'))
        })
    };
    let nginx = name.contains("nginx") || ["stream", "events", "http"].iter().any(|b| block(b));
    match (haproxy, nginx) {
        (true, _) => Some(ImportKind::Haproxy),
        (_, true) => Some(ImportKind::Nginx),
        _ => None,
    }
}

/// Translates a configuration.
pub fn import(kind: ImportKind, request: &ImportRequest<'_>) -> Imported {
    let mut report = ImportReport::default();
    let draft = match kind {
        ImportKind::Haproxy => haproxy::read(request, &mut report),
        ImportKind::Nginx => nginx::read(request, &mut report),
        ImportKind::Envoy => envoy::read(request, &mut report),
        ImportKind::Traefik => traefik::read(request, &mut report),
    };
    finish(draft, report)
}

/// Writes the draft and completes the report.
fn finish(mut draft: Draft, mut report: ImportReport) -> Imported {
    drop_unused_pools(&mut draft, &mut report);
    let shared = defaults::take_shared(&mut draft);
    let toml = write::write(&draft, &shared, &mut report);
    for at in report.undecided() {
        report.note(at, LineVerdict::NotUnderstood, "no part of the output is from this line");
    }
    let toml = toml.map(|text| headed(&report, &text));
    Imported { toml, report }
}

/// Removes pools whose frontends could not be translated.
fn drop_unused_pools(draft: &mut Draft, report: &mut ImportReport) {
    let mut used = BTreeSet::new();
    for frontend in &draft.frontends {
        used.insert(frontend.pool.clone());
        used.extend(frontend.routes.iter().filter_map(|route| route.pool.clone()));
    }
    draft.pools.retain(|pool| {
        let keep = used.contains(&pool.name);
        let lines = pool.at.iter().chain(pool.backends.iter().flat_map(|backend| &backend.at));
        for at in lines.filter(|_| !keep) {
            report.note(*at, LineVerdict::Dropped, "no frontend is left that uses it");
        }
        keep
    });
}

/// Puts a comment with everything that is lost before the text.
fn headed(report: &ImportReport, text: &str) -> String {
    let mut head = String::from("# Made by `tidegate import`. Each part names its source lines.\n");
    let lost: Vec<ReportRow> = report.rows().into_iter().filter(|row| row.lost).collect();
    if !lost.is_empty() {
        head.push_str("# LOST, and it decides which clients or backends are served:\n");
    }
    for row in lost {
        let line = format!("{}: {}", row.place(), row.text);
        head.push_str("#   ");
        head.extend(line.chars().map(|c| if c.is_control() { ' ' } else { c }));
        head.push('\n');
    }
    format!("{head}\n{text}")
}

/// Translates any text and checks what holds for every text. For fuzzing and tests.
///
/// # Panics
/// The verdicts do not add up to the directive lines, or the output is not valid.
pub fn fuzz(kind: ImportKind, text: &str) {
    let request = ImportRequest { name: "f", text, ..Default::default() };
    let imported = import(kind, &request);
    let counts = imported.report.counts();
    let sum = counts.translated
        + counts.approximated
        + counts.dropped
        + counts.without_effect
        + counts.not_understood
        + counts.not_possible;
    assert_eq!(sum, counts.lines, "every line has one verdict");
    let rows: usize = imported.report.rows().iter().map(|row| row.lines).sum();
    assert_eq!(rows, counts.lines, "every line is in a row");
    if let Some(toml) = imported.toml {
        let parsed = tidegate_config::parse(&toml, "output");
        assert!(parsed.is_ok(), "the output is valid: {parsed:?}");
    }
}
