//! Reads a `haproxy.cfg` as sections of directives: lines to words, `.if` blocks, `defaults`.
//!
//! Called by `haproxy::read`.

use super::lex::{self, Environment};
use crate::report::{ImportReport, LineVerdict, SourceLine};
use std::collections::BTreeMap;

/// Longest chain of `defaults` sections that is followed.
const CHAIN_MAX: usize = 64;

/// One line.
#[derive(Debug, Clone)]
pub(super) struct Directive {
    pub(super) at: SourceLine,
    /// Never empty.
    pub(super) words: Vec<String>,
}

/// A section with its header.
#[derive(Debug)]
pub(super) struct HaproxySection {
    /// `global`, `defaults`, `listen` ...
    pub(super) kind: String,
    pub(super) name: String,
    /// The `defaults` section after `from`.
    from: Option<String>,
    pub(super) header: Directive,
    pub(super) directives: Vec<Directive>,
    /// Position of the `defaults` section that applies.
    defaults: Option<usize>,
}

/// The directives that are in force in a section, by their keyword.
///
/// The keyword is the first word. For `option`, `timeout` and similar words it is the first two. Directives of `defaults` come first.
#[derive(Debug, Default)]
pub(super) struct ProxyLines<'s> {
    by_keyword: BTreeMap<String, Vec<&'s Directive>>,
}

/// Words that begin a section.
const SECTIONS: &[&str] = &[
    "global",
    "defaults",
    "listen",
    "frontend",
    "backend",
    "resolvers",
    "peers",
    "userlist",
    "mailers",
    "program",
    "cache",
    "http-errors",
    "ring",
    "log-forward",
    "fcgi-app",
    "crt-store",
    "traces",
    "log-profile",
    "acme",
];

/// Keywords of two words.
const TWO_WORDS: &[&str] = &["option", "timeout", "stick", "stats", "hold"];

/// Reads all sections. Directives before the first section are not understood.
pub(super) fn sections(
    text: &str,
    file: usize,
    environment: &mut Environment,
    report: &mut ImportReport,
) -> Vec<HaproxySection> {
    let mut sections: Vec<HaproxySection> = Vec::new();
    let mut blocks = Blocks::default();
    for (number, line) in (1..).zip(text.lines()) {
        let at = SourceLine { file, line: number };
        let Some(directive) = directive(line, at, environment, report) else { continue };
        if blocks.take(&directive, environment, report) {
            continue;
        }
        let word = &*directive.words[0];
        if SECTIONS.contains(&word) {
            sections.push(section(directive, &sections, report));
        } else if let Some(section) = sections.last_mut() {
            if section.kind == "global" {
                set_variable(&directive, environment);
            }
            section.directives.push(directive);
        } else {
            report.note(at, LineVerdict::NotUnderstood, "this line is before the first section");
        }
    }
    sections
}

fn directive(
    line: &str,
    at: SourceLine,
    environment: &Environment,
    report: &mut ImportReport,
) -> Option<Directive> {
    match lex::words(line, environment) {
        Ok(words) if words.is_empty() => None,
        Ok(words) => {
            report.add_line(at, &shown(&words));
            Some(Directive { at, words })
        }
        Err(why) => {
            let first: Vec<String> = line.split_whitespace().take(2).map(str::to_owned).collect();
            report.add_line(at, &shown(&first));
            report.note(at, LineVerdict::NotUnderstood, why);
            // A header stays a header, so that the next lines belong to it.
            SECTIONS.contains(&&*first[0]).then_some(Directive { at, words: first })
        }
    }
}

/// Returns a directive for the report. Text that can be a secret is left out.
fn shown(words: &[String]) -> String {
    let secret = match (words[0].as_str(), words.get(1).map(String::as_str)) {
        ("tcp-check" | "http-check", Some("send" | "send-lf" | "send-binary")) => true,
        ("stats", Some("auth")) => true,
        ("user", Some(_)) => words.len() > 2,
        ("option", Some("httpchk")) => words.len() > 4,
        _ => false,
    };
    match secret {
        true => words[..2].join(" ") + " …",
        false => words.join(" "),
    }
}

fn section(
    header: Directive,
    before: &[HaproxySection],
    report: &mut ImportReport,
) -> HaproxySection {
    let words = &header.words;
    let from = words.iter().position(|word| word == "from");
    let name = words.get(1).filter(|_| from != Some(1)).cloned().unwrap_or_default();
    let from = from.and_then(|at| words.get(at + 1)).cloned();
    let is_defaults = |section: &HaproxySection| section.kind == "defaults";
    let kind = words[0].clone();
    let defaults = match &from {
        Some(from) => before.iter().rposition(|s| is_defaults(s) && s.name == *from),
        // A `defaults` section begins with nothing.
        None if kind == "defaults" => None,
        None => before.iter().rposition(is_defaults),
    };
    if let (Some(from), None) = (&from, defaults) {
        let why = format!("there is no section \"defaults {from}\" above");
        report.note(header.at, LineVerdict::NotUnderstood, why);
    }
    HaproxySection { kind, name, from, header, directives: Vec::new(), defaults }
}

/// Carries out `setenv` and its relatives.
fn set_variable(directive: &Directive, environment: &mut Environment) {
    let words: Vec<&str> = directive.words.iter().map(String::as_str).collect();
    match words[..] {
        ["setenv", name, value] => drop(environment.insert(name.to_owned(), value.to_owned())),
        ["presetenv", name, value] => {
            environment.entry(name.to_owned()).or_insert_with(|| value.to_owned());
        }
        ["unsetenv", ref names @ ..] => names.iter().for_each(|name| {
            environment.remove(*name);
        }),
        ["resetenv", ref names @ ..] => environment.retain(|name, _| names.contains(&&**name)),
        _ => {}
    }
}

// === .if blocks ===

/// Whether the lines of an open `.if` block count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Branch {
    /// They count.
    Taken,
    /// They count, and those of later branches, too: the condition cannot be known.
    Unknown,
    /// They do not count; a later branch can.
    Skipped,
    /// They do not count, because a branch before was taken.
    Done,
}

/// The open `.if` blocks.
#[derive(Debug, Default)]
struct Blocks(Vec<Branch>);

impl Blocks {
    /// Returns true if the line is no directive that counts: a `.if` line, or a line of a branch
    /// that is not taken.
    fn take(
        &mut self,
        directive: &Directive,
        environment: &Environment,
        report: &mut ImportReport,
    ) -> bool {
        let read = |branch: &Branch| matches!(branch, Branch::Taken | Branch::Unknown);
        let at = directive.at;
        let condition = || directive.words[1..].join(" ");
        match &*directive.words[0] {
            ".if" => {
                let branch = branch(&condition(), environment, at, report);
                self.0.push(branch);
            }
            word @ (".elif" | ".else") => match self.0.pop() {
                Some(Branch::Unknown) => {
                    report.note(at, LineVerdict::Approximated, "this branch is read, too");
                    self.0.push(Branch::Unknown);
                }
                Some(Branch::Skipped) => {
                    let condition = if word == ".else" { "1".to_owned() } else { condition() };
                    self.0.push(branch(&condition, environment, at, report));
                }
                Some(_) => {
                    report.note(at, LineVerdict::WithoutEffect, "a branch before it is read");
                    self.0.push(Branch::Done);
                }
                None => report.note(at, LineVerdict::NotUnderstood, "there is no .if before it"),
            },
            ".endif" => {
                self.0.pop();
                report.note(at, LineVerdict::WithoutEffect, "");
            }
            word if word.starts_with('.') => {
                report.note(at, LineVerdict::WithoutEffect, "a message of HAProxy");
            }
            _ if self.0.iter().all(read) => return false,
            _ => report.note(at, LineVerdict::WithoutEffect, "in a branch that is not taken"),
        }
        true
    }
}

/// Decides a condition. A condition that cannot be known is read as true, with a note.
fn branch(
    condition: &str,
    environment: &Environment,
    at: SourceLine,
    report: &mut ImportReport,
) -> Branch {
    match truth(condition, environment) {
        Some(true) => {
            report.note(at, LineVerdict::Translated, "true here; this branch is read");
            Branch::Taken
        }
        Some(false) => {
            report.note(at, LineVerdict::WithoutEffect, "false here; this branch is not read");
            Branch::Skipped
        }
        None => {
            let why = "an import cannot know this condition: every branch is read";
            report.note(at, LineVerdict::Approximated, why);
            Branch::Unknown
        }
    }
}

/// Evaluates `defined(NAME)`, `streq`, `strneq`, numbers, `!`, `&&` and `||`. `None`: unknown.
fn truth(condition: &str, environment: &Environment) -> Option<bool> {
    combined(condition.split("||").map(|part| truth_of_all(part, environment)), true)
}

fn truth_of_all(condition: &str, environment: &Environment) -> Option<bool> {
    combined(condition.split("&&").map(|part| truth_of_one(part, environment)), false)
}

/// Combines values, of which `decides` decides alone.
fn combined(parts: impl Iterator<Item = Option<bool>>, decides: bool) -> Option<bool> {
    let mut unknown = false;
    for part in parts {
        match part {
            Some(value) if value == decides => return Some(decides),
            Some(_) => {}
            None => unknown = true,
        }
    }
    (!unknown).then_some(!decides)
}

fn truth_of_one(condition: &str, environment: &Environment) -> Option<bool> {
    let condition = condition.trim();
    let negated = condition.chars().take_while(|c| *c == '!').count();
    let condition = condition[negated..].trim();
    let (function, arguments) = match condition.split_once('(') {
        Some((function, rest)) => (function, rest.strip_suffix(')')?),
        None => (condition, ""),
    };
    let same = || arguments.split_once(',').map(|(left, right)| left.trim() == right.trim());
    let value = match function {
        "defined" => Some(environment.contains_key(arguments.trim())),
        "streq" => same(),
        "strneq" => same().map(|same| !same),
        "" | "0" | "false" => Some(false),
        number if number == "true" || number.parse::<u64>().is_ok() => Some(true),
        _ => None,
    };
    value.map(|value| value != (negated % 2 == 1))
}

// === impl ProxyLines ===

impl<'s> ProxyLines<'s> {
    /// Returns the directives of a section, after those of its chain of `defaults`.
    pub(super) fn of(section: &'s HaproxySection, all: &'s [HaproxySection]) -> Self {
        let mut chain = vec![section];
        let mut next = section.defaults;
        while let Some(defaults) = next.and_then(|at| all.get(at))
            && chain.len() < CHAIN_MAX
        {
            chain.push(defaults);
            next = defaults.defaults;
        }
        let mut in_force = ProxyLines::default();
        for directive in chain.iter().rev().flat_map(|section| &section.directives) {
            let keyword = keyword(&directive.words);
            in_force.by_keyword.entry(keyword).or_default().push(directive);
        }
        in_force
    }

    pub(super) fn keywords(&self) -> impl Iterator<Item = &str> {
        self.by_keyword.keys().map(String::as_str)
    }

    /// Returns all directives with this keyword.
    pub(super) fn all(&self, keyword: &str) -> &[&'s Directive] {
        self.by_keyword.get(keyword).map_or(&[], Vec::as_slice)
    }

    /// Returns the last directive with this keyword, which replaces those before.
    pub(super) fn last(&self, keyword: &str) -> Option<&'s Directive> {
        self.all(keyword).last().copied()
    }

    /// Returns the directive of an option that is on.
    pub(super) fn option(&self, name: &str) -> Option<&'s Directive> {
        self.last(&format!("option {name}")).filter(|directive| directive.words[0] != "no")
    }

    /// Returns a timeout in milliseconds. 0 is no timeout.
    pub(super) fn timeout(&self, name: &str) -> Option<(u64, SourceLine)> {
        let directive = self.last(&format!("timeout {name}"))?;
        Some((crate::times::time(directive.words.get(2)?, 1)?, directive.at))
    }

    /// Returns the mode: `tcp` if nothing else is given.
    pub(super) fn mode(&self) -> &str {
        self.last("mode").and_then(|mode| mode.words.get(1)).map_or("tcp", String::as_str)
    }
}

impl Directive {
    /// Returns a word, empty if there are fewer.
    pub(super) fn word(&self, position: usize) -> &str {
        self.words.get(position).map_or("", String::as_str)
    }

    /// Returns the words from a position on.
    pub(super) fn from(&self, position: usize) -> &[String] {
        self.words.get(position..).unwrap_or_default()
    }
}

fn keyword(words: &[String]) -> String {
    let words = match &*words[0] {
        "no" | "default" if words.len() > 1 => &words[1..],
        _ => words,
    };
    match words {
        [first, second, ..] if TWO_WORDS.contains(&&**first) => format!("{first} {second}"),
        _ => words[0].clone(),
    }
}

impl HaproxySection {
    /// Returns the header and all directives.
    pub(super) fn lines(&self) -> impl Iterator<Item = SourceLine> {
        std::iter::once(self.header.at).chain(self.directives.iter().map(|line| line.at))
    }

    /// Returns the name with its kind, for messages.
    pub(super) fn title(&self) -> String {
        let from = self.from.as_ref().map(|from| format!(" from {from}")).unwrap_or_default();
        format!("{} {}{from}", self.kind, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_have_three_values() {
        let environment: Environment = [("A".to_owned(), String::new())].into();
        let truth = |condition| truth(condition, &environment);
        assert_eq!((truth("defined(A)"), truth("defined(B)")), (Some(true), Some(false)));
        assert_eq!((truth("version_atleast(2.4)"), truth("!defined(B)")), (None, Some(true)));
        assert_eq!(
            (truth("defined(B) && x()"), truth("defined(A) || x()")),
            (Some(false), Some(true))
        );
        assert_eq!((truth("streq(a,a)"), truth("1"), truth("x(")), (Some(true), Some(true), None));
    }
}
