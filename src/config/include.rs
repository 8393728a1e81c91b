//! `include` of the main file: finds the files and joins their texts.
//!
//! Called by `lib` before a configuration is validated. The joined text is one TOML document:
//! the main file, then the included files in order. [`SourceText`] converts its offsets to
//! places in the files.
//!
//! An included file starts with a table header, so that its first keys do not fall into the
//! last table of the file before it. It includes no other file.

use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::diagnose::Problems;
use super::source::{self, FILE_BYTES_MAX, SourceText};
use super::value::{ValueError, shown};
use crate::Texts;
use tidegate_core::model::Includes;

/// Most files that a configuration includes.
pub const INCLUDED_FILES_MAX: usize = 1_000;

/// Most patterns of `include`.
const PATTERNS_MAX: usize = 64;

/// A main file with its included files.
pub(super) struct JoinedText {
    pub(super) text: String,
    /// The name of each file, and the offset at which its text starts.
    pub(super) files: Vec<(usize, String)>,
    pub(super) includes: Includes,
}

/// Where the included files come from.
#[derive(Debug, Clone, Copy)]
pub(super) enum IncludedFrom<'t> {
    /// The directory of the main file.
    Disk(&'t Path),
    /// Texts that were kept together with the main file.
    Kept(&'t Texts),
    /// Nowhere: the main file is only a text.
    Nowhere,
}

/// Joins a main file with the files that it includes. `None`: it has no `include`.
///
/// # Errors
/// The first problem: a wrong value, a file that cannot be read, a syntax error.
pub(super) fn join(
    main: &SourceText<'_>,
    document: &DeTable<'_>,
    from: IncludedFrom<'_>,
) -> Result<Option<JoinedText>, Problems> {
    let Some(node) = document.get("include") else { return Ok(None) };
    let fail = |place: Range<usize>, complaint| Problems::one(main, &place, complaint);
    let patterns = patterns(node).map_err(|(place, complaint)| fail(place, complaint))?;
    let mut joined = JoinedText {
        text: main.text.to_owned(),
        files: vec![(0, main.file.to_string())],
        includes: Includes::default(),
    };
    for pattern in patterns {
        let at = |complaint| fail(pattern.span(), complaint);
        let (path, files) = find(pattern.get_ref(), from).map_err(at)?;
        for file in files {
            if joined.includes.files.contains(&file) {
                let message = format!("{} is included twice", shown(&file.to_string_lossy()));
                return Err(at(ValueError::new(message)));
            }
            if joined.includes.files.len() == INCLUDED_FILES_MAX {
                let message = format!("include finds more than {INCLUDED_FILES_MAX} files");
                return Err(at(ValueError::new(message)));
            }
            joined.add(&read(&file, from).map_err(at)?, &file)?;
            if joined.text.len() > FILE_BYTES_MAX {
                return Err(at(ValueError::new(
                    source::too_large()
                        .replace("the file is", "the file and the included files together are"),
                )));
            }
            joined.includes.files.push(file);
        }
        joined.includes.patterns.push(path);
    }
    Ok(Some(joined))
}

/// Reads the value of `include`: a pattern, or a list of patterns.
fn patterns<'n>(
    node: &'n Spanned<DeValue<'_>>,
) -> Result<Vec<Spanned<&'n str>>, (Range<usize>, ValueError)> {
    let wrong = || ValueError::new("include takes file names such as \"conf.d/*.toml\"");
    let nodes = match node.get_ref() {
        DeValue::String(_) => std::slice::from_ref(node),
        DeValue::Array(array) if array.len() <= PATTERNS_MAX => array,
        DeValue::Array(_) => {
            let message = format!("include takes at most {PATTERNS_MAX} file names");
            return Err((node.span(), ValueError::new(message)));
        }
        _ => return Err((node.span(), wrong())),
    };
    nodes
        .iter()
        .map(|node| match node.get_ref() {
            DeValue::String(text) => Ok(Spanned::new(node.span(), text.as_ref())),
            _ => Err((node.span(), wrong())),
        })
        .collect()
}

/// Returns the path of a pattern, and the files that it matches, in order.
fn find(pattern: &str, from: IncludedFrom<'_>) -> Result<(PathBuf, Vec<PathBuf>), ValueError> {
    let (directory, name) = pattern.rsplit_once('/').unwrap_or(("", pattern));
    if name.is_empty() || pattern.contains('\0') {
        return Err(ValueError::new(format!("{} is not a file name", shown(pattern))));
    }
    if directory.contains('*') {
        return Err(ValueError::new("a directory of include takes no *")
            .help("write * only after the last /, such as \"conf.d/*.toml\""));
    }
    let base = match from {
        IncludedFrom::Disk(path) => path.parent(),
        IncludedFrom::Kept(texts) => texts.path().parent(),
        IncludedFrom::Nowhere => return Err(ValueError::new("a text alone cannot include files")),
    };
    let path = base.unwrap_or(Path::new("")).join(pattern);
    if !name.contains('*') {
        return Ok((path.clone(), vec![path]));
    }
    let parent = path.parent().unwrap_or(Path::new(""));
    let is_one = |path: &Path| {
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        path.parent() == Some(parent) && is_match(name, &file)
    };
    let mut files: Vec<PathBuf> = match from {
        IncludedFrom::Kept(texts) => texts.paths().filter(|path| is_one(path)).cloned().collect(),
        _ => matching(parent, is_one)?,
    };
    files.sort();
    Ok((path, files))
}

/// Returns the files of a directory.
fn matching(directory: &Path, is_one: impl Fn(&Path) -> bool) -> Result<Vec<PathBuf>, ValueError> {
    let shown_name = match directory.as_os_str().is_empty() {
        true => Path::new("."),
        false => directory,
    };
    let unreadable = |error: std::io::Error| {
        ValueError::new(format!("cannot read the directory {}: {error}", shown_name.display()))
    };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(shown_name).map_err(unreadable)? {
        let path = directory.join(entry.map_err(unreadable)?.file_name());
        if is_one(&path) {
            found.push(path);
        }
        if found.len() > INCLUDED_FILES_MAX {
            break;
        }
    }
    Ok(found)
}

/// Returns whether a file name matches a pattern, in which `*` is any text. A hidden file
/// matches only a pattern that starts with a dot.
fn is_match(pattern: &str, name: &str) -> bool {
    if name.starts_with('.') && !pattern.starts_with('.') {
        return false;
    }
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    let mut last = None;
    for part in parts {
        if let Some(middle) = last.replace(part) {
            match rest.find(middle) {
                Some(at) => rest = &rest[at + middle.len()..],
                None => return false,
            }
        }
    }
    last.map_or(rest.is_empty(), |last: &str| rest.ends_with(last))
}

fn read(path: &Path, from: IncludedFrom<'_>) -> Result<String, ValueError> {
    let kept = match from {
        IncludedFrom::Kept(texts) => texts.named(path).map(<[u8]>::to_vec),
        _ => None,
    };
    let bytes = kept.map_or_else(|| source::read_file(path), Ok);
    let bad = |why: String| {
        ValueError::new(format!("cannot include {}: {why}", shown(&path.to_string_lossy())))
    };
    let text = String::from_utf8(bytes.map_err(bad)?).map_err(|error| {
        bad(format!("byte {} is not UTF-8 text", error.utf8_error().valid_up_to()))
    })?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

/// Returns the error for a key that an included file defines again, with both places.
pub(super) fn defined_twice(joined: &SourceText<'_>, place: &Range<usize>) -> Option<ValueError> {
    let start = joined.start_of_file(place.start);
    let before = DeTable::parse(joined.text.get(..start)?).ok()?;
    let own = joined.text.get(start..joined.end_of_file(place.start))?;
    let own = DeTable::parse(own).ok()?;
    let path = path_to(own.get_ref(), place.start - start)?;
    let first = joined.place_name(key_at(before.get_ref(), &path)?);
    let name = shown(&path.join("."));
    Some(
        ValueError::new(format!("{name} is already defined at {first}"))
            .help("write each key and each [table] only once in all files"),
    )
}

/// Returns the path to the key whose name or value covers `offset`.
fn path_to(table: &DeTable<'_>, offset: usize) -> Option<Vec<String>> {
    table.iter().find_map(|(key, value)| {
        let name = key.get_ref().to_string();
        if key.span().contains(&offset) {
            return Some(vec![name]);
        }
        let inner = match value.get_ref() {
            DeValue::Table(inner) => path_to(inner, offset),
            _ if value.span().contains(&offset) => Some(Vec::new()),
            _ => None,
        };
        inner.map(|rest| std::iter::once(name).chain(rest).collect())
    })
}

/// Returns the offset of the key at the end of a path.
fn key_at(table: &DeTable<'_>, path: &[String]) -> Option<usize> {
    let (first, rest) = path.split_first()?;
    let (key, value) = table.get_key_value(first.as_str())?;
    match (rest, value.get_ref()) {
        ([], _) => Some(key.span().start),
        (rest, DeValue::Table(inner)) => key_at(inner, rest),
        _ => Some(key.span().start),
    }
}

// === impl JoinedText ===

impl JoinedText {
    /// Adds the text of an included file.
    fn add(&mut self, text: &str, path: &Path) -> Result<(), Problems> {
        let name = path.display().to_string();
        let source = SourceText::new(&name, text);
        let document = super::parse_toml(&source)?;
        if let Some((key, _)) = document.get_ref().get_key_value("include") {
            let complaint = ValueError::new("an included file cannot include files");
            return Err(Problems::one(&source, &key.span(), complaint));
        }
        if let Some(start) = first_key(text) {
            let complaint = ValueError::new("an included file must start with a table")
                .help("write a header such as [frontend.NAME] before the first key");
            return Err(Problems::one(&source, &(start..start + 1), complaint));
        }
        if !self.text.ends_with('\n') {
            self.text.push('\n');
        }
        self.files.push((self.text.len(), name));
        self.text.push_str(text);
        Ok(())
    }
}

/// Returns the offset of the first text that is no comment, unless it is a table header.
fn first_key(text: &str) -> Option<usize> {
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        let content = line.trim_start();
        if !content.is_empty() && !content.starts_with('#') {
            let start = at + line.len() - content.len();
            return (!content.starts_with('[')).then_some(start);
        }
        at += line.len();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn star_matches_any_part_of_a_name() {
        for (pattern, name) in
            [("*", "a"), ("*.toml", "a.toml"), ("a*b*c", "abc"), ("a*b*c", "a1b2bc"), ("a", "a")]
        {
            assert!(is_match(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [
            ("*.toml", ".a.toml"),
            ("*.toml", "a.tom"),
            ("a*b*c", "acb"),
            ("ab*b", "ab"),
            ("a", "ab"),
        ] {
            assert!(!is_match(pattern, name), "{pattern} {name}");
        }
    }

    #[test]
    fn only_a_header_can_be_first() {
        assert_eq!(first_key("# a\n\n [a]\nb = 1\n"), None);
        assert_eq!(first_key("# a\n"), None);
        assert_eq!(first_key("# a\n a.b = 1\n[a]"), Some(5));
    }
}
