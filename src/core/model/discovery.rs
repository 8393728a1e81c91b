//! The configuration of member sources: registries, `discover` tables, names as backends
//! and the settings of name resolution.
//!
//! `config` builds these values. The sources in `discovery` and the views in
//! `core::discovery` read them. Nothing here asks a source.

use super::text_forms::{self, words};
use super::{Config, PoolConfig};
use ipnet::IpNet;
use serde::Serialize;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Time that a name must not exist before its addresses leave: the default of
/// `hold_nxdomain`.
pub const HOLD_NXDOMAIN: Duration = Duration::from_secs(30);

/// `[dns]`: how names are resolved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DnsConfig {
    /// Servers that are asked, in order; `None`: those of `/etc/resolv.conf`.
    #[serde(serialize_with = "text_forms::servers")]
    pub servers: Option<Vec<SocketAddr>>,
    /// Time for which NXDOMAIN is not believed.
    #[serde(serialize_with = "text_forms::duration")]
    pub hold_nxdomain: Duration,
    /// Lower bound of the time between two questions about a name.
    #[serde(serialize_with = "text_forms::duration")]
    pub ttl_min: Duration,
    /// Upper bound of that time.
    #[serde(serialize_with = "text_forms::duration")]
    pub ttl_max: Duration,
}

/// `[registry.NAME]`: servers that several pools can ask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RegistryConfig {
    /// Unique among registries.
    #[serde(skip)]
    pub name: Arc<str>,
    /// The protocol.
    pub kind: RegistryKind,
    /// At least one, except for Kubernetes: empty means the address that a pod gets in its
    /// environment, or that of `kubeconfig`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub servers: Vec<ServerAddr>,
    /// Timeout of a connect, and of an answer that is not a wait.
    #[serde(serialize_with = "text_forms::duration")]
    pub timeout: Duration,
    /// `None`: plain TCP. A file has `tls = true` and the keys of TLS in the registry's table.
    #[serde(flatten, serialize_with = "text_forms::tls")]
    pub tls: Option<TlsClientConfig>,
    /// File with the token; read again for each connection and after each rejection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// User of etcd, or of the digest scheme of ZooKeeper; together with `password_file`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// File with the password; read like `token_file`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
    /// Kubernetes: file with server, CA and token of a client outside of the cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kubeconfig: Option<PathBuf>,
}

/// `kind = ...` of a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RegistryKind {
    /// Consul, HTTP API.
    Consul,
    /// etcd, version 3 JSON gateway.
    Etcd,
    /// The Kubernetes API server.
    Kubernetes,
    /// ZooKeeper 3.4 and newer.
    Zookeeper,
}

/// Address of a registry's server.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ServerAddr {
    /// `IP:PORT`
    Ip(SocketAddr),
    /// `NAME:PORT`; resolved for each connection.
    Name {
        /// Host name.
        host: Arc<str>,
        /// TCP port.
        port: u16,
    },
    /// `unix:PATH`
    Unix(PathBuf),
}

/// TLS to a registry. The server's certificate is always verified.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct TlsClientConfig {
    /// PEM file of trusted certificates; `None`: those of the system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// PEM file of the client's certificate; together with `key_file`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cert_file: Option<PathBuf>,
    /// PEM file of its private key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_file: Option<PathBuf>,
    /// Name in the server's certificate; `None`: the host of the address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_name: Option<String>,
}

/// `[pool.NAME.discover]`: a source of the pool's members and the guards over its answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiscoverSpec {
    /// What is asked.
    #[serde(flatten)]
    pub question: SourceQuestion,
    /// What an answer may change.
    #[serde(flatten)]
    pub guards: ViewGuards,
    /// How long `/ready` waits for a first view after a start.
    #[serde(serialize_with = "text_forms::duration")]
    pub first_wait: Duration,
}

/// What is asked of a member source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum SourceQuestion {
    /// A JSON file.
    File {
        /// Watched for changes.
        path: PathBuf,
    },
    /// A URL with the same JSON.
    Http {
        /// `http://` or `https://`.
        url: String,
        /// Time between two requests.
        #[serde(serialize_with = "text_forms::duration")]
        interval: Duration,
        /// PEM file of trusted certificates for `https`; `None`: those of the system.
        #[serde(skip_serializing_if = "Option::is_none")]
        ca_file: Option<PathBuf>,
        /// File with a bearer token.
        #[serde(skip_serializing_if = "Option::is_none")]
        token_file: Option<PathBuf>,
    },
    /// A name in DNS.
    Dns(NameQuestion),
    /// A registry.
    #[serde(untagged)]
    Registry {
        /// Which.
        #[serde(rename = "from", serialize_with = "text_forms::registry_name")]
        registry: Arc<RegistryConfig>,
        /// What is asked of it.
        #[serde(flatten)]
        query: RegistryQuery,
    },
}

/// A question to DNS.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct NameQuestion {
    /// The name; absolute if it ends with a dot, else search domains apply.
    pub name: Arc<str>,
    /// Which records.
    pub record: NameRecord,
    /// Port of the members; `None` only with SRV, whose records have one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Which addresses.
    pub family: NameFamily,
}

/// `record = ...`: which records of a name are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NameRecord {
    /// A and AAAA.
    Address,
    /// SRV, then A and AAAA of its targets.
    Srv,
}

/// `family = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NameFamily {
    /// IPv4 and IPv6.
    Both,
    /// IPv4 only.
    Ipv4,
    /// IPv6 only.
    Ipv6,
}

/// What is asked of a registry.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(untagged)]
pub enum RegistryQuery {
    /// Instances of a Consul service.
    Consul {
        /// Name of the service.
        service: Arc<str>,
        /// An instance must have all of them.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        tags: Vec<String>,
        /// `None`: the agent's.
        #[serde(skip_serializing_if = "Option::is_none")]
        datacenter: Option<String>,
        /// `None`: the token's.
        #[serde(skip_serializing_if = "Option::is_none")]
        namespace: Option<String>,
        /// Filter expression of Consul.
        #[serde(skip_serializing_if = "Option::is_none")]
        filter: Option<String>,
        /// An answer of a server that has not heard its leader for longer is not trusted.
        #[serde(serialize_with = "text_forms::duration")]
        max_stale: Duration,
    },
    /// The values below a prefix of etcd.
    Etcd {
        /// Ends with `/`.
        prefix: Arc<str>,
    },
    /// The endpoints of a Kubernetes service.
    Kubernetes {
        /// Name of the service.
        service: Arc<str>,
        /// `None`: that of the service account or the kubeconfig, else `default`.
        #[serde(skip_serializing_if = "Option::is_none")]
        namespace: Option<Arc<str>>,
        /// Name or number of the port; `None`: the first.
        #[serde(skip_serializing_if = "Option::is_none")]
        port: Option<Arc<str>>,
    },
    /// The children of a ZooKeeper node.
    Zookeeper {
        /// Absolute path of the node.
        path: Arc<str>,
        /// Form of the children's data.
        format: ZookeeperFormat,
    },
}

/// `format = ...` of ZooKeeper.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ZookeeperFormat {
    /// As the values of etcd.
    Json,
    /// The payload of Curator's service discovery.
    Curator,
}

/// Guards over the answers of one source for one pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ViewGuards {
    /// What an empty answer does.
    pub empty: EmptyAnswer,
    /// An answer that shrinks the view by more is held until it is confirmed, 0..=100.
    #[serde(serialize_with = "text_forms::percent")]
    pub max_removed: u8,
    /// A second trusted answer confirms a held one after this time.
    #[serde(serialize_with = "text_forms::duration")]
    pub confirm_after: Duration,
    /// An answer without members counts only as such that lasts for this time, also with
    /// `empty = "accept"`: `hold_nxdomain` of `kind = "dns"`, else zero.
    #[serde(skip)]
    pub hold_empty: Duration,
    /// A smaller answer is held like an empty one; 0 only with `empty = "accept"`.
    pub min_backends: u32,
    /// Complete answers without a member before it leaves; at least 1.
    pub missing: u32,
    /// How long members that newcomers replace stay while the newcomers are not up.
    #[serde(serialize_with = "text_forms::duration")]
    pub overlap: Duration,
    /// Age of the last answer after which the view is drained, except the last eligible
    /// backend; `None`: never.
    #[serde(serialize_with = "text_forms::forever")]
    pub stale_for: Option<Duration>,
    /// Most members; at most 10,000. Further ones, by sorted address, are refused.
    pub backends_max: u32,
    /// Upper bound of a member's weight, 1..=1000.
    pub weight_max: u16,
    /// Whether announced weights count.
    pub weights: AnnouncedWeights,
    /// Ranges that must contain the members' addresses; at least one. See
    /// [`ViewGuards::permit`].
    #[serde(serialize_with = "text_forms::ranges")]
    pub addresses: Vec<IpNet>,
    /// What a member does that its registry calls critical.
    pub critical: CriticalRule,
}

/// `empty = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EmptyAnswer {
    /// The view stays.
    Keep,
    /// Two trusted answers, `confirm_after` apart, empty the view.
    Confirm,
    /// One answer empties the view.
    Accept,
}

/// `weights = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnnouncedWeights {
    /// Up to `weight_max`.
    Use,
    /// Every member has weight 1.
    Ignore,
}

/// `critical = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CriticalRule {
    /// No new sessions.
    Drain,
    /// A tenth of its weight.
    Suspect,
    /// It leaves.
    Remove,
}

/// `[[pool.NAME.backend]]` with a name in `address`. Each address of the name is a member
/// `NAME@IP:PORT` with these settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NamedBackend {
    /// Unique among the pool's backends.
    pub name: Arc<str>,
    /// Written as `NAME:PORT` or `srv:NAME`.
    #[serde(rename = "address", serialize_with = "text_forms::shown")]
    pub question: NameQuestion,
    /// Weight of each member, 1..=1000; with SRV, factor of the weights of the records.
    pub weight: u16,
    /// Tier of the members, 0..=[`TIER_MAX`](super::TIER_MAX); with SRV, added to the rank of
    /// the priority.
    #[serde(flatten, serialize_with = "text_forms::tier")]
    pub tier: u8,
    /// Cap on sessions of each member; 0 means no cap.
    pub connections_max: u32,
}

/// Identity of a view: a source of one pool.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourceKey {
    /// Name of the pool.
    pub pool: Arc<str>,
    /// The backend whose address is a name; `None`: the pool's `discover` table.
    pub backend: Option<Arc<str>>,
}

words!(
    RegistryKind:
    "consul" => Consul,
    "etcd" => Etcd,
    "kubernetes" => Kubernetes,
    "zookeeper" => Zookeeper,
);
words!(NameRecord: "address" => Address, "srv" => Srv);
words!(NameFamily: "both" => Both, "ipv4" => Ipv4, "ipv6" => Ipv6);
words!(ZookeeperFormat: "json" => Json, "curator" => Curator);
words!(EmptyAnswer: "keep" => Keep, "confirm" => Confirm, "accept" => Accept);
words!(AnnouncedWeights: "use" => Use, "ignore" => Ignore);
words!(CriticalRule: "drain" => Drain, "suspect" => Suspect, "remove" => Remove);

// === impl DnsConfig ===

impl Default for DnsConfig {
    fn default() -> DnsConfig {
        DnsConfig {
            servers: None,
            hold_nxdomain: HOLD_NXDOMAIN,
            ttl_min: Duration::from_secs(1),
            ttl_max: Duration::from_secs(300),
        }
    }
}

// === impl RegistryConfig ===

impl RegistryConfig {
    /// Returns the files with its certificates and secrets.
    pub fn named_files(&self) -> impl Iterator<Item = &PathBuf> {
        let own = [&self.token_file, &self.password_file, &self.kubeconfig];
        let tls = self.tls.iter();
        let tls = tls.flat_map(|tls| [&tls.ca_file, &tls.cert_file, &tls.key_file]);
        own.into_iter().chain(tls).flatten()
    }
}

// === impl SourceQuestion ===

impl SourceQuestion {
    /// Returns the word in the log and in `explain`: the kind of the source.
    pub fn kind(&self) -> &'static str {
        match self {
            SourceQuestion::File { .. } => "file",
            SourceQuestion::Http { .. } => "http",
            SourceQuestion::Dns(_) => "dns",
            SourceQuestion::Registry { registry, .. } => super::Words::word(registry.kind),
        }
    }

    /// Returns the files with the certificates and the token of a URL. The files of a
    /// registry belong to its [`RegistryConfig`].
    pub fn named_files(&self) -> impl Iterator<Item = &PathBuf> {
        let files = match self {
            SourceQuestion::Http { ca_file, token_file, .. } => [ca_file, token_file],
            _ => [&None, &None],
        };
        files.into_iter().flatten()
    }
}

// === impl ServerAddr ===

impl fmt::Display for ServerAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ServerAddr::Ip(address) => address.fmt(f),
            ServerAddr::Name { host, port } => write!(f, "{host}:{port}"),
            ServerAddr::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Serialize for ServerAddr {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

// === impl NameQuestion ===

impl fmt::Display for NameQuestion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.record, self.port) {
            (NameRecord::Srv, _) => write!(f, "srv:{}", self.name),
            (NameRecord::Address, Some(port)) => write!(f, "{}:{port}", self.name),
            (NameRecord::Address, None) => f.write_str(&self.name),
        }
    }
}

// === impl ViewGuards ===

impl ViewGuards {
    /// Returns the guards of a backend whose address is a name. An empty answer counts
    /// only as NXDOMAIN that lasts for `hold_nxdomain`.
    pub fn of_name(dns: &DnsConfig) -> ViewGuards {
        ViewGuards {
            empty: EmptyAnswer::Confirm,
            max_removed: 100,
            confirm_after: dns.hold_nxdomain,
            hold_empty: Duration::ZERO,
            min_backends: 1,
            missing: 2,
            overlap: Duration::from_secs(10),
            stale_for: None,
            backends_max: 1000,
            weight_max: super::WEIGHT_MAX,
            weights: AnnouncedWeights::Use,
            addresses: [ANY_V4, ANY_V6].into_iter().chain(LOCAL).collect(),
            critical: CriticalRule::Drain,
        }
    }

    /// Whether a member can have the address. A range permits loopback and link-local
    /// addresses only if it has no others.
    pub fn permit(&self, ip: IpAddr) -> bool {
        let local = LOCAL.iter().find(|local| local.contains(&ip));
        let permits = |net: &&IpNet| local.is_none_or(|local| local.contains(*net));
        self.addresses.iter().filter(permits).any(|net| net.contains(&ip))
    }
}

/// Loopback (RFC 1122, RFC 4291) and link-local (RFC 3927, RFC 4291) addresses.
const LOCAL: [IpNet; 4] = [
    v4_net([127, 0, 0, 0], 8),
    v4_net([169, 254, 0, 0], 16),
    v6_net(Ipv6Addr::LOCALHOST, 128),
    v6_net(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10),
];

/// Every IPv4 address.
const ANY_V4: IpNet = v4_net([0; 4], 0);

/// Every IPv6 address.
const ANY_V6: IpNet = v6_net(Ipv6Addr::UNSPECIFIED, 0);

const fn v4_net([a, b, c, d]: [u8; 4], length: u8) -> IpNet {
    match ipnet::Ipv4Net::new(Ipv4Addr::new(a, b, c, d), length) {
        Ok(net) => IpNet::V4(net),
        Err(_) => unreachable!(),
    }
}

const fn v6_net(ip: Ipv6Addr, length: u8) -> IpNet {
    match ipnet::Ipv6Net::new(ip, length) {
        Ok(net) => IpNet::V6(net),
        Err(_) => unreachable!(),
    }
}

// === impl Config ===

impl Config {
    /// Returns the key, the question and the guards of every member source.
    pub fn member_sources(&self) -> impl Iterator<Item = (SourceKey, SourceQuestion, ViewGuards)> {
        self.pools.iter().flat_map(|pool| pool.member_sources(&self.dns))
    }
}

// === impl PoolConfig ===

impl PoolConfig {
    /// Returns the key, the question and the guards of each of its member sources.
    pub fn member_sources(
        &self,
        dns: &DnsConfig,
    ) -> impl Iterator<Item = (SourceKey, SourceQuestion, ViewGuards)> {
        let key = |backend| SourceKey { pool: Arc::clone(&self.name), backend };
        let discover = self.discover.iter().map(move |spec| {
            let is_dns = matches!(spec.question, SourceQuestion::Dns(_));
            let hold_empty = if is_dns { dns.hold_nxdomain } else { Duration::ZERO };
            let guards = ViewGuards { hold_empty, ..spec.guards.clone() };
            (key(None), spec.question.clone(), guards)
        });
        let of_name = ViewGuards::of_name(dns);
        let named = self.named.iter().map(move |named| {
            let question = SourceQuestion::Dns(named.question.clone());
            (key(Some(Arc::clone(&named.name))), question, of_name.clone())
        });
        discover.chain(named)
    }
}
