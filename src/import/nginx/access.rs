//! `allow` and `deny`: which clients can connect.
//!
//! Called by `server`. The first matching rule of nginx decides; in Tidegate the longest matching
//! prefix decides.

use super::tree::NginxDirective;
use crate::draft::{DraftFrontend, quoted_list};
use crate::prefix::AddressPrefix;
use crate::report::LineVerdict::{NotPossible, Translated};
use crate::report::{ImportReport, SourceLine};

/// One rule.
struct AccessRule<'t> {
    allow: bool,
    text: &'t str,
    /// `None` for `all`.
    prefix: Option<AddressPrefix>,
    at: SourceLine,
}

/// Fills the lists of a frontend, if they mean the same as the rules.
pub(super) fn translate(
    lines: &[&NginxDirective],
    frontend: &mut DraftFrontend,
    report: &mut ImportReport,
) {
    let mut rules = Vec::new();
    for line in lines {
        let text = line.words.get(1).map_or("", String::as_str);
        let prefix = AddressPrefix::parse(text);
        if prefix.is_none() && text != "all" {
            report.lose(line.at, NotPossible, "only addresses and prefixes can be compared");
            return;
        }
        rules.push(AccessRule { allow: line.words[0] == "allow", text, prefix, at: line.at });
    }
    // What follows `all` never decides.
    if let Some(all) = rules.iter().position(|rule| rule.prefix.is_none()) {
        rules.truncate(all + 1);
    }
    let same_meaning = !rules
        .iter()
        .enumerate()
        .any(|(number, later)| rules[..number].iter().any(|earlier| overrides(earlier, later)));
    let denied = rules.last().is_some_and(|rule| rule.prefix.is_none() && !rule.allow);
    let some_allowed = rules.iter().any(|rule| rule.allow);
    if !same_meaning || (denied && !some_allowed) {
        let why = match same_meaning {
            true => "it denies every client",
            false => "the first matching rule decides in nginx, the longest prefix in Tidegate",
        };
        rules.iter().for_each(|rule| report.lose(rule.at, NotPossible, why));
        return;
    }
    for (key, allow) in [("allow", true), ("deny", false)] {
        let chosen: Vec<&AccessRule<'_>> =
            rules.iter().filter(|rule| rule.allow == allow && rule.prefix.is_some()).collect();
        let mut values: Vec<&str> = chosen.iter().map(|rule| rule.text).collect();
        let needed = !values.is_empty() && (!allow || denied || rules.iter().any(|r| !r.allow));
        if allow && needed && !denied {
            values.extend(["0.0.0.0/0", "::/0"]);
        }
        let at: Vec<SourceLine> = chosen.iter().map(|rule| rule.at).collect();
        if needed {
            frontend.sources.set(key, quoted_list(values), &at);
        }
    }
    for rule in &rules {
        let text = if rule.allow { "sources.allow" } else { "sources.deny" };
        report.note(rule.at, Translated, text);
    }
}

/// Returns true if an earlier rule hides a longer prefix of a later rule that decides otherwise.
fn overrides(earlier: &AccessRule<'_>, later: &AccessRule<'_>) -> bool {
    let (Some(wide), Some(narrow)) = (earlier.prefix, later.prefix) else { return false };
    earlier.allow != later.allow && wide.contains(narrow)
}
