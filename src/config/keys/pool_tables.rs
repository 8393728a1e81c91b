//! The keys of pools.

use super::tables::{CONNECTIONS, TIME, key};
use super::{Applies, ConfigKey, DefaultValue, Values, words};
use crate::validate::ProbeKindKey;
use Applies::Reload;
use DefaultValue::{Derived, Described, Required, Value};
use Values::{Flag, Form, Integer, Share, Time, WordOrTime, Words};
use tidegate_core::model::{
    Backups, DnsProbeCode, DnsProbeRecord, DnsProbeTransport, ExitCodes, HttpVersion, NodeRole,
    Policy, ProbeHeader, ProxyVersion, Tiers, WhenNoneEligible,
};

pub(super) const POOL: &[ConfigKey] = &[
    key(
        "of",
        Form("the name of another pool"),
        Described("the pool has its own backends"),
        Reload,
        "Use the backends and the probe of that pool, see \
         [roles.md](roles.md). The pool then has no `backend`, `probe`, `heartbeat` and \
         `discover`.",
    ),
    key(
        "role",
        Words(words::<NodeRole>),
        Described("any role"),
        Reload,
        "Only backends with this role are eligible. The probe must find roles.",
    ),
    key(
        "balance",
        Words(words::<Policy>),
        Value("\"weighted-round-robin\""),
        Reload,
        "Policy that picks a backend, see [balancing.md](balancing.md).",
    ),
    key(
        "hash_slots",
        Integer(251, 5_000_011),
        Value("65_537"),
        Reload,
        "For `source-hash`: slots of the table that maps clients to backends; a prime number, at \
         least the number of backends. A new value moves nearly every client to another backend.",
    ),
    key(
        "source",
        Form("an IP address or a list of at most 64"),
        Value("[]"),
        Reload,
        "Local addresses from which connections and probes start, used in turn. `[]`: the kernel \
         decides.",
    ),
    key("connect_timeout", TIME, Value("\"5s\""), Reload, "Timeout of one connection attempt."),
    key(
        "connect_attempts",
        Integer(1, 16),
        Value("3"),
        Reload,
        "Connection attempts per session, each to a different backend.",
    ),
    key(
        "queue_max",
        Integer(0, 1_000_000),
        Value("0"),
        Reload,
        "Maximum number of clients that wait in the queue of the pool while every backend is at \
         its `connections_max`, or while clients wait for an eligible backend. More clients wait in \
         the listen queue.",
    ),
    key(
        "queue_timeout",
        TIME,
        Derived("\"5s\"", "`connect_timeout`; `\"30s\"` with `when_none_eligible = \"wait\"`"),
        Reload,
        "Maximum time of a client in the queue of the pool. After that the client is reset.",
    ),
    key(
        "when_none_eligible",
        Words(words::<WhenNoneEligible>),
        Value("\"refuse\""),
        Reload,
        "If no backend is eligible, `\"refuse\"` resets the client, `\"try-all\"` uses every \
         backend that is not drained, and `\"wait\"` keeps the client in the queue (`queue_max`) \
         until a backend is eligible. See [failover.md](failover.md).",
    ),
    key(
        "backups",
        Words(words::<Backups>),
        Value("\"all\""),
        Reload,
        "Which backups serve while no backend of a lower tier is eligible: `\"all\"` that are \
         eligible and have the lowest tier, or `\"one\"`, the first of these in the order of the \
         pool.",
    ),
    key(
        "tiers",
        Words(words::<Tiers>),
        Value("\"strict\""),
        Reload,
        "`\"strict\"`: the lowest [tier](balancing.md#tiers) with an eligible backend serves alone. \
         `\"spill\"`: a tier gets 1.4 times the share of its backends that are eligible, at most \
         100% of the new sessions, and the next tier gets the rest.",
    ),
    key(
        "startup_grace",
        TIME,
        Value("\"3s\""),
        Reload,
        "Maximum time that clients wait for the first probe result of the pool. After that each \
         backend is eligible until its own first result.",
    ),
    key(
        "on_removal",
        WordOrTime("keep", "close-after ", "1ms", "30d"),
        Value("\"keep\""),
        Reload,
        "What happens to the sessions of a backend that leaves the file. `\"keep\"`: they finish; \
         `\"close-after 30s\"`: they are reset after 30 s.",
    ),
    key(
        "on_down",
        Form("`\"keep\"`, `\"reset\"`, or `\"close-after 1ms\"` to `\"close-after 30d\"`"),
        Value("\"keep\""),
        Reload,
        "What happens to the sessions of a backend that is [down](failover.md), or has lost the \
         `role` of the pool. `\"keep\"`: they continue; `\"reset\"`: they are reset at once; \
         `\"close-after 5s\"`: they are reset after 5 s, unless the backend has recovered.",
    ),
    key(
        "on_recover",
        WordOrTime("keep", "close-after ", "1ms", "30d"),
        Value("\"keep\""),
        Reload,
        "What happens to the sessions of backups when a lower tier [serves \
         again](failover.md#when-a-lower-tier-returns). `\"keep\"`: they continue; \
         `\"close-after 10s\"`: they are closed after 10 s, unless the backups serve again.",
    ),
    key(
        "proxy_protocol",
        Form("`\"off\"`, `\"v1\"`, `\"v2\"` or a [table](#proxy_protocol)"),
        Value("\"off\""),
        Reload,
        "PROXY header that backends get before the first byte of each connection, see \
         [proxy-protocol.md](proxy-protocol.md). Probes send a header without a client.",
    ),
    key(
        "slow_start",
        WordOrTime("off", "", "100ms", "1h"),
        Value("\"off\""),
        Reload,
        "Time in which a new or returning backend reaches its full weight and cap. It does not \
         apply while the whole pool starts.",
    ),
    key(
        "ejection",
        Form("`\"off\"` or the table `[pool.NAME.ejection]`"),
        Described("the defaults of that table"),
        Reload,
        "Passive ejection of failing backends.",
    ),
];

pub(super) const PROBE: &[ConfigKey] = &[
    key(
        "kind",
        Words(words::<ProbeKindKey>),
        Value("\"tcp\""),
        Reload,
        "`tcp`: the backend accepts a connection; `send-expect`: the answer has the expected \
         bytes; `steps`: several requests and answers; `http`: the answer has an accepted status; \
         `agent`: see [agents.md](agents.md); `exec`: a command, see [exec.md](exec.md); the other \
         kinds: see [roles.md](roles.md).",
    ),
    key(
        "port",
        Integer(1, 65_535),
        Described("the port of the backend; required for `agent`"),
        Reload,
        "Port that is probed, for a service that tells the health of another one.",
    ),
    key(
        "address",
        Form("an IP address"),
        Described("the address of the backend"),
        Reload,
        "Address that is probed instead of the backend's.",
    ),
    key(
        "source",
        Form("up to 64 local addresses"),
        Described("`source` of the pool"),
        Reload,
        "Addresses from which probes start, in turn.",
    ),
    key(
        "proxy_protocol",
        Words(words::<ProbeHeader>),
        Described(
            "`\"local\"` if the pool has a header and the probe has no `port`, else `\"off\"`",
        ),
        Reload,
        "`\"local\"`: the probe starts with the pool's PROXY header, without a client.",
    ),
    key(
        "tls",
        Form("`true`, `false`, or a [table](#tls)"),
        Value("false"),
        Reload,
        "Probe over TLS; `true` verifies the certificate. A `tcp` probe ends after the handshake.",
    ),
    key(
        "interval",
        Time("10ms", "30d"),
        Value("\"2s\""),
        Reload,
        "Time between probes while the state is stable.",
    ),
    key(
        "timeout",
        TIME,
        Derived("\"1s\"", "`\"1s\"`, or `interval` if that is shorter"),
        Reload,
        "Timeout of one probe, at most `interval`.",
    ),
    key(
        "fast_interval",
        TIME,
        Derived("\"1s\"", "`\"500ms\"`, or `timeout` if that is longer"),
        Reload,
        "Time between probes before the first state, and while `rise` or `fall` is being counted. \
         It is between `timeout` and `interval`.",
    ),
    key(
        "down_interval",
        Time("10ms", "30d"),
        Derived("\"2s\"", "`interval`"),
        Reload,
        "Time between probes of a backend that is down. It is at least `timeout`.",
    ),
    key(
        "rise",
        Integer(1, 100),
        Value("2"),
        Reload,
        "Successful probes in a row until the backend is up.",
    ),
    key(
        "fall",
        Integer(1, 100),
        Value("3"),
        Reload,
        "Failed probes in a row until the backend is down.",
    ),
    key(
        "send",
        Form("text of at most 4,096 bytes, or `{ hex = \"...\" }`"),
        Value("\"\""),
        Reload,
        "For `send-expect` and `agent`: bytes to send first. TOML escapes such as `\\r\\n` work.",
    ),
    key(
        "expect",
        Form("text, or a [table](#expect)"),
        Described("required for `send-expect`; none for `http`"),
        Reload,
        "For `send-expect`: expected bytes of the answer. For `http`: expected bytes of the body.",
    ),
    key(
        "steps",
        Form("1 to 32 tables `{ send = ... }` and `{ expect = ... }`"),
        Described("required for `steps`"),
        Reload,
        "For `steps`: what is sent and expected, in this order. An answer continues after the \
         bytes that the step before has matched; all answers together have at most 64 KiB.",
    ),
    key(
        "path",
        Form("text that starts with `/`, at most 2,048 bytes"),
        Value("\"/\""),
        Reload,
        "For `http`: path of the request.",
    ),
    key(
        "host",
        Form("text of at most 255 bytes"),
        Described("the address of the backend"),
        Reload,
        "For `http`: value of the `Host` header.",
    ),
    key(
        "method",
        Form("an HTTP method of at most 32 bytes"),
        Value("\"GET\""),
        Reload,
        "For `http`: method of the request.",
    ),
    key(
        "http",
        Words(words::<HttpVersion>),
        Value("\"1.1\""),
        Reload,
        "For `http`: version of the request.",
    ),
    key(
        "headers",
        Form("a table of at most 16 headers"),
        Described("none"),
        Reload,
        "For `http`: more headers, such as `{ Authorization = \"Basic ...\" }`. Their values are \
         visible in the file and in no log.",
    ),
    key(
        "status",
        Form("codes and ranges, 100 to 599: `\"200,204,300-302\"`; at most 32"),
        Value("\"200-399\""),
        Reload,
        "For `http`: accepted status of the final response.",
    ),
    key(
        "user",
        Form("text of 1 to 64 bytes"),
        Described("none"),
        Reload,
        "For `redis`, `postgres` and `mysql`: the user that logs in. For `redis` it needs \
         `password_file`.",
    ),
    key(
        "password_file",
        Form("a file path"),
        Described("no password"),
        Reload,
        "For kinds with `user`: file with the password in one line. It is read for each probe.",
    ),
    key(
        "database",
        Form("text of 1 to 64 bytes"),
        Described("the name of the user"),
        Reload,
        "For `postgres` with `user`: the database that is opened.",
    ),
    key(
        "name",
        Form("a name of at most 253 bytes"),
        Described("required for `dns`"),
        Reload,
        "For `dns`: the name that the question is about; `.` is the root.",
    ),
    key(
        "record",
        Words(words::<DnsProbeRecord>),
        Value("\"a\""),
        Reload,
        "For `dns`: type of the records that the question asks for.",
    ),
    key(
        "transport",
        Words(words::<DnsProbeTransport>),
        Value("\"tcp\""),
        Reload,
        "For `dns`: how the question travels. `tls` and a PROXY header need `\"tcp\"`.",
    ),
    key(
        "rcode",
        Words(words::<DnsProbeCode>),
        Value("\"noerror\""),
        Reload,
        "For `dns`: expected code of the answer.",
    ),
    key(
        "command",
        Form("1 to 64 words, 8,192 bytes together"),
        Described("required for `exec`"),
        Reload,
        "For `exec`: absolute path of a program, and its arguments. `{pool}`, `{backend}`, \
         `{address}` and `{port}` stand for those of the backend.",
    ),
    key(
        "exit_codes",
        Words(words::<ExitCodes>),
        Value("\"plain\""),
        Reload,
        "For `exec`: the convention of its [exit codes](exec.md#result).",
    ),
];

pub(super) const PROXY_HEADER: &[ConfigKey] = &[
    key("version", Words(words::<ProxyVersion>), Required, Reload, "Version of the header."),
    key("crc32c", Flag, Value("false"), Reload, "Add a checksum. Version 2 only."),
    key(
        "send",
        Form("a list of `\"authority\"`, `\"alpn\"`, `\"ssl\"`, `\"unique-id\"`"),
        Value("[]"),
        Reload,
        "Received TLVs to add; version 2 only. Without a received identifier, `unique-id` is the \
         number of the session.",
    ),
    key(
        "pass",
        Form("a list of at most 32 types such as `0xEA` or `\"0xE0-0xEF\"`"),
        Value("[]"),
        Reload,
        "Types of received TLVs to copy into the header. Version 2 only.",
    ),
];

pub(super) const EXPECT: &[ConfigKey] = &[
    key(
        "starts",
        Form("text of 1 to 1,024 bytes"),
        Described("none"),
        Reload,
        "The answer starts with this.",
    ),
    key(
        "contains",
        Form("text of 1 to 1,024 bytes"),
        Described("none"),
        Reload,
        "The first 64 KiB of the answer contain this.",
    ),
    key(
        "regex",
        Form(
            "a [regular expression](https://docs.rs/regex/latest/regex/#syntax), at most 1,024 bytes",
        ),
        Described("none"),
        Reload,
        "The first 64 KiB of the answer match this. It is tested each time bytes arrive.",
    ),
    key(
        "hex",
        Form("1 to 1,024 bytes as pairs of hex digits"),
        Described("none"),
        Reload,
        "The first 64 KiB of the answer contain these bytes.",
    ),
];

pub(super) const PROBE_TLS: &[ConfigKey] = &[
    key(
        "verify",
        Form("`\"system\"`, `\"off\"`, or a path with a slash"),
        Value("\"system\""),
        Reload,
        "Certificates that are trusted: those of the system, or those of a PEM file. `\"off\"` \
         accepts every certificate.",
    ),
    key(
        "name",
        Form("a host name or an IP address"),
        Described("the probed address, and no SNI"),
        Reload,
        "Name that is sent (SNI) and that the certificate must have.",
    ),
    key(
        "alpn",
        Form("up to 8 protocols of 1 to 255 bytes"),
        Described("none"),
        Reload,
        "Protocols that are offered (ALPN).",
    ),
];

pub(super) const EJECTION: &[ConfigKey] = &[
    key(
        "failures",
        Integer(1, 1_000),
        Value("5"),
        Reload,
        "Failed connects and early resets in a row until the backend is ejected.",
    ),
    key(
        "time",
        TIME,
        Value("\"10s\""),
        Reload,
        "Length of the first ejection. The n-th ejection in a row lasts n times as long, at most \
         5 minutes.",
    ),
    key(
        "max_ejected",
        Share,
        Value("\"50%\""),
        Reload,
        "Maximum share of the pool that is ejected at once. The last eligible backend is never \
         ejected.",
    ),
    key(
        "early_resets",
        Flag,
        Value("true"),
        Reload,
        "Count early resets as failures. An early reset is a RST of the backend before its first \
         byte, after the client has sent data.",
    ),
    key(
        "slow_first_byte",
        WordOrTime("off", "", "100ms", "30d"),
        Value("\"1s\""),
        Reload,
        "A backend becomes suspect if clients wait this long for its first byte while other \
         backends answer. See [health.md](health.md#slow-detector).",
    ),
];

pub(super) const BACKEND: &[ConfigKey] = &[
    key(
        "name",
        Form("a [name](#names)"),
        Described("`address`"),
        Reload,
        "Name in status, metrics and commands.",
    ),
    key(
        "address",
        Form(
            "`\"IP:PORT\"`, `\"[IPV6]:PORT\"`, `\"NAME:PORT\"`, `\"srv:NAME\"`, `\"unix:/path\"` or \
             `\"unix:@name\"`",
        ),
        Required,
        Reload,
        "Address of the service; each address of a name becomes a backend. `srv:` asks for SRV \
         records, and `unix:@name` is an abstract Unix socket.",
    ),
    key(
        "weight",
        Integer(1, 1_000),
        Value("1"),
        Reload,
        "Share of new sessions, relative to the other backends.",
    ),
    key("backup", Flag, Value("false"), Reload, "`true`: the same as `tier = 1`."),
    key(
        "tier",
        Integer(0, 9),
        Value("0"),
        Reload,
        "[Tier](balancing.md#tiers) of the backend. Backends of the lowest tier serve first.",
    ),
    key(
        "enabled",
        Flag,
        Value("true"),
        Reload,
        "`false`: as if the file did not have this backend. Its keys are still checked.",
    ),
    key(
        "connections_max",
        CONNECTIONS,
        Value("0"),
        Reload,
        "Cap on open sessions of this backend, exact over all workers and over all processes of \
         an upgrade. `0`: no cap.",
    ),
];
