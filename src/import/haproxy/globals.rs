//! `global`, `resolvers` and the sections that Tidegate has no counterpart for.
//!
//! Called by `haproxy::Translator`.

use super::lines::{Directive, HaproxySection};
use super::{Translator, words};
use crate::draft::quoted_list;
use crate::report::LineVerdict::{
    Approximated, Dropped, NotPossible, NotUnderstood, Translated, WithoutEffect,
};
use crate::report::WHOLE;
use crate::times::{time, toml_time};
use crate::{LineVerdict, SourceLine};
use std::net::{IpAddr, SocketAddr};

/// Most sessions of the process.
const SESSIONS_MAX: u64 = 10_000_000;

/// Most workers.
const WORKERS_MAX: u64 = 256;

impl Translator<'_> {
    pub(super) fn global(&mut self, section: &HaproxySection) {
        self.report.note(section.header.at, Translated, "[process]");
        for line in &section.directives {
            let (keyword, at) = (line.word(0), line.at);
            let number = line.word(1).parse::<u64>().ok().filter(|number| *number > 0);
            match (keyword, number) {
                ("maxconn", Some(cap)) => {
                    let cap = cap.min(SESSIONS_MAX);
                    self.process("connections_max", cap.to_string(), line);
                }
                ("nbthread", Some(workers)) => {
                    self.process("workers", workers.min(WORKERS_MAX).to_string(), line);
                }
                ("hard-stop-after", _) => match time(line.word(1), 1).filter(|time| *time > 0) {
                    Some(time) => self.process("drain_timeout", toml_time(time), line),
                    None => self.report.note(at, NotUnderstood, "it is not a time"),
                },
                ("log", _) => self.global_logs.push(line.clone()),
                _ => match words::global(keyword) {
                    Some((verdict, why)) => self.report.note(at, verdict, why),
                    None => {
                        let why = "the keyword is not known";
                        self.report.note(at, NotUnderstood, why);
                    }
                },
            }
        }
    }

    fn process(&mut self, key: &'static str, value: String, line: &Directive) {
        self.report.note(line.at, Translated, format!("[process] {key} = {value}"));
        self.draft.process.set(key, value, &[line.at]);
    }

    /// Sets the access log if a frontend logs, and notes the lines.
    pub(super) fn logs(&mut self, logs: &[&Directive]) {
        let targets: Vec<Directive> = self.global_logs.clone();
        let global = logs.iter().any(|line| line.word(1) == "global");
        let mut used: Vec<&Directive> =
            logs.iter().copied().filter(|line| line.word(1) != "global").collect();
        used.extend(targets.iter().filter(|_| global));
        used.retain(|line| line.words[0] != "no");
        for line in targets.iter().filter(|_| !global) {
            self.report.note(line.at, WithoutEffect, "no translated frontend logs to it");
        }
        let lines: Vec<_> = used.iter().map(|line| line.at).collect();
        let receiver = |line: &Directive| SyslogLine::of(line).filter(|_| self.can.syslog);
        let syslog = used.iter().find_map(|line| Some((line.at, receiver(line)?)));
        let stdout = used.iter().any(|line| line.word(1) == "stdout");
        let chosen = syslog.filter(|_| !stdout);
        for line in &used {
            let (verdict, text) = log_verdict(line, chosen.as_ref());
            self.report.note(line.at, verdict, text);
        }
        match &chosen {
            Some((at, SyslogLine { receiver, facility })) => {
                self.draft.log.set("access", format!("\"{receiver}\""), &[*at]);
                self.draft.log.set("access_facility", format!("\"{facility}\""), &[*at]);
            }
            None if !lines.is_empty() => self.draft.log.set("access", "\"stdout\"", &lines),
            None => {}
        }
        let text = if lines.is_empty() { "there is no log" } else { "see [log] access" };
        let verdict = if lines.is_empty() { WithoutEffect } else { Translated };
        for at in std::mem::take(&mut self.tcplogs) {
            self.report.note(at, verdict, text);
        }
        for line in logs {
            if line.word(1) == "global" || line.words[0] == "no" {
                self.report.note(line.at, verdict, text);
            }
        }
    }

    /// Translates the section of name servers that servers name.
    pub(super) fn resolvers(&mut self, section: &HaproxySection, used: bool) {
        if !used {
            return self.whole(section, WithoutEffect, "no translated server uses it");
        }
        self.report.note(section.header.at, Translated, "[dns]");
        let mut servers = Vec::new();
        let mut lines = Vec::new();
        for line in &section.directives {
            let at = line.at;
            match (line.word(0), line.word(1)) {
                ("nameserver", _) => {
                    let address =
                        line.word(2).trim_start_matches("udp@").trim_start_matches("tcp@");
                    match address.parse::<SocketAddr>() {
                        Ok(address) => {
                            servers.push(address.to_string());
                            lines.push(at);
                            self.report.note(at, Translated, "[dns] servers");
                        }
                        Err(_) => {
                            let why = "a name server needs IP:PORT";
                            self.report.lose(at, NotPossible, why);
                        }
                    }
                }
                ("parse-resolv-conf", _) => {
                    self.report.note(at, Translated, "[dns] servers = \"system\"");
                }
                ("hold", kind @ ("nx" | "valid")) => self.hold(line, kind),
                ("hold", _) => {
                    let why = "answers are kept while the name servers fail";
                    self.report.note(at, Dropped, why);
                }
                ("resolve_retries" | "timeout" | "accepted_payload_size", _) => {
                    self.report.note(at, Dropped, "Tidegate asks in its own rhythm");
                }
                _ => self.report.note(at, NotUnderstood, "the keyword is not known"),
            }
        }
        if !servers.is_empty() {
            let servers = quoted_list(servers.iter().map(String::as_str));
            self.draft.dns.set("servers", servers, &lines);
        }
    }

    fn hold(&mut self, line: &Directive, kind: &str) {
        let day = 86_400_000;
        let Some(time) = time(line.word(2), 1).map(|time| time.clamp(1_000, day)) else {
            return self.report.note(line.at, NotUnderstood, "it is not a time");
        };
        let key = if kind == "nx" { "hold_nxdomain" } else { "ttl_min" };
        let time = toml_time(time);
        self.report.note(line.at, Translated, format!("[dns] {key} = {time}"));
        self.draft.dns.set(key, time, &[line.at]);
    }

    /// Notes one verdict for a whole section.
    pub(super) fn whole(
        &mut self,
        section: &HaproxySection,
        verdict: crate::LineVerdict,
        why: &str,
    ) {
        for at in section.lines() {
            let text = format!("{WHOLE}{}: {why}", section.title().trim());
            self.report.note(at, verdict, text);
        }
    }

    /// Notes a section that only HAProxy has.
    pub(super) fn other(&mut self, section: &HaproxySection) {
        match &*section.kind {
            "peers" => {
                let why = "two Tidegates with the same pool pick alike; there is no table to share";
                self.whole(section, Dropped, why);
            }
            "log-forward" => {
                let why = "Tidegate does not forward logs";
                section.lines().for_each(|at| self.report.lose(at, NotPossible, why));
            }
            "mailers" => self.whole(section, Dropped, "alerts are made from metrics"),
            "userlist" | "cache" | "http-errors" | "fcgi-app" => {
                self.whole(section, WithoutEffect, "it is for HTTP");
            }
            _ => self.whole(section, Dropped, "it has no counterpart"),
        }
    }
}

/// A `log` line whose target is a syslog receiver.
struct SyslogLine {
    receiver: String,
    facility: String,
}

/// Facilities that `[log] access_facility` accepts.
const FACILITIES: [&str; 10] = [
    "user", "daemon", "local0", "local1", "local2", "local3", "local4", "local5", "local6",
    "local7",
];

impl SyslogLine {
    /// Reads a line with the path of a socket, or with an IP address and a port (default 514).
    fn of(line: &Directive) -> Option<SyslogLine> {
        let target = line.word(1);
        let udp = target.strip_prefix("udp@").unwrap_or(target);
        let receiver = match (target.strip_prefix("tcp@"), udp.parse::<IpAddr>()) {
            (Some(tcp), _) => format!("syslog:tcp:{}", tcp.parse::<SocketAddr>().ok()?),
            (None, Ok(ip)) => format!("syslog:udp:{}", SocketAddr::new(ip, SYSLOG_PORT)),
            (None, Err(_)) if target.starts_with('/') => format!("syslog:{target}"),
            (None, Err(_)) => format!("syslog:udp:{}", udp.parse::<SocketAddr>().ok()?),
        };
        let facility = line.words.iter().find(|word| FACILITIES.contains(&&***word))?;
        Some(SyslogLine { receiver, facility: facility.to_string() })
    }
}

/// The default port of syslog over UDP.
const SYSLOG_PORT: u16 = 514;

/// Returns the verdict about a `log` line.
fn log_verdict(
    line: &Directive,
    chosen: Option<&(SourceLine, SyslogLine)>,
) -> (LineVerdict, String) {
    match chosen {
        Some((at, SyslogLine { receiver, facility })) if *at == line.at => {
            let text = format!("[log] access = \"{receiver}\", access_facility = \"{facility}\"");
            (Translated, text)
        }
        Some(_) => (Approximated, "there is one access log: see the other line".to_owned()),
        None if line.word(1) == "stdout" => (Translated, "[log] access = \"stdout\"".to_owned()),
        None => {
            let why =
                "the target is not a socket path or IP:PORT with a facility that Tidegate has";
            (Approximated, format!("[log] access = \"stdout\": {why}"))
        }
    }
}
