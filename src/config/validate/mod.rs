//! Converts a parsed document to the model: fills in every default and reports every
//! semantic problem with its place.
//!
//! Called by `parse` and `load`. It never stops at the first problem. It reads only the
//! document and the files that the document names.

mod backends;
mod binds;
mod client_port;
mod cross;
mod discover;
mod dns;
mod follow;
mod frontend;
mod globals;
mod guards;
mod heartbeat;
mod log;
mod named_file;
mod pool;
mod probe;
mod proxy_protocol;
mod registry;
mod routes;
mod sources;
mod tiers;

pub(super) use discover::{
    FIRST_WAIT, INTERVAL, MAX_STALE, RecordKey, SourceKindKey, default_prefix, record_of,
};
pub(super) use guards::{AskedKind, defaults as guard_defaults};
pub(super) use probe::{ProbeKindKey, default_times as probe_times};

use std::sync::Arc;

use toml::de::DeTable;

pub use registry::REGISTRIES_MAX;
pub use routes::ROUTES_MAX;

use super::NamedFiles;
use super::defaults::Defaults;
use super::diagnose::ProblemCollector;
use super::file::Section;
use super::value::ValueError;
use binds::BindCount;
use discover::KnownRegistries;
use tidegate_core::model::{Config, Includes};

/// Most frontends. Each costs a listener per bind and worker.
pub const FRONTENDS_MAX: usize = 4_096;

/// Most binds of all frontends. Each costs a listener per worker.
pub const BINDS_MAX: usize = 8_192;

/// Most pools.
pub const POOLS_MAX: usize = 10_000;

/// Most backends of all pools. The time of a reload grows with their number.
pub const BACKENDS_MAX: usize = 100_000;

/// Most source addresses of a pool. With the default range of local ports they are enough
/// for 1.8 million connections to each backend.
pub const POOL_SOURCES_MAX: usize = 64;

/// Largest value of any `connections_max`, above what the memory of a host allows.
pub(super) const CONNECTIONS_MAX: u32 = 10_000_000;

/// Returns the model of `document`. If `report` holds an error afterwards, the model is
/// incomplete and must not be used.
pub(super) fn config<'a>(
    document: &DeTable<'a>,
    files: NamedFiles<'_>,
    report: &ProblemCollector<'_>,
) -> Config {
    let top = Section::new(report, document, "the file".to_owned(), 0..0);
    // `include` has read it.
    let _ = top.node("include");
    let process = globals::process(&top);
    let admin = globals::admin(&top);
    let log = log::log(&top);
    let defaults = Defaults::read(&top);
    let mut bind_count = BindCount::default();
    let frontends: Vec<_> = top
        .named_tables("frontend")
        .into_iter()
        .map(|named| frontend::read(named, &defaults, files, &mut bind_count))
        .collect();
    let registries: Vec<_> = top
        .named_tables("registry")
        .into_iter()
        .map(|named| registry::read(named, files))
        .collect();
    let known = KnownRegistries { list: &registries, all: top.has_all_named_tables("registry") };
    let mut pools: Vec<_> = top
        .named_tables("pool")
        .into_iter()
        .map(|named| pool::read(named, &defaults, known, files))
        .collect();
    defaults.finish(report);
    registry::check(report, &registries, pools.iter().filter_map(|pool| pool.registry.as_deref()));
    let dns = dns::read(&top);
    let heartbeat = heartbeat::read(&top, files);
    let enabled = frontends.iter().filter(|frontend| frontend.enabled).count();
    require_something(&top, document, (frontends.len(), enabled), pools.len());
    let all_pools = top.has_all_named_tables("pool");
    cross::check(report, &admin, (&frontends, bind_count), &pools, all_pools);
    cross::exec_probes(report, &pools, process.probe_helper);
    follow::resolve(report, &mut pools, all_pools);
    heartbeat::check(report, heartbeat.as_ref(), &pools);
    report.warn_of_idle_limits(process.connections_max);
    top.finish();
    Config {
        process,
        admin: admin.model,
        log,
        frontends: frontends
            .into_iter()
            .filter(|frontend| frontend.enabled)
            .map(|frontend| frontend.model)
            .collect(),
        pools: pools.into_iter().map(|pool| Arc::new(pool.model)).collect(),
        heartbeat: heartbeat.map(|heartbeat| heartbeat.model),
        registries: registries.into_iter().map(|registry| registry.model).collect(),
        dns,
        includes: Includes::default(),
    }
}

fn require_something(
    top: &Section<'_, '_>,
    document: &DeTable<'_>,
    (frontends, enabled): (usize, usize),
    pools: usize,
) {
    let say = |message: &str, help: &str| {
        top.report.error(top.header.clone(), ValueError::new(message).help(help));
    };
    if document.is_empty() {
        return say(
            "the file configures nothing",
            "it needs at least one [frontend.NAME] and one [pool.NAME]",
        );
    }
    let absent = |key: &'static str| {
        top.key_place(key).is_none_or(|_| is_empty_table(document, key)) && !top.misspells(key)
    };
    if frontends > 0 && enabled == 0 {
        say("every frontend is disabled", "remove enabled = false from a [frontend.NAME]");
    }
    if frontends == 0 && absent("frontend") {
        say("there is no frontend", "add [frontend.NAME] with bind and pool");
    }
    if pools == 0 && absent("pool") {
        say("there is no pool", "add [pool.NAME] with at least one [[pool.NAME.backend]]");
    }
}

fn is_empty_table(document: &DeTable<'_>, key: &str) -> bool {
    let table = document.get(key).and_then(|node| node.get_ref().as_table());
    table.is_some_and(|table| table.is_empty())
}
