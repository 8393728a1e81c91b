//! The rules of checks: `option httpchk` with `http-check`, and `tcp-check` as steps.
//!
//! Part of `checks`.

use super::checks::Checks;
use super::lines::Directive;
use crate::draft::quoted;
use crate::report::{LineVerdict, SourceLine};

impl Checks<'_, '_> {
    /// `option tcp-check`: its rules become steps. Without rules it connects only.
    pub(super) fn steps(&mut self, at: SourceLine) {
        if let Some(role) = self.redis_role().filter(|_| self.can.redis) {
            return self.redis(role, at);
        }
        let mut steps = Vec::new();
        for (number, rule) in self.in_force.all("tcp-check").iter().enumerate() {
            match rule.word(1) {
                "connect" => self.connect(rule, number == 0),
                "send" | "send-lf" if !rule.word(2).contains("%[") => {
                    steps.push(format!("{{ send = {} }}", quoted(rule.word(2))));
                    self.report.note(rule.at, LineVerdict::Translated, "a step of the probe");
                }
                "send-binary" => {
                    steps.push(format!("{{ send = {{ hex = {} }} }}", quoted(rule.word(2))));
                    self.report.note(rule.at, LineVerdict::Translated, "a step of the probe");
                }
                "expect" => match expected(rule, 2) {
                    Ok(expect) => {
                        steps.push(format!("{{ expect = {expect} }}"));
                        self.report.note(rule.at, LineVerdict::Translated, "a step of the probe");
                    }
                    Err(why) => self.impossible(rule.at, &why),
                },
                "comment" => self.report.note(rule.at, LineVerdict::WithoutEffect, ""),
                _ => self.impossible(rule.at, "a probe has no such step"),
            }
        }
        if steps.is_empty() {
            self.set("kind", "\"tcp\"", at);
            return;
        }
        self.set("kind", "\"steps\"", at);
        self.keep("steps", format!("[\n  {},\n]", steps.join(",\n  ")), at);
    }

    /// Returns the role that the rules ask of a Redis server, if they do nothing else. A login
    /// needs a file with its password, so it stays a step.
    fn redis_role(&self) -> Option<&'static str> {
        let rules = self.in_force.all("tcp-check");
        let steps = rules.iter().filter(|rule| !matches!(rule.word(1), "connect" | "comment"));
        let steps: Vec<String> = steps
            .map(|rule| match (rule.word(1), rule.word(2)) {
                ("send", text) => format!("> {}", text.trim_end().to_ascii_lowercase()),
                ("expect", "string") => format!("< {}", rule.word(3).trim_end()),
                (other, _) => other.to_owned(),
            })
            .collect();
        let steps: Vec<&str> = steps.iter().map(String::as_str).collect();
        let asked = match steps.as_slice() {
            [asked @ .., "> quit", "< +OK"] | [asked @ .., "> quit"] => asked,
            asked => asked,
        };
        match asked {
            ["> ping", "< +PONG", "> info replication", "< role:master"] => Some("primary"),
            ["> ping", "< +PONG", "> info replication", "< role:slave"] => Some("replica"),
            _ => None,
        }
    }

    /// The steps for a Redis server of a role are the probe of that kind.
    fn redis(&mut self, role: &str, at: SourceLine) {
        let mut first = true;
        for rule in self.in_force.all("tcp-check") {
            match rule.word(1) {
                "connect" => self.connect(rule, std::mem::take(&mut first)),
                _ => {
                    let why = format!("probe.kind = \"redis\", role = \"{role}\"");
                    self.report.note(rule.at, LineVerdict::Translated, why);
                }
            }
        }
        self.set("kind", "\"redis\"", at);
        self.of_pool.set("role", quoted(role), &[at]);
        let why = "a changed role counts at once, without rise and fall; of several primaries at \
                   most one gets sessions";
        self.report.note(at, LineVerdict::Approximated, why);
    }

    /// `connect`: the port and TLS of the probe.
    fn connect(&mut self, rule: &Directive, first: bool) {
        if !first {
            return self.impossible(rule.at, "a probe connects once");
        }
        let mut words = rule.from(2).iter();
        let (mut tls, mut name) = (false, None);
        while let Some(word) = words.next() {
            match &**word {
                "port" => match words.next().map(|port| port.parse::<u16>()) {
                    Some(Ok(port)) => self.set("port", port.to_string(), rule.at),
                    _ => self.impossible(rule.at, "the port is not a number"),
                },
                "addr" => {
                    let address = words.next().cloned().unwrap_or_default();
                    self.set("address", quoted(&address), rule.at);
                }
                "ssl" => tls = true,
                "sni" => name = words.next().cloned(),
                "comment" | "proto" => drop(words.next()),
                "linger" | "default" => {}
                _ => self.impossible(rule.at, &format!("a probe cannot connect with {word}")),
            }
        }
        self.report.note(rule.at, LineVerdict::Translated, "the probe connects");
        if tls {
            let name = name.map(|name| format!(", name = {}", quoted(&name))).unwrap_or_default();
            self.set("tls", format!("{{ verify = \"off\"{name} }}"), rule.at);
        }
    }

    /// `option httpchk` and the rules of `http-check`.
    pub(super) fn http(&mut self, directive: &Directive) {
        let at = directive.at;
        self.keep("kind", "\"http\"", at);
        let words = directive.from(2);
        let (method, path, version) = match words {
            [] => ("OPTIONS", "/", "HTTP/1.0"),
            [path] => ("OPTIONS", &**path, "HTTP/1.0"),
            [method, path] => (&**method, &**path, "HTTP/1.0"),
            [method, path, rest @ ..] => (&**method, &**path, &*rest[0]),
        };
        self.request(at, method, path, version);
        // The old form has headers after the version.
        let old: Vec<&str> =
            words.get(2..).unwrap_or_default().iter().map(String::as_str).collect();
        let old = old.join(" ");
        let mut headers: Vec<(String, String)> = old
            .split("\r\n")
            .skip(1)
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned()))
            .collect();
        for (number, rule) in self.in_force.all("http-check").iter().enumerate() {
            self.http_rule(rule, number == 0, &mut headers);
        }
        self.headers(&headers, at);
        let note = format!("probe: {method} {path}");
        self.report.note(at, LineVerdict::Translated, note);
    }

    fn request(&mut self, at: SourceLine, method: &str, path: &str, version: &str) {
        self.keep("method", quoted(method), at);
        self.keep("path", quoted(path), at);
        let old = !version.starts_with("HTTP/1.1") && !version.starts_with("HTTP/2");
        self.keep("http", if old { "\"1.0\"" } else { "\"1.1\"" }, at);
    }

    fn headers(&mut self, headers: &[(String, String)], at: SourceLine) {
        let mut others = Vec::new();
        for (name, value) in headers {
            match name.eq_ignore_ascii_case("host") {
                true => self.keep("host", quoted(value), at),
                false if name.eq_ignore_ascii_case("connection") => {}
                false => others.push(format!("{} = {}", quoted(name), quoted(value))),
            }
        }
        if !others.is_empty() {
            self.keep("headers", format!("{{ {} }}", others.join(", ")), at);
        }
    }

    fn http_rule(&mut self, rule: &Directive, first: bool, headers: &mut Vec<(String, String)>) {
        match rule.word(1) {
            "connect" => self.connect(rule, first),
            "send" => self.http_send(rule, headers),
            "expect" => self.http_expect(rule),
            "send-state" => {
                let why = "Tidegate does not tell backends their state";
                self.report.note(rule.at, LineVerdict::Dropped, why);
            }
            "disable-on-404" => {
                let why = "an answer 404 makes the backend down; in HAProxy its sessions stay";
                self.report.note(rule.at, LineVerdict::Approximated, why);
            }
            "comment" => self.report.note(rule.at, LineVerdict::WithoutEffect, ""),
            _ => self.impossible(rule.at, "an HTTP probe has no such rule"),
        }
    }

    fn http_send(&mut self, rule: &Directive, headers: &mut Vec<(String, String)>) {
        let (mut method, mut path, mut version) =
            ("OPTIONS".to_owned(), "/".to_owned(), "HTTP/1.0");
        let mut words = rule.from(2).iter();
        while let Some(word) = words.next() {
            let mut next = || words.next().cloned().unwrap_or_default();
            match &**word {
                "meth" => method = next(),
                "uri" => path = next(),
                "ver" => version = if next() == "HTTP/1.0" { "HTTP/1.0" } else { "HTTP/1.1" },
                "hdr" => headers.push((next(), next())),
                "comment" => drop(next()),
                _ => return self.impossible(rule.at, "an HTTP probe sends no body"),
            }
        }
        self.request(rule.at, &method, &path, version);
        self.report.note(rule.at, LineVerdict::Translated, format!("probe: {method} {path}"));
    }

    fn http_expect(&mut self, rule: &Directive) {
        let mut at = 2;
        while matches!(
            rule.word(at),
            "min-recv" | "comment" | "ok-status" | "error-status" | "tout-status"
        ) {
            at += 2;
        }
        match rule.word(at) {
            "status" => {
                let codes = rule.from(at + 1).join(",");
                self.set("status", quoted(&codes), rule.at);
            }
            "rstatus" => match status_of(rule.word(at + 1)) {
                Some(codes) => self.set("status", quoted(&codes), rule.at),
                None => self.impossible(rule.at, "write the accepted status codes as numbers"),
            },
            "string" | "rstring" => match expected(rule, 2) {
                Ok(expect) => self.set("expect", expect, rule.at),
                Err(why) => self.impossible(rule.at, &why),
            },
            _ => self.impossible(rule.at, "an HTTP probe cannot expect this"),
        }
    }
}

/// Returns the codes of simple patterns such as `^2` and `(2|3)[0-9][0-9]`.
fn status_of(pattern: &str) -> Option<String> {
    let pattern = pattern.trim_start_matches('^').trim_end_matches('$');
    let head = ["[0-9][0-9]", "[0-9]{2}", "\\d\\d", "\\d{2}", ".."];
    let head = head.iter().find_map(|tail| pattern.strip_suffix(tail)).unwrap_or(pattern);
    let head = head.trim_start_matches(['(', '[']).trim_end_matches([')', ']']);
    let digits: Option<Vec<u32>> =
        head.chars().filter(|c| *c != '|').map(|c| c.to_digit(10)).collect();
    let digits = digits.filter(|d| !d.is_empty() && d.iter().all(|d| (1..=5).contains(d)))?;
    // `^23` is a prefix of 230 to 239, and no choice of two.
    if digits.len() > 1 && !pattern.starts_with(['(', '[']) {
        return None;
    }
    let codes: Vec<String> = digits.iter().map(|d| format!("{d}00-{d}99")).collect();
    Some(codes.join(","))
}

/// Translates `expect [options] [!] string|rstring|binary PATTERN` from the word at `at` on.
fn expected(rule: &Directive, at: usize) -> Result<String, String> {
    let mut at = at;
    while matches!(
        rule.word(at),
        "min-recv"
            | "comment"
            | "ok-status"
            | "error-status"
            | "tout-status"
            | "on-success"
            | "on-error"
            | "status-code"
    ) {
        at += 2;
    }
    let pattern = rule.word(at + 1);
    match rule.word(at) {
        "string" => Ok(format!("{{ contains = {} }}", quoted(pattern))),
        "rstring" => Ok(format!("{{ regex = {} }}", quoted(pattern))),
        "binary" => Ok(format!("{{ hex = {} }}", quoted(pattern))),
        "!" => Err("a probe cannot expect that something is missing".to_owned()),
        other => Err(format!("a probe cannot expect {other}")),
    }
}
