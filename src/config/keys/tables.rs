//! The tables of a configuration file in the order of `config/full.toml`, with the keys of the
//! process and of frontends.

use super::discovery_tables::{DISCOVER, DNS, REGISTRY};
use super::frontend_tables::{BIND, FRONTEND, PROXY_HEADERS, ROUTE, SOURCES};
use super::heartbeat_tables::{HEARTBEAT, HEARTBEAT_KEY, POOL_HEARTBEAT};
use super::pool_tables::{BACKEND, EJECTION, EXPECT, POOL, PROBE, PROBE_TLS, PROXY_HEADER};
use super::{Applies, ConfigKey, DefaultValue, KeyTable, Values, words};
use Applies::{Reload, Restart};
use DefaultValue::{Described, Value};
use Values::{Flag, Form, Integer, Size, Time, WordOrInteger, WordOrTime, Words};
use tidegate_core::model::{EngineChoice, LogFormat, LogLevel, Sandbox, SyslogFacility};

pub(super) const CONNECTIONS: Values = Integer(0, 10_000_000);
pub(super) const TIME: Values = Time("1ms", "30d");

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
        "probe_helper",
        Flag,
        Value("false"),
        Restart,
        "Start a process outside of the sandbox that runs the commands of `exec` probes, see \
         [security.md](security.md#probe-helper).",
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
        "File with the bearer token for every request. If other machines can reach `listen`, this or \
         `read_token_file` is required.",
    ),
    key(
        "read_token_file",
        Form("a file path"),
        Described("none"),
        Reload,
        "File with a bearer token for requests that change nothing.",
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
