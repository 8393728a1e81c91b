//! The validated configuration: immutable values the rest of the program runs on.
//!
//! Built by `config`, which fills in every default, so that no `Option` here "must be
//! some". Read by all parts. Nothing here reads a file or checks a value.

mod addresses;
mod ids;
mod process;
mod text_forms;

pub use addresses::{BackendAddr, BindAddr, BindKey, ClientAddr, PeerAddr, Protocol, SourceAddr};
pub use ids::{BackendId, FrontendId, PoolId};
pub use process::{
    ADMIN_SOCKET, AccessLogTarget, Admin, AdminListen, EngineChoice, Log, LogFormat, LogLevel,
    ProcessConfig, Sandbox,
};

pub use text_forms::{SIZE_UNITS, Words, show_duration, show_size};

use crate::limits::access_list::AccessList;
use crate::limits::client_sources::SourceLimits;
use ipnet::IpNet;
use serde::{Serialize, Serializer};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use text_forms::words;
use tidegate_heartbeat::keys::Secret;

/// A whole configuration, proven consistent by `validate`.
///
/// Invariants: at least one frontend; every frontend's pool exists; every pool
/// has a backend or lets senders register; names are unique; no bind repeats or
/// overlaps another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Config {
    /// Threads, engine and whole-process limits.
    pub process: ProcessConfig,
    /// Where the admin API listens.
    pub admin: Admin,
    /// Log and access log.
    pub log: Log,
    /// In file order.
    #[serde(rename = "frontend", serialize_with = "text_forms::frontends")]
    pub frontends: Vec<FrontendConfig>,
    /// In file order.
    #[serde(rename = "pool", serialize_with = "text_forms::pools")]
    pub pools: Vec<Arc<PoolConfig>>,
    /// `None`: nobody listens for heartbeats, and no pool expects any.
    pub heartbeat: Option<HeartbeatConfig>,
}

/// `[heartbeat]`: where heartbeats are received and whom to believe. All of it
/// may change while the process runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeartbeatConfig {
    /// UDP addresses; at least one, none repeating or overlapping another.
    pub listen: Vec<SocketAddr>,
    /// At least one; unique by id.
    #[serde(rename = "key")]
    pub keys: Vec<HeartbeatKeyConfig>,
}

/// `[[heartbeat.key]]`
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeartbeatKeyConfig {
    /// Named by every datagram it signs; at least 1.
    pub id: u32,
    /// Where the secret was read.
    pub file: PathBuf,
    /// Pools it may speak for; at least one, all of them expect heartbeats.
    pub pools: Vec<Arc<str>>,
    /// Ranges the announced address must lie in; at least one.
    #[serde(serialize_with = "text_forms::ranges")]
    pub addresses: Vec<IpNet>,
    /// What the file holds; `None` where the configuration was read by `config::parse`,
    /// which opens no file. Part of the comparison: a file with another secret
    /// under the same name is another configuration.
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
    #[serde(rename = "bind", serialize_with = "text_forms::binds")]
    pub binds: Vec<Bind>,
    /// Asked in order before `pool`; at most `config::ROUTES_MAX`.
    #[serde(rename = "route")]
    pub routes: Vec<RouteConfig>,
    /// Name of an existing pool: where sessions go that no route matches.
    pub pool: Arc<str>,
    /// Close a session in which nobody has said a word for so long after it was
    /// established; `None` is off.
    #[serde(serialize_with = "text_forms::timer")]
    pub first_byte_timeout: Option<Duration>,
    /// Close a session in which nothing moved for so long; `None` is off.
    #[serde(serialize_with = "text_forms::timer")]
    pub idle_timeout: Option<Duration>,
    /// The same once one side has sent FIN; `None` is off.
    #[serde(serialize_with = "text_forms::timer")]
    pub half_closed_timeout: Option<Duration>,
    /// How long at least a peer without room for what waits may take nothing before
    /// one of the three ends the session; `None`: as they say.
    #[serde(serialize_with = "text_forms::timer")]
    pub stalled_timeout: Option<Duration>,
    /// TCP keepalive idle time on both legs; `None` is off.
    #[serde(serialize_with = "text_forms::timer")]
    pub keepalive: Option<Duration>,
    /// `TCP_USER_TIMEOUT` on both legs; `None` leaves the kernel's.
    #[serde(serialize_with = "text_forms::timer")]
    pub user_timeout: Option<Duration>,
    /// Sessions at once through this frontend; 0 means no cap.
    pub connections_max: u32,
    /// Who may connect and how much one source may ask for; `None`: everybody,
    /// anything.
    pub sources: Option<Arc<SourceRules>>,
}

/// `[[frontend.NAME.route]]`: where connections go of which all conditions hold. At
/// least one of the lists is not empty.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RouteConfig {
    /// Ranges of client addresses; empty: any.
    #[serde(serialize_with = "text_forms::ranges", skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<IpNet>,
    /// Ports that clients connect to, both ends included; empty: any.
    #[serde(serialize_with = "text_forms::ports", skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<RangeInclusive<u16>>,
    /// Ranges of addresses that clients connect to; empty: any.
    #[serde(serialize_with = "text_forms::ranges", skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpNet>,
    /// Where they go.
    #[serde(flatten, serialize_with = "text_forms::route_target")]
    pub target: RouteTarget,
}

/// Where a route leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteTarget {
    /// Name of an existing pool.
    Pool(Arc<str>),
    /// Clients are reset.
    Refuse,
}

/// One address a frontend listens on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// What tells it from other binds.
    pub key: BindKey,
    /// How it is bound.
    pub options: BindOptions,
}

/// How an address is bound. A change needs no new socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BindOptions {
    /// Listen even while no interface has the address (ip(7), `IP_FREEBIND`).
    pub freebind: bool,
    /// The IPv6 half of `*:PORT`: left out on a host without IPv6.
    pub if_ipv6: bool,
}

/// `[frontend.NAME.sources]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SourceRules {
    /// Ranges of the configuration file itself, sorted.
    #[serde(serialize_with = "text_forms::ranges")]
    pub allow: Vec<IpNet>,
    /// The same, denied.
    #[serde(serialize_with = "text_forms::ranges")]
    pub deny: Vec<IpNet>,
    /// Of both and of the lists that the file names.
    #[serde(skip)]
    pub access: AccessList,
    /// Where more allowed ranges were read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_file: Option<PathBuf>,
    /// Where more denied ranges were read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deny_file: Option<PathBuf>,
    /// For each source.
    #[serde(flatten)]
    pub limits: SourceLimits,
}

/// `[pool.NAME]`: backends, balancing policy and health spec.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PoolConfig {
    /// Unique among pools.
    #[serde(skip)]
    pub name: Arc<str>,
    /// How a backend is chosen.
    pub balance: Policy,
    /// Slots of the table that `source-hash` looks clients up in; a prime, never
    /// fewer than the pool may have backends.
    pub hash_slots: u32,
    /// Addresses of this host that connections to backends (and probes) start
    /// at, in turn, where they are of the backend's family; empty: the kernel
    /// chooses. At most `config::POOL_SOURCES_MAX`, none twice.
    pub source: Arc<[SourceAddr]>,
    /// Deadline of one connect attempt.
    #[serde(serialize_with = "text_forms::duration")]
    pub connect_timeout: Duration,
    /// Clients that may wait in line while every backend is at its cap; beyond it
    /// they wait in the kernel's queue. Exceeded by at most one a worker.
    pub queue_max: u32,
    /// How long one may wait there.
    #[serde(serialize_with = "text_forms::duration")]
    pub queue_timeout: Duration,
    /// Connect attempts for one session, each on another backend; at least 1.
    pub connect_attempts: u8,
    /// What to do when no backend is eligible.
    pub when_none_eligible: WhenNoneEligible,
    /// How long never-probed backends wait for their first result before the
    /// pool fails open.
    #[serde(serialize_with = "text_forms::duration")]
    pub startup_grace: Duration,
    /// What happens to the sessions of a backend that leaves the pool.
    pub on_removal: OnRemoval,
    /// Active probes; `None` leaves every backend assumed up.
    pub probe: Option<Arc<ProbeSpec>>,
    /// Passive ejection; `None` is off.
    #[serde(serialize_with = "text_forms::or_off")]
    pub ejection: Option<EjectionSpec>,
    /// What heartbeats are expected; `None`: none are taken.
    pub heartbeat: Option<Arc<HeartbeatSpec>>,
    /// How long a backend that joins or comes back takes to reach its full
    /// weight and cap; `None` is at once.
    #[serde(serialize_with = "text_forms::timer")]
    pub slow_start: Option<Duration>,
    /// At least one, unless senders of heartbeats may register; unique by name
    /// and by address.
    #[serde(rename = "backend")]
    pub backends: Vec<BackendConfig>,
}

/// `balance = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Policy {
    /// Smooth weighted round robin, exact over the whole process.
    WeightedRoundRobin,
    /// Least (in-flight + 1) / weight.
    LeastConnections,
    /// Weighted random.
    Random,
    /// The better of two weighted random draws.
    TwoChoices,
    /// The one of two weighted random draws with the lower expected latency.
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

/// `when_none_eligible = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenNoneEligible {
    /// Reset the client at once.
    Refuse,
    /// Balance over every backend that no operator has taken out.
    TryAll,
}

/// `on_removal = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnRemoval {
    /// Sessions run to their end.
    Keep,
    /// Sessions still open after this long are reset.
    CloseAfter(Duration),
}

/// `[pool.NAME.probe]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ProbeSpec {
    /// What one probe does.
    #[serde(flatten)]
    pub kind: ProbeKind,
    /// Time between probes of a backend whose state is settled.
    #[serde(serialize_with = "text_forms::duration")]
    pub interval: Duration,
    /// Time between probes while a change of state is being counted.
    #[serde(serialize_with = "text_forms::duration")]
    pub fast_interval: Duration,
    /// Deadline of one probe; never above either interval.
    #[serde(serialize_with = "text_forms::duration")]
    pub timeout: Duration,
    /// Successes in a row that bring a backend up; at least 1.
    pub rise: u32,
    /// Failures in a row that take a backend down; at least 1.
    pub fall: u32,
    /// The pool's: where probes start.
    #[serde(skip)]
    pub source: Arc<[SourceAddr]>,
}

/// `kind = ...`
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum ProbeKind {
    /// The connection is accepted.
    Tcp,
    /// The answer to `send` is as `expect` says. `send` may be empty.
    SendExpect {
        /// Sent after connecting.
        send: String,
        /// What the answer must hold.
        expect: Expect,
    },
    /// An HTTP/1.1 request whose status lies in `status`.
    Http {
        /// Request target, starts with `/`.
        path: String,
        /// `Host` header; `None` uses the backend's address.
        #[serde(skip_serializing_if = "Option::is_none")]
        host: Option<String>,
        /// Request method.
        method: String,
        /// Inclusive ranges, each within 100..=599.
        #[serde(serialize_with = "text_forms::status_ranges")]
        status: Vec<(u16, u16)>,
    },
}

/// `expect = ...`: what an answer must hold, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expect {
    /// At its start.
    Starts(String),
    /// Anywhere.
    Contains(String),
}

/// `[pool.NAME.ejection]`: what sessions tell of backends.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct EjectionSpec {
    /// Consecutive failures (connects, early resets) that eject; at least 1.
    pub failures: u32,
    /// Length of the first ejection; the n-th in a row lasts n times that, at
    /// most 5 minutes.
    #[serde(serialize_with = "text_forms::duration")]
    pub time: Duration,
    /// Share of a pool that may be ejected at once, in percent, 0..=100.
    #[serde(rename = "max_ejected", serialize_with = "text_forms::percent")]
    pub max_ejected_percent: u8,
    /// Resets before the first byte count as failures, too.
    pub early_resets: bool,
    /// Waiting longer than this for a first byte may make a backend suspect;
    /// `None` is off.
    #[serde(serialize_with = "text_forms::timer")]
    pub slow_first_byte: Option<Duration>,
}

/// `[pool.NAME.heartbeat]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HeartbeatSpec {
    /// Signed senders that are not in the file may join.
    pub register: bool,
    /// Backends of the file are eligible only while they send heartbeats.
    pub require: bool,
    /// Between two heartbeats, where the sender does not say; 20 ms to 10 s.
    #[serde(serialize_with = "text_forms::duration")]
    pub interval: Duration,
    /// Silence that ends what heartbeats vouch for: a registered backend is
    /// down. At least three intervals.
    #[serde(serialize_with = "text_forms::duration")]
    pub ttl: Duration,
    /// How long after that a registered backend is forgotten.
    #[serde(serialize_with = "text_forms::duration")]
    pub forget_after: Duration,
    /// Registered backends at once; at least 1.
    pub backends_max: u32,
    /// The largest weight a registered backend may ask for, 1..=[`WEIGHT_MAX`].
    /// For a backend of the file its own weight is the largest.
    pub weight_max: u16,
}

/// `[[pool.NAME.backend]]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BackendConfig {
    /// Unique in its pool; the address where the file gives none.
    pub name: Arc<str>,
    /// Unique in its pool.
    #[serde(serialize_with = "text_forms::shown")]
    pub address: BackendAddr,
    /// 1..=[`WEIGHT_MAX`].
    pub weight: u16,
    /// Serves only while no primary is eligible.
    pub backup: bool,
    /// Sessions at once on this backend; 0 means no cap.
    pub connections_max: u32,
}

/// Largest weight a backend may have: keeps the smooth sequence of two
/// co-prime neighbours within 2,000 slots.
pub const WEIGHT_MAX: u16 = 1000;

/// `hash_slots` where a pool does not say: 100 slots a backend, and so shares
/// that are 1 % apart, up to 655 backends.
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
words!(WhenNoneEligible: "refuse" => Refuse, "try-all" => TryAll);

// === impl Expect ===

impl Serialize for Expect {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Expect::Starts(text) => serializer.serialize_str(text),
            Expect::Contains(text) => serializer.collect_map([("contains", text)]),
        }
    }
}

// === impl Bind ===

impl Bind {
    /// TCP at that address, without options.
    pub fn tcp(address: SocketAddr) -> Bind {
        Bind { key: BindKey::tcp(address), options: BindOptions::default() }
    }
}

// === impl Config ===

impl Config {
    /// Every file that is read together with this configuration.
    pub fn named_files(&self) -> Vec<PathBuf> {
        let token = self.admin.token_file.iter();
        let keys = self.heartbeat.iter().flat_map(|heartbeat| &heartbeat.keys);
        let rules = self.frontends.iter().filter_map(|frontend| frontend.sources.as_ref());
        let lists = rules.flat_map(|rules| rules.allow_file.iter().chain(&rules.deny_file));
        token.chain(keys.map(|key| &key.file)).chain(lists).cloned().collect()
    }
}
