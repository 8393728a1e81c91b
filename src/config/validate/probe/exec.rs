//! The keys of `exec` probes: `command` and `exit_codes`.
//!
//! Called by `probe`. It never looks for the program: the host of the check can be another one.

use std::ops::Range;

use toml::Spanned;
use toml::de::DeValue;

use super::ProbeKindKey;
use crate::file::{Field, Section, ValueNode};
use crate::value::{ValueError, shown};
use tidegate_core::model::{ExecProbe, ExitCodes};

/// Most words of a command.
const WORDS_MAX: usize = 64;

/// Most bytes of all words of a command together, so that a request fits into one message.
const COMMAND_BYTES_MAX: usize = 8 * 1024;

/// Keys of a connection. A command makes its own.
const OF_CONNECTIONS: [&str; 3] = ["tls", "source", "proxy_protocol"];

/// The keys that only `exec` probes take.
pub(super) struct ExecKeys {
    command: Field<Vec<String>>,
    exit_codes: Field<ExitCodes>,
}

pub(super) fn keys(section: &Section<'_, '_>) -> ExecKeys {
    ExecKeys { command: command(section), exit_codes: section.choice("exit_codes") }
}

/// Reports a missing command, and keys that have no effect. Returns the place of `kind`.
pub(super) fn check(
    section: &Section<'_, '_>,
    kind: ProbeKindKey,
    keys: &ExecKeys,
) -> Option<Range<usize>> {
    if kind != ProbeKindKey::Exec {
        return None;
    }
    if keys.command.is_absent() {
        section
            .missing("command", "[\"/usr/lib/nagios/plugins/check_tcp\", \"-H\", \"{address}\"]");
    }
    for key in OF_CONNECTIONS {
        section.ignore_default(key);
        if let Some(place) = section.key_place(key) {
            let complaint = ValueError::new(format!("{key} has no effect on a command"));
            section.report.error(place, complaint.help("give the command an argument for it"));
        }
    }
    section.value_place("kind")
}

fn command(section: &Section<'_, '_>) -> Field<Vec<String>> {
    let Some(node) = section.node("command") else { return Field::Absent };
    let wants = "a list such as [\"/usr/bin/check\", \"{address}\"]";
    let DeValue::Array(entries) = node.get_ref() else {
        return section.wrong_type("command", node, wants);
    };
    let read: Option<Vec<String>> = entries.iter().map(|entry| word(section, entry)).collect();
    let Some(words) = read else { return Field::Bad };
    match complaint(&words) {
        Some(complaint) => {
            section.report.error(node.span(), complaint.named("command"));
            Field::Bad
        }
        None => Field::Good(Spanned::new(node.span(), words)),
    }
}

fn word(section: &Section<'_, '_>, entry: &ValueNode<'_>) -> Option<String> {
    let DeValue::String(text) = entry.get_ref() else {
        let _: Field<()> = section.wrong_type("command", entry, "words in quotes");
        return None;
    };
    Some(text.clone().into_owned())
}

fn complaint(words: &[String]) -> Option<ValueError> {
    let bytes: usize = words.iter().map(String::len).sum();
    let Some(program) = words.first() else {
        return Some(ValueError::new("the list is empty").help("its first word is the program"));
    };
    if words.len() > WORDS_MAX {
        let message = format!("{} words, at most {WORDS_MAX} are allowed", words.len());
        return Some(ValueError::new(message));
    }
    if bytes > COMMAND_BYTES_MAX {
        let message = format!("{bytes} bytes, at most {COMMAND_BYTES_MAX} are allowed");
        return Some(ValueError::new(message));
    }
    if words.iter().any(|word| word.contains('\0')) {
        return Some(ValueError::new("a word contains a NUL byte"));
    }
    if !program.starts_with('/') || program.ends_with('/') {
        let message = format!("the program {} is not an absolute path", shown(program));
        let help =
            "Tidegate uses no shell and no PATH; write \"/bin/sh\", \"-c\", \"...\" for a shell";
        return Some(ValueError::new(message).help(help));
    }
    let placeholder =
        ["{pool}", "{backend}", "{address}", "{port}"].into_iter().find(|it| program.contains(it));
    placeholder.map(|it| {
        ValueError::new(format!("the path of the program contains {it}"))
            .help("only arguments take placeholders")
    })
}

// === impl ExecKeys ===

impl ExecKeys {
    pub(super) fn into_probe(self) -> ExecProbe {
        ExecProbe {
            command: self.command.or(Vec::new()),
            exit_codes: self.exit_codes.or(ExitCodes::Plain),
        }
    }
}
