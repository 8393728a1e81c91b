//! A cluster of Envoy: one pool.
//!
//! Called by `envoy`.

use crate::available::Available;
use crate::doc::{DocNode, KeyReason};
use crate::draft::{DraftBackend, DraftPool, UsedNames, quoted};
use crate::envoy::{at, duration};
use crate::report::ImportReport;
use crate::report::LineVerdict::{
    Approximated, Dropped, NotPossible, NotUnderstood, Translated, WithoutEffect,
};
use crate::times::toml_time;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

/// Highest tier of a backend.
const TIER_MAX: u8 = 9;

/// Overprovisioning factor of priorities, and that of `tiers = "spill"`.
const DEFAULT_FACTOR: u64 = 140;

/// Keys of a cluster that are translated.
pub(crate) const KNOWN: &[&str] = &[
    "name",
    "type",
    "connect_timeout",
    "lb_policy",
    "load_assignment",
    "health_checks",
    "circuit_breakers",
    "outlier_detection",
    "transport_socket",
    "close_connections_on_host_health_failure",
];

/// Fills the pool from a cluster.
pub(crate) fn translate(
    cluster: &DocNode,
    can: Available,
    pool: &mut DraftPool,
    report: &mut ImportReport,
) {
    let mut context = Cluster { can, pool, report };
    for (key, node) in cluster.entries() {
        match &**key {
            "name" => context.report.note(node.at, Translated, ""),
            "type" => context.kind(node),
            "connect_timeout" => context.time(node, "connect_timeout"),
            "lb_policy" => context.policy(node),
            "load_assignment" => context.assignment(node),
            "health_checks" => context.checks(node),
            "circuit_breakers" => context.breakers(node),
            "outlier_detection" => context.outliers(node),
            "transport_socket" => context.transport(node),
            "close_connections_on_host_health_failure" => context.on_down(node),
            _ => {}
        }
    }
}

struct Cluster<'c> {
    can: Available,
    pool: &'c mut DraftPool,
    report: &'c mut ImportReport,
}

impl Cluster<'_> {
    fn lose(&mut self, node: &DocNode, why: &str) {
        node.note_all(NotPossible, why, self.report);
    }

    fn kind(&mut self, node: &DocNode) {
        match node.text() {
            "STATIC" | "STRICT_DNS" | "" => self.report.note(node.at, Translated, ""),
            "LOGICAL_DNS" => {
                let why = "every address of the name becomes a backend";
                self.report.note(node.at, Approximated, why);
            }
            _ => self.lose(node, "Tidegate does not read Envoy's control plane"),
        }
    }

    fn time(&mut self, node: &DocNode, key: &'static str) {
        match duration(node.text()).filter(|time| *time > 0) {
            Some(time) => {
                self.report.note(node.at, Translated, format!("{key} = {}", toml_time(time)));
                self.pool.keys.set(key, toml_time(time), &at(node));
            }
            None => self.report.note(node.at, NotUnderstood, "it is not a time"),
        }
    }

    fn policy(&mut self, node: &DocNode) {
        let policy = match node.text() {
            "ROUND_ROBIN" => "weighted-round-robin",
            "LEAST_REQUEST" => "two-choices",
            "RANDOM" => "random",
            "MAGLEV" | "RING_HASH" => "source-hash",
            _ => return self.lose(node, "Tidegate has no such policy"),
        };
        self.report.note(node.at, Translated, format!("balance = \"{policy}\""));
        self.pool.keys.set("balance", quoted(policy), &at(node));
    }

    fn assignment(&mut self, node: &DocNode) {
        let known = ["cluster_name", "endpoints"];
        node.rest(&[&known[..], &["policy"]].concat(), &[], self.report);
        self.report.note(node.at, Translated, "");
        for key in known {
            if let Some(node) = node.get(key) {
                self.report.note(node.at, Translated, "");
            }
        }
        let mut names = UsedNames::default();
        for locality in node.get("endpoints").map_or(&[][..], DocNode::items) {
            let why = "localities have no counterpart";
            let reasons =
                &[("locality", WithoutEffect, ""), ("load_balancing_weight", Dropped, why)];
            locality.rest(&["lb_endpoints", "priority"], reasons, self.report);
            let tier = self.tier(locality);
            if let Some(list) = locality.get("lb_endpoints") {
                self.report.note(list.at, Translated, "");
                list.items().iter().for_each(|one| self.endpoint(one, tier, &mut names));
            }
        }
        self.spill(node);
    }

    /// Returns the tier of a locality: its priority.
    fn tier(&mut self, locality: &DocNode) -> u8 {
        let Some(node) = locality.get("priority") else { return 0 };
        match node.text().parse::<u8>() {
            Ok(0) => self.report.note(node.at, Translated, ""),
            Ok(tier @ 1..=TIER_MAX) => {
                self.report.note(node.at, Translated, format!("tier = {tier}"));
                return tier;
            }
            Ok(_) => {
                let why = format!("tier = {TIER_MAX}, the highest: it serves with the others");
                self.report.note(node.at, Approximated, why);
                return TIER_MAX;
            }
            Err(_) => self.report.note(node.at, NotUnderstood, "it is not a priority"),
        }
        0
    }

    /// Sessions spill over priorities as in Envoy if the overprovisioning factor is its default.
    fn spill(&mut self, assignment: &DocNode) {
        let policy = assignment.get("policy");
        if let Some(policy) = policy {
            let why = "it has no counterpart";
            let others: [KeyReason; 3] = [
                ("drop_overloads", Dropped, why),
                ("endpoint_stale_after", WithoutEffect, "it is for a control plane"),
                ("weighted_priority_health", Approximated, "weights do not count"),
            ];
            policy.rest(&["overprovisioning_factor"], &others, self.report);
            self.report.note(policy.at, Translated, "");
        }
        let factor = policy.and_then(|policy| policy.get("overprovisioning_factor"));
        let mut sizes: BTreeMap<&str, u64> = BTreeMap::new();
        for backend in self.pool.backends.iter().filter(|one| one.keys.get("enabled").is_none()) {
            *sizes.entry(backend.keys.get("tier").unwrap_or("0")).or_default() += 1;
        }
        if sizes.len() < 2 {
            if let Some(factor) = factor {
                self.report.note(factor.at, WithoutEffect, "there is one priority");
            }
            return;
        }
        let largest = sizes.values().copied().max().unwrap_or(1);
        let number = factor.map_or(Ok(DEFAULT_FACTOR), |factor| factor.text().parse::<u64>());
        let line = factor.map_or(assignment.at, |factor| factor.at);
        match number {
            // One healthy endpoint is enough for its priority.
            Ok(number) if number >= largest.saturating_mul(100) => {
                self.report.note(line, Translated, "tiers = \"strict\"");
                return;
            }
            Ok(DEFAULT_FACTOR) => self.report.note(line, Translated, "tiers = \"spill\""),
            Ok(_) => {
                let why = format!("tiers = \"spill\", whose factor is {DEFAULT_FACTOR}");
                self.report.note(line, Approximated, why);
            }
            Err(_) => self.report.note(line, NotUnderstood, "it is not a factor"),
        }
        self.pool.keys.set("tiers", "\"spill\"", &[line]);
    }

    fn endpoint(&mut self, node: &DocNode, tier: u8, names: &mut UsedNames) {
        node.rest(
            &["endpoint", "load_balancing_weight", "health_status"],
            &[("metadata", WithoutEffect, "")],
            self.report,
        );
        let Some(endpoint) = node.get("endpoint") else { return };
        endpoint.rest(&["address", "health_check_config", "hostname"], &[], self.report);
        let address = match endpoint.get("address").map(address).unwrap_or(Err("it has no address"))
        {
            Ok(address) => address,
            Err(why) => return self.lose(node, why),
        };
        let name = names.take(&address);
        let mut backend = DraftBackend { name, address, at: vec![node.at], ..Default::default() };
        if let Some(weight) = node.get("load_balancing_weight") {
            let weight = weight.text().parse::<u64>().unwrap_or(1).clamp(1, 1_000);
            backend.keys.set("weight", weight.to_string(), &at(node));
        }
        if tier > 0 {
            backend.keys.set("tier", tier.to_string(), &at(node));
        }
        let text = format!("pool.{}.backend {}", self.pool.name, backend.name);
        node.note_all(Translated, "", self.report);
        self.report.note(node.at, Translated, text);
        if let Some(config) = endpoint.get("health_check_config") {
            config.rest(&["port_value"], &[], self.report);
            if let Some(port) = config.get("port_value") {
                self.pool.probe.set("port", port.text().to_owned(), &at(port));
            }
        }
        match node.text_of("health_status") {
            "" | "HEALTHY" | "UNKNOWN" => self.pool.backends.push(backend),
            _ if self.can.enabled => {
                backend.keys.set("enabled", "false", &at(node));
                self.pool.backends.push(backend);
            }
            _ => self.report.note(node.at, Approximated, "left out; add it when it is needed"),
        }
    }

    fn checks(&mut self, node: &DocNode) {
        self.report.note(node.at, Translated, "");
        if node.items().len() > 1 {
            return self.lose(node, "a pool has one probe");
        }
        let Some(check) = node.items().first() else { return };
        let mut kind = "tcp";
        for (key, value) in check.entries() {
            let line = at(value);
            let mut set = |name: &'static str, toml: String| {
                self.report.note(value.at, Translated, format!("probe.{name} = {toml}"));
                self.pool.probe.set(name, toml, &line);
            };
            let time = duration(value.text()).filter(|time| *time > 0).map(toml_time);
            let number = value.text().parse::<u64>().ok();
            match (&**key, time, number) {
                ("timeout", Some(time), _) => set("timeout", time),
                ("interval", Some(time), _) => set("interval", time),
                ("unhealthy_interval", Some(time), _) => set("down_interval", time),
                ("unhealthy_threshold", _, Some(n)) => set("fall", n.clamp(1, 100).to_string()),
                ("healthy_threshold", _, Some(n)) => set("rise", n.clamp(1, 100).to_string()),
                ("tcp_health_check", ..) => kind = self.tcp_check(value),
                ("http_health_check", ..) => {
                    kind = "http";
                    self.http_check(value);
                }
                ("interval_jitter" | "initial_jitter" | "interval_jitter_percent", ..) => {
                    self.report.note(value.at, WithoutEffect, "Tidegate spreads its probes");
                }
                (
                    "no_traffic_interval"
                    | "unhealthy_edge_interval"
                    | "healthy_edge_interval"
                    | "reuse_connection"
                    | "always_log_health_check_failures"
                    | "event_log_path",
                    ..,
                ) => {
                    self.report.note(value.at, Dropped, "it has no counterpart");
                }
                _ => value.note_all(NotPossible, "a probe has no such setting", self.report),
            }
        }
        let kind = quoted(kind);
        self.pool.probe.set("kind", kind, &at(check));
        // Probes of Tidegate are as frequent as `interval` while the state changes, as in Envoy.
        if let Some(interval) = self.pool.probe.get("interval").map(str::to_owned) {
            self.pool.probe.set("fast_interval", interval, &at(check));
        }
    }

    /// Returns the kind: without bytes to send and expect, a connection is enough.
    fn tcp_check(&mut self, node: &DocNode) -> &'static str {
        node.note_all(Translated, "", self.report);
        let mut steps = Vec::new();
        if let Some(hex) = node.path(&["send", "text"]) {
            steps.push(format!("{{ send = {{ hex = {} }} }}", quoted(hex.text())));
        }
        let receive = node.get("receive").map_or(&[][..], DocNode::items);
        for part in receive {
            steps.push(format!("{{ expect = {{ hex = {} }} }}", quoted(part.text_of("text"))));
        }
        if steps.is_empty() {
            return "tcp";
        }
        self.pool.probe.set("steps", format!("[{}]", steps.join(", ")), &at(node));
        "steps"
    }

    fn http_check(&mut self, node: &DocNode) {
        self.report.note(node.at, Translated, "");
        let mut statuses = Vec::new();
        for (key, value) in node.entries() {
            match &**key {
                "path" => self.pool.probe.set("path", quoted(value.text()), &at(value)),
                "host" => self.pool.probe.set("host", quoted(value.text()), &at(value)),
                "method" => self.pool.probe.set("method", quoted(value.text()), &at(value)),
                "expected_statuses" => {
                    for range in value.items() {
                        let number = |key| range.text_of(key).parse::<u64>().unwrap_or(0);
                        // The end is not in the range.
                        let (start, end) = (number("start"), number("end").saturating_sub(1));
                        statuses.push(format!("{start}-{end}"));
                    }
                }
                "service_name_matcher" | "codec_client_type" => {
                    value.note_all(NotPossible, "a probe has no such setting", self.report);
                    continue;
                }
                _ => {
                    value.note_all(NotPossible, "a probe has no such setting", self.report);
                    continue;
                }
            }
            value.note_all(Translated, "", self.report);
        }
        let statuses = if statuses.is_empty() { "200".to_owned() } else { statuses.join(",") };
        self.pool.probe.set("status", quoted(&statuses), &at(node));
    }

    fn breakers(&mut self, node: &DocNode) {
        let limits = node.get("thresholds").map_or(&[][..], DocNode::items);
        let caps = limits.iter().any(|limit| limit.get("max_connections").is_some());
        match caps {
            true => {
                let why = "Tidegate caps backends and frontends, not pools: set connections_max";
                self.lose(node, why);
            }
            false => node.note_all(Dropped, "it has no counterpart", self.report),
        }
    }

    fn outliers(&mut self, node: &DocNode) {
        node.note_all(Approximated, "see ejection of the pool", self.report);
        for (key, value) in node.entries() {
            let line = at(value);
            match (&**key, value.text().parse::<u64>(), duration(value.text())) {
                ("consecutive_local_origin_failure" | "consecutive_5xx", Ok(number), _) => {
                    let number = number.clamp(1, 1_000).to_string();
                    self.pool.ejection.set("failures", number, &line);
                }
                ("base_ejection_time", _, Some(time)) => {
                    let time = toml_time(time.clamp(1_000, 300_000));
                    self.pool.ejection.set("time", time, &line);
                }
                ("max_ejection_percent", Ok(percent), _) => {
                    let percent = quoted(&format!("{}%", percent.min(100)));
                    self.pool.ejection.set("max_ejected", percent, &line);
                }
                _ => {}
            }
        }
    }

    fn transport(&mut self, node: &DocNode) {
        let name = node.text_of("name");
        if name.ends_with("upstream_proxy_protocol") && self.can.proxy_out {
            let version = node.path(&["typed_config", "config", "version"]);
            let v2 = version.is_some_and(|version| version.text() == "V2");
            let inner = node.path(&["typed_config", "transport_socket", "name"]);
            if inner.is_none_or(|inner| inner.text().ends_with("raw_buffer")) {
                let version = if v2 { "\"v2\"" } else { "\"v1\"" };
                node.note_all(Translated, "proxy_protocol", self.report);
                return self.pool.keys.set("proxy_protocol", version, &at(node));
            }
        }
        match name.ends_with("raw_buffer") {
            true => node.note_all(WithoutEffect, "", self.report),
            false => self.lose(node, "Tidegate does not encrypt connections to backends"),
        }
    }

    fn on_down(&mut self, node: &DocNode) {
        match (node.text() == "true", self.can.on_down) {
            (false, _) => self.report.note(node.at, WithoutEffect, ""),
            (true, true) => {
                self.report.note(node.at, Translated, "on_down = \"reset\"");
                self.pool.keys.set("on_down", "\"reset\"", &at(node));
            }
            (true, false) => self.lose(node, "sessions of a backend that is down would stay"),
        }
    }
}

/// Returns the address of an endpoint.
fn address(node: &DocNode) -> Result<String, &'static str> {
    if let Some(path) = node.path(&["pipe", "path"]) {
        return Ok(format!("unix:{}", path.text()));
    }
    let socket =
        node.get("socket_address").ok_or("only socket_address and pipe can be translated")?;
    let port: u16 = socket.text_of("port_value").parse().map_err(|_| "the port is missing")?;
    let host = socket.text_of("address");
    Ok(match host.parse::<IpAddr>() {
        Ok(ip) => SocketAddr::new(ip, port).to_string(),
        Err(_) => format!("{host}:{port}"),
    })
}
