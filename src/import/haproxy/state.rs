//! Parameters of servers that become keys of the pool: backups, changes of state, PROXY protocol,
//! slow start.
//!
//! Called by `pool`.

use super::Translator;
use super::lines::ProxyLines;
use super::server::HaproxyServer;
use crate::draft::{DraftPool, quoted};
use crate::report::LineVerdict::{
    self, Approximated, Dropped, NotPossible, Translated, WithoutEffect,
};
use crate::times::toml_time;

/// Parameters that no other function translates: verdict and reason.
const PARAMETERS: &[(&str, LineVerdict, &str)] = &[
    ("minconn", Approximated, "connections_max does not follow the load"),
    ("init-addr", Translated, "Tidegate starts although a name does not resolve"),
    ("resolvers", Translated, "see [dns]"),
    ("resolve-prefer", Approximated, "addresses of both families become backends"),
    ("resolve-opts", Dropped, "it has no counterpart"),
    ("resolve-net", Dropped, "it has no counterpart"),
    ("track", NotPossible, "a backend has the state of its own pool"),
    ("interface", NotPossible, "choose a source address"),
    ("namespace", NotPossible, "Tidegate uses one network namespace"),
    ("socks4", NotPossible, "Tidegate connects directly"),
    ("check-via-socks4", NotPossible, "Tidegate connects directly"),
    ("tcp-md5sig", NotPossible, "Tidegate signs no segments"),
    ("ssl", NotPossible, "Tidegate does not encrypt connections to backends"),
    ("tcp-ut", Dropped, "see user_timeout of the frontend"),
    ("init-state", Dropped, "a backend waits for its first probe result"),
    ("on-error", Dropped, "see [pool.NAME.ejection]"),
    ("log-proto", Dropped, "it is for syslog"),
    ("ca-file", WithoutEffect, ""),
    ("verify", WithoutEffect, ""),
    ("cookie", WithoutEffect, "it is for HTTP"),
    ("redir", WithoutEffect, "it is for HTTP"),
];

impl Translator<'_> {
    /// Notes the parameters of a server that have no key of their own.
    pub(super) fn parameters(&mut self, server: &HaproxyServer) {
        for (name, verdict, why) in PARAMETERS {
            if let Some((_, at)) = server.parameters.get(*name) {
                self.report.note(*at, *verdict, *why);
            }
        }
    }

    /// HAProxy sends all clients to the first backup; Tidegate balances over all of them.
    pub(super) fn backups(
        &mut self,
        in_force: &ProxyLines<'_>,
        servers: &[HaproxyServer],
        pool: &mut DraftPool,
    ) {
        let all = in_force.option("allbackups");
        if let Some(all) = all {
            self.report.note(all.at, Translated, "backups are balanced over");
        }
        let backups = pool.backends.iter().filter(|one| one.keys.get("backup").is_some()).count();
        if backups < 2 || all.is_some() {
            return;
        }
        let lines = servers.iter().filter(|server| server.has("backup"));
        for server in lines.skip(usize::from(!self.can.backups)) {
            let at = server.line_of("backup");
            if self.can.backups {
                pool.keys.set("backups", "\"one\"", &[at]);
                self.report.note(server.at, Translated, "backups = \"one\"");
            } else {
                let why = "HAProxy uses one backup at a time; Tidegate would balance over all: \
                           two databases would get writes";
                self.report.lose(server.at, NotPossible, why);
            }
        }
    }

    /// Translates what happens when the state of a server changes.
    pub(super) fn state_changes(
        &mut self,
        in_force: &ProxyLines<'_>,
        servers: &[HaproxyServer],
        pool: &mut DraftPool,
    ) {
        for line in in_force.all("default-server") {
            self.report.note(line.at, Translated, "");
        }
        self.on_down(servers, pool);
        self.on_recover(in_force, servers, pool);
        self.proxy_header(servers, pool);
        let slow = servers.iter().filter(|one| one.time("slowstart") > Some(0));
        if let Some((time, at)) =
            slow.filter_map(|one| Some((one.time("slowstart")?, one.line_of("slowstart")))).max()
        {
            let time = toml_time(time);
            self.report.note(at, Translated, format!("slow_start = {time}"));
            pool.keys.set("slow_start", time, &[at]);
        }
        if let Some(server) = servers.iter().find(|one| one.argument("observe") == Some("layer4")) {
            let at = server.line_of("observe");
            let failures = server.number("error-limit").unwrap_or(10).clamp(1, 1_000);
            pool.ejection.set("failures", failures.to_string(), &[at]);
            let why = format!(
                "ejection.failures = {failures}: failing backends are ejected for a time, not \
                 marked down"
            );
            self.report.note(at, Approximated, why);
        }
    }

    fn on_down(&mut self, servers: &[HaproxyServer], pool: &mut DraftPool) {
        let cut = |server: &&HaproxyServer| {
            server.argument("on-marked-down") == Some("shutdown-sessions")
        };
        let count = servers.iter().filter(cut).count();
        for server in servers.iter().filter(cut) {
            let at = server.line_of("on-marked-down");
            if !server.has("check") {
                self.report.note(at, WithoutEffect, "a server without check is never down");
            } else if self.can.on_down {
                pool.keys.set("on_down", "\"reset\"", &[at]);
                self.report.note(at, Translated, "on_down = \"reset\"");
                if count < servers.len() {
                    self.report.note(at, Approximated, "on_down is for all backends of the pool");
                }
            } else {
                let why = "sessions of a backend that is down would stay, and could write to it";
                self.report.lose(at, NotPossible, why);
            }
        }
    }

    /// HAProxy shuts down the sessions of all backups at once when this server goes up.
    fn on_recover(
        &mut self,
        in_force: &ProxyLines<'_>,
        servers: &[HaproxyServer],
        pool: &mut DraftPool,
    ) {
        let shuts = |server: &&HaproxyServer| {
            server.argument("on-marked-up") == Some("shutdown-backup-sessions")
        };
        let in_use = |backup: bool| {
            let all = pool.backends.iter().filter(|one| one.keys.get("enabled").is_none());
            all.filter(|one| one.keys.get("backup").is_some() == backup).count()
        };
        let (primaries, backups) = (in_use(false), in_use(true));
        let all = servers.iter().all(|one| one.has("backup") || shuts(&one));
        for server in servers.iter().filter(shuts) {
            let at = server.line_of("on-marked-up");
            let without = if server.has("backup") {
                "it is for servers that are no backups"
            } else if !server.has("check") {
                "a server without check does not go up"
            } else if backups == 0 || primaries == 0 {
                "the pool has no backup"
            } else {
                pool.keys.set("on_recover", "\"close-after 1ms\"", &[at]);
                let text = "on_recover = \"close-after 1ms\"";
                self.report.note(at, Translated, text);
                if !all {
                    let why = "on_recover counts the return of every primary of the pool";
                    self.report.note(at, Approximated, why);
                }
                if backups > 1 && in_force.option("allbackups").is_none() {
                    let why = "it also closes sessions when an earlier backup returns";
                    self.report.note(at, Approximated, why);
                }
                continue;
            };
            self.report.note(at, WithoutEffect, without);
        }
    }

    fn proxy_header(&mut self, servers: &[HaproxyServer], pool: &mut DraftPool) {
        let versions: Vec<Option<&str>> = servers.iter().map(header_version).collect();
        let Some(first) = versions.iter().flatten().next().copied() else { return };
        for (server, version) in servers.iter().zip(&versions) {
            let names =
                ["send-proxy", "send-proxy-v2", "send-proxy-v2-ssl", "send-proxy-v2-ssl-cn"];
            let name = names.iter().find(|name| server.has(name)).copied().unwrap_or_default();
            let at = server.line_of(name);
            if *version != Some(first) {
                let why = "the backends of a pool get the same version of the PROXY protocol";
                self.report.lose(at, NotPossible, why);
            } else if !self.can.proxy_out {
                let why = "Tidegate sends no PROXY header, and the backend expects one";
                self.report.lose(at, NotPossible, why);
            } else {
                pool.keys.set("proxy_protocol", quoted(first), &[at]);
                self.report.note(at, Translated, format!("proxy_protocol = \"{first}\""));
                self.header_fields(server, name);
            }
        }
    }

    fn header_fields(&mut self, server: &HaproxyServer, name: &str) {
        if name.contains("ssl") {
            let why = "the header has no fields about TLS, because Tidegate does not decrypt";
            self.report.note(server.line_of(name), Approximated, why);
        }
        if let Some((_, at)) = server.parameters.get("proxy-v2-options") {
            self.report.note(*at, Approximated, "the header has no optional fields");
        }
        if server.has("check-send-proxy") && (server.has("port") || server.has("addr")) {
            let why = "probes of another port or address send no PROXY header";
            self.report.note(server.line_of("check-send-proxy"), Approximated, why);
        }
    }
}

/// Returns the version of the PROXY header that a server gets.
fn header_version(server: &HaproxyServer) -> Option<&'static str> {
    if server.parameters.keys().any(|name| name.starts_with("send-proxy-v2")) {
        return Some("v2");
    }
    server.has("send-proxy").then_some("v1")
}
