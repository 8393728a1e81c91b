//! Health checks: `option ...chk`, `tcp-check`, `http-check` and the times of `server`.
//!
//! Called by `pool`.

use super::agent_check;
use super::lines::{Directive, ProxyLines};
use super::server::HaproxyServer;
use crate::available::Available;
use crate::draft::{DraftKeys, DraftPool, quoted};
use crate::report::{ImportReport, LineVerdict, SourceLine};
use crate::times::toml_time;

/// Keywords that nothing but the checks of a pool uses.
pub(crate) const CHECK_KEYWORDS: &[&str] = &[
    "option tcp-check",
    "option httpchk",
    "option mysql-check",
    "option pgsql-check",
    "option redis-check",
    "option smtpchk",
    "option ldap-check",
    "option ssl-hello-chk",
    "option spop-check",
    "option external-check",
    "external-check",
    "timeout check",
    "tcp-check",
    "http-check",
];

/// Default of `inter`, in milliseconds.
pub(super) const INTER: u64 = 2_000;

/// Shortest timeout to which a probe is cut for the sake of `fastinter`, in milliseconds.
const TIMEOUT_LEAST: u64 = 1_000;

/// Notes the servers without a keyword that others of the pool have.
pub(super) fn note_without(
    keyword: &str,
    servers: &[HaproxyServer],
    why: &str,
    report: &mut ImportReport,
) {
    for server in servers.iter().filter(|server| !server.has(keyword)) {
        report.note(server.at, LineVerdict::Approximated, why);
    }
}

/// Translates the checks of a pool. Without `check` on a server there are none.
pub(super) fn probe(
    in_force: &ProxyLines<'_>,
    servers: &[HaproxyServer],
    can: Available,
    report: &mut ImportReport,
    pool: &mut DraftPool,
) {
    let checked: Vec<&HaproxyServer> =
        servers.iter().filter(|server| server.has("check")).collect();
    if checked.is_empty() && servers.iter().any(|server| server.has("agent-check")) {
        return agent_check::probe(in_force, servers, can, report, pool);
    }
    agent_check::refuse(&checked, report);
    let Some(first) = checked.first() else {
        for line in check_lines(in_force) {
            report.note(line.at, LineVerdict::WithoutEffect, "no server has check");
        }
        return;
    };
    let why = "it has no check in HAProxy; Tidegate probes every backend of the pool";
    note_without("check", servers, why, report);
    let at = first.line_of("check");
    let (keys, of_pool) = (&mut pool.probe, &mut pool.keys);
    let mut context = Checks { in_force, report, keys, of_pool, at, can };
    context.kind();
    context.place(&checked);
    context.times(&checked);
}

/// Returns the lines that describe checks.
fn check_lines<'s>(in_force: &ProxyLines<'s>) -> Vec<&'s Directive> {
    let keywords = CHECK_KEYWORDS.iter().chain(&["option log-health-checks"]);
    keywords.flat_map(|keyword| in_force.all(keyword).iter().copied()).collect()
}

pub(super) struct Checks<'c, 's> {
    pub(super) in_force: &'c ProxyLines<'s>,
    pub(super) report: &'c mut ImportReport,
    pub(super) keys: &'c mut DraftKeys,
    /// The keys of the pool itself.
    pub(super) of_pool: &'c mut DraftKeys,
    /// Where the pool has its check.
    pub(super) at: SourceLine,
    pub(super) can: Available,
}

impl Checks<'_, '_> {
    pub(super) fn set(&mut self, name: &'static str, value: impl Into<String>, at: SourceLine) {
        let value = value.into();
        self.report.note(at, LineVerdict::Translated, format!("probe.{name} = {value}"));
        self.keys.set(name, value, &[at]);
    }

    /// Keeps the keys without a note.
    pub(super) fn keep(&mut self, name: &'static str, value: impl Into<String>, at: SourceLine) {
        self.keys.set(name, value, &[at]);
    }

    pub(super) fn impossible(&mut self, at: SourceLine, why: &str) {
        self.report.lose(at, LineVerdict::NotPossible, why);
    }

    /// Sets the kind by the last option that names one.
    fn kind(&mut self) {
        let kinds = [
            "tcp-check",
            "httpchk",
            "mysql-check",
            "pgsql-check",
            "redis-check",
            "smtpchk",
            "ldap-check",
            "ssl-hello-chk",
            "external-check",
            "spop-check",
        ];
        let given = kinds
            .iter()
            .filter_map(|kind| self.in_force.option(kind).map(|directive| (*kind, directive)));
        let mut given: Vec<_> = given.collect();
        given.sort_by_key(|(_, directive)| directive.at);
        let Some((kind, directive)) = given.pop() else {
            self.keep("kind", "\"tcp\"", self.at);
            return;
        };
        for (_, replaced) in given {
            let why = "a later option replaces it";
            self.report.note(replaced.at, LineVerdict::WithoutEffect, why);
        }
        let at = directive.at;
        match kind {
            "tcp-check" => self.steps(at),
            "httpchk" => self.http(directive),
            "redis-check" if self.can.redis => self.set("kind", "\"redis\"", at),
            "redis-check" => self.exchange(at, &[(false, "*1\r\n$4\r\nPING\r\n"), (true, "+PONG")]),
            "smtpchk" if self.can.smtp => self.hello(directive),
            "smtpchk" => self.smtp(directive),
            "ldap-check" if self.can.ldap => self.set("kind", "\"ldap\"", at),
            "ldap-check" => self.ldap(at),
            "ssl-hello-chk" => {
                self.set("kind", "\"tcp\"", at);
                self.keep("tls", "{ verify = \"off\" }", at);
                let why = "the probe makes a whole TLS handshake";
                self.report.note(at, LineVerdict::Approximated, why);
            }
            "mysql-check" if self.can.mysql => self.login("mysql", directive),
            "pgsql-check" if self.can.postgres => self.login("postgres", directive),
            "mysql-check" | "pgsql-check" => {
                self.keep("kind", "\"tcp\"", at);
                let why = "kind = \"tcp\": Tidegate has no probe that logs in to this database. \
                           A server that accepts connections but rejects users stays up";
                self.report.note(at, LineVerdict::Approximated, why);
            }
            "external-check" if self.can.exec => self.external(at),
            "external-check" => {
                self.keep("kind", "\"tcp\"", at);
                self.impossible(
                    at,
                    "Tidegate runs no programs; let an agent answer for the backend",
                );
            }
            _ => {
                self.keep("kind", "\"tcp\"", at);
                self.impossible(at, "Tidegate has no such probe");
            }
        }
        self.other_checks(kind);
    }

    /// Notes the lines of checks that another kind takes.
    fn other_checks(&mut self, kind: &str) {
        let owners = [
            ("tcp-check", "tcp-check"),
            ("http-check", "httpchk"),
            ("external-check", "external-check"),
        ];
        for (keyword, owner) in owners {
            if kind != owner {
                for line in self.in_force.all(keyword) {
                    let why = format!("it needs option {owner}");
                    self.report.note(line.at, LineVerdict::WithoutEffect, why);
                }
            }
        }
    }

    /// A kind that can log in as a user without password.
    fn login(&mut self, kind: &str, directive: &Directive) {
        self.set("kind", quoted(kind), directive.at);
        if directive.word(2) == "user" {
            self.set("user", quoted(directive.word(3)), directive.at);
        } else if kind == "mysql" {
            let why = "the probe also logs in, as user tidegate, and any answer to that succeeds";
            self.report.note(directive.at, LineVerdict::Approximated, why);
        }
        if directive.word(4) == "pre-41" {
            let why = "the probe logs in with the protocol since MySQL 4.1";
            self.report.note(directive.at, LineVerdict::Approximated, why);
        }
    }

    /// `option smtpchk`: a kind that always says `EHLO localhost`.
    fn hello(&mut self, directive: &Directive) {
        self.set("kind", "\"smtp\"", directive.at);
        let said = match directive.word(3) {
            "" => "HELO localhost".to_owned(),
            domain => format!("{} {domain}", directive.word(2)),
        };
        if said != "EHLO localhost" {
            let why = format!("kind = \"smtp\": the probe says EHLO localhost, not {said}");
            self.report.note(directive.at, LineVerdict::Approximated, why);
        }
    }

    /// A kind of fixed steps: true expects, false sends.
    fn exchange(&mut self, at: SourceLine, steps: &[(bool, &str)]) {
        let step = |(expects, text): &(bool, &str)| match expects {
            true => format!("{{ expect = {} }}", quoted(text)),
            false => format!("{{ send = {} }}", quoted(text)),
        };
        let steps: Vec<String> = steps.iter().map(step).collect();
        self.set("kind", "\"steps\"", at);
        self.keep("steps", format!("[{}]", steps.join(", ")), at);
    }

    fn smtp(&mut self, directive: &Directive) {
        let (hello, domain) = (directive.word(2), directive.word(3));
        let valid = matches!(hello, "HELO" | "EHLO") && !domain.is_empty();
        let hello = match valid {
            true => format!("{hello} {domain}\r\n"),
            false => "HELO localhost\r\n".to_owned(),
        };
        let steps =
            [(true, "220"), (false, &*hello), (true, "2"), (false, "QUIT\r\n"), (true, "2")];
        let contains = |(expects, text): &(bool, &str)| match expects {
            true => format!("{{ expect = {{ regex = {} }} }}", quoted(&format!("(?m)^{text}"))),
            false => format!("{{ send = {} }}", quoted(text)),
        };
        let steps: Vec<String> = steps.iter().map(contains).collect();
        self.set("kind", "\"steps\"", directive.at);
        self.keep("steps", format!("[{}]", steps.join(", ")), directive.at);
    }

    /// An anonymous bind, and its answer: message 1, result 0 (RFC 4511, 4.2).
    fn ldap(&mut self, at: SourceLine) {
        let steps = "[{ send = { hex = \"300c020101600702010304008000\" } }, \
                     { expect = { hex = \"020101\" } }, { expect = { hex = \"0a0100\" } }]";
        self.set("kind", "\"steps\"", at);
        self.keep("steps", steps, at);
    }

    /// Sets where the probe connects, and TLS.
    fn place(&mut self, checked: &[&HaproxyServer]) {
        self.same_for_all(checked, "port", |checks, port, at| checks.set("port", port, at));
        self.same_for_all(checked, "addr", |checks, addr, at| {
            checks.set("address", quoted(addr), at);
        });
        let tls: Vec<_> = checked.iter().filter(|server| server.has("check-ssl")).collect();
        let Some(first) = tls.first() else { return };
        let at = first.line_of("check-ssl");
        if self.keys.get("kind") == Some("\"exec\"") {
            self.impossible(at, "a command makes its own connection");
            return;
        }
        if tls.len() < checked.len() {
            self.impossible(at, "all checks of a pool use TLS, or none");
            return;
        }
        let mut table = match (first.argument("verify"), first.argument("ca-file")) {
            (Some("none"), _) => "verify = \"off\"".to_owned(),
            (_, Some(file)) if !file.starts_with('@') => format!("verify = {}", quoted(file)),
            _ => "verify = \"system\"".to_owned(),
        };
        for (parameter, key) in [("check-sni", "name"), ("check-alpn", "alpn")] {
            if let Some(value) = first.argument(parameter) {
                table += &format!(", {key} = {}", quoted(value));
            }
        }
        self.set("tls", format!("{{ {table} }}"), at);
    }

    /// Sets a key from a parameter that all servers must have alike.
    pub(super) fn same_for_all(
        &mut self,
        checked: &[&HaproxyServer],
        name: &str,
        set: impl FnOnce(&mut Self, &str, SourceLine),
    ) {
        let Some(first) = checked.iter().find(|server| server.has(name)) else { return };
        let value = first.argument(name).unwrap_or_default();
        if checked.iter().any(|server| server.argument(name) != Some(value)) {
            let why = format!("the probe of a pool has one {name} for all backends");
            for server in checked {
                self.impossible(server.line_of(name), &why);
            }
            return;
        }
        set(self, value, first.line_of(name));
        for server in checked {
            self.report.note(server.line_of(name), LineVerdict::Translated, "");
        }
    }

    fn times(&mut self, checked: &[&HaproxyServer]) {
        let inter = self.time(checked, "inter");
        let interval = inter.map_or(INTER, |(time, _)| time);
        if let Some((time, at)) = inter {
            self.set("interval", toml_time(time), at);
        }
        let check = self.in_force.timeout("check");
        // HAProxy ends a check after `inter`, or earlier after `timeout check`.
        let whole = check.map_or(interval, |(check, _)| check.min(interval)).max(1);
        let fast = self.time(checked, "fastinter").filter(|(fast, _)| *fast < interval);
        let timeout = match fast {
            Some((fast, _)) if fast < whole => fast.max(TIMEOUT_LEAST).min(whole),
            _ => whole,
        };
        let at = check.map_or(inter.map_or(self.at, |inter| inter.1), |check| check.1);
        if check.is_some() {
            self.report.note(
                at,
                LineVerdict::Translated,
                format!("probe.timeout = {}", toml_time(timeout)),
            );
        }
        self.keep("timeout", toml_time(timeout), at);
        if let Some((fast, at)) = fast {
            self.set("fast_interval", toml_time(fast.max(timeout)), at);
            if timeout < whole || fast < timeout {
                let why = format!(
                    "a probe has {} instead of {}, because the next one starts after it",
                    toml_time(timeout),
                    toml_time(whole)
                );
                self.report.note(at, LineVerdict::Approximated, why);
            }
        } else {
            self.keep("fast_interval", toml_time(interval.max(timeout)), at);
        }
        if let Some((down, at)) = self.time(checked, "downinter") {
            self.set("down_interval", toml_time(down.max(timeout)), at);
        }
        self.same_for_all(checked, "rise", |checks, rise, at| checks.set("rise", rise, at));
        self.same_for_all(checked, "fall", |checks, fall, at| checks.set("fall", fall, at));
    }

    /// Returns a time of the servers. If they differ, the shortest one counts.
    pub(super) fn time(
        &mut self,
        checked: &[&HaproxyServer],
        name: &str,
    ) -> Option<(u64, SourceLine)> {
        let given: Vec<_> = checked.iter().filter(|server| server.has(name)).collect();
        let times: Vec<Option<u64>> = given.iter().map(|server| server.time(name)).collect();
        for (server, time) in given.iter().zip(&times) {
            if time.is_none_or(|time| time == 0) {
                let why = format!("the time of {name} is not understood");
                self.report.note(server.line_of(name), LineVerdict::NotUnderstood, why);
            }
        }
        let least = times.iter().flatten().copied().filter(|time| *time > 0).min()?;
        if times.len() < checked.len() || times.iter().any(|time| *time != Some(least)) {
            let why = format!("{name} = {} for all backends of the pool", toml_time(least));
            for server in &given {
                self.report.note(server.line_of(name), LineVerdict::Approximated, why.clone());
            }
        }
        given.first().map(|server| (least, server.line_of(name)))
    }
}
