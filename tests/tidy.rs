//! Rules about the source tree itself: which member may use which, where `unsafe` and
//! clocks may stand, how large files may grow, and words that must not stay.
//!
//! Reads `src`, `tests`, `benches` and `scripts` as text; each finding names
//! its file and line. It parses no Rust beyond paths and comments.

#![allow(clippy::unwrap_used)]

#[path = "tidy/words.rs"]
mod words;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Lines a source file may have before it is two things.
const FILE_LINES_MAX: usize = 600;

/// Files that were longer when the rule came, with the length they may not
/// exceed. Entries only shrink and go; a new one needs a comment with its reason.
const LONGER_FILES: [(&str, usize); 0] = [];

/// The members and their floors. A member depends on members of lower floors alone;
/// Cargo forbids circles, this list says which way is up.
const FLOORS: [(&str, u8); 14] = [
    ("net", 0),
    ("logging", 0),
    ("heartbeat", 1),
    ("core", 2),
    ("config", 3),
    ("api", 3),
    ("dataplane", 3),
    ("supervisor", 3),
    ("discovery", 3),
    ("daemon", 4),
    ("client", 4),
    ("import", 4),
    ("lab", 5),
    ("cli", 6),
];

/// What the core may not name, in code.
const NOT_IN_THE_CORE: [&str; 12] = [
    "tokio",
    "hyper::",
    "axum::",
    "notify::",
    "tidegate_net",
    "std::fs",
    "TcpStream",
    "TcpListener",
    "UdpSocket",
    "UnixStream",
    "std::thread",
    "Instant::now",
];

// === the rules ===

#[test]
fn members_depend_only_on_lower_floors() {
    let floor = |name: &str| FLOORS.iter().find(|(member, _)| *member == name).map(|f| f.1);
    let mut findings = String::new();
    let mut members = 0;
    for entry in std::fs::read_dir(root().join("src")).unwrap() {
        let path = entry.unwrap().path();
        let Ok(manifest) = std::fs::read_to_string(path.join("Cargo.toml")) else { continue };
        members += 1;
        let member = path.file_name().unwrap().to_string_lossy().into_owned();
        let Some(own) = floor(&member) else {
            let _ = writeln!(findings, "{member}: give it a floor in tidy.rs");
            continue;
        };
        for used in product_dependencies(&manifest) {
            if floor(&used).is_none_or(|below| below >= own) {
                let _ = writeln!(findings, "{member} depends on {used}");
            }
        }
    }
    assert!(findings.is_empty(), "\n{findings}");
    assert_eq!(members, FLOORS.len(), "the list names what is there");
}

#[test]
fn no_modules_of_the_core_use_each_other_in_a_circle() {
    let mut uses: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for file in sources("src/core") {
        let module = file.top_module();
        if module == "lib" {
            continue;
        }
        let used = file.uses().into_iter().map(|(_, path)| first(&path).to_owned());
        let others = used.filter(|other| *other != module).collect::<Vec<_>>();
        uses.entry(module).or_default().extend(others);
    }
    assert!(uses.len() > 5, "{uses:?}");
    let circle = uses.keys().find(|module| reachable(&uses, module).contains(*module));
    assert_eq!(circle, None, "{uses:#?}");
}

#[test]
fn no_two_types_have_one_name() {
    let mut places: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for file in sources("src") {
        for (_, line) in file.code() {
            if let Some(name) = defined_type(line) {
                places.entry(name.to_owned()).or_default().insert(file.name.clone());
            }
        }
    }
    assert!(places.len() > 500, "the tree's types are found");
    places.retain(|_, files| files.len() > 1);
    assert!(places.is_empty(), "{places:#?}");
}

#[test]
fn the_core_does_no_io_and_reads_no_clock() {
    let mut findings = String::new();
    for file in sources("src/core") {
        for (number, line) in file.code() {
            for word in NOT_IN_THE_CORE.iter().filter(|word| line.contains(**word)) {
                let _ = writeln!(findings, "{}:{number}: {word}", file.name);
            }
        }
    }
    assert!(findings.is_empty(), "\n{findings}");
}

#[test]
fn unsafe_is_used_in_net_alone() {
    assert_only_in("unsafe", |name| name.starts_with("src/net/"));
}

#[test]
fn clocks_are_read_in_net_clock_alone() {
    for call in ["Instant::now", "SystemTime::now"] {
        // `heartbeat` is for services, too, and brings nothing of the balancer.
        assert_only_in(call, |name| ["src/net/clock.rs", "src/heartbeat/clock.rs"].contains(&name));
    }
}

/// A key that is misspelt in a document without a type is an absent value, not an error.
#[test]
fn clients_read_typed_documents() {
    let mut findings = String::new();
    let members = ["src/cli", "src/client", "src/lab"];
    for file in members.iter().flat_map(|member| sources(member)) {
        for (number, line) in file.all_code() {
            let untyped = line.contains("json!") || line.contains("serde_json::Map");
            if untyped || line.contains("serde_json") && has_word(line, "Value") {
                let _ = writeln!(findings, "{}:{number}: a document without a type", file.name);
            }
        }
    }
    assert!(findings.is_empty(), "\n{findings}");
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

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file (and script) under `dir`, sorted.
fn sources(dir: &str) -> Vec<Source> {
    let root = root();
    let mut files = Vec::new();
    collect(&root.join(dir), &mut files);
    files.sort();
    let read = |path: PathBuf| {
        let name = path.strip_prefix(&root).unwrap().to_string_lossy().into_owned();
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
    /// `src/core/a/b.rs` is in `a`.
    fn top_module(&self) -> String {
        let path = self.name.splitn(3, '/').nth(2).unwrap_or_default();
        path.split('/').next().unwrap_or_default().trim_end_matches(".rs").to_owned()
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

    /// Every path in code that starts at the crate's root.
    fn uses(&self) -> Vec<(usize, String)> {
        let mut code = String::new();
        for (_, line) in self.code() {
            code += line;
            code.push('\n');
        }
        paths_after(&code, "crate::")
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

fn first(path: &str) -> &str {
    path.split("::").next().unwrap_or_default()
}

/// What can be reached from `from` in one step or more.
fn reachable<'u>(uses: &'u BTreeMap<String, BTreeSet<String>>, from: &str) -> BTreeSet<&'u String> {
    let (mut found, mut left) = (BTreeSet::new(), vec![from]);
    while let Some(module) = left.pop() {
        for next in uses.get(module).into_iter().flatten() {
            if found.insert(next) {
                left.push(next);
            }
        }
    }
    found
}

/// The members that a manifest's `[dependencies]` name.
fn product_dependencies(manifest: &str) -> Vec<String> {
    let table = manifest.split("\n[").find(|table| table.starts_with("dependencies]"));
    let lines = table.unwrap_or_default().lines();
    let names = lines.filter_map(|line| line.strip_prefix("tidegate-"));
    names.map(|rest| rest.split(['.', ' ', '=']).next().unwrap_or_default().to_owned()).collect()
}

/// The type that a line at the level of items defines, or a public one within a macro.
fn defined_type(line: &str) -> Option<&str> {
    let line = line.strip_prefix("    ").filter(|rest| rest.starts_with("pub ")).unwrap_or(line);
    let mut words = line.split(' ').skip_while(|word| word.starts_with("pub") || *word == "unsafe");
    let is_type = matches!(words.next()?, "struct" | "enum" | "trait" | "type" | "union");
    let name = words.next().filter(|_| is_type && !line.starts_with(' '))?;
    name.split(|c: char| !c.is_alphanumeric()).next().filter(|name| !name.is_empty())
}

fn has_word(line: &str, word: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        !line[..at].chars().next_back().is_some_and(is_word)
            && !line[at + word.len()..].chars().next().is_some_and(is_word)
    })
}

// === the script that runs all checks ===

#[test]
fn checks_that_a_signal_ends_have_not_passed() {
    let dir = std::env::temp_dir().join(format!("tidegate-checks-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/test");
    for (signal, code) in [("HUP", 129), ("TERM", 143)] {
        // The script's first command ends the script, and succeeds.
        let cargo = dir.join("cargo");
        std::fs::write(&cargo, format!("kill -{signal} $PPID\n")).unwrap();
        let path = format!("{}:{}", dir.display(), std::env::var("PATH").unwrap());
        let run = "chmod 755 \"$1\"; exec \"$2\" --quick";
        let args = ["-c", run, "sh", cargo.to_str().unwrap(), script.to_str().unwrap()];
        let ended = std::process::Command::new("sh").args(args).env("PATH", path).output().unwrap();
        let text = String::from_utf8(ended.stdout).unwrap();
        assert_eq!(ended.status.code(), Some(code), "{text}");
        assert!(text.contains("FAILED at: cargo fmt") && !text.contains("passed"), "{text}");
    }
    std::fs::remove_dir_all(dir).unwrap();
}

// === the rules themselves, tried ===

#[test]
fn use_trees_are_spread_out() {
    let code = "use crate::{a::{self, b as x}, c};\nlet y = crate::d::E::new();\nmycrate::z;";
    let found: Vec<String> = paths_after(code, "crate::").into_iter().map(|(_, p)| p).collect();
    assert_eq!(found, ["a::self", "a::b", "c", "d::E::new"]);
}

#[test]
fn dependencies_are_read_from_their_own_table() {
    let manifest = "[package]\nname = \"tidegate-x\"\n\n[dependencies]\ntidegate-a.workspace = true\n\
                    serde = \"1\"\n\n[dev-dependencies]\ntidegate-b = { path = \"b\" }\n";
    assert_eq!(product_dependencies(manifest), ["a"]);
}

#[test]
fn types_are_found_where_they_are_defined() {
    assert_eq!(defined_type("pub(crate) struct Table<'a> {"), Some("Table"));
    assert_eq!(defined_type("type Reply = Sender<()>;"), Some("Reply"));
    assert_eq!(defined_type("    pub enum Named {"), Some("Named"));
    assert_eq!(defined_type("    type Target = u8;"), None);
    assert_eq!(defined_type("impl Table {"), None);
}

#[test]
fn words_are_whole_words() {
    assert!(has_word("unsafe { x }", "unsafe") && has_word("a(unsafe", "unsafe"));
    assert!(!has_word("#![deny(unsafe_code)]", "unsafe"));
}
