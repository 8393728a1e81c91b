//! The validated configuration: immutable values the rest of the program runs on.
//!
//! Built by `config`, which fills in every default, so that no `Option` here "must be
//! some". Read by all parts. Nothing here reads a file or checks a value.

mod addresses;
mod process;

pub use addresses::{BackendAddr, BindAddr, BindKey, ClientAddr, PeerAddr, Protocol, SourceAddr};
pub use process::{
    ADMIN_SOCKET, AccessLogTarget, Admin, AdminListen, EngineChoice, Log, LogFormat, LogLevel,
    ProcessConfig, Sandbox,
};

use crate::limits::access_list::AccessList;
use crate::limits::client_sources::SourceLimits;
use ipnet::IpNet;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tidegate_heartbeat::keys::Secret;

/// A whole configuration, proven consistent by `validate`.
///
/// Invariants: at least one frontend; every frontend's pool exists; every pool
/// has a backend or lets senders register; names are unique; no bind repeats or
/// overlaps another.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Threads, engine and whole-process limits.
    pub process: ProcessConfig,
    /// Where the admin API listens.
    pub admin: Admin,
    /// Log and access log.
    pub log: Log,
    /// In file order.
    pub frontends: Vec<FrontendConfig>,
    /// In file order.
    pub pools: Vec<Arc<PoolConfig>>,
    /// `None`: nobody listens for heartbeats, and no pool expects any.
    pub heartbeat: Option<HeartbeatConfig>,
}

/// `[heartbeat]`: where heartbeats are received and whom to believe. All of it
/// may change while the process runs.
#[derive(Debug, Clone, PartialEq)]
pub struct HeartbeatConfig {
    /// UDP addresses; at least one, none repeating or overlapping another.
    pub listen: Vec<SocketAddr>,
    /// At least one; unique by id.
    pub keys: Vec<HeartbeatKeyConfig>,
}

/// `[[heartbeat.key]]`
#[derive(Debug, Clone, PartialEq)]
pub struct HeartbeatKeyConfig {
    /// Named by every datagram it signs; at least 1.
    pub id: u32,
    /// Where the secret was read.
    pub file: PathBuf,
    /// Pools it may speak for; at least one, all of them expect heartbeats.
    pub pools: Vec<Arc<str>>,
    /// Ranges the announced address must lie in; at least one.
    pub addresses: Vec<IpNet>,
    /// What the file holds; `None` where the configuration was read by `config::parse`,
    /// which opens no file. Part of the comparison: a file with another secret
    /// under the same name is another configuration.
    pub secret: Option<Secret>,
}

/// `[frontend.NAME]`: bind addresses, route and limits.
#[derive(Debug, Clone, PartialEq)]
pub struct FrontendConfig {
    /// Unique among frontends.
    pub name: Arc<str>,
    /// At least one; IPv6 wildcards are v6-only.
    pub binds: Vec<Bind>,
    /// Name of an existing pool.
    pub pool: Arc<str>,
    /// Close a session in which nobody has said a word for so long after it was
    /// established; `None` is off.
    pub first_byte_timeout: Option<Duration>,
    /// Close a session in which nothing moved for so long; `None` is off.
    pub idle_timeout: Option<Duration>,
    /// The same once one side has sent FIN; `None` is off.
    pub half_closed_timeout: Option<Duration>,
    /// How long at least a peer without room for what waits may take nothing before
    /// one of the three ends the session; `None`: as they say.
    pub stalled_timeout: Option<Duration>,
    /// TCP keepalive idle time on both legs; `None` is off.
    pub keepalive: Option<Duration>,
    /// `TCP_USER_TIMEOUT` on both legs; `None` leaves the kernel's.
    pub user_timeout: Option<Duration>,
    /// Sessions at once through this frontend; 0 means no cap.
    pub connections_max: u32,
    /// Who may connect and how much one source may ask for; `None`: everybody,
    /// anything.
    pub sources: Option<Arc<SourceRules>>,
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceRules {
    /// Ranges of the file and of the lists it names.
    pub access: AccessList,
    /// Where more allowed ranges were read.
    pub allow_file: Option<PathBuf>,
    /// Where more denied ranges were read.
    pub deny_file: Option<PathBuf>,
    /// For each source.
    pub limits: SourceLimits,
}

/// `[pool.NAME]`: backends, balancing policy and health spec.
#[derive(Debug, Clone, PartialEq)]
pub struct PoolConfig {
    /// Unique among pools.
    pub name: Arc<str>,
    /// How a backend is chosen.
    pub balance: Policy,
    /// Slots of the table that `source-hash` looks clients up in; a prime, never
    /// fewer than the pool may have backends.
    pub hash_slots: u32,
    /// Addresses of this host that connections to backends (and probes) start
    /// at, in turn, where they are of the backend's family; empty: the kernel
    /// chooses. At most `config::POOL_SOURCES_MAX`, none twice.
    pub source: Arc<[IpAddr]>,
    /// Deadline of one connect attempt.
    pub connect_timeout: Duration,
    /// Clients that may wait in line while every backend is at its cap; beyond it
    /// they wait in the kernel's queue. Exceeded by at most one a worker.
    pub queue_max: u32,
    /// How long one may wait there.
    pub queue_timeout: Duration,
    /// Connect attempts for one session, each on another backend; at least 1.
    pub connect_attempts: u8,
    /// What to do when no backend is eligible.
    pub when_none_eligible: WhenNoneEligible,
    /// How long never-probed backends wait for their first result before the
    /// pool fails open.
    pub startup_grace: Duration,
    /// What happens to the sessions of a backend that leaves the pool.
    pub on_removal: OnRemoval,
    /// Active probes; `None` leaves every backend assumed up.
    pub probe: Option<Arc<ProbeSpec>>,
    /// Passive ejection; `None` is off.
    pub ejection: Option<EjectionSpec>,
    /// What heartbeats are expected; `None`: none are taken.
    pub heartbeat: Option<Arc<HeartbeatSpec>>,
    /// How long a backend that joins or comes back takes to reach its full
    /// weight and cap; `None` is at once.
    pub slow_start: Option<Duration>,
    /// At least one, unless senders of heartbeats may register; unique by name
    /// and by address.
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeSpec {
    /// What one probe does.
    pub kind: ProbeKind,
    /// Time between probes of a backend whose state is settled.
    pub interval: Duration,
    /// Time between probes while a change of state is being counted.
    pub fast_interval: Duration,
    /// Deadline of one probe; never above either interval.
    pub timeout: Duration,
    /// Successes in a row that bring a backend up; at least 1.
    pub rise: u32,
    /// Failures in a row that take a backend down; at least 1.
    pub fall: u32,
    /// The pool's: where probes start.
    pub source: Arc<[IpAddr]>,
}

/// `kind = ...`
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeKind {
    /// The connection is accepted.
    Tcp,
    /// The answer to `send` is as `expect` says. `send` may be empty.
    SendExpect {
        /// Bytes sent after connecting.
        send: Vec<u8>,
        /// What the answer must hold.
        expect: Expect,
    },
    /// An HTTP/1.1 request whose status lies in `status`.
    Http {
        /// Request target, starts with `/`.
        path: String,
        /// `Host` header; `None` uses the backend's address.
        host: Option<String>,
        /// Request method.
        method: String,
        /// Inclusive ranges, each within 100..=599.
        status: Vec<(u16, u16)>,
    },
}

/// `expect = ...`: what an answer must hold, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expect {
    /// At its start.
    Starts(Vec<u8>),
    /// Anywhere.
    Contains(Vec<u8>),
}

/// `[pool.NAME.ejection]`: what sessions tell of backends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EjectionSpec {
    /// Consecutive failures (connects, early resets) that eject; at least 1.
    pub failures: u32,
    /// Length of the first ejection; the n-th in a row lasts n times that, at
    /// most 5 minutes.
    pub time: Duration,
    /// Share of a pool that may be ejected at once, in percent, 0..=100.
    pub max_ejected_percent: u8,
    /// Resets before the first byte count as failures, too.
    pub early_resets: bool,
    /// Waiting longer than this for a first byte may make a backend suspect;
    /// `None` is off.
    pub slow_first_byte: Option<Duration>,
}

/// `[pool.NAME.heartbeat]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeartbeatSpec {
    /// Signed senders that are not in the file may join.
    pub register: bool,
    /// Backends of the file are eligible only while they send heartbeats.
    pub require: bool,
    /// Between two heartbeats, where the sender does not say; 20 ms to 10 s.
    pub interval: Duration,
    /// Silence that ends what heartbeats vouch for: a registered backend is
    /// down. At least three intervals.
    pub ttl: Duration,
    /// How long after that a registered backend is forgotten.
    pub forget_after: Duration,
    /// Registered backends at once; at least 1.
    pub backends_max: u32,
    /// The largest weight a registered backend may ask for, 1..=[`WEIGHT_MAX`].
    /// For a backend of the file its own weight is the largest.
    pub weight_max: u16,
}

/// `[[pool.NAME.backend]]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendConfig {
    /// Unique in its pool; the address where the file gives none.
    pub name: Arc<str>,
    /// Unique in its pool.
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

// === impl Policy ===

impl Policy {
    /// The policy's name in the configuration file and in status.
    pub fn name(self) -> &'static str {
        match self {
            Policy::WeightedRoundRobin => "weighted-round-robin",
            Policy::LeastConnections => "least-connections",
            Policy::Random => "random",
            Policy::TwoChoices => "two-choices",
            Policy::PeakEwma => "peak-ewma",
            Policy::SourceHash => "source-hash",
        }
    }

    /// Every policy, in the order the documentation lists them.
    pub const ALL: [Policy; 6] = [
        Policy::WeightedRoundRobin,
        Policy::LeastConnections,
        Policy::Random,
        Policy::TwoChoices,
        Policy::PeakEwma,
        Policy::SourceHash,
    ];
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
    /// The pool of that name.
    pub fn pool(&self, name: &str) -> Option<&Arc<PoolConfig>> {
        self.pools.iter().find(|pool| &*pool.name == name)
    }

    /// Every file that is read together with this configuration.
    pub fn named_files(&self) -> Vec<PathBuf> {
        let token = self.admin.token_file.iter();
        let keys = self.heartbeat.iter().flat_map(|heartbeat| &heartbeat.keys);
        let rules = self.frontends.iter().filter_map(|frontend| frontend.sources.as_ref());
        let lists = rules.flat_map(|rules| rules.allow_file.iter().chain(&rules.deny_file));
        token.chain(keys.map(|key| &key.file)).chain(lists).cloned().collect()
    }
}
