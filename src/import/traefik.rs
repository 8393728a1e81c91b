//! Reads configurations of Traefik in YAML or TOML and translates their TCP part.
//!
//! Called by [`crate::import`]. Entry points (the static part), and routers and services (the
//! dynamic part) can be in one file. A static file that names its dynamic file reads that, too.

use crate::available::Available;
use crate::doc::{self, DocNode, KeyReason};
use crate::draft::{
    Draft, DraftBackend, DraftFrontend, DraftPool, DraftRoute, UsedNames, quoted, quoted_list,
};
use crate::prefix::AddressPrefix;
use crate::report::LineVerdict::{Approximated, Dropped, NotPossible, Translated, WithoutEffect};
use crate::report::{ImportReport, LineVerdict};
use crate::times::{time, toml_time};
use crate::{ImportRequest, IncludedFile};
use std::collections::{BTreeMap, BTreeSet};

/// Default of `dialTimeout`, and of `terminationDelay`.
const DIAL_TIMEOUT: &str = "\"30s\"";
const TERMINATION_DELAY: &str = "\"100ms\"";

const OF_ROOT: &[KeyReason] = &[
    ("global", WithoutEffect, ""),
    ("log", Dropped, "see [log]"),
    ("api", Dropped, "Tidegate has an admin API, see [admin]"),
    ("ping", Dropped, "Tidegate has an admin API, see [admin]"),
    ("metrics", Dropped, "Tidegate has metrics, see [admin]"),
    ("tracing", Dropped, "it is for HTTP"),
    ("certificatesResolvers", WithoutEffect, "it is for TLS"),
    ("tls", WithoutEffect, "it is for TLS"),
    ("serversTransport", WithoutEffect, "it is for HTTP"),
    ("experimental", Dropped, "it has no counterpart"),
    ("udp", NotPossible, "Tidegate balances TCP, not UDP"),
];

const OF_ENTRY_POINT: &[KeyReason] = &[
    ("http", WithoutEffect, "it is for HTTP"),
    ("http2", WithoutEffect, "it is for HTTP"),
    ("http3", WithoutEffect, "it is for HTTP"),
    ("forwardedHeaders", WithoutEffect, "it is for HTTP"),
    ("transport", Dropped, "see idle_timeout and [process] leave_delay and drain_timeout"),
    ("reusePort", WithoutEffect, "Tidegate always does this"),
    ("asDefault", WithoutEffect, ""),
    ("observability", Dropped, "Tidegate has metrics, see [admin]"),
    ("udp", WithoutEffect, "it is for UDP"),
];

/// The translation of all documents.
struct TraefikTranslator<'t> {
    report: &'t mut ImportReport,
    draft: Draft,
    can: Available,
    entry_points: BTreeMap<String, &'t DocNode>,
    services: BTreeMap<String, &'t DocNode>,
    middlewares: BTreeMap<String, &'t DocNode>,
    transports: BTreeMap<String, &'t DocNode>,
    pools: BTreeMap<String, String>,
    pool_names: UsedNames,
}

/// A router with what its rule says.
struct Router<'t> {
    node: &'t DocNode,
    /// Prefixes of clients; empty: every client.
    sources: Vec<String>,
    service: &'t DocNode,
}

/// Reads the documents and fills the report.
pub(crate) fn read(request: &ImportRequest<'_>, report: &mut ImportReport) -> Draft {
    let root = doc::read(request.name, request.text, report);
    let mut roots = Vec::new();
    if let Some(node) = root.path(&["providers", "file", "filename"]) {
        let read = request.include.map(|include| include(node.text()));
        match read.unwrap_or_else(|| Err("files are not included here".to_owned())) {
            Ok(files) => {
                for IncludedFile { name, text } in files {
                    roots.push(doc::read(&name, &text, report));
                }
                report.note(node.at, Translated, "this file is read, too");
            }
            Err(why) => report.note(node.at, LineVerdict::NotUnderstood, why),
        }
    }
    roots.insert(0, root);
    let mut translator = TraefikTranslator {
        report,
        draft: Draft::default(),
        can: Available::now(),
        entry_points: BTreeMap::new(),
        services: BTreeMap::new(),
        middlewares: BTreeMap::new(),
        transports: BTreeMap::new(),
        pools: BTreeMap::new(),
        pool_names: UsedNames::default(),
    };
    translator.documents(&roots);
    let draft = translator.draft;
    doc::continued(report);
    draft
}

impl<'t> TraefikTranslator<'t> {
    fn documents(&mut self, roots: &'t [DocNode]) {
        let mut routers: Vec<(&'t str, &'t DocNode)> = Vec::new();
        for root in roots {
            let known = ["entryPoints", "tcp", "http", "providers", "accessLog"];
            root.rest(&known, OF_ROOT, self.report);
            if let Some(http) = root.get("http") {
                http.note_all(Dropped, "HTTP; Tidegate balances TCP", self.report);
                if http.get("routers").is_some() {
                    self.report.mark_lost(http.at);
                }
            }
            if let Some(log) = root.get("accessLog") {
                let why = "[log] access = \"stdout\", with fields of its own";
                log.note_all(Approximated, why, self.report);
                self.draft.log.set("access", "\"stdout\"", &[log.at]);
            }
            self.providers(root);
            self.entry_points.extend(table(root, "entryPoints", self.report));
            let Some(tcp) = root.get("tcp") else { continue };
            self.report.note(tcp.at, Translated, "");
            let known = ["routers", "services", "middlewares", "serversTransports"];
            tcp.rest(&known, &[], self.report);
            self.services.extend(table(tcp, "services", self.report));
            self.middlewares.extend(table(tcp, "middlewares", self.report));
            self.transports.extend(table(tcp, "serversTransports", self.report));
            routers.extend(
                tcp.get("routers").map_or(&[][..], DocNode::entries).iter().map(|(n, r)| (&**n, r)),
            );
            if let Some(node) = tcp.get("routers") {
                self.report.note(node.at, Translated, "");
            }
        }
        self.routers(&routers);
        self.unused();
    }

    fn providers(&mut self, root: &DocNode) {
        let Some(providers) = root.get("providers") else { return };
        self.report.note(providers.at, Translated, "");
        let why = "see [pool.NAME.discover]: write the backends, or a member source";
        for (name, provider) in providers.entries() {
            match &**name {
                "file" => {
                    self.report.note(provider.at, Translated, "");
                    let reasons = &[
                        ("watch", WithoutEffect, "use tidegate reload"),
                        ("directory", NotPossible, "translate each of its files"),
                    ];
                    provider.rest(&["filename"], reasons, self.report);
                }
                "providersThrottleDuration" => {
                    provider.note_all(WithoutEffect, "", self.report);
                }
                _ => provider.note_all(NotPossible, why, self.report),
            }
        }
    }

    fn lose(&mut self, node: &DocNode, why: &str) {
        node.note_all(NotPossible, why, self.report);
    }

    /// Makes a frontend of each entry point with routers.
    fn routers(&mut self, routers: &[(&'t str, &'t DocNode)]) {
        let mut by_entry: BTreeMap<String, Vec<Router<'t>>> = BTreeMap::new();
        for (_, node) in routers {
            let Some((entries, router)) = self.router(node) else { continue };
            for entry in entries {
                let (sources, service) = (router.sources.clone(), router.service);
                by_entry.entry(entry).or_default().push(Router { node, sources, service });
            }
        }
        let entry_points = self.entry_points.clone();
        for (name, node) in entry_points {
            match by_entry.remove(&name) {
                Some(routers) => self.frontend(&name, node, routers),
                None => node.note_all(Dropped, "no translated TCP router uses it", self.report),
            }
        }
        for (name, routers) in by_entry {
            for router in routers {
                let why = format!("there is no entry point {name}; import the static file");
                self.report.lose(router.node.at, NotPossible, why);
            }
        }
    }

    /// Reads a router. Returns the names of its entry points; of all if it names none.
    fn router(&mut self, node: &'t DocNode) -> Option<(Vec<String>, Router<'t>)> {
        let known =
            ["entryPoints", "rule", "service", "tls", "priority", "middlewares", "ruleSyntax"];
        node.rest(&known, &[("observability", Dropped, "")], self.report);
        let sources = match node.get("rule").map(|rule| (rule, clients(rule.text()))) {
            Some((rule, Ok(sources))) => {
                self.report.note(rule.at, Translated, "");
                sources
            }
            Some((_, Err(why))) => {
                self.lose(node, &why);
                return None;
            }
            None => Vec::new(),
        };
        if let Some(tls) = node.get("tls") {
            if tls.text_of("passthrough") != "true" {
                self.lose(node, "Tidegate does not decrypt TLS");
                return None;
            }
            let why = "connections are passed on, also those without TLS";
            tls.note_all(Approximated, why, self.report);
        }
        let Some(service) = node.get("service") else {
            self.lose(node, "it has no service");
            return None;
        };
        for key in ["entryPoints", "priority", "ruleSyntax"] {
            if let Some(node) = node.get(key) {
                node.note_all(Translated, "", self.report);
            }
        }
        let entries = node.get("entryPoints").map_or(&[][..], DocNode::items);
        let entries: Vec<String> = match entries.is_empty() {
            true => self.entry_points.keys().cloned().collect(),
            false => entries.iter().map(|entry| entry.text().to_owned()).collect(),
        };
        Some((entries, Router { node, sources, service }))
    }

    fn frontend(&mut self, name: &str, entry: &'t DocNode, mut routers: Vec<Router<'t>>) {
        entry.rest(&["address", "proxyProtocol"], OF_ENTRY_POINT, self.report);
        let mut frontend = DraftFrontend {
            name: crate::draft::valid_name(name),
            at: vec![entry.at],
            ..Default::default()
        };
        let proxied = self.proxy_protocol(entry, &mut frontend);
        match entry.get("address").map(|node| (node, bind(node.text()))) {
            Some((node, Ok(address))) => {
                let bind = match proxied {
                    true => format!("{{ address = {}, proxy_protocol = true }}", quoted(&address)),
                    false => quoted(&address),
                };
                self.report.note(node.at, Translated, format!("bind = {bind}"));
                frontend.binds.push((bind, node.at));
            }
            Some((node, Err(why))) => self.lose(node, why),
            None => self.report.lose(entry.at, NotPossible, "it has no address"),
        }
        // Traefik tries rules by priority, and longer ones first.
        let rank = |router: &Router<'_>| {
            let priority = router.node.text_of("priority").parse::<i64>().unwrap_or(0);
            let rule = router.node.text_of("rule").len() as i64;
            std::cmp::Reverse(if priority > 0 { priority } else { rule })
        };
        routers.sort_by_key(rank);
        let single = routers.len() == 1;
        for router in &routers {
            self.route(router, single, &mut frontend);
        }
        if frontend.pool.is_empty()
            && let Some(pool) = frontend.routes.iter().find_map(|route| route.pool.clone())
        {
            frontend.pool = pool;
            let mut rest = DraftRoute { at: vec![entry.at], ..Default::default() };
            rest.keys.set("sources", quoted_list(["0.0.0.0/0", "::/0"]), &[entry.at]);
            frontend.routes.push(rest);
        }
        if frontend.pool.is_empty() || frontend.binds.is_empty() {
            let why = "no TCP router of the entry point can be translated";
            return self.report.lose(entry.at, NotPossible, why);
        }
        frontend.keys.set("idle_timeout", "\"off\"", &[entry.at]);
        let header = format!("[frontend.{}], idle_timeout = \"off\"", frontend.name);
        self.report.note(entry.at, Translated, header);
        self.draft.frontends.push(frontend);
    }

    /// Adds a router: as the pool of all other clients, or as a route.
    fn route(&mut self, router: &Router<'t>, single: bool, frontend: &mut DraftFrontend) {
        let at = router.node.at;
        let delay = self.half_closed(router.service.text());
        let Some(pool) = self.pool(router.service) else {
            return self.report.lose(at, NotPossible, "its service cannot be translated");
        };
        self.report.note(router.service.at, Translated, format!("pool = \"{pool}\""));
        self.report.note(at, Translated, "");
        frontend.keys.set("half_closed_timeout", delay, &[at]);
        self.middleware(router, single, frontend);
        if router.sources.is_empty() {
            if frontend.pool.is_empty() {
                frontend.pool = pool;
            } else {
                let why = "another router of the entry point takes all clients before it";
                self.report.lose(at, NotPossible, why);
            }
        } else if frontend.pool.is_empty() {
            let mut route = DraftRoute { at: vec![at], ..Default::default() };
            route.keys.set("sources", quoted_list(router.sources.iter().map(|s| &**s)), &[at]);
            route.pool = Some(pool);
            frontend.routes.push(route);
        } else {
            let why = "a router before it takes all clients";
            self.report.lose(at, NotPossible, why);
        }
    }

    fn middleware(&mut self, router: &Router<'t>, single: bool, frontend: &mut DraftFrontend) {
        let Some(list) = router.node.get("middlewares") else { return };
        self.report.note(list.at, Translated, "");
        for name in list.items() {
            let short = name.text().split('@').next().unwrap_or_default().to_owned();
            let Some(node) = self.middlewares.get(&short).copied() else {
                self.report.lose(name.at, NotPossible, "there is no such middleware");
                continue;
            };
            if !single {
                let why = "Tidegate limits the clients of a frontend, not of a route";
                self.report.lose(name.at, NotPossible, why);
                continue;
            }
            self.report.note(name.at, Translated, "");
            for (kind, settings) in node.entries() {
                match &**kind {
                    "ipAllowList" | "ipWhiteList" => {
                        let ranges = settings.get("sourceRange").map_or(&[][..], DocNode::items);
                        let ranges = quoted_list(ranges.iter().map(DocNode::text));
                        frontend.sources.set("allow", ranges, &[settings.at]);
                        settings.note_all(Translated, "sources.allow", self.report);
                    }
                    "inFlightConn" => {
                        let amount = settings.text_of("amount").to_owned();
                        frontend.sources.set("connections_max", amount, &[settings.at]);
                        settings.note_all(Translated, "sources.connections_max", self.report);
                    }
                    _ => self.lose(settings, "Tidegate has no such rule for clients"),
                }
            }
            self.report.note(node.at, Translated, "");
        }
    }

    fn proxy_protocol(&mut self, entry: &DocNode, frontend: &mut DraftFrontend) -> bool {
        let Some(node) = entry.get("proxyProtocol") else { return false };
        if !self.can.proxy_in {
            self.lose(node, "Tidegate reads no PROXY header");
            return false;
        }
        let trusted = node.get("trustedIPs").map_or(&[][..], DocNode::items);
        frontend.proxy = match node.text_of("insecure") == "true" || trusted.is_empty() {
            true => quoted_list(["0.0.0.0/0", "::/0"]),
            false => quoted_list(trusted.iter().map(DocNode::text)),
        };
        frontend.accept_proxy.push(node.at);
        let why = "proxy_protocol.from: clients outside of it are refused";
        node.note_all(Approximated, why, self.report);
        true
    }

    /// Returns the time after one side has closed.
    fn half_closed(&self, service: &str) -> String {
        let node = self.services.get(service).and_then(|node| node.get("loadBalancer"));
        let delay = node.map_or("", |node| node.text_of("terminationDelay"));
        let delay = time(delay, 1).filter(|delay| *delay > 0).map(toml_time);
        delay.unwrap_or_else(|| TERMINATION_DELAY.to_owned())
    }

    fn pool(&mut self, service: &DocNode) -> Option<String> {
        let name = service.text().split('@').next().unwrap_or_default();
        if let Some(pool) = self.pools.get(name) {
            return Some(pool.clone());
        }
        let Some(node) = self.services.get(name).copied() else {
            self.report.lose(service.at, NotPossible, format!("there is no service {name}"));
            return None;
        };
        let Some(balancer) = node.get("loadBalancer") else {
            self.lose(node, "a route has one pool");
            self.report.lose(service.at, NotPossible, "the service is not a load balancer");
            return None;
        };
        let mut pool =
            DraftPool { name: self.pool_names.take(name), at: vec![node.at], ..Default::default() };
        self.report.note(node.at, Translated, format!("[pool.{}]", pool.name));
        self.report.note(balancer.at, Translated, "");
        let known =
            ["servers", "proxyProtocol", "serversTransport", "terminationDelay", "healthCheck"];
        balancer.rest(&known, &[], self.report);
        self.transport(balancer, &mut pool);
        self.backends(balancer, &mut pool);
        self.health(balancer, &mut pool);
        self.pools.insert(name.to_owned(), pool.name.clone());
        let name = pool.name.clone();
        self.draft.pools.push(pool);
        Some(name)
    }

    fn backends(&mut self, balancer: &DocNode, pool: &mut DraftPool) {
        let mut names = UsedNames::default();
        if let Some(list) = balancer.get("servers") {
            self.report.note(list.at, Translated, "");
        }
        for server in balancer.get("servers").map_or(&[][..], DocNode::items) {
            server.rest(&["address", "tls", "weight"], &[], self.report);
            if let Some(tls) = server.get("tls").filter(|tls| tls.text() == "true") {
                self.lose(tls, "Tidegate does not encrypt connections to backends");
            }
            let address = server.text_of("address").to_owned();
            let name = names.take(&address);
            let mut backend =
                DraftBackend { name, address, at: vec![server.at], ..Default::default() };
            if let Some(weight) = server.get("weight") {
                self.report.note(weight.at, Translated, "");
                backend.keys.set("weight", weight.text().to_owned(), &[weight.at]);
            }
            let text = format!("pool.{}.backend {}", pool.name, backend.name);
            self.report.note(server.at, Translated, text);
            if let Some(node) = server.get("address") {
                self.report.note(node.at, Translated, "");
            }
            pool.backends.push(backend);
        }
    }

    fn transport(&mut self, balancer: &DocNode, pool: &mut DraftPool) {
        let name = balancer.text_of("serversTransport").split('@').next().unwrap_or_default();
        let transport = self.transports.get(name).copied();
        pool.keys.set("connect_timeout", DIAL_TIMEOUT, &[]);
        pool.keys.set("connect_attempts", "1", &[]);
        if let Some(node) = balancer.get("serversTransport") {
            match transport {
                Some(_) => self.report.note(node.at, Translated, ""),
                None => self.report.lose(node.at, NotPossible, "there is no such transport"),
            }
        }
        if let Some(node) = balancer.get("terminationDelay") {
            self.report.note(node.at, Translated, "half_closed_timeout");
        }
        for (key, node) in transport.map_or(&[][..], DocNode::entries) {
            match (&**key, time(node.text(), 1_000).filter(|time| *time > 0)) {
                ("dialTimeout", Some(time)) => {
                    let text = format!("connect_timeout = {}", toml_time(time));
                    self.report.note(node.at, Translated, text);
                    pool.keys.set("connect_timeout", toml_time(time), &[node.at]);
                }
                ("dialKeepAlive", _) => {
                    self.report.note(node.at, Dropped, "see keepalive of the frontend");
                }
                ("terminationDelay", Some(_)) => {
                    self.report.note(node.at, Dropped, "see half_closed_timeout of the frontend");
                }
                ("tls", _) => self.lose(node, "Tidegate does not encrypt connections to backends"),
                _ => self.lose(node, "Tidegate has no such setting"),
            }
        }
        if let Some(transport) = transport {
            self.report.note(transport.at, Translated, "");
        }
        if let Some(node) = balancer.get("proxyProtocol") {
            let version = if node.text_of("version") == "1" { "v1" } else { "v2" };
            match self.can.proxy_out {
                true => {
                    node.note_all(Translated, "proxy_protocol", self.report);
                    pool.keys.set("proxy_protocol", quoted(version), &[node.at]);
                }
                false => self.lose(node, "Tidegate sends no PROXY header"),
            }
        }
    }

    fn health(&mut self, balancer: &DocNode, pool: &mut DraftPool) {
        let Some(node) = balancer.get("healthCheck") else { return };
        self.report.note(node.at, Translated, "probe");
        pool.probe.set("kind", "\"tcp\"", &[node.at]);
        let mut steps = Vec::new();
        for (key, value) in node.entries() {
            let at = [value.at];
            let time = time(value.text(), 1_000).filter(|time| *time > 0).map(toml_time);
            match (&**key, time) {
                ("interval", Some(time)) => {
                    pool.probe.set("interval", time.clone(), &at);
                    pool.probe.set("fast_interval", time, &at);
                }
                ("timeout", Some(time)) => pool.probe.set("timeout", time, &at),
                ("unhealthyInterval", Some(time)) => pool.probe.set("down_interval", time, &at),
                ("port", _) => pool.probe.set("port", value.text().to_owned(), &at),
                ("send", _) => steps.insert(0, format!("{{ send = {} }}", quoted(value.text()))),
                ("expect", _) => steps.push(format!("{{ expect = {} }}", quoted(value.text()))),
                _ => {
                    self.lose(value, "a probe has no such setting");
                    continue;
                }
            }
            self.report.note(value.at, Translated, "probe");
        }
        if !steps.is_empty() {
            pool.probe.set("kind", "\"steps\"", &[node.at]);
            pool.probe.set("steps", format!("[{}]", steps.join(", ")), &[node.at]);
        }
    }

    fn unused(&mut self) {
        let used: BTreeSet<String> = self.pools.keys().cloned().collect();
        let services = self.services.clone();
        for (_, node) in services.iter().filter(|(name, _)| !used.contains(*name)) {
            if self.report.is_undecided(node.at) {
                node.note_all(Dropped, "no translated router uses it", self.report);
            }
        }
        let others: Vec<&DocNode> =
            self.middlewares.values().chain(self.transports.values()).copied().collect();
        for node in others {
            if self.report.is_undecided(node.at) {
                node.note_all(WithoutEffect, "no translated router uses it", self.report);
            }
        }
    }
}

/// Returns the entries of a table by their names, and notes its line.
fn table<'t>(
    root: &'t DocNode,
    key: &str,
    report: &mut ImportReport,
) -> Vec<(String, &'t DocNode)> {
    let Some(node) = root.get(key) else { return Vec::new() };
    report.note(node.at, Translated, "");
    node.entries().iter().map(|(name, node)| (name.clone(), node)).collect()
}

/// Translates `[IP]:PORT[/tcp]` to an address of a bind.
fn bind(text: &str) -> Result<String, &'static str> {
    if text.ends_with("/udp") {
        return Err("Tidegate balances TCP, not UDP");
    }
    let text = text.strip_suffix("/tcp").unwrap_or(text);
    let (host, port) = text.rsplit_once(':').ok_or("the port is missing")?;
    port.parse::<u16>().map_err(|_| "the port is missing")?;
    // Without an address, Traefik listens on both families.
    Ok(if host.is_empty() { format!("*:{port}") } else { text.to_owned() })
}

/// Returns the prefixes of clients of a rule; empty: every client.
fn clients(rule: &str) -> Result<Vec<String>, String> {
    let mut sources = Vec::new();
    for part in rule.split("||") {
        let mut own = Vec::new();
        for test in part.split("&&") {
            let test: String = test.chars().filter(|c| !c.is_whitespace()).collect();
            let (name, value) = test.split_once('(').unwrap_or((&test, ""));
            let value = value.trim_end_matches(')').trim_matches(['`', '"', '\'']);
            match name {
                "HostSNI" if value == "*" => {}
                "HostSNI" | "HostSNIRegexp" => {
                    return Err("Tidegate does not route by the name of a TLS handshake".to_owned());
                }
                "ClientIP" if AddressPrefix::parse(value).is_some() => own.push(value.to_owned()),
                _ => return Err(format!("Tidegate has no condition like {name}")),
            }
        }
        match own.len() {
            0 => return Ok(Vec::new()),
            1 => sources.append(&mut own),
            _ => return Err("a route has one list of sources".to_owned()),
        }
    }
    Ok(sources)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_name_clients_or_all() {
        assert_eq!(clients("HostSNI(`*`)"), Ok(Vec::new()));
        let both = clients("ClientIP(`10.0.0.0/8`) && HostSNI(`*`) || ClientIP(`fd00::1`)");
        assert_eq!(both, Ok(vec!["10.0.0.0/8".to_owned(), "fd00::1".to_owned()]));
        for wrong in ["HostSNI(`a.b`)", "ALPN(`h2`)", "!ClientIP(`10.0.0.1`)", ""] {
            assert!(clients(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn entry_points_without_address_are_for_both_families() {
        assert_eq!(
            (bind(":53/tcp"), bind("127.0.0.1:1")),
            (Ok("*:53".to_owned()), Ok("127.0.0.1:1".to_owned()))
        );
        assert!(bind(":53/udp").is_err() && bind("53").is_err());
    }
}
