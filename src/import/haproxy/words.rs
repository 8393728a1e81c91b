//! Keywords of HAProxy that Tidegate has no key for, with the reason.
//!
//! Called by the other modules for every keyword that they do not translate.

use crate::report::LineVerdict::{
    self, Approximated, Dropped, NotPossible, Translated, WithoutEffect,
};

/// A keyword, what it gets, and why.
type KeywordRow = (&'static str, LineVerdict, &'static str);

/// Keywords of `global`.
const GLOBAL: &[KeywordRow] = &[
    ("chroot", Dropped, "Tidegate restricts itself, see [process] sandbox"),
    ("user", Dropped, "choose a user for Tidegate with [process] user"),
    ("group", Dropped, "choose a group for Tidegate with [process] group"),
    ("uid", Dropped, "choose a user for Tidegate with [process] user"),
    ("gid", Dropped, "choose a group for Tidegate with [process] group"),
    ("daemon", Dropped, "the service manager runs Tidegate"),
    ("master-worker", Dropped, "Tidegate always has a supervisor"),
    ("pidfile", Dropped, "use tidegate run --pid-file"),
    ("stats", Dropped, "Tidegate has an admin API, see [admin]"),
    ("ulimit-n", Dropped, "Tidegate raises its limit itself; see LimitNOFILE of the service"),
    ("cpu-map", Dropped, "Tidegate pins its workers, see [process] pin"),
    ("cpu-policy", Dropped, "Tidegate pins its workers, see [process] pin"),
    ("log-send-hostname", Dropped, "it is for syslog"),
    ("log-tag", Dropped, "it is for syslog"),
    ("hash-balance-factor", Dropped, "it has no counterpart"),
    ("spread-checks", Dropped, "it has no counterpart"),
    ("maxconnrate", NotPossible, "Tidegate has no rate limit for the whole process"),
    ("maxsessrate", NotPossible, "Tidegate has no rate limit for the whole process"),
    ("setenv", WithoutEffect, "used for the variables below it"),
    ("presetenv", WithoutEffect, "used for the variables below it"),
    ("unsetenv", WithoutEffect, "used for the variables below it"),
    ("resetenv", WithoutEffect, "used for the variables below it"),
    ("description", WithoutEffect, ""),
    ("node", WithoutEffect, ""),
    ("localpeer", WithoutEffect, "Tidegate shares no tables with peers"),
    ("lua-load", Dropped, "Tidegate runs no Lua"),
    ("nbproc", Dropped, "Tidegate has one process with workers"),
    ("ca-base", WithoutEffect, "it is for TLS"),
    ("crt-base", WithoutEffect, "it is for TLS"),
    ("external-check", Dropped, "[process] probe_helper allows commands"),
    ("insecure-fork-wanted", Dropped, "[process] probe_helper allows commands"),
    ("server-state-base", Dropped, "Tidegate keeps its state over reloads itself"),
    ("server-state-file", Dropped, "Tidegate keeps its state over reloads itself"),
];

/// Prefixes of keywords of `global`.
const GLOBAL_PREFIXES: &[KeywordRow] = &[
    ("tune.", Dropped, "it tunes HAProxy"),
    ("ssl-", WithoutEffect, "it is for TLS"),
    ("no", Dropped, "it tunes HAProxy"),
    ("profiling", Dropped, "it tunes HAProxy"),
    ("thread-", Dropped, "it tunes HAProxy"),
    ("max", Dropped, "it tunes HAProxy"),
    ("busy-polling", Dropped, "see [process] spin"),
    ("quiet", WithoutEffect, ""),
    ("strict-limits", WithoutEffect, ""),
    ("set-dumpable", WithoutEffect, ""),
    ("expose-", WithoutEffect, ""),
    ("h1-", WithoutEffect, "it is for HTTP"),
    ("h2-", WithoutEffect, "it is for HTTP"),
    ("grace", Dropped, "see [process] leave_delay"),
    ("issuers-", WithoutEffect, "it is for TLS"),
    ("device", WithoutEffect, ""),
    ("cluster-secret", WithoutEffect, ""),
    ("unix-bind", Dropped, "write the path and mode of each bind of a Unix socket"),
    ("default-path", WithoutEffect, ""),
];

/// Keywords of proxies.
const PROXY: &[KeywordRow] = &[
    ("option dontlognull", WithoutEffect, "the access log has every session"),
    ("option dontlog-normal", Dropped, "the access log has every session"),
    ("option logasap", Dropped, "the access log has a session when it ends"),
    ("option log-separate-errors", Dropped, "it is for syslog"),
    ("option log-health-checks", Translated, "the log always has changes of state"),
    ("option nolinger", Dropped, "Tidegate closes in order"),
    ("option splice-auto", WithoutEffect, "Tidegate splices by itself"),
    ("option splice-request", WithoutEffect, "Tidegate splices by itself"),
    ("option splice-response", WithoutEffect, "Tidegate splices by itself"),
    ("option socket-stats", WithoutEffect, "it is for statistics"),
    ("option contstats", WithoutEffect, "it is for statistics"),
    ("option tcp-smart-accept", WithoutEffect, "it tunes HAProxy"),
    ("option tcp-smart-connect", WithoutEffect, "it tunes HAProxy"),
    ("option abortonclose", Dropped, "Tidegate notices clients that leave the queue"),
    ("option srvtcpka", Translated, "keepalive is on by default"),
    ("option clitcpka", Translated, "keepalive is on by default"),
    ("option tcpka", Translated, "keepalive is on by default"),
    ("option independent-streams", Approximated, "data in either direction counts as activity"),
    ("option transparent", NotPossible, "Tidegate connects to the backends of a pool only"),
    ("option persist", Dropped, "it is for cookies"),
    ("dispatch", NotPossible, "write a server line"),
    ("rate-limit", NotPossible, "Tidegate has no rate limit for a whole frontend"),
    ("fullconn", Dropped, "it is for minconn"),
    ("description", WithoutEffect, ""),
    ("id", WithoutEffect, ""),
    ("guid", WithoutEffect, ""),
    ("enabled", WithoutEffect, ""),
    ("email-alert", Dropped, "alerts are made from metrics, see docs/observability.md"),
    ("log-format", Dropped, "the access log has a fixed set of fields"),
    ("log-format-sd", Dropped, "it is for syslog"),
    ("error-log-format", Dropped, "the access log has a fixed set of fields"),
    ("log-tag", Dropped, "it is for syslog"),
    ("log-steps", Dropped, "the access log has a session when it ends"),
    ("unique-id-format", Dropped, "sessions have numbers"),
    ("load-server-state-from-file", Dropped, "Tidegate keeps its state over reloads itself"),
    ("server-state-file-name", Dropped, "Tidegate keeps its state over reloads itself"),
    ("bind-process", Dropped, "Tidegate has one process with workers"),
    ("hash-balance-factor", Dropped, "it has no counterpart"),
    ("grace", Dropped, "see [process] leave_delay"),
    ("ignore-persist", NotPossible, "it needs rules"),
    ("force-persist", NotPossible, "it needs rules"),
    ("use-server", NotPossible, "give the server a pool and a route of its own"),
    ("filter", NotPossible, "Tidegate has no filters"),
    ("tcp-response", NotPossible, "Tidegate does not read answers"),
    ("monitor-uri", WithoutEffect, "it is for HTTP"),
    ("clitcpka-cnt", Dropped, "the number of keepalive probes is fixed"),
    ("clitcpka-intvl", Dropped, "the interval of keepalive probes is fixed"),
    ("clitcpka-idle", Dropped, "see keepalive of the frontend"),
    ("srvtcpka-cnt", Dropped, "the number of keepalive probes is fixed"),
    ("srvtcpka-intvl", Dropped, "the interval of keepalive probes is fixed"),
    ("srvtcpka-idle", Dropped, "see keepalive of the frontend"),
    ("cookie", WithoutEffect, "it is for HTTP"),
    ("capture", WithoutEffect, "it is for HTTP"),
    ("declare", WithoutEffect, "it is for HTTP"),
    ("redirect", WithoutEffect, "it is for HTTP"),
    ("monitor", WithoutEffect, "it is for HTTP"),
    ("max-keep-alive-queue", WithoutEffect, "it is for HTTP"),
    ("retry-on", WithoutEffect, "it is for HTTP"),
];

/// Prefixes of keywords of proxies.
const PROXY_PREFIXES: &[KeywordRow] = &[
    ("timeout http-", WithoutEffect, "it is for HTTP"),
    ("timeout tarpit", WithoutEffect, "it is for HTTP"),
    ("option http", WithoutEffect, "it is for HTTP"),
    ("option forward", WithoutEffect, "it is for HTTP"),
    ("option originalto", WithoutEffect, "it is for HTTP"),
    ("option accept-", WithoutEffect, "it is for HTTP"),
    ("option prefer-last", WithoutEffect, "it is for HTTP"),
    ("option checkcache", WithoutEffect, "it is for HTTP"),
    ("option forceclose", WithoutEffect, "it is for HTTP"),
    ("option h1-", WithoutEffect, "it is for HTTP"),
    ("http-", WithoutEffect, "it is for HTTP"),
    ("error", WithoutEffect, "it is for HTTP"),
    ("compression", WithoutEffect, "it is for HTTP"),
    ("stats", Dropped, "Tidegate has an admin API, see [admin]"),
];

/// Returns the verdict for a keyword of `global`.
pub(super) fn global(keyword: &str) -> Option<(LineVerdict, &'static str)> {
    find(keyword, GLOBAL, GLOBAL_PREFIXES)
}

/// Returns the verdict for a keyword of a proxy.
pub(super) fn proxy(keyword: &str) -> Option<(LineVerdict, &'static str)> {
    find(keyword, PROXY, PROXY_PREFIXES)
}

fn find(
    keyword: &str,
    exact: &[KeywordRow],
    prefixes: &[KeywordRow],
) -> Option<(LineVerdict, &'static str)> {
    let exact = exact.iter().find(|row| row.0 == keyword);
    let row = exact.or_else(|| prefixes.iter().find(|row| keyword.starts_with(row.0)))?;
    Some((row.1, row.2))
}
