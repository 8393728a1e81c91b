//! Reads `nginx.conf` and translates its `stream` blocks.
//!
//! Called by [`crate::import`]. Steps: `tree` reads directives and included files; `server` and
//! `upstream` translate them.

mod access;
mod server;
mod tree;
mod upstream;

use crate::ImportRequest;
use crate::available::Available;
use crate::draft::{Draft, UsedNames, quoted_list};
use crate::report::LineVerdict::{
    self, Dropped, NotPossible, NotUnderstood, Translated, WithoutEffect,
};
use crate::report::{ImportReport, SourceLine, WHOLE};
use std::collections::BTreeMap;
use tree::NginxDirective;

/// Directives that have no counterpart: verdict and reason.
const WORDS: &[(&str, LineVerdict, &str)] = &[
    ("user", Dropped, "choose a user for Tidegate with [process] user"),
    ("pid", Dropped, "use tidegate run --pid-file"),
    ("daemon", Dropped, "the service manager runs Tidegate"),
    ("error_log", Dropped, "Tidegate logs to standard output, see [log]"),
    ("load_module", WithoutEffect, "Tidegate has no modules"),
    ("worker_rlimit_nofile", Dropped, "Tidegate raises its limit itself; see LimitNOFILE"),
    ("worker_cpu_affinity", Dropped, "Tidegate pins its workers, see [process] pin"),
    ("worker_priority", Dropped, "the service manager sets it"),
    ("worker_shutdown_timeout", Dropped, "see [process] drain_timeout"),
    ("worker_connections", Dropped, "see [process] connections_max"),
    ("multi_accept", WithoutEffect, "it tunes nginx"),
    ("use", WithoutEffect, "see [process] engine"),
    ("accept_mutex", WithoutEffect, "it tunes nginx"),
    ("pcre_jit", WithoutEffect, "it tunes nginx"),
    ("timer_resolution", WithoutEffect, "it tunes nginx"),
    ("thread_pool", WithoutEffect, "it tunes nginx"),
    ("working_directory", WithoutEffect, ""),
    ("env", WithoutEffect, ""),
    ("log_format", Dropped, "the access log has a fixed set of fields"),
    ("open_log_file_cache", WithoutEffect, "it tunes nginx"),
    ("tcp_nodelay", Translated, "Tidegate always sends at once"),
    ("proxy_buffer_size", WithoutEffect, "Tidegate chooses its buffers"),
    ("proxy_socket_keepalive", Translated, "keepalive is on by default"),
    ("preread_timeout", WithoutEffect, "Tidegate reads no first bytes of clients"),
    ("preread_buffer_size", WithoutEffect, "Tidegate reads no first bytes of clients"),
    ("proxy_download_rate", Dropped, "Tidegate has no rate limit for bytes"),
    ("proxy_upload_rate", Dropped, "Tidegate has no rate limit for bytes"),
    ("proxy_next_upstream_timeout", Dropped, "connect_timeout applies to each attempt"),
    ("resolver_timeout", Dropped, "Tidegate asks in its own rhythm"),
    ("variables_hash_max_size", WithoutEffect, "it tunes nginx"),
    ("variables_hash_bucket_size", WithoutEffect, "it tunes nginx"),
    ("map_hash_max_size", WithoutEffect, "it tunes nginx"),
    ("map_hash_bucket_size", WithoutEffect, "it tunes nginx"),
    ("limit_conn_log_level", WithoutEffect, ""),
    ("limit_conn_dry_run", NotPossible, "a limit is in force, or it is not written"),
    ("status_zone", WithoutEffect, "it is for statistics"),
    ("return", NotPossible, "Tidegate answers nothing itself"),
    ("set", NotPossible, "Tidegate has no variables"),
    ("server_name", NotPossible, "Tidegate does not route by the name of a TLS handshake"),
    ("proxy_ssl", NotPossible, "Tidegate does not encrypt connections to backends"),
];

/// Prefixes of directives that have no counterpart.
const PREFIXES: &[(&str, LineVerdict, &str)] = &[
    ("proxy_ssl_", WithoutEffect, "it is for TLS"),
    ("ssl_", WithoutEffect, "it is for TLS"),
    ("js_", NotPossible, "Tidegate runs no scripts"),
    ("lua_", NotPossible, "Tidegate runs no scripts"),
];

/// The translation of one configuration.
struct NginxTranslator<'t> {
    report: &'t mut ImportReport,
    draft: Draft,
    can: Available,
    /// `upstream` blocks by name.
    upstreams: BTreeMap<String, &'t NginxDirective>,
    /// Keys of `limit_conn_zone` by the name of the zone.
    zones: BTreeMap<String, (String, SourceLine)>,
    /// Names of pools by their upstream and their settings.
    pools: BTreeMap<String, String>,
    frontend_names: UsedNames,
    pool_names: UsedNames,
    access_logs: Vec<SourceLine>,
}

/// Reads a configuration and fills the report.
pub(crate) fn read(request: &ImportRequest<'_>, report: &mut ImportReport) -> Draft {
    let tree = tree::read(request, report);
    let mut translator = NginxTranslator {
        report,
        draft: Draft::default(),
        can: Available::now(),
        upstreams: BTreeMap::new(),
        zones: BTreeMap::new(),
        pools: BTreeMap::new(),
        frontend_names: UsedNames::default(),
        pool_names: UsedNames::default(),
        access_logs: Vec::new(),
    };
    translator.main(&tree);
    translator.draft
}

impl<'t> NginxTranslator<'t> {
    fn main(&mut self, tree: &'t [NginxDirective]) {
        for directive in tree {
            let at = directive.at;
            match (&*directive.words[0], &directive.block) {
                ("stream", Some(block)) => {
                    self.report.note(at, Translated, "");
                    self.stream(block);
                }
                ("events", Some(block)) => {
                    self.report.note(at, WithoutEffect, "");
                    block.iter().for_each(|line| self.other(line));
                }
                ("http", Some(_)) => {
                    let serves = has_server(directive);
                    self.whole(directive, Dropped, "HTTP; Tidegate balances TCP", serves);
                }
                ("mail", Some(_)) => {
                    self.whole(directive, NotPossible, "Tidegate speaks no mail protocol", true);
                }
                // A file of its own that is included in `stream`.
                ("upstream" | "server" | "map" | "limit_conn_zone", _) => {
                    self.stream(tree);
                    return;
                }
                ("worker_processes", _) => self.workers(directive),
                _ => self.other(directive),
            }
        }
    }

    fn workers(&mut self, directive: &NginxDirective) {
        let value = directive.word(1);
        let workers = value.parse::<u64>().ok().map(|number| number.clamp(1, 256).to_string());
        match workers.or((value == "auto").then(|| "\"auto\"".to_owned())) {
            Some(workers) => {
                let text = format!("[process] workers = {workers}");
                self.report.note(directive.at, Translated, text);
                self.draft.process.set("workers", workers, &[directive.at]);
            }
            None => self.report.note(directive.at, NotUnderstood, "it is not a number"),
        }
    }

    fn stream(&mut self, block: &'t [NginxDirective]) {
        for directive in block {
            match (&*directive.words[0], &directive.block) {
                ("upstream", Some(_)) => {
                    self.upstreams.insert(directive.word(1).to_owned(), directive);
                }
                ("limit_conn_zone", _) => {
                    let zone = directive.word(2).trim_start_matches("zone=");
                    let name = zone.split(':').next().unwrap_or_default().to_owned();
                    self.zones.insert(name, (directive.word(1).to_owned(), directive.at));
                }
                _ => {}
            }
        }
        let servers: Vec<&NginxDirective> =
            block.iter().filter(|directive| directive.words[0] == "server").collect();
        for server in servers {
            self.server(server, block);
        }
        for directive in block {
            self.in_stream(directive);
        }
        if !self.access_logs.is_empty() {
            let lines = std::mem::take(&mut self.access_logs);
            self.draft.log.set("access", "\"stdout\"", &lines);
        }
    }

    /// Notes a directive of `stream` that no server has used.
    fn in_stream(&mut self, directive: &NginxDirective) {
        if !self.report.is_undecided(directive.at) {
            return;
        }
        match &*directive.words[0] {
            "upstream" => self.whole(directive, Dropped, "no translated server uses it", false),
            "map" | "geo" | "split_clients" => {
                let why = "Tidegate has no variables; write routes";
                self.whole(directive, NotPossible, why, true);
            }
            "limit_conn_zone" => {
                self.report.note(directive.at, WithoutEffect, "no limit uses it");
            }
            "server" => {}
            name if server::INHERITED.contains(&name) => {
                self.report.note(directive.at, WithoutEffect, "no translated server uses it");
            }
            "resolver" => self.resolver(directive),
            _ => self.other(directive),
        }
    }

    fn resolver(&mut self, directive: &NginxDirective) {
        let servers: Vec<String> = directive.words[1..]
            .iter()
            .filter(|word| !word.contains('='))
            .map(|word| match word.parse::<std::net::IpAddr>() {
                Ok(ip) => std::net::SocketAddr::new(ip, 53).to_string(),
                Err(_) => word.clone(),
            })
            .collect();
        let list = quoted_list(servers.iter().map(String::as_str));
        self.report.note(directive.at, Translated, format!("[dns] servers = {list}"));
        self.draft.dns.set("servers", list, &[directive.at]);
    }

    /// Notes a directive by its name.
    fn other(&mut self, directive: &NginxDirective) {
        let name = &*directive.words[0];
        let exact = WORDS.iter().find(|row| row.0 == name);
        let row = exact.or_else(|| PREFIXES.iter().find(|row| name.starts_with(row.0)));
        match row {
            Some((_, verdict, why)) => self.report.note(directive.at, *verdict, *why),
            None => self.report.note(directive.at, NotUnderstood, "the directive is not known"),
        }
        for inner in directive.block.iter().flatten() {
            self.whole(inner, NotUnderstood, "it is in a block that is not known", true);
        }
    }

    /// Notes one verdict for a directive and everything in it.
    fn whole(&mut self, directive: &NginxDirective, verdict: LineVerdict, why: &str, lost: bool) {
        let text = format!("{WHOLE}{}: {why}", directive.words.join(" "));
        let mut stack = vec![directive];
        while let Some(next) = stack.pop() {
            // A line can also have directives that are translated.
            if std::ptr::eq(next, directive) || self.report.is_undecided(next.at) {
                self.report.note(next.at, verdict, text.clone());
            }
            if lost {
                self.report.mark_lost(next.at);
            }
            stack.extend(next.block.iter().flatten());
        }
    }
}

/// Returns true if a block has a `server`, at any depth.
fn has_server(directive: &NginxDirective) -> bool {
    let mut stack = vec![directive];
    while let Some(next) = stack.pop() {
        if next.words[0] == "server" {
            return true;
        }
        stack.extend(next.block.iter().flatten());
    }
    false
}

impl NginxDirective {
    /// Returns a word, empty if there are fewer.
    fn word(&self, position: usize) -> &str {
        self.words.get(position).map_or("", String::as_str)
    }
}
