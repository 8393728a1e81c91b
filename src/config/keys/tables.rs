//! The tables of a configuration file in the order of `config/full.toml`, with the keys of the
//! process and of frontends.

use super::discovery_tables::{DISCOVER, DNS, REGISTRY};
use super::pool_tables::{
    BACKEND, EJECTION, EXPECT, HEARTBEAT, HEARTBEAT_KEY, POOL, POOL_HEARTBEAT, PROBE, PROBE_TLS,
    PROXY_HEADER,
};
use super::{Applies, ConfigKey, DefaultValue, KeyTable, Values, words};
use Applies::{Reload, Restart};
use DefaultValue::{Described, Required, Value};
use Values::{Flag, Form, Integer, Size, Time, WordOrInteger, WordOrTime, Words};
use tidegate_core::model::{
    EngineChoice, LogFormat, LogLevel, OtherPeers, Sandbox, SyslogFacility,
};

const BYTE_RATE: Values = Form("`\"off\"`, or `\"1KiB/s\"` to `\"1TiB/s\"`");
pub(super) const CONNECTIONS: Values = Integer(0, 10_000_000);
pub(super) const TIME: Values = Time("1ms", "30d");
const TIME_OR_OFF: Values = WordOrTime("off", "", "1ms", "30d");
const RANGES: Values = Form("a prefix such as `\"10.0.0.0/8\"`, an address, or a list of both");

pub(super) const fn key(
    name: &'static str,
    values: Values,
    default: DefaultValue,
    applies: Applies,
    about: &'static str,
) -> ConfigKey {
    ConfigKey { name, values, default, applies, about }
}

/// Every table of a configuration file.
pub const TABLES: &[KeyTable] = &[
    KeyTable { header: "[process]", about: "The process as a whole.", keys: PROCESS },
    KeyTable {
        header: "[admin]",
        about: "The admin API: metrics, status, reload, drain.",
        keys: ADMIN,
    },
    KeyTable { header: "[log]", about: "The log and the access log.", keys: LOG },
    KeyTable {
        header: "[frontend.NAME]",
        about: "Addresses where clients connect. A file has at least one frontend.",
        keys: FRONTEND,
    },
    KeyTable {
        header: "bind",
        about: "An element of `bind` can be a table such as \
                `{ address = \"192.0.2.1:443\", freebind = true }`. `status` and the log show an \
                interface after the address: `192.0.2.1:443%eth1`.",
        keys: BIND,
    },
    KeyTable {
        header: "[frontend.NAME.proxy_protocol]",
        about: "Peers that start each connection with a PROXY header, see \
                [proxy-protocol.md](proxy-protocol.md). A frontend has this table if and only if \
                one of its binds has `proxy_protocol = true`.",
        keys: PROXY_HEADERS,
    },
    KeyTable {
        header: "[[frontend.NAME.route]]",
        about: "Routes are tried in order before `pool`. The first route whose conditions all \
                match decides. A route has at least one condition and either `pool` or \
                `refuse`; a frontend has at most 255 routes.",
        keys: ROUTE,
    },
    KeyTable {
        header: "[frontend.NAME.sources]",
        about: "Which clients can connect, and how much one client source can use. Other clients \
                are reset before a backend is picked. Without this table every client can connect.",
        keys: SOURCES,
    },
    KeyTable {
        header: "[pool.NAME]",
        about: "Backends, and the policy that picks a backend for a session. A file has at least \
                one pool.",
        keys: POOL,
    },
    KeyTable {
        header: "proxy_protocol",
        about: "`proxy_protocol` of a pool can be a table such as \
                `{ version = \"v2\", send = [\"unique-id\"] }`.",
        keys: PROXY_HEADER,
    },
    KeyTable {
        header: "[pool.NAME.probe]",
        about: "Active probes. Without this table the pool has none.",
        keys: PROBE,
    },
    KeyTable {
        header: "expect",
        about: "`expect` can be a table with one of these keys. A text alone is `starts`.",
        keys: EXPECT,
    },
    KeyTable { header: "tls", about: "`tls` of a probe can be a table.", keys: PROBE_TLS },
    KeyTable {
        header: "[pool.NAME.ejection]",
        about: "Passive ejection of failing backends. It is on by default; \
                `ejection = \"off\"` in `[pool.NAME]` turns it off.",
        keys: EJECTION,
    },
    KeyTable {
        header: "[pool.NAME.heartbeat]",
        about: "Heartbeats of the pool's backends. Without this table the pool accepts none. \
                It needs `[heartbeat]`.",
        keys: POOL_HEARTBEAT,
    },
    KeyTable {
        header: "[pool.NAME.discover]",
        about: "A member source: backends that a registry, a file, a URL or DNS announces, see \
                [discovery.md](discovery.md). A key that names a kind belongs to that kind only.",
        keys: DISCOVER,
    },
    KeyTable {
        header: "[[pool.NAME.backend]]",
        about: "One table per backend. A pool has at least one backend, unless senders of \
                heartbeats can register or the pool has a `discover` table.",
        keys: BACKEND,
    },
    KeyTable {
        header: "[heartbeat]",
        about: "Addresses and keys for heartbeats.",
        keys: HEARTBEAT,
    },
    KeyTable {
        header: "[[heartbeat.key]]",
        about: "Keys with which senders sign heartbeats; 1 to 64 tables. To replace a key without \
                a gap, configure the old and the new key for a time.",
        keys: HEARTBEAT_KEY,
    },
    KeyTable {
        header: "[registry.NAME]",
        about: "Servers that `discover` tables ask; at most 16 registries. Pools with the same \
                registry share its connection.",
        keys: REGISTRY,
    },
    KeyTable {
        header: "[dns]",
        about: "How Tidegate resolves the names of backends, registries and URLs.",
        keys: DNS,
    },
];

const PROCESS: &[ConfigKey] = &[
    key(
        "workers",
        WordOrInteger("auto", 1, 256),
        Value("\"auto\""),
        Restart,
        "Worker threads. `\"auto\"` is one per CPU that the process can use, at most its quota of \
         CPU time rounded up.",
    ),
    key(
        "pin",
        Flag,
        Value("true"),
        Restart,
        "Pin each worker to its CPU. `false` leaves the placement to the scheduler.",
    ),
    key(
        "engine",
        Words(words::<EngineChoice>),
        Value("\"auto\""),
        Restart,
        "Relay engine. `\"auto\"` is epoll; `\"io_uring\"` falls back to epoll if the kernel or a \
         sandbox rejects it.",
    ),
    key(
        "spin",
        WordOrTime("off", "", "1us", "1ms"),
        Value("\"off\""),
        Restart,
        "Busy-poll for this long after the last activity. Uses a whole CPU per worker.",
    ),
    key(
        "leave_delay",
        WordOrTime("0s", "", "1ms", "30d"),
        Value("\"0s\""),
        Reload,
        "On SIGTERM, keep accepting for this long while `/ready` answers 503, then drain.",
    ),
    key(
        "drain_timeout",
        TIME,
        Value("\"30s\""),
        Reload,
        "In a drain of the process, wait this long for open sessions, then reset them.",
    ),
    key(
        "upgrade_timeout",
        Time("1s", "50s"),
        Value("\"30s\""),
        Reload,
        "In an upgrade, wait this long for the new process to become ready. After that Tidegate \
         kills the new process, and the old process keeps serving.",
    ),
    key(
        "connections_max",
        Integer(1, 10_000_000),
        Value("100_000"),
        Reload,
        "Cap on open sessions over all processes of an upgrade together; larger values act as \
         2,097,151. At the cap, new connections wait in the listen queue.",
    ),
    key(
        "user",
        Form("a name or a number, not root"),
        Described("the user that started the process"),
        Restart,
        "User to switch to before files and sockets are opened.",
    ),
    key(
        "group",
        Form("a name or a number"),
        Described("the groups of `user`"),
        Restart,
        "Group to use instead of the groups of `user`. It needs `user`.",
    ),
    key(
        "sandbox",
        Words(words::<Sandbox>),
        Value("\"auto\""),
        Restart,
        "Restrict the process with landlock, seccomp and fewer capabilities. `\"auto\"` uses what \
         the kernel supports; with `\"on\"` the process does not start if a part is missing.",
    ),
    key(
        "state",
        Form("`\"off\"` or an absolute path"),
        Value("\"off\""),
        Restart,
        "Directory in which operators' drains survive a restart. Tidegate creates it (mode 0700) \
         if its parent exists.",
    ),
    key(
        "buffers_max",
        Size("1MiB", "1TiB"),
        Value("\"256MiB\""),
        Reload,
        "Cap on memory for received but unsent bytes and for pipes. At the cap, Tidegate reads \
         only what it can send at once.",
    ),
];

const ADMIN: &[ConfigKey] = &[
    key(
        "listen",
        Form("`\"unix:/path\"` or `\"IP:PORT\"`"),
        Value("\"unix:/run/tidegate/admin.sock\""),
        Restart,
        "Address of the API. If the user cannot use the directory of the default, Tidegate \
         uses `$XDG_RUNTIME_DIR/tidegate`, else `/tmp/tidegate-UID`.",
    ),
    key(
        "token_file",
        Form("a file path"),
        Described("none"),
        Reload,
        "File with the bearer token. Required if other machines can reach `listen`.",
    ),
    key(
        "backend_metrics_max",
        Integer(0, 1_000_000),
        Value("100_000"),
        Reload,
        "If there are more backends than this, `/metrics` has series per pool but not per \
         backend. `0`: never series per backend.",
    ),
];

const LOG: &[ConfigKey] = &[
    key(
        "level",
        Words(words::<LogLevel>),
        Value("\"info\""),
        Reload,
        "Least severe level that is written. [observability.md](observability.md) says what each \
         level contains.",
    ),
    key(
        "format",
        Words(words::<LogFormat>),
        Value("\"text\""),
        Restart,
        "Format of the log lines.",
    ),
    key(
        "target",
        Form("`\"stderr\"` or a [syslog receiver](logging.md#syslog)"),
        Value("\"stderr\""),
        Restart,
        "Where log lines go.",
    ),
    key(
        "facility",
        Words(words::<SyslogFacility>),
        Value("\"daemon\""),
        Restart,
        "Facility of log lines in syslog.",
    ),
    key(
        "access",
        Form(
            "`\"off\"`, `\"stdout\"`, a file path with a `/`, or a \
             [syslog receiver](logging.md#syslog)",
        ),
        Value("\"off\""),
        Reload,
        "Access log: one JSON object per session.",
    ),
    key(
        "access_facility",
        Words(words::<SyslogFacility>),
        Value("\"local0\""),
        Reload,
        "Facility of access-log lines in syslog.",
    ),
];

const FRONTEND: &[ConfigKey] = &[
    key(
        "bind",
        Form("an address, a [table](#bind), or a list of both"),
        Required,
        Reload,
        "Addresses to listen on, see [Addresses](#addresses).",
    ),
    key(
        "pool",
        Form("the name of a pool"),
        Required,
        Reload,
        "Pool for clients that match no route.",
    ),
    key(
        "enabled",
        Flag,
        Value("true"),
        Reload,
        "`false`: as if the file did not have this frontend. Its keys are still checked.",
    ),
    key(
        "first_byte_timeout",
        TIME_OR_OFF,
        Value("\"off\""),
        Reload,
        "Close sessions in which neither side has sent data within this time after the connection \
         to the backend was established.",
    ),
    key(
        "idle_timeout",
        TIME_OR_OFF,
        Value("\"10m\""),
        Reload,
        "Close sessions in which no data has moved for this long.",
    ),
    key(
        "half_closed_timeout",
        TIME_OR_OFF,
        Value("\"30s\""),
        Reload,
        "Close sessions in which no data has moved for this long after one side sent FIN. \
         `idle_timeout` does not apply to these sessions.",
    ),
    key(
        "stalled_timeout",
        WordOrTime("off", "", "1s", "32767s"),
        Value("\"45s\""),
        Reload,
        "Minimum of `first_byte_timeout`, `idle_timeout` and `half_closed_timeout` while a peer \
         answers but its receive buffer is full.",
    ),
    key(
        "keepalive",
        WordOrTime("off", "", "1s", "32767s"),
        Value("\"60s\""),
        Reload,
        "Idle time before TCP keepalive probes, on both sides, in whole seconds.",
    ),
    key(
        "user_timeout",
        WordOrTime("off", "", "1ms", "24d"),
        Value("\"2m\""),
        Reload,
        "Time that sent data or keepalive probes can stay unacknowledged before the connection \
         counts as lost (`TCP_USER_TIMEOUT`, both sides). `\"off\"` leaves the kernel's default.",
    ),
    key(
        "download_rate",
        BYTE_RATE,
        Value("\"off\""),
        Reload,
        "Most bytes per second that the kernel sends to the client of each session. A changed \
         value applies to new sessions.",
    ),
    key(
        "upload_rate",
        BYTE_RATE,
        Value("\"off\""),
        Reload,
        "Most bytes per second that the kernel sends to the backend of each session. A changed \
         value applies to new sessions.",
    ),
    key(
        "connections_max",
        CONNECTIONS,
        Value("0"),
        Reload,
        "Cap on open sessions of this frontend over all processes of an upgrade together. \
         `0`: no cap.",
    ),
];

const BIND: &[ConfigKey] = &[
    key(
        "address",
        Form("an address"),
        Required,
        Reload,
        "Address to listen on, with one port or a range of ports.",
    ),
    key(
        "interface",
        Form("the name of an interface"),
        Described("any interface"),
        Reload,
        "Accept only connections that arrive on this interface. Binds with the same address can \
         differ in their interface.",
    ),
    key(
        "freebind",
        Flag,
        Value("false"),
        Reload,
        "Listen before an interface has the address, for addresses that move between hosts. \
         Wildcard addresses reject `true`.",
    ),
    key(
        "backlog",
        Integer(1, 65_535),
        Value("65_535"),
        Reload,
        "Length of the listen queue of each worker. The kernel lowers it to \
         `net.core.somaxconn`.",
    ),
    key(
        "mark",
        Integer(0, 4_294_967_295),
        Value("0"),
        Reload,
        "Firewall mark of the packets to clients (`SO_MARK`, needs `CAP_NET_ADMIN`). `0`: none.",
    ),
    key(
        "dscp",
        Integer(0, 63),
        Value("0"),
        Reload,
        "Differentiated services code point of the packets to clients.",
    ),
    key(
        "proxy_protocol",
        Flag,
        Value("false"),
        Reload,
        "Peers in `from` of [`proxy_protocol`](#frontendnameproxy_protocol) start each connection \
         with a PROXY header.",
    ),
];

const ROUTE: &[ConfigKey] = &[
    key(
        "sources",
        RANGES,
        Described("any client"),
        Reload,
        "Condition: ranges of client addresses.",
    ),
    key(
        "ports",
        Form("a port, a range such as `\"8000-8010\"`, or a list of both"),
        Described("any port"),
        Reload,
        "Condition: ports that clients connect to.",
    ),
    key(
        "addresses",
        RANGES,
        Described("any address"),
        Reload,
        "Condition: ranges of addresses that clients connect to.",
    ),
    key(
        "pool",
        Form("the name of a pool"),
        Described("required without `refuse`"),
        Reload,
        "Pool for the clients that match this route.",
    ),
    key("refuse", Flag, Value("false"), Reload, "Reset the clients that match this route."),
];

const PROXY_HEADERS: &[ConfigKey] = &[
    key(
        "from",
        RANGES,
        Required,
        Reload,
        "Peers that must send a header; at most 1,024 ranges. The header names the client.",
    ),
    key(
        "others",
        Words(words::<OtherPeers>),
        Value("\"refuse\""),
        Reload,
        "`\"refuse\"`: other peers are reset. `\"direct\"`: they are the clients, and Tidegate relays \
         all their bytes, also a header.",
    ),
    key(
        "timeout",
        Time("10ms", "60s"),
        Value("\"3s\""),
        Reload,
        "Time from the connection to its complete header. After it, the connection is reset.",
    ),
];

const SOURCES: &[ConfigKey] = &[
    key(
        "allow",
        RANGES,
        Value("[]"),
        Reload,
        "Clients that can connect. If `allow` or `allow_file` has an entry, all other addresses \
         are denied.",
    ),
    key(
        "deny",
        RANGES,
        Value("[]"),
        Reload,
        "Clients that cannot connect. The longest matching prefix of `allow` and `deny` decides.",
    ),
    key(
        "allow_file",
        Form("a file path"),
        Described("none"),
        Reload,
        "File with more allowed prefixes: one per line, `#` starts a comment. All lists of a \
         frontend together have at most 1,000,000 prefixes.",
    ),
    key(
        "deny_file",
        Form("a file path"),
        Described("none"),
        Reload,
        "File with more denied prefixes.",
    ),
    key(
        "prefix_v4",
        Integer(0, 32),
        Value("32"),
        Reload,
        "IPv4 addresses with this many equal leading bits are one client source. It needs \
         `connections_max` or `rate`.",
    ),
    key(
        "prefix_v6",
        Integer(0, 128),
        Value("64"),
        Reload,
        "IPv6 addresses with this many equal leading bits are one client source.",
    ),
    key(
        "connections_max",
        CONNECTIONS,
        Value("0"),
        Reload,
        "Cap on open sessions per client source. `0`: no cap.",
    ),
    key(
        "rate",
        Form(
            "`\"off\"`, or 1 to 1,000,000 per second, minute or hour: `\"100/s\"`, `\"30/m\"`, `\"500/h\"`",
        ),
        Value("\"off\""),
        Reload,
        "Rate limit on new connections of a client source.",
    ),
    key(
        "burst",
        Integer(1, 1_000_000),
        Described("connections of one second at `rate`"),
        Reload,
        "Connections that are accepted at once after a quiet period. It needs `rate`.",
    ),
];
