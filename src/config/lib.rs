//! Converts the text of a configuration to the model, or reports every problem in it.
//!
//! Called by `daemon` and the command line through [`load`] and [`parse`]. I/O is limited
//! to reading the configuration file and the files that it names, and to looking up the
//! index of a network interface. The steps:
//!
//! 1. `source` reads the file.
//! 2. `file` walks the TOML document and keeps the place of each value.
//! 3. `validate`, `value` and `address` check values and fill in defaults.
//! 4. The result is a [`Config`], or every problem found (`diagnose`).

mod address;
mod defaults;
mod diagnose;
mod file;
mod host_name;
mod include;
pub mod keys;
mod origin;
mod schema;
pub mod source;
mod texts;
mod validate;
mod value;
mod writer;

use std::path::Path;

use toml::Spanned;
use toml::de::DeTable;

pub use diagnose::{PROBLEMS_MAX, Problem, Problems, Severity};
pub use include::INCLUDED_FILES_MAX;
pub use origin::{Origin, Spot};
pub use schema::schema;
pub use source::FILE_BYTES_MAX;
pub use texts::Texts;
pub use validate::{
    BACKENDS_MAX, BINDS_MAX, FRONTENDS_MAX, POOL_SOURCES_MAX, POOLS_MAX, REGISTRIES_MAX, ROUTES_MAX,
};
pub use writer::write;

use diagnose::ProblemCollector;
use include::IncludedFrom;
use source::SourceText;
use tidegate_core::model::Config;
use value::ValueError;

/// A configuration as read from a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// The model.
    pub config: Config,
    /// The file's text.
    pub text: String,
    /// XXH3 of the file's bytes. A reload of an unchanged file makes no new generation.
    pub digest: u64,
    /// Problems that do not reject the file, ordered by place.
    pub warnings: Vec<Problem>,
    /// The places of its values.
    pub origin: Origin,
}

/// Whether to read the files that a configuration names: keys and lists of ranges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NamedFiles<'t> {
    /// Read and check them.
    Read,
    /// Check the files in these texts; read and check the others.
    Kept(&'t Texts),
    /// Do not read them.
    Ignore,
}

/// Reads and validates a configuration file.
///
/// It also reads the files that the configuration names: heartbeat keys and lists of
/// ranges. It never waits for a writer, because it rejects FIFOs and everything else that
/// is not a regular file.
///
/// # Errors
/// Every problem found, with its place. A problem with the file itself (missing,
/// unreadable, a directory, larger than [`FILE_BYTES_MAX`]) is at line 1, column 1.
pub fn load(path: &Path) -> Result<Loaded, Problems> {
    let file = path.display().to_string();
    loaded(text_of(path, &file)?, &file, NamedFiles::Read, IncludedFrom::Disk(path))
}

/// Validates a configuration from texts that were kept. Reads a named file from disk if it
/// is not in the texts.
///
/// # Errors
/// As [`load`]'s.
pub fn load_kept(texts: &Texts) -> Result<Loaded, Problems> {
    let file = texts.path().display().to_string();
    let (files, from) = (NamedFiles::Kept(texts), IncludedFrom::Kept(texts));
    loaded(texts.text().to_owned(), &file, files, from)
}

fn loaded(
    text: String,
    file: &str,
    files: NamedFiles<'_>,
    from: IncludedFrom<'_>,
) -> Result<Loaded, Problems> {
    let ReadText { config, digest, warnings, origin } = read(&text, file, files, from)?;
    Ok(Loaded { config, text, digest, warnings, origin })
}

/// Reads and validates a configuration file without the files that it names.
///
/// Callers use it if they need only addresses, paths and the user, because those files
/// may be readable for another user only.
///
/// # Errors
/// As [`load`]'s.
pub fn outline(path: &Path) -> Result<(Config, Origin), Problems> {
    let file = path.display().to_string();
    let text = text_of(path, &file)?;
    let read = read(&text, &file, NamedFiles::Ignore, IncludedFrom::Disk(path))?;
    Ok((read.config, read.origin))
}

/// Validates a configuration from texts that were kept, without the files that it names.
///
/// # Errors
/// As [`load`]'s.
pub fn outline_kept(texts: &Texts) -> Result<(Config, Origin), Problems> {
    let file = texts.path().display().to_string();
    let read = read(texts.text(), &file, NamedFiles::Ignore, IncludedFrom::Kept(texts))?;
    Ok((read.config, read.origin))
}

/// Validates the text of a configuration without the files that it names. It includes no
/// files.
///
/// `file` is only its name in messages. A byte order mark before the first character is
/// skipped and is not a column. Line ends are LF or CRLF.
///
/// # Errors
/// The first TOML syntax error, or every semantic problem, ordered by place, at most
/// [`PROBLEMS_MAX`]. A text over [`FILE_BYTES_MAX`] is rejected before it is parsed.
pub fn parse(text: &str, file: &str) -> Result<Config, Problems> {
    read(text, file, NamedFiles::Ignore, IncludedFrom::Nowhere).map(|read| read.config)
}

/// The result of reading a text.
struct ReadText {
    config: Config,
    /// Of the text and all included texts.
    digest: u64,
    warnings: Vec<Problem>,
    origin: Origin,
}

/// Reads a main file and the files that it includes.
fn read(
    text: &str,
    file: &str,
    files: NamedFiles<'_>,
    from: IncludedFrom<'_>,
) -> Result<ReadText, Problems> {
    let digest = |text: &str| xxhash_rust::xxh3::xxh3_64(text.as_bytes());
    if text.len() > FILE_BYTES_MAX {
        return Err(Problems::of_file(file, source::too_large()));
    }
    let original = text;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let source = SourceText::new(file, text);
    let document = parse_toml(&source)?;
    let Some(joined) = include::join(&source, document.get_ref(), from)? else {
        return validated(&source, document.get_ref(), files, digest(original));
    };
    let source = SourceText::of_files(&joined.files, &joined.text);
    let document = parse_toml(&source)?;
    let mut read = validated(&source, document.get_ref(), files, digest(&joined.text))?;
    read.config.includes = joined.includes;
    Ok(read)
}

fn validated(
    source: &SourceText<'_>,
    document: &DeTable<'_>,
    files: NamedFiles<'_>,
    digest: u64,
) -> Result<ReadText, Problems> {
    let report = ProblemCollector::new(source);
    let config = validate::config(document, files, &report);
    let (warnings, origin) = report.finish()?;
    Ok(ReadText { config, digest, warnings, origin })
}

/// Parses a text.
fn parse_toml<'t>(source: &SourceText<'t>) -> Result<Spanned<DeTable<'t>>, Problems> {
    let text = source.text;
    let at = |offset: usize, complaint| Problems::one(source, &(offset..offset + 1), complaint);
    if let Some(nul) = text.find('\0') {
        let complaint = ValueError::new("the file holds a NUL byte");
        return Err(at(
            nul,
            complaint.help("it is not a text file, or was damaged while it was written"),
        ));
    }
    if let Some(deep) = file::too_deep_key(text) {
        return Err(at(deep, ValueError::new("this dotted key has too many parts")));
    }
    DeTable::parse(text).map_err(|error| syntax_error(source, &error))
}

fn text_of(path: &Path, file: &str) -> Result<String, Problems> {
    let bytes = source::read_file(path).map_err(|message| Problems::of_file(file, message))?;
    String::from_utf8(bytes)
        .map_err(|error| not_utf8(error.as_bytes(), file, error.utf8_error().valid_up_to()))
}

fn not_utf8(bytes: &[u8], file: &str, offset: usize) -> Problems {
    let complaint = ValueError::new(format!("the byte 0x{:02x} is not UTF-8 text", bytes[offset]))
        .help("save the file as UTF-8");
    // Up to `offset` the lossy text has the same bytes.
    let text = String::from_utf8_lossy(bytes);
    Problems::one(&SourceText::new(file, &text), &(offset..offset + 1), complaint)
}

/// Returns the error of the TOML parser in plain words, with the text that the file needs.
fn syntax_error(source: &SourceText<'_>, error: &toml::de::Error) -> Problems {
    let place = error.span().unwrap_or(0..0);
    let said = error.message();
    let at_end = source.text[place.start.min(source.text.len())..].trim().is_empty();
    let syntax = |what: &str| ValueError::new(format!("TOML syntax: {what}"));
    let complaint = match said {
        "duplicate key" => {
            let name = source.text.get(place.clone()).unwrap_or_default();
            include::defined_twice(source, &place).unwrap_or_else(|| {
                ValueError::new(format!("{} is already defined above", value::shown(name)))
                    .help("write each key and each [table] only once")
            })
        }
        _ if source.text.trim_start().starts_with('{') => {
            syntax("this is JSON").help("write the configuration in TOML: [TABLE] and KEY = VALUE")
        }
        "invalid basic string, expected `\"`" => {
            let complaint = syntax("the closing \" of a string is missing");
            if at_end { complaint.help("is the file complete?") } else { complaint }
        }
        _ => match unquoted(source.text, place.start) {
            Some("") => syntax("the value is missing"),
            Some(value) => syntax("text must be in double quotes")
                .help(format!("write {}", value::shown(value))),
            None => {
                let complaint = syntax(&said.replace('\n', " "));
                if at_end {
                    complaint.help("is the file complete?")
                } else if said.starts_with("key with no value") {
                    complaint.help("write KEY = VALUE")
                } else {
                    complaint
                }
            }
        },
    };
    Problems::one(source, &place, complaint)
}

/// Returns the value on the line of `at`, if it is a single text without quotes. Empty if
/// there is no value.
fn unquoted(text: &str, at: usize) -> Option<&str> {
    let start = text.get(..at)?.rfind('\n').map_or(0, |newline| newline + 1);
    let (key, value) = text[start..].lines().next()?.split_once('=')?;
    let before = at.checked_sub(start + key.len())?;
    let value = value.split('#').next().unwrap_or_default().trim();
    let plain = !value.contains(['"', '\'', '[', ']', '{', '}', ',', '=']);
    (before > 0 && plain && !key.trim().is_empty()).then_some(value)
}
