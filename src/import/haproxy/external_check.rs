//! `option external-check`: a program that checks a server.
//!
//! Part of `checks`. HAProxy calls the program with four words and reads its exit code, and so
//! does a probe of kind `exec`.

use super::checks::Checks;
use super::lines::Directive;
use crate::draft::{DraftKeys, DraftPool, quoted};
use crate::report::{LineVerdict, SourceLine};

/// The lines that name the program and its `PATH`.
struct ExternalLines<'s> {
    command: Option<&'s Directive>,
    path: Option<&'s Directive>,
}

impl<'s> Checks<'_, 's> {
    /// Sets the kind, the command and the meaning of its exit codes.
    pub(super) fn external(&mut self, at: SourceLine) {
        let ExternalLines { command, path } = self.external_lines();
        if let Some(path) = path {
            let why = "PATH is that of the system: the program has an absolute path";
            self.report.note(path.at, LineVerdict::Approximated, why);
        }
        let Some(command) = command else {
            self.keep("kind", "\"tcp\"", at);
            self.impossible(at, "external-check command is missing");
            return;
        };
        let program = command.word(2);
        if !program.starts_with('/') {
            self.keep("kind", "\"tcp\"", at);
            self.impossible(at, "the program has no absolute path");
            self.impossible(command.at, "write the absolute path of the program");
            return;
        }
        self.set("kind", "\"exec\"", at);
        let words = format!(
            "[{}, \"NOT_USED\", \"NOT_USED\", \"{{address}}\", \"{{port}}\"]",
            quoted(program)
        );
        self.set("command", words, command.at);
        self.keep("exit_codes", "\"haproxy\"", at);
        let why = "the command gets NOT_USED for the address and port of the proxy, as in a \
                   backend section, and of the variables only HAPROXY_PROXY_NAME and \
                   HAPROXY_SERVER_NAME, _ADDR and _PORT; it runs as the user of Tidegate";
        self.report.note(command.at, LineVerdict::Approximated, why);
    }

    fn external_lines(&self) -> ExternalLines<'s> {
        let last = |word: &str| {
            let lines = self.in_force.all("external-check");
            lines.iter().rev().find(|line| line.word(1) == word).copied()
        };
        ExternalLines { command: last("command"), path: last("path") }
    }
}

/// Requires the process that runs the command, if the pool has one.
pub(super) fn require_helper(pool: &DraftPool, process: &mut DraftKeys) {
    let Some(kind) = pool.probe.0.iter().find(|key| key.name == "kind") else { return };
    if kind.value == "\"exec\"" && process.get("probe_helper").is_none() {
        process.set("probe_helper", "true", &kind.at);
    }
}
