//! Rules about the source tree itself: who may use whom, where `unsafe` and
//! clocks may stand, how large files may grow, and words that must not stay.
//!
//! Reads `src`, `tests`, `benches` and `scripts` as text; each finding names
//! its file and line. It parses no Rust beyond paths and comments.

#![allow(clippy::unwrap_used)]

use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Lines a source file may have before it is two things.
const FILE_LINES_MAX: usize = 600;

/// Files that were longer when the rule came, with the length they may not
/// exceed. Entries only shrink and go; new ones need a reason beside them.
const LONGER_FILES: [(&str, usize); 0] = [];

/// Uses against the directions, each with its reason. Entries only go.
const EXCUSED_USES: [(&str, &str); 0] = [];

/// Layers from the bottom; a module uses its own layer and those below it.
/// The longest matching prefix counts.
const LAYERS: [(&str, Layer); 26] = [
    ("net", Layer::Base),
    ("clock", Layer::Base),
    ("telemetry", Layer::Base),
    ("secret_file", Layer::Base),
    ("control", Layer::Core),
    ("table", Layer::Core),
    ("balance", Layer::Core),
    ("health", Layer::Core),
    ("config", Layer::Core),
    ("heartbeat", Layer::Core),
    ("proxy::admission", Layer::Core),
    ("proxy::close", Layer::Core),
    ("admin", Layer::Shell),
    ("load", Layer::Shell),
    ("proxy", Layer::Shell),
    ("health::probe", Layer::Shell),
    ("heartbeat::listen", Layer::Shell),
    ("heartbeat::sender", Layer::Shell),
    ("config::watch", Layer::Shell),
    ("supervisor", Layer::Shell),
    ("app", Layer::App),
    ("demo", Layer::App),
    ("cli", Layer::Cli),
    ("fuzz", Layer::Cli),
    ("main", Layer::Main),
    ("lib", Layer::Main),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Layer {
    /// System calls, clocks, counters.
    Base,
    /// Pure decisions: no I/O, no clock, no runtime.
    Core,
    /// I/O and threads; shells never use each other.
    Shell,
    App,
    Cli,
    Main,
}

/// What the core may not name, in code.
const NOT_IN_THE_CORE: [&str; 12] = [
    "tokio",
    "hyper::",
    "axum::",
    "notify::",
    "crate::net",
    "crate::clock",
    "TcpStream",
    "TcpListener",
    "UdpSocket",
    "UnixStream",
    "std::thread",
    "Instant::now",
];

// === the rules ===

#[test]
fn modules_use_only_what_lies_below_them() {
    let mut findings = String::new();
    for file in sources("src") {
        let from = file.module();
        let Some((unit, layer)) = place(&from) else {
            let _ = writeln!(findings, "{}: give module {from} a layer in tidy.rs", file.name);
            continue;
        };
        for (line, to) in file.uses() {
            let Some((target, below)) = place(&to) else { continue };
            let allowed = unit == target
                || layer > below
                || (layer == below && layer < Layer::Shell)
                || EXCUSED_USES.contains(&(from.as_str(), to.as_str()));
            if !allowed {
                let _ = writeln!(findings, "{}:{line}: {from} uses {to}", file.name);
            }
        }
    }
    assert!(findings.is_empty(), "\n{findings}");
}

#[test]
fn the_core_does_no_io_and_reads_no_clock() {
    let mut findings = String::new();
    for file in sources("src") {
        if place(&file.module()).is_none_or(|(_, layer)| layer != Layer::Core) {
            continue;
        }
        for (number, line) in file.code() {
            for word in NOT_IN_THE_CORE.iter().filter(|word| line.contains(**word)) {
                let _ = writeln!(findings, "{}:{number}: {word}", file.name);
            }
            // `config::load` reads one file (and through `secret_file` the keys it
            // names); that is all the core's I/O.
            if line.contains("std::fs") && file.name != "src/config/source.rs" {
                let _ = writeln!(findings, "{}:{number}: std::fs", file.name);
            }
        }
    }
    assert!(findings.is_empty(), "\n{findings}");
}

#[test]
fn unsafe_stands_in_net_alone() {
    assert_only_in("unsafe", |name| name.starts_with("src/net/") || name == "src/net.rs");
}

#[test]
fn clocks_are_read_in_clock_alone() {
    for call in ["Instant::now", "SystemTime::now"] {
        assert_only_in(call, |name| name == "src/clock.rs");
    }
}

#[test]
fn no_file_is_two_things() {
    let mut findings = String::new();
    for file in sources("src").iter().chain(&sources("tests")).chain(&sources("benches")) {
        let lines = file.text.lines().count();
        let kept = LONGER_FILES.iter().find(|(name, _)| *name == file.name);
        match kept {
            Some((name, _)) if lines <= FILE_LINES_MAX => {
                let _ = writeln!(findings, "{name}: strike it from the list, it has {lines} lines");
            }
            Some((name, most)) if lines > *most => {
                let _ = writeln!(findings, "{name}: {lines} lines, was {most}");
            }
            None if lines > FILE_LINES_MAX => {
                let _ = writeln!(findings, "{}: {lines} lines", file.name);
            }
            _ => {}
        }
    }
    assert!(findings.is_empty(), "\n{findings}");
}

#[test]
fn every_file_says_what_it_is() {
    let silent: Vec<String> = sources("src")
        .into_iter()
        .chain(sources("tests"))
        .chain(sources("benches"))
        .filter(|file| !file.text.starts_with("//! "))
        .map(|file| file.name)
        .collect();
    assert!(silent.is_empty(), "no opening //!: {silent:#?}");
}

#[test]
fn nothing_unfinished_stays() {
    // In two parts, so that this file may stand among those it reads.
    let words = [
        concat!("to", "do!("),
        concat!("unimpl", "emented!("),
        concat!("db", "g!("),
        concat!("FIX", "ME"),
        concat!("XX", "X"),
    ];
    let mut findings = String::new();
    for file in ["src", "tests", "benches", "scripts"].iter().flat_map(|dir| sources(dir)) {
        for (number, line) in (1..).zip(file.text.lines()) {
            for word in words.iter().filter(|word| line.contains(**word)) {
                let _ = writeln!(findings, "{}:{number}: {word}", file.name);
            }
        }
    }
    assert!(findings.is_empty(), "\n{findings}");
}

fn assert_only_in(word: &str, allowed: impl Fn(&str) -> bool) {
    let mut findings = String::new();
    for file in sources("src").iter().filter(|file| !allowed(&file.name)) {
        for (number, line) in file.all_code() {
            if has_word(line, word) {
                let _ = writeln!(findings, "{}:{number}: {word}", file.name);
            }
        }
    }
    assert!(findings.is_empty(), "\n{findings}");
}

// === reading ===

struct Source {
    /// From the project's root, with forward slashes.
    name: String,
    text: String,
}

/// Every Rust file (and script) under `dir`, sorted.
fn sources(dir: &str) -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    collect(&root.join(dir), &mut files);
    files.sort();
    let read = |path: PathBuf| {
        let name = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
        Source { name, text: std::fs::read_to_string(&path).unwrap_or_default() }
    };
    let files: Vec<Source> = files.into_iter().map(read).collect();
    assert!(dir != "src" || files.len() > 10, "the source tree is where this test looks");
    files
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        let rust = path.extension().is_some_and(|extension| extension == "rs");
        // `tests/fuzz` is a project of its own, with its own target directory.
        if path.is_dir() && !path.ends_with("fuzz") {
            collect(&path, files);
        } else if rust || dir.ends_with("scripts") {
            files.push(path);
        }
    }
}

impl Source {
    /// `src/a/b.rs` is `a::b`, `src/a/mod.rs` is `a`.
    fn module(&self) -> String {
        let path = self.name.trim_start_matches("src/").trim_end_matches(".rs");
        path.trim_end_matches("/mod").replace('/', "::")
    }

    /// Numbered lines without comments, unit tests left out.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let tests = self.text.find("#[cfg(test)]\nmod tests {").unwrap_or(self.text.len());
        let is_tests = self.name.ends_with("/tests.rs") || self.name.contains("/tests/");
        let end = if is_tests { 0 } else { self.text[..tests].lines().count() };
        self.all_code().take_while(move |(number, _)| *number <= end)
    }

    /// Numbered lines without comments.
    fn all_code(&self) -> impl Iterator<Item = (usize, &str)> {
        (1..).zip(self.text.lines().map(|line| line.split("//").next().unwrap_or("")))
    }

    /// Every path in code that starts at the crate's root or above this module.
    fn uses(&self) -> Vec<(usize, String)> {
        let mut code = String::new();
        for (_, line) in self.code() {
            code += line;
            code.push('\n');
        }
        let mut found = paths_after(&code, "crate::");
        if self.name == "src/main.rs" {
            found.extend(paths_after(&code, "tidegate::"));
        }
        let module = self.module();
        let parent = match self.name.ends_with("/mod.rs") {
            true => module.as_str(),
            false => module.rsplit_once("::").map_or("", |(parent, _)| parent),
        };
        // One `super` in `a/b.rs` is `a`; in `a/mod.rs` it is the root.
        let above = match self.name.ends_with("/mod.rs") {
            true => parent.rsplit_once("::").map_or("", |(above, _)| above),
            false => parent,
        };
        for (line, path) in paths_after(&code, "super::") {
            let joined = if above.is_empty() { path } else { format!("{above}::{path}") };
            found.push((line, joined));
        }
        found
    }
}

/// The paths that follow each `prefix`, groups in braces spread out.
fn paths_after(code: &str, prefix: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices(prefix) {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':' || c == '$') {
            continue;
        }
        let line = code[..at].lines().count().max(1);
        let mut rest = &code[at + prefix.len()..];
        for path in spread(&mut rest) {
            found.push((line, path));
        }
    }
    found
}

/// Reads one use tree off the front of `rest`: `a::{b, c::d}` gives `a::b` and
/// `a::c::d`.
fn spread(rest: &mut &str) -> Vec<String> {
    let is_path = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    *rest = rest.trim_start();
    let end = rest.find(|c| !is_path(c)).unwrap_or(rest.len());
    let head = rest[..end].trim_end_matches(':').to_string();
    *rest = &rest[end..];
    if !rest.starts_with('{') {
        return vec![head];
    }
    let mut paths = Vec::new();
    while rest.starts_with(['{', ',']) {
        *rest = rest[1..].trim_start();
        if rest.starts_with('}') {
            break;
        }
        for tail in spread(rest) {
            paths.push(if head.is_empty() { tail } else { format!("{head}::{tail}") });
        }
        // Past `as name`, up to the next item.
        let next = rest.find([',', '}']).unwrap_or(rest.len());
        *rest = &rest[next..];
    }
    *rest = rest.strip_prefix('}').unwrap_or(rest);
    paths
}

/// The unit a module belongs to and its layer.
fn place(module: &str) -> Option<(&'static str, Layer)> {
    let inside = |prefix: &str| {
        module.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
    };
    LAYERS.into_iter().filter(|(prefix, _)| inside(prefix)).max_by_key(|(prefix, _)| prefix.len())
}

fn has_word(line: &str, word: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        !line[..at].chars().next_back().is_some_and(is_word)
            && !line[at + word.len()..].chars().next().is_some_and(is_word)
    })
}

// === the rules themselves, tried ===

#[test]
fn use_trees_are_spread_out() {
    let code = "use crate::{a::{self, b as x}, c};\nlet y = crate::d::E::new();\nmycrate::z;";
    let found: Vec<String> = paths_after(code, "crate::").into_iter().map(|(_, p)| p).collect();
    assert_eq!(found, ["a::self", "a::b", "c", "d::E::new"]);
}

#[test]
fn a_shell_in_a_core_directory_is_a_shell() {
    assert_eq!(place("health::probe"), Some(("health::probe", Layer::Shell)));
    assert_eq!(place("health::probes"), Some(("health", Layer::Core)));
    assert_eq!(place("proxy::close"), Some(("proxy::close", Layer::Core)));
    assert_eq!(place("unheard_of"), None);
}

#[test]
fn super_is_followed_to_where_it_leads() {
    let source = |name: &str| Source { name: name.into(), text: "use super::probe::X;\n".into() };
    assert_eq!(source("src/health/detector.rs").uses(), [(1, "health::probe::X".to_string())]);
    assert_eq!(source("src/health/mod.rs").uses(), [(1, "probe::X".to_string())]);
}

#[test]
fn words_are_whole_words() {
    assert!(has_word("unsafe { x }", "unsafe") && has_word("a(unsafe", "unsafe"));
    assert!(!has_word("#![deny(unsafe_code)]", "unsafe"));
}
