//! The validated configuration: immutable values that the rest of the program uses.
//!
//! `config` builds it and fills in every default, so an `Option` here is never a
//! missing required value. All parts read it. Nothing here reads a file or checks a
//! value.

mod addresses;
mod bind_form;
mod discovery;
mod exec;
mod failover;
mod ids;
mod probe;
mod process;
mod proxy_protocol;
mod service;
mod text_forms;

pub use addresses::{
    BackendAddr, BindAddr, BindKey, ClientAddr, LocalPeer, PeerAddr, Protocol, SourceAddr,
};
pub use discovery::{
    AnnouncedWeights, CriticalRule, DiscoverSpec, DnsConfig, EmptyAnswer, HOLD_NXDOMAIN,
    NameFamily, NameQuestion, NameRecord, NamedBackend, RegistryConfig, RegistryKind,
    RegistryQuery, ServerAddr, SourceKey, SourceQuestion, TlsClientConfig, ViewGuards,
    ZookeeperFormat,
};
pub use exec::{CommandSubject, ExecProbe, ExitCodes, ExitMeaning, NO_PORT};
pub use failover::{Backups, OnDown, OnRecover, OnRemoval, TIER_MAX, Tiers, WhenNoneEligible};
pub use ids::{BackendId, FrontendId, PoolId};
pub use probe::{
    Expect, HttpProbe, HttpVersion, ProbeBytes, ProbeHeader, ProbeKind, ProbePattern, ProbeSpec,
    ProbeStep, ProbeTarget, ProbeTls, TlsVerify,
};
pub use process::{
    ADMIN_SOCKET, AccessLogTarget, Admin, AdminListen, EngineChoice, Log, LogFormat, LogLevel,
    LogTarget, ProcessConfig, Sandbox, SyslogFacility, SyslogReceiver,
};
pub use proxy_protocol::{
    OtherPeers, PassedTlv, ProxyHeaderSource, ProxyHeaderSpec, ProxyVersion, SentTlv,
};

pub use service::{
    DnsProbe, DnsProbeCode, DnsProbeRecord, DnsProbeTransport, NodeRole, PostgresProbe, ProbeLogin,
};
pub use text_forms::{SIZE_UNITS, Words, show_duration, show_size};

use crate::limits::access_list::AccessList;
use crate::limits::client_sources::SourceLimits;
use ipnet::IpNet;
use serde::Serialize;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use text_forms::words;
use tidegate_heartbeat::keys::Secret;

/// A whole configuration, checked for consistency by `validate`.
///
/// Invariants: at least one frontend; every frontend's pool exists; every pool has a
/// backend, lets senders register or has a member source; every registry that a source
/// names exists; names are unique; no bind repeats or overlaps another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Config {
    /// Threads, engine and process-wide limits.
    pub process: ProcessConfig,
    /// Admin API.
    pub admin: Admin,
    /// Log and access log.
    pub log: Log,
    /// In file order.
    #[serde(rename = "frontend", serialize_with = "text_forms::frontends")]
    pub frontends: Vec<FrontendConfig>,
    /// In file order.
    #[serde(rename = "pool", serialize_with = "text_forms::pools")]
    pub pools: Vec<Arc<PoolConfig>>,
    /// `None`: heartbeats are not received, and no pool expects them.
    pub heartbeat: Option<HeartbeatConfig>,
    /// In file order.
    #[serde(rename = "registry", serialize_with = "text_forms::registries")]
    pub registries: Vec<Arc<RegistryConfig>>,
    /// Name resolution.
    pub dns: DnsConfig,
    /// The other files that it was read from.
    #[serde(skip)]
    pub includes: Includes,
}

/// Files that the main file includes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Includes {
    /// Paths that can have `*` in their last part.
    pub patterns: Vec<PathBuf>,
    /// The files that they matched, in the order in which they were read.
    pub files: Vec<PathBuf>,
}

/// `[heartbeat]`: where heartbeats are received, and the keys that are accepted. A
/// reload applies all changes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeartbeatConfig {
    /// UDP addresses: at least one, without repetition or overlap.
    pub listen: Vec<SocketAddr>,
    /// At least one; unique by id.
    #[serde(rename = "key")]
    pub keys: Vec<HeartbeatKeyConfig>,
}

/// `[[heartbeat.key]]`
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeartbeatKeyConfig {
    /// At least 1. Every datagram that the key signs contains it.
    pub id: u32,
    /// File that contains the secret.
    pub file: PathBuf,
    /// Pools that the key is valid for: at least one, and all of them expect
    /// heartbeats.
    pub pools: Vec<Arc<str>>,
    /// Ranges that must contain the announced address; at least one.
    #[serde(serialize_with = "text_forms::ranges")]
    pub addresses: Vec<IpNet>,
    /// Content of the file; `None` if `config::parse` read the configuration, which
    /// opens no files. It is compared: the same file name with another secret is a
    /// different configuration.
    #[serde(skip)]
    pub secret: Option<Secret>,
}

/// `[frontend.NAME]`: bind addresses, route and limits.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FrontendConfig {
    /// Unique among frontends.
    #[serde(skip)]
    pub name: Arc<str>,
    /// At least one; IPv6 wildcards are v6-only.
    #[serde(rename = "bind", serialize_with = "bind_form::binds")]
    pub binds: Vec<Bind>,
    /// Checked in order before `pool`; at most `config::ROUTES_MAX`.
    #[serde(rename = "route")]
    pub routes: Vec<RouteConfig>,
    /// Name of the pool for sessions that no route matches. It exists.
    pub pool: Arc<str>,
    /// A backend is picked and connected at the client's first byte, which can take this long.
    /// `None`: at once.
    #[serde(serialize_with = "text_forms::timer")]
    pub client_first: Option<Duration>,
    /// Time from the established session to the first byte of either side; then the
    /// session is closed. `None`: off.
    #[serde(serialize_with = "text_forms::timer")]
    pub first_byte_timeout: Option<Duration>,
    /// Time without transferred data after which a session is closed. `None`: off.
    #[serde(serialize_with = "text_forms::timer")]
    pub idle_timeout: Option<Duration>,
    /// The same after one side has sent FIN. `None`: off.
    #[serde(serialize_with = "text_forms::timer")]
    pub half_closed_timeout: Option<Duration>,
    /// Age at which a session is closed at the latest. `None`: off.
    #[serde(serialize_with = "text_forms::timer")]
    pub session_max: Option<Duration>,
    /// Minimum time without progress for a peer that has no room for waiting bytes,
    /// before `idle_timeout` or `half_closed_timeout` closes the session. `None`: these
    /// timeouts apply unchanged.
    #[serde(serialize_with = "text_forms::timer")]
    pub stalled_timeout: Option<Duration>,
    /// Idle time before TCP keepalive probes, on both connections of a session. `None`:
    /// off.
    #[serde(serialize_with = "text_forms::timer")]
    pub keepalive: Option<Duration>,
    /// `TCP_USER_TIMEOUT` on both connections of a session. `None`: the kernel's
    /// default.
    #[serde(serialize_with = "text_forms::timer")]
    pub user_timeout: Option<Duration>,
    /// Bytes per second that a session sends to its client at most. `None`: no limit.
    #[serde(serialize_with = "text_forms::byte_rate")]
    pub download_rate: Option<u64>,
    /// Bytes per second that a session sends to its backend at most. `None`: no limit.
    #[serde(serialize_with = "text_forms::byte_rate")]
    pub upload_rate: Option<u64>,
    /// Cap on sessions of this frontend; 0 means no cap.
    pub connections_max: u32,
    /// Allowed client addresses and limits per client source. `None`: no restrictions.
    pub sources: Option<Arc<SourceRules>>,
    /// Peers that send PROXY headers; `None`: no bind expects headers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<Arc<ProxyHeaderSource>>,
}

/// `[[frontend.NAME.route]]`: a target for connections that meet all conditions. At
/// least one list is not empty.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RouteConfig {
    /// Ranges of client addresses; empty: any.
    #[serde(serialize_with = "text_forms::ranges", skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<IpNet>,
    /// Ports that clients connect to, inclusive ranges; empty: any.
    #[serde(serialize_with = "text_forms::ports", skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<RangeInclusive<u16>>,
    /// Ranges of addresses that clients connect to; empty: any.
    #[serde(serialize_with = "text_forms::ranges", skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpNet>,
    /// What happens to a matching connection.
    #[serde(flatten, serialize_with = "text_forms::route_target")]
    pub target: RouteTarget,
}

/// Target of a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteTarget {
    /// Name of an existing pool.
    Pool(Arc<str>),
    /// The client is reset.
    Refuse,
}

/// An address that a frontend listens on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// Its identity.
    pub key: BindKey,
    /// Its socket options.
    pub options: BindOptions,
}

/// Options of a bind. A change does not need a new socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BindOptions {
    /// Listen even if no interface has the address (ip(7), `IP_FREEBIND`).
    pub freebind: bool,
    /// The IPv6 part of `*:PORT`: skipped on a host without IPv6.
    pub if_ipv6: bool,
    /// Length of the listen queue of each socket, 1..=[`BACKLOG_MAX`]. The kernel lowers
    /// it to `net.core.somaxconn`.
    pub backlog: u16,
    /// Mark of the packets to clients (socket(7), SO_MARK); 0: none.
    pub mark: u32,
    /// Differentiated services code point of the packets to clients (RFC 2474), 0..=63.
    pub dscp: u8,
    /// Peers in [`ProxyHeaderSource::from`] start each connection with a PROXY header. So do
    /// all peers of a Unix socket.
    pub proxy_protocol: bool,
    /// Permissions of the file of a Unix socket. A client needs the right to write.
    pub mode: u16,
}

/// Default of [`BindOptions::mode`]: the user and the group of this process can connect.
pub const SOCKET_MODE: u16 = 0o660;

/// Longest listen queue of a socket, and the default.
pub const BACKLOG_MAX: u16 = u16::MAX;

/// `[frontend.NAME.sources]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SourceRules {
    /// Allowed ranges in the configuration file, sorted.
    #[serde(serialize_with = "text_forms::ranges")]
    pub allow: Vec<IpNet>,
    /// Denied ranges in the configuration file, sorted.
    #[serde(serialize_with = "text_forms::ranges")]
    pub deny: Vec<IpNet>,
    /// Built from both and from the lists in the files below.
    #[serde(skip)]
    pub access: AccessList,
    /// File with more allowed ranges.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_file: Option<PathBuf>,
    /// File with more denied ranges.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deny_file: Option<PathBuf>,
    /// Limits per client source.
    #[serde(flatten)]
    pub limits: SourceLimits,
}

/// `[pool.NAME]`: backends, balancing policy and health settings.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PoolConfig {
    /// Unique among pools.
    #[serde(skip)]
    pub name: Arc<str>,
    /// Name of the pool whose backends and probe results this pool uses. That pool has no
    /// `of`, and `backends` is a copy of its backends. `None`: the pool has its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub of: Option<Arc<str>>,
    /// Role that a backend needs to be eligible; `None`: any. The kind of the probe finds
    /// roles.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<NodeRole>,
    /// Balancing policy.
    pub balance: Policy,
    /// Slots of the lookup table of `source-hash`: a prime, at least the maximum number
    /// of backends of the pool.
    pub hash_slots: u32,
    /// Local addresses from which connections to backends and probes start, in turn.
    /// Only addresses of the backend's family are used. Empty: the kernel chooses. At
    /// most `config::POOL_SOURCES_MAX`, without repetition.
    pub source: Arc<[SourceAddr]>,
    /// Timeout of one connect attempt.
    #[serde(serialize_with = "text_forms::duration")]
    pub connect_timeout: Duration,
    /// Maximum number of clients in the pool's queue while every backend is at its cap, or
    /// while clients wait for an eligible one. Further clients stay in the listen queue. Workers can exceed it by at most one
    /// client each.
    pub queue_max: u32,
    /// Timeout of a client in that queue.
    #[serde(serialize_with = "text_forms::duration")]
    pub queue_timeout: Duration,
    /// Maximum number of connect attempts per session, each on another backend; at
    /// least 1.
    pub connect_attempts: u8,
    /// What to do when no backend is eligible.
    pub when_none_eligible: WhenNoneEligible,
    /// Time for which backends without a probe result wait for the first one before the
    /// pool fails open.
    #[serde(serialize_with = "text_forms::duration")]
    pub startup_grace: Duration,
    /// What happens to the sessions of a backend that leaves the pool.
    pub on_removal: OnRemoval,
    /// How many backups serve at once.
    pub backups: Backups,
    /// Which tiers serve at once. [`Tiers::Strict`] if the pool can have one tier only.
    pub tiers: Tiers,
    /// What happens to the sessions of backups that no longer serve, because a lower tier does.
    pub on_recover: OnRecover,
    /// What happens to the sessions of a backend that is down, or has lost `role`.
    pub on_down: OnDown,
    /// The PROXY header that backends get; `None` is off.
    #[serde(serialize_with = "text_forms::or_off")]
    pub proxy_protocol: Option<Arc<ProxyHeaderSpec>>,
    /// Active probes; `None`: every backend is treated as up.
    pub probe: Option<Arc<ProbeSpec>>,
    /// Passive ejection; `None` is off.
    #[serde(serialize_with = "text_forms::or_off")]
    pub ejection: Option<EjectionSpec>,
    /// Expected heartbeats; `None`: heartbeats are ignored.
    pub heartbeat: Option<Arc<HeartbeatSpec>>,
    /// Time in which a new or returning backend reaches its full weight and cap;
    /// `None`: immediately.
    #[serde(serialize_with = "text_forms::timer")]
    pub slow_start: Option<Duration>,
    /// Source of members in addition to the file and heartbeats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discover: Option<Arc<DiscoverSpec>>,
    /// At least one, unless `named`, `discover` or heartbeat senders bring members; unique
    /// by name and by address.
    #[serde(rename = "backend")]
    pub backends: Vec<BackendConfig>,
    /// Backends whose address is a name; their names are unique among all backends.
    #[serde(skip)]
    pub named: Vec<NamedBackend>,
}

/// `balance = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Policy {
    /// Smooth weighted round robin, exact over the whole process.
    WeightedRoundRobin,
    /// Lowest (in-flight + 1) / weight.
    LeastConnections,
    /// Weighted random.
    Random,
    /// The better of two weighted random draws.
    TwoChoices,
    /// The one of two weighted random draws with the lower expected cost: latency x
    /// (in-flight + 1) / weight.
    PeakEwma,
    /// Weighted Maglev over the client address.
    SourceHash,
}

impl Policy {
    /// All, in the order of their numbers.
    pub const ALL: [Policy; 6] = [
        Policy::WeightedRoundRobin,
        Policy::LeastConnections,
        Policy::Random,
        Policy::TwoChoices,
        Policy::PeakEwma,
        Policy::SourceHash,
    ];

    /// Position in [`Policy::ALL`].
    pub fn number(self) -> u8 {
        self as u8
    }

    /// The policy with that number.
    pub fn of_number(number: u8) -> Option<Policy> {
        Policy::ALL.get(usize::from(number)).copied()
    }
}

/// `[pool.NAME.ejection]`: passive health from the results of sessions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct EjectionSpec {
    /// Consecutive failures (connects, early resets) that eject a backend; at least 1.
    pub failures: u32,
    /// Duration of the first ejection. The n-th ejection in a row lasts n times as
    /// long, at most 5 minutes.
    #[serde(serialize_with = "text_forms::duration")]
    pub time: Duration,
    /// Maximum share of a pool that is ejected at the same time, in percent, 0..=100.
    #[serde(rename = "max_ejected", serialize_with = "text_forms::percent")]
    pub max_ejected_percent: u8,
    /// Whether resets before the first byte also count as failures.
    pub early_resets: bool,
    /// First-byte time above which a backend can become suspect; `None`: off.
    #[serde(serialize_with = "text_forms::timer")]
    pub slow_first_byte: Option<Duration>,
}

/// `[pool.NAME.heartbeat]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HeartbeatSpec {
    /// Whether signed senders that are not in the file can register.
    pub register: bool,
    /// Whether backends of the file are eligible only while they send heartbeats.
    pub require: bool,
    /// Default time between two heartbeats if the sender announces none; 20 ms to 10 s.
    #[serde(serialize_with = "text_forms::duration")]
    pub interval: Duration,
    /// Time without heartbeats after which earlier heartbeats expire; a registered
    /// backend is then down. At least three intervals.
    #[serde(serialize_with = "text_forms::duration")]
    pub ttl: Duration,
    /// Time after that until a registered backend is removed.
    #[serde(serialize_with = "text_forms::duration")]
    pub forget_after: Duration,
    /// Maximum number of registered backends; at least 1.
    pub backends_max: u32,
    /// Maximum weight that a registered backend can announce, 1..=[`WEIGHT_MAX`]. For a
    /// backend of the file, its configured weight is the maximum.
    pub weight_max: u16,
}

/// `[[pool.NAME.backend]]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BackendConfig {
    /// Unique in its pool; the address if the file gives no name.
    pub name: Arc<str>,
    /// Unique in its pool.
    #[serde(serialize_with = "text_forms::shown")]
    pub address: BackendAddr,
    /// 1..=[`WEIGHT_MAX`].
    pub weight: u16,
    /// 0..=[`TIER_MAX`]. Backends of a higher tier are backups of those of lower tiers.
    #[serde(flatten, serialize_with = "text_forms::tier")]
    pub tier: u8,
    /// Cap on sessions of this backend; 0 means no cap.
    pub connections_max: u32,
}

/// Maximum weight of a backend. It limits the smooth sequence of two backends to 2,000
/// places.
pub const WEIGHT_MAX: u16 = 1000;

/// Default of `hash_slots`. Up to 655 backends it gives 100 slots per backend, so
/// shares are accurate to 1 %.
pub const HASH_SLOTS: u32 = 65_537;

words!(
    Policy:
    "weighted-round-robin" => WeightedRoundRobin,
    "least-connections" => LeastConnections,
    "random" => Random,
    "two-choices" => TwoChoices,
    "peak-ewma" => PeakEwma,
    "source-hash" => SourceHash,
);

// === impl BindOptions ===

impl Default for BindOptions {
    fn default() -> BindOptions {
        BindOptions {
            freebind: false,
            if_ipv6: false,
            backlog: BACKLOG_MAX,
            mark: 0,
            dscp: 0,
            proxy_protocol: false,
            mode: SOCKET_MODE,
        }
    }
}

// === impl Bind ===

impl Bind {
    /// Returns a TCP bind without options.
    pub fn tcp(address: SocketAddr) -> Bind {
        Bind { key: BindKey::tcp(address), options: BindOptions::default() }
    }
}

// === impl Config ===

impl Config {
    /// Returns every file that is read together with this configuration.
    pub fn named_files(&self) -> Vec<PathBuf> {
        let admin = &self.admin;
        let tokens = admin.token_file.iter().chain(&admin.read_token_file);
        let keys = self.heartbeat.iter().flat_map(|heartbeat| &heartbeat.keys);
        let rules = self.frontends.iter().filter_map(|frontend| frontend.sources.as_ref());
        let lists = rules.flat_map(|rules| rules.allow_file.iter().chain(&rules.deny_file));
        let registries = self.registries.iter().flat_map(|registry| registry.named_files());
        let specs = self.pools.iter().filter_map(|pool| pool.discover.as_ref());
        let urls = specs.flat_map(|spec| spec.question.named_files());
        let probes = self.pools.iter().filter_map(|pool| pool.probe.as_ref());
        let trusted = probes.flat_map(|spec| spec.named_files());
        let all = tokens.chain(keys.map(|key| &key.file)).chain(lists);
        // First, because only some of the files are watched for writers.
        let all = self.includes.files.iter().chain(all);
        all.chain(registries).chain(urls).chain(trusted).cloned().collect()
    }
}
