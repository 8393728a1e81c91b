//! The keys of heartbeats.

use super::tables::{TIME, key};
use super::{Applies, ConfigKey, DefaultValue, Values};
use Applies::Reload;
use DefaultValue::{Required, Value};
use Values::{Flag, Form, Integer, Time};

pub(super) const POOL_HEARTBEAT: &[ConfigKey] = &[
    key(
        "register",
        Flag,
        Value("false"),
        Reload,
        "Senders that are not in the file can join the pool.",
    ),
    key(
        "require",
        Flag,
        Value("false"),
        Reload,
        "Backends of the file are eligible only while they send heartbeats.",
    ),
    key(
        "interval",
        Time("20ms", "10s"),
        Value("\"100ms\""),
        Reload,
        "Expected time between heartbeats if the sender does not state one.",
    ),
    key(
        "ttl",
        Time("60ms", "30d"),
        Value("\"10s\""),
        Reload,
        "Silence after which a registered or required backend is down. It is at least three times \
         `interval`, and at least three intervals of the sender.",
    ),
    key(
        "forget_after",
        TIME,
        Value("\"1m\""),
        Reload,
        "Time after `ttl` until a silent registered backend leaves the pool.",
    ),
    key(
        "backends_max",
        Integer(1, 10_000),
        Value("1000"),
        Reload,
        "Maximum number of registered backends.",
    ),
    key(
        "weight_max",
        Integer(1, 1_000),
        Value("100"),
        Reload,
        "Maximum weight of a registered backend. A backend of the file can request at most its \
         `weight`.",
    ),
];

pub(super) const HEARTBEAT: &[ConfigKey] = &[key(
    "listen",
    Form("`\"IP:PORT\"`, or a list of at most 16"),
    Required,
    Reload,
    "UDP addresses to receive heartbeats at.",
)];

pub(super) const HEARTBEAT_KEY: &[ConfigKey] = &[
    key(
        "id",
        Integer(1, 4_294_967_295),
        Required,
        Reload,
        "Number of the key. Every datagram names its key.",
    ),
    key(
        "file",
        Form("a file path"),
        Required,
        Reload,
        "File with the secret: 32 to 1024 bytes, mode 0600. White space at the end of a text file \
         is ignored.",
    ),
    key(
        "pools",
        Form("the name of a pool, or a list"),
        Required,
        Reload,
        "Pools that this key can report for.",
    ),
    key(
        "addresses",
        Form("a prefix, an address, or a list of at most 64"),
        Required,
        Reload,
        "Prefixes in which reported backend addresses must be.",
    ),
];
