//! `server` blocks of `stream`: frontends.
//!
//! Called by `nginx::NginxTranslator` once per block.

use super::NginxTranslator;
use super::access;
use super::tree::NginxDirective;
use super::upstream::PoolSettings;
use crate::draft::{DraftFrontend, quoted, quoted_list};
use crate::report::LineVerdict::{
    self, Approximated, Dropped, NotPossible, NotUnderstood, Translated, WithoutEffect,
};
use crate::report::SourceLine;
use crate::times::{LONGEST, time, toml_time};

/// Directives that a server takes from `stream` if it has none itself.
pub(super) const INHERITED: &[&str] = &[
    "proxy_timeout",
    "proxy_connect_timeout",
    "proxy_next_upstream",
    "proxy_next_upstream_tries",
    "proxy_protocol",
    "proxy_half_close",
    "proxy_bind",
    "allow",
    "deny",
    "limit_conn",
    "access_log",
    "set_real_ip_from",
    "ssl_preread",
    "health_check",
];

/// Default of `proxy_connect_timeout`.
const CONNECT_TIMEOUT: u64 = 60_000;

/// Most attempts of a session.
const ATTEMPTS_MAX: u64 = 16;

/// The directives that are in force in a server.
struct ServerLines<'t> {
    own: &'t [NginxDirective],
    stream: &'t [NginxDirective],
}

impl<'t> ServerLines<'t> {
    /// Returns the directives with this name: those of the server, else those of `stream`.
    fn all(&self, name: &str) -> Vec<&'t NginxDirective> {
        self.all_of(&[name])
    }

    /// The same for several names that are inherited together, in the order of the file.
    fn all_of(&self, names: &[&str]) -> Vec<&'t NginxDirective> {
        let find = |lines: &'t [NginxDirective]| -> Vec<&'t NginxDirective> {
            lines.iter().filter(|line| names.contains(&line.words[0].as_str())).collect()
        };
        let own = find(self.own);
        let inherited = names.iter().any(|name| INHERITED.contains(name));
        if own.is_empty() && inherited { find(self.stream) } else { own }
    }

    fn last(&self, name: &str) -> Option<&'t NginxDirective> {
        self.all(name).pop()
    }
}

impl<'t> NginxTranslator<'t> {
    /// Translates one block.
    pub(super) fn server(&mut self, server: &'t NginxDirective, stream: &'t [NginxDirective]) {
        let own = server.block.as_deref().unwrap_or_default();
        let lines = ServerLines { own, stream };
        let mut frontend = DraftFrontend { at: vec![server.at], ..Default::default() };
        let listens = lines.all("listen");
        let udp = listens.iter().filter(|line| line.words.iter().any(|word| word == "udp")).count();
        for listen in &listens {
            self.listen(listen, &mut frontend);
        }
        let settings = self.pool_settings(&lines);
        let target = lines.last("proxy_pass");
        let pool = target.and_then(|target| self.pool(target.word(1), target.at, &settings));
        if let (Some(pool), Some(target)) = (&pool, target) {
            self.report.note(target.at, Translated, format!("pool = \"{pool}\""));
            frontend.pool.clone_from(pool);
        }
        self.timeouts(&lines, &mut frontend);
        self.clients(&lines, &mut frontend);
        self.left(own, udp > 0);
        let wish =
            target.map(|target| target.word(1)).filter(|name| self.upstreams.contains_key(*name));
        let port = frontend.binds.first().map(|bind| bind.0.trim_matches('"'));
        let port = port.and_then(|bind| bind.rsplit(':').next()).unwrap_or("tcp");
        let by_port = format!("port-{}", port.split('"').next().unwrap_or("tcp"));
        if frontend.binds.is_empty() || frontend.pool.is_empty() {
            let why = match frontend.pool.is_empty() {
                true => "no backend of it can be translated",
                false => "no address is left to listen on",
            };
            for line in own {
                self.report.note(line.at, Dropped, "its server is left out");
            }
            return self.report.lose(server.at, NotPossible, why);
        }
        frontend.name = self.frontend_names.take(wish.unwrap_or(&by_port));
        self.report.note(server.at, Translated, format!("[frontend.{}]", frontend.name));
        self.draft.frontends.push(frontend);
    }

    fn listen(&mut self, line: &NginxDirective, frontend: &mut DraftFrontend) {
        let at = line.at;
        let mut keys = Vec::new();
        let mut both = false;
        let unix = line.word(1).starts_with("unix:");
        if unix {
            // nginx gives every user access.
            keys.push("mode = \"0666\"".to_owned());
        }
        for word in line.words.get(2..).unwrap_or_default() {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            match key {
                "udp" => {
                    return self.report.lose(at, NotPossible, "Tidegate balances TCP, not UDP");
                }
                "ssl" => return self.report.lose(at, NotPossible, "Tidegate does not decrypt TLS"),
                "proxy_protocol" if self.can.proxy_in => {
                    keys.push("proxy_protocol = true".to_owned());
                    frontend.accept_proxy.extend((!unix).then_some(at));
                }
                "proxy_protocol" => {
                    return self.report.lose(at, NotPossible, "Tidegate reads no PROXY header");
                }
                "backlog" => match value.parse::<u64>() {
                    Ok(length) => keys.push(format!("backlog = {}", length.clamp(1, 65_535))),
                    Err(_) => self.report.note(at, NotUnderstood, "backlog is not a number"),
                },
                "ipv6only" => both = value == "off",
                "so_keepalive" if value == "off" => {
                    frontend.keys.set("keepalive", "\"off\"", &[at]);
                }
                "reuseport" | "so_keepalive" => {
                    self.report.note(at, Translated, "Tidegate always does this");
                }
                "bind" | "default_server" => {}
                "rcvbuf" | "sndbuf" | "fastopen" | "deferred" | "setfib" | "accept_filter" => {
                    self.report.note(at, Dropped, format!("{key} has no counterpart"));
                }
                _ => {
                    self.report.note(at, NotUnderstood, format!("the parameter {key} is not known"))
                }
            }
        }
        match listen_address(line.word(1), both) {
            Ok(address) => {
                let bind = match keys.is_empty() {
                    true => quoted(&address),
                    false => format!("{{ address = {}, {} }}", quoted(&address), keys.join(", ")),
                };
                self.report.note(at, Translated, format!("bind = {bind}"));
                frontend.binds.push((bind, at));
            }
            Err(why) => self.report.lose(at, NotPossible, why),
        }
    }

    /// Returns the keys of the pool that nginx has in the server.
    fn pool_settings(&mut self, lines: &ServerLines<'t>) -> PoolSettings {
        let mut settings = PoolSettings::default();
        let keys = &mut settings.keys;
        match lines.last("proxy_connect_timeout").map(|line| (time(line.word(1), 1_000), line.at)) {
            Some((Some(timeout), at)) if timeout > 0 => {
                let timeout = toml_time(timeout.min(LONGEST));
                self.report.note(at, Translated, format!("connect_timeout = {timeout}"));
                keys.set("connect_timeout", timeout, &[at]);
            }
            Some((_, at)) => self.report.note(at, NotUnderstood, "it is not a time"),
            None => keys.set("connect_timeout", toml_time(CONNECT_TIMEOUT), &[]),
        }
        let next = lines.last("proxy_next_upstream");
        let tries = lines.last("proxy_next_upstream_tries");
        let off = next.is_some_and(|line| line.word(1) == "off");
        let limit = tries.and_then(|line| line.word(1).parse::<u64>().ok()).unwrap_or(0);
        let attempts = match (off, limit) {
            (true, _) => 1,
            (false, 0) => ATTEMPTS_MAX,
            (false, limit) => limit.min(ATTEMPTS_MAX),
        };
        let at: Vec<SourceLine> = next.iter().chain(&tries).map(|line| line.at).collect();
        for at in &at {
            self.report.note(*at, Translated, format!("connect_attempts = {attempts}"));
        }
        keys.set("connect_attempts", attempts.to_string(), &at);
        self.sender(lines, &mut settings);
        if let Some(check) = lines.last("health_check") {
            self.health_check(check, &mut settings);
        }
        settings
    }

    /// The PROXY header and the source address of connections to backends.
    fn sender(&mut self, lines: &ServerLines<'t>, settings: &mut PoolSettings) {
        if let Some(line) = lines.last("proxy_protocol") {
            match line.word(1) {
                "on" if self.can.proxy_out => {
                    self.report.note(line.at, Translated, "proxy_protocol = \"v1\"");
                    settings.keys.set("proxy_protocol", "\"v1\"", &[line.at]);
                }
                "on" => {
                    let why = "Tidegate sends no PROXY header, and the backend expects one";
                    self.report.lose(line.at, NotPossible, why);
                }
                _ => self.report.note(line.at, Translated, ""),
            }
        }
        if let Some(line) = lines.last("proxy_bind") {
            let address = line.word(1);
            match address.parse::<std::net::IpAddr>() {
                _ if address == "off" => self.report.note(line.at, WithoutEffect, ""),
                Ok(_) if line.words.len() == 2 => {
                    self.report.note(line.at, Translated, format!("source = \"{address}\""));
                    settings.keys.set("source", quoted(address), &[line.at]);
                }
                _ => {
                    let why = "connections start from an address of this host; backends get the \
                               address of the client by the PROXY protocol";
                    self.report.lose(line.at, Dropped, why);
                }
            }
        }
    }

    /// `health_check` of the commercial nginx.
    fn health_check(&mut self, line: &NginxDirective, settings: &mut PoolSettings) {
        let probe = &mut settings.probe;
        let at = [line.at];
        probe.set("kind", "\"tcp\"", &at);
        let (mut interval, mut rise, mut fall) = (5_000, 1, 1);
        for word in &line.words[1..] {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            match (key, value.parse::<u64>()) {
                ("interval", _) => interval = time(value, 1_000).unwrap_or(interval).max(10),
                ("passes", Ok(number)) => rise = number.clamp(1, 100),
                ("fails", Ok(number)) => fall = number.clamp(1, 100),
                ("port", Ok(port)) => probe.set("port", port.to_string(), &at),
                ("jitter" | "mandatory" | "persistent", _) => {}
                _ => {
                    let why = format!("the probe connects only; {key} has no counterpart");
                    self.report.lose(line.at, NotPossible, why);
                }
            }
        }
        probe.set("interval", toml_time(interval), &at);
        probe.set("rise", rise.to_string(), &at);
        probe.set("fall", fall.to_string(), &at);
        self.report.note(line.at, Translated, "probe.kind = \"tcp\"");
    }

    fn timeouts(&mut self, lines: &ServerLines<'t>, frontend: &mut DraftFrontend) {
        let mut idle = None;
        if let Some(line) = lines.last("proxy_timeout") {
            match time(line.word(1), 1_000) {
                Some(time) if time > 0 => {
                    let time = toml_time(time.min(LONGEST));
                    self.report.note(line.at, Translated, format!("idle_timeout = {time}"));
                    frontend.keys.set("idle_timeout", time.clone(), &[line.at]);
                    idle = Some(time);
                }
                _ => self.report.note(line.at, NotUnderstood, "it is not a time"),
            }
        }
        if let Some(line) = lines.last("proxy_half_close") {
            if line.word(1) == "on" {
                let half = idle.unwrap_or_else(|| "\"10m\"".to_owned());
                self.report.note(line.at, Translated, format!("half_closed_timeout = {half}"));
                frontend.keys.set("half_closed_timeout", half, &[line.at]);
            } else {
                let why = "a side that has closed can still receive, see half_closed_timeout";
                self.report.note(line.at, Approximated, why);
            }
        }
    }

    /// Which clients can connect, how often, and the log.
    fn clients(&mut self, lines: &ServerLines<'t>, frontend: &mut DraftFrontend) {
        access::translate(&lines.all_of(&["allow", "deny"]), frontend, self.report);
        for line in lines.all("limit_conn") {
            self.limit(line, frontend);
        }
        let trusted = lines.all("set_real_ip_from");
        for line in &trusted {
            match frontend.accept_proxy.is_empty() {
                true => self.report.note(line.at, WithoutEffect, "no bind reads a PROXY header"),
                false => {
                    let why = "proxy_protocol.from: others are refused; nginx serves them";
                    self.report.note(line.at, Approximated, why);
                }
            }
        }
        if !frontend.accept_proxy.is_empty() {
            let from: Vec<&str> = trusted.iter().map(|line| line.word(1)).collect();
            frontend.proxy = match from.is_empty() {
                true => quoted_list(["0.0.0.0/0", "::/0"]),
                false => quoted_list(from),
            };
        }
        for line in lines.all("access_log") {
            match line.word(1) {
                "off" => self.report.note(line.at, WithoutEffect, ""),
                _ => {
                    let why = "[log] access = \"stdout\", with fields of its own";
                    self.report.note(line.at, Approximated, why);
                    self.access_logs.push(line.at);
                }
            }
        }
    }

    fn limit(&mut self, line: &NginxDirective, frontend: &mut DraftFrontend) {
        let zone = self.zones.get(line.word(1)).cloned();
        match (zone, line.word(2).parse::<u64>()) {
            (Some((key, at)), Ok(number)) if key.ends_with("remote_addr") && number > 0 => {
                let text = format!("sources.connections_max = {number}");
                self.report.note(line.at, Translated, text);
                self.report.note(at, Translated, "Tidegate counts client sources itself");
                frontend.sources.set("connections_max", number.to_string(), &[line.at]);
            }
            (Some((_, at)), _) => {
                let why = "Tidegate limits client addresses only";
                self.report.lose(line.at, NotPossible, why);
                self.report.lose(at, NotPossible, why);
            }
            (None, _) => self.report.note(line.at, NotUnderstood, "there is no such zone"),
        }
    }

    /// Notes the directives of a server that nothing has used.
    fn left(&mut self, own: &[NginxDirective], udp: bool) {
        for line in own.iter().filter(|line| self.report.is_undecided(line.at)).collect::<Vec<_>>()
        {
            let (verdict, why): (LineVerdict, &str) = match &*line.words[0] {
                "ssl_preread" => (WithoutEffect, "no backend is chosen by it"),
                "proxy_responses" | "proxy_requests" if udp => {
                    self.report.lose(line.at, NotPossible, "Tidegate balances TCP, not UDP");
                    continue;
                }
                "proxy_responses" | "proxy_requests" => (WithoutEffect, "it is for UDP"),
                "resolver" => {
                    self.resolver(line);
                    continue;
                }
                "listen" | "proxy_pass" => continue,
                _ => {
                    self.other(line);
                    continue;
                }
            };
            self.report.note(line.at, verdict, why);
        }
    }
}

/// Translates `PORT`, `ADDRESS:PORT` or `ADDRESS:PORT-PORT`. `both`: an IPv6 wildcard is for IPv4,
/// too.
fn listen_address(text: &str, both: bool) -> Result<String, String> {
    if text.starts_with("unix:") {
        return Ok(text.to_owned());
    }
    let (host, ports) = text.rsplit_once(':').unwrap_or(("*", text));
    if ports.is_empty() || !ports.split('-').all(|port| port.parse::<u16>().is_ok()) {
        return Err("the port is missing".to_owned());
    }
    let host = match host {
        "*" => "0.0.0.0",
        "localhost" => "127.0.0.1",
        "[::]" if both => "*",
        host => host,
    };
    Ok(format!("{host}:{ports}"))
}
