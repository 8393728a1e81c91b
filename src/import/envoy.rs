//! Reads a static configuration of Envoy in YAML and translates its TCP proxies.
//!
//! Called by [`crate::import`].

use crate::ImportRequest;
use crate::available::Available;
use crate::doc::{self, DocNode, KeyReason};
use crate::draft::{
    Draft, DraftFrontend, DraftKeys, DraftPool, DraftRoute, UsedNames, quoted, quoted_list,
};
use crate::report::LineVerdict::{
    Approximated, Dropped, NotPossible, NotUnderstood, Translated, WithoutEffect,
};
use crate::report::{ImportReport, SourceLine};
use crate::times::{LONGEST, toml_time};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

/// Default of `idle_timeout` of a TCP proxy: 1 h.
const IDLE_TIMEOUT: u64 = 3_600_000;

const OF_BOOTSTRAP: &[KeyReason] = &[
    ("admin", Dropped, "Tidegate has an admin API, see [admin]"),
    ("node", WithoutEffect, "it is for a control plane"),
    ("layered_runtime", Dropped, "it tunes Envoy"),
    ("overload_manager", Dropped, "it tunes Envoy"),
    ("stats_config", Dropped, "Tidegate has metrics of its own"),
    ("stats_sinks", Dropped, "Tidegate has metrics of its own"),
    ("dynamic_resources", NotPossible, "Tidegate does not read Envoy's control plane"),
    ("cluster_manager", Dropped, "it tunes Envoy"),
    ("tracing", Dropped, "it is for HTTP"),
];

const OF_LISTENER: &[KeyReason] = &[
    ("per_connection_buffer_limit_bytes", WithoutEffect, "see [process] buffers_max"),
    ("tcp_backlog_size", Dropped, "backlog is a key of a bind; its default is 65,535"),
    ("enable_reuse_port", WithoutEffect, "Tidegate always does this"),
    ("reuse_port", WithoutEffect, "Tidegate always does this"),
    ("stat_prefix", WithoutEffect, ""),
    ("traffic_direction", WithoutEffect, ""),
    ("connection_balance_config", WithoutEffect, "Tidegate balances its workers"),
    ("access_log", Dropped, "the access log has a session when it ends"),
    ("listener_filters_timeout", WithoutEffect, ""),
    ("transparent", NotPossible, "Tidegate listens on addresses of this host"),
    ("additional_addresses", NotPossible, "write a listener per address"),
    ("use_original_dst", NotPossible, "Tidegate connects to the backends of a pool only"),
];

const OF_PROXY: &[KeyReason] = &[
    ("stat_prefix", WithoutEffect, ""),
    ("@type", WithoutEffect, ""),
    ("access_log", Approximated, "see [log] access"),
    ("weighted_clusters", NotPossible, "a route has one pool"),
    ("tunneling_config", NotPossible, "Tidegate does not tunnel over HTTP"),
    ("on_demand", NotPossible, "Tidegate does not read Envoy's control plane"),
];

const OF_CLUSTER: &[KeyReason] = &[
    ("alt_stat_name", WithoutEffect, ""),
    ("dns_lookup_family", Approximated, "addresses of both families become backends"),
    ("dns_refresh_rate", Dropped, "see [dns] ttl_max"),
    ("respect_dns_ttl", Translated, "the TTL counts, see [dns]"),
    ("dns_resolvers", Dropped, "see [dns] servers"),
    ("per_connection_buffer_limit_bytes", WithoutEffect, "see [process] buffers_max"),
    ("upstream_connection_options", Dropped, "see keepalive of the frontend"),
    ("common_lb_config", Dropped, "it has no counterpart"),
    ("maglev_lb_config", WithoutEffect, "see hash_slots"),
    ("ring_hash_lb_config", WithoutEffect, "see hash_slots"),
    ("least_request_lb_config", WithoutEffect, ""),
    ("typed_extension_protocol_options", WithoutEffect, "it is for HTTP"),
    ("http2_protocol_options", WithoutEffect, "it is for HTTP"),
    ("metadata", WithoutEffect, ""),
    ("track_cluster_stats", WithoutEffect, ""),
    ("lb_subset_config", NotPossible, "a pool has no subsets"),
    ("upstream_bind_config", NotPossible, "write source of the pool"),
];

/// The translation of one document.
struct EnvoyTranslator<'t> {
    report: &'t mut ImportReport,
    draft: Draft,
    can: Available,
    clusters: BTreeMap<String, &'t DocNode>,
    /// Names of pools by cluster and the settings of the proxy.
    pools: BTreeMap<String, String>,
    used: BTreeSet<String>,
    frontend_names: UsedNames,
    pool_names: UsedNames,
}

/// Reads a document and fills the report.
pub(crate) fn read(request: &ImportRequest<'_>, report: &mut ImportReport) -> Draft {
    let root = doc::read(request.name, request.text, report);
    let mut translator = EnvoyTranslator {
        report,
        draft: Draft::default(),
        can: Available::now(),
        clusters: BTreeMap::new(),
        pools: BTreeMap::new(),
        used: BTreeSet::new(),
        frontend_names: UsedNames::default(),
        pool_names: UsedNames::default(),
    };
    translator.document(&root);
    let draft = translator.draft;
    doc::continued(report);
    draft
}

impl<'t> EnvoyTranslator<'t> {
    fn document(&mut self, root: &'t DocNode) {
        root.rest(&["static_resources"], OF_BOOTSTRAP, self.report);
        let Some(resources) = root.get("static_resources") else { return };
        self.report.note(resources.at, Translated, "");
        resources.rest(&["listeners", "clusters"], &[], self.report);
        let clusters = resources.get("clusters").map_or(&[][..], DocNode::items);
        self.clusters = clusters.iter().map(|one| (one.text_of("name").to_owned(), one)).collect();
        for key in ["listeners", "clusters"] {
            if let Some(list) = resources.get(key) {
                self.report.note(list.at, Translated, "");
            }
        }
        for listener in resources.get("listeners").map_or(&[][..], DocNode::items) {
            self.listener(listener);
        }
        for cluster in clusters.iter().filter(|one| !self.used.contains(one.text_of("name"))) {
            cluster.note_all(Dropped, "no translated listener uses the cluster", self.report);
        }
    }

    fn lose(&mut self, node: &DocNode, why: &str) {
        node.note_all(NotPossible, why, self.report);
    }

    /// Notes the lines of nodes that are translated.
    fn taken(&mut self, node: Option<&DocNode>, text: &str) {
        if let Some(node) = node {
            self.report.note(node.at, Translated, text);
        }
    }

    fn listener(&mut self, listener: &'t DocNode) {
        let known = ["name", "address", "filter_chains", "listener_filters", "freebind"];
        listener.rest(&known, OF_LISTENER, self.report);
        let mut frontend = DraftFrontend { at: vec![listener.at], ..Default::default() };
        let freebind = listener.text_of("freebind") == "true";
        self.taken(listener.get("freebind"), "freebind");
        let proxied = self.listener_filters(listener, &mut frontend);
        match listener.get("address").ok_or_else(|| "it has no address".to_owned()) {
            Ok(node) => match self.bind(node, freebind, proxied) {
                Ok(bind) => frontend.binds.push((bind, node.at)),
                Err(why) => self.lose(node, &why),
            },
            Err(why) => self.report.lose(listener.at, NotPossible, why),
        }
        let chains = listener.get("filter_chains").map_or(&[][..], DocNode::items);
        self.taken(listener.get("filter_chains"), "");
        for chain in chains {
            self.chain(chain, &mut frontend);
        }
        // The longest prefix counts in Envoy, the first route in Tidegate.
        frontend.routes.sort_by_key(|route| {
            let sources = route.keys.get("sources").unwrap_or_default();
            let length = sources.trim_matches('"').split('/').nth(1).and_then(|l| l.parse().ok());
            std::cmp::Reverse(length.unwrap_or(128_u32))
        });
        if frontend.pool.is_empty()
            && let Some(pool) = frontend.routes.iter().find_map(|route| route.pool.clone())
        {
            frontend.pool = pool;
            let mut rest = DraftRoute { at: vec![listener.at], ..Default::default() };
            rest.keys.set("sources", quoted_list(["0.0.0.0/0", "::/0"]), &[listener.at]);
            frontend.routes.push(rest);
        }
        if frontend.pool.is_empty() || frontend.binds.is_empty() {
            let why = "no TCP proxy of the listener can be translated";
            return self.report.lose(listener.at, NotPossible, why);
        }
        frontend.name = self.frontend_names.take(listener.text_of("name"));
        let text = format!("[frontend.{}]", frontend.name);
        self.report.note(listener.at, Translated, text.clone());
        self.taken(listener.get("name"), &text);
        self.draft.frontends.push(frontend);
    }

    /// Returns true if the bind reads a PROXY header.
    fn listener_filters(&mut self, listener: &DocNode, frontend: &mut DraftFrontend) -> bool {
        let mut proxied = false;
        self.taken(listener.get("listener_filters"), "");
        for filter in listener.get("listener_filters").map_or(&[][..], DocNode::items) {
            let name = filter.text_of("name").to_owned();
            if name.ends_with("tls_inspector") || name.ends_with("http_inspector") {
                let why = "Tidegate reads no first bytes of clients";
                filter.note_all(WithoutEffect, why, self.report);
            } else if name.ends_with("proxy_protocol") && self.can.proxy_in {
                proxied = true;
                frontend.proxy = quoted_list(["0.0.0.0/0", "::/0"]);
                frontend.accept_proxy.push(filter.at);
                let why = "proxy_protocol.from is every address, as in Envoy; narrow it";
                filter.note_all(Approximated, why, self.report);
            } else {
                self.lose(filter, "Tidegate has no such listener filter");
            }
        }
        proxied
    }

    fn bind(&mut self, node: &DocNode, freebind: bool, proxied: bool) -> Result<String, String> {
        let (address, port) = self.socket_address(node)?;
        let ip: IpAddr = address.parse().map_err(|_| format!("{address} is not an IP address"))?;
        let both =
            node.path(&["socket_address", "ipv4_compat"]).is_some_and(|n| n.text() == "true");
        let text = match ip.is_unspecified() && ip.is_ipv6() && both {
            true => format!("*:{port}"),
            false => SocketAddr::new(ip, port).to_string(),
        };
        let mut keys = String::new();
        if freebind {
            keys.push_str(", freebind = true");
        }
        if proxied {
            keys.push_str(", proxy_protocol = true");
        }
        Ok(match keys.is_empty() {
            true => quoted(&text),
            false => format!("{{ address = {}{keys} }}", quoted(&text)),
        })
    }

    /// Returns address and port of `socket_address`, and notes its lines.
    fn socket_address(&mut self, node: &DocNode) -> Result<(String, u16), String> {
        let Some(socket) = node.get("socket_address") else {
            return Err("only socket_address can be translated".to_owned());
        };
        if socket.text_of("protocol").eq_ignore_ascii_case("udp") {
            return Err("Tidegate balances TCP, not UDP".to_owned());
        }
        let port = socket.text_of("port_value").parse::<u16>();
        let port = port.map_err(|_| "the port is missing".to_owned())?;
        node.note_all(Translated, "", self.report);
        Ok((socket.text_of("address").to_owned(), port))
    }

    fn chain(&mut self, chain: &'t DocNode, frontend: &mut DraftFrontend) {
        let known = ["filters", "filter_chain_match", "name", "transport_socket"];
        chain.rest(&known, &[], self.report);
        self.report.note(chain.at, Translated, "");
        self.taken(chain.get("name"), "");
        if let Some(socket) = chain.get("transport_socket") {
            self.lose(socket, "Tidegate does not decrypt TLS");
            return;
        }
        let matching = match chain.get("filter_chain_match").map(|node| (node, prefixes(node))) {
            None => Vec::new(),
            Some((node, Ok(prefixes))) => {
                node.note_all(Translated, "condition of a route", self.report);
                prefixes
            }
            Some((node, Err(why))) => return self.lose(node, &why),
        };
        self.taken(chain.get("filters"), "");
        for filter in chain.get("filters").map_or(&[][..], DocNode::items) {
            let name = filter.text_of("name");
            let config = filter.get("typed_config");
            let kind = config.map_or("", |config| config.text_of("@type"));
            if kind.ends_with(".TcpProxy") || (kind.is_empty() && name.ends_with("tcp_proxy")) {
                filter.rest(&["name", "typed_config"], &[], self.report);
                self.report.note(filter.at, Translated, "");
                self.taken(filter.get("name"), "");
                self.taken(config, "");
                self.proxy(config.unwrap_or(filter), &matching, frontend);
            } else if kind.ends_with("HttpConnectionManager") {
                filter.note_all(Dropped, "HTTP; Tidegate balances TCP", self.report);
                self.report.mark_lost(filter.at);
            } else {
                self.lose(filter, "Tidegate has no such filter");
            }
        }
    }

    /// The maximum age of a connection.
    fn session_max(&mut self, config: &DocNode, idle: u64, frontend: &mut DraftFrontend) {
        let key = "max_downstream_connection_duration";
        let jitter = config.get(&format!("{key}_jitter_percentage"));
        let Some(node) = config.get(key) else {
            if let Some(jitter) = jitter {
                jitter.note_all(WithoutEffect, "there is no maximum age", self.report);
            }
            return;
        };
        let Some(age) = duration(node.text()).filter(|time| *time > 0) else {
            return self.report.note(node.at, NotUnderstood, "it is not a time");
        };
        let time = toml_time(age.min(LONGEST));
        let why = format!(
            "session_max = {time}: counted from the connection to the backend; each session ends \
             up to 10% earlier, from 81% of that time on in a pause of its bytes"
        );
        self.report.note(node.at, Approximated, why);
        frontend.keys.set("session_max", time, &at(node));
        if age <= idle {
            // Its age ends such a session first.
            frontend.keys.set("idle_timeout", "\"off\"", &at(node));
        }
        if let Some(jitter) = jitter {
            let why = "session_max takes up to 10% off, and adds nothing";
            jitter.note_all(Approximated, why, self.report);
        }
    }

    fn proxy(&mut self, config: &'t DocNode, matching: &[String], frontend: &mut DraftFrontend) {
        let known = [
            "cluster",
            "idle_timeout",
            "max_connect_attempts",
            "hash_policy",
            "max_downstream_connection_duration",
            "max_downstream_connection_duration_jitter_percentage",
        ];
        config.rest(&known, OF_PROXY, self.report);
        if let Some(log) = config.get("access_log") {
            self.draft.log.set("access", "\"stdout\"", &[log.at]);
        }
        let idle = config.get("idle_timeout");
        let (time, at) = match idle.map(|node| (duration(node.text()), node.at)) {
            None => (IDLE_TIMEOUT, Vec::new()),
            Some((Some(time), at)) => (time.min(LONGEST), vec![at]),
            Some((None, at)) => {
                self.report.note(at, NotUnderstood, "it is not a time");
                (IDLE_TIMEOUT, Vec::new())
            }
        };
        self.taken(idle, &format!("idle_timeout = {}", toml_time(time)));
        frontend.keys.set("idle_timeout", toml_time(time), &at);
        frontend.keys.set("half_closed_timeout", toml_time(time), &at);
        self.session_max(config, time, frontend);
        let mut settings = DraftKeys::default();
        let attempts = config.get("max_connect_attempts");
        let number = attempts.and_then(|node| node.text().parse::<u64>().ok()).unwrap_or(1);
        let number = number.clamp(1, 16).to_string();
        self.taken(attempts, &format!("connect_attempts = {number}"));
        settings.set(
            "connect_attempts",
            number,
            &attempts.map(|n| n.at).into_iter().collect::<Vec<_>>(),
        );
        if let Some(policy) = config.get("hash_policy") {
            let by_source = policy.items().iter().all(|item| item.get("source_ip").is_some());
            match by_source {
                true => policy.note_all(Translated, "see balance", self.report),
                false => self.lose(policy, "Tidegate hashes the client's address only"),
            }
        }
        let Some(cluster) = config.get("cluster") else { return };
        let Some(pool) = self.pool(cluster, settings) else { return };
        self.taken(Some(cluster), &format!("pool = \"{pool}\""));
        if matching.is_empty() {
            frontend.pool = pool;
            return;
        }
        for prefix in matching {
            let mut route = DraftRoute { at: vec![config.at], ..Default::default() };
            route.keys.set("sources", quoted(prefix), &[config.at]);
            route.pool = Some(pool.clone());
            frontend.routes.push(route);
        }
    }

    fn pool(&mut self, cluster: &DocNode, keys: DraftKeys) -> Option<String> {
        let name = cluster.text();
        let identity = format!("{name} {:?}", keys.get("connect_attempts"));
        if let Some(pool) = self.pools.get(&identity) {
            return Some(pool.clone());
        }
        let Some(node) = self.clusters.get(name).copied() else {
            self.report.lose(cluster.at, NotPossible, format!("there is no cluster {name}"));
            return None;
        };
        self.used.insert(name.to_owned());
        let mut pool = DraftPool {
            name: self.pool_names.take(name),
            at: vec![node.at],
            keys,
            ..Default::default()
        };
        self.report.note(node.at, Translated, format!("[pool.{}]", pool.name));
        super::envoy_cluster::translate(node, self.can, &mut pool, self.report);
        node.rest(super::envoy_cluster::KNOWN, OF_CLUSTER, self.report);
        self.pools.insert(identity, pool.name.clone());
        let name = pool.name.clone();
        self.draft.pools.push(pool);
        Some(name)
    }
}

/// Returns the source prefixes of a match.
fn prefixes(node: &DocNode) -> Result<Vec<String>, String> {
    if node.entries().iter().any(|(key, _)| key != "source_prefix_ranges") {
        return Err("Tidegate routes by source, address and port only".to_owned());
    }
    let ranges = node.get("source_prefix_ranges").map_or(&[][..], DocNode::items);
    let one = |range: &DocNode| {
        let length = range.get("prefix_len").map_or("", |node| node.text());
        let length = if length.is_empty() { "0" } else { length };
        format!("{}/{length}", range.text_of("address_prefix"))
    };
    Ok(ranges.iter().map(one).collect())
}

/// Parses `1.5s`.
pub(crate) fn duration(text: &str) -> Option<u64> {
    let seconds: f64 = text.strip_suffix('s')?.parse().ok()?;
    (seconds.is_finite() && seconds >= 0.0).then_some((seconds * 1_000.0).ceil() as u64)
}

/// Returns the lines of nodes.
pub(crate) fn at(node: &DocNode) -> [SourceLine; 1] {
    [node.at]
}
