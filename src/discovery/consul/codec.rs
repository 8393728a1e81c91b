//! Consul's health documents as values: question to path, answer to instances, headers to
//! what they say of the answer.
//!
//! The source in [`super`] calls it. Nothing here opens a connection, waits or reads a
//! clock, and no input panics. The documents are those of the Consul HTTP API, pages
//! "Health" and "Blocking Queries".

use crate::parse::AtMost;
use percent_encoding::{AsciiSet, CONTROLS, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, Deserializer};
use std::borrow::Cow;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tidegate_core::control::MEMBERS_MAX;
use tidegate_core::discovery::labels::MemberLabels;
use tidegate_core::discovery::{Announced, Unreadable, Wish};
use tidegate_core::model::RegistryQuery;

/// What a path segment may not contain.
const SEGMENT: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'%')
    .add(b'/')
    .add(b'<')
    .add(b'>')
    .add(b'?')
    .add(b'`');

/// Most entries of an answer. Consul itself has no bound.
const ENTRIES_MAX: usize = 100_000;

/// Longest service id or node name, in bytes. Consul itself has no bound.
const ID_MAX: usize = 512;

/// An instance of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsulInstance {
    /// The service id, or `ID@NODE` if several nodes use the id.
    pub name: Arc<str>,
    /// The address of the service, or of its node if the service has none.
    pub host: InstanceHost,
    /// Never 0.
    pub port: u16,
    /// `None`: the answer has no weights, as before Consul 1.2.3.
    pub weight: Option<u16>,
    /// What the checks say.
    pub wish: Wish,
    /// `passing`, `warning`, `critical` or `maintenance`.
    pub raw: &'static str,
}

/// Where an instance is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum InstanceHost {
    /// An address.
    Ip(IpAddr),
    /// A host name.
    Name(Arc<str>),
}

/// The instances of an answer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HealthAnswer {
    /// Unique by name, sorted by name. At most [`MEMBERS_MAX`].
    pub instances: Vec<ConsulInstance>,
    /// Entries without a usable address, port or id, and entries beyond [`MEMBERS_MAX`].
    pub unreadable: Unreadable,
}

/// What the headers of an answer say of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AnswerMeta {
    /// `X-Consul-Index`; 0 if it is missing or no number.
    pub index: u64,
    /// `X-Consul-KnownLeader`. A missing header means that the leader is known, because
    /// answers from an agent's cache do not always have it.
    pub known_leader: bool,
    /// `X-Consul-LastContact`.
    pub last_contact: Duration,
    /// `X-Consul-Results-Filtered-By-ACLs`: the token may not see all instances. Consul
    /// sends it only to requests with a token.
    pub filtered: bool,
    /// `X-Consul-Default-ACL-Policy: deny`.
    pub denies_by_default: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HealthEntry<'a> {
    #[serde(borrow, default)]
    node: HealthNode<'a>,
    #[serde(borrow)]
    service: HealthService<'a>,
    #[serde(borrow, default, deserialize_with = "or_default")]
    checks: Vec<HealthCheck<'a>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct HealthNode<'a> {
    #[serde(borrow)]
    node: Cow<'a, str>,
    #[serde(borrow)]
    address: Cow<'a, str>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HealthService<'a> {
    #[serde(borrow, rename = "ID")]
    id: Cow<'a, str>,
    #[serde(borrow, default)]
    address: Cow<'a, str>,
    #[serde(default)]
    port: i64,
    #[serde(default)]
    weights: Option<HealthWeights>,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "PascalCase")]
struct HealthWeights {
    passing: i64,
    warning: i64,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HealthCheck<'a> {
    #[serde(borrow, default, rename = "CheckID")]
    id: Cow<'a, str>,
    #[serde(borrow)]
    status: Cow<'a, str>,
}

/// The worst check of an entry, in ascending order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum CheckStatus {
    Passing,
    Warning,
    Critical,
    Maintenance,
}

/// Returns path and query of a request that waits for a change after `index` for at most
/// `wait`, or `None` for the query of another kind of registry. With an index of 0 Consul
/// answers at once.
pub fn health_path(query: &RegistryQuery, index: u64, wait: Duration) -> Option<String> {
    let RegistryQuery::Consul { service, tags, datacenter, namespace, filter, .. } = query else {
        return None;
    };
    let mut path = format!("/v1/health/service/{}?", utf8_percent_encode(service, SEGMENT));
    let _ = write!(path, "index={index}&wait={}ms", wait.as_millis());
    let tags = tags.iter().map(|tag| ("tag", tag));
    let others = [("dc", datacenter), ("ns", namespace), ("filter", filter)];
    let others = others.into_iter().filter_map(|(key, value)| Some((key, value.as_ref()?)));
    for (key, value) in tags.chain(others) {
        let _ = write!(path, "&{key}={}", utf8_percent_encode(value, NON_ALPHANUMERIC));
    }
    Some(path)
}

/// Reads the body of an answer.
///
/// # Errors
///
/// The body is no JSON document of this form, a check has an unknown status, or there are
/// more than 100,000 entries. An entry whose address, port or id is of no use only counts as unreadable.
pub fn read_health(body: &[u8]) -> Result<HealthAnswer, String> {
    let AtMost::<HealthEntry<'_>, ENTRIES_MAX>(entries) =
        serde_json::from_slice(body).map_err(|error| error.to_string())?;
    let repeated = repeated_ids(&entries);
    let mut answer = HealthAnswer::default();
    let mut instances = BTreeMap::new();
    for entry in &entries {
        let status = entry.status()?;
        match entry.instance(status, &repeated) {
            Some(instance) => {
                if let Some(left_out) = add(&mut instances, instance) {
                    answer.unreadable.add(&left_out.name);
                }
            }
            // The name of a repeated id depends on the other entries.
            None if repeated.contains(&*entry.service.id) || entry.service.id.is_empty() => {
                answer.unreadable.add_unnamed(1);
            }
            None => answer.unreadable.add(&entry.service.id),
        }
    }
    answer.instances = instances.into_values().collect();
    answer.limit(MEMBERS_MAX);
    Ok(answer)
}

/// Reads the headers of an answer; `header` returns a header's value.
pub fn read_meta<'h>(header: impl Fn(&str) -> Option<&'h str>) -> AnswerMeta {
    let number = |name| header(name).and_then(|text| text.trim().parse::<u64>().ok());
    AnswerMeta {
        index: number("x-consul-index").unwrap_or(0),
        known_leader: header("x-consul-knownleader") != Some("false"),
        last_contact: Duration::from_millis(number("x-consul-lastcontact").unwrap_or(0)),
        filtered: header("x-consul-results-filtered-by-acls") == Some("true"),
        denies_by_default: header("x-consul-default-acl-policy") == Some("deny"),
    }
}

/// Adds an instance and returns the one that has no place: of two with one name, that with
/// the higher address, so that the order of the entries does not matter.
fn add(
    instances: &mut BTreeMap<Arc<str>, ConsulInstance>,
    instance: ConsulInstance,
) -> Option<ConsulInstance> {
    match instances.entry(Arc::clone(&instance.name)) {
        Entry::Vacant(vacant) => {
            vacant.insert(instance);
            None
        }
        Entry::Occupied(kept)
            if (&kept.get().host, kept.get().port) <= (&instance.host, instance.port) =>
        {
            Some(instance)
        }
        Entry::Occupied(mut kept) => Some(kept.insert(instance)),
    }
}

/// Service ids that several entries have.
fn repeated_ids<'e>(entries: &'e [HealthEntry<'_>]) -> BTreeSet<&'e str> {
    let mut seen = BTreeSet::new();
    entries.iter().map(|entry| &*entry.service.id).filter(|id| !seen.insert(*id)).collect()
}

/// Reads `null`, which Go writes for an empty list, as the default.
fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

// === impl HealthAnswer ===

impl HealthAnswer {
    /// Drops the instances beyond `most`, by sorted address.
    fn limit(&mut self, most: usize) {
        let Some(excess) = self.instances.len().checked_sub(most).filter(|excess| *excess > 0)
        else {
            return;
        };
        self.instances.sort_by(|a, b| (&a.host, a.port, &a.name).cmp(&(&b.host, b.port, &b.name)));
        self.instances.truncate(most);
        self.instances.sort_by(|a, b| a.name.cmp(&b.name));
        self.unreadable.add_unnamed(u32::try_from(excess).unwrap_or(u32::MAX));
    }
}

// === impl AnswerMeta ===

impl AnswerMeta {
    /// Returns whether the answer may remove members. `empty` is the answer, `anonymous`
    /// the request without a token. Consul filters an answer to an anonymous request without
    /// a sign of it, so an empty one proves nothing where the default is to deny.
    pub fn is_trusted(&self, max_stale: Duration, empty: bool, anonymous: bool) -> bool {
        let may_be_filtered = empty && anonymous && self.denies_by_default;
        self.known_leader && self.last_contact <= max_stale && !self.filtered && !may_be_filtered
    }
}

// === impl ConsulInstance ===

impl ConsulInstance {
    /// Returns the member at this address.
    pub fn announced(&self, ip: IpAddr) -> Announced {
        Announced {
            name: Arc::clone(&self.name),
            address: SocketAddr::new(ip.to_canonical(), self.port),
            weight: self.weight,
            tier: 0,
            wish: self.wish,
            raw: self.raw.into(),
            labels: MemberLabels::default(),
        }
    }
}

// === impl HealthEntry ===

impl HealthEntry<'_> {
    fn status(&self) -> Result<CheckStatus, String> {
        let mut worst = CheckStatus::Passing;
        for check in &self.checks {
            let status = check.status().ok_or_else(|| {
                let (id, service) = (shown(&check.id), shown(&self.service.id));
                format!("check {id} of {service} has the unknown status {}", shown(&check.status))
            })?;
            worst = worst.max(status);
        }
        Ok(worst)
    }

    fn instance(&self, status: CheckStatus, repeated: &BTreeSet<&str>) -> Option<ConsulInstance> {
        let (id, node) = (&*self.service.id, &*self.node.node);
        let printable = |text: &str| text.len() <= ID_MAX && !text.chars().any(char::is_control);
        if id.is_empty() || !printable(id) || !printable(node) {
            return None;
        }
        let name = if repeated.contains(id) { format!("{id}@{node}").into() } else { id.into() };
        let own = Some(&*self.service.address).filter(|address| !address.is_empty());
        let port = u16::try_from(self.service.port).ok().filter(|port| *port != 0)?;
        let (wish, weight) = status.meaning(self.service.weights);
        let host = host(own.unwrap_or(&self.node.address))?;
        Some(ConsulInstance { name, host, port, weight, wish, raw: status.name() })
    }
}

// === impl HealthCheck ===

impl HealthCheck<'_> {
    /// Returns `None` for a status that Consul does not have. A maintenance check exists
    /// only during the maintenance.
    fn status(&self) -> Option<CheckStatus> {
        let maintenance = self.id == "_node_maintenance"
            || self.id.strip_prefix("_service_maintenance").is_some_and(|id| id.starts_with(':'));
        match &*self.status {
            "passing" => Some(CheckStatus::Passing),
            "critical" | "warning" if maintenance => Some(CheckStatus::Maintenance),
            "warning" => Some(CheckStatus::Warning),
            "critical" => Some(CheckStatus::Critical),
            _ => None,
        }
    }
}

// === impl CheckStatus ===

impl CheckStatus {
    fn name(self) -> &'static str {
        match self {
            CheckStatus::Passing => "passing",
            CheckStatus::Warning => "warning",
            CheckStatus::Critical => "critical",
            CheckStatus::Maintenance => "maintenance",
        }
    }

    /// Wish and weight. A warning weight of 0 is Consul's way to take an instance with a
    /// warning out of its DNS answers.
    fn meaning(self, weights: Option<HealthWeights>) -> (Wish, Option<u16>) {
        let weight = |value: i64| u16::try_from(value.max(1)).unwrap_or(u16::MAX);
        let passing = weights.map(|weights| weight(weights.passing));
        match (self, weights) {
            (CheckStatus::Passing, _) => (Wish::Sessions, passing),
            (CheckStatus::Warning, Some(weights)) if weights.warning <= 0 => {
                (Wish::Draining, passing)
            }
            (CheckStatus::Warning, weights) => {
                (Wish::Sessions, weights.map(|weights| weight(weights.warning)))
            }
            (CheckStatus::Critical, _) => (Wish::Critical, passing),
            (CheckStatus::Maintenance, _) => (Wish::Draining, passing),
        }
    }
}

/// An address, or a host name of permitted letters.
fn host(text: &str) -> Option<InstanceHost> {
    if let Ok(ip) = text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
        let ip = ip.to_canonical();
        let is_host = !ip.is_unspecified() && !ip.is_multicast();
        return is_host.then_some(InstanceHost::Ip(ip));
    }
    let permitted = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let is_name = !text.is_empty() && text.len() <= 253 && text.bytes().all(permitted);
    is_name.then(|| InstanceHost::Name(text.into()))
}

/// A text of an answer for a message: quoted, at most 64 characters.
fn shown(text: &str) -> String {
    format!("{:?}", text.chars().take(64).collect::<String>())
}

#[cfg(test)]
mod tests;
