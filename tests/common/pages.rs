//! The project's Markdown pages as text, tables, links and blocks.
//!
//! Called by tests that compare pages with the program. It runs no program.

use std::fs;
use std::path::{Path, PathBuf};

pub(crate) fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Returns the text of a page. `name` is relative to the project's root.
pub(crate) fn page(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Returns every page for readers, sorted: in the project's root, in `docs` and in `examples`.
pub(crate) fn pages() -> Vec<String> {
    let mut found = Vec::new();
    let root_entries = fs::read_dir(root()).unwrap().map(|entry| entry.unwrap().path());
    found.extend(root_entries.filter(|path| is_page(path)));
    for directory in ["docs", "examples"] {
        collect(&root().join(directory), &mut found);
    }
    let name = |path: PathBuf| path.strip_prefix(root()).unwrap().display().to_string();
    let mut names: Vec<String> = found.into_iter().map(name).collect();
    names.sort();
    assert!(names.len() > 3, "{names:?}");
    names
}

fn is_page(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "md")
}

fn collect(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, found);
        } else if is_page(&path) {
            found.push(path);
        }
    }
}

/// Returns the rows of the first table whose head starts with `head`, without code marks. The
/// first row is the head.
pub(crate) fn table(text: &str, head: &str) -> Vec<Vec<String>> {
    let cells = |line: &str| -> Vec<String> {
        let inner = line.trim().trim_start_matches('|').trim_end_matches('|');
        inner.split('|').map(|cell| cell.trim().replace('`', "")).collect()
    };
    let rows: Vec<Vec<String>> = text
        .lines()
        .skip_while(|line| !line.starts_with(head))
        .take_while(|line| line.starts_with('|'))
        .map(cells)
        .collect();
    assert!(rows.len() > 2, "no table {head:?}");
    // Skips the line between the head and the rows.
    rows.into_iter().enumerate().filter(|(index, _)| *index != 1).map(|(_, row)| row).collect()
}

/// Returns column `number` of that table without its head.
pub(crate) fn column(text: &str, head: &str, number: usize) -> Vec<String> {
    table(text, head)[1..].iter().map(|row| row[number].clone()).collect()
}

/// Returns the fenced blocks of a language.
pub(crate) fn blocks<'t>(text: &'t str, language: &str) -> Vec<&'t str> {
    let open = format!("```{language}\n");
    let ends = |rest: &'t str| rest.split_once("\n```").expect("an end of the block").0;
    text.split(open.as_str()).skip(1).map(ends).collect()
}

/// Returns the text outside of fenced blocks.
pub(crate) fn prose(text: &str) -> String {
    let pieces = text.split("```").step_by(2);
    pieces.collect::<Vec<_>>().join("\n")
}

/// Returns the targets of the links in a page's prose.
pub(crate) fn links(text: &str) -> Vec<String> {
    let prose = prose(text);
    let inline = prose.split("](").skip(1).filter_map(|rest| rest.split_once(')'));
    inline.map(|(target, _)| target.to_owned()).collect()
}

/// Returns the anchors of a page's headings, as GitHub forms them.
pub(crate) fn anchors(text: &str) -> Vec<String> {
    let prose = prose(text);
    let headings = prose.lines().filter(|line| line.starts_with('#'));
    headings.map(|line| anchor(line.trim_start_matches('#').trim())).collect()
}

fn anchor(heading: &str) -> String {
    let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
    heading.to_lowercase().chars().filter(kept).collect::<String>().replace(' ', "-")
}

/// Calls `with` for the text of every Rust file under `directory`.
pub(crate) fn sources(directory: &str, with: &mut dyn FnMut(&str)) {
    for entry in fs::read_dir(root().join(directory)).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path.strip_prefix(root()).unwrap().display().to_string(), with);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            with(&fs::read_to_string(&path).unwrap());
        }
    }
}
