//! Refuses phrases that a stranger reads twice, in comments, strings, test names, pages and
//! configuration.
//!
//! docs/contributing/style.md explains what to write instead. Each entry of [`ALLOWED`] is a
//! use that the style guide permits.

use regex::{Regex, RegexSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// A pattern, and what to write.
const BANNED: [(&str, &str); 28] = [
    (r"\b[Ww]ho(ever|m|mever)?\b", "name the thing: the client, the backend, the process"),
    (r"\b([Nn]obody|[Ss]omebody|[Ee]verybody|[Aa]nybody)\b", "no backend, a client, all workers"),
    (r"\banew\b", "again, or restart, reopen, rebind"),
    (r"\b(goes|go|going) on\b", "continues"),
    (r"\b(of|are|is) ours\b|\bof our own\b|\bours\b", "local; Tidegate's"),
    (r"\b([Ww]e|[Oo]ur)\b", "Tidegate, this process, this host"),
    (r"\bfor ever\b|\bever since\b", "forever; since"),
    (r"\bis told( of)?\b|\btold of\b|\bsays so\b", "is reported; reports"),
    (
        r"\b(comes|came) to (nothing|an end)\b|\bwhat became of\b|\bcame of\b",
        "failed; ended; result",
    ),
    (r"\b(is|are) to (be|have|do)\b", "must be, will be"),
    (r"\bhad better\b", "should"),
    (r"\bfor want of\b|\bshort of\b", "because X is full; out of X"),
    (r"\bso (long|many|much) (as|after)?\b", "the number or the noun"),
    (r"\b(once|all) (more|over again)\b", "again"),
    (r"\bmeanwhile\b|\bby now\b|\bof late\b", "give the time, or delete"),
    (r"\b(stood|stands)\b", "is established; is"),
    (r"\bruns? to (its|their) end\b", "finish"),
    (r"\btaken? (for|out)\b", "treat as; remove from rotation"),
    (r"\bin doubt\b|\bvouch(es|ed)?\b", "suspect; a probe succeeded"),
    (r"\b(dies?|died|dying|fell|falls|buried|bury|fallen)\b", "panic, exit, down"),
    (r"\btroubles?\b", "error, problem"),
    (r"\b(can|cannot|could) be had\b|\bhas it\b", "is (not) available"),
    (r"\bno (more|longer) than\b|\bno (fewer|less) than\b", "at most; at least"),
    (r"\bbesides?\b", "next to; in addition to"),
    (r"\bthereof|whereby|whereof|thereby|wherever\b", "split the sentence"),
    (
        r"\ba (second|minute|worker|session|backend|message|byte|connection) (each|at most|more)\b",
        "per second, per worker",
    ),
    (
        r"\b(doze|rouse|larder|parcel|obituary|bequest|legacy|frost|thaw|misfit|mouth|farewell)\b",
        "see the vocabulary of the style guide",
    ),
    (r"^(Told|Asked|Back|Without it),? [a-z]", "start with the subject"),
];

/// Cut out of a line before it is looked at.
const ALLOWED: [&str; 11] = [
    r"\bfalls? back\b",
    // An option of systemctl.
    r"--kill-whom",
    // A field and a value of the API, quoted.
    r"`who`",
    r"`vouched`",
    r"`trouble`",
    r"\{who\}",
    // Fields of the API in scripts.
    r"\.who\b",
    r"\.trouble\b",
    // A term of compilers.
    r"\bdead code\b",
    // People.
    r"\b([Pp]eople|[Rr]eaders|[Oo]perators|[Uu]sers|[Ee]ngineers) who\b",
    r"\| we write \|",
];

/// Pages that list the phrases.
const LISTS: [&str; 3] = ["docs/contributing/style.md", "docs/glossary.md", "tests/tidy/words.rs"];

/// What is read, and which folders below it are not.
const READ: [&str; 9] =
    ["src", "docs", "config", "tests", "benches", "scripts", "examples", ".ci", "README.md"];
const NOT_READ: [&str; 3] = ["src/proptest-regressions", "tests/fuzz/seeds", "tests/fuzz/target"];

#[test]
fn texts_contain_no_banned_phrase() {
    let set = RegexSet::new(BANNED.map(|(pattern, _)| pattern)).unwrap();
    let allowed = Regex::new(&ALLOWED.join("|")).unwrap();
    let mut findings = String::new();
    let mut texts = 0;
    for (name, content) in files() {
        for (number, text) in texts_of(&name, &content) {
            texts += 1;
            let text = allowed.replace_all(text.trim(), "");
            for banned in set.matches(&text) {
                let advice = BANNED[banned].1;
                let _ = writeln!(findings, "{name}:{number}: {text} [write: {advice}]");
            }
        }
    }
    assert!(texts > 20_000, "only {texts} texts were found");
    assert!(findings.is_empty(), "\n{findings}");
}

#[test]
fn every_kind_of_text_is_read() {
    let rust =
        "/// Doc.\nlet x = \"two words\"; // Note.\nfn some_test_name() {}\nlet y = \"one\";\n";
    let texts: Vec<String> = texts_of("a.rs", rust).into_iter().map(|(_, text)| text).collect();
    assert_eq!(texts, ["/ Doc.", " Note.", "two words", "some test name"]);
    assert_eq!(texts_of("a.md", "A line.").len(), 1);
    let set = RegexSet::new(BANNED.map(|(pattern, _)| pattern)).unwrap();
    assert!(set.is_match("Whoever was taken for dead goes on anew"));
}

/// Name and content of each file.
fn files() -> Vec<(String, String)> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let mut paths = Vec::new();
    READ.iter().for_each(|place| walk(&root.join(place), &mut paths));
    paths.sort();
    let name = |path: &Path| path.strip_prefix(&root).unwrap().to_string_lossy().into_owned();
    let read = paths.iter().map(|path| (name(path), path));
    let read = read.filter(|(name, _)| {
        !LISTS.contains(&&**name) && !NOT_READ.iter().any(|place| name.starts_with(place))
    });
    read.filter_map(|(name, path)| Some((name, std::fs::read_to_string(path).ok()?))).collect()
}

fn walk(path: &Path, files: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(path) else {
        return files.push(path.to_owned());
    };
    for entry in entries.flatten() {
        walk(&entry.path(), files);
    }
}

/// Numbered texts that people read: of Rust its comments, its strings with a space and the
/// names of functions, of anything else every line.
fn texts_of(name: &str, content: &str) -> Vec<(usize, String)> {
    let lines = (1..).zip(content.lines());
    if !name.ends_with(".rs") {
        return lines.map(|(number, line)| (number, line.to_owned())).collect();
    }
    let string = Regex::new(r#""((?:[^"\\]|\\.)*)""#).unwrap();
    let function = Regex::new(r"\bfn (\w+)").unwrap();
    let mut texts = Vec::new();
    for (number, line) in lines {
        if let Some((_, comment)) = line.split_once("//") {
            texts.push((number, comment.to_owned()));
        }
        let strings = string.captures_iter(line).map(|found| found[1].to_owned());
        texts.extend(strings.filter(|text| text.contains(' ')).map(|text| (number, text)));
        let names = function.captures_iter(line).map(|found| found[1].replace('_', " "));
        texts.extend(names.map(|text| (number, text)));
    }
    texts
}
