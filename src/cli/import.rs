//! `tidegate import`: translates a configuration of another balancer.
//!
//! Called by the command line. It writes the report to standard error, and the configuration to
//! standard output or to a file. It writes no configuration if a line is lost that decides which
//! clients or backends are served, unless `--force` is given.

use clap::{Args, ValueEnum};
use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use tidegate_client::command::Exit;
use tidegate_import::{
    ImportKind, ImportRequest, Imported, IncludedFile, SOURCE_BYTES_MAX, VerdictCounts,
};

/// Help after the options.
pub const HELP: &str = "\
Example:
  tidegate import /etc/haproxy/haproxy.cfg -o tidegate.toml

The report on standard error has a verdict for every line of the file.

Exit codes: 0 everything that decides which clients and backends are served is
kept; 1 something of it is lost, or the file cannot be read; 2 usage error.";

/// `tidegate import`
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// Configuration of the other balancer.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Balancer that the file is for; default: by its name and its text.
    #[arg(long, value_name = "KIND")]
    from: Option<SourceKind>,
    /// Write the configuration to this file; default: standard output.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Form of the report.
    #[arg(long, value_name = "FORM", default_value = "text")]
    report: ReportForm,
    /// Value of a variable; default: the environment of this process.
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Fail if any line is approximated or dropped, too.
    #[arg(long)]
    strict: bool,
    /// Write the configuration in spite of what is lost.
    #[arg(long)]
    force: bool,
    /// Translate sections for HTTP as TCP.
    #[arg(long)]
    http_as_tcp: bool,
}

/// The value of `--from`.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum SourceKind {
    Haproxy,
    Nginx,
    Envoy,
    Traefik,
}

/// The value of `--report`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ReportForm {
    Text,
    Json,
}

/// Translates the file.
pub fn main(args: &ImportArgs) -> Exit {
    let name = args.file.display().to_string();
    let text = match read(&args.file) {
        Ok(text) => text,
        Err(why) => return complain(Exit::Refused, &format!("cannot read {name}: {why}")),
    };
    let file_name = args.file.file_name().map(|name| name.to_string_lossy().into_owned());
    let guessed = || tidegate_import::guess(&file_name.unwrap_or_default(), &text);
    let Some(kind) = args.from.map(SourceKind::kind).or_else(guessed) else {
        let why = "cannot tell which balancer the file is for; give --from KIND";
        return complain(Exit::Usage, why);
    };
    let mut environment: BTreeMap<String, String> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    environment.extend(args.env.iter().cloned());
    let directory = args.file.parent().unwrap_or(Path::new(""));
    let include = |pattern: &str| included(directory, pattern);
    let request = ImportRequest {
        name: &name,
        text: &text,
        environment,
        include: Some(&include),
        http_as_tcp: args.http_as_tcp,
    };
    finish(args, &tidegate_import::import(kind, &request))
}

/// Prints the report, writes the configuration, and decides the exit code.
fn finish(args: &ImportArgs, imported: &Imported) -> Exit {
    let report = match args.report {
        ReportForm::Text => imported.report.text(),
        ReportForm::Json => imported.report.json(),
    };
    // If standard error is closed, the report is lost.
    let _ = std::io::stderr().write_all(report.as_bytes());
    let counts = imported.report.counts();
    let verdict = verdict(args, &counts, imported.toml.is_some());
    if let (Some(why), ReportForm::Text) = (&verdict, args.report) {
        let _ = writeln!(std::io::stderr(), "tidegate: {why}");
    }
    if let Some(toml) = imported.toml.as_deref().filter(|_| verdict.is_none() || args.force)
        && let Err(why) = write(args.output.as_deref(), toml)
    {
        return complain(Exit::Failed, &why);
    }
    if verdict.is_some() { Exit::Refused } else { Exit::Fine }
}

/// Returns the reason why the import is not complete.
fn verdict(args: &ImportArgs, counts: &VerdictCounts, any: bool) -> Option<String> {
    let written = if args.force {
        "written because of --force"
    } else {
        "nothing is written; --force writes it"
    };
    if !any {
        return Some("no frontend can be translated; nothing is written".to_owned());
    }
    let lines = |number: usize| match number {
        1 => "1 line".to_owned(),
        number => format!("{number} lines"),
    };
    if counts.lost > 0 {
        let what = "that decide which clients or backends are served, or may do so, are lost";
        return Some(format!("{} {what}; {written}", lines(counts.lost)));
    }
    let differ = counts.approximated + counts.dropped;
    (args.strict && differ > 0)
        .then(|| format!("{} differ, see --strict; {written}", lines(differ)))
}

/// Reads the file, at most [`SOURCE_BYTES_MAX`].
fn read(path: &Path) -> Result<String, String> {
    let facts = std::fs::metadata(path).map_err(|error| error.to_string())?;
    if !facts.is_file() {
        return Err("it is not a regular file".to_owned());
    }
    if facts.len() > SOURCE_BYTES_MAX as u64 {
        return Err(format!("it has more than {SOURCE_BYTES_MAX} bytes"));
    }
    std::fs::read_to_string(path).map_err(|error| error.to_string())
}

/// Reads the files that match a pattern, in the order of their names. A relative pattern starts
/// at the directory of the file that was named.
///
/// # Errors
/// A file that cannot be read, or a name without `*` and `?` that does not exist.
fn included(directory: &Path, pattern: &str) -> Result<Vec<IncludedFile>, String> {
    let path = directory.join(pattern);
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let mut paths = vec![path.clone()];
    if name.contains(['*', '?']) {
        let entries = path.parent().map(std::fs::read_dir).into_iter().flatten().flatten();
        paths = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.file_name().is_some_and(|f| matches(&name, &f.to_string_lossy())))
            .collect();
        paths.sort();
    }
    let file = |path: &PathBuf| {
        let name = path.display().to_string();
        let text = read(path).map_err(|why| format!("cannot read {name}: {why}"))?;
        Ok(IncludedFile { name, text })
    };
    paths.iter().map(file).collect()
}

/// Returns true if a name matches a pattern with `*` and `?`.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), name.chars().collect());
    // The positions after the last `*`, to continue there with one more character.
    let (mut at, mut of, mut star) = (0, 0, None);
    while of < name.len() {
        if pattern.get(at) == Some(&'*') {
            star = Some((at, of));
            at += 1;
        } else if pattern.get(at).is_some_and(|c| *c == '?' || *c == name[of]) {
            (at, of) = (at + 1, of + 1);
        } else if let Some((star_at, star_of)) = star {
            (at, of) = (star_at + 1, star_of + 1);
            star = Some((star_at, star_of + 1));
        } else {
            return false;
        }
    }
    pattern[at..].iter().all(|c| *c == '*')
}

/// Writes the configuration. A new file is readable for its owner only, because the bytes that
/// probes send can be secret.
fn write(path: Option<&Path>, toml: &str) -> Result<(), String> {
    let Some(path) = path else {
        let written = std::io::stdout().write_all(toml.as_bytes());
        return written.map_err(|error| format!("cannot write to standard output: {error}"));
    };
    let mut options = std::fs::File::options();
    let file = options.write(true).create(true).truncate(true).mode(0o600).open(path);
    let written = file.and_then(|mut file| file.write_all(toml.as_bytes()));
    written.map_err(|error| format!("cannot write {}: {error}", path.display()))
}

/// Parses `NAME=VALUE`.
fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write NAME=VALUE".to_owned()),
    }
}

fn complain(exit: Exit, why: &str) -> Exit {
    // If standard error is closed, the message is lost.
    let _ = writeln!(std::io::stderr(), "tidegate: {why}");
    exit
}

impl SourceKind {
    fn kind(self) -> ImportKind {
        match self {
            SourceKind::Haproxy => ImportKind::Haproxy,
            SourceKind::Nginx => ImportKind::Nginx,
            SourceKind::Envoy => ImportKind::Envoy,
            SourceKind::Traefik => ImportKind::Traefik,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_names() {
        for (pattern, name) in [("*.conf", "a.conf"), ("a*b?d", "axxbcd"), ("*", ""), ("a", "a")] {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [("*.conf", "a.cfg"), ("a?", "a"), ("", "a"), ("a*b", "ac")] {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
    }
}
