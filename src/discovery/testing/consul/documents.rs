//! The JSON documents of the double: what a client may send, and what it gets.
//!
//! Names, defaults and checks of values follow the pages "Service - Agent", "Check - Agent"
//! and "Catalog" of the Consul HTTP API. A field that the double does not know is refused.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// Name of the node and id of the service; an empty id means the node.
pub(super) type ServiceKey = (String, String);

/// `PUT /v1/agent/service/register`, and the service in `PUT /v1/catalog/register`. The API
/// takes the keys in this case and in snake case.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
pub(super) struct DoubleRegistration {
    #[serde(rename = "ID", alias = "id", default)]
    pub(super) id: String,
    /// The catalog calls it `Service`.
    #[serde(alias = "name", alias = "Service", default)]
    pub(super) name: String,
    #[serde(alias = "tags", default)]
    pub(super) tags: Vec<String>,
    #[serde(alias = "address", default)]
    pub(super) address: String,
    #[serde(alias = "port", default)]
    pub(super) port: u16,
    #[serde(alias = "meta", default)]
    pub(super) meta: BTreeMap<String, String>,
    #[serde(alias = "weights", default)]
    pub(super) weights: DoubleWeights,
    #[serde(alias = "enable_tag_override", default)]
    pub(super) enable_tag_override: bool,
    #[serde(alias = "check", default)]
    pub(super) check: Option<CheckRequest>,
    #[serde(alias = "checks", default)]
    pub(super) checks: Vec<CheckRequest>,
}

/// A check in a registration.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields, default)]
pub(super) struct CheckRequest {
    #[serde(rename = "CheckID", alias = "check_id", alias = "ID", alias = "id")]
    pub(super) check_id: String,
    #[serde(alias = "name")]
    pub(super) name: String,
    #[serde(alias = "notes")]
    pub(super) notes: String,
    #[serde(alias = "status")]
    pub(super) status: Option<DoubleStatus>,
    #[serde(rename = "TTL", alias = "ttl")]
    pub(super) ttl: String,
    #[serde(rename = "HTTP", alias = "http")]
    pub(super) http: String,
    #[serde(rename = "TCP", alias = "tcp")]
    pub(super) tcp: String,
    #[serde(alias = "interval")]
    pub(super) interval: String,
    #[serde(alias = "timeout")]
    pub(super) timeout: String,
    #[serde(alias = "deregister_critical_service_after")]
    pub(super) deregister_critical_service_after: String,
    #[serde(rename = "ServiceID", alias = "service_id")]
    pub(super) service_id: String,
}

/// `PUT /v1/catalog/register`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
pub(super) struct NodeRegistration {
    pub(super) node: String,
    #[serde(default)]
    pub(super) address: String,
    #[serde(default)]
    pub(super) datacenter: String,
    #[serde(default)]
    pub(super) service: Option<DoubleRegistration>,
    #[serde(default)]
    pub(super) check: Option<CheckRequest>,
}

/// `PUT /v1/catalog/deregister`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
pub(super) struct NodeDeregistration {
    pub(super) node: String,
    #[serde(rename = "ServiceID", default)]
    pub(super) service_id: String,
    #[serde(rename = "CheckID", default)]
    pub(super) check_id: String,
}

/// Weights of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
pub(super) struct DoubleWeights {
    #[serde(alias = "passing")]
    pub(super) passing: i32,
    #[serde(alias = "warning")]
    pub(super) warning: i32,
}

/// Status of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum DoubleStatus {
    Passing,
    Warning,
    Critical,
}

/// An element of an answer of `/v1/health/service`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct DoubleAnswer<'c> {
    pub(super) node: &'c DoubleNode,
    pub(super) service: &'c DoubleService,
    pub(super) checks: Vec<&'c DoubleCheck>,
}

/// A node in answers.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct DoubleNode {
    #[serde(rename = "ID")]
    id: String,
    node: String,
    pub(super) address: String,
    datacenter: &'static str,
    tagged_addresses: BTreeMap<&'static str, String>,
    meta: BTreeMap<String, String>,
    create_index: u64,
    modify_index: u64,
}

/// A service in answers.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct DoubleService {
    #[serde(skip)]
    pub(super) node: String,
    #[serde(rename = "ID")]
    pub(super) id: String,
    pub(super) service: String,
    pub(super) tags: Vec<String>,
    pub(super) address: String,
    pub(super) meta: BTreeMap<String, String>,
    pub(super) port: u16,
    pub(super) weights: DoubleWeights,
    pub(super) enable_tag_override: bool,
    pub(super) datacenter: &'static str,
}

/// A check in answers.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct DoubleCheck {
    pub(super) node: String,
    #[serde(rename = "CheckID")]
    pub(super) check_id: String,
    name: String,
    pub(super) status: DoubleStatus,
    pub(super) notes: String,
    pub(super) output: String,
    #[serde(rename = "ServiceID")]
    pub(super) service_id: String,
    service_name: String,
    service_tags: Vec<String>,
    #[serde(rename = "Type")]
    kind: &'static str,
    #[serde(skip)]
    pub(super) plan: CheckPlan,
}

/// What the double does for a check.
#[derive(Debug, Clone, Default)]
pub(super) struct CheckPlan {
    /// `Some`: the client reports at least this often.
    pub(super) ttl: Option<Duration>,
    /// `HOST:PORT` of a connect.
    pub(super) tcp: String,
    /// URL of a request.
    pub(super) http: String,
    pub(super) interval: Duration,
    pub(super) timeout: Duration,
    /// Time in the critical state after which the service is removed.
    pub(super) deregister_after: Option<Duration>,
}

// === impl DoubleRegistration ===

impl DoubleRegistration {
    pub(super) fn service(&self, node: &str) -> DoubleService {
        let id = if self.id.is_empty() { &self.name } else { &self.id };
        DoubleService {
            node: node.to_owned(),
            id: id.clone(),
            service: self.name.clone(),
            tags: self.tags.clone(),
            address: self.address.clone(),
            meta: self.meta.clone(),
            port: self.port,
            weights: self.weights,
            enable_tag_override: self.enable_tag_override,
            datacenter: "dc1",
        }
    }

    /// The checks with the ids that Consul gives to those without one.
    pub(super) fn checks(&self, service: &DoubleService) -> Result<Vec<DoubleCheck>, String> {
        let requests: Vec<&CheckRequest> = self.check.iter().chain(&self.checks).collect();
        let numbered = requests.len() > 1;
        let checks = (1..).zip(requests).map(|(number, request)| {
            let mut id = format!("service:{}", service.id);
            if numbered {
                id = format!("{id}:{number}");
            }
            request.check(service, id)
        });
        checks.collect()
    }
}

// === impl CheckRequest ===

impl CheckRequest {
    /// The check, critical until the first result unless the request says otherwise.
    pub(super) fn check(&self, service: &DoubleService, id: String) -> Result<DoubleCheck, String> {
        let or = |own: &str, other: String| if own.is_empty() { other } else { own.to_owned() };
        let plan = self.plan()?;
        Ok(DoubleCheck {
            node: service.node.clone(),
            check_id: or(&self.check_id, id),
            name: or(&self.name, format!("Service '{}' check", service.service)),
            status: self.status.unwrap_or(DoubleStatus::Critical),
            notes: self.notes.clone(),
            output: String::new(),
            service_id: service.id.clone(),
            service_name: service.service.clone(),
            service_tags: service.tags.clone(),
            kind: plan.kind(),
            plan,
        })
    }

    fn plan(&self) -> Result<CheckPlan, String> {
        let time = |text: &str| match text {
            "" => Ok(None),
            text => go_duration(text).map(Some).ok_or(format!("time: invalid duration {text:?}")),
        };
        let plan = CheckPlan {
            ttl: time(&self.ttl)?,
            tcp: self.tcp.clone(),
            http: self.http.clone(),
            interval: time(&self.interval)?.unwrap_or_default(),
            timeout: time(&self.timeout)?.unwrap_or(Duration::from_secs(10)),
            deregister_after: time(&self.deregister_critical_service_after)?,
        };
        let by_double = !plan.tcp.is_empty() || !plan.http.is_empty();
        if plan.ttl.is_some() && !plan.interval.is_zero() {
            return Err("Interval and TTL cannot both be specified".to_owned());
        }
        if by_double && plan.interval.is_zero() {
            return Err("Interval must be > 0 for Script, HTTP, or TCP checks".to_owned());
        }
        if !by_double && plan.ttl.unwrap_or_default().is_zero() {
            return Err("TTL must be > 0 for TTL checks".to_owned());
        }
        Ok(plan)
    }
}

// === impl DoubleWeights ===

impl Default for DoubleWeights {
    fn default() -> DoubleWeights {
        DoubleWeights { passing: 1, warning: 1 }
    }
}

// === impl DoubleAnswer ===

impl DoubleAnswer<'_> {
    pub(super) fn is_passing(&self) -> bool {
        self.checks.iter().all(|check| check.status == DoubleStatus::Passing)
    }
}

// === impl DoubleNode ===

impl DoubleNode {
    pub(super) fn new(name: &str, address: &str, index: u64) -> DoubleNode {
        DoubleNode {
            id: String::new(),
            node: name.to_owned(),
            address: address.to_owned(),
            datacenter: "dc1",
            tagged_addresses: BTreeMap::from([("lan", address.to_owned())]),
            meta: BTreeMap::new(),
            create_index: index,
            modify_index: index,
        }
    }
}

// === impl DoubleService ===

impl DoubleService {
    pub(super) fn key(&self) -> ServiceKey {
        (self.node.clone(), self.id.clone())
    }

    pub(super) fn same(&self, other: &DoubleService) -> bool {
        self == other
    }

    /// Consul compares tags without case.
    pub(super) fn has_tag(&self, tag: &str) -> bool {
        self.tags.iter().any(|own| own.eq_ignore_ascii_case(tag))
    }
}

// === impl DoubleCheck ===

impl DoubleCheck {
    /// A check without a plan, set by requests alone.
    pub(super) fn of_node(node: &str, id: &str, name: &str, status: &str) -> DoubleCheck {
        let critical = status == "critical";
        DoubleCheck {
            node: node.to_owned(),
            check_id: id.to_owned(),
            name: name.to_owned(),
            status: if critical { DoubleStatus::Critical } else { DoubleStatus::Passing },
            notes: String::new(),
            output: String::new(),
            service_id: String::new(),
            service_name: String::new(),
            service_tags: Vec::new(),
            kind: "",
            plan: CheckPlan::default(),
        }
    }

    pub(super) fn of_service(service: &DoubleService, id: String, name: &str) -> DoubleCheck {
        let mut check = DoubleCheck::of_node(&service.node, &id, name, "critical");
        check.service_id.clone_from(&service.id);
        check.service_name.clone_from(&service.service);
        check
    }

    pub(super) fn service_key(&self) -> ServiceKey {
        (self.node.clone(), self.service_id.clone())
    }
}

// === impl CheckPlan ===

impl CheckPlan {
    fn kind(&self) -> &'static str {
        match (self.ttl, self.http.is_empty()) {
            (Some(_), _) => "ttl",
            (None, false) => "http",
            (None, true) => "tcp",
        }
    }
}

/// Reads a duration as Go does: numbers with a unit each, such as `1m30s` or `1.5s`.
pub(super) fn go_duration(text: &str) -> Option<Duration> {
    let units = [("ns", 1e-9), ("us", 1e-6), ("ms", 1e-3), ("h", 3600.0), ("m", 60.0), ("s", 1.0)];
    let (mut rest, mut sum) = (text, 0.0);
    if text == "0" {
        return Some(Duration::ZERO);
    }
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..end].parse().ok()?;
        rest = &rest[end..];
        let (unit, factor) = units.iter().find(|(unit, _)| rest.starts_with(unit))?;
        rest = &rest[unit.len()..];
        sum += number * factor;
    }
    (!text.is_empty()).then_some(sum).and_then(|sum| Duration::try_from_secs_f64(sum).ok())
}
