//! A `backend` or the servers of a `listen`: one pool.
//!
//! Called by `haproxy::Translator` once per section that a frontend uses.

use super::lines::{Directive, HaproxySection, ProxyLines};
use super::server::{self, HaproxyServer, ServerAddress};
use super::{Translator, checks, external_check, sticky};
use crate::draft::{DraftBackend, DraftPool, UsedNames, quoted};
use crate::report::{LineVerdict, SourceLine};
use crate::times::toml_time;
use std::collections::HashMap;

/// Largest weight of a backend.
const WEIGHT_MAX: u64 = 1_000;

/// Most clients in the queue of a pool.
const QUEUE_MAX: u64 = 1_000_000;

impl Translator<'_> {
    /// Translates a section and returns the name of its pool. A second call returns the same.
    pub(super) fn pool(&mut self, index: usize) -> String {
        if let Some(name) = self.pools.get(&index) {
            return name.clone();
        }
        let sections = self.sections;
        let section = &sections[index];
        let in_force = ProxyLines::of(section, sections);
        let name = self.pool_names.take(&section.name);
        self.pools.insert(index, name.clone());
        let mut pool = DraftPool { name, at: vec![section.header.at], ..Default::default() };
        let header = format!("[pool.{}]", pool.name);
        self.report.note(section.header.at, LineVerdict::Translated, header);
        let servers = server::servers(&in_force, self.report);
        self.balance(&in_force, &mut pool);
        self.connecting(&in_force, &mut pool, section);
        self.source(&in_force, &servers, &mut pool);
        self.queue(&in_force, &servers, &mut pool);
        self.backends(&servers, index, &mut pool);
        self.backups(&in_force, &servers, &mut pool);
        checks::probe(&in_force, &servers, self.can, self.report, &mut pool);
        external_check::require_helper(&pool, &mut self.draft.process);
        self.state_changes(&in_force, &servers, &mut pool);
        let used = pool.name.clone();
        self.draft.pools.push(pool);
        used
    }

    fn balance(&mut self, in_force: &ProxyLines<'_>, pool: &mut DraftPool) {
        let hash = in_force.last("hash-type");
        let line = in_force.last("balance");
        if let Some(line) = line {
            let consistent = hash.is_some_and(|hash| hash.word(1) == "consistent");
            let (policy, verdict, why) = policy(line, consistent);
            match verdict {
                LineVerdict::NotPossible => self.report.lose(line.at, verdict, why),
                _ => {
                    let text = match why {
                        "" => format!("balance = \"{policy}\""),
                        why => format!("balance = \"{policy}\": {why}"),
                    };
                    self.report.note(line.at, verdict, text);
                    pool.keys.set("balance", quoted(policy), &[line.at]);
                }
            }
        }
        if let Some(hash) = hash {
            let used = line.is_some_and(|line| line.word(1) == "source");
            let verdict = match used {
                true => LineVerdict::Translated,
                false => LineVerdict::WithoutEffect,
            };
            let text = if used { "source-hash moves few clients" } else { "nothing is hashed" };
            self.report.note(hash.at, verdict, text);
        }
        sticky::translate(in_force, pool, self.report);
    }

    /// Sets the timeouts and the number of attempts.
    fn connecting(
        &mut self,
        in_force: &ProxyLines<'_>,
        pool: &mut DraftPool,
        section: &HaproxySection,
    ) {
        match in_force.timeout("connect") {
            Some((time, at)) if time > 0 => {
                let time = toml_time(time);
                self.report.note(at, LineVerdict::Translated, format!("connect_timeout = {time}"));
                pool.keys.set("connect_timeout", time, &[at]);
            }
            _ => {
                let why = "there is no timeout connect: connect_timeout has its default, 5 s";
                self.report.note(section.header.at, LineVerdict::Approximated, why);
            }
        }
        let redispatch = in_force.option("redispatch");
        let retries_line = in_force.last("retries");
        let retries = retries_line.and_then(|line| line.word(1).parse::<u64>().ok()).unwrap_or(3);
        let attempts = match (redispatch, retries) {
            (None, _) => 1,
            (Some(_), 0..=1) => retries + 1,
            (Some(_), 2..=3) => 3,
            (Some(_), more) => more.min(16),
        };
        let lines: Vec<SourceLine> =
            redispatch.into_iter().chain(retries_line).map(|line| line.at).collect();
        let text = format!("connect_attempts = {attempts}");
        for at in &lines {
            match redispatch {
                Some(_) => {
                    let each = format!("{text}, each on another backend, at once");
                    self.report.note(*at, LineVerdict::Translated, each);
                }
                None => {
                    let why = format!(
                        "{text}: without option redispatch HAProxy tries the same server {retries} \
                         more times, 1 s apart; Tidegate tries it once"
                    );
                    self.report.note(*at, LineVerdict::Approximated, why);
                }
            }
        }
        if lines.is_empty() {
            let why = format!("{text}: HAProxy tries the same server 3 more times, 1 s apart");
            self.report.note(section.header.at, LineVerdict::Approximated, why);
        }
        for off in in_force.all("option redispatch").iter().filter(|line| line.words[0] == "no") {
            self.report.note(off.at, LineVerdict::Translated, text.clone());
        }
        pool.keys.set("connect_attempts", attempts.to_string(), &lines);
    }

    /// Sets the local addresses: `source` of the section, or of all servers alike.
    fn source(
        &mut self,
        in_force: &ProxyLines<'_>,
        servers: &[HaproxyServer],
        pool: &mut DraftPool,
    ) {
        let own = in_force.last("source").map(|line| (line.words[1..].join(" "), line.at));
        let first = servers.iter().find(|server| server.has("source"));
        let of_servers = first.map(|server| {
            (server.argument("source").unwrap_or_default().to_owned(), server.line_of("source"))
        });
        let different = servers
            .iter()
            .any(|one| one.argument("source") != first.and_then(|first| first.argument("source")));
        for (text, at) in own.iter().chain(&of_servers) {
            let address = text.strip_suffix(":0").unwrap_or(text);
            let transparent = text.contains("usesrc") || servers.iter().any(|s| s.has("usesrc"));
            if transparent || address.parse::<std::net::IpAddr>().is_err() {
                let why = "connections start from an address of this host; backends get the \
                           address of the client by the PROXY protocol";
                self.report.lose(*at, LineVerdict::Dropped, why);
            } else if of_servers.is_some() && different {
                let why = "source is a key of the pool; give the backend a pool of its own";
                self.report.lose(*at, LineVerdict::NotPossible, why);
            } else {
                self.report.note(*at, LineVerdict::Translated, format!("source = \"{address}\""));
                pool.keys.set("source", quoted(address), &[*at]);
            }
        }
    }

    /// Sets the queue: `maxqueue` of the servers, `timeout queue`.
    fn queue(
        &mut self,
        in_force: &ProxyLines<'_>,
        servers: &[HaproxyServer],
        pool: &mut DraftPool,
    ) {
        let capped: Vec<_> = servers.iter().filter(|one| one.number("maxconn") > Some(0)).collect();
        let timeout = in_force.timeout("queue").filter(|(time, _)| *time > 0);
        let Some(first) = capped.first() else {
            if let Some((_, at)) = timeout {
                self.wait_for_eligible(at, servers, pool);
            }
            return;
        };
        let at = first.line_of("maxconn");
        let bounded: u64 = capped.iter().filter_map(|server| server.number("maxqueue")).sum();
        let (max, at) = match bounded {
            0 => (capped.iter().filter_map(|server| server.number("maxconn")).sum(), at),
            sum => (sum, first.line_of("maxqueue")),
        };
        let max: u64 = u64::min(max, QUEUE_MAX);
        for server in servers.iter().filter(|server| server.has("maxqueue")) {
            let why = format!("queue_max = {max}: the queue of a pool is the sum of its servers'");
            self.report.note(server.line_of("maxqueue"), LineVerdict::Approximated, why);
        }
        pool.keys.set("queue_max", max.to_string(), &[at]);
        if bounded == 0 {
            let why = format!("queue_max = {max}: HAProxy's queue has no bound");
            self.report.note(at, LineVerdict::Approximated, why);
        }
        // HAProxy waits `timeout connect` if there is no `timeout queue`.
        if let Some((time, at)) = timeout.or_else(|| in_force.timeout("connect"))
            && time > 0
        {
            pool.keys.set("queue_timeout", toml_time(time), &[at]);
        }
        if let Some((time, at)) = timeout {
            let text = format!("queue_timeout = {}", toml_time(time));
            self.report.note(at, LineVerdict::Translated, text);
            self.wait_for_eligible(at, servers, pool);
        }
    }

    /// Lets clients wait through a failover. HAProxy closes them if no server is up.
    fn wait_for_eligible(
        &mut self,
        at: SourceLine,
        servers: &[HaproxyServer],
        pool: &mut DraftPool,
    ) {
        let checked = servers.iter().any(|server| server.has("check"));
        match checked && pool.keys.get("queue_max").is_some() && self.can.wait {
            true => {
                let why = "when_none_eligible = \"wait\": clients also wait while no backend is up";
                self.report.note(at, LineVerdict::Approximated, why);
                pool.keys.set("when_none_eligible", "\"wait\"", &[at]);
            }
            false if pool.keys.get("queue_max").is_none() => {
                let why = "no server has maxconn, so no client waits";
                self.report.note(at, LineVerdict::WithoutEffect, why);
            }
            false => {}
        }
    }

    /// Adds a backend per server.
    fn backends(&mut self, servers: &[HaproxyServer], index: usize, pool: &mut DraftPool) {
        let port = self.client_ports.get(&index).copied().flatten();
        let mut names = UsedNames::default();
        // The position of the backend with an address.
        let mut known: HashMap<String, usize> = HashMap::new();
        for server in servers {
            let address = match server::address(&server.address, port, self.can) {
                Ok(address) => address,
                Err(why) => {
                    self.report.lose(server.at, LineVerdict::NotPossible, why);
                    continue;
                }
            };
            let weight = server.number("weight").unwrap_or(1);
            let disabled = server.has("disabled");
            if (disabled || weight == 0) && !(self.can.enabled && server.copies == 1) {
                let what = if weight == 0 { "its weight is 0" } else { "it is disabled" };
                let why = format!("{what}: left out; add it when it is needed");
                self.report.note(server.at, LineVerdict::Approximated, why);
                continue;
            }
            let by_name = matches!(address, ServerAddress::Named(_));
            let (ServerAddress::Written(address) | ServerAddress::Named(address)) = &address;
            let total = weight.saturating_mul(server.copies).min(WEIGHT_MAX);
            if let Some(twin) = known.get(address) {
                self.twin(server, &mut pool.backends[*twin], total);
                continue;
            }
            let backend = self.backend(server, address, by_name, total, &mut names, &pool.name);
            known.insert(address.clone(), pool.backends.len());
            pool.backends.push(backend);
        }
    }

    fn backend(
        &mut self,
        server: &HaproxyServer,
        address: &str,
        by_name: bool,
        weight: u64,
        names: &mut UsedNames,
        pool: &str,
    ) -> DraftBackend {
        let name = names.take(&server.name);
        let mut backend = DraftBackend {
            address: address.to_owned(),
            at: vec![server.at],
            name,
            ..Default::default()
        };
        let mut text = format!("pool.{pool}.backend {}", backend.name);
        if by_name {
            let why = "every address of the name becomes a backend";
            self.report.note(server.at, LineVerdict::Approximated, why);
        } else if server.copies > 1 {
            let why = format!("{} servers with one address are one backend", server.copies);
            self.report.note(server.at, LineVerdict::Approximated, why);
        }
        if server.has("disabled") || server.number("weight") == Some(0) {
            backend.keys.set("enabled", "false", &[server.at]);
            text += ", enabled = false";
        }
        // A name has its weight per address.
        let weight = if by_name { server.number("weight").unwrap_or(1) } else { weight };
        if weight > 1 {
            backend.keys.set("weight", weight.to_string(), &[server.line_of("weight")]);
        }
        if server.has("backup") {
            backend.keys.set("backup", "true", &[server.line_of("backup")]);
        }
        if let Some(cap) = server.number("maxconn").filter(|cap| *cap > 0) {
            text += &format!(", connections_max = {cap}");
            backend.keys.set("connections_max", cap.to_string(), &[server.line_of("maxconn")]);
        }
        self.report.note(server.at, LineVerdict::Translated, text);
        self.parameters(server);
        backend
    }

    /// Adds the weight of a server to the backend with the same address.
    fn twin(&mut self, server: &HaproxyServer, backend: &mut DraftBackend, weight: u64) {
        let before: u64 = backend.keys.get("weight").and_then(|w| w.parse().ok()).unwrap_or(1);
        let same = backend.keys.get("backup").is_some() == server.has("backup");
        if !same {
            let why = format!("backend {} has the same address", backend.name);
            self.report.note(server.at, LineVerdict::Dropped, why);
            return;
        }
        backend.at.push(server.at);
        let total = before.saturating_add(weight).min(WEIGHT_MAX);
        backend.keys.set("weight", total.to_string(), &backend.at.clone());
        let why = format!("backend {} has the same address and gets its weight", backend.name);
        self.report.note(server.at, LineVerdict::Approximated, why);
    }
}

/// Returns the policy, a verdict, and a reason if it differs.
fn policy(line: &Directive, consistent: bool) -> (&'static str, LineVerdict, &'static str) {
    let algorithm = line.word(1);
    let draws = algorithm.strip_prefix("random").unwrap_or_default();
    match algorithm {
        "roundrobin" | "static-rr" => ("weighted-round-robin", LineVerdict::Translated, ""),
        "leastconn" => ("least-connections", LineVerdict::Translated, ""),
        "source" if consistent => ("source-hash", LineVerdict::Translated, ""),
        "source" => (
            "source-hash",
            LineVerdict::Approximated,
            "a client can get another backend than before; a change of the pool moves few clients",
        ),
        "first" => (
            "weighted-round-robin",
            LineVerdict::Approximated,
            "HAProxy fills one server after the other; the same if one backend is eligible",
        ),
        "random" if draws.is_empty() => ("two-choices", LineVerdict::Translated, ""),
        "random(1)" => ("random", LineVerdict::Translated, ""),
        _ if draws.starts_with('(') => ("two-choices", LineVerdict::Translated, ""),
        "rdp-cookie" => (
            "source-hash",
            LineVerdict::Approximated,
            "by address instead of cookie: clients behind one address get one backend",
        ),
        _ => ("", LineVerdict::NotPossible, "Tidegate does not hash by this"),
    }
}
